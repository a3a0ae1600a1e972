"""Label tables: what is not mapped is missing, what contradicts is missing, and what cannot be read is an error that helps."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.labels import MISSING_WORDS, LabelMap, LabelTable, TargetWords, normalised
from models.study import parse
from privacy.errors import DocumentError, LabelTableError


def mapping(**changes: Any) -> LabelMap:
    settings: dict[str, Any] = {
        "table": "labels.csv",
        "key": "Study UID",
        "matches": "study_uid",
        "targets": {"opacity": {"column": "Diagnosis", "words": {"pneumonia": 1, "normal": 0}}},
    }
    return LabelMap.model_validate(settings | changes)


def table(folder: Path, content: str | bytes, **changes: Any) -> LabelTable:
    path = folder / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return LabelTable.read(path, mapping(**changes))


def test_words_are_compared_without_case_and_blanks(tmp_path: Path) -> None:
    found = table(tmp_path, "Study UID,Diagnosis\n1.2,PNEUMONIA \n1.3,  Normal\n1.4,pneu monia\n")
    assert [found.lookup(uid)["opacity"] for uid in ("1.2", "1.3", "1.4")] == [1, 0, None]
    assert found.unmapped == {"opacity": Counter({"pneu monia": 1})}
    assert (found.rows, len(found), found.columns) == (3, 3, ["Study UID", "Diagnosis"])


@pytest.mark.parametrize("word", ["", "  ", "NaN", "Not Reported", "N/A", "unknown", "-"])
def test_missing_is_never_negative_and_not_listed(tmp_path: Path, word: str) -> None:
    found = table(tmp_path, f"Study UID,Diagnosis\n1.2,{word}\n")
    assert found.lookup("1.2") == {"opacity": None}
    assert not found.unmapped["opacity"]


def test_a_key_that_is_not_in_the_table_is_missing_throughout(tmp_path: Path) -> None:
    found = table(tmp_path, "Study UID,Diagnosis\n1.2,normal\n")
    assert found.lookup("9.9") == {"opacity": None}
    assert "9.9" not in found and " 1.2 " in found
    assert found.patient_of("9.9") is None


@pytest.mark.parametrize("word", ["1", "1.0", "1,0", "+1", " 1 "])
def test_yaml_numbers_match_every_spelling_of_a_whole_number(tmp_path: Path, word: str) -> None:
    text = "table: t\nkey: Study UID\nmatches: study_uid\ntargets: {opacity: {column: Diagnosis, words: {1: 1, 0: 0}}}"
    words = parse(LabelMap, text, "site.yaml").targets
    found = table(
        tmp_path, f'Study UID,Diagnosis\n1.2,"{word}"\n', targets={k: v.model_dump() for k, v in words.items()}
    )
    assert found.lookup("1.2") == {"opacity": 1}


def test_yes_and_no_stay_words_and_true_becomes_one() -> None:
    text = "column: c\nwords: {yes: 1, no: 0, true: 1, 2.5: 0}"
    assert parse(TargetWords, text, "x").words == {"yes": 1, "no": 0, "true": 1, "2.5": 0}


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"a": 2},
        {"a": True},
        {"a": "1"},
        {"a": None},
        {"Yes": 1, "yes ": 0},
        {"not reported": 0},
        {"": 0},
        {1: 1, "1": 0},
        [],
    ],
)
def test_maps_that_guess_are_refused(words: Any) -> None:
    with pytest.raises(ValidationError):
        TargetWords.model_validate({"column": "c", "words": words})


def test_an_unknown_key_in_the_map_names_its_line() -> None:
    text = "table: t\nkey: k\nmatchez: study_uid\nmatches: study_uid\ntargets: {a: {column: c, words: {x: 1}}}"
    with pytest.raises(DocumentError, match=r"line 3.*matches"):
        parse(LabelMap, text, "site.yaml")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_spreadsheets_export_is_read(tmp_path: Path, delimiter: str, encoding: str, newline: str) -> None:
    lines = [
        f"Study UID{delimiter}Diagnosis {delimiter}Bemerkung",
        f'"1.2"{delimiter}"Pneumonia"{delimiter}"größer{delimiter} ""alt"""',
        f"1.3{delimiter}normal",
        "",
    ]
    found = table(tmp_path, newline.join(lines).encode(encoding))
    assert found.lookup("1.2") == {"opacity": 1}
    assert found.lookup("1.3") == {"opacity": 0}
    assert found.malformed == 0


