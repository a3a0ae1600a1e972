"""Reports: what metrics.json says against scikit-learn on raw scores, what the page shows, and documents that lie."""

import copy
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from fl_server import comparison, figures, matrix, measures, rehearsal_cli, report, summary
from fl_server.results import REMEDY, canonical
from models.metrics import ScoreHistogram
from models.study import Study, parse
from privacy.errors import MessageMalformed

SITES = ("north", "south", "east", "west")
BINS = 500
SIZES = {"north": 120, "south": 90, "east": 40, "west": 70}

STUDY = """
version: 1
name: opacity
title: Opacity on chest radiographs
purpose: Find opacities on frontal chest radiographs of four hospitals.
task: {targets: [opacity]}
training: {rounds: 6}
protection: masked
privacy: none
participation: {sites: [north, south, east, west], quorum: 3}
evaluation: {bins: 500}
"""

Raw = dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]


def study_of(**change: str) -> Study:
    """The study with each `key: value` of `change` in place of the line or entry that says otherwise."""
    text = STUDY
    for key, value in change.items():
        text, found = re.subn(rf"\b{key}: (\[[^]]*\]|[^,}}\n]*)", f"{key}: {value}", text)
        assert found == 1, key
    return parse(Study, text, "study.yaml")


PICTURES = ("loss", "auroc", "roc", "forest", "participation", "precision_recall", "reliability", "decision")
SILENT = {"bins": "500, site_figures: false"}


