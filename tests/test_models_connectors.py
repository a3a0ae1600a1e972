"""Connectors: each collection by the rule that its makers state, against answers worked out by hand or another way."""

import csv
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook
from test_models_tables import mutated

from models.labels import LabelMap, LabelTable
from models.study import parse
from privacy.errors import DocumentError, LabelTableError

MIDRC = Path(__file__).resolve().parents[2] / "shared" / "data" / "midrc_tables"
real = pytest.mark.skipif(not MIDRC.is_dir(), reason="the real tables are not here")

COVID = {"covid": {"column": "covid19", "words": {"Positive": 1, "Negative": 0}}}
SEVERE = {"severe": {"column": "mRALE Score", "words": {"0..6": 0, "7..24": 1}}}
TYPICAL = {"typical": {"column": "appearance", "words": {"Typical Appearance": 1, "Negative for Pneumonia": 0}}}


def connected(connector: dict[str, Any], targets: dict[str, Any], **changes: Any) -> LabelMap:
    return LabelMap.model_validate({"connector": connector, "targets": targets} | changes)


def write(path: Path, rows: list[list[str]], delimiter: str = ",") -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path.name


# --- MIDRC


STUDY = ["type", "submitter_id", "cases.submitter_id", "case_ids", "study_uid", "days_to_study", "age_at_imaging"]
TEST = ["type", "submitter_id", "case_ids", "test_name", "test_method", "test_result_text", "test_days_from_index"]


def gen3(
    folder: Path, results: list[tuple[str, str, str]], studies: list[tuple[str, str, str]], **more: Any
) -> LabelMap:
    """Results of tests as (case, result, day), studies as (uid, case, day)."""
    rows = [
        ["measurement", f"m{n}", case, "COVID-19", "RT-PCR", what, day] for n, (case, what, day) in enumerate(results)
    ]
    write(folder / "measurement.tsv", [TEST, *rows], "\t")
    taken = [["imaging_study", f"s{n}", case, case, uid, day, ""] for n, (uid, case, day) in enumerate(studies)]
    write(folder / "imaging_study.tsv", [STUDY, *taken], "\t")
    midrc = {"studies": ["imaging_study.tsv"], "tests": ["measurement.tsv"]} | more
    return connected({"midrc": midrc}, COVID)


def test_covid_status_is_that_of_the_latest_test_up_to_14_days_before(tmp_path: Path) -> None:
    tests = [
        ("a", "Negative", "-3"),
        ("a", "Positive", "1.0"),
        ("a", "Negative", "9"),
        ("b", "Positive", "0"),
        ("c", "Indeterminate", "5"),
        ("c", "Positive", "2"),
        ("d", "Not Reported", "5"),
        ("e", "Positive", ""),
    ]
    studies = [
        ("1", "a", "8"),  # 11, 7 days after; the third test is after it
        ("2", "a", "9"),  # on the day of the third test
        ("3", "a", "23"),  # 14 days after the third
        ("4", "a", "24"),  # 15 days after it: nothing in the window
        ("5", "b", "-1"),  # before its only test
        ("6", "b", ""),  # on no known day
        ("7", "c", "5"),  # the latest test says neither, the one before counts
        ("8", "d", "5"),
        ("9", "e", "0"),  # a test of no known day
        ("10", "f", "0"),  # a case without tests
        ("11", "b", "14.0"),
        ("12", "b", "15"),
    ]
    table = LabelTable.open(tmp_path, gen3(tmp_path, tests, studies))
    expected = {"1": 1, "2": 0, "3": 0, "4": None, "5": None, "6": None}
    expected |= {"7": 1, "8": None, "9": None, "10": None, "11": 1, "12": None}
    assert {uid: table.lookup(uid)["covid"] for uid in expected} == expected
    assert (table.rows, table.conflicts, table.malformed, len(table)) == (12, 0, 0, 12)
    assert [table.patient_of(uid) for uid in ("1", "7")] == ["a", "c"]


def test_tests_of_one_day_that_disagree_are_missing_and_counted(tmp_path: Path) -> None:
    tests = [("a", "Positive", "3"), ("a", "Negative", "3"), ("b", "Positive", "3"), ("b", "Positive", "3")]
    table = LabelTable.open(tmp_path, gen3(tmp_path, tests, [("1", "a", "4"), ("2", "b", "4")]))
    assert [table.lookup(uid)["covid"] for uid in "12"] == [None, 1]
    assert table.conflicts == 1


