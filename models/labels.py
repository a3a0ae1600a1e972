"""Label tables of a site, read as mapped in site.yaml: every label is 1, 0 or missing, and nothing is negative by default.

A `LabelMap` says which column names the image, which columns hold each target and which words mean 1 and 0. A `LabelTable`
is a file read that way, or the files of a known collection (`models.connectors`). Hospitals write the same finding as
"PNEUMONIA ", "pneumonia", "1" or "1.0", leave cells empty or write "Not Reported"; words are therefore compared casefolded,
with blanks normalised and whole numbers in one spelling, and whatever is not in the map is missing and listed, never guessed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from models.attributes import (
    ETHNICITIES,
    RACES,
    About,
    Age,
    Ethnicity,
    Race,
    Sex,
    age_of,
    ethnicity_of,
    race_of,
    says_nothing,
    sex_of,
)
from models.connectors import Connector, Matches, Reading
from models.study import Document, Name
from models.tables import MISSING_WORDS, Table, cell_at, list_words, normalised, number_of, open_table
from privacy.errors import LabelTableError

__all__ = ["MISSING_WORDS", "Label", "LabelMap", "LabelTable", "Matches", "TargetWords", "normalised", "plain_key"]

WORDS_LISTED_MAX = 100  # unmapped words kept per target, so that free text in a column does not fill the memory

Label = Literal[0, 1] | None
Meanings = dict[str, Literal[0, 1]]
_NUMBER = r"[+-]?\d{1,15}(?:\.\d{1,15})?"


class Range(NamedTuple):
    """Numbers from `low` to `high`; a bound that is open does not belong to it."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    @classmethod
    def of(cls, word: str) -> "Range | None":
        """The range that a word of a map writes: "0..6", ">=7", ">7", "<=6" or "<7"; None for any other word."""
        if between := re.fullmatch(rf"({_NUMBER}) ?\.\. ?({_NUMBER})", word, re.ASCII):
            return cls(float(between[1]), float(between[2]))
        if bound := re.fullmatch(rf"(<=?|>=?) ?({_NUMBER})", word, re.ASCII):
            value, is_open = float(bound[2]), len(bound[1]) == 1
            if bound[1][0] == ">":
                return cls(value, float("inf"), low_open=is_open)
            return cls(float("-inf"), value, high_open=is_open)
        return None

    def holds(self, number: float | None) -> bool:
        if number is None:
            return False
        above = number > self.low if self.low_open else number >= self.low
        return above and (number < self.high if self.high_open else number <= self.high)

    def meets(self, other: "Range") -> bool:
        """Whether a number lies in both."""
        low, low_open = max((self.low, self.low_open), (other.low, other.low_open))
        high, closed = min((self.high, not self.high_open), (other.high, not other.high_open))
        return low < high or (low == high and not low_open and closed)


