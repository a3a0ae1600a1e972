"""A table is rows of text within fixed bounds, whatever file it came in: CSV, TSV, an XLSX sheet, or a JSON list of records.

A label table is a file that somebody at a hospital made or downloaded, so nothing here trusts it. Bytes, rows, columns and
cells are counted while they are read; a workbook is unpacked once for counting before any XML is parsed; and whatever is wrong
is a LabelTableError that names the file, the line and what to do. The kind of file follows its name, never its content.
"""

import codecs
import csv
import difflib
import io
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from privacy.errors import LabelTableError

TABLE_BYTES_MAX = 128 * 1024 * 1024  # about a million rows; a larger file is not a label table of one hospital
COLUMNS_MAX = 4096  # wide exports of registries have hundreds of columns
ROWS_MAX = 2_000_000  # twice what a spreadsheet holds
ROW_CHARS_MAX = 4 * 1024 * 1024  # of one row of CSV: all columns, each with a long report
CELLS_MAX = 50_000_000  # of one sheet, empty ones included: cells that no row needs cost time all the same
JSON_BYTES_MAX = 64 * 1024 * 1024  # RICORD's annotations are 2.4 MB
JSON_VALUES_MAX = 5_000_000  # brackets, braces and commas: what decides the memory that parsing takes
XLSX_BYTES_MAX = 256 * 1024 * 1024  # unpacked, all parts together
XLSX_TAGS_MAX = 24_000_000  # three million cells; each XML element is an object in memory
XLSX_PARTS_MAX = 10_000  # a workbook has some ten parts, and one more for each sheet and picture
XLSX_DIGITS = 15  # that a spreadsheet keeps of a number; the rest of a longer one is lost
DELIMITERS = (",", ";", "\t", "|")
WORD_CHARS_USUAL = 100  # a longer cell is prose, and no two are the same
_CHUNK = 1024 * 1024  # bytes unpacked at a time
_ROWS_AT_ONCE = 256  # rows of a sheet asked for in one guarded step
_WHOLE = re.compile(r"([+-]?\d{1,15})(?:[.,]0*)?")

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


def normalised(word: str) -> str:
    """One spelling per word: casefolded, blanks collapsed, and whole numbers without sign of their export ("1.0" is "1")."""
    return _spelled(word) if len(word) <= WORD_CHARS_USUAL else _spelled.__wrapped__(word)


@lru_cache(maxsize=4096)  # columns of a million cells hold a dozen words; the bounds keep it below a megabyte
def _spelled(word: str) -> str:
    folded = " ".join(word.replace("\u00a0", " ").casefold().split())
    number = _WHOLE.fullmatch(folded)
    return number.group(1).removeprefix("+") if number else folded


def number_of(cell: str) -> float | None:
    """The number that a cell writes, with point or comma; None if it is no number, or "1,234", which can be two."""
    found = re.fullmatch(r"([+-]?\d{1,15})(?:([.,])(\d{0,15}))?", cell.strip(), re.ASCII)
    if found is None or (found.group(2) == "," and len(found.group(3)) == 3):
        return None
    return float(f"{found.group(1)}.{found.group(3) or 0}")


def list_words(cell: str) -> list[str]:
    """The words of a list cell: "['CR', 'DX']", '["CR"]', "a|b" or "a, b"; empty ones are left out."""
    text = cell.strip()
    if text.startswith("[") and text.endswith("]"):
        # Read as words, not evaluated as Python or JSON: a cell is no program, and neither reader takes all that is found.
        found = re.findall(r"""'([^']*)'|"([^"]*)"|([^\s,'"][^,'"]*)""", text[1:-1])
        words = ["".join(parts) for parts in found]
    else:
        words = text.split("|" if "|" in text else ",")
    return [word.strip() for word in words if word.strip()]