def test_the_window_is_a_setting_that_is_kept_to(tmp_path: Path) -> None:
    tests = [("a", "Positive", "0"), ("b", "Negative", "12")]
    studies = [("1", "a", "0"), ("2", "a", "1"), ("3", "a", "3"), ("4", "a", "4"), ("5", "b", "10")]
    table = LabelTable.open(tmp_path, gen3(tmp_path, tests, studies, window_days=[1, 3]))
    assert [table.lookup(uid)["covid"] for uid in "12345"] == [None, 1, 1, None, None]
    table = LabelTable.open(tmp_path, gen3(tmp_path, tests, studies, window_days=[-2, 0]))
    assert [table.lookup(uid)["covid"] for uid in "12345"] == [1, None, None, None, 0]


def test_rows_of_several_patients_and_unreadable_days_are_malformed(tmp_path: Path) -> None:
    tests = [
        ("['a']", "Positive", "3"),
        ("['a', 'b']", "Negative", "3"),
        ("b", "Positive", "soon"),
        ("", "Positive", "3"),
    ]
    studies = [("1", "['a']", "4"), ("2", "['a','b']", "4"), ("3", "b", "4"), ("", "a", "4")]
    table = LabelTable.open(tmp_path, gen3(tmp_path, tests, studies))
    assert [table.lookup(uid)["covid"] for uid in "123"] == [1, None, None]
    assert (table.malformed, table.without_key) == (4, 1)


def test_another_disease_is_another_test(tmp_path: Path) -> None:
    mapping = gen3(tmp_path, [("a", "Positive", "3")], [("1", "a", "4")])
    (tmp_path / "measurement.tsv").write_text(
        (tmp_path / "measurement.tsv").read_text().replace("COVID-19", "Influenza")
    )
    assert LabelTable.open(tmp_path, mapping).lookup("1") == {"covid": None}


def test_templates_with_stars_and_several_files_are_read_as_one(tmp_path: Path) -> None:
    mapping = gen3(tmp_path, [("a", "Positive", "3")], [("1", "a", "4")], tests=["measurement.tsv", "more.tsv"])
    write(
        tmp_path / "more.tsv", [["*type", *TEST[1:]], ["measurement", "m", "a", "COVID-19", "", "Negative", "4"]], "\t"
    )
    header, row = (tmp_path / "imaging_study.tsv").read_text().splitlines()
    header = header.replace("cases.submitter_id\tcase_ids", "*cases.submitter_id\tcase_names").replace(
        "study_uid", "*study_uid"
    )
    (tmp_path / "imaging_study.tsv").write_text(f"*{header}\n{row}\n")
    assert LabelTable.open(tmp_path, mapping).lookup("1") == {"covid": 0}


def test_a_study_knows_its_persons_age_at_imaging_else_at_the_index_event(tmp_path: Path) -> None:
    mapping = gen3(tmp_path, [], [("1", "a", "4"), ("2", "b", "4"), ("3", "c", "0")], cases=["case.tsv"])
    header = ["*type", "*submitter_id", "age_at_index", "age_at_index_gt89", "sex", "race", "ethnicity"]
    cases = [
        ["case", "a", "54", "No", "Female", "White", "Not Reported"],
        ["case", "b", "", "Yes", "Male", "Not Reported", "Hispanic or Latino"],
        ["case", "c", "30", "No", "Male", "Asian", ""],
        ["case", "c", "", "No", "Female", "Asian", ""],
        ["case", "c", "30", "", "Male", "Asian", "Hispanic or Latino"],
    ]
    write(tmp_path / "case.tsv", [header, *cases], "\t")
    text = (tmp_path / "imaging_study.tsv").read_text().splitlines()
    text[1] += "56"
    (tmp_path / "imaging_study.tsv").write_text("\n".join(text))
    table = LabelTable.open(tmp_path, mapping)
    one, two, three = (table.about(uid) for uid in "123")
    assert (one.age_years, one.age_bin, one.sex, one.race, one.ethnicity) == (56, "50-64", "F", "White", None)
    assert (two.age_years, two.over_89, two.age_bin, two.sex) == (None, True, "85+", "M")
    assert (three.age_years, three.sex, three.race, three.ethnicity) == (30, None, "Asian", "Hispanic or Latino")


