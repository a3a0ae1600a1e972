"""Whether a site is ready, as a list of findings: each says what was looked at, and what to do where it is not good."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fl_client import standing
from fl_client.consent import consents
from fl_client.enrol import greet
from fl_client.facts import Facts, facts_of
from fl_client.index import Index
from fl_client.masks import mapped
from fl_client.site import Site
from fl_client.sources import Reason
from models.labels import LabelTable
from models.study import Study
from privacy import reach
from privacy.errors import DataError, IsocenterError, VersionSkew
from privacy.greeting import own, skew

if TYPE_CHECKING:
    from fl_client.preview import Preview

CONNECT_S = 5.0
DAMAGED_SHARE_MOST = 0.02  # a disk or a copy that works loses none ...
DAMAGED_MOST = 3  # ... but an archive has a few of its own
# Shares from which somebody should look: where a column or a device does not fit, far more is missing.
LABELS_MISSING_MOST = 0.2
VIEWS_UNKNOWN_MOST = 0.05
MISSING_MOST = 0.2
_UNFORESEEN = (ValueError, TypeError, LookupError, ArithmeticError)
"""What an index or a cache gives that something else than this program wrote."""


@dataclass(frozen=True)
class Finding:
    """`good`: false if this has to be mended before the site can work. `look`: it works, and somebody should look at it.

    `numbers`: the sentence is made of counts and fixed words; others may quote paths, addresses and columns.
    """

    subject: str
    good: bool
    sentence: str
    look: bool = False
    numbers: bool = False


class WorthALook(Exception):
    """The site can work with what was found, and somebody should look at it."""


class Inspection:
    """One look at a site. Index, labels and facts are read once, when first asked for; they raise what is wrong with them."""

    def __init__(self, home: Path, study: Study | None = None) -> None:
        self.home, self.study = home, study

    @functools.cached_property
    def index(self) -> Index:
        return Index.open(Site.state_of(self.home))

    @functools.cached_property
    def labels(self) -> LabelTable:
        source = Site.source_of(Site.settings_of(self.home), self.home)
        return LabelTable.open(self.home, source.labels)

    @functools.cached_property
    def facts(self) -> Facts:
        """Raises CacheLost without an index; without a label table there are facts about the images."""
        return facts_of(self.index, attempt(lambda: self.labels))

    @functools.cached_property
    def preview(self) -> "Preview | None":
        """What the study that was asked about would take; None if none was."""
        if self.study is None:
            return None
        from fl_client.preview import preview

        settings = Site.settings_of(self.home)
        return preview(self.index, self.labels, self.study, settings, pins_of(self.home, self.study))

    @functools.cached_property
    def findings(self) -> list[Finding]:
        """One finding per subject, about a score; never raises for what it looks at."""
        found = [_finding(self, subject, look) for subject, look in _LOOKS]
        if attempt(lambda: self.facts) is not None:  # else the finding about images says why, once
            found += [_finding(self, subject, look, numbers=True) for subject, look in _COUNTS]
        return found if self.study is None else [*found, _finding(self, "study", _study)]

    @property
    def ready(self) -> bool:
        return all(finding.good for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Findings, facts and, if a study was asked about, what it would take; null where it cannot be told."""
        facts, preview = attempt(lambda: self.facts), attempt(lambda: self.preview)
        return {
            "ready": self.ready,
            "findings": [vars(finding) for finding in self.findings],
            "facts": facts.to_json() if facts else None,
            **({} if self.study is None else {"study": preview.to_json() if preview else None}),
        }


T = TypeVar("T")


def attempt(what: Callable[[], T]) -> T | None:
    """None where it cannot be told; the finding about it says why."""
    try:
        return what()
    except (IsocenterError, OSError, *_UNFORESEEN):
        return None


def findings(home: Path) -> list[Finding]:
    return Inspection(home).findings


def _finding(site: Inspection, subject: str, look: Callable[[Inspection], str], *, numbers: bool = False) -> Finding:
    try:
        return Finding(subject, True, look(site), numbers=numbers)
    except WorthALook as seen:
        return Finding(subject, True, str(seen), look=True, numbers=numbers)
    except IsocenterError as error:
        said = str(error)
        return Finding(subject, False, f"{said if said.endswith('.') else f'{said}.'} {error.remedy}".strip())
    except OSError as error:
        return Finding(subject, False, f"{error.strerror or error}")
    except _UNFORESEEN as error:
        return Finding(subject, False, f"cannot be looked at ({type(error).__name__}); run `fl-client ingest` again.")