class TargetWords(Document):
    """One target of a study at this site: the column that holds it and what its words mean, or one column for each class."""

    column: str | None = Field(
        default=None, min_length=1, max_length=200, description="column of the label table that holds this target"
    )
    words: Meanings | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="what each word of that column means: 1, 0; all other words are missing. Ranges of numbers: 0..6, <7, >=7",
    )
    columns: Meanings | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="in place of column and words: columns of which one is marked 1, and what a mark there means",
    )
    list: bool = Field(
        default=False,
        description="whether a cell holds several words (['CR', 'DX'], a|b or a, b): 1 if any means 1, 0 if all mean 0",
    )

    @field_validator("words", mode="before")
    @classmethod
    def _keys_as_text(cls, words: Any) -> Any:
        """YAML reads the words 1, 0, 1.5 and true as numbers and booleans; in a table they are text."""
        if not isinstance(words, dict):
            return words
        as_text = {str(key).lower() if isinstance(key, bool) else str(key): value for key, value in words.items()}
        if len(as_text) < len(words):
            raise ValueError("the same word stands twice, once as text and once as a number")
        if any(isinstance(value, bool) for value in words.values()):
            raise ValueError("a word means 1 or 0; true and false are words here")
        return as_text

    @field_validator("words")
    @classmethod
    def _one_meaning(cls, words: Meanings | None) -> Meanings | None:
        if words is None:
            return None
        found: Meanings = {}
        for word, value in words.items():
            plain = normalised(word)
            if plain in MISSING_WORDS:
                raise ValueError(f"the word {word!r} means missing and can be neither 1 nor 0")
            if found.setdefault(plain, value) != value:
                raise ValueError(f"the word {word!r} is mapped to both 1 and 0 (case and blanks make no difference)")
        _ranges_apart(found)
        return found

    @field_validator("columns", mode="before")
    @classmethod
    def _numbers_only(cls, columns: Any) -> Any:
        if isinstance(columns, dict) and any(isinstance(value, bool) for value in columns.values()):
            raise ValueError("a mark means 1 or 0; true and false are words here")
        return columns

    @model_validator(mode="after")
    def _one_way(self) -> "TargetWords":
        if (self.column is None) != (self.words is None) or (self.words is None) == (self.columns is None):
            raise ValueError("give `column` and `words`, or `columns`")
        if self.columns is not None and self.list:
            raise ValueError("`list` is about the words of one column")
        return self


def _ranges_apart(words: Meanings) -> None:
    """Raises ValueError for a range that runs backwards, or numbers that mean both 1 and 0."""
    ranges = {word: span for word in words if (span := Range.of(word))}
    for word, span in ranges.items():
        if span.low > span.high:
            raise ValueError(f"the range {word!r} runs backwards")
        for other, value in words.items():
            both = span.meets(ranges[other]) if other in ranges else span.holds(number_of(other))
            if value != words[word] and both:
                raise ValueError(f"{word!r} and {other!r} share a number and mean different things")


class NumberColumn(Document):
    """A number of a study at this site, covariate or target: the column that holds it. A word in it is missing and listed."""

    column: str = Field(min_length=1, max_length=200, description="column of the label table that holds this number")
    times: float = Field(
        default=1.0,
        gt=0,
        le=1e9,
        description="what a number there is multiplied with to be in the study's unit: 10 for mg/dL where the study has mg/L",
    )


class AboutColumns(Document):
    """Columns that say who the person is. They group results; a word that MIDRC does not know is missing and listed."""

    age: str | None = Field(
        default=None, min_length=1, max_length=200, description="column with the age: 63, 063Y, 018M"
    )
    age_over_89: str | None = Field(
        default=None, min_length=1, max_length=200, description="column that says Yes where an age above 89 is withheld"
    )
    sex: str | None = Field(
        default=None, min_length=1, max_length=200, description="column with F, M, O, Female, Male or Other"
    )
    race: str | None = Field(
        default=None, min_length=1, max_length=200, description="column with MIDRC's words for race"
    )
    ethnicity: str | None = Field(
        default=None, min_length=1, max_length=200, description="column with MIDRC's words for ethnicity"
    )
    words: dict[str, str] = Field(
        default={},
        max_length=1000,
        description="your words for sex, race and ethnicity, and the word of MIDRC for each",
    )

    @field_validator("words")
    @classmethod
    def _of_midrc(cls, words: dict[str, str]) -> dict[str, str]:
        for word in words.values():
            if sex_of(word) is None and race_of(word) is None and ethnicity_of(word) is None:
                known = ", ".join(("F", "M", "O", *RACES, *ETHNICITIES))
                raise ValueError(f"{word!r} is no word of MIDRC; these are: {known}")
        return {normalised(word): meaning for word, meaning in words.items()}