@pytest.mark.parametrize(
    ("file", "column"), [("measurement.tsv", "test_result_text"), ("imaging_study.tsv", "study_uid")]
)
def test_a_table_of_another_node_is_named(tmp_path: Path, file: str, column: str) -> None:
    mapping = gen3(tmp_path, [], [("1", "a", "4")])
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(column, "something_else"))
    with pytest.raises(LabelTableError, match=rf"{file}: there is no column '{column}'"):
        LabelTable.open(tmp_path, mapping)


@real
def test_real_cases_give_the_counts_of_their_column() -> None:
    """Oracle: awk-like counting of the same files with the csv module, without a line of the reader."""
    found: Counter[Any] = Counter()
    expected: Counter[Any] = Counter()
    for name in ("case_export_0.tsv", "case_export_1.tsv"):
        mapping = LabelMap.model_validate(
            {
                "table": name,
                "key": "submitter_id",
                "matches": "patient_id",
                "targets": {"covid": {"column": "covid19_positive", "words": {"Yes": 1, "No": 0}}},
                "about": {
                    "age": "age_at_index",
                    "age_over_89": "age_at_index_gt89",
                    "sex": "sex",
                    "race": "race",
                    "ethnicity": "ethnicity",
                },
            }
        )
        table = LabelTable.open(MIDRC, mapping)
        assert (table.malformed, table.conflicts, table.without_key, table.implausible_ages) == (0, 0, 0, 0)
        assert not any(table.unmapped.values()) and not any(table.about_unmapped.values())
        for key in sorted(table.keys()):
            about = table.about(key)
            found.update([table.lookup(key)["covid"], about.sex, about.race, about.ethnicity, ("age", about.age_years)])
            found["over 89"] += about.over_89
            found["bin", about.age_bin] += 1
        with (MIDRC / name).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                words: dict[str, Any] = {"Yes": 1, "No": 0, "Female": "F", "Male": "M", "Not Reported": None}
                sex_race = [words.get(row[c], row[c]) for c in ("covid19_positive", "sex", "race", "ethnicity")]
                age = float(row["age_at_index"]) if row["age_at_index"] else None
                expected.update([*sex_race, ("age", age)])
                expected["over 89"] += row["age_at_index_gt89"] == "Yes"
                edges = [18, 30, 40, 50, 65, 75, 85]
                names = ["0-17", "18-29", "30-39", "40-49", "50-64", "65-74", "75-84", "85+"]
                expected["bin", names[sum((200 if age is None else age) >= edge for edge in edges)]] += 1
    assert found == expected
    assert (found[1], found[0], found["over 89"], found["F"], found["M"]) == (4156, 3187, 288, 4103, 3236)


# --- mRALE


MRALE = [
    "StudyInstanceUID",
    *("extent_right_numerical", "density_right_numerical", "extent_left_numerical", "density_left_numerical"),
    "mRALE Score",
]


def mrale(folder: Path, rows: list[list[str]], targets: dict[str, Any] = SEVERE) -> LabelTable:
    write(folder / "mrale.csv", [MRALE, *rows])
    return LabelTable.open(folder, connected({"mrale": {"scores": "mrale.csv"}}, targets))


def test_scores_are_recomputed_and_what_does_not_add_up_is_not_believed(tmp_path: Path) -> None:
    rows = [
        ["a", "4", "3", "4", "2", "20"],
        ["b", "1", "1", "1", "1", "2"],
        ["c", "0", "0", "0", "0", "0"],
        ["d", "4", "3", "4", "2", "21"],  # does not add up
        ["e", "5", "2", "0", "0", "10"],  # extent ends at 4
        ["f", "2", "4", "0", "0", "8"],  # density ends at 3
        ["g", "2", "0", "0", "0", "0"],  # an extent without a density, as two of the real ones
        ["h", "", "", "", "", ""],  # not scored
        ["i", "2", "", "0", "0", "0"],
        ["j", "3", "2", "0", "0", "6.0"],
        ["k", "3", "2", "1", "1", "7"],
        ["l", "nan", "1", "1", "1", "2"],
        ["m", "2.5", "2", "0", "0", "5"],
    ]
    table = mrale(tmp_path, rows)
    assert [table.lookup(key)["severe"] for key in "abcghjk"] == [1, 0, 0, 0, None, 0, 1]
    assert [key in table for key in "defilm"] == [False] * 6
    assert (table.malformed, table.rows) == (6, 13)


