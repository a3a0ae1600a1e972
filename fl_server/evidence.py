"""`fl-study attack` and `fl-study release`: what an adversary finds in a rehearsal of a study, and whether a model may go out.

A rehearsal runs the production mechanism on phantoms or on given sites, so attacking it says what the mechanism lets through. It
says nothing of what a run on other patients did; that is what the hospitals' own ledgers and self-tests are for.
"""

import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional

from fl_server import figures
from fl_server.results import canonical
from fl_server.simulation import Outcome
from models import learning, networks
from models.learning import TrainingCohort
from models.study import Privacy, Study
from privacy import attacks
from privacy.accounting import PrivacyEvent, epsilon
from privacy.dpsgd import Batch, Clip, LoopEngine, Losses, private_gradient
from privacy.errors import MessageMalformed, ReleaseRefused
from privacy.noise import Keystream

VERSION = 1
COHORT = "fl_client.rehearsal:cohort"  # a rehearsal is attacked where it lies, so the site's half is looked up by name
STEPS_MAX, PATIENTS_MAX, DRAWS_MAX = 100, 100, 12_000
"""Of the audited run: steps, patients beside the canaries, and gradients in all. Enough for the estimate, and twenty seconds on a
core with the small network; the claim that it is held against is of exactly these steps."""
PICTURE_PX = 32
OWN_PX_MAX, OWN_WEIGHTS_MAX = 64, 1_000_000  # of the study's own network, beyond which its inversion takes minutes
PLAIN = "plain: this site's update"
JOINT_MAX = 6  # pictures that the adversary looks for at once in a sum
CLAIM_ROOM = 1e-6  # relative, between the claim in attack.json and the same computed anew on another machine
Tell = Callable[[str], None]
Float32 = NDArray[np.float32]


def attack(study: Study, outcome: Outcome, out: Path, tell: Tell) -> dict[str, Any]:
    """Attack the finished rehearsal `outcome` of `study`; what was found, also written to `out`/attack.json with its pictures."""
    cohorts = {
        (name, split): pkgutil.resolve_name(COHORT)(outcome.folder / "sites" / name, _rehearsed(outcome), split)
        for name in _trained(study, outcome)
        for split in ("train", "test")
    }
    found: dict[str, Any] = {"version": VERSION, "study": study.name, "learned": study.learned, "audit": None}
    found |= {"run": outcome.results["run_id"], "phantoms": _phantoms(study, outcome)}
    found["privacy"] = [statement.to_json() for statement in study.statements()]
    if study.privacy != "none":
        tell("canaries: one run of the mechanism with patients that cannot be missed")
        audit = _canaries(study, cohorts[next(iter(cohorts))])
        found["audit"] = _audit_facts(audit)
        seen = audit.estimate
        caption = f"estimate of ε {seen.epsilon:.2f} ({seen.low:.2f} to {seen.high:.2f}), claim {audit.claim:.2f}"
        (out / "canaries.png").write_bytes(
            figures.png(figures.canaries(audit.inside.tolist(), audit.outside.tolist(), caption))
        )
    tell("membership inference on the final model")
    found["membership"] = _membership(study, outcome, cohorts, out)
    tell("reconstruction of a picture from what the coordinator sees")
    found["reconstruction"] = _reconstruction(study, cohorts, out)
    found["sentences"] = _sentences(study, found)
    (out / "attack.json").write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
    return found


def _trained(study: Study, outcome: Outcome) -> list[str]:
    """Sites that the model learned from: the patients of others are no members, and would hide those who are."""
    gave = {site for entry in outcome.results["rounds"] for site in entry["contributors"]}
    return [name for name in study.participation.sites if name in gave]


def _rehearsed(outcome: Outcome) -> Study:
    """The study as it was run: with the rehearsal's own keys."""
    return Study.from_canonical(canonical(outcome.results["study"]))


def _phantoms(study: Study, outcome: Outcome) -> bool:
    """Whether all patients of the rehearsal were made up."""
    return all((outcome.folder / "sites" / name / "hospital").is_dir() for name in study.all_sites)


def _units(study: Study, cohort: TrainingCohort) -> list[Batch]:
    """Each patient as the mechanism sees it, without augmentation."""
    still = study.model_copy(update={"training": study.training.model_copy(update={"augmentation": "none"})})
    generator = torch.Generator().manual_seed(0)
    return [learning.unit(cohort, rows, still, generator) for rows in learning.labelled_patients(cohort)]