class LabelMap(Document):
    """How to read this site's label table."""

    table: str = Field(
        min_length=1,
        max_length=4096,
        description="CSV, TSV, XLSX or JSON file, relative to the folder of site.yaml; a connector knows table, key and matches",
    )
    sheet: str | None = Field(
        default=None, min_length=1, max_length=100, description="XLSX only: the sheet, if several have the key column"
    )
    key: str = Field(min_length=1, max_length=200, description="column that names the image, the study or the patient")
    matches: Matches = Field(
        description="what the key is compared to; file: the path below the data folder (also for pictures); "
        "patient_id with pictures: the first folder of that path"
    )
    patient: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="column that names the patient; pictures matched by file need it",
    )
    strip_prefix: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="begin of patient numbers that stands in headers and not in the table, or the other way round",
    )
    view: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="pictures only: column with PA, AP, LL; without it all count as frontal",
    )
    about: AboutColumns | None = Field(
        default=None, description="columns with age, sex, race and ethnicity, for groups"
    )
    connector: Connector | None = Field(
        default=None, description="a known collection, in place of table, key and matches"
    )
    targets: dict[Name, TargetWords] = Field(default={}, max_length=32)
    numbers: dict[Name, NumberColumn] = Field(default={}, max_length=32)

    @model_validator(mode="after")
    def _says_something(self) -> "LabelMap":
        if not self.targets and not self.numbers and self.about is None:
            raise ValueError("name `targets` (words that mean 1 and 0) or `numbers`, or both")
        if both := sorted(set(self.targets) & set(self.numbers)):
            raise ValueError(f"{', '.join(both)}: stands below `targets` and below `numbers`; one of them is meant")
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_the_connector_says(cls, given: Any) -> Any:
        """Fill in what a connector knows; what is given all the same must not contradict it."""
        if not isinstance(given, dict) or given.get("connector") is None:
            return given
        try:
            form = Connector.model_validate(given["connector"]).collection.form()
        except ValidationError:
            # It is reported where it stands; nothing is said of lines that it makes superfluous.
            return {"table": "-", "key": "-", "matches": "file"} | given
        said = {name: value for name, value in form._asdict().items() if value is not None}
        for key in ("table", "sheet", "key", "matches", "patient", "view"):
            if given.get(key) is not None and given[key] != said.get(key):
                raise ValueError(f"the connector knows {key!r}; leave that line out")
        return said | {key: value for key, value in given.items() if value is not None}

    def files(self, root: Path) -> list[Path]:
        """Every file that the labels come from; `root` is the folder of site.yaml."""
        names = [self.table] if self.connector is None else self.connector.collection.files()
        return [root / name for name in names]

    def anchored(self, root: Path) -> "LabelMap":
        """The same map with files that do not depend on where site.yaml is."""
        if self.connector is None:
            return self.model_copy(update={"table": str((root / self.table).resolve())})
        connector = self.connector.anchored(root)
        return self.model_copy(update={"connector": connector, "table": connector.collection.form().table})

    def plain(self, key: str) -> str:
        """The form in which a key of the table, or of an image, is compared."""
        key = plain_key(key, self.matches)
        if self.matches == "patient_id":
            key = self.plain_patient(key)
        if self.connector is not None and self.connector.collection.BY_NAME:
            key = PurePosixPath(key).name
        return key

    def plain_patient(self, patient: str) -> str:
        """A patient's number without the prefix that only one of header and table has."""
        return patient.strip().removeprefix(self.strip_prefix or "")


@dataclass(slots=True)
class _Row:
    """What the table says about one key; a target, or a fact, that two rows tell differently stays missing."""

    labels: dict[str, Label]
    patient: str | None
    view: str | None
    age: Age | None
    sex: Sex | None
    race: Race | None
    ethnicity: Ethnicity | None
    numbers: dict[str, float | None]
    disputed: frozenset[str]  # targets and numbers
    doubtful: frozenset[str] = frozenset()  # facts


_FACTS = ("patient", "view", "age", "sex", "race", "ethnicity")