@real
def test_real_scores_give_the_counts_of_their_column() -> None:
    targets = SEVERE | {"extreme": {"column": "mrale score", "words": {"0": 0, "24": 1}}}
    table = LabelTable.open(MIDRC, connected({"mrale": {"scores": "mrale_mastermind_2079.csv"}}, targets))
    with (MIDRC / "mrale_mastermind_2079.csv").open(newline="", encoding="utf-8") as file:
        scores = {row["StudyInstanceUID"]: int(row["mRALE Score"]) for row in csv.DictReader(file)}
    assert table.malformed == table.conflicts == table.without_key == 0
    assert len(table) == table.rows == len(scores) == 2079
    for uid, score in scores.items():
        assert table.lookup(uid) == {"severe": int(score >= 7), "extreme": {0: 0, 24: 1}.get(score)}
    assert sum(table.unmapped["extreme"].values()) == 2079 - 413 - 225


# --- RICORD


NAMES = ["Typical Appearance", "Indeterminate Appearance", "Atypical Appearance", "Negative for Pneumonia"]
SPACED = ["Mild Opacities  (1-2 lung zones)", "Moderate Opacities (3-4 lung zones)", "Severe Opacities (>4 lung zones)"]


def export(
    votes: list[tuple[str | None, str, str]], readers: tuple[str, ...] = ("R1", "R2", "R3", "Adjudication")
) -> Any:
    """An MD.ai export with votes as (study, reader, label); every reader has labels of its own."""
    groups = [
        {
            "id": f"G_{reader}",
            "name": reader,
            "labels": [
                {"id": f"L_{reader}_{name}", "name": name, "scope": "STUDY", "annotationMode": None}
                for name in (*NAMES, *SPACED, "Other")
            ],
        }
        for reader in readers
    ]
    annotations = [
        {
            "id": f"A{number}",
            "StudyInstanceUID": study,
            "SeriesInstanceUID": None,
            "SOPInstanceUID": None,
            "labelId": f"L_{reader}_{name}",
            "data": None,
        }
        for number, (study, reader, name) in enumerate(votes)
    ]
    return {"datasets": [{"id": "D", "name": "d", "studies": [], "annotations": annotations}], "labelGroups": groups}


def ricord(folder: Path, content: Any, targets: dict[str, Any] = TYPICAL, **more: Any) -> LabelTable:
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    return LabelTable.open(folder, connected({"ricord": {"annotations": "annotations.json"} | more}, targets))


def test_adjudication_wins_else_the_majority_else_missing(tmp_path: Path) -> None:
    typical, unclear, atypical, negative = NAMES
    votes = [
        *[("a", reader, typical) for reader in ("R1", "R2", "R3")],
        *[("b", reader, typical) for reader in ("R1", "R2")],
        ("b", "R3", negative),
        ("c", "R1", typical),
        ("c", "R2", negative),
        ("c", "R3", unclear),
        *[("d", reader, typical) for reader in ("R1", "R2", "R3")],
        ("d", "Adjudication", negative),
        ("e", "R1", typical),  # one reader is no majority
        *[("f", "Adjudication", name) for name in (typical, negative)],  # contradicts itself
        *[("f", reader, typical) for reader in ("R1", "R2")],
        *[("g", "R1", name) for name in (typical, negative)],  # a reader of two minds
        *[("g", reader, negative) for reader in ("R2", "R3")],
        *[("h", reader, atypical) for reader in ("R1", "R2")],
        ("i", "R1", "Other"),
        ("j", "R1", typical),
        ("j", "R2", negative),
        ("k", "R1", typical),
        ("k", "R1", typical),  # twice by one reader is once
        ("l", "Adjudication", typical),
        *[("m", reader, typical) for reader in ("R1", "R2")],  # two against two
        *[("m", reader, negative) for reader in ("R3", "R4")],
        *[("n", reader, name) for reader in ("R1", "R2") for name in (typical, negative)],
        ("n", "R3", typical),  # the only one who answered
    ]
    table = ricord(tmp_path, export(votes, ("R1", "R2", "R3", "R4", "Adjudication")))
    labels = [1, 1, None, 0, None, None, 0, None, None, None, None, 1, None, None]
    expected = dict(zip("abcdefghijklmn", labels, strict=True))
    assert {key: table.lookup(key)["typical"] for key in expected} == expected
    assert table.unmapped["typical"] == Counter({"atypical appearance": 1})
    assert table.conflicts == 7  # c, e, f, j, k, m, n
    assert (table.malformed, table.without_key) == (0, 0)


