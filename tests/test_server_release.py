"""What a model card says of populations and groups, and what it keeps: it is read by people outside the consortium."""

import json
import time
from contextlib import ExitStack
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score
from test_server_report import SITES, Raw, histogram, raw_scores, results_of, study_of

from fl_server import consortium, release
from fl_server.measures import measure
from fl_server.results import check
from privacy.errors import RunError


@pytest.fixture(scope="module")
def raw() -> Raw:
    return raw_scores()


def card(raw: Raw, sites: int) -> tuple[dict[str, Any], str]:
    """Figures and words of the card of a run in which all images of north are women's and all of south men's.

    `sites`: how many told of each group, if we believe it; a results document with these sites would need larger hospitals.
    """
    results = results_of(study_of(bins="500, subgroups: [sex]", protection="sealed"), raw)
    results["groups"] = [
        {"division": "sex", "name": name, "sites": [1], "counts": histogram(*raw[site]).to_json()}
        for name, site in (("F", "north"), ("M", "south"))
    ]
    metrics = measure(check(results))
    for entry in metrics["subgroups"]["opacity"]["sex"]["groups"].values():
        entry["sites"] = sites if entry["sites"] else 0
    figures = release._figures(metrics)
    return figures, "\n".join(release._tables(figures))


def test_groups_stand_with_figures_and_intervals_as_far_as_three_sites_told_of_them(raw: Raw) -> None:
    figures, words = card(raw, 3)
    found = figures["subgroups"]["opacity"]["sex"]
    for name, site in (("F", "north"), ("M", "south")):
        values, labels = raw[site]
        entry = found["groups"][name]
        assert entry["auroc"] == pytest.approx(roc_auc_score(labels, values), abs=0.01)
        assert entry["interval"][0] < entry["auroc"] < entry["interval"][1]
        assert entry["positives"] == int(labels.sum()) // 10 * 10
        assert f"| opacity | sex | {name} | 3 | ≥ {entry['positives']} |" in words
    assert found["groups"]["O"]["auroc"] is None and found["gap"]["interval"][0] < found["gap"]["auroc"]


def test_groups_of_fewer_sites_have_no_figure_and_no_count(raw: Raw) -> None:
    figures, words = card(raw, 2)
    found = figures["subgroups"]["opacity"]["sex"]
    for name in "FM":
        kept = dict.fromkeys(("positives", "negatives", "auroc", "interval"))
        assert found["groups"][name] == kept | {"sites": 2, "why": "not released: fewer than 3 sites"}
    assert found["gap"] is None and "| opacity | sex | F | 2 | – | – | not released" in words


def test_thresholds_are_exact_and_rates_are_not(raw: Raw) -> None:
    """Whoever uses the model needs the threshold itself; a rate with all its decimals would tell the count behind it."""
    results = results_of(study_of(bins="500, subgroups: [sex]", protection="sealed"), raw)
    exact = measure(check(results))["pooled"]["targets"]["opacity"]["operating"]
    figures, words = card(raw, 3)
    told = figures["pooled"]["targets"]["opacity"]["operating"]
    assert set(told) == set(exact) and len(told) == 4
    for rule, at in told.items():
        assert at["threshold"] == exact[rule]["threshold"]
        for rate in ("sensitivity", "specificity", "ppv", "npv"):
            numbers = [at[rate]["value"], *at[rate]["interval"]]
            assert numbers == [round(number, 2) for number in numbers]
        assert f"| opacity | {at['threshold']:.4f} |" in words
        assert not any("true" in name or "false" in name for name in at)
    assert json.dumps(figures, allow_nan=False)


def test_every_site_of_the_study_has_a_row_with_its_population_or_why_not(raw: Raw) -> None:
    figures, words = card(raw, 3)
    for site in SITES:
        entry = figures["sites"][site]["targets"]["opacity"]
        shown = f"≥ {entry['positives']}" if entry["positives"] else "–"
        assert f"| opacity | {site} | {figures['sites'][site]['testing']} | {shown} |" in words
    total = sum(len(raw[site][0]) for site in SITES)
    assert figures["pooled"]["images"] == total // 10 * 10


class Call:
    """Of a gRPC context, what a fetch uses."""

    cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_party_has_two_fetches_at_a_time_and_all_together_thirty_two() -> None:
    service = consortium.Consortium(None, None)  # type: ignore[arg-type]
    with ExitStack() as open_ones:
        for number in range(consortium.FETCHES_MAX):
            open_ones.enter_context(service._fetch_of(f"site-{number // consortium.FETCHES_EACH}", Call()))
        for party in ("site-0", "another"):
            with pytest.raises(RunError, match="too many models"), service._fetch_of(party, Call()):
                pass
    assert service._fetches.total() == 0, "places are given back"


def test_who_reads_too_slowly_is_cut_off_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consortium, "FETCH_S", 0.05)
    service, slow, quick = consortium.Consortium(None, None), Call(), Call()  # type: ignore[arg-type]
    with service._fetch_of("north", quick):
        pass
    with service._fetch_of("north", slow):
        time.sleep(0.2)
    assert (slow.cancelled, quick.cancelled) == (1, 0)