@dataclass(frozen=True)
class LabelTable:
    """A label table as mapped. Keys with contradicting rows are missing for that target and counted in `conflicts`."""

    mapping: LabelMap
    columns: list[str]
    rows: int
    unmapped: dict[str, Counter[str]]
    conflicts: int
    malformed: int
    without_key: int
    implausible_ages: int
    about_unmapped: dict[str, Counter[str]]
    _by_key: dict[str, _Row] = field(repr=False)

    @classmethod
    def open(cls, root: Path, mapping: LabelMap) -> "LabelTable":
        """Read the table that `mapping` names, or the files of its connector, below `root`. Raises LabelTableError."""
        if mapping.connector is None:
            return cls.read(root / mapping.table, mapping)
        return _Pass(mapping, mapping.connector.collection.read(root)).table()

    @classmethod
    def read(cls, path: Path, mapping: LabelMap) -> "LabelTable":
        """Read one file: CSV or TSV (UTF-8 or UTF-16 with BOM; comma, semicolon, tab or bar), XLSX, or JSON records.

        Raises LabelTableError, also for a connector, whose labels are in several files: `open` reads those.
        """
        if mapping.connector is not None:
            raise LabelTableError(f"{path.name}: labels of a connector are read from its folder, not from one file")
        return _Pass(mapping, Reading(open_table(path, mapping.key, mapping.sheet))).table()

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return self.mapping.plain(key) in self._by_key

    def keys(self) -> frozenset[str]:
        """Every key of the table in its normalised form (`LabelMap.plain`)."""
        return frozenset(self._by_key)

    def without_image(self, keys: Iterable[str]) -> int:
        """How many keys of the table are none of `keys`, those of the images."""
        return len(self._by_key.keys() - {self.mapping.plain(key) for key in keys})

    def lookup(self, key: str) -> dict[str, Label]:
        """1, 0 or None (missing) for each target; a key that is not in the table is missing throughout."""
        row = self._by_key.get(self.mapping.plain(key))
        return dict(row.labels) if row else dict.fromkeys(self.mapping.targets)

    def numbers(self, key: str) -> dict[str, float | None]:
        """Each number of `numbers` in the study's unit, or None where there is none or rows of one key tell different ones."""
        row = self._by_key.get(self.mapping.plain(key))
        return dict(row.numbers) if row else dict.fromkeys(self.mapping.numbers)

    def patient_of(self, key: str) -> str | None:
        """The patient named in the row of `key`; None if there is none, or if rows of one key name several."""
        row = self._by_key.get(self.mapping.plain(key))
        return row.patient if row else None

    def view_of(self, key: str) -> str | None:
        """The word in the view column, as it stands there; None if empty or disputed."""
        row = self._by_key.get(self.mapping.plain(key))
        return row.view if row else None

    def about(self, key: str) -> About:
        """Who the person behind `key` is, by the columns of `about`; what rows tell differently is missing."""
        row = self._by_key.get(self.mapping.plain(key))
        if row is None:
            return About()
        years, over_89, age_bin = (row.age.years, row.age.over_89, row.age.bin) if row.age else (None, False, None)
        return About(years, over_89, age_bin, row.sex, row.race, row.ethnicity)


def plain_key(key: str, matches: Matches) -> str:
    """The form in which keys are compared: blanks off; for files also one kind of slash and no leading "./"."""
    key = key.strip()
    if matches != "file" or not key:
        return key
    return str(PurePosixPath(key.replace("\\", "/")))


def _note(listed: Counter[str], plain: str) -> None:
    """Count a word that is not understood, among the first hundred of its column."""
    if plain in listed or len(listed) < WORDS_LISTED_MAX:
        listed[plain] += 1