def _canaries(study: Study, cohort: TrainingCohort) -> attacks.CanaryAudit:
    plan, net = learning.private(study), networks.build(study)
    event, units = study.event(study.training.rounds), _units(study, cohort)[:PATIENTS_MAX]
    drawn = plan.sampling_rate * (len(units) + attacks.CANARIES / 2)
    rate = study.training.learning_rate * plan.clip_norm / (plan.sampling_rate * len(units))

    def descend(noisy: Float32) -> None:
        step = networks.placed(np.float32(rate) * noisy, networks.trained_places(net))
        networks.load_vector(net, networks.to_vector(net) - step)

    training = attacks.Training(net, learning.losses_of(study), len(units), units.__getitem__, descend)
    return attacks.canary_audit(
        training,
        attacks.Mechanism(
            clip=Clip(plan.clip_norm),
            noise_multiplier=event.noise_multiplier,
            sampling_rate=event.sampling_rate,
            steps=max(1, min(event.steps, STEPS_MAX, int(DRAWS_MAX / drawn))),
            delta=plan.delta,
            batch_max=plan.batch_max(len(units) + attacks.CANARIES),
        ),
    )


def _audit_facts(audit: attacks.CanaryAudit) -> dict[str, Any]:
    return {
        "canaries": len(audit.inside) + len(audit.outside),
        "event": audit.event.to_json(),
        "delta": audit.delta,
        "unit": "patient",
        "relation": "add or remove one patient",
        "claim": audit.claim,
        "lower_bound": audit.bound.epsilon,
        "lower_bound_ceiling": audit.bound.ceiling,
        "estimate": _finite(audit.estimate.epsilon),
        "low": _finite(audit.estimate.low),
        "alarm": _finite(audit.estimate.alarm),
        "high": _finite(audit.estimate.high),
        "noise_over_claimed": audit.noise,
        "smallest_noticed": _finite(audit.smallest),
        "faults": audit.faults,
    }


def _finite(value: float) -> float:
    """JSON has no infinity; an ε of a million says the same."""
    return min(value, 1e6)


def _membership(study: Study, outcome: Outcome, cohorts: dict[tuple[str, str], Any], out: Path) -> dict[str, Any]:
    """Losses of patients that were trained on, and of patients that were not, under the released model."""
    model = outcome.folder / "coordinator" / "runs" / outcome.results["run_id"] / "model.safetensors"
    net = networks.build(study)
    networks.load_vector(net, load_file(model)["model"])
    net.eval()
    losses: dict[str, list[float]] = {"train": [], "test": []}
    for (_, split), cohort in cohorts.items():
        for rows in learning.labelled_patients(cohort):
            unit = _unit(cohort, rows)
            with torch.inference_mode():
                losses[split].append(float(learning.losses_of(study)(net, unit)[0]))
    seen = attacks.membership_inference(np.array(losses["train"]), np.array(losses["test"]))
    caption = f"AUC {seen.auc:.3f} ({seen.low:.3f} to {seen.high:.3f}); 0.5 is chance"
    rates = list(zip(seen.roc[0].tolist(), seen.roc[1].tolist(), strict=True))
    (out / "membership.png").write_bytes(figures.png(figures.membership(rates, caption)))
    strict = None if seen.strict is None else asdict(seen.strict)
    facts = {"members": seen.members, "others": seen.others, "auc": seen.auc, "low": seen.low, "high": seen.high}
    return facts | {"unit": "patient", "strict": strict, "least": asdict(seen.least)}


@dataclass(frozen=True)
class _Prey:
    """A network, and for each site one patient whose gradient is all that the site contributes: the worst case for that patient.

    `units`: Batches with B = K = 1, the first being the patient whose picture is looked for.
    """

    name: str
    net: nn.Module
    units: list[Batch]
    losses: Losses

    def gradient(self, unit: Batch) -> Tensor:
        return attacks.gradient(self.net, self.losses, unit)

    def noisy(self, unit: Batch, plan: Privacy) -> Tensor:
        """What a site sends of `unit` under differential privacy, from the production mechanism; in clip norms."""
        clip, engine = Clip(plan.clip_norm), LoopEngine(self.net, self.losses)
        made, _ = private_gradient(engine, [unit], clip, plan.noise_multiplier or 0.0, Keystream())
        return torch.from_numpy(made * 2.0**-clip.bits).float()

    def nearest(self, observed: Tensor, pictures: int) -> tuple[float, Tensor]:
        """(dB, picture): of `pictures` that are looked for together, their labels being known, the one nearest to the truth."""
        images, *known = (torch.cat(parts) for parts in zip(*self.units[:pictures], strict=True))
        made = attacks.invert(self.net, self.losses, observed, tuple(images.shape), tuple(known))
        return max(((attacks.psnr(one, images[0]), one[0, 0]) for one in made), key=lambda pair: pair[0])


