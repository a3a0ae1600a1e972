"""Label tables of a site, read as mapped in site.yaml: every label is 1, 0 or missing, and nothing is negative by default.

A `LabelMap` says which column names the image, which column holds each target and which words mean 1 and 0. A `LabelTable`
is the CSV or TSV file read that way. Hospitals write the same finding as "PNEUMONIA ", "pneumonia", "1" or "1.0", leave
cells empty or write "Not Reported"; words are therefore compared casefolded, with blanks normalised and whole numbers in
one spelling, and whatever is not in the map is missing and listed, never guessed.
"""

import csv
import difflib
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator

from models.study import Document, Name
from privacy.errors import LabelTableError

TABLE_BYTES_MAX = 128 * 1024 * 1024  # about a million rows; a larger file is not a label table of one hospital
COLUMNS_MAX = 4096  # wide exports of registries have hundreds of columns
WORDS_LISTED_MAX = 100  # unmapped words kept per target, so that free text in a column does not fill the memory
DELIMITERS = (",", ";", "\t", "|")

MISSING_WORDS = frozenset(
    (
        *(
            "",
            "-",
            "--",
            ".",
            "?",
            "n/a",
            "n.a.",
            "na",
            "nan",
            "nil",
            "null",
            "<na>",
            "#n/a",
            "missing",
            "unknown",
            "unk",
        ),
        *("not reported", "not available", "not applicable", "not assessed", "not done", "not evaluated", "not known"),
    )
)
"""Words that say nothing. They are missing without being listed, and a map that gives them a meaning is refused."""

Label = Literal[0, 1] | None
Matches = Literal["study_uid", "series_uid", "sop_uid", "accession", "patient_id", "file"]


def normalised(word: str) -> str:
    """One spelling per word: casefolded, blanks collapsed, and whole numbers without sign of their export ("1.0" is "1")."""
    folded = " ".join(word.replace("\u00a0", " ").casefold().split())
    number = re.fullmatch(r"([+-]?\d{1,15})(?:[.,]0*)?", folded)
    return number.group(1).removeprefix("+") if number else folded


