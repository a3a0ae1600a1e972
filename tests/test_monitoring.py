"""Metrics of both sides, and that alerts and dashboard ask for metrics that exist, with labels that exist."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from dashboard_cast import furnished
from hospital import Hospital, study
from prometheus_client.parser import text_string_to_metric_families

from fl_client import vitals as module
from fl_client.policy import Pause
from fl_client.vitals import Vitals
from fl_server.metrics import exposition
from fl_server.overview import Overview
from privacy import keys
from privacy.errors import DocumentError

PROMTOOL = shutil.which("promtool")
FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "monitoring"


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital.open(tmp_path_factory.mktemp("vitals"), "north", study())


@pytest.fixture
def node(hospital: Hospital) -> Iterator[tuple[Vitals, str]]:
    told = Vitals(hospital.home)
    port = told.start(0)
    yield told, f"http://127.0.0.1:{port}"
    told.stop()


def test_a_node_counts_what_came_of_its_orders(node: tuple[Vitals, str]) -> None:
    told, address = node
    work = told.counting(lambda order: order, str)
    for outcome in ("train-report", "train-report", "policy-forbids"):
        work(outcome)
    told.connected = True
    found = samples(httpx.get(f"{address}/metrics").text)
    assert found["isocenter_node_orders_total"] == [
        ({"outcome": "policy-forbids"}, 1), ({"outcome": "train-report"}, 2),
    ]  # fmt: skip
    assert found["isocenter_node_connected"] == [({}, 1)] and found["isocenter_node_busy"] == [({}, 0)]
    assert found["isocenter_node_budget_charged_ratio"] == [({"cap": "year"}, 0), ({"cap": "total"}, 0)]
    assert time.time() - found["isocenter_node_last_order_timestamp_seconds"][0][1] < 60
    with pytest.raises(ValueError, match="broken"):
        told.counting(_broken, str)("order")
    assert not told.busy


def _broken(order: str) -> str:
    raise ValueError("broken")


def test_a_paused_node_and_its_certificate_are_told(node: tuple[Vitals, str], hospital: Hospital) -> None:
    _, address = node
    assert samples(httpx.get(f"{address}/metrics").text)["isocenter_node_paused"] == [({}, 0)]
    Pause(time.time(), None).store(hospital.home)
    authority = keys.make_ca(keys.make_key(hospital.home / "ca.key"), "test")
    certificate = keys.issue(authority, keys.make_csr(hospital.site.key, "north"), "north", "site", 30)
    keys.write_public(hospital.home / "keys" / "site.pem", keys.certificate_pem(certificate))
    try:
        found = samples(httpx.get(f"{address}/metrics").text)
    finally:
        Pause.path(hospital.home).unlink()
    assert found["isocenter_node_paused"] == [({}, 1)]
    assert (
        found["isocenter_node_certificate_end_timestamp_seconds"][0][1] == certificate.not_valid_after_utc.timestamp()
    )


def test_ready_means_connected(node: tuple[Vitals, str]) -> None:
    told, address = node
    assert httpx.get(f"{address}/healthz").status_code == 200
    assert httpx.get(f"{address}/readyz").status_code == 503
    told.connected = True
    assert httpx.get(f"{address}/readyz").status_code == 200


def test_only_this_machine_under_its_own_name_gets_anything(
    node: tuple[Vitals, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, address = node
    port = int(address.rsplit(":", 1)[1])
    assert told._server is not None and told._server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1"):
        assert httpx.get(f"{address}/metrics", headers={"host": host}).status_code == 421
    assert httpx.post(f"{address}/metrics").status_code == 501 and httpx.get(f"{address}/../x").status_code == 404
    with pytest.raises(DocumentError, match="cannot listen"):
        Vitals(told.home).start(port)
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(module.CALLERS_MAX)]
    time.sleep(0.2)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{address}/healthz")
    for each in idle:
        each.close()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            assert httpx.get(f"{address}/healthz").status_code == 200
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    else:
        pytest.fail("callers that left still hold their places")


# What is asked of metrics ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory, hospital: Hospital) -> dict[str, set[str]]:
    """Every metric that either side exposes -> its labels. Read from what they say, with something in every family."""
    home, *_ = furnished(tmp_path_factory.mktemp("exposed"))
    told = Vitals(hospital.home)
    told.counting(lambda order: order, str)("train-report")
    port = told.start(0)
    text = exposition(Overview(home)).decode() + httpx.get(f"http://127.0.0.1:{port}/metrics").text
    told.stop()
    return {name: {label for labels, _ in rows for label in labels} for name, rows in samples(text).items()}


def expressions() -> list[tuple[str, str, str]]:
    """(where, expression, text in which labels are named) of every alert and panel."""
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    found = [
        (rule["alert"], rule["expr"], " ".join(rule["annotations"].values()))
        for group in rules["groups"]
        for rule in group["rules"]
    ]
    board: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text())
    for panel in board["panels"]:
        found += [(panel["title"], each["expr"], each["legendFormat"]) for each in panel["targets"]]
    return found


@pytest.mark.parametrize(("where", "expression", "text"), expressions(), ids=lambda value: str(value)[:40])
def test_alerts_and_panels_ask_for_what_exists(
    exposed: dict[str, set[str]], where: str, expression: str, text: str
) -> None:
    names = set(re.findall(r"isocenter_\w+", expression))
    assert names and names <= set(exposed), f"{where}: {names - set(exposed)}"
    labels = {label for name in names for label in exposed[name]}
    used = set(re.findall(r"\$labels\.(\w+)|\{\{(\w+)\}\}", text))
    used_names = {one or other for one, other in used} | set(re.findall(r"(\w+)\s*[=!]~?\"", expression))
    used_names |= {word.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for word in group.split(",")}
    assert used_names <= labels, f"{where}: {used_names - labels}"
    assert expression.count("(") == expression.count(")")


def test_every_alert_is_tried_firing_and_silent() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    tried = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())
    fires = {each["alertname"] for test in tried["tests"] for each in test["alert_rule_test"] if each.get("exp_alerts")}
    assert fires == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    asked = {re.split(r"[{ ]", series["series"])[0] for test in tried["tests"] for series in test["input_series"]}
    assert asked == {
        name for where, expression, _ in expressions() if where in fires for name in metrics_in(expression)
    }


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool here")
@pytest.mark.parametrize(
    "words", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")], ids=lambda words: words[0]
)
def test_prometheus_own_tool_takes_the_rules_and_they_do_what_they_should(words: tuple[str, ...]) -> None:
    done = subprocess.run([str(PROMTOOL), *words], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"isocenter_\w+", expression))


def test_every_alert_says_what_to_do() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
            assert rule["annotations"]["summary"] and rule["annotations"]["remedy"]


def test_no_metric_is_about_a_patient(exposed: dict[str, set[str]]) -> None:
    assert not [name for name in exposed if re.search(r"patient|image|case|loss|auroc|epsilon", name)]
    assert set().union(*exposed.values()) <= {"site", "party", "role", "run", "state", "reason", "outcome", "cap"}
