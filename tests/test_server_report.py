"""Reports: what metrics.json says against scikit-learn on raw scores, what the page shows, and documents that lie."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from fl_server import figures, report
from models.metrics import ScoreHistogram
from models.study import Study, parse
from privacy.errors import MessageMalformed

SITES = ("north", "south", "east", "west")
BINS = 500

STUDY = """
version: 1
name: opacity
title: Opacity on chest radiographs
purpose: Find opacities on frontal chest radiographs of four hospitals.
task: {{targets: {targets}}}
training: {{rounds: {rounds}}}
protection: plain
privacy: none
participation: {{sites: [north, south, east, west], quorum: 3}}
evaluation: {{bins: 500}}
"""

Raw = dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]


def study_of(targets: str = "[opacity]", rounds: int = 6) -> Study:
    return parse(Study, STUDY.format(targets=targets, rounds=rounds), "study.yaml")


def draw(
    size: int, shift: float, share: float, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Scores in [0, 1] and labels of one site; `shift` separates the classes, `share` of the images are positive."""
    labels = (rng.random(size) < share).astype(np.int64)
    return 1 / (1 + np.exp(-(rng.normal(0, 1.2, size) + shift * (labels - 0.5)))), labels


def scores(raw: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]], loss: float, targets: int = 1) -> dict[str, Any]:
    values = np.repeat(raw[0][:, None], targets, axis=1).astype(np.float64)
    labels = np.repeat(raw[1][:, None], targets, axis=1).astype(np.float64)
    histogram = ScoreHistogram.of(values, labels, np.ones(values.shape), BINS)
    return {
        "patients": len(values) - len(values) // 5,
        "images": len(values),
        "loss": loss,
        "counts": histogram.to_json(),
    }


def results_of(study: Study, raw: Raw, rounds: int = 6, late_in: tuple[int, ...] = ()) -> dict[str, Any]:
    """A run, as its coordinator records it, in which the west is late in the rounds `late_in`."""
    rng = np.random.default_rng(5)
    sizes, width, entries = {"north": 120, "south": 90, "east": 40, "west": 70}, len(study.task.targets), []
    for number in range(1, rounds + 1):
        late = number in late_in
        here = [site for site in SITES if not (late and site == "west")]
        validation = {
            s: scores(draw(30 + 10 * i, 0.4 * number + 0.3 * i, 0.4, rng), 0.7 - 0.05 * number + 0.02 * i, width)
            for i, s in enumerate(here)
        }
        entries.append({
            "round": number, "seconds": 3.25, "contributors": here, "missing": {"west": "timeout"} if late else {},
            "cases": {s: sizes[s] for s in here}, "train_loss": dict.fromkeys(here, 0.72 - 0.06 * number),
            "site_seconds": dict.fromkeys(here, 2.5), "validation": validation,
            "validation_missing": {"west": "offline"} if late else {},
        })  # fmt: skip
    label = f"partial (3 of 4, west missed {len(late_in)} of {rounds} rounds)" if late_in else "complete"
    return {
        "version": 1, "run_id": "20260101-opacity-1", "digest": study.digest, "study": json.loads(study.canonical()),
        "label": label, "started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T10:03:20+00:00",
        "selected_round": rounds, "rounds": entries, "test": {s: scores(raw[s], 0.4, width) for s in raw},
        "test_missing": {}, "ingested": {"north": 254, "south": 211, "east": 69, "west": 163},
    }  # fmt: skip


@pytest.fixture(scope="module")
def raw() -> Raw:
    rng = np.random.default_rng(11)
    found = {
        s: draw(size, shift, 0.45, rng)
        for s, size, shift in (("north", 50, 2.6), ("south", 41, 2.0), ("east", 25, 3.1))
    }
    west = rng.random(33)
    return {**found, "west": (west, np.ones(33, dtype=np.int64))}


@pytest.fixture
def good(raw: Raw) -> dict[str, Any]:
    return results_of(study_of(), raw)


