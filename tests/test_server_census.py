"""Distance to a census: SciPy is the oracle of the distance, all whole numbers of small boxes that of its interval."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from fl_server.census import Box, compare, distance, interval, read_census
from models.questions import CELLS, Answer
from privacy.errors import DocumentError


def test_the_distance_is_that_of_scipy_to_the_base_of_two() -> None:
    draw = np.random.default_rng(7)
    for groups in (2, 3, 8):
        census = draw.dirichlet(np.ones(groups))
        for numbers in (draw.integers(0, 500, groups) + np.eye(groups)[0], np.eye(groups)[0] * 10):
            expected = jensenshannon(numbers, census, base=2)
            assert distance(numbers.astype(np.float64), census) == pytest.approx(expected, abs=1e-9)
    assert distance(np.array([30.0, 10.0]), np.array([0.75, 0.25])) == pytest.approx(0, abs=1e-9)
    assert distance(np.array([30.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("least", "width", "together", "census"),
    [
        ([10, 20], 9, (30, 48), [0.5, 0.5]),
        ([0, 20], 9, (20, 30), [0.1, 0.9]),
        ([0, 0, 10], 9, (10, 37), [0.2, 0.3, 0.5]),
        ([10, 0, 10], 9, (30, 39), [0.6, 0.1, 0.3]),
        ([10, 10, 0], 9, (20, 29), [0.0, 0.2, 0.8]),
        ([20, 0], 18, (20, 38), [0.0, 1.0]),
        ([0, 0, 0], 12, (1, 30), [0.1, 0.1, 0.8]),
        ([10, 10, 10], 6, (40, 45), [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_the_interval_holds_every_true_number_and_is_no_wider(
    least: list[int], width: int, together: tuple[int, int], census: list[float]
) -> None:
    """Oracle: every vector of whole numbers, by SciPy. The interval is over real numbers, so it may be a little wider."""
    low, high = together
    box = Box(np.array(least, float), np.array(least, float) + width, low, high)
    found = interval(box, np.array(census))
    every = [
        jensenshannon(numbers, census, base=2)
        for numbers in itertools.product(*(range(start, start + width + 1) for start in least))
        if low <= sum(numbers) <= high and sum(numbers)
    ]
    assert found[0] <= min(every) + 1e-7 and max(every) <= found[1] + 1e-7
    assert max(every) == pytest.approx(found[1], abs=1e-7)  # its corners are whole numbers
    assert min(every) - found[0] < 0.06


TABLE = """attribute,category,count,maps_to
age,0–17,220,
age,18 to 64,610,18-29|30-39|40-49|50-64
age,65 and over,170,85+|65-74|75-84
sex,Female,505,
sex,male,495,
race,White alone,600,White
race,Other White,10,White
race,Asian,60,
race,Two or more races,40,-
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "census.csv"
    path.write_text(text, encoding="utf-8")
    return path


def answer(**cells: dict[str, int]) -> Answer:
    broken = {name: dict.fromkeys(CELLS[name], 0) | cells.get(name, {}) for name in ("age", "sex", "race")}  # type: ignore[index]
    return Answer(100, 100, 0, broken)  # type: ignore[arg-type]


def test_rows_are_renamed_merged_and_left_out_as_the_table_says(tmp_path: Path) -> None:
    census = read_census(write(tmp_path, TABLE))
    assert [(g.name, g.cells, round(g.share, 4)) for g in census["age"]] == [
        ("0–17", ("0-17",), 0.22),
        ("18 to 64", ("18-29", "30-39", "40-49", "50-64"), 0.61),
        ("65 and over", ("65-74", "75-84", "85+"), 0.17),
    ]
    assert [(g.name, g.cells) for g in census["sex"]] == [("Female", ("F",)), ("male", ("M",))]
    assert {g.name: round(g.share, 4) for g in census["race"]} == {
        "Asian": round(60 / 670, 4),
        "White alone + Other White": round(610 / 670, 4),
    }