def _reachable(looked: Inspection, which: str) -> str:
    coordinator = Site.open(looked.home).settings.coordinator
    if coordinator is None:
        raise IsocenterError("site.yaml names no coordinator.", remedy="Run `fl-client join LINE`.")
    address = coordinator.gateway if which == "gateway" else coordinator.service
    host, _, port = address.rpartition(":")
    way = coordinator.way(looked.home)
    reach.connect(host, int(port), way, CONNECT_S).close()
    return f"{address} answers{f' through the proxy {way}' if way else ''}"


def _versions(looked: Inspection) -> str:
    """Whether both sides run the same; what is not known because nothing answers is no fault of this machine."""
    here = own()
    sentence = f"this site runs Isocenter {here.release} (wire {here.wire})"
    try:
        there = greet(looked.home)
    except (IsocenterError, OSError):
        return f"{sentence}; the coordinator could not be asked"
    found = skew(here, there, "this site", "the coordinator")
    if found is None:
        return f"{sentence}, and so does the coordinator"
    if found.must:
        raise VersionSkew(found.sentence, remedy=found.remedy)
    raise WorthALook(f"{found.sentence} {found.remedy}")


def _images(looked: Inspection) -> str:
    index = looked.index
    if not index.taken:
        raise DataError("no image was taken.", remedy="Run `fl-client ingest` and read its table.")
    index.require_fit()
    return f"{index.taken} images of {index.patients} patients in the cache"


def _labels(looked: Inspection) -> str:
    table = looked.labels
    unmapped = sum(sum(words.values()) for words in table.unmapped.values())
    note = f"; {unmapped} label words are not mapped and count as missing" if unmapped else ""
    return f"{len(table)} rows for {', '.join(table.mapping.targets)}{note}"


def _budget(looked: Inspection) -> str:
    from fl_client.budget import open_budget, shown

    found = open_budget(looked.home)
    unbounded = f"; {len(found.unprotected)} runs without differential privacy" if found.unprotected else ""
    return (
        f"ε {shown(found.total)} of {found.caps['total']:g} charged to the most used patient, {shown(found.year)} of "
        f"{found.caps['year']:g} in the last 365 days{unbounded}"
    )


# What the data look like. What is worth a look is no reason not to work: a site may have its reasons, a study its own minimum.


def _damaged(looked: Inspection) -> str:
    facts = looked.facts
    others = sum(facts.left_out.values()) - facts.damaged
    sentence = f"{of(facts.damaged, facts.files, 'files')} damaged or cut off; {others} left out for other reasons"
    if not facts.complete:
        raise WorthALook(f"{sentence}. The last `fl-client ingest` did not end; run it again.")
    if facts.damaged > max(DAMAGED_MOST, DAMAGED_SHARE_MOST * facts.files):
        raise WorthALook(f"{sentence}. A disk or a copy may have failed: see `fl-client quarantine`.")
    return sentence


def _missing(looked: Inspection) -> str:
    facts = looked.facts
    parts = [f"{name}: {of(t.missing, facts.images, 'images')} without label" for name, t in facts.targets.items()]
    parts.append(f"{of(facts.patients_unlabelled, facts.patients, 'patients')} without any")
    sentence = "; ".join(parts)
    if facts.patients_unlabelled == facts.patients:
        raise WorthALook(
            f"{sentence}. No study can train here: look at `key` and `words` below data.labels in site.yaml."
        )
    if any(target.share_missing > LABELS_MISSING_MOST for target in facts.targets.values()):
        raise WorthALook(
            f"{sentence}. Perhaps the key column or some words are mapped wrongly; missing is never absent."
        )
    return sentence


def _people(looked: Inspection) -> str:
    facts = looked.facts
    age, sex = (of(tally.missing, tally.total, "patients") for tally in (facts.ages, facts.sexes))
    sentence = f"age unknown of {age}, sex of {sex}"
    if facts.table_misread:
        raise WorthALook(
            f"{sentence}; {facts.table_misread} cells of the label table about people were not understood."
        )
    if max(facts.ages.share_missing, facts.sexes.share_missing) > MISSING_MOST:
        raise WorthALook(f"{sentence}. Results by age and sex will leave these out.")
    return sentence