def test_labels_with_two_blanks_are_those_with_one(tmp_path: Path) -> None:
    targets = {"wide": {"column": "opacities", "words": {"Mild Opacities (1-2 lung zones)": 0, SPACED[2]: 1}}}
    votes = [(study, reader, SPACED[n]) for study, n in (("a", 0), ("b", 2)) for reader in ("R1", "R2")]
    table = ricord(tmp_path, export(votes), targets)
    assert [table.lookup(key)["wide"] for key in "ab"] == [0, 1]
    assert not table.unmapped["wide"]


def test_annotations_without_study_or_label_are_counted_and_nulls_accepted(tmp_path: Path) -> None:
    content = export([("a", reader, NAMES[0]) for reader in ("R1", "R2")] + [(None, "R1", NAMES[0])])
    annotations = content["datasets"][0]["annotations"]
    annotations += [
        {"id": "x", "StudyInstanceUID": "a", "labelId": "L_unknown", "data": None},
        "no annotation",
        None,
        {},
    ]
    annotations[0] |= {"data": {"vertices": [[1, 2], [3, 4]]}, "SeriesInstanceUID": "1.2"}
    table = ricord(tmp_path, content)
    assert table.lookup("a") == {"typical": 1}
    assert (table.malformed, table.without_key) == (4, 1)


def test_a_clinical_table_names_patients_without_the_prefix_of_headers(tmp_path: Path) -> None:
    rows = [
        ["Anon MRN", "Anon Study UID", "Age"],
        ["419639-1", "a", "60"],
        ["419639-2", "b", "70"],
        ["9", "c", "1"],
        ["8", "c", "1"],
    ]
    write(tmp_path / "clinical.csv", rows)
    content = export([(study, reader, NAMES[0]) for study in "abcd" for reader in ("R1", "R2")])
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    connector = {"ricord": {"annotations": "annotations.json", "clinical": "clinical.csv"}}
    mapping = connected(connector, TYPICAL, about={"age": "Age"})
    table = LabelTable.open(tmp_path, mapping)
    assert [table.patient_of(key) for key in "abcd"] == ["419639-1", "419639-2", None, None]
    assert mapping.plain_patient("MIDRC-RICORD-1C-419639-1") == "419639-1"
    assert (table.about("b").age_bin, table.about("d").age_bin) == ("65-74", None)
    assert table.malformed == 1


def test_an_export_without_the_groups_or_labels_that_are_asked_for_says_so(tmp_path: Path) -> None:
    nobody = export([("a", "R1", NAMES[0]), ("a", "R2", NAMES[0])], readers=("R1", "R2"))
    with pytest.raises(LabelTableError, match=r"no label group is called 'Adjudication'.*'R1', 'R2'"):
        ricord(tmp_path, nobody)
    assert ricord(tmp_path, nobody, adjudication=None).lookup("a") == {"typical": 1}
    questions = {"appearance": ["Typical Apearance"]}
    with pytest.raises(LabelTableError, match=r"'typical apearance'; did you mean 'Typical Appearance'"):
        ricord(tmp_path, export([]), questions=questions)


def test_the_clinical_workbook_is_read_from_its_sheet(tmp_path: Path) -> None:
    book = Workbook()
    book.active.append(["nothing", "of", "interest"])
    sheet = book.create_sheet("CR Pos - TCIA Submission")
    sheet.append(["Anon MRN", "Anon TCIA Study Date", "Anon Exam Description", "Anon Study UID"])
    sheet.append(["419639-003251", "3/4/2020", "XR CHEST 1 VIEW AP", "1.2.3"])
    sheet.append(["SITE2-000001", "12/14/2020", "XR CHEST", "1.2.4"])
    book.save(tmp_path / "clinical.xlsx")
    content = export([("1.2.3", reader, NAMES[0]) for reader in ("R1", "R2")])
    assert ricord(tmp_path, content, clinical="clinical.xlsx").patient_of("1.2.3") == "419639-003251"
    with pytest.raises(LabelTableError, match=r"there is no sheet 'CT'.*'CR Pos - TCIA Submission'"):
        ricord(tmp_path, content, clinical="clinical.xlsx", sheet="CT")


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        3,
        None,
        {"datasets": [], "labelGroups": {}},
        {"datasets": {}, "labelGroups": []},
        {"datasets": [3], "labelGroups": []},
        {"datasets": [{"annotations": None}], "labelGroups": []},
        {"datasets": [], "labelGroups": [{"labels": 3}]},
        {"datasets": [], "labelGroups": ["x"]},
        {"datasets": [], "labelGroups": [{"labels": [{"id": ["x"], "name": {}}, 3, None]}]},
    ],
)
def test_json_that_is_no_export_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(LabelTableError):
        ricord(tmp_path, content)


