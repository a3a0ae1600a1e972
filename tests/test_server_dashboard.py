"""The dashboard's pages: what they say, that nothing of others becomes markup, and that looking changes nothing."""

import hashlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from coordinator import coordinator
from dashboard_cast import EVIL, SITES, Shown, furnished, online, shown
from prometheus_client.parser import text_string_to_metric_families
from test_server_run import study

from fl_server import dashboard, metrics, overview, plots
from fl_server.roster import Home
from fl_server.run import Run
from models.study import Study, read
from privacy import accounting

PAGES = ("/", "/runs", "/studies", "/models", "/journal")


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Study, Run]:
    return furnished(tmp_path_factory.mktemp("dashboard"))


@pytest.fixture(scope="module")
def show(cast: tuple[Home, Study, Run]) -> Iterator[Shown]:
    with shown(cast[0]) as served:
        served.screen.overview.book.wait(20)
        yield served


class Page(HTMLParser):
    """The tags and the text of a page, as a browser would have them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def everything(show: Shown, cast: tuple[Home, Study, Run]) -> dict[str, str]:
    found = {path: httpx.get(show.address + path) for path in (*PAGES, f"/runs/{cast[2].run_id}")}
    assert {path: answer.status_code for path, answer in found.items()} == dict.fromkeys(found, 200)
    return {path: answer.text for path, answer in found.items()}


def test_versions_and_readiness_are_told_in_numbers_and_words(show: Shown, cast: tuple[Home, Study, Run]) -> None:
    from privacy.greeting import own

    text = " ".join(Page(everything(show, cast)["/"]).text.split())
    here = own()
    assert f"north online just now ready {here.release}" in text
    assert (
        "not ready images, labels, disk 0.0.9 upgrade" in text
        and "west never connected never not told not told" in text
    )
    assert f"south has to upgrade to Isocenter {here.release}." in text
    assert f"This coordinator has to upgrade to Isocenter {here.major}.{here.minor + 1}.0." in text
    assert "south is not ready: images, labels, disk." in text


def test_pages_begin_alike_those_of_login_and_trouble_too(show: Shown) -> None:
    import httpx

    heads = [show.screen.login_page(""), httpx.get(f"{show.address}/nothing").text, httpx.get(show.address).text]
    for text in heads:
        head = text.partition("</head>")[0]
        assert head.count("<meta") == 3 and 'rel="icon"' in head and "<title>" in head and "dashboard.css" in head
    titles = [text.partition("<title>")[2].partition("</title>")[0] for text in heads]
    assert titles == ["Log in – chest", "There is no such page here. – chest", "Overview – chest"]


def test_pages_say_what_there_is(show: Shown, cast: tuple[Home, Study, Run]) -> None:
    run = cast[2]
    pages = {path: " ".join(Page(text).text.split()) for path, text in everything(show, cast).items()}
    for part in (
        "north online just now",
        "south silent",
        "west never connected",
        "gone revoked",
        "newcomer site invited",
        "ada",
    ):
        assert part in pages["/"], part
    assert "The coordinator does not answer" in pages["/"] and "south is silent since" in pages["/"]
    for part in ("north approves", "south no answer", "west declined", "1 of 3 sites approve; a round needs 2"):
        assert part in pages["/studies"], part
    one = pages[f"/runs/{run.run_id}"]
    for part in (
        "round 2 of 4, training: north, south",
        "1 of 4 rounds committed",
        "Median round 1 s",
        "north training 1 of 1",
    ):
        assert part in one, part
    assert "Ask the site what its node says." in one
    assert "whole" in pages["/journal"] and "study-offered" not in pages["/journal"] and "invited" in pages["/journal"]


def test_a_model_is_listed_once_its_run_has_finished(tmp_path: Path) -> None:
    home, _, run = furnished(tmp_path)
    assert overview.Overview(home).look().models == []
    (run.folder / "model.safetensors").write_bytes(b"x" * 2048)
    run.facts |= {"state": "partial", "label": "partial (2 of 3, west missing since round 2)", "finished": "2026-01-01"}
    run._save_facts()
    [row] = overview.Overview(home).look().models
    assert (row.run_id, row.bytes, row.private) == (run.run_id, 2048, False)
    text = dashboard.Screen(home).page("/models")
    assert "west missing since round 2" in text
    assert "must not be reported as one of the whole study" in dashboard.Screen(home).page(f"/runs/{run.run_id}")


def test_what_others_wrote_is_never_markup(show: Shown, cast: tuple[Home, Study, Run]) -> None:
    for path, text in everything(show, cast).items():
        page = Page(text)
        assert not page.all("img"), path
        assert [each.get("src") for each in page.all("script")] == ["/static/dashboard.js"], path
        assert "\x1b" not in text
    assert "&lt;script&gt;alert(2)" in httpx.get(f"{show.address}/studies").text
    assert "&lt;img src=x onerror=alert(1)&gt;" in httpx.get(f"{show.address}/runs/{cast[2].run_id}").text


def test_a_browser_may_load_nothing_from_elsewhere_and_run_nothing_inline(
    show: Shown, cast: tuple[Home, Study, Run]
) -> None:
    answer = httpx.get(show.address)
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert rules.pop("default-src") == "'none'" and set(rules.values()) <= {"'self'", "'none'"}
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    for text in everything(show, cast).values():
        page = Page(text)
        assert not page.all("style") and not page.all("iframe") and not page.all("base")
        for _, attributes in page.tags:
            assert not any(key == "style" or key.startswith("on") for key in attributes)
            for key in ("href", "src", "action"):
                assert (attributes.get(key) or "/").startswith(("/", "#"))
    for name in ("dashboard.js", "dashboard.css", "icon.svg"):
        static = httpx.get(f"{show.address}/static/{name}")
        assert static.status_code == 200 and "http" not in static.text.replace("http://www.w3.org/2000/svg", "")


def test_pages_can_be_read_without_eyes_or_mouse(show: Shown, cast: tuple[Home, Study, Run]) -> None:
    for path, text in everything(show, cast).items():
        page = Page(text)
        assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("main")) == 1, path
        assert page.all("a")[0] == {"class": "skip", "href": "#main"} and page.all("nav")[0]["aria-label"]
        assert sum("aria-current" in each for each in page.all("a")) == 1
        assert all(each.get("scope") in ("col", "row") for each in page.all("th"))
        assert all("aria-label" in each or each.get("aria-hidden") for each in page.all("svg"))
        assert len(page.all("table")) == sum(each.get("class") == "scroll" for each in page.all("div"))
        identities = [a["id"] for _, a in page.tags if "id" in a]
        assert len(identities) == len(set(identities))
        assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(identities)
        parts = [a["data-part"] for _, a in page.tags if "data-part" in a]
        assert parts and len(parts) == len(set(parts))


def test_looking_changes_nothing(show: Shown, cast: tuple[Home, Study, Run]) -> None:
    home = cast[0]

    def digests() -> dict[str, str]:
        files = [home.journal.path, home.root / "server.yaml", *home.runs.rglob("*"), *(home.root / "keys").iterdir()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}

    before = digests()
    everything(show, cast)
    httpx.get(f"{show.address}/metrics")
    assert digests() == before


def test_a_damaged_journal_and_a_damaged_run_are_told_and_hide_nothing(tmp_path: Path) -> None:
    home, _, run = furnished(tmp_path)
    lines = home.journal.path.read_bytes().split(b"\n")
    home.journal.path.write_bytes(b"\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    (home.runs / "broken").mkdir()
    (home.runs / "broken" / "run.json").write_text("{")
    screen = dashboard.Screen(home)
    screen.overview.book.wait(20)
    text = screen.page("/")
    assert "The journal is damaged" in text and "line 2" in text and str(home.root) not in text
    assert run.run_id in screen.page("/runs")


def test_parties_stand_where_their_certificates_and_heartbeats_say(cast: tuple[Home, Study, Run]) -> None:
    home, now = cast[0], time.time()
    north = home.roster.party("north")
    assert north.node_id is not None and north.node_id > 2**63
    rows = [
        overview.site_row(north, {north.node_id: now + 50}, now),
        overview.site_row(north, {north.node_id: now - 60}, now),
        overview.site_row(north, {north.node_id: now - overview.SILENT_S - 1}, now),
        overview.site_row(north, {}, now),
        overview.site_row(north, None, now),
        overview.site_row(north, {north.node_id: now + 31 * 86400 + 9}, now + 31 * 86400),
    ]
    assert [(row.state, row.tone) for row in rows] == [
        ("online", "good"), ("silent", "look"), ("silent", "bad"), ("never connected", "look"), ("enrolled", "good"),
        ("certificate ended", "bad"),
    ]  # fmt: skip
    assert overview.online_until(Path("/nonexistent")) is None
    assert overview.online_until(home.root) is not None


def test_flower_still_keeps_its_nodes_where_we_look() -> None:
    from flwr.supercore.state.schema.linkstate_models import Node

    assert Node.__tablename__ == "node" and {"node_id", "online_until"} <= {c.name for c in Node.__table__.columns}


def test_certificates_disk_and_silence_want_attention_in_time(tmp_path: Path) -> None:
    home, _, _ = furnished(tmp_path)
    look = overview.Overview(home)
    now = look.look()
    later = [overview.site_row(home.roster.party("north"), {}, now.at_s + 27 * 86400)]
    changed = overview.Snapshot(
        **(vars(now) | {"sites": later, "disk": overview.Disk(1, 100), "attention": [], "serving": True})
    )
    told = [each.sentence for each in overview.attention(changed, look.book.known, home)]
    assert any("certificate of north ends in 2 days" in each for each in told)
    assert any("left on the coordinator's disk" in each for each in told)
    assert not any("does not answer" in each for each in told)


def test_the_epsilon_of_a_site_follows_the_orders_it_was_sent() -> None:
    private = read(Study, Path("configs/studies/opacity_private.yaml")).with_noise()
    assert private.privacy != "none"
    exact = accounting.epsilon([private.event(3)], private.privacy.delta)
    assert overview.charged(private, 3) == pytest.approx(exact, rel=1e-3)
    assert overview.charged(private, 0) == 0.0 and overview.charged(study(), 3) is None
    assert dashboard._epsilon(1.1402) == "1.15" and dashboard._epsilon(3.0) == "3.00"


def test_ready_means_that_both_doors_answer(tmp_path: Path) -> None:
    with coordinator(tmp_path) as served:
        look = overview.Overview(served.home)
        assert not overview.serving(served.home)  # the service alone is not enough
        with socket.create_server(("127.0.0.1", served.home.settings.gateway_port)):
            assert look.serving() and overview.serving(served.home)
        assert not overview.serving(served.home)


# Metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads(show: Shown, cast: tuple[Home, Study, Run]) -> None:
    answer = httpx.get(f"{show.address}/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"] == metrics.CONTENT_TYPE
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    value = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    run_id = cast[2].run_id
    assert value["isocenter_site_online", "north"] == 1 and value["isocenter_site_online", "south"] == 0
    assert value["isocenter_runs", "running"] == 1 and value["isocenter_run_rounds_done", run_id] == 1
    assert value["isocenter_journal_whole",] == 1 and value["isocenter_serving",] == 0
    assert ("isocenter_site_online", "gone") not in value
    assert {label for family in families.values() for sample in family.samples for label in sample.labels} == {
        "site", "party", "role", "state", "run", "reason",
    }  # fmt: skip
    assert httpx.get(f"{show.address}/healthz").text == "ok\n"
    assert httpx.get(f"{show.address}/readyz").status_code == 503


# Live ----------------------------------------------------------------------------------------------------------------


def test_a_page_that_is_open_hears_of_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "TICK_S", 0.2)
    home, _, run = furnished(tmp_path)
    with shown(home) as served, httpx.stream("GET", f"{served.address}/live?page=/runs/{run.run_id}") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        first = next(lines)
        run.event("site", site="north", stage="train-report", seconds=1.5)
        assert next(lines) != first
        assert "1.5" in httpx.get(f"{served.address}/runs/{run.run_id}").text


def test_only_so_many_look_live_and_pages_go_on_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "TICK_S", 0.2)
    home, _, _ = furnished(tmp_path)
    with shown(home) as served:
        links: list[socket.socket] = []
        for _ in range(100):
            link = socket.create_connection(("127.0.0.1", served.port), timeout=10)
            link.sendall(f"GET /live?page=/ HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode())
            links.append(link)
        statuses = [int(link.recv(64).split()[1]) for link in links]
        assert statuses.count(200) == dashboard.STREAMS_MAX
        assert set(statuses) == {200, 503}
        began = time.monotonic()
        assert httpx.get(served.address).status_code == 200 and time.monotonic() - began < 5
        for link in links:
            link.close()
        end = time.monotonic() + 10
        while served.screen._streams and time.monotonic() < end:
            time.sleep(0.1)
        assert served.screen._streams == 0
        assert httpx.get(f"{served.address}/live?page=/nothing").status_code == 404


# Plots ---------------------------------------------------------------------------------------------------------------


def test_a_plot_has_its_points_where_they_belong_and_gaps_where_nothing_is_known() -> None:
    curve = plots.Curve("validation", [(0, 0.9), (1, 0.7), (2, None), (3, 0.5), (4, math.nan)])
    drawn = plots.chart("Loss", [curve], 4)
    assert len(drawn.curves[0].paths) == 1 and len(drawn.curves[0].dots) == 3
    ticks = [(float(text), place) for place, text in drawn.y]
    (low, at_low), (high, at_high) = ticks[0], ticks[-1]
    assert low <= 0.5 and high >= 0.9
    for (_, y), value in zip(drawn.curves[0].dots, (0.9, 0.7, 0.5), strict=True):
        assert y == pytest.approx(at_low + (at_high - at_low) * (value - low) / (high - low), abs=0.06)
    assert drawn.summary == "Loss by round: validation from 0.900 to nan." or "0.500" in drawn.summary
    flat = plots.chart("AUROC", [plots.Curve("validation", [(1, 1.0)])], 1, most=1.0)
    assert max(float(text) for _, text in flat.y) <= 1.0
    assert plots.chart("Loss", [], 0).y  # nothing known is no error
    cells = plots.strip([True, False])
    assert [cell.inside for cell in cells] == [True, False] and cells[0].height > cells[1].height
    assert plots.ranges([1, 2, 3, 7]) == "1–3, 7"


def test_pages_are_made_by_many_threads_at_once(cast: tuple[Home, Study, Run]) -> None:
    screen, failed = dashboard.Screen(cast[0]), list[BaseException]()

    def render() -> None:
        try:
            for path in (*PAGES, f"/runs/{cast[2].run_id}"):
                screen._rendered.clear()
                screen.page(path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=render) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_the_tail_of_a_journal_is_bounded_and_survives_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    good = json.dumps(
        {"n": 1, "time": "2026-01-01T00:00:00Z", "kind": "refusal", "facts": {"code": EVIL, "sites": list(SITES)}}
    )
    path.write_text("noise\n[1]\n" + f"{good}\n" * 5000 + '{"torn')
    found = dashboard.tail(path)
    assert len(found) == dashboard.JOURNAL_LINES and found[0]["facts"].startswith("code <img")
    assert "\x1b" not in found[0]["facts"] and "north/south/west" in found[0]["facts"]
    path.write_text("")
    assert dashboard.tail(path) == []


def test_a_node_that_comes_back_is_online_again(tmp_path: Path) -> None:
    home, _, _ = furnished(tmp_path)
    online(home, south=3600.0)
    states = {row.name: row.state for row in overview.Overview(home).look().sites}
    assert states["south"] == "online"
