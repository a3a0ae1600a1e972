"""What a site adds to a sum, as numbers: the change of the model, and counts. One form for every kind of protection.

    values  float32 (P,)   what training changed; summed with the site's cases as weight. Empty for an evaluation, but for the
                           noisy counts of a study with `privacy.figures: noised`
    counts  int64          whole numbers that are summed as they are: cases, images, patients, losses, score histograms; of the
                           test split also those of the study's subgroups (`models.subgroups`); of a segmentation the sums of
                           outlines (`models.segmentation`) in place of histograms

Everything a coordinator learns of a round stands in the sum of these. Beside it, and only if the study says so, a site
releases figures of its own test split, and only for targets of which both classes have RELEASE_MIN images.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models import grades, intervals, questions, regression, segmentation, subgroups
from models.metrics import ScoreHistogram
from models.questions import Counting
from models.sections import RELEASE_MIN, Regression
from models.segmentation import CASES, Cases, Overlaps
from models.study import Study
from models.subgroups import Groups, Scored
from privacy import noise
from privacy.errors import MessageMalformed

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Kind = Literal["train", "evaluate", "test"]
"""Training with the validation of the model before it, an evaluation of the validation split, and that of the test split."""

LOSS_UNIT = 2.0**-20
"""Losses are summed over images in steps of this: a millionth, far below what a loss means."""
LOSS_MAX = 1e3  # of one image; one of float32 scores is below 17, and 8 million such images still make a sound count
RELEASE_DECIMALS = 3
"""Counts are released rounded down to tens, the rest to three decimals: with exact ones, the pooled counts less those of the
sites that released theirs would be the small counts of the one that did not."""
NOT_RELEASED = -1.0
FIGURE_COLUMNS = 7
"""AUROC, its interval by DeLong's variance, its interval by bootstrap, negatives, positives."""


@dataclass(frozen=True)
class Sheet:
    """An evaluation of one model on one split: how many patients and images, the mean loss over the images, the scores.

    `overlaps`: of a segmentation, whose `histogram` holds nothing and is in no sum.
    """

    patients: int
    images: int
    loss: float
    histogram: ScoreHistogram
    overlaps: Overlaps | None = None

    @property
    def tally(self) -> Int64:
        """What of it is summed beside patients, images and loss."""
        return self.histogram.to_array().astype(np.int64) if self.overlaps is None else self.overlaps.counts


@dataclass(frozen=True, eq=False)
class Contribution:
    """One site's part of a sum, or the sum itself: then `update` is the mean over all cases, and `loss` likewise.

    `summed`: the update is a sum over its cases already, and is not weighted with them once more.
    """

    ingested: int
    sheet: Sheet
    cases: int = 0
    loss: float = 0.0
    update: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.float32))
    summed: bool = False
    answers: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))  # of a study that counts, in tens; all it has
    groups: Groups | None = None  # of the test split; None elsewhere
    grades: Int64 | None = None  # (T + 1, T + 1), of the test split of an ordered task (`models.grades`)
    errors: Int64 | None = None  # of the test split of a task whose target is a number (`models.regression`)

    @property
    def weight(self) -> int:
        """What the values are multiplied with on their way into the sum."""
        return 1 if self.summed else self.cases

    def counts(self, kind: Kind) -> Int64:
        """The whole numbers of this contribution, in the order that `read` expects."""
        if self.answers.size:
            return self.answers
        sheet = self.sheet
        facts = [self.ingested, sheet.patients, sheet.images, _units(sheet.loss, sheet.images)]
        if kind == "train":
            facts += [self.cases, _units(self.loss, self.cases)]
        parts = [np.array(facts, np.int64), sheet.tally.ravel()]
        if kind == "test" and self.groups is not None:
            parts.append(self.groups.numbers())
        if kind == "test" and self.grades is not None:
            parts.append(self.grades.ravel())
        if kind == "test" and self.errors is not None:
            parts.append(self.errors)
        return np.concatenate(parts)