# --- SIIM-FISABIO-RSNA


SIIM = ["id", "Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance"]


def test_siim_has_one_class_a_study(tmp_path: Path) -> None:
    rows = [
        ["aa_study", "0", "1", "0", "0"],
        ["bb_study", "1", "0", "0", "0"],
        ["cc_study", "0", "0", "0", "1"],
        ["dd_study", "1", "1", "0", "0"],
        ["ee_study", "0", "0", "0", "0"],
        ["ff", "1", "0", "0", "0"],
        ["gg_study", "1", "0", "0", ""],
        ["hh_study", "1", "0", "0", "0"],
        ["hh_study", "0", "1", "0", "0"],
        ["ii_study", "1.0", "0.0", "0", "0"],
    ]
    write(tmp_path / "study.csv", [SIIM, *rows])
    targets = {"typical": {"column": "class", "words": {"Typical Appearance": 1, "Negative for Pneumonia": 0}}}
    table = LabelTable.open(tmp_path, connected({"siim": {"studies": "study.csv"}}, targets))
    assert [table.lookup(key)["typical"] for key in ("aa", "bb", "cc", "hh", "ii")] == [1, 0, None, None, 0]
    assert [key in table for key in ("dd", "ee", "ff", "gg")] == [False] * 4
    assert (table.malformed, table.conflicts, table.mapping.matches) == (4, 1, "study_uid")


def test_siim_images_have_boxes_of_their_own_and_the_class_of_their_study(tmp_path: Path) -> None:
    write(tmp_path / "study.csv", [SIIM, ["aa_study", "0", "1", "0", "0"], ["bb_study", "1", "0", "0", "0"]])
    images = [
        ["id", "boxes", "label", "StudyInstanceUID"],
        ["x_image", "[{'x': 1.5, 'y': 2, 'width': 3, 'height': 4}]", "opacity 1 1.5 2 4.5 6 opacity 1 1 2 3 4", "aa"],
        ["y_image", "", "none 1 0 0 1 1", "bb"],
        ["z_image", "", "", "cc"],
        ["w_image", "", "mass 1 0 0 1 1", "bb"],
        ["v", "", "none 1 0 0 1 1", "bb"],
    ]
    write(tmp_path / "image.csv", images)
    targets = {
        "boxed": {"column": "boxes", "words": {"opacity": 1, "none": 0}},
        "typical": {"column": "class", "words": {"Typical Appearance": 1, "Negative for Pneumonia": 0}},
    }
    mapping = connected({"siim": {"studies": "study.csv", "images": "image.csv"}}, targets)
    table = LabelTable.open(tmp_path, mapping)
    assert mapping.matches == "sop_uid"
    assert table.lookup("x") == {"boxed": 1, "typical": 1}
    assert table.lookup("y") == {"boxed": 0, "typical": 0}
    assert table.lookup("z") == {"boxed": None, "typical": None}
    assert (table.malformed, len(table)) == (2, 3)


# --- NIH


NIH = [
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width",
]


def nih(folder: Path, rows: list[list[str]], words: dict[str, int], header: list[str] = NIH) -> LabelTable:
    write(folder / "Data_Entry_2017.csv", [header, *rows])
    targets = {"found": {"column": "Finding Labels", "words": words}}
    return LabelTable.open(folder, connected({"nih": {"entries": "Data_Entry_2017.csv"}}, targets))