def _unit(cohort: Any, rows: Tensor) -> Batch:
    """The patient with the images of `rows`, as the loss takes her."""
    given = learning.inputs(cohort.images[rows][None].float(), learning.covariates_of(cohort)[rows][None])
    return *given, cohort.targets[rows][None], cohort.known[rows][None]


def _preys(study: Study, cohorts: dict[tuple[str, str], Any]) -> list[_Prey]:
    """The network that is easiest to look into and, unless it is large, the study's own."""
    one: list[Batch] = []
    losses = learning.losses_of(study)
    for name in dict.fromkeys(site for site, _ in cohorts):
        cohort = cohorts[name, "train"]
        one.append(_unit(cohort, learning.labelled_patients(cohort)[0][:1]))
    easy = attacks.SmoothNet(PICTURE_PX, len(study.task.targets))
    bare = [(images, *labels[-2:]) for images, *labels in one]  # it takes no covariates
    found = [_Prey("a network that is easy to invert", easy, [_reduced(unit, PICTURE_PX) for unit in bare], losses)]
    own = networks.build(study)
    if networks.to_vector(own).size <= OWN_WEIGHTS_MAX:
        found.append(
            _Prey(f"the study's network ({study.network.name})", own, [_reduced(u, OWN_PX_MAX) for u in one], losses)
        )
    return found


def _reduced(unit: Batch, side: int) -> Batch:
    images, *rest = unit
    small = functional.adaptive_avg_pool2d(images.flatten(0, 1), min(side, images.shape[-1]))
    return small[:, None], *rest


def _reconstruction(study: Study, cohorts: dict[tuple[str, str], Any], out: Path) -> dict[str, Any]:
    """A patient's picture from what the coordinator sees under each protection, PSNR in dB; with the noise if the study has some.

    Each site contributes one patient. In the sum as many pictures are looked for at once as sites are in it (JOINT_MAX at most).
    """
    found: dict[str, Any] = {"psnr_db": {}, "unit": "one patient in the step of each site"}
    rows = []
    for prey in _preys(study, cohorts):
        truth, sites = prey.units[0][0][0], len(prey.units)
        shown, decibels = [("original", truth[0, 0].numpy())], {}
        for caption, observed, pictures in _views(study, prey):
            value, made = prey.nearest(observed, pictures)
            decibels[caption] = round(value, 1)
            shown.append((f"{caption}\n{value:.0f} dB", made.numpy()))
            if caption == PLAIN:  # the coordinator opens what was sealed for it, so it sees the same
                shown.append((f"{caption.replace('plain', 'sealed')}\n{value:.0f} dB", made.numpy()))
        rows.append((prey.name, shown))
        found["psnr_db"][prey.name] = decibels
    found |= {"sites": sites, "average_db": round(_average_db(prey, cohorts, study), 1)}
    (out / "inversion.png").write_bytes(figures.png(figures.pictures(rows)))
    return found


def _views(study: Study, prey: _Prey) -> Iterator[tuple[str, Tensor, int]]:
    """(what is seen, the vector, pictures that are looked for in it)."""
    sites = len(prey.units)
    joint = min(sites, JOINT_MAX)
    each = [prey.gradient(unit) for unit in prey.units]
    yield PLAIN, each[0], 1
    yield f"masked: sum of {sites} sites", torch.stack(each).sum(0), joint
    if study.privacy != "none":
        noisy = [prey.noisy(unit, study.privacy) for unit in prey.units]
        yield "plain, with noise", noisy[0], 1
        yield "masked, with noise", torch.stack(noisy).sum(0), joint


def _average_db(prey: _Prey, cohorts: dict[tuple[str, str], Any], study: Study) -> float:
    """How near the average picture of the first site's other patients is: what is known without looking at anything."""
    truth = prey.units[0][0][0]
    cohort = cohorts[next(iter(cohorts))]  # the training split of the first site
    others = cohort.images[cohort.patients != cohort.patients[learning.labelled_patients(cohort)[0][0]]]
    return attacks.psnr(functional.adaptive_avg_pool2d(others.float().mean(0, keepdim=True), truth.shape[-1]), truth)