def suppressed(study: Study, sheet: Sheet) -> Sheet:
    """What of an evaluation a site adds to a sum under differential privacy.

    A target's histogram only if both classes have RELEASE_MIN images; with one class alone, the other would follow from the
    number of images, so both go. Images are those of the largest histogram that stays. Nothing at all for fewer than
    RELEASE_MIN patients. A number has no classes: images and loss of RELEASE_MIN images. Of a segmentation the structures were
    looked at before (`Overlaps.told`); images are in tens.
    """
    if sheet.overlaps is not None:
        few = sheet.patients < RELEASE_MIN or not sheet.overlaps.counts.any()
        tens = replace(sheet, patients=_tens(sheet.patients), images=_tens(sheet.images))
        return empty_sheet(study) if few else tens
    if isinstance(study.task, Regression):
        return sheet if min(sheet.patients, sheet.images) >= RELEASE_MIN else empty_sheet(study)
    counts = sheet.histogram.counts.copy()
    for target in range(len(counts)):
        if counts[target].sum(axis=1).min() < RELEASE_MIN:
            counts[target] = 0
    images = int(counts.sum(axis=(1, 2)).max())
    if images == 0 or sheet.patients < RELEASE_MIN:
        return empty_sheet(study)
    return Sheet(min(sheet.patients, images), images, sheet.loss, ScoreHistogram(counts))


def noised(study: Study, histogram: ScoreHistogram, stream: noise.Keystream) -> Float32:
    """float32 (targets * 2 * bins,): the counts of `histogram` with discrete Gaussian noise of `study.figures_deviation`.

    The histogram has to count at most `privacy.images_per_patient` images of each patient. The noise is drawn on the fine grid
    for which it is accounted as a Gaussian, a few whole counts would not be; what is rounded to counts then is private already.
    """
    fine = histogram.counts.ravel() << noise.GRID_BITS
    noise.gaussian(study.figures_deviation * 2.0**noise.GRID_BITS).add_to(fine, stream)
    released: Float32 = np.rint(fine * 2.0**-noise.GRID_BITS).astype(np.float32)
    return released


def values_of(study: Study, kind: Kind, parameters: int) -> int:
    """How many values a contribution of this kind has, for a model of `parameters`."""
    if kind == "train":
        return parameters
    return 2 * len(study.task.targets) * study.evaluation.bins if noises_figures(study) else 0


def bits_of(study: Study, kind: Kind, round_number: int) -> Literal[16, 24, 32, 64]:
    """Bits of a value on its way up. A first round knows nothing of its values, and narrow words might make all of them 0."""
    return max(study.encoding_bits, 32) if kind == "train" and round_number == 1 else study.encoding_bits


def noises_figures(study: Study) -> bool:
    """Whether nothing of an evaluation leaves but the noisy counts of the test split."""
    return study.privacy != "none" and study.privacy.figures == "noised"


def empty_sheet(study: Study) -> Sheet:
    """An evaluation that says nothing."""
    nothing = Overlaps.empty(len(study.task.targets)) if study.segments else None
    return Sheet(0, 0, 0.0, ScoreHistogram.empty(len(study.task.targets), study.evaluation.bins), nothing)


def tally_shape(study: Study) -> tuple[int, ...]:
    """Of `Sheet.tally`."""
    targets = len(study.task.targets)
    return (targets, len(segmentation.COLUMNS)) if study.segments else (targets, 2, study.evaluation.bins)


def count_of(study: Study, kind: Kind) -> int:
    """How many counts a contribution of this kind has."""
    if isinstance(study.task, Counting):
        return study.task.size
    whole = (6 if kind == "train" else 4) + math.prod(tally_shape(study))
    return whole + (subgroups.size(study) + grade_count(study) ** 2 + error_count(study) if kind == "test" else 0)


def error_count(study: Study) -> int:
    """How many sums tell of the errors of a number; none of another task."""
    return regression.SUMS if isinstance(study.task, Regression) else 0