def test_nih_findings_are_lists_and_no_finding_is_absence_of_all(tmp_path: Path) -> None:
    rows = [
        ["1_0.png", "Pneumonia", "0", "1", "058Y", "M", "PA", "1"],
        ["1_1.png", "Effusion|Pneumonia", "1", "1", "411Y", "M", "AP", "1"],
        ["2_0.png", "No Finding", "0", "2", "81", "F", "PA", "1"],
        ["3_0.png", "Effusion", "0", "3", "81", "F", "PA", "1"],
        ["4_0.png", "No Finding|Effusion", "0", "4", "81", "F", "PA", "1"],
        ["5_0.png", "Effusion|Gout", "0", "5", "81", "F", "PA", "1"],
        ["6_0.png", "", "0", "6", "81", "F", "PA", "1"],
        ["7_0.png", "pleural_thickening", "0", "7", "81", "F", "PA", "1"],
    ]
    table = nih(tmp_path, rows, {"Pneumonia": 1})
    found = [
        table.lookup(f"images/{name}")["found"] for name in ("1_0.png", "1_1.png", "2_0.png", "3_0.png", "6_0.png")
    ]
    assert found == [1, 1, 0, None, None]
    assert "4_0.png" not in table and "images_007/images/5_0.png" not in table and "7_0.png" in table
    assert (table.malformed, table.implausible_ages) == (2, 1)
    assert (table.patient_of("1_1.png"), table.view_of("images/1_1.png")) == ("1", "AP")
    assert (table.about("1_0.png").age_years, table.about("1_0.png").sex, table.about("2_0.png").age_bin) == (
        58,
        "M",
        "75-84",
    )
    assert table.without_image(["a/1_0.png", "b/1_1.png", "nothing.png"]) == 4


def test_nih_findings_mapped_to_zero_are_the_sites_own_word(tmp_path: Path) -> None:
    rows = [
        ["3_0.png", "Effusion", "0", "3", "81", "F", "PA", "1"],
        ["2_0.png", "No Finding", "0", "2", "81", "F", "PA", "1"],
    ]
    table = nih(tmp_path, rows, {"Pneumonia": 1, "Effusion": 0})
    assert [table.lookup(name)["found"] for name in ("3_0.png", "2_0.png")] == [0, 0]
    table = nih(tmp_path, rows, {"No Finding": 1, "Effusion": 0})
    assert [table.lookup(name)["found"] for name in ("3_0.png", "2_0.png")] == [0, 1]
    newer = [name.replace("Gender", "Sex") for name in NIH]
    assert nih(tmp_path, rows, {"Pneumonia": 1}, newer).about("3_0.png").sex == "F"


# --- site.yaml


def test_a_connector_stands_in_place_of_table_key_and_matches() -> None:
    text = (
        "connector:\n  midrc:\n    studies: [a/imaging_study.tsv]\n    tests: [a/measurement.tsv]\n"
        "targets:\n  covid:\n    column: covid19\n    words: {Positive: 1, Negative: 0}\n"
    )
    mapping = parse(LabelMap, text, "site.yaml")
    assert (mapping.table, mapping.key, mapping.matches) == ("a/imaging_study.tsv", "study_uid", "study_uid")
    assert mapping.files(Path("/x")) == [Path("/x/a/imaging_study.tsv"), Path("/x/a/measurement.tsv")]
    again = LabelMap.model_validate(mapping.model_dump(mode="json"))
    assert again == mapping
    moved = mapping.anchored(Path("/home/site"))
    assert moved.table == "/home/site/a/imaging_study.tsv"
    assert LabelMap.model_validate(moved.model_dump(mode="json")) == moved
    assert moved.files(Path("/elsewhere")) == [
        Path("/home/site/a/imaging_study.tsv"),
        Path("/home/site/a/measurement.tsv"),
    ]


def test_a_label_answers_one_question_only() -> None:
    questions = {"a": ["Typical Appearance"], "b": ["typical  appearance"]}
    with pytest.raises(ValueError, match="stands twice"):
        connected({"ricord": {"annotations": "a.json", "questions": questions}}, TYPICAL)


def test_many_tests_and_studies_of_one_case_take_no_longer_for_it(tmp_path: Path) -> None:
    tests = [("a", "Positive", str(day % 50)) for day in range(10_000)]
    mapping = gen3(tmp_path, tests, [(f"1.{n}", "a", str(n)) for n in range(10_000)])
    began = time.monotonic()
    table = LabelTable.open(tmp_path, mapping)
    assert [table.lookup(f"1.{n}")["covid"] for n in (0, 63, 64)] == [1, 1, None]
    assert time.monotonic() - began < 10, "a hundred million comparisons take longer"