class _Target:
    """One target bound to the columns of one table; keeps the words that it could not read."""

    def __init__(self, words: TargetWords, reading: Reading) -> None:
        table = reading.table
        self.unmapped: Counter[str] = Counter()
        self.marks = [(table.at(column), value) for column, value in (words.columns or {}).items()]
        self.at = None if words.column is None else table.at(words.column)
        column = "" if self.at is None else table.columns[self.at]
        self.list = words.list or column in reading.lists
        self.words = dict(words.words or {})
        self.ranges = [(span, value) for word, value in self.words.items() if (span := Range.of(word))]
        if column in reading.absent:
            self.words.setdefault(reading.absent[column], 0)

    def label(self, cells: list[str]) -> tuple[Label, bool]:
        """The label of one row, and whether the row contradicts itself."""
        if self.marks:
            return self._marked(cells)
        text = cell_at(cells, self.at)
        if not self.list:
            return self._meaning(text), False
        found = [self._meaning(word) for word in list_words(text)]
        return (1 if 1 in found else 0 if found and None not in found else None), False

    def _marked(self, cells: list[str]) -> tuple[Label, bool]:
        said: set[Literal[0, 1]] = set()
        readable = True
        for at, value in self.marks:
            plain = normalised(cell_at(cells, at))
            if plain in ("1", "true"):
                said.add(value)
            elif plain not in ("0", "false") and plain not in MISSING_WORDS:
                _note(self.unmapped, plain)
                readable = False  # it may be a mark that contradicts the others
        if len(said) == 1 and readable:
            return said.pop(), False
        return None, len(said) > 1

    def _meaning(self, text: str) -> Label:
        plain = normalised(text)
        if plain in self.words:
            return self.words[plain]
        number = number_of(text) if self.ranges else None
        for span, value in self.ranges:
            if span.holds(number):
                return value
        if plain not in MISSING_WORDS:
            _note(self.unmapped, plain)
        return None


class _Number:
    """One number bound to its column of one table; keeps the words that are no numbers."""

    def __init__(self, where: NumberColumn, table: Table) -> None:
        self.unmapped: Counter[str] = Counter()
        self.at, self.times = table.at(where.column), where.times

    def value(self, cells: list[str]) -> float | None:
        text = cell_at(cells, self.at)
        found, plain = number_of(text), normalised(text)
        if found is None and plain not in MISSING_WORDS:
            _note(self.unmapped, plain)
        return None if found is None else found * self.times


class _Person:
    """The columns of `about`, bound to one table; keeps the words that it could not read."""

    def __init__(self, columns: AboutColumns, table: Table) -> None:
        self.words = columns.words
        self.unmapped: dict[str, Counter[str]] = {name: Counter() for name in ("age", "sex", "race", "ethnicity")}
        self.implausible = 0
        names = {name: getattr(columns, name) for name in (*self.unmapped, "age_over_89")}
        self.at = {name: None if column is None else table.at(column) for name, column in names.items()}

    def age(self, cells: list[str]) -> Age | None:
        text = cell_at(cells, self.at["age"])
        found = age_of(text, cell_at(cells, self.at["age_over_89"]))
        if found is None and not says_nothing(text):
            _note(self.unmapped["age"], normalised(text))
        if found is not None and not found.plausible:
            self.implausible += 1
            return None
        return found

    def word(self, name: str, cells: list[str]) -> str:
        """The cell of `name`, in the words of MIDRC where site.yaml translates it; listed if it is none of these."""
        if not (text := cell_at(cells, self.at[name])):
            return ""
        meant = self.words.get(normalised(text), text)
        known = {"sex": sex_of, "race": race_of, "ethnicity": ethnicity_of}[name](meant)
        if known is None and not says_nothing(text):
            _note(self.unmapped[name], normalised(text))
        return meant


