"""Tables: every kind of file gives the same rows, and no file, however it was made, gives anything but rows or an error."""

import csv
import io
import json
import random
import re
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from models import tables
from models.labels import LabelMap, LabelTable
from models.tables import Table, as_text, list_words, number_of, open_table, read_json
from privacy.errors import LabelTableError

HEADER = ["Study UID", "Finding", "Age", "Note"]
ROWS = [
    ["1.2.840.1", "Pneumonia", "63", 'wide; "dense", both | sides'],
    ["1.2.840.2", "normal", "", "größer\nals zuvor"],
    ["1.2.840.3", "", "054Y", ""],
]


def written(rows: list[list[str]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode(encoding)


def workbook(sheets: dict[str, list[list[Any]]]) -> bytes:
    book = Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    data = io.BytesIO()
    book.save(data)
    return tampered(data.getvalue(), lambda name, part: part)


def tampered(data: bytes, change: Callable[[str, bytes], bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """The workbook with each part as `change` makes it, and without the time of day, so that damage can be repeated."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            part = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"2020-01-01T00:00:00Z", old.read(name))
            new.writestr(zipfile.ZipInfo(name), change(name, part), packing)
    return out.getvalue()


def records(rows: list[list[str]]) -> bytes:
    return json.dumps([dict(zip(rows[0], row, strict=True)) for row in rows[1:]]).encode()


def opened(folder: Path, name: str, data: bytes, wanted: str = "Study UID", sheet: str | None = None) -> Table:
    (folder / name).write_bytes(data)
    return open_table(folder / name, wanted, sheet)


def padded(table: Table) -> list[list[str]]:
    return [cells + [""] * (len(table.columns) - len(cells)) for _, cells in table.rows]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.csv", written([HEADER, *ROWS])),
        ("t.csv", written([HEADER, *ROWS], ";")),
        ("t.tsv", written([HEADER, *ROWS], "\t")),
        ("t.txt", written([HEADER, *ROWS], "|", "utf-16")),
        ("t.csv", written([HEADER, *ROWS], encoding="utf-8-sig")),
        ("t.xlsx", workbook({"Sheet1": [HEADER, *ROWS]})),
        ("t.XLSX", workbook({"Sheet1": [HEADER, [], *ROWS, []]})),
        ("t.json", records([HEADER, *ROWS])),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, data: bytes) -> None:
    table = opened(tmp_path, name, data)
    assert table.columns == HEADER
    assert padded(table) == [[cell.replace("\r\n", "\n") for cell in row] for row in ROWS]


def test_a_workbook_gives_values_as_a_csv_file_would(tmp_path: Path) -> None:
    values = [
        "1.2.840.1",
        63.0,
        63.5,
        12,
        True,
        date(2021, 3, 4),
        datetime(2021, 3, 4, 5, 6),
        None,
        "=1+1",
        "#N/A",
        1e15,
        10**17,
    ]
    table = opened(tmp_path, "t.xlsx", workbook({"a": [["Study UID", *"bcdefghijkl"], values]}))
    cells = padded(table)[0]
    expected = ["1.2.840.1", "63", "63.5", "12", "true", "2021-03-04", "2021-03-04T05:06:00", "", "", "#N/A", "", ""]
    assert cells == expected, "a formula that nobody calculated and a number that lost digits are missing"


def test_the_sheet_is_the_one_with_the_key_or_the_one_that_is_named(tmp_path: Path) -> None:
    book = workbook(
        {"Legend": [["x"]], "CR Pos - TCIA  Submission": [HEADER, *ROWS], "More": [["Study uid"], ["9"]], "Empty": []}
    )
    with pytest.raises(
        LabelTableError, match=r"several sheets have a column 'Study UID'\. Sheets found: 'Legend'"
    ) as caught:
        opened(tmp_path, "t.xlsx", book)
    assert "`sheet`" in caught.value.remedy
    assert len(padded(opened(tmp_path, "t.xlsx", book, "Finding"))) == 3
    assert len(padded(opened(tmp_path, "t.xlsx", book, sheet="cr pos - tcia submission"))) == 3
    assert padded(opened(tmp_path, "t.xlsx", book, sheet="More")) == [["9"]]
    with pytest.raises(LabelTableError, match=r"no sheet 'Mor'; did you mean 'More'\?"):
        opened(tmp_path, "t.xlsx", book, sheet="Mor")
    with pytest.raises(LabelTableError, match="no sheet has a column 'nothing'"):
        opened(tmp_path, "t.xlsx", book, "nothing")
    with pytest.raises(LabelTableError, match="no column names"):
        opened(tmp_path, "t.xlsx", book, sheet="Empty")
    with pytest.raises(LabelTableError, match="only a workbook"):
        opened(tmp_path, "t.csv", b"a,b\n1,2\n", sheet="More")


def test_columns_are_found_without_case_and_blanks_where_one_fits(tmp_path: Path) -> None:
    table = opened(tmp_path, "t.csv", b"mRALE  Score,study uid,STUDY UID,A,a,b,b\n1,2,3,4,5,6,7\n", "mrale score")
    assert table.at("mRALE Score") == 0
    assert (table.at("A"), table.at("a"), table.at("study uid"), table.at("STUDY UID")) == (3, 4, 1, 2)
    for unclear in ("Study UID", "b", "B"):
        with pytest.raises(LabelTableError, match=f"the column '{unclear}' stands twice"):
            table.at(unclear)
    with pytest.raises(
        LabelTableError, match=r"no column 'mRALE_Score'; did you mean 'mRALE  Score'\? Columns found: "
    ):
        table.at("mRALE_Score")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("['CR', 'DX']", ["CR", "DX"]),
        ('["CR"]', ["CR"]),
        ("[CR, DX]", ["CR", "DX"]),
        ("['a' 'b']", ["a", "b"]),
        ("['No, not this', 'b']", ["No, not this", "b"]),
        ("a|b", ["a", "b"]),
        ("a, b|c", ["a, b", "c"]),
        ("a,b", ["a", "b"]),
        (" a ", ["a"]),
        ("", []),
        ("[]", []),
        ("['']", []),
        ("| |", []),
        ("[[[['a']]]]", ["[[[", "a", "]]]"]),
        ("[" * 5000, ["[" * 5000]),
    ],
)
def test_list_cells_are_read_and_never_evaluated(cell: str, words: list[str]) -> None:
    assert list_words(cell) == words


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        *[("7", 7), ("-7.5", -7.5), ("6,5", 6.5), ("1,2345", 1.2345), ("+3", 3), ("7.", 7), (" 7 ", 7)],
        *[(text, None) for text in ("", "nan", "inf", "1,234", "1e3", "0x1", "1_000", "٣", "1.2.3", "9" * 400)],
    ],
)
def test_numbers_are_decimal_and_unambiguous(cell: str, number: float | None) -> None:
    assert number_of(cell) == number


def test_values_of_json_become_cells(tmp_path: Path) -> None:
    rows = [
        {"Study UID": "a", "n": 1, "flag": True, "list": ["CR", 'D"X'], "inside": {"x": 1}},
        {"n": 1.0, "Study UID": "\ud800b", "more": None},
        {},
    ]
    table = opened(tmp_path, "t.json", json.dumps(rows).encode())
    assert table.columns == ["Study UID", "n", "flag", "list", "inside", "more"]
    assert padded(table) == [["a", "1", "true", '["CR", "D\'X"]', "", ""], ["?b", "1", "", "", "", ""]]
    assert as_text(float("nan")) == as_text(float("inf")) == as_text(None) == ""


# --- hostile files


def in_sheet(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, part: part.replace(old, new) if "sheet1.xml" in name else part


PLAIN = workbook({"a": [["Study UID", "Finding"], ["1.2", "normal"]]})


def refused(folder: Path, name: str, data: bytes, message: str) -> LabelTableError:
    """The error that reading the whole file gives."""
    with pytest.raises(LabelTableError, match=message) as caught:
        padded(opened(folder, name, data))
    assert name in str(caught.value)
    return caught.value


def test_a_zip_bomb_is_found_while_counting_and_before_any_xml_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "XLSX_BYTES_MAX", 50_000_000)
    monkeypatch.setattr("openpyxl.load_workbook", None)
    bomb = tampered(PLAIN, in_sheet(b"<sheetData>", b" " * 60_000_000 + b"<sheetData>"))
    assert len(bomb) < 100_000
    tracemalloc.start()
    refused(tmp_path, "t.xlsx", bomb, "unpacks to more")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_xml_of_many_elements_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "XLSX_TAGS_MAX", 1000)
    refused(
        tmp_path,
        "t.xlsx",
        tampered(PLAIN, in_sheet(b"<sheetData>", b"<x/>" * 1000 + b"<sheetData>")),
        "unpacks to more",
    )


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'


def test_xml_that_declares_entities_is_refused_in_every_encoding(tmp_path: Path) -> None:
    def declared(name: str, part: bytes) -> bytes:
        return BOMB + re.sub(rb"^<\?xml[^>]*\?>", b"", part) if "sheet1.xml" in name else part

    refused(tmp_path, "t.xlsx", tampered(PLAIN, declared), "declares entities")
    wide = tampered(
        PLAIN, lambda name, part: declared(name, part).decode().encode("utf-16") if "sheet1" in name else part
    )
    refused(tmp_path, "t.xlsx", wide, "declares entities")
    other = tampered(PLAIN, in_sheet(b"<worksheet", b'<?xml version="1.0" encoding="cp037"?><worksheet'))
    refused(tmp_path, "t.xlsx", other, "unusual encoding")


def test_rows_and_columns_that_only_a_number_claims_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS_MAX", 200_000)
    monkeypatch.setattr(tables, "CELLS_MAX", 5_000_000)
    began = time.monotonic()
    far = tampered(PLAIN, in_sheet(b'<row r="2"', b'<row r="1000000000"'))
    refused(tmp_path, "t.xlsx", far, "more than 200000 rows")
    refused(tmp_path, "t.xlsx", tampered(PLAIN, in_sheet(b'r="B1"', b'r="ZZZ1"')), "more than 4096 columns")
    refused(tmp_path, "t.xlsx", tampered(PLAIN, in_sheet(b'r="B2"', b'r="ZZZ2"')), "more than 4096 columns")
    claims = tampered(PLAIN, in_sheet(b'ref="A1:B2"', b'ref="A1:XFD1048576"'))
    assert padded(opened(tmp_path, "t.xlsx", claims)) == [["1.2", "normal"]]
    empty = b"".join(b'<row r="%d"><c r="ZZZ%d"/></row>' % (n, n) for n in range(3, 400))
    wide = tampered(PLAIN, in_sheet(b"</sheetData>", empty + b"</sheetData>"))
    refused(tmp_path, "t.xlsx", wide, "more than 5000000 cells")
    assert time.monotonic() - began < 20


def test_a_workbook_with_a_password_or_in_the_old_format_says_what_to_do(tmp_path: Path) -> None:
    ole = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)
    assert "save it as .xlsx" in refused(tmp_path, "t.xlsx", ole, "old .xls, or one with a password").remedy
    refused(tmp_path, "t.xls", ole, "binary file")
    refused(tmp_path, "t.csv", PLAIN, "binary file")
    packed = tampered(PLAIN, lambda name, part: part, zipfile.ZIP_LZMA)
    refused(tmp_path, "t.xlsx", packed, "unusual way")
    refused(tmp_path, "t.xlsx", b"PK\x03\x04" + b"PK\x01\x02" * 10_001, "more than 10000 parts")
    refused(tmp_path, "t.xlsx", tampered(PLAIN, lambda n, p: b"" if n == "xl/workbook.xml" else p), "can be read")
    refused(tmp_path, "t.xlsx", b"", "empty")


def test_what_a_damaged_workbook_holds_is_not_in_the_error(tmp_path: Path) -> None:
    secret = workbook({"a": [["Study UID", "Age"], ["Erika Mustermann", 12345678]]})
    broken = tampered(secret, lambda n, p: p.replace(b"<v>12345678</v>", b"<v>Mustermann 1950</v>"))
    error = refused(tmp_path, "t.xlsx", broken, "not a workbook that can be read")
    assert "Mustermann" not in str(error) + error.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "lists within lists|line 1: not JSON"),
        (b'{"a":' * 100_000, "lists within lists|line 1: not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "lists within lists"),
        (b'[{"Study UID": 1},\n]', "line 2: not JSON"),
        (b'[{"Study UID": ' + b"9" * 5000 + b"}]", "thousands of digits"),
        (b"[" + b"1," * 6_000_000 + b"1]", "more than 5000000 values"),
        (b'[{"\xff": 1}]', "not JSON in UTF-8"),
        (b"[1, 2]", "not a list of records"),
        (b'{"a": 1}', "not a list of records"),
        (b"[]", "no column names"),
        (b"[{}]", "no column names"),
        (b"[" + b",".join(b'{"c%d": 1}' % n for n in range(5000)) + b"]", "more than 4096 columns"),
    ],
)
def test_json_that_is_no_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    refused(tmp_path, "t.json", content, message)


def test_text_of_endless_rows_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROW_CHARS_MAX", 100_000)
    refused(tmp_path, "t.csv", b"Study UID,b\n" + b"," * 200_000 + b"\n", "a row of more than 100000 characters")
    refused(tmp_path, "t.csv", b"Study UID,b\n" + b'"\n",' * 100_000 + b"\n", "a row of more than 100000 characters")
    refused(tmp_path, "t.csv", b"," * 200_000, "a row of more than 100000 characters")
    assert len(padded(opened(tmp_path, "t.csv", b"Study UID,b\n" + b"1,2\n" * 50_000))) == 50_000
    monkeypatch.setattr(tables, "ROWS_MAX", 1000)
    refused(tmp_path, "t.csv", b"Study UID,b\n" + b"1,2\n" * 1001, "more than 1000 rows")
    refused(tmp_path, "t.csv", b"Study UID,b\n" + b"\n" * 1001, "more than 1000 rows")
    refused(tmp_path, "t.json", json.dumps([{"a": 1}] * 1001).encode(), "more than 1000 rows")
    monkeypatch.setattr(tables, "CELLS_MAX", 1000)
    refused(tmp_path, "t.json", json.dumps([{str(n): 1 for n in range(100)}] * 11).encode(), "more than 1000 cells")


@pytest.mark.parametrize("name", ["t.csv", "t.xlsx", "t.json"])
def test_a_file_larger_than_any_label_table_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(tables.TABLE_BYTES_MAX + 1)  # sparse
    with pytest.raises(LabelTableError, match="larger than"):
        open_table(path)


def mutated(draw: random.Random, base: bytes) -> bytes:
    """`base` with bytes flipped, a piece cut out, or a piece of it put in elsewhere."""
    data = bytearray(base)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        match draw.randrange(4):
            case 0 if data:
                data[draw.randrange(len(data))] = draw.choice((0, 10, 34, 44, 60, 91, 255, draw.randrange(256)))
            case 1:
                del data[at : min(end, at + 40)]
            case 2:
                data[at:at] = data[at : min(end, at + 200)] * draw.choice((1, 2, 50))
            case _:
                del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


def mutated_workbook(draw: random.Random, base: bytes) -> bytes:
    """A sound zip with one damaged part, so that damage gets past the checksums and to the parser of XML."""
    with zipfile.ZipFile(io.BytesIO(base)) as archive:
        victim = draw.choice(archive.namelist())
    return tampered(base, lambda name, part: mutated(draw, part) if name == victim else part, zipfile.ZIP_STORED)


SMALL = [
    ["Study UID", "Finding", "Age", "x"],
    ["1.2", "Pneumonia", "063Y", "7"],
    ["1.3", "['normal', \"b\"]", "155", "3"],
]
BASES: dict[str, tuple[bytes, Callable[[random.Random, bytes], bytes]]] = {
    "t.csv": (written(SMALL), mutated),
    "t.tsv": (written(SMALL, "\t", "utf-16"), mutated),
    "t.json": (records(SMALL), mutated),
    "t.xlsx": (workbook({"a": SMALL}), mutated),
    "u.xlsx": (workbook({"a": SMALL}), mutated_workbook),
}


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_thousand_damaged_tables_are_read_or_refused_and_nothing_else(tmp_path: Path, name: str) -> None:
    """200 of each kind. Whatever happens, it is a table or a LabelTableError, soon."""
    base, mutate = BASES[name]
    draw = random.Random(f"damaged {name}")
    mapping = LabelMap.model_validate(
        {
            "table": name,
            "key": "Study UID",
            "matches": "study_uid",
            "targets": {
                "a": {"column": "Finding", "words": {"Pneumonia": 1, "normal": 0}, "list": True},
                "b": {"column": "x", "words": {"0..6": 0, ">=7": 1}},
            },
            "about": {"age": "Age"},
        }
    )
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200):
        (tmp_path / name).write_bytes(mutate(draw, base))
        began = time.monotonic()
        try:
            found = LabelTable.open(tmp_path, mapping)
        except LabelTableError as error:
            assert name in str(error) and error.remedy
            outcomes["refused"] += 1
        else:
            assert found.rows >= len(found) and set(found.lookup("1.2")) == {"a", "b"}
            outcomes["read"] += 1
        assert time.monotonic() - began < 5
    assert min(outcomes.values()) > 0, "damage that is always found, or never, tests nothing"


def test_a_damaged_export_of_md_ai_is_read_or_refused(tmp_path: Path) -> None:
    labels = [{"id": "L1", "name": "Typical Appearance"}, {"id": "L2", "name": "Negative for Pneumonia"}]
    groups = [{"id": "G", "name": name, "labels": labels} for name in ("Adjudication", "R")]
    annotations = [{"StudyInstanceUID": "1.2", "SeriesInstanceUID": None, "labelId": "L1", "data": None}]
    base = json.dumps({"datasets": [{"annotations": annotations}], "labelGroups": groups}).encode()
    questions = {"q": ["Typical Appearance", "Negative for Pneumonia"]}
    mapping = LabelMap.model_validate(
        {
            "connector": {"ricord": {"annotations": "a.json", "questions": questions}},
            "targets": {"t": {"column": "q", "words": {"Typical Appearance": 1}}},
        }
    )
    draw = random.Random("annotations")
    values = [None, 3, [], {}, "x", "1.2", "L1", 1.5, True]

    def shaken(value: Any) -> Any:
        """The same with some values exchanged: JSON that parses and is not what it should be."""
        if draw.random() < 0.05:
            return draw.choice(values)
        if isinstance(value, dict):
            return {key: shaken(inside) for key, inside in value.items() if draw.random() > 0.02}
        return [shaken(inside) for inside in value] if isinstance(value, list) else value

    read = 0
    for number in range(400):
        data = mutated(draw, base) if number % 2 else json.dumps(shaken(json.loads(base))).encode()
        (tmp_path / "a.json").write_bytes(data)
        try:
            read += len(LabelTable.open(tmp_path, mapping)) >= 0
        except LabelTableError as error:
            assert "a.json" in str(error)
    assert 20 < read < 380


def test_json_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "t.json") == {"a": [1, None]}