def test_contradicting_rows_are_missing_and_counted(tmp_path: Path) -> None:
    text = "Study UID,Diagnosis\na,normal\na,pneumonia\na,normal\nb,normal\nb,\nb,normal\nc,\nc,pneumonia\n"
    found = table(tmp_path, text)
    assert [found.lookup(k)["opacity"] for k in "abc"] == [None, 0, 1]
    assert (found.conflicts, found.rows, len(found)) == (1, 8, 3)


def test_two_patients_for_one_key_is_no_patient(tmp_path: Path) -> None:
    text = "Study UID,Diagnosis,who,view\na,normal,p1,PA\na,normal,p2,PA\nb,normal,p3,\nb,normal,,LL\n"
    found = table(tmp_path, text, patient="who", view="view")
    assert [found.patient_of(k) for k in "ab"] == [None, "p3"]
    assert [found.view_of(k) for k in "ab"] == ["PA", "LL"]


def test_rows_with_shifted_cells_are_not_trusted(tmp_path: Path) -> None:
    found = table(tmp_path, "Study UID,comment,Diagnosis\n1.2,see, below,normal\n1.3,ok,normal,,\n,x,normal\n")
    assert found.lookup("1.2") == {"opacity": None}
    assert found.lookup("1.3") == {"opacity": 0}
    assert (found.malformed, found.without_key, found.rows) == (1, 1, 3)


def test_files_are_matched_whatever_the_slash(tmp_path: Path) -> None:
    found = table(tmp_path, "Study UID,Diagnosis\n.\\a\\b.png,normal\n./c.png,pneumonia\n", matches="file")
    assert found.lookup("a/b.png") == {"opacity": 0}
    assert found.lookup("c.png") == {"opacity": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\n\nStudy UID,Diagnosis\n", "no column names"),
        (b"Study UID,Diagnosis\n", "no rows"),
        (b"Study UID,Diagnosis\n\n , \n", "no rows"),
        (b"StudyUID,Diagnosis\n1,normal\n", r"no column 'Study UID'; did you mean 'StudyUID'\?.*'Diagnosis'"),
        (b"Study UID,diagnose\n1,normal\n", r"no column 'Diagnosis'; did you mean 'diagnose'"),
        (b"Study UID,Diagnosis,Diagnosis\n1,normal,\n", "stands twice"),
        (b'Study UID,Diagnosis\n1,"normal\n2,normal\n', "line 3"),
        (b"Study UID,Diagnosis\n1,M\xfcller\n", "line 2: not UTF-8"),
        (b"PK\x03\x04\0\0\0Study UID,Diagnosis\n1,normal\n", "binary"),
        (b"Study UID,Diagnosis\n1," + b"x" * 200_000 + b"\n", "field larger than field limit"),
        (b"Study UID,Diagnosis" + b",c" * 5000 + b"\n1,normal\n", "more than 4096 columns"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(LabelTableError, match=message) as caught:
        table(tmp_path, content)
    assert caught.value.remedy


def test_a_missing_table_and_one_that_is_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabelTableError, match="no such label table"):
        LabelTable.read(tmp_path / "absent.csv", mapping())
    with pytest.raises(LabelTableError, match="no such label table"):
        LabelTable.read(tmp_path, mapping())
    monkeypatch.setattr("models.labels.TABLE_BYTES_MAX", 10)
    with pytest.raises(LabelTableError, match="larger than"):
        table(tmp_path, "Study UID,Diagnosis\n1.2,normal\n")


def test_free_text_does_not_fill_the_list_of_unmapped_words(tmp_path: Path) -> None:
    rows = "".join(f"{n},text {n}\n" for n in range(300)) + "x,text 1\n"
    found = table(tmp_path, "Study UID,Diagnosis\n" + rows)
    assert len(found.unmapped["opacity"]) == 100
    assert found.unmapped["opacity"]["text 1"] == 2


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(word: str) -> None:
    assert normalised(normalised(word)) == normalised(word)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["normal", "pneumonia", "", "odd"])), min_size=1, max_size=12
    )
)
def test_a_label_is_what_all_rows_of_a_key_agree_on(rows: list[tuple[str, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = table(Path(folder), "Study UID,Diagnosis\n" + "".join(f"{k},{w}\n" for k, w in rows))
    for key in "abc":
        said = {w for k, w in rows if k == key} & {"normal", "pneumonia"}
        expected = {"normal": 0, "pneumonia": 1}[said.pop()] if len(said) == 1 else None
        assert found.lookup(key) == {"opacity": expected}
    assert sum(found.unmapped["opacity"].values()) == sum(w == "odd" for _, w in rows)


def test_missing_words_are_in_the_form_in_which_cells_are_compared() -> None:
    assert all(normalised(word) == word for word in MISSING_WORDS)
