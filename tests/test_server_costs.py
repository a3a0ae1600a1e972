"""The cost model against what was measured (docs/benchmarks/parameters.json, docs/benchmarks.md) and against plain arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fl_server import costs
from fl_server.costs import Setting, predict
from fl_server.research import app

ROOT = Path(__file__).resolve().parent.parent
MEASURED: dict[str, Any] = json.loads((ROOT / "docs" / "benchmarks" / "parameters.json").read_text())
ROWS = [row for row in MEASURED["rows"] if row["parameters"] >= 7_000_000]
STUDY = str(ROOT / "configs" / "studies" / "opacity.yaml")


def within(predicted: float, measured: float, factor: float) -> bool:
    return measured / factor <= predicted <= measured * factor


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['parameters']:,}")
def test_processor_time_and_memory_are_within_a_factor_of_what_was_measured(row: dict[str, Any]) -> None:
    size, sites = row["parameters"], row["sites"]
    found = predict(Setting(sites, size, work_s=0.0))
    site, coordinator = row["site"], row["coordinator"]
    seconds = sum(site["seconds"].values()) - site["seconds"]["mask"] * (sites - 1) / sites
    tls = (found.site_bytes - 5000) * costs.TLS_S  # the bench has no network
    assert within(found.parts_s["site's processor"] - tls, seconds, 2)
    line = sites * (costs.REQUESTS_S + tls)
    assert within(found.parts_s["coordinator's processor"] - line, sum(coordinator["seconds"].values()), 2)
    assert within(found.site_memory - costs.SITE_BASE, site["peak_bytes"], 2)
    room = 2 * (
        2 * 4 * size + 64 * 2**20
    )  # of the gateway, for the two largest reports; in the bench no two come at once
    held = min((found.site_bytes - 4 * size) * (sites - 1), max(512 * 2**20, room))
    assert within(found.coordinator_memory - costs.COORDINATOR_BASE - held, coordinator["peak_bytes"], 2)


@pytest.mark.parametrize(
    ("parameters", "bits", "measured"),
    [(307_569, 32, 2_492_211), (6_948_609, 32, 55_697_901), (6_948_609, 16, 41_776_145)],
)
def test_bytes_are_within_one_percent_of_what_was_measured_on_the_wire(
    parameters: int, bits: Any, measured: int
) -> None:
    assert within(predict(Setting(4, parameters, bits=bits)).site_bytes, measured, 1.01)


def test_two_hundred_hospitals_with_a_large_model_wait_for_the_coordinators_line() -> None:
    """Oracle: 200 times 400 MB down and up again, over 12.5 MB a second."""
    found = predict(Setting(200, 100_000_000), timeout_s=600)
    assert found.dominated_by == "line"
    assert found.parts_s["line"] == pytest.approx(200 * (400e6 + 400e6) / 12.5e6, rel=0.01)
    assert found.coordinator_bytes == pytest.approx(160e9, rel=0.01)
    assert len(found.limits) == 1 and "round_timeout_s" in found.limits[0]
    half = predict(Setting(200, 100_000_000, bits=16), timeout_s=600)
    assert half.parts_s["line"] == pytest.approx(0.75 * found.parts_s["line"], rel=0.01)


@pytest.mark.parametrize("size", [100_000, 7_000_000, 100_000_000])
def test_memory_of_the_coordinator_does_not_grow_with_the_number_of_sites(size: int) -> None:
    """Oracle: the room of the gateway, beside eight models of four bytes a parameter."""
    few, many = (predict(Setting(sites, size)).coordinator_memory for sites in (200, 1000))
    room = max(512 * 2**20, 2 * max(256 * 2**20, 8 * size + 64 * 2**20))
    assert few <= many <= 480 * 2**20 + 8 * 4 * size + room + 1
    assert many == few or size == 100_000  # a thousand of the smallest do not fill the room


def test_more_of_anything_costs_more_and_a_small_study_breaks_nothing() -> None:
    base = Setting(4, 7_000_000, work_s=1.0, mbit=100.0, latency_ms=50.0)
    before = predict(base)
    assert before.limits == []
    for name, value in {"sites": 8, "parameters": 14_000_000, "work_s": 2.0, "mbit": 50.0, "latency_ms": 100.0}.items():
        assert predict(Setting(**{**base.__dict__, name: value})).round_s > before.round_s, name
    assert "1000 sites" in predict(Setting(1001, 1000)).limits[0]
    assert any("parameters" in limit for limit in predict(Setting(4, 300_000_000)).limits)


def test_a_researcher_asks_for_the_cost_of_a_study() -> None:
    asked = [STUDY, "--sites", "200", "--parameters", "100e6"]
    told = CliRunner().invoke(app, ["cost", *asked])
    assert told.exit_code == 0 and "line" in told.stdout and "Beware" in told.stdout
    document = json.loads(CliRunner().invoke(app, ["cost", *asked, "--json"]).stdout)
    assert document["setting"]["sites"] == 200 and document["dominated_by"] == "line"
    own = json.loads(CliRunner().invoke(app, ["cost", STUDY, "--json"]).stdout)
    assert (own["setting"]["sites"], own["setting"]["parameters"]) == (4, 307_569)
