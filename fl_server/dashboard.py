"""The coordinator's screen: what the consortium looks like now, in pages that only tell. Acting is the commands' job.

A process of its own (`fl-server dashboard`) over the files of one home, so nothing that a browser does can reach training. Pages
are rendered here, without a script they are reloaded by hand; a small script swaps what has changed, told by server-sent events.
Every text of a site, a researcher or a file is escaped by jinja2, and bounded and made printable before.
"""

import asyncio
import functools
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fl_server import door, metrics, plots
from fl_server.overview import Overview, Snapshot, charged, promises, study_of
from fl_server.progress import STAGES, Progress, ahead, duration, printable, remedy_of
from fl_server.roster import Home
from privacy.errors import DocumentError, IsocenterError, RunUnknown

PORT = 9442
PASSWORD = "dashboard.json"  # in the folder of keys; holds the scrypt hash  # noqa: S105
STREAMS_MAX = 32
STREAM_S = 600.0  # a browser begins a new one by itself
TICK_S = 2.0
KEEP_ALIVE_S = 20.0
RENDERED_MAX = 64
JOURNAL_LINES, JOURNAL_BYTES = 100, 256 * 1024
STATIC = {"dashboard.css": "text/css", "dashboard.js": "text/javascript", "icon.svg": "image/svg+xml"}
TONES = {"good": "ok", "look": "look", "bad": "act", "off": "off"}
STATE_TONES = {"complete": "good", "running": "good", "queued": "off", "partial": "look", "stopped": "look"}
log = logging.getLogger("isocenter.dashboard")


@dataclass(frozen=True)
class Address:
    """Where the dashboard listens, and under which names it may be asked. `certificate`, `key`: PEM files, for a login."""

    listen: str = "127.0.0.1"
    port: int = PORT
    hosts: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    login: bool = False