def draw(
    size: int, shift: float, share: float, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Scores in [0, 1] and labels of one site; `shift` separates the classes, `share` of the images are positive."""
    labels = (rng.random(size) < share).astype(np.int64)
    return 1 / (1 + np.exp(-(rng.normal(0, 1.2, size) + shift * (labels - 0.5)))), labels


def histogram(values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], targets: int = 1) -> ScoreHistogram:
    columns = np.repeat(values[:, None], targets, axis=1)
    return ScoreHistogram.of(columns, np.repeat(labels[:, None], targets, axis=1) * 1.0, np.ones(columns.shape), BINS)


def scores(raw: Raw, loss: float, targets: int = 1) -> dict[str, Any]:
    """The sum over the sites of `raw`, as it stands in a results document."""
    values, labels = (np.concatenate([raw[site][part] for site in raw]) for part in (0, 1))
    return {
        "sites": list(raw),
        "patients": len(values) - len(values) // 5,
        "images": len(values),
        "loss": loss,
        "counts": histogram(values, labels, targets).to_json(),
    }


def figure(values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """What a site says of its own test split, from its raw scores; nothing of classes below ten images."""
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < 10:
        return None
    auroc = float(roc_auc_score(labels, values))
    low, high = max(0.0, auroc - 0.07), min(1.0, auroc + 0.06)
    drawn = {"bootstrap_low": low, "bootstrap_high": high}
    return {
        "auroc": auroc,
        "low": low,
        "high": high,
        "negatives": len(labels) - positives,
        "positives": positives,
    } | drawn


def results_of(study: Study, raw: Raw, late_in: tuple[int, ...] = ()) -> dict[str, Any]:
    """A run, as its coordinator records it, in which the west is late in the rounds `late_in`."""
    rng = np.random.default_rng(5)
    rounds, width, entries = study.training.rounds, len(study.task.targets), []

    def validation(number: int, here: list[str]) -> dict[str, Any]:
        drawn = {site: draw(30 + 10 * place, 0.4 * number, 0.4, rng) for place, site in enumerate(here)}
        return scores(drawn, 0.7 - 0.05 * number, width)

    for number in range(1, rounds + 1):
        late = number in late_in
        here = [site for site in SITES if not (late and site == "west")]
        entries.append({
            "round": number, "attempt": 1, "seconds": 3.25, "contributors": here,
            "missing": {"west": "timeout"} if late else {}, "cases": sum(SIZES[site] for site in here),
            "train_loss": 0.72 - 0.06 * number, "site_seconds": {site: 2.5 + SIZES[site] / 100 for site in here},
            "clipped": 0, "scale": 20, "validation": validation(number, here),
            "validation_missing": {"west": "offline"} if late else {},
        })  # fmt: skip
    label = f"partial (3 of 4, west missed {len(late_in)} of {rounds} rounds)" if late_in else "complete"
    released = {site: [figure(*raw[site]) if study.evaluation.site_figures else None] * width for site in raw}
    return {
        "version": 3, "run_id": "20260101-opacity-1", "digest": study.digest, "study": json.loads(study.canonical()),
        "label": label, "started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T10:03:20+00:00",
        "selected_round": rounds, "initial": validation(0, list(SITES)), "rounds": entries,
        "test": scores(raw, 0.4, width), "test_missing": {}, "figures": released, "ingested": 697,
        "groups": [], "grades": [],
    }  # fmt: skip


def raw_scores() -> Raw:
    """Raw test scores of four sites, of which the west has positive images only."""
    rng = np.random.default_rng(11)
    found = {
        s: draw(size, shift, 0.45, rng)
        for s, size, shift in (("north", 50, 2.6), ("south", 41, 2.0), ("east", 30, 3.1))
    }
    return {**found, "west": (rng.random(33), np.ones(33, dtype=np.int64))}


@pytest.fixture(scope="module")
def raw() -> Raw:
    return raw_scores()


@pytest.fixture
def good(raw: Raw) -> dict[str, Any]:
    return results_of(study_of(), raw)


@pytest.fixture(scope="module")
def written(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(results_of(study_of(), raw), tmp_path_factory.mktemp("report")).parent


def metrics_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def words_of(page: Path | str) -> str:
    """What a reader sees: the page without markup and with single blanks."""
    text = page if isinstance(page, str) else page.read_text()
    return re.sub(r"[ \n]+", " ", re.sub(r"<[^>]*>", " ", text[text.index("<body>") :]))


def test_the_pooled_auroc_is_that_of_scikit_learn_within_the_stated_bound(written: Path, raw: Raw) -> None:
    metrics = metrics_in(written)
    values = np.concatenate([raw[site][0] for site in SITES])
    labels = np.concatenate([raw[site][1] for site in SITES])
    pooled = metrics["pooled"]
    assert abs(pooled["auroc"] - roc_auc_score(labels, values)) <= pooled["auroc_bound"] < 0.01
    assert pooled["interval"][0] < pooled["auroc"] < pooled["interval"][1]
    assert (pooled["images"], pooled["positives"], pooled["negatives"]) == (154, labels.sum(), (labels == 0).sum())
    assert (pooled["patients"], pooled["sites"], metrics["version"]) == (154 - 30, list(SITES), 3)
    assert metrics["ingested_images"] == 697


def test_rows_of_sites_are_what_the_sites_released(written: Path, raw: Raw) -> None:
    metrics = metrics_in(written)
    for site in ("north", "south", "east"):
        entry, (values, labels) = metrics["sites"][site], raw[site]
        assert entry["auroc"] == roc_auc_score(labels, values)
        assert (entry["positives"], entry["negatives"]) == (labels.sum(), (labels == 0).sum())
        assert entry["interval"][0] < entry["auroc"] < entry["interval"][1]
        assert "why" not in entry
    over_sites = np.mean([roc_auc_score(raw[s][1], raw[s][0]) for s in ("north", "south", "east")])
    assert metrics["macro"]["auroc_over_sites"] == pytest.approx(over_sites)
    assert (metrics["macro"]["sites"], metrics["macro"]["auroc_over_targets"]) == (3, metrics["pooled"]["auroc"])


def test_nothing_is_said_of_a_site_that_released_nothing(written: Path) -> None:
    west = metrics_in(written)["sites"]["west"]
    nothing = dict.fromkeys(("auroc", "interval", "bootstrap_interval", "negatives", "positives"))
    why = {"why": "not released: fewer than 10 images or 2 patients of a class"}
    assert west == nothing | why | {"targets": {"opacity": nothing | why}, "testing": "internal"}
    assert "west not released: fewer than 10 images or 2 patients of a class" in words_of(written / "report.html")


def test_a_study_without_figures_of_sites_shows_none(raw: Raw, tmp_path: Path) -> None:
    results = results_of(study_of(**SILENT), raw)
    said = words_of(report.write(results, tmp_path))
    metrics = metrics_in(tmp_path)
    assert {entry["why"] for entry in metrics["sites"].values()} == {"not released by this study"}
    assert metrics["macro"]["auroc_over_sites"] is None
    assert said.count("not released by this study") == 4
    assert "no site released any figure of its own" in said
    assert "Mean of the AUROC" not in said
    assert measures.measure(report.check(results | {"figures": {}})) == metrics


def test_metrics_name_who_contributed_in_every_round(written: Path) -> None:
    metrics = metrics_in(written)
    assert metrics["contributors"] == {str(number): list(SITES) for number in range(1, 7)}
    assert (metrics["rounds"], metrics["selected_round"], metrics["seconds"]) == (6, 6, 200.0)
    assert (metrics["label"], metrics["protection"]) == ("complete", "masked")


def test_history_begins_with_the_initial_model_and_says_what_was_summed(good: dict[str, Any], written: Path) -> None:
    metrics = metrics_in(written)
    first = metrics["history"][0]
    assert (first["round"], first["attempt"], first["clipped"], first["scale"]) == (1, 1, 0, 20)
    assert (first["cases"], first["train_loss"]) == (320, 0.72 - 0.06)
    given = [good["initial"], *(entry["validation"] for entry in good["rounds"])]
    for brief, document in zip(
        [metrics["initial"], *(e["validation"] for e in metrics["history"])], given, strict=True
    ):
        assert (brief["loss"], brief["images"], brief["sites"]) == (document["loss"], 180, list(SITES))
        negative, positive = (np.repeat(np.arange(BINS), counts) for counts in document["counts"][0])
        truth = np.repeat([0, 1], [len(negative), len(positive)])
        assert brief["auroc"] == pytest.approx(roc_auc_score(truth, np.concatenate([negative, positive])))


def test_learning_curves_start_at_round_0_or_where_something_is_known(good: dict[str, Any]) -> None:
    good["rounds"][2]["validation"] = None
    metrics = measures.measure(report.check(good))
    points = report._curve(metrics, "loss").points
    assert [x for x, _ in points] == [0, 1, 2, 3, 4, 5, 6]
    assert [y for _, y in points if not np.isnan(y)] == pytest.approx([0.7, 0.65, 0.6, 0.5, 0.45, 0.4])
    assert np.isnan(points[3][1])
    good["initial"] = None
    points = report._curve(measures.measure(report.check(good)), "loss").points
    assert points[0] == (1, pytest.approx(0.65))


def test_the_page_stands_alone_and_states_label_and_digest(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "No differential privacy was applied" in words_of(page)
    assert "Complete: all 4 training sites contributed" in page
    assert "No site was missing" in page
    assert "learned from 320 training cases of 4 sites together" in words_of(page)
    assert "Clipped values" not in page
    assert "A new attempt" not in page
    assert study_of().digest in page


def test_counts_that_sites_released_in_tens_are_marked_as_the_least_and_the_pooled_ones_are_exact(
    written: Path,
) -> None:
    page = (written / "report.html").read_text()
    pooled = re.findall(r'<tr class="pooled">.*?</tr>', page, re.DOTALL)
    assert pooled and not any("≥" in row for row in pooled)
    figures = json.loads((written / "metrics.json").read_text())["sites"]
    released = [row["positives"] for row in figures.values() if row["positives"] is not None]
    assert released and all(f'<td class="n">≥ {count}</td>' in page for count in released)


SEEN = {
    "masked": "The coordinator saw sums over the sites only",
    "sealed": "The coordinator, and nobody on the way, saw each site's own update",
    "plain": "The coordinator saw each site's own update",
}


@pytest.mark.parametrize("protection", SEEN)
def test_the_page_says_what_the_coordinator_saw_and_nothing_else(protection: str, raw: Raw, tmp_path: Path) -> None:
    said = words_of(report.write(results_of(study_of(protection=protection), raw), tmp_path))
    assert f"Protection: {protection}." in said
    assert [sentence in said for sentence in SEEN.values()] == [kind == protection for kind in SEEN]


def test_clipped_values_and_new_attempts_are_told_with_their_rounds(good: dict[str, Any], tmp_path: Path) -> None:
    for entry in good["rounds"]:
        entry["attempt"] = 1 + (entry["round"] >= 3) + (entry["round"] >= 5)
        entry["clipped"] = {2: 1200, 3: 34}.get(entry["round"], 0)
    said = words_of(report.write(good, tmp_path))
    assert "1\u202f234 values of updates in rounds 2–3 were too large for the fixed-point encoding of 32 bits" in said
    assert "A new attempt was needed in rounds 3, 5:" in said


def test_keys_of_sites_are_in_the_canonical_form_and_no_setting(raw: Raw, tmp_path: Path) -> None:
    keys = {site: f"02{place}" + "a" * 63 for place, site in enumerate(SITES)}
    page = report.write(results_of(study_of().with_keys(keys, "b" * 64), raw), tmp_path).read_text()
    assert all(page.count(key) == 1 for key in [*keys.values(), "b" * 64])
    assert "roster" not in page[: page.index("<details>")]


def test_figures_are_pictures_with_something_on_them(written: Path) -> None:
    for name in PICTURES:
        with Image.open(written / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 200
        assert 0.001 < (pixels < 200).mean() < 0.9, name


def test_the_same_results_give_the_same_bytes(good: dict[str, Any], written: Path, tmp_path: Path) -> None:
    report.write(good, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    pictures = [f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")]
    assert names == sorted([*pictures, "metrics.json", "report.html"])
    for name in names:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name


def test_a_partial_result_is_never_shown_as_a_whole(raw: Raw, tmp_path: Path) -> None:
    late = results_of(study_of(), raw, (2, 3, 5))
    late["test"] = scores({site: raw[site] for site in SITES[:3]}, 0.4)
    late["test_missing"] = {"west": "cohort-too-small"}
    del late["figures"]["west"]
    page = report.write(late, tmp_path).read_text()
    assert "Partial (3 of 4, west missed 3 of 6 rounds)" in page
    assert "must not be reported as a result of the whole study" in page
    assert "Complete:" not in page
    assert "west did not contribute in rounds 2–3, 5: timeout" in page
    assert "west did not report on its validation split in rounds 2–3, 5: offline" in page
    assert "west did not report on its test split: cohort-too-small" in page
    assert "held-out test split of 3 sites together" in words_of(page)
    assert "3 of 4 sites" in words_of(page)
    assert "all sites" not in words_of(page).lower()
    assert "west not in the test result" in words_of(page)
    assert "west trains 3 of 6 3.2 no" in words_of(page)
    metrics = metrics_in(tmp_path)
    assert metrics["sites"]["west"]["why"] == "not in the test result"
    assert metrics["contributors"]["2"] == ["north", "south", "east"]
    assert [entry["missing"] for entry in metrics["history"]][:3] == [{}, {"west": "timeout"}, {"west": "timeout"}]


def test_a_run_whose_test_was_never_summed_has_a_page_without_figures(good: dict[str, Any], tmp_path: Path) -> None:
    good |= {"test": None, "test_missing": dict.fromkeys(SITES, "timeout"), "figures": {}, "ingested": 0}
    good |= {"label": "partial (0 of 4, nobody in the test)"}
    said = words_of(report.write(good, tmp_path))
    assert "not estimable: no test result" in said
    pooled = metrics_in(tmp_path)["pooled"]
    assert (pooled["auroc"], pooled["images"], pooled["sites"], pooled["why"]) == (None, 0, [], "no test result")


def test_a_test_of_one_class_has_no_auroc_and_says_why(good: dict[str, Any], raw: Raw, tmp_path: Path) -> None:
    good["test"] = scores({site: (raw[site][0], np.ones_like(raw[site][1])) for site in SITES}, 0.4)
    good["figures"] = {site: [None] for site in SITES}
    said = words_of(report.write(good, tmp_path))
    assert "not estimable: one class" in said
    assert metrics_in(tmp_path)["pooled"]["why"] == "one class"


def test_complete_is_refused_when_a_site_was_missing_anywhere(raw: Raw, tmp_path: Path) -> None:
    late = results_of(study_of(), raw, (2,)) | {"label": "complete"}
    untested = results_of(study_of(), raw)
    untested["test"]["sites"].remove("west")
    untested["test_missing"] = {"west": "timeout"}
    for document in (late, untested):
        with pytest.raises(MessageMalformed, match="labelled complete, but not in every round and in the test: west"):
            report.write(document, tmp_path)
    assert not list(tmp_path.iterdir())


def test_several_targets_are_reported_each_and_as_their_mean(raw: Raw, tmp_path: Path) -> None:
    results = results_of(study_of(targets="[opacity, effusion]", rounds="1"), raw)
    flipped: Raw = {site: (values, 1 - labels) for site, (values, labels) in raw.items()}
    results["test"]["counts"] = [*scores(raw, 0.4)["counts"], *scores(flipped, 0.4)["counts"]]
    results["figures"] = {site: [figure(*raw[site]), figure(*flipped[site])] for site in SITES}
    results["figures"]["south"][1] = None
    page = report.write(results, tmp_path).read_text()
    metrics = metrics_in(tmp_path)
    pooled = metrics["pooled"]
    assert pooled["targets"]["effusion"]["auroc"] == pytest.approx(1 - pooled["targets"]["opacity"]["auroc"])
    assert pooled["auroc"] == pooled["targets"]["opacity"]["auroc"]
    assert pooled["macro_auroc"] == pytest.approx(0.5)
    north = metrics["sites"]["north"]["targets"]
    assert north["effusion"]["auroc"] == pytest.approx(1 - north["opacity"]["auroc"])
    assert metrics["sites"]["south"]["targets"]["effusion"]["why"].startswith("not released")
    assert "<h3>effusion</h3>" in page


def test_markup_in_titles_and_purposes_is_text(good: dict[str, Any], tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    good["study"]["title"] = good["study"]["purpose"] = attack
    good["digest"] = Study.from_canonical(canonical(good["study"])).digest
    good["label"] = "partial (<b>3</b> of 4)"  # not what run.py writes, but the pattern lets it through
    page = report.write(good, tmp_path).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>3</b>" not in page
    assert "&lt;script&gt;" in page


def test_many_sites_and_rounds_stay_readable() -> None:
    estimates = [figures.Estimate(f"site{number}", 0.8, 0.7, 0.9) for number in range(300)]
    curves = [figures.Curve("validation", [(r, 0.5 + 0.001 * r) for r in range(1, 101)])]
    for figure in (
        figures.per_round(curves, "AUROC", 100),
        figures.forest({"opacity": estimates}),
        figures.participation({f"site{number}": [0] * 900 for number in range(60)}, list(range(1, 901))),
    ):
        png = figures.png(figure)
        assert png.startswith(b"\x89PNG")
        assert len(png) < 500_000


def test_a_forest_shows_every_estimate_and_no_other() -> None:
    rows = [figures.Estimate(name, 0.8, 0.7, 0.9) for name in ("all sites", "north", "south")]
    nothing = figures.Estimate("south", None, None, None)
    pictures = [
        figures.forest({"opacity": rows}),
        figures.forest({"opacity": [*rows[:2], nothing]}),
        figures.forest({"opacity": [*rows[:2], figures.Estimate("south", 0.81, 0.7, 0.9)]}),
        figures.forest({"opacity": [*rows[:2], figures.Estimate("south", 0.8, 0.7, 0.91)]}),
        figures.forest({"opacity": [figures.Estimate("all sites", None, None, None), nothing]}),
        figures.forest({"opacity": [figures.Estimate("all sites", 0.8, None, None), nothing]}),
    ]
    assert len({figures.png(picture) for picture in pictures}) == len(pictures)


@pytest.mark.parametrize("otherwise", [0, 2])
def test_a_gap_of_one_round_among_hundreds_is_still_drawn(otherwise: int) -> None:
    rounds = list(range(1, 1001))
    row = [otherwise] * 1000
    whole = figures.participation({"north": [0] * 1000, "south": row}, rounds)
    gap = figures.participation({"north": [0] * 1000, "south": [*row[:500], 1, *row[501:]]}, rounds)
    assert figures.png(whole) != figures.png(gap)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was printed so far; not a terminal, as in a log file."""
    paper = io.StringIO()
    for place in (rehearsal_cli, summary):
        monkeypatch.setattr(place, "console", Console(file=paper, width=100))
    return paper.getvalue


def test_the_screen_shows_the_figures_and_why_some_are_not_there(written: Path, screen: Callable[[], str]) -> None:
    summary.say(written / "report.html", as_json=False)
    rows = {line.split()[0]: line.split() for line in screen().splitlines()[2:]}
    pooled = metrics_in(written)["pooled"]
    assert "154 images of 124 patients, complete" in screen()
    assert rows["pooled"][1] == f"{pooled['auroc']:.3f}"
    assert rows["pooled"][-2:] == [str(pooled["positives"]), str(pooled["negatives"])]
    assert " ".join(rows["west"]) == "west - not released: fewer than 10 images or 2 patients of a class - -"


def test_a_row_of_the_comparison_has_what_each_site_released_and_the_whole(
    good: dict[str, Any], raw: Raw, screen: Callable[[], str]
) -> None:
    study = report.check(good).study
    target = study.task.targets[0]
    federated = comparison.model_of("federated", None, good, study)
    tested = federated.results[target]
    assert list(tested.sites) == study.all_sites
    assert tested.sites["north"] is not None and tested.pooled is not None
    assert tested.sites["north"].auroc == roc_auc_score(raw["north"][1], raw["north"][0])
    assert tested.sites["west"] is None
    pooled = roc_auc_score(*(np.concatenate([raw[site][part] for site in SITES]) for part in (1, 0)))
    assert tested.pooled.auroc == pytest.approx(pooled, abs=0.01)
    silent = comparison.model_of("local", "north", good | {"test": None, "figures": {}}, study)
    assert silent.results[target].pooled is None and set(silent.results[target].sites.values()) == {None}
    found = matrix.Comparison(
        study="s", digest="0" * 64, targets=study.task.targets, sites=study.all_sites, models=[federated, silent]
    )
    rehearsal_cli._say_matrix(found, Path("comparison.png"))
    lines = [line.split() for line in screen().splitlines()]
    assert lines[2][: len(study.all_sites) + 1] == [
        "federated", *("-" if cell is None else f"{cell.auroc:.3f}" for cell in tested.sites.values())
    ]  # fmt: skip
    assert lines[3] == ["north", "alone", *["-"] * (len(study.all_sites) + 1)]


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


def more(key: str, by: int) -> Any:
    """An edit that raises the north's released count; 33 images of the west are positive, and it released nothing."""

    def edit(document: dict[str, Any]) -> None:
        document["figures"]["north"][0][key] += by

    return edit


# What is wrong -> (an edit that makes it so, how the error begins).
LIES = {
    "the version before": (put("version", 1), "version: Input should be greater"),
    "a version to come": (put("version", 4), "version: Input should be less"),
    "a version that is no whole number": (put("version", 2.0), "version: Input should be a"),
    "no rounds": (put("rounds", []), "rounds were committed in a study without training, or none in one with it"),
    "a missing key": (drop("test"), "test: Field required"),
    "a key of a round that is missing": (lambda d: d["rounds"][0].pop("clipped"), "rounds.0.clipped: Field required"),
    "an unknown key": (put("note", "hello"), "note: Extra inputs are not"),
    "an unknown key of a sum": (put("test.note", "hello"), "test.note: Extra inputs are not"),
    "a script as run id": (put("run_id", "<script>"), "run_id: String should match pattern"),
    "a path as run id": (put("run_id", "../../etc"), "run_id: String should match pattern"),
    "a script as site": (put("test.sites.0", "<script>alert(1)</script>"), "test.sites.0: String should match pattern"),
    "a site that the study does not name": (put("test.sites.0", "harbour"), "test names a site that the study"),
    "a stranger missing": (put("test_missing.harbour", "timeout"), "test names a site that the study"),
    "a label of its own": (put("label", "a great success"), "label: String should match pattern"),
    "another digest": (put("digest", "0" * 64), "the digest is not that of the"),
    "an edited study": (put("study.training.rounds", 7), "the digest is not that of the"),
    "a study that is none": (put("study", {"name": "x"}), "this is no study: Field required"),
    "NaN loss": (put("test.loss", float("nan")), "Out of range float values are not"),
    "infinite seconds": (put("rounds.0.seconds", float("inf")), "Out of range float values are not"),
    "negative seconds": (put("rounds.0.seconds", -1.0), "rounds.0.seconds: Input should be greater"),
    "text for a number": (put("rounds.0.seconds", "3"), "rounds.0.seconds: Input should be a"),
    "an object": (put("rounds.0.seconds", object()), "Object of type object is not JSON"),
    "counts of two targets": (lambda d: d["test"].update(counts=d["test"]["counts"] * 2), "test: counts are (2, 2,"),
    "counts of one class": (
        lambda d: d["test"].update(counts=[d["test"]["counts"][0][:1]]),
        "test: a score histogram has",
    ),
    "ragged counts": (lambda d: d["test"]["counts"][0][0].pop(), "test: a score histogram must"),
    "fewer bins": (lambda d: [row.pop() for row in d["test"]["counts"][0]], "test: counts are (1, 2,"),
    "a negative count": (put("test.counts.0.0.0", -1), "test: a score histogram holds"),
    "a fractional count": (put("test.counts.0.0.0", 0.5), "test: a score histogram holds"),
    "a text count": (put("test.counts.0.0.0", "1"), "test: a score histogram holds"),
    "a huge count": (put("test.counts.0.0.0", 10**30), "test: a score histogram holds"),
    "more counts than images": (put("test.images", 153), "test: the histogram counts more"),
    "no counts": (put("test.counts", None), "test: a score histogram has"),
    "images without a loss": (put("test.loss", None), "test: loss, patients and images"),
    "more patients than images": (put("test.patients", 155), "test: loss, patients and images"),
    "bad counts of the initial model": (put("initial.counts.0.0.0", -1), "initial: a score histogram holds"),
    "bad counts of a round": (
        put("rounds.3.validation.counts.0.1.0", -1),
        "round 4, validation: a score histogram holds",
    ),
    "a sum of nobody": (put("initial.sites", []), "initial.sites: List should have at"),
    "a site twice in a sum": (
        put("initial.sites", ["north", "north", "south", "east"]),
        "a site stands twice in initial, or",
    ),
    "a masked sum of two": (put("initial.sites", ["north", "south"]), "initial is of 2 sites, and a"),
    "a masked validation of one": (put("rounds.2.validation.sites", ["north"]), "round 3: validation is of 1 sites,"),
    "figures of a site that was not tested": (
        lambda d: (d["test"]["sites"].remove("west"), d.update(label="partial (x)")),
        "figures: a site that is",
    ),
    "figures of a stranger": (put("figures.harbour", [None]), "figures: a site that is"),
    "figures of nobody's test": (
        lambda d: d.update(test=None, ingested=0, label="partial (x)"),
        "figures: a site that is",
    ),
    "two figures for one target": (put("figures.north", [None, None]), "figures: north: 2 figures for"),
    "no figure for one target": (put("figures.west", []), "figures: west: 0 figures for"),
    "an AUROC outside of its interval": (put("figures.north.0.high", 0.5), "figures: north: the AUROC does"),
    "an interval that begins above": (put("figures.north.0.low", 0.999), "figures: north: the AUROC does"),
    "an AUROC above one": (put("figures.north.0.auroc", 1.2), "figures.north.0.auroc: Input should be less"),
    "an AUROC that is NaN": (put("figures.north.0.auroc", float("nan")), "Out of range float values are not"),
    "a figure of nine images": (
        put("figures.north.0.positives", 9),
        "figures.north.0.positives: Input should be greater",
    ),
    "a figure of nine negatives": (
        put("figures.north.0.negatives", 9),
        "figures.north.0.negatives: Input should be greater",
    ),
    "one negative more at the sites than in all": (more("negatives", 1), "figures: opacity: the sites count"),
    "one positive more at the sites than in all": (more("positives", 34), "figures: opacity: the sites count"),
    "an unknown key of a figure": (put("figures.north.0.images", 50), "figures.north.0.images: Extra inputs are not"),
    "images of a test that never was": (
        lambda d: d.update(test=None, figures={}, label="partial (x)"),
        "ingested counts the images of a test",
    ),
    "archives of each site": (put("ingested", {"north": 254}), "ingested: Input should be a"),
    "a round twice": (lambda d: d["rounds"].append(d["rounds"][-1]), "rounds do not follow each other"),
    "an attempt that goes back": (put("rounds.0.attempt", 2), "a later round has a smaller attempt"),
    "no attempt": (put("rounds.0.attempt", 0), "rounds.0.attempt: Input should be greater"),
    "a selected round that never was": (put("selected_round", 77), "selected_round 77 is not among the rounds"),
    "the initial model selected": (put("selected_round", 0), "selected_round 0 is not among the rounds"),
    "a contributor twice": (
        lambda d: d["rounds"][0]["contributors"].append("north"),
        "round 1: contributors are not distinct training",
    ),
    "a contributor that is a stranger": (
        put("rounds.0.contributors.0", "harbour"),
        "round 1: contributors are not distinct training",
    ),
    "nobody contributed": (put("rounds.0.contributors", []), "rounds.0.contributors: List should have at"),
    "missing and there": (put("rounds.0.missing.north", "timeout"), "round 1: a missing site also contributed,"),
    "missing and validated": (put("rounds.0.validation_missing.north", "timeout"), "round 1: a site stands twice in"),
    "a reason of a validation that is markup": (
        put("rounds.1.validation_missing.west", "<b>"),
        "rounds.1.validation_missing.west: String should match pattern",
    ),
    "missing and tested": (put("test_missing.north", "timeout"), "a site stands twice in test, or"),
    "a reason that is markup": (put("test_missing.west", "<b>"), "test_missing.west: String should match pattern"),
    "cases of each site": (put("rounds.1.cases", dict(SIZES)), "rounds.1.cases: Input should be a"),
    "cases without a loss": (put("rounds.1.train_loss", None), "round 2: cases and train_loss do not"),
    "a loss without cases": (put("rounds.1.cases", 0), "round 2: cases and train_loss do not"),
    "seconds of a stranger": (put("rounds.1.site_seconds.harbour", 3.0), "round 2: site_seconds name a site that"),
    "validation of a stranger": (
        put("rounds.0.validation.sites.0", "harbour"),
        "round 1: validation names a site that",
    ),
    "a stranger missing in a validation": (
        put("rounds.0.validation_missing.harbour", "timeout"),
        "round 1: validation names a site that",
    ),
    "a negative number of clipped values": (put("rounds.1.clipped", -1), "rounds.1.clipped: Input should be greater"),
    "a scale out of this world": (put("rounds.1.scale", 10**6), "rounds.1.scale: Input should be less"),
    "an end before the start": (put("finished", "2025-12-31T00:00:00+00:00"), "finished lies before started"),
    "a time zone on one side only": (put("finished", "2026-01-02T00:00:00"), "finished lies before started"),
    "no time": (put("started", "yesterday"), "started: Input should be a"),
    "a time that is a number": (put("started", 5), "started: Input should be a"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_document_that_lies_is_malformed_and_nothing_is_written(
    lie: str, good: dict[str, Any], tmp_path: Path
) -> None:
    altered = copy.deepcopy(good)
    edit, said = LIES[lie]
    edit(altered)
    folder = tmp_path / "report"
    with pytest.raises(MessageMalformed) as caught:
        report.write(altered, folder)
    assert str(caught.value).startswith(f"results: {said}")
    assert caught.value.remedy == REMEDY
    assert not folder.exists()


def test_a_document_that_is_no_object_is_malformed(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    hostile: list[Any] = [[], "x", None, {"version": deep}]
    for document in hostile:
        with pytest.raises(MessageMalformed):
            report.write(document, tmp_path)


def test_a_round_below_the_quorum_is_malformed(raw: Raw) -> None:
    late = results_of(study_of(quorum="4"), raw, (2,))
    with pytest.raises(MessageMalformed, match="round 2: 3 contributors are fewer than the quorum of 4"):
        report.check(late)


def test_a_figure_that_the_study_does_not_release_is_malformed(raw: Raw) -> None:
    results = results_of(study_of(**SILENT), raw)
    results["figures"] = results_of(study_of(), raw)["figures"]
    with pytest.raises(MessageMalformed, match="figures: north: a figure was released, and the study releases none"):
        report.check(results)


def test_a_plain_sum_may_be_of_two_sites(raw: Raw) -> None:
    results = results_of(study_of(protection="plain"), raw)
    results["initial"]["sites"] = ["north", "south"]
    report.check(results)
