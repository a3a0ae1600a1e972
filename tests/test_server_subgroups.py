"""What a report says of use and of groups: fixed thresholds, calibration, subgroups, grades, and documents that lie."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, cohen_kappa_score, roc_auc_score
from test_server_report import SITES, Raw, histogram, metrics_in, put, raw_scores, results_of, study_of, words_of

from fl_server import matrix, report
from privacy.errors import MessageMalformed


@pytest.fixture(scope="module")
def raw() -> Raw:
    return raw_scores()


def divided(raw: Raw, protection: str = "sealed") -> dict[str, Any]:
    """The run, with the images of north as women and those of south as men, told by one site each."""
    results = results_of(study_of(bins="500, subgroups: [sex, race]", protection=protection), raw)
    results["groups"] = [
        {"division": "sex", "name": name, "sites": [1], "counts": histogram(*raw[site]).to_json()}
        for name, site in (("F", "north"), ("M", "south"))
    ]
    return results


def test_a_group_has_the_figures_of_its_images_and_stands_beside_the_largest(raw: Raw, tmp_path: Path) -> None:
    """Oracle: scikit-learn and loops over raw scores; rates at the threshold that the validation split gave."""
    results = divided(raw)
    said = words_of(report.write(results, tmp_path))
    found = metrics_in(tmp_path)["subgroups"]["opacity"]["sex"]
    rates = {}
    threshold = metrics_in(tmp_path)["pooled"]["operating"]["youden"]["threshold"]
    for name, site in (("F", "north"), ("M", "south")):
        values, labels = raw[site]
        entry = found["groups"][name]
        assert entry["auroc"] == pytest.approx(roc_auc_score(labels, values), abs=entry["auroc_bound"] + 1e-9)
        rates[name] = [(values[labels == label] >= threshold).mean() for label in (1, 0)]
        at = entry["operating"]["youden"]
        assert at["sensitivity"]["value"] == pytest.approx(rates[name][0])
        assert at["specificity"]["value"] == pytest.approx(1 - rates[name][1])
    assert found["reference"] == "F" and found["groups"]["F"]["operating"]["youden"]["eod"] is None
    at = found["groups"]["M"]["operating"]["youden"]
    apart = [rates["M"][n] - rates["F"][n] for n in (0, 1)]
    assert at["eod"] == pytest.approx(apart[0]) and at["aaod"] == pytest.approx((abs(apart[0]) + abs(apart[1])) / 2)
    gap = found["gap"]
    assert gap["auroc"] == pytest.approx(abs(found["groups"]["F"]["auroc"] - found["groups"]["M"]["auroc"]))
    assert gap["interval"][0] < gap["auroc"] < gap["interval"][1]
    assert found["groups"]["O"] == dict.fromkeys(("positives", "negatives", "auroc", "interval", "auroc_bound")) | {
        "sites": 0,
        "why": "no site had 10 patients and 10 images of each class to tell of",
    }
    assert "not estimable (1 of 3 groups: O)" in said and "not estimable (7 of 7 groups" in said
    assert (tmp_path / "subgroups.png").exists()


def test_rates_at_fixed_thresholds_are_those_of_the_raw_scores(raw: Raw, tmp_path: Path) -> None:
    report.write(results_of(study_of(), raw), tmp_path)
    values, labels = (np.concatenate([raw[site][part] for site in SITES]) for part in (0, 1))
    pooled = metrics_in(tmp_path)["pooled"]
    assert list(pooled["operating"]) == ["youden", "sensitivity_90", "sensitivity_95", "specificity_90"]
    for at in pooled["operating"].values():
        called = values >= at["threshold"]
        assert (at["true_positive"], at["false_positive"]) == (called[labels == 1].sum(), called[labels == 0].sum())
        assert at["ppv"]["value"] == pytest.approx(labels[called].mean())
        assert at["ppv"]["interval"][0] < at["ppv"]["value"] < at["ppv"]["interval"][1]
    assert pooled["average_precision"] == pytest.approx(
        average_precision_score(labels, values), abs=pooled["average_precision_bound"] + 1e-9
    )
    brier = brier_score_loss(labels, values)
    assert pooled["calibration"]["brier"] == pytest.approx(brier, abs=pooled["calibration"]["brier_bound"] + 1e-9)


def test_without_a_validation_result_no_threshold_is_made_up(raw: Raw, tmp_path: Path) -> None:
    good = results_of(study_of(), raw)
    good["rounds"][-1]["validation"] = None
    said = words_of(report.write(good, tmp_path))
    assert "Not estimable: no validation result with both classes to fix a threshold on." in said


def test_grades_are_told_with_kappa_over_the_whole_scale(raw: Raw, tmp_path: Path) -> None:
    plan = study_of(targets="[mild, severe], relation: ordered", rounds="1")
    results = results_of(plan, raw)
    table = [[40, 8, 0], [6, 30, 9], [1, 5, 20]]
    results["grades"] = table
    truth, called = (np.repeat(part.ravel(), np.ravel(table)) for part in np.indices((3, 3)))
    said = words_of(report.write(results, tmp_path))
    found = metrics_in(tmp_path)["grades"]
    assert found["kappa"] == pytest.approx(cohen_kappa_score(truth, called, labels=[0, 1, 2], weights="quadratic"))
    assert found["mae"] == pytest.approx(np.abs(truth - called).mean())
    assert found["interval"][0] < found["kappa"] < found["interval"][1]
    assert f"Quadratic-weighted kappa {found['kappa']:.3f}" in said


def test_other_models_of_the_study_stand_beside_it_in_the_order_of_the_comparison(raw: Raw, tmp_path: Path) -> None:
    here = {site: matrix.Cell(auroc=0.5 + n / 8, low=0.4, high=0.95) for n, site in enumerate(SITES[:3])}
    tested = matrix.Tested(sites={**here, "west": None}, pooled=None)
    models = [
        matrix.Model(kind="federated", site=None, note="", results={"opacity": tested}),
        matrix.Model(kind="centralised", site=None, note="<b>all</b>", results={"opacity": tested}),
    ]
    study = study_of()
    found = matrix.Comparison(
        study=study.name, digest=study.digest, targets=["opacity"], sites=list(SITES), models=models
    )
    page = report.write(results_of(study, raw), tmp_path, found).read_text()
    said = words_of(page)
    assert "federated 0.500 0.625 0.750 - - centralised 0.500" in said
    assert "<b>all" not in page and page.count("data:image/png;base64,") == 9


def test_a_masked_run_keeps_no_group_of_fewer_than_three_sites(raw: Raw, tmp_path: Path) -> None:
    with pytest.raises(MessageMalformed, match="fewer than the 3 sites of a masked sum"):
        report.write(divided(raw, "masked"), tmp_path)
    results = divided(raw, "masked") | {"groups": []}
    said = words_of(report.write(results, tmp_path))
    assert "fewer than 3 sites had 10 patients and 10 images of each class to tell of" in said
    assert "no group of fewer than three sites is kept" in said


DIVIDED_LIES: dict[str, tuple[Any, str]] = {
    "a group of another division": (put("groups.0.division", "age"), "is no group of the study"),
    "a group that does not exist": (put("groups.0.name", "X"), "is no group of the study"),
    "a group twice": (lambda d: d["groups"].append(d["groups"][0]), "stands twice"),
    "more sites than were tested": (put("groups.0.sites", [5]), "more sites than were tested"),
    "sites of another number of targets": (put("groups.0.sites", [1, 1]), "counts of another shape"),
    "counts of a group that nobody told": (put("groups.0.sites", [0]), "that no site tells of"),
    "a group too small to be told": (put("groups.0.sites", [4]), "fewer images than a site may tell of"),
    "counts that are no histogram": (put("groups.0.counts", [[1]]), "score histogram"),
    "a group larger than the whole": (put("groups.0.counts.0.0.0", 10**6), "more images than there are"),
    "grades of a study without": (put("grades", [[1, 2], [3, 4]]), "a table of 0 rows"),
    "a negative count of sites": (put("groups.0.sites", [-1]), "greater than or equal to 0"),
}


@pytest.mark.parametrize("lie", DIVIDED_LIES)
def test_groups_that_contradict_the_study_or_the_whole_are_malformed(raw: Raw, tmp_path: Path, lie: str) -> None:
    results = divided(raw)
    change, why = DIVIDED_LIES[lie]
    change(results)
    with pytest.raises(MessageMalformed, match=why):
        report.write(results, tmp_path)
    assert not list(tmp_path.iterdir())
