"""Label tables: what is not mapped is missing, what contradicts is missing, and what cannot be read is an error that helps."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.attributes import About
from models.connectors import Connector
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
    monkeypatch.setattr("models.tables.TABLE_BYTES_MAX", 10)
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


def targets_of(**words: Any) -> dict[str, Any]:
    return {"targets": {"opacity": {"column": "Diagnosis", **words}}}


@pytest.mark.parametrize(
    ("words", "ones", "zeros", "missing"),
    [
        (
            {"0..6": 0, "7..24": 1},
            ["7", "24", "7.0", " 12 "],
            ["0", "6", "6,0"],
            ["25", "-1", "6.5", "7-24", "", "seven"],
        ),
        ({"<7": 0, ">=7": 1}, ["7", "100"], ["6.99", "-5", "6,5"], ["NaN", "1,234", "7+"]),
        ({"<=6": 0, "> 6": 1}, ["6.1", "7"], ["6"], [""]),
        ({"0..6": 0, "24": 1, "none": 0}, ["24"], ["None", "3"], ["23", "nan"]),
        ({"-3..-1.5": 1, "0.5..1": 0}, ["-2", "-1.5", "-3.0"], ["0.5", "1"], ["0", "-1"]),
        ({"<=25%": 0, ">75%": 1}, [">75%"], ["<=25%"], ["10", "51-75%"]),
        ({"<1": 0, ">=1": 1}, [], ["<1", "0"], ["<2"]),
    ],
)
def test_ranges_are_read_as_they_are_written(
    tmp_path: Path, words: dict[str, int], ones: list[str], zeros: list[str], missing: list[str]
) -> None:
    cells = [*ones, *zeros, *missing]
    rows = "".join(f'{number},"{cell}"\n' for number, cell in enumerate(cells))
    found = table(tmp_path, "Study UID,Diagnosis\n" + rows, **targets_of(words=words))
    expected = [1] * len(ones) + [0] * len(zeros) + [None] * len(missing)
    assert [found.lookup(str(number))["opacity"] for number in range(len(cells))] == expected
    assert found.unmapped["opacity"].total() == sum(normalised(cell) not in MISSING_WORDS for cell in missing)


@pytest.mark.parametrize(
    "words",
    [
        {"0..7": 0, "7..24": 1},
        {"0..24": 0, "7": 1},
        {"<=7": 0, ">=7": 1},
        {"<8": 0, ">=7": 1},
        {"6..0": 0},
        {"0..6": 0, "5": 1},
        {"<0": 1, "-5..-4": 0},
    ],
)
def test_ranges_that_share_a_number_are_refused(words: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=r"share a number|runs backwards"):
        TargetWords.model_validate({"column": "c", "words": words})


@given(
    st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    st.tuples(st.integers(-9, 9), st.sampled_from(["<", "<=", ">", ">="])),
    st.integers(-10, 10),
)
def test_ranges_are_apart_exactly_if_no_number_is_in_both(
    span: tuple[int, int], bound: tuple[int, str], number: int
) -> None:
    """Oracle: Python's own comparison, tried on every half from -10 to 10."""
    low, high = sorted(span)
    edge, sign = bound
    halves = [n / 2 for n in range(-22, 23)]
    inside = {"<": lambda n: n < edge, "<=": lambda n: n <= edge, ">": lambda n: n > edge, ">=": lambda n: n >= edge}[
        sign
    ]
    both = any(low <= n <= high and inside(n) for n in halves)
    words = {f"{low}..{high}": 1, f"{sign}{edge}": 0}
    if both:
        with pytest.raises(ValidationError):
            TargetWords.model_validate({"column": "c", "words": words})
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = table(Path(folder), f"Study UID,Diagnosis\na,{number}\n", **targets_of(words=words))
    assert found.lookup("a")["opacity"] == (1 if low <= number <= high else 0 if inside(number) else None)


ONE_HOT = {"targets": {"opacity": {"columns": {"Typical": 1, "Atypical": 1, "Negative": 0}}}}


