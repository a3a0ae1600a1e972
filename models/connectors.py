"""Label tables of known collections, each read by the rule that its makers state; what a rule leaves open stays missing.

A connector turns the files of one collection, as they are downloaded, into one table with a fixed key. `data.labels.targets`
then maps its columns to 1 and 0 as in any other table, so a connector decides who said what of which image, and never what
that means for a study. Sources of the rules: docs/labels.md.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, StringConstraints, field_validator, model_validator

from models.attributes import says_nothing
from models.study import Document
from models.tables import (
    ROWS_MAX,
    Table,
    as_text,
    cell_at,
    list_words,
    nearest,
    normalised,
    number_of,
    open_table,
    read_json,
)
from privacy.errors import LabelTableError

Matches = Literal["study_uid", "series_uid", "sop_uid", "accession", "patient_id", "file"]
File = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Files = Annotated[list[File], Field(min_length=1, max_length=100)]
Cells = list[str]

READERS_LEAST = 2  # a single reader is no majority
NO_FINDING = "No Finding"
NIH_FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
SIIM_CLASSES = ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance")
RICORD_QUESTIONS = {
    "appearance": list(SIIM_CLASSES),
    "opacities": [
        "Mild Opacities (1-2 lung zones)",
        "Moderate Opacities (3-4 lung zones)",
        "Severe Opacities (>4 lung zones)",
    ],
}


class Form(NamedTuple):
    """What a connector's table is like: `LabelMap` takes these in place of what a plain table's map has to say."""

    table: str
    key: str
    matches: Matches
    patient: str | None = None
    view: str | None = None
    strip_prefix: str | None = None
    about: dict[str, str] | None = None


@dataclass
class Tally:
    """What a connector found wrong, counted while its rows are read; `undecided` are keys on which its sources disagree."""

    malformed: int = 0
    without_key: int = 0
    undecided: int = 0


@dataclass(frozen=True)
class Reading:
    """The table that a connector makes. `lists`: columns of several words; `absent`: a word that is 0 for every target."""

    table: Table
    tally: Tally = field(default_factory=Tally)
    lists: frozenset[str] = frozenset()
    absent: dict[str, str] = field(default_factory=dict)


class _Collection(Document):
    """One collection's files; FILES names the settings that hold them, the first of which is the table's name."""

    FILES: ClassVar[tuple[str, ...]]
    BY_NAME: ClassVar[bool] = False  # whether files are compared by the last part of their path

    def files(self) -> list[str]:
        values = [getattr(self, name) for name in self.FILES]
        return [file for value in values for file in ([value] if isinstance(value, str) else value or [])]

    def anchored(self, root: Path) -> "_Collection":
        """The same with files that do not depend on where site.yaml is."""
        update: dict[str, Any] = {}
        for name in self.FILES:
            value = getattr(self, name)
            one = str((root / value).resolve()) if isinstance(value, str) else value
            update[name] = [str((root / file).resolve()) for file in value] if isinstance(value, list) else one
        return self.model_copy(update=update)

    def form(self) -> Form:
        raise NotImplementedError

    def read(self, root: Path) -> Reading:
        raise NotImplementedError


class Midrc(_Collection):
    """MIDRC, Gen3 tables (TSV): COVID status of a study, from the latest test within `window_days` before it."""

    FILES: ClassVar = ("studies", "tests", "cases")
    studies: Files = Field(description="imaging_study tables")
    tests: Files = Field(description="measurement tables")
    cases: Files | None = Field(default=None, description="case tables: age at the index event, sex, race, ethnicity")
    window_days: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        default=[0, 14], description="a test counts from so many to so many days before the study"
    )

    @model_validator(mode="after")
    def _rising(self) -> "Midrc":
        first, last = self.window_days
        if not -3650 <= first <= last <= 3650:
            raise ValueError("window_days must be two days, the first not above the second")
        return self

    def form(self) -> Form:
        about = {"age": "age", "age_over_89": "age_over_89", "sex": "sex", "race": "race", "ethnicity": "ethnicity"}
        return Form(self.studies[0], "study_uid", "study_uid", patient="case_id", about=about)

    def read(self, root: Path) -> Reading:
        tally = Tally()
        tests, cases = _tests(root, self.tests, tally), _cases(root, self.cases or [], tally)
        columns = ["study_uid", "case_id", "covid19", "days_from_test", *_ABOUT]
        name = Path(self.studies[0]).name
        return Reading(Table(name, columns, self._rows(_gen3(root, self.studies, tally, _STUDY), tests, cases)), tally)

    def _rows(
        self, studies: Iterator["_Gen3Row"], tests: "_Tests", cases: dict[str, Cells]
    ) -> Iterator[tuple[int, Cells]]:
        for row in studies:
            found = self._latest(tests.get(row.case, {}), _day(row.get("days_to_study")))
            about = _about(row.get("age_at_imaging"), row.get("age_at_imaging_gt89"), cases.get(row.case, [""] * 5))
            # Tests of one day that contradict each other give two rows of one key: missing, and counted as a conflict.
            for result, days in found or [("", "")]:
                yield row.line, [row.get("study_uid"), row.case, result, days, *about]

    def _latest(self, by_day: dict[int, set[str]], day: int | None) -> list[tuple[str, str]]:
        """(result, days before the study) of the latest tests within the window; a study without a day has none."""
        first, last = self.window_days
        if day is None or not by_day:
            return []
        latest = next((before for before in range(first, last + 1) if day - before in by_day), None)
        return [] if latest is None else [(result, str(latest)) for result in sorted(by_day[day - latest])]


_Tests = dict[str, dict[int, set[str]]]
"""Case -> day from its index event -> results of that day."""

_ABOUT = ("age", "age_over_89", "sex", "race", "ethnicity")
_CASE = ("case_ids", "cases.submitter_id", "case_ids_0")  # columns that may name the case; the API writes the last
_STUDY = ("study_uid", "days_to_study")
_TEST = ("test_name", "test_result_text", "test_days_from_index")


class _Gen3Row(NamedTuple):
    """A row of a Gen3 table that belongs to one case."""

    line: int
    case: str
    at: dict[str, int]
    cells: Cells

    def get(self, column: str) -> str:
        return cell_at(self.cells, self.at.get(column))


def _gen3(root: Path, files: list[str], tally: Tally, needed: tuple[str, ...]) -> Iterator[_Gen3Row]:
    """Rows of several exports of one node, one after the other; those of no case, or of several, are malformed."""
    total = 0
    for file in files:
        table = open_table(root / file, _CASE[0])
        # Submission templates mark required columns with a star, exports do not.
        bare = Table(table.name, [column.removeprefix("*").strip() for column in table.columns], table.rows)
        at = {column: bare.at(column) for column in needed}
        naming = [bare.at(column) for column in _CASE if bare.has(column)] or [bare.at(_CASE[0])]
        at = {column: place for place, column in reversed(list(enumerate(bare.columns)))} | at
        for line, cells in bare.rows:
            total += 1
            if total > ROWS_MAX:
                raise LabelTableError(f"{table.name}: with the files before it, more than {ROWS_MAX} rows")
            case = {word for place in naming for word in list_words(cell_at(cells, place))}
            if len(case) != 1 or bare.shifted(cells):
                tally.malformed += 1  # whose test, or whose age, would it be?
            else:
                yield _Gen3Row(line, case.pop(), at, cells)


def _tests(root: Path, files: list[str], tally: Tally) -> _Tests:
    """COVID-19 tests that say yes or no on a known day."""
    found: _Tests = {}
    for row in _gen3(root, files, tally, _TEST):
        day, result = _day(row.get("test_days_from_index")), normalised(row.get("test_result_text"))
        if normalised(row.get("test_name")) != "covid-19" or result not in ("positive", "negative"):
            continue
        if day is None:
            tally.malformed += not says_nothing(row.get("test_days_from_index"))
            continue
        found.setdefault(row.case, {}).setdefault(day, set()).add(result.capitalize())
    return found


def _cases(root: Path, files: list[str], tally: Tally) -> dict[str, Cells]:
    """Case -> age at the index event, whether it is above 89, sex, race, ethnicity; a contradiction is missing."""
    found: dict[str, Cells] = {}
    for row in _case_rows(root, files, tally):
        cells = [row.get(column) for column in ("age_at_index", "age_at_index_gt89", "sex", "race", "ethnicity")]
        known = found.setdefault(row.case, cells)
        found[row.case] = [_agreed(mine, new) for mine, new in zip(known, cells, strict=True)]
    return found


def _agreed(mine: str, new: str) -> str:
    """What two exports say of a case together: "-" is a word for missing that no third export fills."""
    if mine == new or not new:
        return mine
    return "-" if mine else new


def _case_rows(root: Path, files: list[str], tally: Tally) -> Iterator[_Gen3Row]:
    """Case tables name the case in `submitter_id`; whatever else they hold, `case_ids` says the same."""
    for file in files:
        table = open_table(root / file, "submitter_id")
        bare = Table(table.name, [column.removeprefix("*").strip() for column in table.columns], table.rows)
        at = {column: place for place, column in reversed(list(enumerate(bare.columns)))}
        at["submitter_id"] = bare.at("submitter_id")
        for line, cells in bare.rows:
            case = cell_at(cells, at["submitter_id"])
            if not case or bare.shifted(cells):
                tally.malformed += 1
            else:
                yield _Gen3Row(line, case, at, cells)


def _about(age: str, over_89: str, case: Cells) -> Cells:
    """The age at imaging where the study has one, else that at the index event, which is days or years from it."""
    at_imaging = not says_nothing(age) or normalised(over_89) == "yes"
    return [age, over_89, *case[2:]] if at_imaging else case


def _day(cell: str) -> int | None:
    number = number_of(cell)
    return int(number) if number is not None and number.is_integer() else None


# --- mRALE


_EXTENT_DENSITY = tuple(f"{what}_{side}_numerical" for side in ("right", "left") for what in ("extent", "density"))


class Mrale(_Collection):
    """Scores of the MIDRC mRALE Mastermind challenge: 0 to 24 for each study, recomputed from extent and density."""

    FILES: ClassVar = ("scores",)
    scores: File = Field(description="table of the annotations, one row a study")

    def form(self) -> Form:
        return Form(self.scores, "StudyInstanceUID", "study_uid")

    def read(self, root: Path) -> Reading:
        tally = Tally()
        table = open_table(root / self.scores, "StudyInstanceUID")
        places = [table.at(column) for column in (*_EXTENT_DENSITY, "mRALE Score")]
        rows = self._rows(table, places, tally)
        return Reading(Table(table.name, table.columns, rows), tally)

    def _rows(self, table: Table, places: list[int], tally: Tally) -> Iterator[tuple[int, Cells]]:
        for line, cells in table.rows:
            parts = [cell_at(cells, place) for place in places]
            if table.shifted(cells) or not (all(map(says_nothing, parts)) or _adds_up(parts)):
                tally.malformed += 1
            else:
                yield line, cells


def _adds_up(parts: Cells) -> bool:
    """Whether extent (0 to 4) times density (0 to 3), right and left, give the score.

    An extent with density 0 is taken as it stands: two of the 2,079 studies have one, and the challenge scored them so.
    """
    extent_right, density_right, extent_left, density_left, score = map(number_of, parts)
    sides = ((extent_right, density_right), (extent_left, density_left))
    within = all(extent in range(5) and density in range(4) for extent, density in sides)
    return within and score == sum((extent or 0) * (density or 0) for extent, density in sides)


# --- RICORD, and any annotations that MD.ai exports


class Ricord(_Collection):
    """RSNA RICORD, annotations of MD.ai (JSON): adjudication wins, else the majority of at least two readers, else missing."""

    FILES: ClassVar = ("annotations", "clinical")
    annotations: File = Field(description="annotations, as exported by MD.ai (JSON)")
    clinical: File | None = Field(default=None, description="clinical table (XLSX or CSV), which names the patient")
    sheet: str | None = Field(
        default="CR Pos - TCIA Submission", min_length=1, max_length=100, description="sheet of a clinical workbook"
    )
    adjudication: str | None = Field(
        default="Adjudication",
        min_length=1,
        max_length=100,
        description="word in the name of the label group that decides; nothing: there is none",
    )
    questions: dict[str, Annotated[list[str], Field(min_length=1, max_length=100)]] = Field(
        default=RICORD_QUESTIONS,
        min_length=1,
        max_length=32,
        description="column of the table: the labels of which a study has one",
    )

    @field_validator("questions")
    @classmethod
    def _apart(cls, questions: dict[str, list[str]]) -> dict[str, list[str]]:
        labels = [normalised(label) for labels in questions.values() for label in labels]
        if len(set(labels)) < len(labels):
            raise ValueError("a label stands twice; it answers one question")
        return questions

    def form(self) -> Form:
        patient = None if self.clinical is None else "Anon MRN"
        key = "StudyInstanceUID"
        return Form(self.annotations, key, "study_uid", patient=patient, strip_prefix="MIDRC-RICORD-1C-")

    def read(self, root: Path) -> Reading:
        tally, name = Tally(), Path(self.annotations).name
        export = _Export.read(root / self.annotations)
        wanted = {normalised(label): question for question, labels in self.questions.items() for label in labels}
        if missing := sorted(wanted.keys() - {normalised(label.name) for label in export.labels.values()}):
            defined = sorted({" ".join(label.name.split()) for label in export.labels.values()})
            raise LabelTableError(
                f"{name}: no label group has {missing[0]!r}{nearest(missing[0], defined)}; name those of this export under "
                f"`questions`. Labels found: {', '.join(map(repr, defined[:30]))}"
            )
        self._adjudication_is_there(name, export)
        votes = export.votes(wanted, tally)
        columns, clinical = self._clinical(root, tally)
        rows = self._rows(votes, clinical, len(columns), tally)
        return Reading(Table(name, ["StudyInstanceUID", *self.questions, *columns], rows), tally)

    def _rows(
        self, votes: "Votes", clinical: dict[str, Cells], width: int, tally: Tally
    ) -> Iterator[tuple[int, Cells]]:
        for number, (uid, by_question) in enumerate(votes.items(), start=1):
            answers = [self._consensus(by_question.get(question, {}), tally) for question in self.questions]
            yield number, [uid, *answers, *clinical.get(uid, [""] * width)]

    def _consensus(self, by_reader: dict["_Reader", set[str]], tally: Tally) -> str:
        """The label that counts, "" if none does. A reader with two answers has not answered."""
        final = {label for reader, labels in by_reader.items() if self._decides(reader) for label in labels}
        answers = [next(iter(labels)) for labels in by_reader.values() if len(labels) == 1]
        decided = [label for label, n in Counter(answers).items() if n >= READERS_LEAST and 2 * n > len(answers)]
        if final:
            decided = list(final) if len(final) == 1 else []
        tally.undecided += bool(by_reader) and not decided
        return decided[0] if decided else ""

    def _decides(self, reader: "_Reader") -> bool:
        return self.adjudication is not None and normalised(self.adjudication) in normalised(reader.name)

    def _adjudication_is_there(self, name: str, export: "_Export") -> None:
        readers = {label.reader for label in export.labels.values()}
        if self.adjudication is not None and not any(map(self._decides, readers)):
            raise LabelTableError(
                f"{name}: no label group is called {self.adjudication!r}; `adjudication: null` if nobody decided between "
                f"readers. Groups found: {', '.join(sorted(repr(reader.name[:60]) for reader in readers)[:20])}"
            )

    def _clinical(self, root: Path, tally: Tally) -> tuple[Cells, dict[str, Cells]]:
        """Columns of the clinical table, and the cells of each study; a study with two different rows has none."""
        if self.clinical is None:
            return [], {}
        book = self.clinical.lower().endswith((".xlsx", ".xlsm"))
        table = open_table(root / self.clinical, "Anon Study UID", self.sheet if book else None)
        at, found = table.at("Anon Study UID"), dict[str, Cells]()
        twice: set[str] = set()
        table.at("Anon MRN")
        for _, row in table.rows:
            uid = cell_at(row, at)
            cells = [cell_at(row, place) for place in range(len(table.columns))]
            if not uid or table.shifted(row):
                tally.malformed += 1
            elif found.setdefault(uid, cells) != cells:
                twice.add(uid)
        tally.malformed += len(twice)
        return table.columns, {uid: cells for uid, cells in found.items() if uid not in twice}


class _Reader(NamedTuple):
    """A label group: MD.ai gives each reader one, and two may have one name."""

    number: int
    name: str


class _Defined(NamedTuple):
    name: str
    reader: _Reader


Votes = dict[str, dict[str, dict[_Reader, set[str]]]]
"""Study -> question -> reader -> labels."""


@dataclass(frozen=True)
class _Export:
    """An export of MD.ai: the labels that its groups define, by id, and its annotations, none of which is trusted."""

    labels: dict[str, _Defined]
    annotations: list[Any]

    @classmethod
    def read(cls, path: Path) -> "_Export":
        """Raises LabelTableError unless the file has the outline of such an export."""
        export = read_json(path)
        groups, sets = _list_in(path, export, "labelGroups"), _list_in(path, export, "datasets")
        labels: dict[str, _Defined] = {}
        for number, group in enumerate(groups):
            for label in _list_in(path, group, "labels"):
                if isinstance(label, dict) and isinstance(label.get("id"), str):
                    labels[label["id"]] = _Defined(
                        as_text(label.get("name")), _Reader(number, as_text(group.get("name")))
                    )
        return cls(labels, [entry for one in sets for entry in _list_in(path, one, "annotations")])

    def votes(self, wanted: dict[str, str], tally: Tally) -> Votes:
        """Who said what of which study. Series, instance and `data` may be null: a label of a study has none of them."""
        votes: Votes = {}
        for entry in self.annotations:
            label = self.labels.get(as_text(entry.get("labelId"))) if isinstance(entry, dict) else None
            if label is None:
                tally.malformed += 1
                continue
            uid = as_text(entry.get("StudyInstanceUID")).strip()
            if not uid:
                tally.without_key += 1
                continue
            if question := wanted.get(normalised(label.name)):
                said = votes.setdefault(uid, {}).setdefault(question, {}).setdefault(label.reader, set())
                said.add(" ".join(label.name.split()))
        return votes


def _list_in(path: Path, section: Any, key: str) -> list[Any]:
    found = section.get(key) if isinstance(section, dict) else None
    if not isinstance(found, list):
        raise LabelTableError(f"{path.name}: no list {key!r} where MD.ai writes one; is this its JSON export?")
    return found


# --- SIIM-FISABIO-RSNA


class Siim(_Collection):
    """SIIM-FISABIO-RSNA COVID-19 (Kaggle): one of four classes for each study; with `images`, one row for each image."""

    FILES: ClassVar = ("studies", "images")
    studies: File = Field(description="train_study_level.csv")
    images: File | None = Field(
        default=None, description="train_image_level.csv: adds boxes (opacity or none), by image"
    )

    def form(self) -> Form:
        if self.images is None:
            return Form(self.studies, "StudyInstanceUID", "study_uid")
        return Form(self.studies, "SOPInstanceUID", "sop_uid")

    def read(self, root: Path) -> Reading:
        tally = Tally()
        studies = open_table(root / self.studies, "id")
        classes = self._classes(studies, tally)
        if self.images is None:
            rows = enumerate(([uid, found] for uid, found in classes.items()), start=1)
            return Reading(Table(studies.name, ["StudyInstanceUID", "class"], rows), tally)
        images = open_table(root / self.images, "id")
        columns = ["SOPInstanceUID", "StudyInstanceUID", "class", "boxes"]
        return Reading(Table(images.name, columns, self._images(images, classes, tally)), tally)

    def _classes(self, table: Table, tally: Tally) -> dict[str, str]:
        """Study -> its class. Anything but one 1 and three 0 is malformed; two different classes are none."""
        at, marks = table.at("id"), [table.at(name) for name in SIIM_CLASSES]
        found: dict[str, str] = {}
        for _, cells in table.rows:
            uid = _without(cell_at(cells, at), "_study")
            words = [normalised(cell_at(cells, place)) for place in marks]
            if not uid or sorted(words) != ["0", "0", "0", "1"] or table.shifted(cells):
                tally.malformed += 1
                continue
            name = SIIM_CLASSES[words.index("1")]
            if found.setdefault(uid, name) not in (name, ""):
                found[uid] = ""
                tally.undecided += 1
        return found

    def _images(self, table: Table, classes: dict[str, str], tally: Tally) -> Iterator[tuple[int, Cells]]:
        at, label, study = (table.at(column) for column in ("id", "label", "StudyInstanceUID"))
        for line, cells in table.rows:
            uid, boxes = _without(cell_at(cells, at), "_image"), normalised(cell_at(cells, label)).partition(" ")[0]
            if not uid or boxes not in ("opacity", "none", "") or table.shifted(cells):
                tally.malformed += 1
                continue
            of = cell_at(cells, study)
            yield line, [uid, of, classes.get(of, ""), boxes]


def _without(identifier: str, suffix: str) -> str:
    """What stands before the suffix; "" if it has none, because then it names something else."""
    return identifier.removesuffix(suffix) if identifier.endswith(suffix) else ""


# --- NIH ChestX-ray14


class Nih(_Collection):
    """NIH ChestX-ray14: findings by image file. A finding that is not listed is missing; "No Finding" is 0 for every target."""

    FILES: ClassVar = ("entries",)
    BY_NAME: ClassVar = True  # the table does not say into which of its twelve folders an image was unpacked
    entries: File = Field(description="Data_Entry_2017.csv or Data_Entry_2017_v2020.csv")

    def form(self) -> Form:
        about = {"age": "Patient Age", "sex": "Patient Sex"}
        return Form(self.entries, "Image Index", "file", "Patient ID", "View Position", about=about)

    def read(self, root: Path) -> Reading:
        tally = Tally()
        table = open_table(root / self.entries, "Image Index")
        places: list[int | None] = [
            table.at(c) for c in ("Image Index", "Finding Labels", "Patient ID", "View Position")
        ]
        sex = next((name for name in ("Patient Sex", "Patient Gender") if table.has(name)), None)
        places += [table.at("Patient Age") if table.has("Patient Age") else None, table.at(sex) if sex else None]
        columns = ["Image Index", "Finding Labels", "Patient ID", "View Position", "Patient Age", "Patient Sex"]
        rows = Table(table.name, columns, self._rows(table, places, tally))
        return Reading(rows, tally, frozenset(("Finding Labels",)), {"Finding Labels": normalised(NO_FINDING)})

    def _rows(self, table: Table, places: list[int | None], tally: Tally) -> Iterator[tuple[int, Cells]]:
        known = {normalised(word) for word in NIH_FINDINGS}
        for line, cells in table.rows:
            row = [cell_at(cells, place) for place in places]
            found = {normalised(word) for word in list_words(row[1])}
            # "No Finding" next to a finding contradicts itself, and a word that is not of the fourteen is not this table's.
            if not (found <= known or found == {normalised(NO_FINDING)}) or table.shifted(cells):
                tally.malformed += 1
            else:
                yield line, row


class Connector(Document):
    """Which collection the labels are of; one of these, in place of `table`, `key` and `matches`."""

    midrc: Midrc | None = None
    mrale: Mrale | None = None
    ricord: Ricord | None = None
    siim: Siim | None = None
    nih: Nih | None = None

    @model_validator(mode="before")
    @classmethod
    def _more_than_a_name(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise ValueError(f"{given} needs its files, as in `connector: {{nih: {{entries: Data_Entry_2017.csv}}}}`")
        return given

    @model_validator(mode="after")
    def _one(self) -> "Connector":
        if len(self._given()) != 1:
            raise ValueError(f"name one of {', '.join(type(self).model_fields)}")
        return self

    def _given(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def collection(self) -> Midrc | Mrale | Ricord | Siim | Nih:
        found: Midrc | Mrale | Ricord | Siim | Nih = getattr(self, self._given()[0])
        return found

    def anchored(self, root: Path) -> "Connector":
        """The same with files that do not depend on where site.yaml is."""
        return self.model_copy(update={self._given()[0]: self.collection.anchored(root)})
