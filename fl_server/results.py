"""The results document of a run, strictly read: schema, study, and histograms, all held against each other.

Whatever does not follow the schema, and whatever contradicts itself, is a MessageMalformed that says where.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, StringConstraints, Tag, ValidationError

from models import grades, regression
from models.contributions import grade_count
from models.metrics import ScoreHistogram
from models.sections import RELEASE_MIN, Regression
from models.segmentation import CASES, DISTANCE_MAX, Overlaps
from models.study import MASKED_SITES_MIN, Document, Name, Study
from models.subgroups import Groups, groups, least_sites
from privacy.errors import DocumentError, MessageMalformed

VERSION = 3
REMEDY = "Fetch the results of the run again; a results document is never edited by hand."

Count = Annotated[int, Field(ge=0, le=2**53)]
Released = Annotated[int, Field(ge=RELEASE_MIN, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Reason = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9 ._-]{0,79}$")]
Sites = Annotated[list[Name], Field(min_length=1, max_length=1000)]


class Scores(Document):
    """One model on one split of `sites` together. `loss` is a mean over images, `counts` a `ScoreHistogram.to_json`, or of a
    segmentation an `Overlaps.to_json`.
    """

    sites: Sites
    patients: Count
    images: Count
    loss: Finite | None
    counts: Any


class Figure(Document):
    """What one site released about its test split and one target: AUROC, its 95 % intervals by DeLong's variance and by
    bootstrap, both over patients, and images of each class.
    """

    auroc: Share
    low: Share
    high: Share
    bootstrap_low: Share
    bootstrap_high: Share
    negatives: Released
    positives: Released


Triple = Annotated[list[Annotated[float, Field(ge=0, le=DISTANCE_MAX)]], Field(min_length=3, max_length=3)]


class OutlineFigure(Document):
    """What one site released about its test split and one structure: mean and 95 % interval by bootstrap over patients of Dice,
    surface Dice and HD95, the last two where there are enough cases; cases in tens.
    """

    dice: Triple
    surface_dice: Triple | None
    hd95_mm: Triple | None
    cases: Released


def _kind_of_figure(given: Any) -> str:
    return (
        "[outlines]"
        if isinstance(given, OutlineFigure) or (isinstance(given, dict) and "dice" in given)
        else "[scores]"
    )


AnyFigure = Annotated[
    Annotated[Figure, Tag("[scores]")] | Annotated[OutlineFigure, Tag("[outlines]")], Discriminator(_kind_of_figure)
]


class GroupCounts(Document):
    """Of one subgroup of the test split, target by target: how many sites told of it, and a `ScoreHistogram.to_json`."""

    division: str
    name: str
    sites: list[Count]
    counts: Any


Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]


class Errors(Document):
    """What one site released about a number (`models.regression.read_released`): figures, 95 % intervals, images in tens."""

    mae: Finite
    rmse: Finite
    bias: Finite
    r2: Finite
    concordance: Finite
    intervals: dict[Name, Interval]
    images: Released


class Number(Document):
    """Of a target that is a number: sums of errors over all tested sites (`models.regression`), and what sites released."""

    sums: Annotated[list[Count], Field(min_length=regression.SUMS, max_length=regression.SUMS)]
    sites: dict[Name, Errors | None]


class Round(Document):
    """One round as it was committed: who contributed, who did not and why, and the sums over those who did.

    `scale`: update values were multiplied by two to this power before rounding. `validation` is of the model after it. `late`:
    whose report came after the site was waited for no longer, and by how many seconds; it is in no sum. `asked`: the training
    sites that were drawn for the round, of a study that draws them; empty otherwise.
    """

    round: Annotated[int, Field(ge=1, le=10_000)]
    attempt: Annotated[int, Field(ge=1, le=1_000_000)]
    seconds: Seconds
    contributors: Sites
    missing: dict[Name, Reason]
    cases: Count
    train_loss: Finite | None
    site_seconds: dict[Name, Seconds]
    clipped: Count
    scale: Annotated[int, Field(ge=-1000, le=1000)]
    validation: Scores | None
    validation_missing: dict[Name, Reason]
    late: dict[Name, Seconds | None] = Field(default={})
    asked: list[Name] = Field(default=[], max_length=1000)


class Restart(Document):
    """A person had the rounds from `first` to `after` given up, and trained again under later attempts."""

    first: Annotated[int, Field(ge=1, le=10_000)]
    after: Annotated[int, Field(ge=1, le=10_000)]
    at: datetime


class Results(Document):
    """The results document of a run, version 3. `ingested`: images in the archives of the sites of `test`; `grades`: images of
    the test split by reference grade and called grade (`models.grades`), of a task without grades empty; `number`: there if the
    target is one.
    """

    version: Annotated[int, Field(ge=VERSION, le=VERSION)]  # Literal[3] would take 3.0 for 3
    run_id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    study: dict[str, Any]
    label: Annotated[str, StringConstraints(max_length=100_000, pattern=r"^(complete|partial \([^\r\n]+\))$")]
    started: datetime
    finished: datetime
    selected_round: int
    initial: Scores | None
    rounds: Annotated[list[Round], Field(max_length=10_000)]
    test: Scores | None
    test_missing: dict[Name, Reason]
    figures: dict[Name, list[AnyFigure | None]]
    groups: Annotated[list[GroupCounts], Field(max_length=10_000)]
    grades: Annotated[list[list[Count]], Field(max_length=33)]
    ingested: Count
    restarts: list[Restart] = Field(default=[], max_length=10_000)
    number: Number | None = None


@dataclass(frozen=True)
class Sample:
    """Scores of one split at `sites` together: `histogram` is their sum, `loss` the mean over their images; `overlaps`: the sums
    of outlines of a segmentation, whose histogram is empty.
    """

    sites: Sequence[str]
    patients: int
    images: int
    loss: float | None
    histogram: ScoreHistogram
    overlaps: Overlaps | None = None


@dataclass(frozen=True)
class Evaluation:
    """A checked results document with its study and its histograms decoded. `validation[0]` is of the initial model; `groups` are
    those of `models.subgroups.groups`, and `grades` a table of `models.grades`.
    """

    results: Results
    study: Study
    validation: Mapping[int, Sample | None]
    test: Sample | None
    groups: Groups
    grades: NDArray[np.int64]


def check(results: dict[str, Any]) -> Evaluation:
    """The results document, strictly read. Raises MessageMalformed for another schema, NaN, or a contradiction."""
    try:
        text = json.dumps(results, allow_nan=False)
        document = Results.model_validate_json(text, strict=True)
        study = Study.from_canonical(canonical(document.study))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "document"
        raise MessageMalformed(f"results: {place}: {first['msg']}", remedy=REMEDY) from None
    except (TypeError, ValueError, RecursionError, DocumentError) as error:
        raise MessageMalformed(f"results: {error}", remedy=REMEDY) from None
    for wrong in _contradictions(document, study):
        raise MessageMalformed(f"results: {wrong}", remedy=REMEDY)
    initial, test = _sample(document.initial, study, "initial"), _sample(document.test, study, "test")
    validation = {e.round: _sample(e.validation, study, f"round {e.round}, validation") for e in document.rounds}
    for wrong in _contradictions_in_figures(document, study, test):
        raise MessageMalformed(f"results: {wrong}", remedy=REMEDY)
    try:
        told, table = _groups(document, study, test), _grades(document, study, test)
        _check_number(document, study, test)
    except MessageMalformed as error:
        raise MessageMalformed(f"results: {error}", remedy=REMEDY) from None
    return Evaluation(document, study, {0: initial} | validation, test, told, table)


def _contradictions(document: Results, study: Study) -> Iterable[str]:
    """One sentence for each statement of the document that another statement of it denies."""
    numbers, attempts = ([getattr(entry, name) for entry in document.rounds] for name in ("round", "attempt"))
    trainers = set(study.participation.sites)
    if study.digest != document.digest:
        yield "the digest is not that of the study"
    if numbers != sorted(set(numbers)):
        yield "rounds do not follow each other"
    if attempts != sorted(attempts):
        yield "a later round has a smaller attempt"
    if (len(numbers) > 0) != (study.training.rounds > 0):
        yield "rounds were committed in a study without training, or none in one with it"
    if document.selected_round not in (numbers or [0]):
        yield f"selected_round {document.selected_round} is not among the rounds"
    for entry in document.rounds:
        yield from (f"round {entry.round}: {wrong}" for wrong in _contradictions_in(entry, study))
    yield from _contradictions_of("initial", document.initial, {}, study)
    yield from _contradictions_of("test", document.test, document.test_missing, study)
    if document.test is None and document.ingested:
        yield "ingested counts the images of a test that gave no result"
    absent = set(study.tested) - set(document.test.sites if document.test else ())
    if document.test is not None and not set(document.test.sites) <= set(study.tested):
        yield "the test is of sites that were not drawn for it"
    for entry in document.rounds:
        absent |= (set(entry.asked) or trainers) - set(entry.contributors)
    if document.label == "complete" and absent:
        yield f"labelled complete, but not in every round and in the test: {', '.join(sorted(absent))}"
    if (document.started.tzinfo is None) != (document.finished.tzinfo is None) or document.finished < document.started:
        yield "finished lies before started"


def _contradictions_in(entry: Round, study: Study) -> Iterable[str]:
    trainers, everyone, given = set(study.participation.sites), set(study.all_sites), set(entry.contributors)
    if entry.asked != ([] if study.participation.sample is None else study.asked(entry.round)):
        yield "the sites that were asked are not those that the study draws for the round"
    if len(given) != len(entry.contributors) or not given <= trainers:
        yield "contributors are not distinct training sites of the study"
    if entry.asked and not given <= set(entry.asked):
        yield "a site contributed that was not asked"
    if len(given) < study.participation.quorum:
        yield f"{len(given)} contributors are fewer than the quorum of {study.participation.quorum}"
    if set(entry.missing) & given or not set(entry.missing) <= everyone:
        yield "a missing site also contributed, or is none of the study's"
    if (entry.train_loss is None) != (entry.cases == 0 or study.privacy != "none"):
        yield "cases and train_loss do not fit each other, or a private study's training loss was told"
    if not set(entry.late) <= trainers:
        yield "a site that was late is no training site of the study"
    if not set(entry.site_seconds) <= everyone:
        yield "site_seconds name a site that the study does not"
    yield from _contradictions_of("validation", entry.validation, entry.validation_missing, study)


def _contradictions_of(what: str, scores: Scores | None, missing: Mapping[str, str], study: Study) -> Iterable[str]:
    """Contradictions among the names of one evaluation: whose images are counted, and who is missing."""
    sites, everyone = list(scores.sites) if scores else [], set(study.all_sites)
    if not set(sites) | set(missing) <= everyone:
        yield f"{what} names a site that the study does not"
    if len(set(sites)) != len(sites) or set(sites) & set(missing):
        yield f"a site stands twice in {what}, or in {what} and among its missing"
    if scores is not None and study.protection == "masked" and len(sites) < MASKED_SITES_MIN:
        yield f"{what} is of {len(sites)} sites, and a masked sum of fewer than {MASKED_SITES_MIN} is never opened"


def _contradictions_in_figures(document: Results, study: Study, test: Sample | None) -> Iterable[str]:
    """Contradictions between what sites released and the study, or the sum that they are part of."""
    if not set(document.figures) <= set(test.sites if test else ()):
        yield "figures: a site that is not in the test released figures of it"
    for site, row in document.figures.items():
        if len(row) != len(study.task.targets):
            yield f"figures: {site}: {len(row)} figures for {len(study.task.targets)} targets"
        for figure in (figure for figure in row if figure is not None):
            if not study.evaluation.site_figures:
                yield f"figures: {site}: a figure was released, and the study releases none"
            if isinstance(figure, OutlineFigure) != study.segments:
                yield f"figures: {site}: a figure of another kind of task"
            elif isinstance(figure, OutlineFigure):
                yield from (f"figures: {site}: {wrong}" for wrong in _contradictions_in_outlines(figure))
            elif not figure.low <= figure.auroc <= figure.high or figure.bootstrap_low > figure.bootstrap_high:
                yield f"figures: {site}: the AUROC does not lie in its interval"
    for place, target in enumerate(study.task.targets):
        parts = [row[place] for row in document.figures.values() if place < len(row)]
        outlined = sum(part.cases for part in parts if isinstance(part, OutlineFigure))
        if test and test.overlaps and outlined > test.images:
            yield f"figures: {target}: the sites count more cases than all sites together have images"
        negatives = sum(part.negatives for part in parts if isinstance(part, Figure))
        positives = sum(part.positives for part in parts if isinstance(part, Figure))
        if test and (negatives > test.histogram.negatives(place) or positives > test.histogram.positives(place)):
            yield f"figures: {target}: the sites count more images of a class than all sites together"


def _contradictions_in_outlines(figure: OutlineFigure) -> Iterable[str]:
    for name in ("dice", "surface_dice", "hd95_mm"):
        found, most = getattr(figure, name), DISTANCE_MAX if name == "hd95_mm" else 1
        if found is not None and not found[1] <= found[0] <= found[2] <= most:
            yield f"{name} does not lie in its interval"


def _groups(document: Results, study: Study, test: Sample | None) -> Groups:
    """The subgroups, decoded and held to the study and to the whole they are part of."""
    found, names = Groups.empty(study), [(group.division, group.name) for group in groups(study)]
    for entry in document.groups:
        if (entry.division, entry.name) not in names or test is None:
            raise MessageMalformed(f"groups: {entry.name!r} of {entry.division!r} is no group of the study's test")
        place = names.index((entry.division, entry.name))
        histogram = ScoreHistogram.from_json(entry.counts)
        if histogram.counts.shape != found.counts[place].shape or len(entry.sites) != len(study.task.targets):
            raise MessageMalformed(f"groups: {entry.name}: counts of another shape than the study's")
        if found.told[place].any() or max(entry.sites) > len(test.sites):
            raise MessageMalformed(f"groups: {entry.name} stands twice, or is told by more sites than were tested")
        if any(0 < sites < least_sites(study) for sites in entry.sites):
            raise MessageMalformed(
                f"groups: {entry.name} is of fewer than the {least_sites(study)} sites of a masked sum"
            )
        found.counts[place], found.told[place] = histogram.counts, entry.sites
    whole = test.histogram if test else ScoreHistogram.empty(len(study.task.targets), study.evaluation.bins)
    return Groups.read(study, found.numbers(), whole)


def _grades(document: Results, study: Study, test: Sample | None) -> NDArray[np.int64]:
    size = grade_count(study) if test else 0
    if [len(row) for row in document.grades] != [size] * size:
        raise MessageMalformed(f"grades: a table of {size} rows and columns was expected")
    return grades.read(size, np.array(document.grades, np.int64).ravel(), test.images if test else 0)


def _check_number(document: Results, study: Study, test: Sample | None) -> None:
    """Raises MessageMalformed for sums that no images have, sites that say what they cannot, or a number that is not asked."""
    number = document.number
    if (number is not None) != isinstance(study.task, Regression):
        raise MessageMalformed("number: it is there although the target is none, or is missing although it is one")
    if number is None or not isinstance(study.task, Regression):
        return
    sums = regression.read(np.array(number.sums, np.int64), test.images if test else 0)
    if not set(number.sites) <= set(test.sites if test else ()):
        raise MessageMalformed("number: a site that is not in the test released figures of it")
    for site, said in number.sites.items():
        if said is None:
            continue
        if not study.evaluation.site_figures or said.images > sums[0] or set(said.intervals) != set(regression.FIGURES):
            raise MessageMalformed(
                f"number: {site} released what the study does not, or counts more images than all sites"
            )
        ends = [(getattr(said, name), *said.intervals[name]) for name in regression.FIGURES]
        regression.read_released(study.task, np.array([*np.ravel(ends), said.images], np.float32))


def _sample(scores: Scores | None, study: Study, where: str) -> Sample | None:
    """Decode one histogram and hold it to the study's targets and bins, and to the number of images."""
    if scores is None:
        return None
    if study.segments:
        return _outlined(scores, study, where)
    shape = (len(study.task.targets), 2, study.evaluation.bins)
    try:
        histogram = ScoreHistogram.from_json(scores.counts)
    except MessageMalformed as error:
        raise MessageMalformed(f"results: {where}: {error}", remedy=REMEDY) from None
    if histogram.counts.shape != shape:
        raise MessageMalformed(f"results: {where}: counts are {histogram.counts.shape}, not {shape}", remedy=REMEDY)
    if histogram.counts.sum(axis=(1, 2)).max() > scores.images:
        raise MessageMalformed(
            f"results: {where}: the histogram counts more than the {scores.images} images", remedy=REMEDY
        )
    if (scores.loss is None and scores.images > 0) or scores.patients > scores.images:
        raise MessageMalformed(f"results: {where}: loss, patients and images do not fit each other", remedy=REMEDY)
    return Sample(scores.sites, scores.patients, scores.images, scores.loss, histogram)


