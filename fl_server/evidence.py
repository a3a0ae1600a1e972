"""`fl-study attack` and `fl-study release`: what an adversary finds in a rehearsal of a study, and whether a model may go out.

A rehearsal runs the production mechanism on phantoms or on given sites, so attacking it says what the mechanism lets through. It
says nothing of what a run on other patients did; that is what the hospitals' own ledgers and self-tests are for.
"""

import json
import pkgutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch.nn import functional

from fl_server import figures
from fl_server.simulation import Outcome
from models import learning, networks
from models.learning import TrainingCohort
from models.study import Study
from privacy import attacks
from privacy.dpsgd import Batch, Clip
from privacy.errors import MessageMalformed, ReleaseRefused

VERSION = 1
COHORT = "fl_client.rehearsal:cohort"  # a rehearsal is attacked where it lies, so the site's half is looked up by name
STEPS_MAX = 100  # of the audited run: enough for the estimate, and seconds on a laptop
PICTURE_PX = 32
Tell = Callable[[str], None]
Float32 = NDArray[np.float32]


def attack(study: Study, outcome: Outcome, out: Path, tell: Tell) -> dict[str, Any]:
    """Attack the finished rehearsal `outcome` of `study`; what was found, also written to `out`/attack.json with its pictures."""
    cohorts = {
        (name, split): pkgutil.resolve_name(COHORT)(outcome.folder / "sites" / name, _rehearsed(outcome), split)
        for name in study.participation.sites
        for split in ("train", "test")
    }
    found: dict[str, Any] = {"version": VERSION, "study": study.name, "learned": study.learned, "audit": None}
    found["privacy"] = [statement.to_json() for statement in study.statements()]
    if study.privacy != "none":
        tell("canaries: one run of the mechanism with patients that cannot be missed")
        audit = _canaries(study, cohorts[study.participation.sites[0], "train"])
        found["audit"] = _audit_facts(audit)
        seen = audit.estimate
        caption = f"estimate of ε {seen.epsilon:.2f} ({seen.low:.2f} to {seen.high:.2f}), claim {audit.claim:.2f}"
        (out / "canaries.png").write_bytes(figures.canaries(audit.inside.tolist(), audit.outside.tolist(), caption))
    tell("membership inference on the final model")
    found["membership"] = _membership(study, outcome, cohorts, out)
    tell("reconstruction of a picture from what the coordinator sees")
    found["reconstruction"] = _reconstruction(study, cohorts, out)
    found["sentences"] = _sentences(study, found)
    (out / "attack.json").write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
    return found


def _rehearsed(outcome: Outcome) -> Study:
    """The study as it was run: with the rehearsal's own keys."""
    return Study.from_canonical(_canonical(outcome.results["study"]))