def _views(looked: Inspection) -> str:
    views = looked.facts.views
    if looked.facts.images and not views.total:
        return "CT volumes only; their axes are the patient's, whatever the scanner's were"
    dropped = {name: looked.facts.left_out.get(Reason(name), 0) for name in ("lateral", "view_unknown")}
    unknown = views.missing + dropped["view_unknown"]
    words = _words(views.counts) if views.counts else "none known"
    sentence = f"{words}; {of(unknown, views.total + dropped['view_unknown'], 'images')} of unknown view"
    sentence += f"; {dropped['lateral']} lateral ones left out" if dropped["lateral"] else ""
    if unknown > VIEWS_UNKNOWN_MOST * max(1, views.total):
        raise WorthALook(f"{sentence}. Studies ask for a view; have View Position filled in at the device.")
    return sentence


def _spacing(looked: Inspection) -> str:
    tally = looked.facts.spacings
    sentence = f"unknown of {of(tally.missing, tally.total, 'images')}"
    if tally.share_missing > MISSING_MOST:
        raise WorthALook(f"{sentence}. They take part, but nobody can tell how large a pixel is.")
    return sentence


def _twice(looked: Inspection) -> str:
    twice = looked.facts.twice
    sentence = f"{twice.copies} files repeat an image and count once"
    if twice.across_patients:
        raise WorthALook(f"{sentence}; {twice.across_patients} images stand under another patient number as well.")
    return f"{sentence}; none of them under another patient" if twice.copies else "no image stands here twice"


def _leakage(looked: Inspection) -> str:
    """An examination is of one person; under two numbers, that person may be trained on and tested on."""
    twice = looked.facts.twice
    divided = [preview.divided for preview in previews_of_approved(looked) if preview.divided]
    tied = twice.examinations + twice.instances
    if divided:
        raise WorthALook(
            f"in {len(divided)} approved studies, {sum(divided)} examinations stand under patients on both sides of the "
            "split, so a person may be trained on and tested on. Correct the patient numbers, or decline these studies."
        )
    if tied:
        raise WorthALook(
            f"{tied} examinations stand under more than one patient number, who may get to two sides of a split."
        )
    return "no examination stands under two patients"


def previews_of_approved(looked: Inspection) -> "list[Preview]":
    """What each approved study that fits this site's labels takes, by the splits that were pinned."""
    labels = attempt(lambda: looked.labels)
    decided = [c.offer.study for c in consents(looked.home) if c.statement.decision == "approved"]
    approved = [study for study in decided if study.task.kind != "counting"]  # which splits nobody
    fitting = [study for study in approved if labels and mapped(looked.index.state, labels.mapping, study)]
    if labels is None or not fitting or looked.index.unfit:  # the findings about labels and images say why
        return []
    from fl_client.preview import preview

    settings = Site.settings_of(looked.home)
    return [preview(looked.index, labels, study, settings, pins_of(looked.home, study)) for study in fitting]


def pins_of(home: Path, study: Study) -> Path:
    return home / "studies" / f"{study.digest}.pins.json"


def _study(looked: Inspection) -> str:
    preview = looked.preview
    if preview is None:
        return "none was asked about"
    if preview.problems:
        raise DataError(f"{preview.sentence()}.", remedy=" ".join(preview.problems))
    return preview.sentence()


def of(part: int, whole: int, what: str) -> str:
    """ "3 of 40 images (8 %)"; never "0 %" of something that is there."""
    if not whole or not part:
        return f"{part} of {whole} {what}"
    share = 100 * part / whole
    return f"{part} of {whole} {what} ({f'{share:.0f}' if share >= 1 else '< 1'} %)"


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


_LOOKS: list[tuple[str, Callable[[Inspection], str]]] = [
    ("site.yaml", lambda looked: standing.settings(looked.home)),
    ("membership", lambda looked: standing.membership(looked.home)),
    ("certificate", lambda looked: standing.certificate(looked.home)),
    ("gateway", lambda looked: _reachable(looked, "gateway")),
    ("service", lambda looked: _reachable(looked, "service")),
    ("versions", _versions),
    ("images", _images),
    ("labels", _labels),
    ("disk", lambda looked: standing.disk(looked.home)),
    ("worker", lambda looked: standing.worker(looked.home)),
    ("policy", lambda looked: standing.policy(looked.home)),
    ("budget", _budget),
    ("journal", lambda looked: standing.journal(looked.home)),
]
_COUNTS: list[tuple[str, Callable[[Inspection], str]]] = [
    ("damage", _damaged),
    ("missing", _missing),
    ("people", _people),
    ("views", _views),
    ("spacing", _spacing),
    ("duplicates", _twice),
    ("leakage", _leakage),
]