def _sentences(study: Study, found: dict[str, Any]) -> list[str]:
    """What the figures mean, and what they do not."""
    said, audit, seen = [], found["audit"], found["membership"]
    if audit is None:
        said.append("The study has no differential privacy, so there is no claim that canaries could refute.")
    else:
        verdict = "it does not exceed the claim"
        if audit["estimate"] > audit["claim"]:
            verdict = "it exceeds the claim by no more than chance explains"
        if audit["faults"]:
            verdict = f"THIS CONTRADICTS THE CLAIM: {'; '.join(audit['faults'])}"
        said += [
            f"Canaries: the Gaussian estimate of ε is {audit['estimate']:.2f} ({audit['low']:.2f} to {audit['high']:.2f}) over "
            f"{audit['event']['steps']} steps, whose claim is {audit['claim']:.2f} at δ = {audit['delta']:g} per patient (add or "
            f"remove one): {verdict}.",
            f"Claim and estimate are of the audited steps; of the whole study, {study.statements()[0].sentence()}.",
            f"The lower bound is {audit['lower_bound']:.2f}. A bound below the claim proves little: with {audit['canaries']} "
            f"canaries it could not be above {audit['lower_bound_ceiling']:.1f} without any noise.",
            f"Noise too small by a factor of {audit['smallest_noticed']:.2f} would have been noticed nine times out of ten.",
        ]
    said.append(
        f"Membership: by their loss, {seen['members']} patients that were trained on are told from {seen['others']} others with "
        f"an AUC of {seen['auc']:.3f} ({seen['low']:.3f} to {seen['high']:.3f}); 0.5 is chance."
    )
    rate = seen["strict"] or seen["least"]
    few = "" if seen["strict"] else "; 0.1 % is not estimable with fewer than 1,000 others"
    said.append(
        f"At {rate['at']:.2%} false positives, {rate['value']:.2%} of the members are found ({rate['low']:.2%} to "
        f"{rate['high']:.2%}){few}."
    )
    seen = found["reconstruction"]
    for name, views in seen["psnr_db"].items():
        decibels = ", ".join(f"{view} {value:g} dB" for view, value in views.items())
        said.append(f"Reconstruction of the picture of a patient who is alone in a site's step, on {name}: {decibels}.")
    said.append(
        f"Without looking at anything, the average of other patients' pictures has {seen['average_db']:g} dB; above 20 dB a "
        "picture is recognised. Sealed is like plain for the coordinator. Stronger attacks exist; noise bounds them all, masks "
        "and large sums only make them harder."
    )
    if not found["phantoms"]:
        said.append(
            "The pictures and figures are of real patients of the given sites, and in no ε: they stay where the images are."
        )
    return said


def release_gate(study: Study, found: dict[str, Any] | None) -> None:
    """Raise ReleaseRefused unless a model of `study` may go out with the attack `found` on it.

    Compared are the claim, the audit's alarm and the lower bound: the estimate itself lies above a true claim in nearly half of
    all audits, by chance, and the lower end of its interval once in forty.
    """
    if study.privacy == "none":
        return
    if found is None:
        raise ReleaseRefused(
            "the study claims differential privacy, and no attack on it was given",
            remedy="Run `fl-study attack STUDY.yaml` and give its attack.json with --attack.",
        )
    try:
        fits, audit = found["version"] == VERSION and found["learned"] == study.learned, found["audit"]
        claim, low, bound = (float(audit[name]) for name in ("claim", "alarm", "lower_bound"))
        faults, event = [str(fault) for fault in audit["faults"]], PrivacyEvent.from_json(audit["event"])
    except (KeyError, TypeError, ValueError, MessageMalformed):
        raise MessageMalformed("this is no attack.json of `fl-study attack`") from None
    if not fits:
        raise ReleaseRefused(
            "the attack was on another study", remedy="Attack the study that was run, and release then."
        )
    plan, whole = study.privacy, study.event(study.training.rounds)
    same = (event.noise_multiplier, event.sampling_rate) == (whole.noise_multiplier, whole.sampling_rate)
    if not same or claim > epsilon([event], plan.delta) * (1 + CLAIM_ROOM):
        raise ReleaseRefused(
            "the attack was on another mechanism than the study's, or its claim is not what the accounting says"
        )
    if faults or not (low <= claim and bound <= claim):
        found_more = f"an ε of at least {max(low, bound):.2f} where {claim:.2f} is claimed for the audited steps"
        raise ReleaseRefused(f"the attack found more than the study claims: {'; '.join(faults) or found_more}")