@pytest.fixture(scope="module")
def written(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(results_of(study_of(), raw), tmp_path_factory.mktemp("report")).parent


def metrics_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def test_auroc_pooled_and_per_site_is_that_of_scikit_learn_within_the_stated_bound(written: Path, raw: Raw) -> None:
    metrics = metrics_in(written)
    values = np.concatenate([raw[site][0] for site in SITES])
    labels = np.concatenate([raw[site][1] for site in SITES])
    pooled = metrics["pooled"]
    assert abs(pooled["auroc"] - roc_auc_score(labels, values)) <= pooled["auroc_bound"] < 0.01
    assert pooled["interval"][0] < pooled["auroc"] < pooled["interval"][1]
    assert (pooled["images"], pooled["positives"], pooled["negatives"]) == (149, labels.sum(), (labels == 0).sum())
    assert pooled["patients"] == sum(len(raw[site][0]) - len(raw[site][0]) // 5 for site in SITES)
    for site in ("north", "south", "east"):
        entry = metrics["sites"][site]
        assert abs(entry["auroc"] - roc_auc_score(raw[site][1], raw[site][0])) <= entry["auroc_bound"] + 1e-12
        assert (entry["images"], entry["positives"]) == (len(raw[site][0]), raw[site][1].sum())
    over_sites = np.mean([metrics["sites"][site]["auroc"] for site in ("north", "south", "east")])
    assert metrics["macro"] == {
        "auroc_over_sites": pytest.approx(over_sites),
        "sites": 3,
        "auroc_over_targets": pooled["auroc"],
    }


def test_a_site_with_one_class_has_no_auroc_and_says_why(written: Path) -> None:
    west = metrics_in(written)["sites"]["west"]
    assert (west["auroc"], west["interval"], west["reason"]) == (None, None, "one class")
    assert (west["positives"], west["negatives"]) == (33, 0)
    assert "not estimable: one class" in (written / "report.html").read_text()


def test_metrics_name_who_contributed_in_every_round_and_what_was_ingested(written: Path) -> None:
    metrics = metrics_in(written)
    assert metrics["contributors"] == {str(number): list(SITES) for number in range(1, 7)}
    assert metrics["ingested_images"] == 254 + 211 + 69 + 163
    assert metrics["ingested"]["east"] == 69
    assert (metrics["rounds"], metrics["selected_round"], metrics["seconds"], metrics["label"]) == (
        6,
        6,
        200.0,
        "complete",
    )


def test_history_weighs_losses_by_cases_and_images(good: dict[str, Any], tmp_path: Path) -> None:
    first = good["rounds"][0]
    first["train_loss"] = {"north": 1.0, "south": 0.5, "east": 0.25, "west": 0.0}
    first["validation"]["north"]["loss"], first["validation"]["south"]["loss"] = 0.9, 0.1
    report.write(good, tmp_path)
    entry = metrics_in(tmp_path)["history"][0]
    assert entry["train_loss"]["pooled"] == pytest.approx((120 * 1.0 + 90 * 0.5 + 40 * 0.25) / 320)
    assert entry["validation"]["pooled"]["loss"] == pytest.approx((30 * 0.9 + 40 * 0.1 + 50 * 0.69 + 60 * 0.71) / 180)
    assert entry["validation"]["sites"]["north"]["images"] == 30


def test_the_page_stands_alone_and_states_protection_label_and_digest(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "The coordinator saw each site's model update on its own" in page
    assert "No differential privacy was applied" in page
    assert "Complete: all 4 training sites contributed" in page
    assert "No site was missing" in page
    assert study_of().digest in page


def test_figures_are_pictures_with_something_on_them(written: Path) -> None:
    for name in ("loss", "auroc", "roc", "participation"):
        with Image.open(written / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 200
        assert 0.001 < (pixels < 200).mean() < 0.9, name


def test_the_same_results_give_the_same_bytes(good: dict[str, Any], written: Path, tmp_path: Path) -> None:
    report.write(good, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["auroc.png", "loss.png", "metrics.json", "participation.png", "report.html", "roc.png"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name


def test_a_partial_result_is_never_shown_as_a_whole(raw: Raw, tmp_path: Path) -> None:
    late = results_of(study_of(), raw, 6, (2, 3, 5))
    del late["test"]["west"]
    late["test_missing"] = {"west": "cohort-too-small"}
    page = report.write(late, tmp_path).read_text()
    assert "Partial (3 of 4, west missed 3 of 6 rounds)" in page
    assert "must not be reported as a result of the whole study" in page
    assert "Complete:" not in page
    assert "west did not contribute in rounds 2–3, 5: timeout" in page
    assert "west did not report on its validation split in rounds 2–3, 5: offline" in page
    assert "west did not report on its test split: cohort-too-small" in page
    assert "not estimable: no report" in page
    metrics = metrics_in(tmp_path)
    assert metrics["sites"]["west"]["reason"] == "no report"
    assert metrics["contributors"]["2"] == ["north", "south", "east"]
    assert [entry["missing"] for entry in metrics["history"]][:3] == [{}, {"west": "timeout"}, {"west": "timeout"}]


def test_complete_is_refused_when_a_site_was_missing_anywhere(raw: Raw, tmp_path: Path) -> None:
    late = results_of(study_of(), raw, 6, (2,)) | {"label": "complete"}
    untested = results_of(study_of(), raw)
    untested["test_missing"] = {"west": "timeout"}
    del untested["test"]["west"]
    for document in (late, untested):
        with pytest.raises(MessageMalformed, match="labelled complete, but not in every round and in the test: west"):
            report.write(document, tmp_path)
    assert not list(tmp_path.iterdir())


def test_several_targets_are_reported_each_and_as_their_mean(raw: Raw, tmp_path: Path) -> None:
    study = study_of("[opacity, effusion]", 1)
    results = results_of(study, raw, 1)
    flipped = {site: (values, 1 - labels) for site, (values, labels) in raw.items()}
    for site in SITES:
        first, second = scores(raw[site], 0.4)["counts"], scores(flipped[site], 0.4)["counts"]
        results["test"][site]["counts"] = [*first, *second]
    page = report.write(results, tmp_path).read_text()
    pooled = metrics_in(tmp_path)["pooled"]
    assert pooled["targets"]["effusion"]["auroc"] == pytest.approx(1 - pooled["targets"]["opacity"]["auroc"])
    assert pooled["auroc"] == pooled["targets"]["opacity"]["auroc"]
    assert pooled["macro_auroc"] == pytest.approx(0.5)
    assert "<h3>effusion</h3>" in page


def test_markup_in_titles_and_purposes_is_text(good: dict[str, Any], tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    good["study"]["title"] = good["study"]["purpose"] = attack
    good["digest"] = Study.from_canonical(report.canonical(good["study"])).digest
    good["label"] = "partial (<b>3</b> of 4)"  # not what run.py writes, but the pattern lets it through
    page = report.write(good, tmp_path).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>3</b>" not in page
    assert "&lt;script&gt;" in page


def test_many_sites_and_rounds_stay_readable() -> None:
    sites = [f"site{number}" for number in range(60)]
    curves = [figures.Curve(site, [(r, 0.5 + 0.001 * r) for r in range(1, 101)]) for site in sites]
    for png in (
        figures.per_round(curves, sites, "AUROC", 100),
        figures.participation({site: [0] * 900 for site in sites}, list(range(1, 901))),
    ):
        assert png.startswith(b"\x89PNG")
        assert len(png) < 500_000


def test_a_gap_of_one_round_among_hundreds_is_still_drawn() -> None:
    rounds = list(range(1, 1001))
    whole = figures.participation({"north": [0] * 1000, "south": [0] * 1000}, rounds)
    gap = figures.participation({"north": [0] * 1000, "south": [0] * 500 + [1] + [0] * 499}, rounds)
    assert whole != gap


def put(path: str, value: Any) -> Any:
    """An edit that sets the dotted `path` of a document to `value`."""

    def edit(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        section: Any = document
        for part in parents:
            section = section[int(part) if part.isdigit() else part]
        section[int(last) if last.isdigit() else last] = value

    return edit


def drop(key: str) -> Any:
    def edit(document: dict[str, Any]) -> None:
        del document[key]

    return edit


LIES = {
    "another version": put("version", 2),
    "a version that is true": put("version", True),
    "no rounds": put("rounds", []),
    "a missing key": drop("test"),
    "an unknown key": put("note", "hello"),
    "a script as run id": put("run_id", "<script>"),
    "a path as run id": put("run_id", "../../etc"),
    "a script as site": put("test.<script>alert(1)</script>", {"patients": 0, "images": 0, "loss": None, "counts": []}),
    "a site that the study does not name": put("ingested.harbour", 3),
    "a label of its own": put("label", "a great success"),
    "another digest": put("digest", "0" * 64),
    "an edited study": put("study.training.rounds", 7),
    "a study that is none": put("study", {"name": "x"}),
    "NaN loss": put("test.north.loss", float("nan")),
    "infinite seconds": put("rounds.0.seconds", float("inf")),
    "negative seconds": put("rounds.0.seconds", -1.0),
    "text for a number": put("rounds.0.seconds", "3"),
    "an object": put("rounds.0.seconds", object()),
    "counts of two targets": lambda d: d["test"]["north"].update(counts=d["test"]["north"]["counts"] * 2),
    "counts of one class": lambda d: d["test"]["north"].update(counts=[d["test"]["north"]["counts"][0][:1]]),
    "ragged counts": lambda d: d["test"]["north"]["counts"][0][0].pop(),
    "fewer bins": lambda d: [row.pop() for row in d["test"]["north"]["counts"][0]],
    "a negative count": put("test.north.counts.0.0.0", -1),
    "a fractional count": put("test.north.counts.0.0.0", 0.5),
    "a text count": put("test.north.counts.0.0.0", "1"),
    "a huge count": put("test.north.counts.0.0.0", 10**30),
    "more counts than images": put("test.north.images", 49),
    "no counts": put("test.north.counts", None),
    "images without a loss": put("test.north.loss", None),
    "more patients than images": put("test.north.patients", 51),
    "a round twice": lambda d: d["rounds"].append(d["rounds"][-1]),
    "a selected round that never was": put("selected_round", 77),
    "a contributor twice": lambda d: d["rounds"][0]["contributors"].append("north"),
    "nobody contributed": put("rounds.0.contributors", []),
    "missing and there": put("rounds.0.missing.north", "timeout"),
    "missing and validated": put("rounds.0.validation_missing.north", "timeout"),
    "a reason of a validation that is markup": put("rounds.1.validation_missing.west", "<b>"),
    "missing and tested": put("test_missing.north", "timeout"),
    "a reason that is markup": put("test_missing.west", "<b>"),
    "cases of somebody else": lambda d: d["rounds"][1]["contributors"].remove("west"),
    "losses of somebody else": put("rounds.1.train_loss.harbour", 3.0),
    "seconds of a stranger": put("rounds.1.site_seconds.harbour", 3.0),
    "validation of a stranger": lambda d: d["rounds"][0]["validation"].update(harbour=d["test"]["north"]),
    "an end before the start": put("finished", "2025-12-31T00:00:00+00:00"),
    "a time zone on one side only": put("finished", "2026-01-02T00:00:00"),
    "no time": put("started", "yesterday"),
    "a time that is a number": put("started", 5),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_document_that_lies_is_malformed_and_nothing_is_written(
    lie: str, good: dict[str, Any], tmp_path: Path
) -> None:
    altered = copy.deepcopy(good)
    LIES[lie](altered)
    folder = tmp_path / "report"
    with pytest.raises(MessageMalformed) as caught:
        report.write(altered, folder)
    assert str(caught.value).startswith("results: ")
    assert caught.value.remedy == report.REMEDY
    assert not folder.exists()


def test_a_document_that_is_no_object_is_malformed(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    hostile: list[Any] = [[], "x", None, {"version": deep}]
    for document in hostile:
        with pytest.raises(MessageMalformed):
            report.write(document, tmp_path)