def test_of_one_hot_columns_the_marked_one_counts(tmp_path: Path) -> None:
    rows = {
        "a": ("1,0,0", 1),
        "b": ("0,0,1.0", 0),
        "c": ("1,1,0", 1),
        "d": ("0,0,0", None),
        "e": ("1,0,1", None),  # contradicts itself
        "f": (",,1", 0),
        "g": ("1,maybe,0", None),
        "h": (",,", None),
        "i": ("TRUE,False,0", 1),
        "j": ("2,0,0", None),
    }
    text = "Study UID,Typical,Atypical,Negative\n" + "".join(f"{key},{cells}\n" for key, (cells, _) in rows.items())
    found = table(tmp_path, text, **ONE_HOT)
    assert {key: found.lookup(key)["opacity"] for key in rows} == {key: label for key, (_, label) in rows.items()}
    assert found.conflicts == 1
    assert found.unmapped["opacity"] == Counter({"maybe": 1, "2": 1})


def test_a_row_that_contradicts_itself_is_missing_whatever_others_say(tmp_path: Path) -> None:
    text = "Study UID,Typical,Atypical,Negative\na,1,0,0\na,1,0,1\na,1,0,0\n"
    found = table(tmp_path, text, **ONE_HOT)
    assert (found.lookup("a"), found.conflicts) == ({"opacity": None}, 1)


def test_a_list_is_1_if_any_word_is_and_0_only_if_all_are(tmp_path: Path) -> None:
    cells = {
        "['pneumonia', 'oedema']": 1,
        "normal|old fracture": 0,
        "normal, oedema": None,
        "oedema|pneumonia": 1,
        "[]": None,
        "": None,
        "normal": 0,
        "['normal', '']": 0,
        "normal|not reported": None,
    }
    rows = "".join(f'{number},"{cell}"\n' for number, cell in enumerate(cells))
    words = {"pneumonia": 1, "normal": 0, "old fracture": 0}
    found = table(tmp_path, "Study UID,Diagnosis\n" + rows, **targets_of(words=words, list=True))
    assert [found.lookup(str(number))["opacity"] for number in range(len(cells))] == list(cells.values())
    assert found.unmapped["opacity"] == Counter({"oedema": 3})


@pytest.mark.parametrize(
    "target",
    [
        {"column": "c"},
        {"words": {"x": 1}},
        {},
        {"column": "c", "words": {"x": 1}, "columns": {"d": 1}},
        {"columns": {}},
        {"columns": {"d": True}},
        {"columns": {"d": 2}},
        {"columns": {"d": 1}, "list": True},
        {"column": "c", "columns": {"d": 1}},
    ],
)
def test_a_target_is_one_column_with_words_or_several_with_marks(target: Any) -> None:
    with pytest.raises(ValidationError):
        TargetWords.model_validate(target)


@pytest.mark.parametrize("stands_in", ["table", "header", "both", "neither"])
def test_a_prefix_of_patient_numbers_is_dropped_on_either_side(tmp_path: Path, stands_in: str) -> None:
    prefix = "MIDRC-RICORD-1C-"
    in_table = prefix if stands_in in ("table", "both") else ""
    asked = (prefix if stands_in in ("header", "both") else "") + "419639-1"
    text = f"Study UID,Diagnosis\n{in_table}419639-1,normal\n"
    found = table(tmp_path, text, matches="patient_id", patient="Study UID", strip_prefix=prefix)
    assert found.lookup(asked) == {"opacity": 0}
    assert asked in found
    assert found.patient_of(asked) == found.mapping.plain_patient(asked) == "419639-1"
    assert found.without_image([asked]) == 0 and found.without_image([]) == 1


def test_a_prefix_is_about_patients_only(tmp_path: Path) -> None:
    found = table(tmp_path, "Study UID,Diagnosis\n1.2,normal\n", strip_prefix="1.")
    assert found.lookup("1.2") == {"opacity": 0} and found.lookup("2") == {"opacity": None}


def test_a_key_that_a_spreadsheet_rounded_is_no_key(tmp_path: Path) -> None:
    text = "Study UID,Diagnosis\n1.23457E+15,normal\n1E+05,normal\n2e-x,normal\n"
    found = table(tmp_path, text, matches="accession")
    assert (found.without_key, found.keys()) == (2, {"2e-x"})
    assert table(tmp_path, text, matches="file").without_key == 0


ABOUT = {"about": {"age": "age", "sex": "sex", "race": "race", "ethnicity": "eth"}}


