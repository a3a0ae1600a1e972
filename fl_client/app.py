"""What an order asks for: evaluating and training on this site's images, and the steps of secure aggregation.

It runs in the node's worker process (`fl_client.worker`), and as Flower's ClientApp in simulation and in tests. The code is this
installation's, never a bundle's.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fl_client import masks, norms, variates
from fl_client.cohort import Cohort, Split, splits_of
from fl_client.counting import UNTOLD_S, carry_out_count, countable
from fl_client.index import Index
from fl_client.protection import Vault
from fl_client.site import Site
from models import learning, networks, regression, subgroups
from models.contributions import (
    Contribution,
    Float32,
    Sheet,
    empty_sheet,
    figures,
    grades_told,
    noised,
    noises_figures,
    suppressed,
    values_of,
)
from models.labels import LabelTable
from models.learning import Control, Turn
from models.metrics import ScoreHistogram
from models.questions import Counting
from models.sections import Segmentation
from models.segmentation import Cases, Overlaps
from models.study import Regression, Study
from models.subgroups import Groups, Scored
from privacy import dpsgd, noise, tracing
from privacy.errors import CohortTooSmall, MessageMalformed, StepRefused
from privacy.wire import (
    COHORT,
    EvaluateOrder,
    EvaluateReport,
    KeysOrder,
    KeysReport,
    Order,
    Report,
    TrainOrder,
    TrainReport,
    UnmaskOrder,
    UnmaskReport,
    WorkOrder,
)


@dataclass
class Desk:
    """What stays in memory between orders: networks and cohorts of the last `studies` studies, keys of open sums.

    A changed index or label table makes it forget cohorts.
    """

    studies: int = 1
    nets: dict[str, nn.Module] = field(default_factory=dict)
    cohorts: dict[tuple[Path, str, Split, tuple[int, ...]], Cohort] = field(default_factory=dict)
    vault: Vault = field(default_factory=Vault)
    engines: dict[str, dpsgd.Engine] = field(default_factory=dict)

    def engine(self, net: nn.Module, study: Study) -> dpsgd.Engine:
        """The engine of private training for the study's network, chosen when first asked for."""
        if study.digest not in self.engines:
            self.engines[study.digest] = learning.engine_of(net, study)
        return self.engines[study.digest]

    def net(self, site: Site, study: Study, order: WorkOrder) -> nn.Module:
        """The study's network with the ordered weights, and where the study leaves them there this site's norm layers."""
        if study.digest in self.nets:
            self.nets[study.digest] = self.nets.pop(study.digest)  # the last one used stands last
        else:
            for old in [*self.nets][: len(self.nets) + 1 - self.studies]:
                del self.nets[old]
                self.engines.pop(old, None)
            self.nets[study.digest] = networks.build(study)
        net = self.nets[study.digest]
        if study.strategy.local_norms:
            norms.load(site, net, order)
        else:
            networks.load_vector(net, order.model)
        return net

    def cohort(self, site: Site, study: Study, split: Split) -> Cohort:
        """The site's images of `split`; CohortTooSmall if this split is smaller than the study's or the site's minimum."""
        source = site.source
        files = (site.state / "index.sqlite", masks.file_of(site.state), *source.labels.files(site.home))
        seen = tuple(map(_changed, files))
        key = (site.home, study.digest, split, seen)
        if key not in self.cohorts:
            mine = [k[1] for k in reversed(self.cohorts) if k[0] == site.home and k[3] == seen]
            keep = [*dict.fromkeys([study.digest, *mine])][: self.studies]
            self.cohorts = {
                k: c for k, c in self.cohorts.items() if k[0] != site.home or (k[1] in keep and k[3] == seen)
            }
            labels = LabelTable.open(site.home, source.labels)
            cohort = Cohort.open(Index.open(site.state), labels, study, split, site.pins(study))
            least = site.settings.policy.minimum_patients
            if cohort.counts.patients < least:
                raise CohortTooSmall(
                    f"the {split} split has {cohort.counts.patients} patients; site.yaml asks for {least}"
                )
            self.cohorts[key] = cohort
        return self.cohorts[key]

    def cohorts_of(self, site: Site, study: Study) -> dict[Split, Cohort]:
        """The splits that this site has a part in. All must be large enough: a site whose evaluation would be refused must
        not train either, because its patients would count and its scores would not.
        """
        trains = site.name in study.participation.sites
        return {split: self.cohort(site, study, split) for split in splits_of(study, trains=trains)}