def _canonical(study: dict[str, Any]) -> bytes:
    return json.dumps(study, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _units(study: Study, cohort: TrainingCohort) -> list[Batch]:
    """Each patient as the mechanism sees it, without augmentation."""
    still = study.model_copy(update={"training": study.training.model_copy(update={"augmentation": "none"})})
    generator = torch.Generator().manual_seed(0)
    return [learning.unit(cohort, rows, still, generator) for rows in learning.labelled_patients(cohort)]


def _canaries(study: Study, cohort: TrainingCohort) -> attacks.CanaryAudit:
    plan, net = learning.private(study), networks.build(study)
    event, units = study.event(study.training.rounds), _units(study, cohort)
    rate = study.training.learning_rate * plan.clip_norm / (plan.sampling_rate * len(units))

    def descend(noisy: Float32) -> None:
        networks.load_vector(net, networks.to_vector(net) - np.float32(rate) * noisy)

    training = attacks.Training(net, learning.patient_losses, len(units), units.__getitem__, descend)
    return attacks.canary_audit(
        training,
        attacks.Mechanism(
            clip=Clip(plan.clip_norm),
            noise_multiplier=event.noise_multiplier,
            sampling_rate=event.sampling_rate,
            steps=min(event.steps, STEPS_MAX),
            delta=plan.delta,
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
    (model,) = (outcome.folder / "coordinator" / "runs").glob("*/model.safetensors")
    net = networks.build(study)
    networks.load_vector(net, load_file(model)["model"])
    net.eval()
    losses: dict[str, list[float]] = {"train": [], "test": []}
    for (_, split), cohort in cohorts.items():
        for rows in learning.labelled_patients(cohort):
            unit = (cohort.images[rows][None], cohort.targets[rows][None], cohort.known[rows][None])
            with torch.inference_mode():
                losses[split].append(float(learning.patient_losses(net, unit)[0]))
    seen = attacks.membership_inference(np.array(losses["train"]), np.array(losses["test"]))
    caption = f"AUC {seen.auc:.3f} ({seen.low:.3f} to {seen.high:.3f}); 0.5 is chance"
    rates = list(zip(seen.roc[0].tolist(), seen.roc[1].tolist(), strict=True))
    (out / "membership.png").write_bytes(figures.membership(rates, caption))
    strict = None if seen.strict is None else asdict(seen.strict)
    facts = {"members": seen.members, "others": seen.others, "auc": seen.auc, "low": seen.low, "high": seen.high}
    return facts | {"unit": "patient", "strict": strict, "least": asdict(seen.least)}


def _prey(net: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each picture, (B,): what every site computes, on the network that is easiest to look into."""
    images, targets = batch
    return functional.binary_cross_entropy_with_logits(net(images), targets, reduction="none").mean(dim=1)


def _reconstruction(study: Study, cohorts: dict[tuple[str, str], Any], out: Path) -> dict[str, Any]:
    """One picture from the gradient of the easiest prey, as the coordinator would see it under each protection; PSNR in dB."""
    pictures, targets = [], []
    for name in study.participation.sites:
        cohort = cohorts[name, "train"]
        pictures.append(functional.adaptive_avg_pool2d(cohort.images[:1].float(), PICTURE_PX))
        targets.append(cohort.targets[:1, :1])
    net = attacks.SmoothNet(PICTURE_PX, 1)
    each = [attacks.gradient(net, _prey, (x, y)) for x, y in zip(pictures, targets, strict=True)]
    clipped = [gradient / max(1.0, float(gradient.norm())) for gradient in each]
    level = 1.0 if study.privacy == "none" else study.privacy.noise_multiplier or 1.0
    noisy = [gradient + level * torch.randn_like(gradient) for gradient in clipped]
    views = {
        "one site, plain or sealed": each[0],
        "the same with the noise": noisy[0],
        f"masked sum of {len(each)} sites": torch.stack(each).mean(0),
        "masked sum with the noise": torch.stack(noisy).mean(0),
    }
    shown = [("original", pictures[0][0, 0].numpy())]
    found: dict[str, Any] = {"noise_multiplier": level, "pixels": PICTURE_PX, "psnr_db": {}}
    for caption, observed in views.items():
        made = attacks.invert(net, _prey, observed, (1, 1, PICTURE_PX, PICTURE_PX), (targets[0],))
        decibels = attacks.psnr(made, pictures[0])
        found["psnr_db"][caption] = round(decibels, 1)
        shown.append((f"{caption}\n{decibels:.0f} dB", made[0, 0].numpy()))
    (out / "inversion.png").write_bytes(figures.pictures(shown))
    return found


def _sentences(study: Study, found: dict[str, Any]) -> list[str]:
    """What the figures mean, and what they do not."""
    said, audit, seen = [], found["audit"], found["membership"]
    if audit is None:
        said.append("The study has no differential privacy, so there is no claim that canaries could refute.")
    else:
        verdict = "; ".join(audit["faults"]).upper() if audit["faults"] else "no more than is claimed"
        said += [
            f"Canaries: the Gaussian estimate of ε is {audit['estimate']:.2f} ({audit['low']:.2f} to {audit['high']:.2f}) over "
            f"{audit['event']['steps']} steps, whose claim is {audit['claim']:.2f} at δ = {audit['delta']:g} per patient (add or "
            f"remove one): {verdict}.",
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
    decibels = ", ".join(f"{name} {value:g} dB" for name, value in found["reconstruction"]["psnr_db"].items())
    said.append(
        f"Reconstruction of a picture from one image's gradient, on a network that makes it easy: {decibels}; above 20 dB a "
        "picture is recognised. Stronger attacks exist; noise bounds them all, masks and large sums only make them harder."
    )
    return said


def release_gate(study: Study, found: dict[str, Any] | None) -> None:
    """Raise ReleaseRefused unless a model of `study` may go out with the attack `found` on it.

    Compared are the claim and the lower end of the estimate's interval, and the lower bound: the estimate itself lies above a
    true claim in nearly half of all audits, by chance.
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
        claim, low, bound = (float(audit[name]) for name in ("claim", "low", "lower_bound"))
        faults = [str(fault) for fault in audit["faults"]]
    except (KeyError, TypeError, ValueError):
        raise MessageMalformed("this is no attack.json of `fl-study attack`") from None
    if not fits:
        raise ReleaseRefused(
            "the attack was on another study", remedy="Attack the study that was run, and release then."
        )
    if faults or not (low <= claim and bound <= claim):
        found_more = f"an ε of at least {max(low, bound):.2f} where {claim:.2f} is claimed for the audited steps"
        raise ReleaseRefused(f"the attack found more than the study claims: {'; '.join(faults) or found_more}")