@dataclass
class Screen:
    """The pages of one home. Rendering takes turns, and a page that is asked for again within a second is not made again."""

    home: Home
    login: bool = False
    overview: Overview = field(init=False)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _rendered: dict[str, tuple[float, str]] = field(default_factory=dict)
    _streams: int = 0

    def __post_init__(self) -> None:
        self.overview = Overview(self.home)
        self.shelf = shelf()
        self.statics = {name: _template_file(name) for name in STATIC}

    def page(self, path: str) -> str:
        """The whole page at `path`; raises RunUnknown if there is none."""
        with self._turn:
            at, text = self._rendered.get(path, (0.0, ""))
            if time.monotonic() - at > 1.0 or not text:
                text = self._render(path)
                if len(self._rendered) >= RENDERED_MAX:
                    self._rendered.clear()
                self._rendered[path] = (time.monotonic(), text)
            return text

    def _render(self, path: str) -> str:
        book, now = self.overview.book.look(), self.overview.look()
        pages: dict[str, Callable[[Snapshot], dict[str, Any]]] = {
            "/": lambda now: {},
            "/runs": lambda now: {},
            "/studies": lambda now: {"promises": promises},
            "/models": lambda now: {},
            "/journal": lambda now: {"lines": tail(self.home.journal.path)},
        }
        if path.startswith("/runs/"):
            template, more = "run", run_page(self.home, self.overview.run(path.removeprefix("/runs/")), now)
        elif path in pages:
            template, more = path.strip("/") or "overview", pages[path](now)
        else:
            raise RunUnknown("there is no such page")
        return self.shelf.get_template(f"{template}.html").render(
            path=path, now=now, book=book, login=self.login, home=self.home, **more
        )

    def login_page(self, wrong: str) -> str:
        return self.shelf.get_template("login.html").render(name=self.home.settings.name, wrong=wrong)

    def app(self) -> Starlette:
        """The pages as an ASGI application, which `fl_server.door.Door` stands before."""
        routes = [
            Route(path, self._answer) for path in ("/", "/runs", "/studies", "/models", "/journal", "/runs/{run}")
        ]
        routes += [
            Route("/live", self._live),
            Route("/static/{name}", self._static),
            Route("/healthz", lambda request: PlainTextResponse("ok\n")),
            Route("/readyz", self._ready),
        ]
        if not self.login:  # whoever scrapes has no cookie; a second dashboard on loopback is for them
            routes.append(Route("/metrics", self._metrics))
        return Starlette(routes=routes, exception_handlers={404: self._lost, 500: self._failed})

    async def _answer(self, request: Request) -> Response:
        try:
            return HTMLResponse(await run_in_threadpool(self.page, request.url.path))
        except RunUnknown:
            return await self._lost(request, None)
        except IsocenterError as error:
            log.error("a page could not be made: %s", error)
            return self._trouble(503, "This page cannot be made now; the log of the dashboard says why.")

    async def _lost(self, request: Request, error: Any) -> Response:
        return self._trouble(404, "There is no such page here.")

    async def _failed(self, request: Request, error: Any) -> Response:
        log.error("a page failed", exc_info=error)
        return self._trouble(500, "This page failed; the log of the dashboard says why.")

    def _trouble(self, status: int, sentence: str) -> Response:
        text = self.shelf.get_template("trouble.html").render(name=self.home.settings.name, sentence=sentence)
        return HTMLResponse(text, status)

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            return await self._lost(request, None)
        return Response(self.statics[name], media_type=STATIC[name])

    async def _ready(self, request: Request) -> Response:
        ready = await run_in_threadpool(self._serving)
        return PlainTextResponse("ready\n" if ready else "the coordinator does not answer\n", 200 if ready else 503)

    def _serving(self) -> bool:
        with self._turn:
            return self.overview.serving()

    async def _metrics(self, request: Request) -> Response:
        def taken() -> bytes:
            with self._turn:
                self.overview.book.look()
                return metrics.exposition(self.overview)

        try:
            return Response(await run_in_threadpool(taken), media_type=metrics.CONTENT_TYPE)
        except IsocenterError as error:
            log.error("metrics could not be made: %s", error)
            return PlainTextResponse("not now\n", 503)

    async def _live(self, request: Request) -> Response:
        """Server-sent events about one page: its digest, whenever that changes."""
        path = request.query_params.get("page", "/")
        try:
            await run_in_threadpool(self.page, path)
        except IsocenterError:
            return await self._lost(request, None)
        if self._streams >= STREAMS_MAX:
            return PlainTextResponse("too many are looking live\n", 503, {"retry-after": "30"})
        self._streams += 1  # here, and not once it is read: a hundred may ask in the same moment
        return _Stream(self._changes(path, request), self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1

    async def _changes(self, path: str, request: Request) -> AsyncIterator[bytes]:
        ends, told, spoke = time.monotonic() + STREAM_S, "", 0.0
        yield b"retry: 5000\n\n"
        while time.monotonic() < ends and not await request.is_disconnected():
            try:
                digest = hashlib.sha256((await run_in_threadpool(self.page, path)).encode()).hexdigest()[:16]
            except IsocenterError:
                return
            if digest != told or time.monotonic() - spoke > KEEP_ALIVE_S:
                told, spoke = digest, time.monotonic()
                yield f"data: {digest}\n\n".encode()
            await asyncio.sleep(TICK_S)


class _Stream(StreamingResponse):
    """Server-sent events; `ended` is called once, whoever ends them, and also if they take longer than STREAM_S to be read."""

    def __init__(self, content: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(STREAM_S + KEEP_ALIVE_S):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.info("a live page that read nothing was given up")
        finally:
            self._ended()


def serve(home: Home, where: Address, ready: Callable[[str], None]) -> None:
    """Show the dashboard until interrupted; `ready` gets its address once it can be looked at. Raises DocumentError."""
    beyond = not door.is_loopback(where.listen)
    login = where.login or beyond
    password = home.root / "keys" / PASSWORD
    if login and not password.is_file():
        why = "beyond this machine" if beyond else "with a login"
        raise DocumentError(
            f"the dashboard is shown {why} only after a password was set",
            remedy="Set one first: fl-server dashboard --set-password",
        )
    bound = door.listen(where.listen, where.port)
    port = int(bound.getsockname()[1])
    hosts = door.names_of(port, {*where.hosts, *(("127.0.0.1", "localhost", "::1") if not beyond else ())})
    if login:
        hosts |= door.names_of(port, {home.settings.host, *({where.listen} - {"0.0.0.0", "::"})})  # noqa: S104  compared
    context = door.tls(where.certificate or home.tls_pem, where.key or home.tls_key) if login else None
    screen = Screen(home, login)
    entry = door.Door(screen.app(), hosts, password if login else None, screen.login_page)
    name = home.settings.host if beyond else "127.0.0.1"
    ready(f"Dashboard: {'https' if login else 'http'}://{name}:{port}/ Stop it with Ctrl-C.")
    door.server(entry, context).run(sockets=[bound])


def run_page(home: Home, run: Progress, now: Snapshot) -> dict[str, Any]:
    """What the page of one run shows beside the overview."""
    run_id = str(run.facts["run_id"])
    study = study_of(home.runs / run_id, str(run.facts.get("digest")))
    sites = {}
    for name, part in sorted(run.sites.items()):
        due = [each for each in run.rounds if not each.asked or name in each.asked]
        took = [name in each.contributors for each in due]
        missed = [each.round for each, inside in zip(due, took, strict=True) if not inside]
        sites[name] = {
            "part": part,
            "trains": study is None or name in study.participation.sites,
            "strip": plots.strip(took),
            "missed": plots.ranges(missed),
            "epsilon": None if study is None else charged(study, part.train_orders),
        }
    last = max((each.round for each in run.rounds), default=0)
    first = run.initial or (None, None, None)
    losses = [plots.Curve("validation", [(0, first[0]), *((each.round, each.loss) for each in run.rounds)])]
    if study is None or study.privacy == "none":
        losses.append(plots.Curve("training", [(each.round, each.train_loss) for each in run.rounds]))
    scores = [
        plots.Curve(
            "validation",
            [(0, first[1] if first[2] is None else first[2]), *((each.round, each.score) for each in run.rounds)],
        )
    ]
    return {
        "run": run,
        "run_id": run_id,
        "study": study,
        "sites": sites,
        "before_it": ahead(now.queue, run_id, home.settings.runs_at_once) if run_id in now.queue else 0,
        "reasons": sorted({reason for part in run.sites.values() for reason in part.refusals}),
        "charts": [plots.chart("Loss", losses, last), plots.chart(run.measure, scores, last, most=1.0)]
        if run.rounds
        else [],
        "promises": promises(study.canonical()) if study is not None and study.privacy != "none" else [],
    }


def tail(path: Path) -> list[dict[str, Any]]:
    """The last lines of a journal, the latest first, as they stand; whether they are genuine is said elsewhere."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - JOURNAL_BYTES))
        lines = file.read().split(b"\n")
    found = []
    for line in reversed(lines if size <= JOURNAL_BYTES else lines[1:]):
        try:
            entry = json.loads(line)
            facts = ", ".join(f"{name} {_short(value)}" for name, value in entry["facts"].items())
            kind, moment = printable(entry["kind"], 128), printable(entry["time"], 40)
            found.append({"n": entry["n"], "time": moment, "kind": kind, "facts": facts})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if len(found) == JOURNAL_LINES:
            break
    return found


def _short(value: object) -> str:
    text = "/".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(f"{text[:12]}…" if len(text) >= 64 and "/" not in text else text, 400)


def shelf() -> jinja2.Environment:
    """The templates. Every value is escaped, and a name that a template does not get is an error, not a blank."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("fl_server"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "ago": ago,
        "about": about,
        "duration": duration,
        "printable": printable,
        "minute": lambda moment: printable(moment, 16).replace("T", " ") if moment else "never",
        "figure": lambda value: "–" if value is None else f"{value:.3f}",
        "epsilon": _epsilon,
        "gib": lambda size: f"{size / 1024**3:.1f} GiB" if size >= 1024**3 else f"{size / 1024**2:.1f} MiB",
        "remedy": remedy_of,
    }
    found.globals |= {"STAGES": STAGES, "TONES": TONES, "STATE_TONES": STATE_TONES}
    return found


def _epsilon(value: float | None) -> str:
    """ε with two decimals, rounded up: never less than it is."""
    if value is None:
        return "–"
    return f"{-(-round(value * 100, 6) // 1) / 100:.2f}"


def about(seconds: float) -> str:
    """A time that is still to come, no more exact than it is known."""
    if seconds < 90:
        return f"about {max(10, round(seconds / 10) * 10)} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def ago(moment_s: float | None, now_s: float) -> str:
    """How long ago something was, in steps so large that a page does not change all the time."""
    if moment_s is None:
        return "never"
    passed = max(0.0, now_s - moment_s)
    for least, unit, word in ((172_800, 86_400, "days"), (7200, 3600, "h"), (120, 60, "min")):
        if passed >= least:
            return f"{int(passed // unit)} {word} ago"
    return "just now"


@functools.cache
def _template_file(name: str) -> bytes:
    return resources.files("fl_server").joinpath("templates", name).read_bytes()