@dataclass(frozen=True)
class Table:
    """Column names, and the rows below them as (line or row number, cells). Rows are read once; blank ones are left out.

    A row may have fewer cells than there are columns, or more: only who reads the table knows what that means.
    """

    name: str
    columns: list[str]
    rows: Iterator[tuple[int, list[str]]]

    def at(self, column: str) -> int:
        """Where a column stands; case and blanks make no difference if one column fits. Raises LabelTableError."""
        places = matching(self.columns, column)
        if len(places) > 1:
            raise LabelTableError(f"{self.name}: the column {column!r} stands twice; which one is meant is unclear")
        if not places:
            shown = ", ".join(repr(c[:60]) for c in self.columns[:30]) + (", …" if len(self.columns) > 30 else "")
            raise LabelTableError(
                f"{self.name}: there is no column {column!r}{nearest(column, self.columns)} Columns found: {shown}"
            )
        return places[0]

    def has(self, column: str) -> bool:
        return bool(matching(self.columns, column))

    def shifted(self, cells: list[str]) -> bool:
        """Whether a row has more cells than there are columns: an unquoted delimiter moved all behind it, so none is trusted."""
        return any(cell.strip() for cell in cells[len(self.columns) :])


def cell_at(cells: list[str], place: int | None) -> str:
    """The cell at a place without outer blanks; "" if there is no such column, or if the row is too short for it."""
    return cells[place].strip() if place is not None and place < len(cells) else ""


def matching(names: Sequence[str], wanted: str) -> list[int]:
    """Places of `wanted` among `names`: written exactly so if any is, else without regard to case and blanks."""
    exact = [place for place, name in enumerate(names) if name == wanted.strip()]
    folded = " ".join(wanted.casefold().split())
    return exact or [place for place, name in enumerate(names) if " ".join(name.casefold().split()) == folded]


def nearest(wanted: str, names: Sequence[str]) -> str:
    """ "; did you mean 'x'?" for the name most like `wanted`, and nothing if none is."""
    near = difflib.get_close_matches(wanted.casefold()[:200], [n.casefold()[:200] for n in names], n=1, cutoff=0.5)
    found = next((name for name in names if near and name.casefold()[:200] == near[0]), None)
    return f"; did you mean {found!r}?" if found else ""


def open_table(path: Path, wanted: str = "", sheet: str | None = None) -> Table:
    """Open a table: .xlsx and .xlsm as a workbook, .json as a list of records, anything else as CSV or TSV.

    `wanted` is a column that has to be there; it decides between delimiters, and between sheets where none is named. Raises
    LabelTableError, also while rows are read.
    """
    suffix = path.suffix.lower()
    if sheet is not None and suffix not in (".xlsx", ".xlsm"):
        raise LabelTableError(f"{path.name}: only a workbook (.xlsx) has a sheet {sheet!r}")
    if suffix in (".xlsx", ".xlsm"):
        return _xlsx_table(path, wanted, sheet)
    if suffix == ".json":
        return _json_table(path)
    return _text_table(path, wanted)


def bytes_of(path: Path, most: int | None = None) -> bytes:
    """The bytes of a file that is not too large for a label table. Raises LabelTableError."""
    most = TABLE_BYTES_MAX if most is None else most
    try:
        if not path.is_file():
            raise LabelTableError(f"{path}: there is no such label table")
        with path.open("rb") as file:
            # Not simply `most`, for which memory would be taken at once, however small the file is.
            data = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    except OSError as error:
        raise LabelTableError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise LabelTableError(f"{path.name}: larger than {most // 2**20} MiB; this is not a label table")
    if not data.strip():
        raise LabelTableError(f"{path.name}: the file is empty")
    return data


# --- CSV and TSV


class _Lines:
    """Lines of a text file for csv.reader, which itself would gather a row of any length before it says a word."""

    def __init__(self, name: str, data: bytes, encoding: str) -> None:
        self.name = name
        self.stream = io.TextIOWrapper(io.BytesIO(data), encoding=encoding, newline="")
        self.chars = 0  # read since the last whole row

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.stream.readline(ROW_CHARS_MAX + 1)
        self.chars += len(line)
        if not line:
            raise StopIteration
        if self.chars > ROW_CHARS_MAX:
            raise LabelTableError(
                f"{self.name}: a row of more than {ROW_CHARS_MAX} characters; is a quotation mark open?"
            )
        if "\0" in line:
            raise _binary(self.name)
        return line