def test_who_a_person_is_comes_from_columns_and_unknown_words_are_listed(tmp_path: Path) -> None:
    text = (
        "Study UID,Diagnosis,age,sex,race,eth\n"
        "a,normal,063Y,F,White,Hispanic or Latino\n"
        "b,normal,155,x,martian,Not Reported\n"
        "c,normal,50+,M,Not Reported,\n"
        "d,normal,old,None,ASIAN,not hispanic or latino\n"
    )
    found = table(tmp_path, text, **ABOUT)
    a, b, c, d = (found.about(key) for key in "abcd")
    assert (a.age_years, a.over_89, a.age_bin, a.sex, a.race, a.ethnicity) == (
        63,
        False,
        "50-64",
        "F",
        "White",
        "Hispanic or Latino",
    )
    assert (b.age_years, b.age_bin, b.sex, b.race, b.ethnicity) == (None, None, None, None, None)
    assert (c.age_years, c.age_bin, c.sex) == (None, None, "M")
    assert (d.age_years, d.sex, d.race, d.ethnicity) == (None, None, "Asian", "Not Hispanic or Latino")
    assert found.implausible_ages == 1
    assert found.about_unmapped == {"age": {"old": 1}, "sex": {"x": 1}, "race": {"martian": 1}, "ethnicity": {}}
    assert found.about("nobody") == About()
    assert table(tmp_path, text).about("a") == About()


def test_a_hospitals_own_words_for_persons_are_mapped_to_midrcs(tmp_path: Path) -> None:
    words = {"w": "F", "AA": "Black or African American", "hisp": "Hispanic or Latino"}
    about = {"about": ABOUT["about"] | {"words": words}}
    found = table(tmp_path, "Study UID,Diagnosis,age,sex,race,eth\na,normal,40s,W,aa,Hisp\n", **about)
    one = found.about("a")
    assert (one.age_bin, one.sex, one.race, one.ethnicity) == (
        "40-49",
        "F",
        "Black or African American",
        "Hispanic or Latino",
    )
    with pytest.raises(ValidationError, match="'Female-ish' is no word of MIDRC"):
        mapping(about={"words": {"w": "Female-ish"}})


def test_rows_that_tell_a_person_differently_leave_it_open(tmp_path: Path) -> None:
    text = (
        "Study UID,Diagnosis,age,sex,race,eth\n"
        "a,normal,40,F,White,\na,normal,41,F,,\na,normal,40,F,White,\n"
        "b,normal,,,,\nb,normal,40,M,,\n"
        "c,normal,155,M,,\nc,normal,62,M,,\n"
    )
    found = table(tmp_path, text, **ABOUT)
    assert (found.about("c").age_years, found.implausible_ages) == (62, 1)
    assert (found.about("a").age_years, found.about("a").sex, found.about("a").race) == (None, "F", "White")
    assert (found.about("b").age_years, found.about("b").sex) == (40, "M")
    assert found.conflicts == 0


def test_a_target_may_be_called_like_a_fact(tmp_path: Path) -> None:
    words = {"column": "Diagnosis", "words": {"pneumonia": 1, "normal": 0}}
    text = (
        "Study UID,Diagnosis,age,sex,race,eth\na,normal,40,F,,\na,pneumonia,40,F,,\nb,normal,40,F,,\nb,normal,50,F,,\n"
    )
    found = table(tmp_path, text, targets={"age": words, "sex": words}, **ABOUT)
    assert (found.lookup("a"), found.lookup("b")) == ({"age": None, "sex": None}, {"age": 0, "sex": 0})
    assert (found.about("a").age_years, found.about("b").age_years, found.about("b").sex) == (40, None, "F")
    assert found.conflicts == 1


def test_a_map_knows_its_files_and_stands_on_its_own_when_anchored(tmp_path: Path) -> None:
    plain = mapping()
    assert plain.files(tmp_path) == [tmp_path / "labels.csv"]
    moved = plain.anchored(tmp_path)
    assert moved.files(Path("/elsewhere")) == [(tmp_path / "labels.csv").resolve()]
    assert moved.targets == plain.targets


def test_the_examples_of_the_docs_are_maps_that_are_read() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "labels.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    maps = [parse(LabelMap, example, "labels.md") for example in examples]
    assert len(maps) == 10
    assert {name for found in maps if found.connector for name in found.connector.model_fields_set} == set(
        Connector.model_fields
    )