def grade_count(study: Study) -> int:
    """Grades of an ordered task, the lowest included; 0 of another."""
    return len(study.task.targets) + 1 if study.relation == "ordered" else 0


def grades_told(study: Study, scored: Scored | Cases) -> Int64:
    """The table of grades (`models.grades`) that goes into the sum: all zero under differential privacy, where its small cells
    would be told, and of no cells for a task without grades.
    """
    told = grade_count(study) > 0 and study.privacy == "none"
    return (
        grades.table_of(scored)
        if told and isinstance(scored, Scored)
        else np.zeros((grade_count(study), grade_count(study)), np.int64)
    )


def read(study: Study, kind: Kind, values: npt.NDArray[np.float64], counts: Int64) -> Contribution:
    """The sum of contributions behind summed `values` float64 (P,), weighted by cases, and summed `counts`.

    Raises MessageMalformed if the counts contradict each other: some site then sent something else than it should.
    """
    if counts.shape != (count_of(study, kind),):
        raise MessageMalformed("the sum has another number of counts than the study")
    if isinstance(study.task, Counting):
        questions.read(study.task, counts)
        return Contribution(0, empty_sheet(study), answers=counts)
    head = [int(n) for n in counts[: 6 if kind == "train" else 4]]
    ingested, patients, images, loss = head[:4]
    shape = tally_shape(study)
    end = len(head) + math.prod(shape)
    sheet = _tallied(study, counts[len(head) : end].reshape(shape), (patients, images, _mean(loss, images)))
    histogram = sheet.histogram
    if kind != "train":
        sheet = _sheet_of(study, values) if noises_figures(study) and values.any() else sheet
        if kind == "evaluate":
            return Contribution(ingested, sheet)
        ends = end + subgroups.size(study)
        last = len(counts) - error_count(study)
        table = grades.read(grade_count(study), counts[ends:last], images)
        errors = regression.read(counts[last:], images) if error_count(study) else None
        groups = Groups.read(study, counts[end:ends], histogram)
        return Contribution(ingested, sheet, groups=groups, grades=table, errors=errors)
    cases, train_loss = head[4:]
    if cases < 1:
        raise MessageMalformed("the sum of the updates rests on no cases")
    update = np.empty(values.shape, np.float32)
    np.divide(values, cases, out=update, dtype=np.float64, casting="unsafe")  # float64 a block at a time
    return Contribution(ingested, sheet, cases, _mean(train_loss, cases), update)


def _tallied(study: Study, tally: Int64, facts: tuple[int, int, float]) -> Sheet:
    """The evaluation with these summed counts, and (patients, images, mean loss). Raises MessageMalformed."""
    patients, images, _ = facts
    nothing = empty_sheet(study)
    if study.segments:
        overlaps = Overlaps(tally)
        sheet = Sheet(*facts, nothing.histogram, overlaps)
        # Under differential privacy images are in tens, up to nine too few at each site, and cases are not.
        most = int(overlaps.counts[:, CASES].max()) if study.privacy == "none" else 0
    else:
        sheet = Sheet(*facts, ScoreHistogram(tally))
        most = int(sheet.histogram.counts.sum(axis=(1, 2)).max())
    if patients > images or most > images:
        raise MessageMalformed("the summed counts of patients, images and scores contradict each other")
    return sheet


def _sheet_of(study: Study, noisy: npt.NDArray[np.float64]) -> Sheet:
    """The evaluation behind summed noisy counts. Patients are not told apart, so as many as images are said to be there."""
    histogram = ScoreHistogram.nearest(noisy.reshape(len(study.task.targets), 2, study.evaluation.bins))
    images = int(histogram.counts.sum(axis=(1, 2)).max())
    return Sheet(images, images, histogram.cross_entropy() or 0.0, histogram)