def _changed(path: Path) -> int:
    """When `path` was changed last; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def carry_out(desk: Desk, site: Site, study: Study, order: Order) -> Report:
    """What this site reports to `order`, which was admitted; raises an IsocenterError that says why there is no report."""
    if threads := site.settings.resources.cpu_threads:
        torch.set_num_threads(threads)
    desk.studies = site.settings.resources.studies_in_memory
    if isinstance(study.task, Counting) and isinstance(order, WorkOrder):
        return carry_out_count(desk.vault, site, study, study.task, order)
    if isinstance(order, TrainOrder):
        return carry_out_training(desk, site, study, order)
    if isinstance(order, EvaluateOrder):
        return carry_out_evaluation(desk, site, study, order)
    return carry_out_step(desk, site, study, order)


def carry_out_training(desk: Desk, site: Site, study: Study, order: TrainOrder) -> TrainReport:
    """Evaluate the ordered model on the validation split, train it, and contribute both to the sum."""
    began = time.monotonic()
    cohorts = desk.cohorts_of(site, study)
    cohort = cohorts["train"]
    net = desk.net(site, study, replace(order, model=halves(study, order)[0]))
    sending = desk.vault.begin(site, study, order, order.model.size)
    hold = site.reserve(study, order, cohort.identities)
    _, sheet = evaluated(net, cohorts["validation"], study)
    with tracing.span("train"):
        update = learned(desk, net, site, study, order, cohort)
    site.commit(hold)
    contribution = Contribution(
        _archive(study, cohort.ingested), sheet, update.cases, update.loss, update.delta, update.summed
    )
    site.note_release(study, order, len(cohort.identities), float(np.linalg.norm(contribution.update)))
    with tracing.span("protect"):
        vector, vouch = sending.protect(contribution)
    return TrainReport(
        **order.naming(),
        site=site.name,
        seconds=_seconds(study, began),
        vector=vector,
        vouch=vouch,
        keys=sending.keys,
    )


def learned(desk: Desk, net: nn.Module, site: Site, study: Study, order: TrainOrder, cohort: Cohort) -> learning.Update:
    """What the site learns from `order`, whose model is in `net`."""
    if study.privacy != "none":
        engine = desk.engine(net, study)
        return learning.learn_privately(engine, net, cohort, study, Turn(order.round, cohort.public_size))
    # What the sum of an earlier attempt at this round held must not be sent again under other masks.
    repeat = site.repeats(order) if study.protection == "masked" else 0
    _, common = halves(study, order)
    if common is not None:
        control = Control(net, variates.before(site, order, common.size), common)
        update = learning.learn_steered(net, cohort, study, control, round_number=order.round, repeat=repeat)
        variates.keep(site, order, control.variate)
        return replace(update, delta=np.concatenate([update.delta, control.variate]))
    update = learning.learn(net, cohort, study, round_number=order.round, repeat=repeat)
    if study.strategy.local_norms:
        norms.keep(site, net, order)
        update = replace(update, delta=update.delta[~networks.norm_places(net)])
    return update


def halves(study: Study, order: TrainOrder) -> tuple[Float32, Float32 | None]:
    """The model (P,), and the common control variate (P,) that a SCAFFOLD study has behind it; raises MessageMalformed."""
    if not study.strategy.steered:
        return order.model, None
    if order.model.size % 2:
        raise MessageMalformed("the order holds no model with a control variate of the same length behind it")
    model, common = np.split(order.model, 2)
    return model, common


def carry_out_evaluation(desk: Desk, site: Site, study: Study, order: EvaluateOrder) -> EvaluateReport:
    """Evaluate the ordered model on the ordered split; of the test split alone, release the figures that the study asks for."""
    began = time.monotonic()
    if order.split == COHORT:
        raise StepRefused("the study asks no questions that could be counted")
    tested = splits_of(study, trains=site.name in study.participation.sites)[-1]
    cohort = desk.cohort(site, study, tested if order.split == "test" else "validation")
    net = desk.net(site, study, order)
    sending = desk.vault.begin(site, study, order, order.model.size)
    scored, sheet = evaluated(net, cohort, study)
    contribution = Contribution(_archive(study, cohort.ingested), sheet)
    if order.split == "test":
        groups, errors = Groups.empty(study), None
        if isinstance(scored, Scored):
            groups = subgroups.suppressed(study, scored, cohort.observed, sheet.histogram)
            if isinstance(study.task, Regression):
                errors = regression.told(scored, private=study.privacy != "none")
        grades = grades_told(study, scored)
        contribution = replace(contribution, groups=groups, grades=grades, errors=errors)
    if noises_figures(study):
        contribution = replace(contribution, update=noisy_figures(site, study, order, net, cohort), summed=True)
    with tracing.span("protect"):
        vector, vouch = sending.protect(contribution)
    return EvaluateReport(
        **order.naming(),
        site=site.name,
        seconds=_seconds(study, began),
        vector=vector,
        vouch=vouch,
        keys=sending.keys,
        split=order.split,
        figures=figures(study, scored, release=site.may_release(order)),
    )


def carry_out_step(desk: Desk, site: Site, study: Study, order: Order) -> KeysReport | UnmaskReport:
    """A step of secure aggregation that needs no images."""
    began = time.monotonic()
    if isinstance(order, UnmaskOrder):
        revealed, sealed = desk.vault.unmask(site, study, order)
        seconds = time.monotonic() - began
        return UnmaskReport(**order.naming(), site=site.name, seconds=seconds, revealed=revealed, sealed=sealed)
    if not isinstance(order, KeysOrder):
        raise MessageMalformed("the order is no step of secure aggregation")
    if study.protection != "masked":
        raise StepRefused("the study is not masked, so there is nothing to make keys for")
    # A site that would refuse the work itself must not be counted on in the sum.
    if isinstance(study.task, Counting):
        countable(site, study, study.task)
    else:
        desk.cohorts_of(site, study)
    made = desk.vault.make_keys(site, study, order)
    seconds = UNTOLD_S if isinstance(study.task, Counting) else time.monotonic() - began
    return KeysReport(**order.naming(), site=site.name, seconds=seconds, keys=made)


def evaluated(net: nn.Module, cohort: Cohort, study: Study) -> tuple[Scored | Cases, Sheet]:
    """What is found of each image of `cohort`, which stays here, and what of it goes into a sum."""
    if study.segments:
        cases, loss = compared(net, cohort, study)
        counted = cohort.counts
        nothing = empty_sheet(study).histogram
        told = Overlaps.of(cases).told(study, cases)
        return cases, release(study, Sheet(counted.patients, counted.images, loss, nothing, told))
    scored = score(net, cohort)
    return scored, release(study, sheet_of(scored, cohort, study))


def compared(net: nn.Module, cohort: Cohort, study: Study) -> tuple[Cases, float]:
    """Every outline of `net` beside its reference mask, and the mean loss over the images."""
    if not isinstance(study.task, Segmentation):
        raise MessageMalformed("the study outlines nothing")
    known = cohort.known.numpy() > 0
    cases = Cases.empty(len(cohort), known.shape[1], cohort.patients.numpy())
    total = 0.0
    for row, outlined, loss in learning.outlined(net, cohort):
        scale = (cohort.spacing_mm[row].tolist(), study.task.tolerance_mm)
        cases.put(row, (outlined, cohort.targets[row].numpy() > 0), known[row], scale)
        total += loss
    return cases, total / max(1, len(cohort))


def score(net: nn.Module, cohort: Cohort) -> Scored:
    """The scores of every image of `cohort`; they stay here."""
    scores = learning.predict(net, cohort)
    return Scored(scores, cohort.targets.numpy(), cohort.known.numpy(), cohort.patients.numpy())


def sheet_of(scored: Scored, cohort: Cohort, study: Study) -> Sheet:
    """The scores of `cohort` as counts."""
    if isinstance(study.task, Regression):
        histogram = ScoreHistogram.empty(1, study.evaluation.bins)  # there are no classes to count by
    else:
        histogram = ScoreHistogram.of(scored.scores, scored.targets, scored.known, bins=study.evaluation.bins)
    counted, loss = cohort.counts, learning.evaluation_loss(scored.scores, cohort, study.task.kind)
    return Sheet(counted.patients, counted.images, loss, histogram)


def release(study: Study, sheet: Sheet) -> Sheet:
    """What of an evaluation goes into a sum as it is: all of it; under differential privacy no small counts, or nothing."""
    if study.privacy == "none":
        return sheet
    return empty_sheet(study) if noises_figures(study) else suppressed(study, sheet)


def noisy_figures(site: Site, study: Study, order: EvaluateOrder, net: nn.Module, cohort: Cohort) -> Float32:
    """The noisy counts of the test split, float32 (targets * 2 * bins,); of every other split as many zeros.

    They are made, and charged to the test patients, once in a study: whoever asks again about the same model gets the same ones.
    """

    def make() -> bytes:
        plan = learning.private(study)
        rows = learning.first_images(cohort, plan.images_per_patient)
        scores = learning.predict(net, cohort)[rows]
        targets, known = cohort.targets.numpy()[rows], cohort.known.numpy()[rows]
        histogram = ScoreHistogram.of(scores, targets, known, bins=study.evaluation.bins)
        return noised(study, histogram, noise.Keystream()).tobytes()

    stored = site.release_once(study, order, cohort.identities, make) if order.split == "test" else b""
    return np.frombuffer(stored or bytes(4 * values_of(study, "evaluate", 0)), np.float32)


def _archive(study: Study, ingested: int) -> int:
    """Images in the site's archive; in tens under differential privacy, and not told at all where figures get noise."""
    if noises_figures(study):
        return 0
    return ingested if study.privacy == "none" else ingested // 10 * 10


def _seconds(study: Study, began: float) -> float:
    """Time taken; not under differential privacy, because it says how many patients were drawn."""
    return time.monotonic() - began if study.privacy == "none" else 0.0
