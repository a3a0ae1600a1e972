"""Rounds that end in more than one number: subgroups, external sites, and a given model that nobody trains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from federation import Federation
from hospital import study
from test_server_sums import BINS as TINY_BINS
from test_server_sums import Bench
from test_server_sums import made_study as tiny_study

from fl_client.cohort import SPLITS
from fl_server import weights as files
from fl_server.results import check
from models import learning, networks
from models.contributions import Contribution, Sheet
from models.metrics import ScoreHistogram
from models.study import Study
from models.subgroups import Groups, groups
from privacy import keys

FOUR = ("north", "south", "east", "west")


def of_four(protection: str = "masked", trainers: tuple[str, ...] = FOUR, **sections: dict[str, Any]) -> Study:
    facts = study().model_dump(mode="json")
    facts["participation"] |= {"sites": list(trainers), "quorum": min(3, len(trainers))}
    facts["participation"]["evaluate_only"] = [name for name in FOUR if name not in trainers]
    facts["protection"] = protection
    for name, change in sections.items():
        facts[name] |= change
    return Study.model_validate(facts)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)  # processes end in these tests; machines do not


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def scores_of(federation: Federation, run: Path, name: str) -> Any:
    net = networks.build(federation.plan)
    networks.load_vector(net, safetensors.numpy.load_file(run / "model.safetensors")["model"])
    cohort = federation.cohort(name, "test")
    return learning.predict(net, cohort)[:, 0], cohort.targets.numpy()[:, 0], cohort.observed


@pytest.mark.parametrize(("protection", "least"), [("masked", 1), ("masked", 2), ("sealed", 1), ("sealed", 2)])
def test_a_group_is_the_sum_of_its_images_at_the_sites_that_have_enough_of_them(
    tmp_path: Path, protection: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: loops over the sites' own images. The hospitals are tiny: one or two images of each class are enough here, and
    with two only two sites tell of a group, which no masked run keeps.
    """
    monkeypatch.setattr("models.subgroups.RELEASE_MIN", least)
    asked = {"test": 0.5, "bins": 40, "subgroups": ["sex", "sex x age"]}
    federation = Federation(tmp_path, of_four(protection, evaluation=asked, training={"rounds": 1}))
    run = federation.run()
    results = results_of(run)
    told = {entry["name"]: entry for entry in results["groups"] if entry["division"] == "sex"}
    expected: dict[str, list[int]] = {}
    telling: dict[str, int] = {}
    for name in FOUR:
        _, truth, observed = scores_of(federation, run, name)
        rows = {
            sex: [n for n, its in enumerate(observed) if (its.sex or "unknown") == sex] for sex in ("F", "M", "unknown")
        }
        classes = {sex: [int((truth[mine] == label).sum()) for label in (0, 1)] for sex, mine in rows.items()}
        persons = {sex: len({observed[n].patient for n in mine}) for sex, mine in rows.items()}
        enough = {sex: min(*classes[sex], persons[sex]) >= least for sex in rows}
        for sex in ("F", "M"):
            # With one group of another kept back, what is kept back would follow from the rest, and be too small.
            if enough[sex] and all(enough[other] for other, counts in classes.items() if sum(counts)):
                telling[sex] = telling.get(sex, 0) + 1
                expected[sex] = [a + b for a, b in zip(expected.get(sex, [0, 0]), classes[sex], strict=True)]
    sites = 3 if protection == "masked" else 1  # of one site or two, the sum would tell what masks hide
    kept = {sex: counts for sex, counts in expected.items() if telling[sex] >= sites}
    assert expected and (kept == expected) == ((protection, least) != ("masked", 2))
    assert {name: np.sum(entry["counts"][0], axis=1).tolist() for name, entry in told.items()} == kept
    assert {name: entry["sites"] for name, entry in told.items()} == {sex: [telling[sex]] for sex in kept}
    checked = check(results)
    assert checked.groups.told.shape == (len(groups(checked.study)), 1)


def test_patients_of_a_site_that_only_evaluates_are_all_tested_and_choose_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, of_four(trainers=FOUR[:3], evaluation={"bins": 40, "external": "all"}))
    results = results_of(federation.run())
    inside = sum(len(federation.cohort(name, "test")) for name in FOUR[:3])
    outside = len(federation.cohort("west", "external"))
    assert outside == sum(len(federation.cohort("west", split)) for split in SPLITS)
    assert results["test"]["images"] == inside + outside
    assert all("west" not in entry["validation"]["sites"] for entry in results["rounds"])
    alike = {"bins": 40}
    narrow = Federation(tmp_path / "narrow", of_four(trainers=FOUR[:3], evaluation=alike))
    assert results_of(narrow.run())["test"]["images"] == inside + len(narrow.cohort("west", "test"))


@pytest.fixture
def given(tmp_path: Path) -> tuple[Federation, Any]:
    """Four sites and a model from elsewhere that they evaluate."""
    plain = of_four(training={"rounds": 0})
    vector = networks.to_vector(networks.build(plain)) + np.float32(0.01)
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(safetensors.numpy.save({"model": vector}))
    initial = {"initial": {"sha256": keys.digest(path.read_bytes())}}
    federation = Federation(tmp_path, of_four(training={"rounds": 0}, network=initial, evaluation={"bins": 40}))
    files.add(federation.home.root, path)
    return federation, vector


def test_a_given_model_is_evaluated_as_it_is_and_nothing_is_trained(given: tuple[Federation, Any]) -> None:
    federation, vector = given
    run = federation.run()
    results = results_of(run)
    assert (results["label"], results["rounds"], results["selected_round"]) == ("complete", [], 0)
    assert (safetensors.numpy.load_file(run / "model.safetensors")["model"] == vector).all()
    assert results["initial"]["sites"] == sorted(FOUR) == results["test"]["sites"]
    images = {s: sum(len(federation.cohort(n, s)) for n in FOUR) for s in ("validation", "test", "external")}
    assert images["validation"] + images["test"] == images["external"] and images["validation"] < images["test"]
    assert results["test"]["images"] == images["test"] and results["initial"]["images"] == images["validation"]
    checked = check(results)
    assert checked.validation.keys() == {0} and checked.test is not None
    kinds = {json.loads(line)["kind"] for name in FOUR for line in _journal(federation, name)}
    assert "evaluate-report" in kinds and "train-report" not in kinds and "release" not in kinds


def _journal(federation: Federation, name: str) -> list[str]:
    return (federation.hospitals[name].home / "journal.jsonl").read_text().splitlines()


@pytest.mark.parametrize("told", [1, 2, 1000])
def test_a_site_that_tells_of_a_group_for_others_too_has_no_part_in_the_sum(tmp_path: Path, told: int) -> None:
    """Its counts are large enough for many sites: the number of sites itself has to be held against the sum."""
    plan = tiny_study(protection="sealed", evaluation={"bins": TINY_BINS, "subgroups": ["sex"]})
    bench, its = Bench(tmp_path, plan), Groups.empty(plan)
    counts = np.zeros((1, 2, TINY_BINS), np.int64)
    counts[0, :, 3] = 10 * told
    its.told[0], its.counts[0] = told, counts
    sheet = Sheet(20 * told, 20 * told, 0.5, ScoreHistogram(counts))
    bench.sites["west"].contribution = Contribution(0, sheet, groups=its)
    total = bench.summing.carry_out(bench.test_task())
    assert ("west" in total.contributors) == (told == 1)
    assert total.missing == ({} if told == 1 else {"west": "message-malformed"})
