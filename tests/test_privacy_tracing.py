"""Spans of a round: numbers and enumerated words only, nothing without settings, and nothing loaded without the extra."""

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from hospital import study

from fl_server.settings import ServerFile
from models.study import parse
from privacy import tracing
from privacy.errors import DataError, DocumentError
from privacy.tracing import Traces, collected, past, safe, span

ROOT = Path(__file__).resolve().parent.parent
MARK = "ZZTEST^MARIA"


@pytest.fixture
def exported() -> Iterator[Callable[[], list[Any]]]:
    """Spans that were ended, from the SDK's own exporter in memory."""
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    exporter = memory.InMemorySpanExporter()
    end = tracing.begin_with(export.SimpleSpanProcessor(exporter), "test")
    yield lambda: list(exporter.get_finished_spans())
    end()


def parents(spans: list[Any]) -> set[tuple[str, str | None]]:
    names = {each.context.span_id: each.name for each in spans}
    return {(each.name, names[each.parent.span_id] if each.parent else None) for each in spans}


def facts(spans: list[Any], name: str) -> list[dict[str, Any]]:
    return [dict(each.attributes) for each in spans if each.name == name]


def test_without_settings_nothing_happens_and_nothing_is_loaded() -> None:
    text = (
        "import sys; from privacy import tracing; from fl_server import rounds;"
        "tracing.begin(None, 'node')()\nwith tracing.span('run', run='x') as tell: tell(outcome='ok')\n"
        "tracing.stage('train', 1, 1, {}, {}); tracing.past([['train', 1, 2]])\n"
        "print(tracing.is_asked_for(), any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_a_run_of_two_rounds_is_a_tree_of_numbers_and_words(tmp_path: Path, exported: Callable[[], list[Any]]) -> None:
    plan = study(**{"privacy: none": "privacy: none\nnetwork: {name: linear}"})
    folder = Federation(tmp_path, plan).run()
    spans = exported()
    assert {each for each in parents(spans) if each[0] in ("run", "round", "stage", "site")} == {
        ("run", None), ("round", "run"), ("stage", "round"), ("stage", "run"), ("site", "stage"),
    }  # fmt: skip
    [run] = facts(spans, "run")
    assert run == {
        "run": folder.name, "protection": "plain", "rounds": 2, "attempt": 1, "outcome": "complete", "committed": 2,
    }  # fmt: skip
    assert facts(spans, "round") == [{"round": 1, "attempt": 1}, {"round": 2, "attempt": 1}]
    assert {(each["kind"], each["reports"], each["missing"]) for each in facts(spans, "stage")} == {
        ("train", 2, 0), ("evaluate", 2, 0),
    }  # fmt: skip
    assert {(each["site"], each["outcome"]) for each in facts(spans, "site")} == {("north", "ok"), ("south", "ok")}
    assert all(each.end_time >= each.start_time > 0 and not each.events for each in spans)
    resource = dict(spans[0].resource.attributes)
    assert set(resource) == {"service.name", "service.version"}


def test_a_private_study_has_no_spans_of_sites(exported: Callable[[], list[Any]]) -> None:
    with tracing.without_sites(True), span("run"):
        tracing.stage("train", 1, time.time_ns(), {"north": 0.5}, {"south": "timeout"})
    with tracing.without_sites(False):
        tracing.stage("train", 2, time.time_ns(), {"north": 0.5}, {"south": MARK})
    spans = exported()
    assert [(each["site"], each["outcome"]) for each in facts(spans, "site")] == [
        ("north", "ok"),
        ("south", "internal"),
    ]
    assert [each["round"] for each in facts(spans, "stage")] == [1, 2]


@pytest.mark.parametrize(
    "given",
    [
        {"patient": MARK}, {"outcome": MARK}, {"run": MARK}, {"site": "North General"}, {"kind": "x"}, {"protection": 3},
        {"outcome": 5}, {"path": "/data/x"}, {"a": None}, {"b": b"x"}, {"c": [1]}, {"d": {"x": 1}}, {"site": "a" * 40},
    ],
)  # fmt: skip
def test_whatever_is_no_number_and_no_word_of_a_list_is_left_out(given: dict[str, Any]) -> None:
    assert safe(given) == {}


def test_numbers_are_made_plain() -> None:
    class Spelled(float):
        def __str__(self) -> str:
            return MARK

    found = safe({"a": Spelled(2.5), "b": True, "c": 3, "outcome": "data"})
    assert (
        found == {"a": 2.5, "b": 1, "c": 3, "outcome": "data"} and type(found["a"]) is float and type(found["b"]) is int
    )


def test_an_error_leaves_its_public_code_and_nothing_else(exported: Callable[[], list[Any]]) -> None:
    for error in (DataError(MARK), ValueError(MARK)):
        with pytest.raises(type(error)), span("order", round=1):
            raise error
    spans = exported()
    assert [each["outcome"] for each in facts(spans, "order")] == ["data", "internal"]
    assert MARK not in "".join(each.to_json() for each in spans) and not any(each.events for each in spans)


HOSTILE = [None, "x", [["run"]], [[MARK, 1, 2]], [["train", "1", 2]], [["train", 5, 2]], [["train", -1, 2]], [3]]
HOSTILE += [[["train", 1, 2**63]]]


@pytest.mark.parametrize("spans", HOSTILE)
def test_what_a_worker_taken_over_says_of_spans_is_left_out(exported: Callable[[], list[Any]], spans: Any) -> None:
    past(spans)
    past([["train", 1, 2]] * 1000)
    assert [each.name for each in exported()] == ["train"] * tracing.COLLECTED_MAX


def test_spans_are_collected_where_there_is_no_network() -> None:
    with collected() as spans:
        for _ in range(30):
            with span("train", patient=MARK):
                pass
    assert (
        len(spans) == tracing.COLLECTED_MAX and {each[0] for each in spans} == {"train"} and not tracing.is_asked_for()
    )


def test_they_go_to_the_named_address_and_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that sends elsewhere is not followed, and proxies of the environment are not asked."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    asked: list[str] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(307 if len(asked) == 1 else 200)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}/proxy")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}/by-the-environment")
    try:
        for _ in range(2):
            end = tracing.begin(Traces(endpoint=f"http://127.0.0.1:{server.server_port}/v1/traces"), "node")
            with span("order"):
                pass
            end()
    finally:
        server.shutdown()
        server.server_close()
    assert asked and set(asked) == {"/v1/traces"}


GOOD = [
    "http://127.0.0.1:4318/v1/traces",
    "http://localhost:4318/",
    "http://[::1]:4318/x",
    "https://c.example/v1/traces",
]
BAD = [
    "http://c.example/v1/traces",
    "ftp://127.0.0.1/x",
    "c.example",
    "https://u:p@c.example/",
    "https://",
    "http://127.0.0.1.evil/",
]


def test_an_address_beyond_this_machine_needs_tls() -> None:
    plain = "version: 1\nname: x\nhost: a.example\n"
    for good in GOOD:
        assert parse(ServerFile, f"{plain}traces: {{endpoint: '{good}'}}\n", "s").traces == Traces(endpoint=good)
    for bad in BAD:
        with pytest.raises(DocumentError):
            parse(ServerFile, f"{plain}traces: {{endpoint: '{bad}'}}\n", "s")
    assert parse(ServerFile, plain, "s").traces is None


def test_without_the_extra_the_setting_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(DocumentError, match="not installed") as caught:
        tracing.begin(Traces(endpoint=GOOD[0]), "node")
    assert "isocenter[otel]" in caught.value.remedy and not tracing.is_asked_for()
