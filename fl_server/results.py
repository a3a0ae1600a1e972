"""The results document of a run, strictly read: schema, study, and histograms, all held against each other.

Whatever does not follow the schema, and whatever contradicts itself, is a MessageMalformed that says where.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from models.contributions import RELEASE_MIN
from models.metrics import ScoreHistogram
from models.study import MASKED_SITES_MIN, Document, Name, Study
from privacy.errors import DocumentError, MessageMalformed

VERSION = 2
REMEDY = "Fetch the results of the run again; a results document is never edited by hand."

Count = Annotated[int, Field(ge=0, le=2**53)]
Released = Annotated[int, Field(ge=RELEASE_MIN, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Reason = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9 ._-]{0,79}$")]
Sites = Annotated[list[Name], Field(min_length=1, max_length=1000)]


class Scores(Document):
    """One model on one split of `sites` together. `loss` is a mean over images, `counts` a `ScoreHistogram.to_json`."""

    sites: Sites
    patients: Count
    images: Count
    loss: Finite | None
    counts: Any


class Figure(Document):
    """What one site released about its test split and one target: AUROC, 95 % interval, images of each class."""

    auroc: Share
    low: Share
    high: Share
    negatives: Released
    positives: Released


class Round(Document):
    """One round as it was committed: who contributed, who did not and why, and the sums over those who did.

    `scale`: update values were multiplied by two to this power before rounding. `validation` is of the model after it.
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


class Results(Document):
    """The results document of a run, version 2. `ingested`: images in the archives of the sites of `test`."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)]  # Literal[2] would take 2.0 for 2
    run_id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    study: dict[str, Any]
    label: Annotated[str, StringConstraints(max_length=100_000, pattern=r"^(complete|partial \([^\r\n]+\))$")]
    started: datetime
    finished: datetime
    selected_round: int
    initial: Scores | None
    rounds: Annotated[list[Round], Field(min_length=1, max_length=10_000)]
    test: Scores | None
    test_missing: dict[Name, Reason]
    figures: dict[Name, list[Figure | None]]
    ingested: Count


@dataclass(frozen=True)
class Sample:
    """Scores of one split at `sites` together: `histogram` is their sum, `loss` the mean over their images."""

    sites: Sequence[str]
    patients: int
    images: int
    loss: float | None
    histogram: ScoreHistogram


@dataclass(frozen=True)
class Evaluation:
    """A checked results document with its study and its histograms decoded. `validation[0]` is of the initial model."""

    results: Results
    study: Study
    validation: Mapping[int, Sample | None]
    test: Sample | None


def check(results: dict[str, Any]) -> Evaluation:
    """The results document, strictly read. Raises MessageMalformed for another schema, NaN, or a contradiction."""
    try:
        text = json.dumps(results, allow_nan=False)
        document = Results.model_validate_json(text, strict=True)
        study = Study.from_canonical(canonical(document.study))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise MessageMalformed(f"results: {place}: {first['msg']}", remedy=REMEDY) from None
    except (TypeError, ValueError, RecursionError, DocumentError) as error:
        raise MessageMalformed(f"results: {error}", remedy=REMEDY) from None
    for wrong in _contradictions(document, study):
        raise MessageMalformed(f"results: {wrong}", remedy=REMEDY)
    initial, test = _sample(document.initial, study, "initial"), _sample(document.test, study, "test")
    validation = {e.round: _sample(e.validation, study, f"round {e.round}, validation") for e in document.rounds}
    for wrong in _contradictions_in_figures(document, study, test):
        raise MessageMalformed(f"results: {wrong}", remedy=REMEDY)
    return Evaluation(document, study, {0: initial} | validation, test)


def _contradictions(document: Results, study: Study) -> Iterable[str]:
    """One sentence for each statement of the document that another statement of it denies."""
    numbers, attempts = ([getattr(entry, name) for entry in document.rounds] for name in ("round", "attempt"))
    trainers, everyone = set(study.participation.sites), set(study.all_sites)
    if study.digest != document.digest:
        yield "the digest is not that of the study"
    if numbers != sorted(set(numbers)):
        yield "rounds do not follow each other"
    if attempts != sorted(attempts):
        yield "a later round has a smaller attempt"
    if document.selected_round not in numbers:
        yield f"selected_round {document.selected_round} is not among the rounds"
    for entry in document.rounds:
        yield from (f"round {entry.round}: {wrong}" for wrong in _contradictions_in(entry, study))
    yield from _contradictions_of("initial", document.initial, {}, study)
    yield from _contradictions_of("test", document.test, document.test_missing, study)
    if document.test is None and document.ingested:
        yield "ingested counts the images of a test that gave no result"
    absent = everyone - set(document.test.sites if document.test else ())
    for entry in document.rounds:
        absent |= trainers - set(entry.contributors)
    if document.label == "complete" and absent:
        yield f"labelled complete, but not in every round and in the test: {', '.join(sorted(absent))}"
    if (document.started.tzinfo is None) != (document.finished.tzinfo is None) or document.finished < document.started:
        yield "finished lies before started"


def _contradictions_in(entry: Round, study: Study) -> Iterable[str]:
    trainers, everyone, given = set(study.participation.sites), set(study.all_sites), set(entry.contributors)
    if len(given) != len(entry.contributors) or not given <= trainers:
        yield "contributors are not distinct training sites of the study"
    if len(given) < study.participation.quorum:
        yield f"{len(given)} contributors are fewer than the quorum of {study.participation.quorum}"
    if set(entry.missing) & given or not set(entry.missing) <= everyone:
        yield "a missing site also contributed, or is none of the study's"
    if (entry.train_loss is None) != (entry.cases == 0 or study.privacy != "none"):
        yield "cases and train_loss do not fit each other, or a private study's training loss was told"
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
            if not figure.low <= figure.auroc <= figure.high:
                yield f"figures: {site}: the AUROC does not lie in its interval"
    for place, target in enumerate(study.task.targets):
        parts = [row[place] for row in document.figures.values() if place < len(row)]
        negatives = sum(part.negatives for part in parts if part is not None)
        positives = sum(part.positives for part in parts if part is not None)
        if test and (negatives > test.histogram.negatives(place) or positives > test.histogram.positives(place)):
            yield f"figures: {target}: the sites count more images of a class than all sites together"


def _sample(scores: Scores | None, study: Study, where: str) -> Sample | None:
    """Decode one histogram and hold it to the study's targets and bins, and to the number of images."""
    if scores is None:
        return None
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


def canonical(study: dict[str, Any]) -> bytes:
    """The spelling of `Study.canonical` for a study that came as JSON."""
    return json.dumps(study, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