def test_groups_are_compared_and_what_has_no_place_is_counted(tmp_path: Path) -> None:
    census = read_census(write(tmp_path, TABLE))
    counted = answer(
        age={"30-39": 20, "50-64": 30, "65-74": 10, "85+": 20, "unknown": 10},
        sex={"F": 50, "M": 30, "O": 10},
        race={"unknown": 90},
    )
    found = compare(counted, census, 3)
    assert list(found) == ["age", "sex", "race"]
    age = found["age"]
    assert (age.least, age.most) == ([0, 50, 30], [27, 50 + 4 * 27, 30 + 3 * 27])
    assert age.distance == pytest.approx(jensenshannon([0, 50, 30], [0.22, 0.61, 0.17], base=2), abs=1e-9)
    assert age.low <= age.distance <= age.high and age.left_out == {"unknown": 10}
    assert age.shares == [0, 0.625, 0.375]
    assert found["sex"].left_out == {"O": 10, "unknown": 0}
    race = found["race"]
    assert race.distance is None and race.shares == [None, None]
    assert race.left_out["unknown"] == 90
    assert age.to_json()["interval"] == [age.low, age.high]


def test_the_interval_is_narrowed_by_how_many_patients_there_are(tmp_path: Path) -> None:
    """Each group by itself may be 27 more; all of them together may not."""
    census = read_census(write(tmp_path, TABLE))
    row = compare(answer(sex={"F": 50, "M": 50}), census, 3)["sex"]
    alone = interval(Box(np.array([50.0, 50.0]), np.array([77.0, 77.0]), 100, 154), np.array([0.505, 0.495]))
    assert row.high == pytest.approx(alone[1])  # one grown, the other not: 127 of 127
    tight = compare(Answer(100, 100, 0, {"sex": {"F": 70, "M": 10, "O": 10, "unknown": 0}}), census, 3)["sex"]
    # 127 at most, of whom 10 to 37 are O, so F and M are 117 at most; 70 to 97 and 10 to 37.
    assert tight.high == pytest.approx(float(distance(np.array([97.0, 10.0]), np.array([0.505, 0.495]))))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: expected the columns attribute and category"),
        ("attribute,category\nage,0-17\n", "line 1: expected a column count or a column share"),
        ("attribute,category,count,share\n", "line 1: expected a column count or a column share, not both"),
        ("attribute,category,cuont\n", "unknown column 'cuont'; did you mean 'count'"),
        ("attribute,category,count,count\n", "each once"),
        ("attribute,category,count\n", "the table has no rows"),
        ("attribute,category,count\nage,0-17\n", "line 2: another number of cells"),
        ("attribute,category,count\nincome,low,3\n", "line 2: unknown attribute 'income'"),
        ("attribute,category,count\nage,0-19,3\n", "line 2: age has no category '0-19'; say in a column maps_to"),
        ("attribute,category,count\nrace,unknown,3\n", "line 2: race has no category 'unknown'"),
        ("attribute,category,count\nage,0-17,many\n", "line 2: 'many' is no number"),
        ("attribute,category,count\nage,0-17,-3\n", "line 2: '-3' is no number"),
        ("attribute,category,count\nage,0-17,nan\n", "line 2: 'nan' is no number"),
        ("attribute,category,count\nage,0-17,inf\n", "line 2: 'inf' is no number"),
        ("attribute,category,share\nsex,F,0.5\nsex,M,0.4\n", "the shares of sex add up to 0.9"),
        ("attribute,category,count\nsex,F,5\n", "sex needs two categories or more"),
        ("attribute,category,count\nsex,F,0\nsex,M,0\n", "sex needs two categories or more, with somebody in them"),
        (
            "attribute,category,count,maps_to\nage,a,3,0-17|18-29\nage,b,4,18-29\n",
            "rows that overlap have to map to the same categories: 18-29",
        ),
        ('attribute,category,count\nage,"0-17,3\n', "not a CSV table"),
    ],
)
def test_a_table_that_is_not_understood_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read_census(write(tmp_path, text))
    assert said in str(caught.value)


def test_shares_may_be_printed_in_per_cent_and_need_not_add_up_to_the_last_digit(tmp_path: Path) -> None:
    census = read_census(write(tmp_path, "\ufeffAttribute,Category,Share\nsex,F,50.6%\nsex,M,49.5%\n"))
    assert [round(group.share, 4) for group in census["sex"]] == [round(50.6 / 100.1, 4), round(49.5 / 100.1, 4)]
    with pytest.raises(DocumentError, match="there is no such file"):
        read_census(tmp_path / "nowhere.csv")