class TargetWords(Document):
    """One target of a study at this site: the column that holds it and the words that mean 1 and 0 there."""

    column: str = Field(min_length=1, max_length=200, description="column of the label table that holds this target")
    words: dict[str, Literal[0, 1]] = Field(
        min_length=1,
        max_length=1000,
        description="what each word of that column means: 1, 0; all other words are missing",
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
    def _one_meaning(cls, words: dict[str, Literal[0, 1]]) -> dict[str, Literal[0, 1]]:
        found: dict[str, Literal[0, 1]] = {}
        for word, value in words.items():
            plain = normalised(word)
            if plain in MISSING_WORDS:
                raise ValueError(f"the word {word!r} means missing and can be neither 1 nor 0")
            if found.setdefault(plain, value) != value:
                raise ValueError(f"the word {word!r} is mapped to both 1 and 0 (case and blanks make no difference)")
        return found


class LabelMap(Document):
    """How to read this site's label table."""

    table: str = Field(
        min_length=1, max_length=4096, description="CSV or TSV file, relative to the folder of site.yaml"
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
    view: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="pictures only: column with PA, AP, LL; without it all count as frontal",
    )
    targets: dict[Name, TargetWords] = Field(min_length=1, max_length=32)


@dataclass
class _Row:
    """What the table says about one key; a target set by two rows that disagree stays missing."""

    labels: dict[str, Label]
    patient: str | None
    view: str | None
    disputed: set[str] = field(default_factory=set)


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
    _by_key: dict[str, _Row] = field(repr=False)

    @classmethod
    def read(cls, path: Path, mapping: LabelMap) -> "LabelTable":
        """Read a CSV or TSV file (UTF-8 or UTF-16 with BOM; comma, semicolon, tab or bar). Raises LabelTableError."""
        return _Reading(path, mapping).table()

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return self._plain(key) in self._by_key

    def keys(self) -> frozenset[str]:
        """Every key of the table in its normalised form."""
        return frozenset(self._by_key)

    def lookup(self, key: str) -> dict[str, Label]:
        """1, 0 or None (missing) for each target; a key that is not in the table is missing throughout."""
        row = self._by_key.get(self._plain(key))
        return dict(row.labels) if row else dict.fromkeys(self.mapping.targets)

    def patient_of(self, key: str) -> str | None:
        """The patient named in the row of `key`; None if there is none, or if rows of one key name several."""
        row = self._by_key.get(self._plain(key))
        return row.patient if row and "patient" not in row.disputed else None

    def view_of(self, key: str) -> str | None:
        """The word in the view column, as it stands there; None if empty or disputed."""
        row = self._by_key.get(self._plain(key))
        return row.view if row and "view" not in row.disputed else None

    def _plain(self, key: str) -> str:
        return plain_key(key, self.mapping.matches)


def plain_key(key: str, matches: Matches) -> str:
    """The form in which keys are compared: blanks off; for files also one kind of slash and no leading "./"."""
    key = key.strip()
    if matches != "file" or not key:
        return key
    return str(PurePosixPath(key.replace("\\", "/")))


class _Reading:
    """One pass over one file; holds what the pass has found so far."""

    def __init__(self, path: Path, mapping: LabelMap) -> None:
        self.path, self.mapping = path, mapping
        self.by_key: dict[str, _Row] = {}
        self.unmapped: dict[str, Counter[str]] = {name: Counter() for name in mapping.targets}
        self.rows = self.malformed = self.without_key = 0

    def table(self) -> LabelTable:
        text = _text_of(self.path)
        delimiter, columns = self._header(text)
        at = self._positions(columns)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            for number, cells in enumerate(reader):
                if number > 0:
                    self._take(cells, at, len(columns))
        except csv.Error as error:
            raise LabelTableError(f"{self.path.name}, line {reader.line_num}: {error}") from None
        if self.rows == 0:
            raise LabelTableError(f"{self.path.name}: the table has columns and no rows")
        conflicts = sum(bool(row.disputed & set(self.mapping.targets)) for row in self.by_key.values())
        return LabelTable(
            self.mapping, columns, self.rows, self.unmapped, conflicts, self.malformed, self.without_key, self.by_key
        )

    def _header(self, text: str) -> tuple[str, list[str]]:
        """The delimiter under which the key column is found, else the one that gives most columns; and the columns."""
        candidates: list[tuple[bool, int, str, list[str]]] = []
        for delimiter in DELIMITERS:
            try:
                first = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
            except csv.Error:
                continue
            columns = [cell.strip() for cell in first]
            candidates.append((self.mapping.key in columns, len(columns), delimiter, columns))
        best = max(candidates, key=lambda c: c[:2], default=None)
        if best is None or not any(best[3]):
            raise LabelTableError(f"{self.path.name}: the first line holds no column names")
        if best[1] > COLUMNS_MAX:
            raise LabelTableError(f"{self.path.name}: more than {COLUMNS_MAX} columns; this is not a label table")
        return best[2], best[3]

    def _positions(self, columns: list[str]) -> dict[str, int]:
        """Where each mapped column stands. Raises LabelTableError that names the nearest column and those found."""
        mapping = self.mapping
        wanted = [mapping.key, mapping.patient, mapping.view, *(t.column for t in mapping.targets.values())]
        at: dict[str, int] = {}
        for name in wanted:
            if name is None:
                continue
            column = name.strip()
            if columns.count(column) > 1:
                raise LabelTableError(
                    f"{self.path.name}: the column {column!r} stands twice; which one is meant is unclear"
                )
            if column not in columns:
                near = difflib.get_close_matches(column.casefold(), [c.casefold() for c in columns], n=1, cutoff=0.5)
                nearest = next((c for c in columns if near and c.casefold() == near[0]), None)
                hint = f"; did you mean {nearest!r}?" if nearest else ""
                shown = ", ".join(repr(c[:60]) for c in columns[:30]) + (", …" if len(columns) > 30 else "")
                raise LabelTableError(f"{self.path.name}: there is no column {column!r}{hint} Columns found: {shown}")
            at[name] = columns.index(column)
        return at

    def _take(self, cells: list[str], at: dict[str, int], width: int) -> None:
        if not any(cell.strip() for cell in cells):
            return
        self.rows += 1
        # More cells than columns means an unquoted delimiter: everything after it is shifted, so no cell can be trusted.
        if any(cell.strip() for cell in cells[width:]):
            self.malformed += 1
            return

        def cell(column: str | None) -> str | None:
            if column is None or at[column] >= len(cells):
                return None
            return cells[at[column]].strip() or None

        mapping = self.mapping
        key = plain_key(cell(mapping.key) or "", mapping.matches)
        if not key:
            self.without_key += 1
            return
        labels = {name: self._label(name, words, cell(words.column)) for name, words in mapping.targets.items()}
        found = _Row(labels, cell(mapping.patient), cell(mapping.view))
        if key in self.by_key:
            _merge(self.by_key[key], found)
        else:
            self.by_key[key] = found

    def _label(self, target: str, words: TargetWords, cell: str | None) -> Label:
        plain = normalised(cell or "")
        if plain in words.words:
            return words.words[plain]
        listed = self.unmapped[target]
        if plain not in MISSING_WORDS and (plain in listed or len(listed) < WORDS_LISTED_MAX):
            listed[plain] += 1
        return None


def _merge(row: _Row, other: _Row) -> None:
    """Fold a second row of the same key into `row`: agreement and gaps are fine, contradiction is missing for ever."""
    for target, label in other.labels.items():
        if target in row.disputed or label is None:
            continue
        if row.labels[target] is None:
            row.labels[target] = label
        elif row.labels[target] != label:
            row.labels[target] = None
            row.disputed.add(target)
    for what in ("patient", "view"):
        mine, theirs = getattr(row, what), getattr(other, what)
        if mine is None:
            setattr(row, what, theirs)
        elif theirs is not None and theirs != mine:
            row.disputed.add(what)


def _text_of(path: Path) -> str:
    """The text of a table; UTF-8, or UTF-16 when it says so itself (spreadsheets export both). Raises LabelTableError."""
    if not path.is_file():
        raise LabelTableError(f"{path}: there is no such label table")
    try:
        if path.stat().st_size > TABLE_BYTES_MAX:
            raise LabelTableError(f"{path.name}: larger than {TABLE_BYTES_MAX // 2**20} MiB; this is not a label table")
        data = path.read_bytes()
    except OSError as error:
        raise LabelTableError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise LabelTableError(f"{path.name}: the file is empty")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise LabelTableError(
            f"{path.name}, line {line}: not UTF-8 text", remedy="Save the table again as CSV with encoding UTF-8."
        ) from None
    if "\0" in text:
        raise LabelTableError(
            f"{path.name}: this is a binary file, not CSV or TSV", remedy="Export the spreadsheet as CSV (UTF-8)."
        )
    return text