def _outlined(scores: Scores, study: Study, where: str) -> Sample:
    """The same of outlines: sums held to the study's structures and to the number of images."""
    structures = len(study.task.targets)
    try:
        sums = Overlaps.from_json(scores.counts)
    except MessageMalformed as error:
        raise MessageMalformed(f"results: {where}: {error}", remedy=REMEDY) from None
    if len(sums.counts) != structures:
        raise MessageMalformed(
            f"results: {where}: sums of {len(sums.counts)} structures, not {structures}", remedy=REMEDY
        )
    if any(0 < sites < least_sites(study) or sites > len(scores.sites) for sites in sums.counts[:, 0].tolist()):
        raise MessageMalformed(f"results: {where}: a structure is told by too few sites, or by too many", remedy=REMEDY)
    # Images of a private study are in tens, so cases may be more.
    if study.privacy == "none" and int(sums.counts[:, CASES].max()) > scores.images:
        raise MessageMalformed(f"results: {where}: more cases than the {scores.images} images", remedy=REMEDY)
    if (scores.loss is None and scores.images > 0) or scores.patients > scores.images:
        raise MessageMalformed(f"results: {where}: loss, patients and images do not fit each other", remedy=REMEDY)
    empty = ScoreHistogram.empty(structures, study.evaluation.bins)
    return Sample(scores.sites, scores.patients, scores.images, scores.loss, empty, sums)


def testing_of(study: Study, site: str) -> str:
    """internal or external, as CLAIM 2024 uses these words."""
    return "internal" if site in study.participation.sites and study.training.rounds else "external"


def canonical(study: dict[str, Any]) -> bytes:
    """The spelling of `Study.canonical` for a study that came as JSON."""
    return json.dumps(study, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