@pytest.mark.parametrize(
    ("connector", "line", "message"),
    [
        ("  midrc:\n    studies: [a]\n    testz: [b]", 4, r"unknown key 'connector.midrc.testz'; did you mean 'tests'"),
        ("  midrc:\n    studies: [a]", 2, r"'connector.midrc.tests' is missing"),
        ("  midrc:\n    studies: [a]\n    tests: [b]\n    window_days: [14, 0]", 2, r"window_days must be two days"),
        ("  midrc:\n    studies: []\n    tests: [b]", 3, r"connector.midrc.studies: "),
        ("  mydrc:\n    studies: [a]", 2, r"unknown key 'connector.mydrc'; did you mean 'midrc'"),
        ("  nih: {entries: a}\n  mrale: {scores: b}", 1, r"name one of midrc, mrale, ricord, siim, nih"),
        ("  {}", 1, r"name one of"),
        ("  midrc", 1, r"connector: midrc needs its files"),
    ],
)
def test_errors_of_a_connector_name_its_key_and_line(connector: str, line: int, message: str) -> None:
    text = f"connector:\n{connector}\ntargets:\n  covid:\n    column: covid19\n    words: {{Positive: 1}}\n"
    with pytest.raises(
        DocumentError, match=rf"line {line}: .*{message}" if "unknown" not in message else message
    ) as caught:
        parse(LabelMap, text, "site.yaml")
    assert len(str(caught.value).splitlines()) <= 2, "nothing is said of lines that a connector makes superfluous"


@pytest.mark.parametrize("extra", [{"key": "uid"}, {"table": "b.csv"}, {"matches": "accession"}, {"sheet": "x"}])
def test_what_the_connector_knows_cannot_be_contradicted(extra: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="the connector knows"):
        connected({"mrale": {"scores": "a.csv"}}, SEVERE, **extra)


def test_read_is_for_one_file_and_open_for_a_connector(tmp_path: Path) -> None:
    write(tmp_path / "mrale.csv", [MRALE, ["a", "4", "3", "4", "2", "20"]])
    mapping = connected({"mrale": {"scores": "mrale.csv"}}, SEVERE)
    with pytest.raises(LabelTableError, match="connector"):
        LabelTable.read(tmp_path / "mrale.csv", mapping)
    with pytest.raises(LabelTableError, match="no such label table"):
        LabelTable.open(tmp_path / "elsewhere", mapping)


COLLECTIONS: dict[str, tuple[dict[str, Any], dict[str, list[list[str]]]]] = {
    "midrc": (
        {"midrc": {"studies": ["s.tsv"], "tests": ["t.tsv"], "cases": ["c.tsv"]}},
        {
            "s.tsv": [STUDY, ["imaging_study", "s1", "a", "['a']", "1.2", "4", "63"]],
            "t.tsv": [TEST, ["measurement", "m1", "a", "COVID-19", "RT-PCR", "Positive", "3"]],
            "c.tsv": [["type", "submitter_id", "sex"], ["case", "a", "Male"]],
        },
    ),
    "mrale": ({"mrale": {"scores": "m.csv"}}, {"m.csv": [MRALE, ["1.2", "4", "3", "4", "2", "20"]]}),
    "siim": (
        {"siim": {"studies": "s.csv", "images": "i.csv"}},
        {
            "s.csv": [SIIM, ["aa_study", "0", "1", "0", "0"]],
            "i.csv": [["id", "boxes", "label", "StudyInstanceUID"], ["x_image", "", "none 1 0 0 1 1", "aa"]],
        },
    ),
    "nih": ({"nih": {"entries": "n.csv"}}, {"n.csv": [NIH, ["1.png", "Pneumonia", "0", "1", "058Y", "M", "PA", "1"]]}),
}


@pytest.mark.parametrize("name", sorted(COLLECTIONS))
def test_damaged_files_of_a_collection_are_read_or_refused(tmp_path: Path, name: str) -> None:
    connector, files = COLLECTIONS[name]
    column = {"midrc": "covid19", "mrale": "mRALE Score", "siim": "boxes", "nih": "Finding Labels"}[name]
    mapping = connected(connector, {"x": {"column": column, "words": {"Positive": 1}}})
    draw = random.Random(f"damaged {name}")
    read = refused = 0
    for file, rows in files.items():
        write(tmp_path / file, rows, "\t" if file.endswith("tsv") else ",")
    for _ in range(200):
        path = tmp_path / draw.choice(sorted(files))
        sound = path.read_bytes()
        path.write_bytes(mutated(draw, sound))
        try:
            LabelTable.open(tmp_path, mapping)
            read += 1
        except LabelTableError as error:
            assert error.remedy
            refused += 1
        path.write_bytes(sound)
    assert min(read, refused) > 10