def _binary(name: str) -> LabelTableError:
    return LabelTableError(
        f"{name}: this is a binary file, not CSV or TSV",
        remedy="Export the spreadsheet as CSV (UTF-8), or as .xlsx under a name that ends so.",
    )


def _text_table(path: Path, wanted: str) -> Table:
    data = bytes_of(path)
    utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if not utf16 and b"\0" in data:
        raise _binary(path.name)
    encoding = "utf-16" if utf16 else "utf-8-sig"
    delimiter, columns = _header(path.name, data, encoding, wanted)
    return Table(path.name, columns, _text_rows(path.name, data, encoding, delimiter))


def _header(name: str, data: bytes, encoding: str, wanted: str) -> tuple[str, list[str]]:
    """The delimiter under which the wanted column is found, else the one that gives most columns; and the columns."""
    candidates: list[tuple[bool, int, str, list[str]]] = []
    for delimiter in DELIMITERS:
        try:
            first = next(csv.reader(_Lines(name, data, encoding), delimiter=delimiter, strict=True), [])
        except UnicodeDecodeError:
            raise _not_text(name, data, encoding) from None
        except csv.Error:
            continue
        columns = [cell.strip() for cell in first]
        candidates.append((bool(matching(columns, wanted)), len(columns), delimiter, columns))
    best = max(candidates, key=lambda c: c[:2], default=None)
    if best is None:
        raise LabelTableError(f"{name}: the first line holds no column names")
    return best[2], checked_columns(name, best[3])


def checked_columns(name: str, columns: list[str]) -> list[str]:
    """`columns` if they can be those of a label table. Raises LabelTableError."""
    if not any(columns):
        raise LabelTableError(f"{name}: the first line holds no column names")
    if len(columns) > COLUMNS_MAX:
        raise LabelTableError(f"{name}: more than {COLUMNS_MAX} columns; this is not a label table")
    return columns