class _Pass:
    """One pass over one table; holds what the pass has found so far."""

    def __init__(self, mapping: LabelMap, reading: Reading) -> None:
        self.mapping, self.reading = mapping, reading
        table = reading.table
        self.key = table.at(mapping.key)
        self.patient = None if mapping.patient is None else table.at(mapping.patient)
        self.view = None if mapping.view is None else table.at(mapping.view)
        self.targets = {name: _Target(words, reading) for name, words in mapping.targets.items()}
        self.numbers = {name: _Number(where, table) for name, where in mapping.numbers.items()}
        self.person = None if mapping.about is None else _Person(mapping.about, table)
        self.by_key: dict[str, _Row] = {}
        self.rows = self.malformed = self.without_key = 0

    def table(self) -> LabelTable:
        table, tally = self.reading.table, self.reading.tally
        for _, cells in table.rows:
            self._take(cells)
        if self.rows + tally.malformed == 0:
            raise LabelTableError(f"{table.name}: the table has columns and no rows")
        return LabelTable(
            mapping=self.mapping,
            columns=table.columns,
            rows=self.rows + tally.malformed,
            unmapped={name: target.unmapped for name, target in self.targets.items()}
            | {name: number.unmapped for name, number in self.numbers.items()},
            conflicts=sum(bool(row.disputed) for row in self.by_key.values()) + tally.undecided,
            malformed=self.malformed + tally.malformed,
            without_key=self.without_key + tally.without_key,
            implausible_ages=self.person.implausible if self.person else 0,
            about_unmapped=self.person.unmapped if self.person else {},
            _by_key=self.by_key,
        )

    def _take(self, cells: list[str]) -> None:
        self.rows += 1
        if self.reading.table.shifted(cells):
            self.malformed += 1
            return
        key = self.mapping.plain(cell_at(cells, self.key))
        if not key or self._rounded(key):
            self.without_key += 1
            return
        found = self._row(cells)
        if key in self.by_key:
            _merge(self.by_key[key], found)
        else:
            self.by_key[key] = found

    def _row(self, cells: list[str]) -> _Row:
        said = {name: target.label(cells) for name, target in self.targets.items()}
        person = self.person
        return _Row(
            labels={name: label for name, (label, _) in said.items()},
            patient=self.mapping.plain_patient(cell_at(cells, self.patient)) or None,
            view=cell_at(cells, self.view) or None,
            age=person.age(cells) if person else None,
            sex=sex_of(person.word("sex", cells)) if person else None,
            race=race_of(person.word("race", cells)) if person else None,
            ethnicity=ethnicity_of(person.word("ethnicity", cells)) if person else None,
            numbers={name: number.value(cells) for name, number in self.numbers.items()},
            disputed=frozenset(name for name, (_, contradicts) in said.items() if contradicts),
        )

    def _rounded(self, key: str) -> bool:
        """Whether a spreadsheet wrote a long number as 1.23457E+15: half of it is lost, and the rest is another study's."""
        return self.mapping.matches != "file" and bool(re.fullmatch(r"\d(?:[.,]\d+)?[Ee]\+\d+", key, re.ASCII))


def _merge(row: _Row, other: _Row) -> None:
    """Fold a second row of the same key into `row`: agreement and gaps are fine, contradiction is missing for ever."""
    row.disputed |= other.disputed
    row.disputed |= _fold(row.labels, other.labels, row.disputed) | _fold(row.numbers, other.numbers, row.disputed)
    for what in _FACTS:
        mine, theirs = getattr(row, what), getattr(other, what)
        if None not in (mine, theirs) and mine != theirs:
            row.doubtful |= {what}
        setattr(row, what, None if what in row.doubtful else theirs if mine is None else mine)


def _fold(mine: dict[str, Any], theirs: Mapping[str, Any], disputed: frozenset[str]) -> frozenset[str]:
    """Fold `theirs` into `mine`; the names that the two tell differently. Those and the `disputed` ones are missing."""
    against = {name for name, value in theirs.items() if None not in (value, mine[name]) and mine[name] != value}
    for name, value in theirs.items():
        mine[name] = None if name in against | disputed else value if mine[name] is None else mine[name]
    return frozenset(against)