def figures(study: Study, scored: Scored | Cases, *, release: bool) -> Float32:
    """float32 (targets, FIGURE_COLUMNS) of the raw scores, all rounded; NOT_RELEASED in rows that stay. Of a number: (1, COLUMNS)
    of `models.regression`; of outlines, what `segmentation.figures` gives.

    `release`: whether figures of this evaluation may leave at all; the study has to ask for them as well. A row leaves if both
    classes have RELEASE_MIN images, and both intervals exist: two patients of each class are needed for that.
    """
    released, targets = release and study.evaluation.site_figures, len(study.task.targets)
    if isinstance(scored, Cases):
        nothing = np.full((targets, segmentation.FIGURE_COLUMNS), NOT_RELEASED, np.float32)
        return segmentation.figures(targets, scored, study.training.seed) if released else nothing
    if isinstance(study.task, Regression):
        row = regression.released(study.task, scored, study.training.seed) if released else None
        return np.full((1, regression.COLUMNS), NOT_RELEASED, np.float32) if row is None else row[None]
    rows = np.full((targets, FIGURE_COLUMNS), NOT_RELEASED, np.float32)
    for target in range(len(rows) if released else 0):
        known = scored.known[:, target] != 0
        scores = scored.scores[known, target].astype(np.float64)
        labels, patients = scored.targets[known, target].astype(np.float64), scored.patients[known]
        positives = int((labels == 1).sum())
        negatives = len(labels) - positives
        if min(negatives, positives) < RELEASE_MIN:
            continue
        found = intervals.clustered_auroc(scores, labels, patients)
        delong = intervals.clustered_interval(scores, labels, patients)
        drawn = intervals.bootstrap_interval(scores, labels, patients, study.training.seed)
        if found is not None and delong is not None and drawn is not None:
            numbers = (found[0], *delong, *drawn)
            rounded = [round(value, RELEASE_DECIMALS) for value in numbers]
            rows[target] = (*rounded, _tens(negatives), _tens(positives))
    return rows


def read_number(study: Study, rows: Float32) -> dict[str, Any] | None:
    """What `figures` wrote of a number, as `regression.read_released` reads it; raises MessageMalformed for anything else."""
    if not isinstance(study.task, Regression) or rows.shape != (1, regression.COLUMNS):
        raise MessageMalformed("figures of another number of targets than the study's")
    return None if (rows == NOT_RELEASED).all() else regression.read_released(study.task, rows[0])


def read_figures(study: Study, rows: Float32) -> list[dict[str, Any] | None]:
    """What `figures` wrote, a dictionary or None for each target; raises MessageMalformed for anything else."""
    if study.segments:
        return segmentation.read_figures(len(study.task.targets), rows)
    if rows.shape != (len(study.task.targets), FIGURE_COLUMNS):
        raise MessageMalformed("figures of another number of targets than the study's")
    return [None if (row == NOT_RELEASED).all() else _figure(row) for row in rows]


def _figure(row: Float32) -> dict[str, float | int]:
    auroc, low, high, drawn_low, drawn_high, negatives, positives = (
        round(float(value), RELEASE_DECIMALS) for value in row
    )
    enough = all(count.is_integer() and count >= RELEASE_MIN for count in (negatives, positives))
    if not 0 <= low <= auroc <= high <= 1 or not 0 <= drawn_low <= drawn_high <= 1 or not enough:
        raise MessageMalformed("a released figure contradicts itself, or should not have been released")
    return {
        "auroc": auroc, "low": low, "high": high, "bootstrap_low": drawn_low, "bootstrap_high": drawn_high,
        "negatives": int(negatives), "positives": int(positives),
    }  # fmt: skip


def _tens(count: int) -> int:
    return count // RELEASE_MIN * RELEASE_MIN


def _units(mean: float, over: int) -> int:
    return round(min(max(mean, 0.0), LOSS_MAX) * over / LOSS_UNIT)


def _mean(total: int, over: int) -> float:
    return total * LOSS_UNIT / over if over else 0.0