def _text_rows(name: str, data: bytes, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    lines = _Lines(name, data, encoding)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for count, cells in enumerate(reader):
            lines.chars = 0
            within_rows(name, count)
            if count > 0 and any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except UnicodeDecodeError:
        raise _not_text(name, data, encoding) from None
    except csv.Error as error:
        raise LabelTableError(f"{name}, line {reader.line_num}: {error}") from None


def within_rows(name: str, count: int) -> None:
    """Raises LabelTableError if a table has more rows than any table of labels."""
    if count > ROWS_MAX:
        raise LabelTableError(f"{name}: more than {ROWS_MAX} rows; this is not a label table of one hospital")


def _not_text(name: str, data: bytes, encoding: str) -> LabelTableError:
    """What to say of bytes that are no text: a stream knows only its own buffer, so the line is found here."""
    line = 1
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
    kind = "UTF-8" if encoding == "utf-8-sig" else "UTF-16"
    return LabelTableError(
        f"{name}, line {line}: not {kind} text", remedy="Save the table again as CSV with encoding UTF-8."
    )


# --- JSON


def read_json(path: Path) -> Any:
    """The value in a JSON file of bounded size and number of values. Raises LabelTableError."""
    data = bytes_of(path, JSON_BYTES_MAX)
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > JSON_VALUES_MAX:
        raise LabelTableError(f"{path.name}: more than {JSON_VALUES_MAX} values; this is not a label table")
    try:
        return json.loads(data)
    except RecursionError:
        raise LabelTableError(f"{path.name}: lists within lists without end; this is not a label table") from None
    except json.JSONDecodeError as error:
        raise LabelTableError(f"{path.name}, line {error.lineno}: not JSON ({error.msg})") from None
    except ValueError:  # not UTF-8, or a number of more digits than Python reads
        raise LabelTableError(f"{path.name}: not JSON in UTF-8, or a number of thousands of digits") from None


def _json_table(path: Path) -> Table:
    records = read_json(path)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise LabelTableError(
            f"{path.name}: not a list of records ([{{…}}, {{…}}])",
            remedy="Annotations of MD.ai are read with `connector: {ricord: …}`; save anything else as CSV.",
        )
    columns: dict[str, None] = {}
    for record in records:
        columns.update(dict.fromkeys(record))
        if len(columns) > COLUMNS_MAX:
            break
    names = checked_columns(path.name, list(columns))
    return Table(path.name, [as_text(name).strip() for name in names], _json_rows(path.name, names, records))


def _json_rows(name: str, columns: list[str], records: list[dict[str, Any]]) -> Iterator[tuple[int, list[str]]]:
    for count, record in enumerate(records, start=1):
        within_rows(name, count)
        if len(columns) * count > CELLS_MAX:
            raise LabelTableError(f"{name}: more than {CELLS_MAX} cells; this is not a label table")
        cells = [as_text(record.get(column)) for column in columns]
        if any(cell.strip() for cell in cells):
            yield count, cells


def as_text(value: Any) -> str:
    """How a CSV file would write a value of JSON or of a workbook; "" for what no cell of a label table holds."""
    if value is None or isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**XLSX_DIGITS:
        return str(int(value))
    if isinstance(value, date):  # a datetime is one too; spreadsheets know no other kind of date
        return value.isoformat().removesuffix("T00:00:00")
    if isinstance(value, list):
        words = [as_text(inside).replace('"', "'") for inside in value if not isinstance(inside, list)]
        return "[" + ", ".join(f'"{word}"' for word in words) + "]"
    # JSON can write half of a surrogate pair, which no file, hash or screen takes.
    return str(value).encode(errors="replace").decode()


# --- XLSX


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Whatever a library raises over a damaged workbook becomes a LabelTableError that names the kind of error only:
    its text, and what the library warns of, can hold the content of cells.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LabelTableError:
        raise
    except Exception as error:  # openpyxl's contract names none: it raises what it stumbles over
        raise LabelTableError(
            f"{name}: not a workbook that can be read ({type(error).__name__})",
            remedy="Open it, save it again as .xlsx without a password, or export the sheet as CSV (UTF-8).",
        ) from None


def _xlsx_table(path: Path, wanted: str, sheet: str | None) -> Table:
    """One sheet of a workbook. Values only: what a formula gave when it was last calculated, and missing if it never was."""
    data = bytes_of(path)
    with _guarded(path.name):
        _weigh(path.name, data)
        from openpyxl import load_workbook  # type: ignore[import-untyped]  # it ships none

        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
        sheets = {str(found.title): found for found in book.worksheets}
    for found in sheets.values():
        found.reset_dimensions()  # what a sheet says of its own size need not be true, and rows would be padded to it
    chosen = _sheet_named(path.name, list(sheets), sheet) if sheet else _sheet_with(path.name, sheets, wanted)
    name = f"{path.name}, sheet {chosen!r}"
    rows = _sheet_rows(name, sheets[chosen])
    return Table(name, checked_columns(name, [cell.strip() for cell in next(rows, (0, []))[1]]), _filled(rows))


def _weigh(name: str, data: bytes) -> None:
    """Unpack every part of a workbook once, counting, so that nothing later meets more than was counted. Raises whatever."""
    if data[:4] != b"PK\x03\x04":
        raise LabelTableError(
            f"{name}: not an XLSX workbook; an old .xls, or one with a password",
            remedy="Open it and save it as .xlsx without a password, or export the sheet as CSV (UTF-8).",
        )
    if data.count(b"PK\x01\x02") > XLSX_PARTS_MAX:
        raise LabelTableError(f"{name}: more than {XLSX_PARTS_MAX} parts; this is not a label table")
    size = tags = 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for part in archive.infolist():
            if part.flag_bits & 1 or part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise LabelTableError(f"{name}: packed in an unusual way, or with a password")
            before = b""
            with archive.open(part) as stream:
                while chunk := stream.read(_CHUNK):
                    size, tags = size + len(chunk), tags + chunk.count(b"<")
                    if size > XLSX_BYTES_MAX or tags > XLSX_TAGS_MAX:
                        raise LabelTableError(f"{name}: unpacks to more than any label table holds")
                    _no_declarations(name, before + chunk, not before)
                    before = chunk[-64:]


def _no_declarations(name: str, xml: bytes, begins: bool) -> None:
    """Entities make XML bombs and workbooks have none; an unusual encoding would hide them from this very search."""
    plain = xml.replace(b"\0", b"")  # UTF-16 as well
    encoding = re.search(rb"""<\?xml[^>]*encoding\s*=\s*["']([^"']*)""", plain[:400]) if begins else None
    known = encoding is None or encoding.group(1).lower() in (b"utf-8", b"utf-16", b"us-ascii", b"iso-8859-1")
    if b"<!DOCTYPE" in plain or b"<!ENTITY" in plain or not known:
        raise LabelTableError(f"{name}: its XML declares entities or an unusual encoding, which no spreadsheet does")


def _sheet_named(name: str, sheets: list[str], wanted: str) -> str:
    places = matching(sheets, wanted)
    if len(places) != 1:
        shown = ", ".join(repr(title) for title in sheets[:20])
        raise LabelTableError(f"{name}: there is no sheet {wanted!r}{nearest(wanted, sheets)} Sheets found: {shown}")
    return sheets[places[0]]


def _sheet_with(name: str, sheets: dict[str, Any], wanted: str) -> str:
    """The only sheet, or the only one with the wanted column. Raises LabelTableError: which one is meant is not guessed."""
    fitting = list(sheets)
    if len(sheets) > 1:
        firsts = {title: next(_sheet_rows(name, sheet), (0, []))[1] for title, sheet in sheets.items()}
        fitting = [title for title, cells in firsts.items() if matching([cell.strip() for cell in cells], wanted)]
    if len(fitting) != 1:
        shown = ", ".join(repr(title) for title in list(sheets)[:20])
        which = "no sheet has" if not fitting else "several sheets have"
        raise LabelTableError(
            f"{name}: {which} a column {wanted!r}. Sheets found: {shown}",
            remedy="Name the sheet in site.yaml: `sheet` next to `table`.",
        )
    return fitting[0]


def _sheet_rows(name: str, sheet: Any) -> Iterator[tuple[int, list[str]]]:
    """Every row of a sheet, blank ones included, as text and without the empty cells at its end."""
    with _guarded(name):
        source = sheet.iter_rows(values_only=True)
    cells = count = 0
    while True:
        with _guarded(name):
            rows = list(islice(source, _ROWS_AT_ONCE))
        if not rows:
            return
        for row in rows:
            count, cells = count + 1, cells + len(row)
            within_rows(name, count)
            if cells > CELLS_MAX:
                raise LabelTableError(f"{name}: more than {CELLS_MAX} cells; this is not a label table")
            yield count, _sheet_cells(name, row)


def _sheet_cells(name: str, row: Sequence[Any]) -> list[str]:
    last = next((place for place in range(len(row), 0, -1) if row[place - 1] is not None), 0)
    if last > COLUMNS_MAX:
        raise LabelTableError(f"{name}: more than {COLUMNS_MAX} columns; this is not a label table")
    return ["" if value is None or _rounded(value) else as_text(value) for value in row[:last]]


def _rounded(value: Any) -> bool:
    """Whether a spreadsheet may have lost digits of a number: half an accession number is another study's."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= 10**XLSX_DIGITS


def _filled(rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    return ((count, cells) for count, cells in rows if any(cell.strip() for cell in cells))
