"""Spans of a round for OpenTelemetry: only with the extra `isocenter[otel]`, and only to the address that a settings file names.

    coordinator    run > round > stage > site
    node           order > train, protect

A span has a name of NAMES, times, and facts: numbers, and words of the fixed kinds in KEYS. Whatever else is given is left out;
no exception is recorded but by its public code. Without `begin`, `span` does nothing and no library of OpenTelemetry is loaded.

The process that trains has no network: it collects its spans, and the node hands them on. At the coordinator, a study with
differential privacy has no spans of sites: how long one takes tells how many of its patients were drawn.
"""

import contextlib
import ipaddress
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from privacy import greeting
from privacy.errors import DocumentError, IsocenterError, public_codes

NAMES = ("run", "round", "stage", "site", "order", "train", "protect")
EXPORT_S, END_S = 5.0, 2.0
COLLECTED_MAX = 16  # spans of one order in the process that trains
KINDS = ("train", "evaluate", "keys", "unmask")
OUTCOMES = public_codes() | {"ok", "complete", "partial", "failed", "stopped", "queued", "running"}
OUTCOMES |= {f"{kind}-report" for kind in KINDS} | {"refusal", "timeout", "offline", "unavailable", "joining"}
KEYS: dict[str, Callable[[str], bool]] = {
    "run": lambda word: re.fullmatch(r"[a-z0-9-]{1,64}", word) is not None,
    "site": lambda word: re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", word) is not None,
    "kind": lambda word: word in KINDS,
    "protection": lambda word: word in ("masked", "sealed", "plain"),
    "outcome": lambda word: word in OUTCOMES,
}
"""Facts that are words, and which ones they may be. Every other fact is a number."""

Fact = str | int | float
Tell = Callable[..., None]


class Traces(BaseModel):
    """Where spans are sent; needs the extra `isocenter[otel]`. Nothing is sent without this section."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    endpoint: str = Field(
        max_length=500,
        description="address of an OTLP collector over HTTP, such as http://127.0.0.1:4318/v1/traces; https beyond this machine",
    )

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, endpoint: str) -> str:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.fragment:
            raise ValueError("expected an address such as https://collector.example.org:4318/v1/traces")
        if parts.scheme == "http" and not _is_here(parts.hostname):
            raise ValueError("http is for a collector on this machine; beyond it, use https")
        return endpoint


class _Sink(Protocol):
    def span(self, name: str, facts: Mapping[str, Fact]) -> contextlib.AbstractContextManager[Tell]: ...
    def past(self, name: str, began_ns: int, ended_ns: int, facts: Mapping[str, Fact]) -> None: ...


_sink: _Sink | None = None


def span(name: str, **facts: Fact) -> contextlib.AbstractContextManager[Tell]:
    """A span around what is entered; what it gives takes further facts. Nothing happens unless somebody asked for spans."""
    return _NOTHING if _sink is None else _sink.span(name, facts)


def stage(kind: str, number: int, began_ns: int, took: Mapping[str, float], missing: Mapping[str, str]) -> None:
    """What was asked of the sites at once, now that it is over: `took` seconds until each report, and why others are missing."""
    if isinstance(_sink, _Exporting):
        _sink.stage(kind, number, began_ns, took, missing)


def past(spans: Any) -> None:
    """Spans that the process that trains collected: (name, begin, end) in ns. What is no such list is left out."""
    if _sink is None or not isinstance(spans, list):
        return
    for each in spans[:COLLECTED_MAX]:
        if isinstance(each, list) and len(each) == 3 and each[0] in NAMES and all(type(n) is int for n in each[1:]):
            name, began, ended = each
            if 0 < began <= ended <= time.time_ns() + 10**9:
                _sink.past(name, began, ended, {})


def is_asked_for() -> bool:
    return _sink is not None


@contextlib.contextmanager
def collected() -> Iterator[list[list[str | int]]]:
    """The spans of what is entered, for another process; not for several threads."""
    global _sink  # noqa: PLW0603  one process has one
    before, made = _sink, _Collecting()
    _sink = made
    try:
        yield made.spans
    finally:
        _sink = before


def begin(settings: Traces | None, process: str) -> Callable[[], None]:
    """Send the spans of this process to the address in `settings` from now on; what ends it. Nothing without settings.

    Raises DocumentError if the extra is not installed.
    """
    if settings is None:
        return lambda: None
    try:
        import requests
        from opentelemetry.exporter.otlp.proto.http import Compression
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise DocumentError(
            "`traces` is set, and OpenTelemetry is not installed here",
            remedy="Install it (`pip install 'isocenter[otel]'`), or take `traces` out of the settings.",
        ) from None
    session = requests.Session()
    session.trust_env, session.max_redirects = False, 0  # to the named address, and nowhere else
    exporter = OTLPSpanExporter(
        settings.endpoint, timeout=EXPORT_S, compression=Compression.NoCompression, session=session
    )
    return begin_with(BatchSpanProcessor(exporter, 2048, 5000.0, 512, EXPORT_S * 1000), process)


def begin_with(processor: Any, process: str) -> Callable[[], None]:
    """The same with a span processor of OpenTelemetry's SDK."""
    global _sink  # noqa: PLW0603
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    # Not Resource.create, which adds what environment variables and the machine say.
    named = {"service.name": f"isocenter-{process}", "service.version": greeting.own().release}
    provider = TracerProvider(sampler=ALWAYS_ON, resource=Resource(named), shutdown_on_exit=False)
    provider.add_span_processor(processor)
    _sink = _Exporting(provider.get_tracer("isocenter"))

    def end() -> None:
        global _sink  # noqa: PLW0603
        _sink = None
        with contextlib.suppress(Exception):  # whatever a collector does, the process ends
            provider.force_flush(int(END_S * 1000))
            provider.shutdown()

    return end


