"""The tables of docs/benchmarks.md against the files they are made of, and what they say of goals, said here once more."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
KEPT = ROOT / "docs" / "benchmarks"
REPORT: dict[str, Any] = json.loads((KEPT / "bench.json").read_text())
KEYS = "round_small round_densenet round_alone dp_step_small dp_step_densenet dp_step_3d mask_keystream simulation indexing"


@pytest.fixture(scope="module")
def tables() -> Any:
    sys.path.insert(0, str(ROOT / "deploy"))
    try:
        import bench_tables

        return bench_tables
    finally:
        sys.path.remove(str(ROOT / "deploy"))


def test_the_page_shows_what_was_measured(tables: Any) -> None:
    for name, (path, table) in tables.TABLES.items():
        assert table(json.loads(path.read_text())) in PAGE, f"{name}: run python deploy/bench_tables.py"


@pytest.mark.parametrize("key", KEYS.split())
def test_every_ratio_has_both_sides_and_says_how_it_was_got(key: str) -> None:
    entry = REPORT[key]
    assert {"ratio", "limit_s", "ours_s", "note"} <= entry.keys() and entry["note"]
    assert entry["ratio"] == pytest.approx(entry["ours_s"] / entry["limit_s"], rel=0.03)


def test_each_part_says_when_it_was_measured_and_how_busy_the_machine_was() -> None:
    assert REPORT["parts"] and all(
        {"date", "load_before", "seconds"} == part.keys() for part in REPORT["parts"].values()
    )


def test_a_line_says_missed_where_the_result_is_above_the_goal_and_nowhere_else() -> None:
    table = PAGE.split("<!-- begin figures -->")[1].split("<!-- end figures -->")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if re.match(r"\| `\w+` \|.*\|.*\|.*\|.*\|", line)]
    judged = 0
    for *_, result, goal in rows:
        found = re.match(r" ([\d.,]+)", result)
        if found and re.match(r" [\d.]+", goal):
            judged += 1
            above = float(found[1].rstrip(",").replace(",", "")) > float(re.findall(r"[\d.]+", goal)[0])
            assert above == ("missed" in result), (result, goal)
    assert judged >= 20


def test_a_result_at_the_goal_is_met_and_one_that_is_missing_is_no_success(tables: Any) -> None:
    at = {"ratio": 1.8, "limit_s": 1.0, "ours_s": 1.8}
    (line,) = [row for row in tables.figures({"round_small": at}).splitlines() if "`round_small`" in row]
    assert "| 1.80 s | 1.00 s | 1.80 | 1.8 |" in line
    (line,) = [
        row for row in tables.figures({"round_small": at | {"ratio": 1.81}}).splitlines() if "`round_small`" in row
    ]
    assert "1.81, **missed**" in line
    assert tables.figures({}).count("not measured") == len(tables.FIGURES)


@pytest.mark.parametrize(
    "text", ["no place", "<!-- end a -->\n<!-- begin a -->\n", 2 * "<!-- begin a -->\n<!-- end a -->\n"]
)
def test_a_page_without_the_one_place_of_a_table_is_left_alone(tables: Any, text: str) -> None:
    with pytest.raises(LookupError, match="lacks a place for the table a"):
        tables.written(text, "a", "| |")


def test_a_table_takes_its_place_and_nothing_else(tables: Any) -> None:
    text = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n"
    assert tables.written(text, "a", "| new |") == "before\n<!-- begin a -->\n| new |\n<!-- end a -->\nafter\n"