@contextlib.contextmanager
def without_sites(private: bool) -> Iterator[None]:
    """While it is entered, a private study has no spans of single sites."""
    sink = _sink
    if isinstance(sink, _Exporting):
        sink.tells_sites = not private
    try:
        yield
    finally:
        if isinstance(sink, _Exporting):
            sink.tells_sites = True


def safe(facts: Mapping[str, Any]) -> dict[str, Fact]:
    """Those facts that may stand in a span: numbers, and words of KEYS."""
    found: dict[str, Fact] = {}
    for key, value in facts.items():
        if isinstance(value, str):
            if key in KEYS and KEYS[key](value):
                found[key] = str(value)
        elif key not in KEYS and isinstance(value, bool | int | float):
            found[key] = float(value) if isinstance(value, float) else int(value)
    return found


@dataclass
class _Collecting:
    spans: list[list[str | int]] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, name: str, facts: Mapping[str, Fact]) -> Iterator[Tell]:
        began = time.time_ns()
        try:
            yield _tell_nobody
        finally:
            self.past(name, began, time.time_ns(), facts)

    def past(self, name: str, began_ns: int, ended_ns: int, facts: Mapping[str, Fact]) -> None:
        if len(self.spans) < COLLECTED_MAX:
            self.spans.append([name, began_ns, max(began_ns, ended_ns)])


@dataclass
class _Exporting:
    tracer: Any
    tells_sites: bool = True

    @contextlib.contextmanager
    def span(self, name: str, facts: Mapping[str, Fact]) -> Iterator[Tell]:
        given = safe(facts)
        with self.tracer.start_as_current_span(
            name, attributes=given, record_exception=False, set_status_on_exception=False
        ) as made:
            try:
                yield lambda **more: made.set_attributes(safe(more))
            except IsocenterError as error:
                made.set_attributes(safe({"outcome": error.code}))
                raise
            except Exception:
                made.set_attributes({"outcome": IsocenterError.code})
                raise

    def past(self, name: str, began_ns: int, ended_ns: int, facts: Mapping[str, Fact]) -> None:
        self.tracer.start_span(name, attributes=safe(facts), start_time=began_ns).end(ended_ns)

    def stage(
        self, kind: str, number: int, began_ns: int, took: Mapping[str, float], missing: Mapping[str, str]
    ) -> None:
        from opentelemetry.trace import set_span_in_context

        facts = safe({"kind": kind, "round": number, "reports": len(took), "missing": len(missing)})
        made = self.tracer.start_span("stage", attributes=facts, start_time=began_ns)
        inside, ended = set_span_in_context(made), time.time_ns()
        for site in sorted({*took, *missing}) if self.tells_sites else ():
            until = began_ns + int(took[site] * 1e9) if site in took else ended
            outcome = missing.get(site, "ok")
            told = safe({"site": site, "outcome": outcome if outcome in OUTCOMES else "internal"})
            self.tracer.start_span("site", context=inside, attributes=told, start_time=began_ns).end(until)
        made.end(ended)


def _tell_nobody(**_: Fact) -> None:
    pass


_NOTHING: contextlib.AbstractContextManager[Tell] = contextlib.nullcontext(_tell_nobody)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
