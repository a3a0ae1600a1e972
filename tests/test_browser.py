"""The dashboard in headless Chromium: the script runs under its policy, pages fit a telephone, and an open page follows a run.

With ISOCENTER_PICTURES=FOLDER the pictures of every page are kept there, for people to look at.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from dashboard_cast import Shown, furnished, shown

from fl_server import dashboard, door

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]
PAGES = ("/", "/runs", "/studies", "/models", "/journal", "/runs/{run}")
LIVE = "document.getElementById('live')?.textContent === 'Live.'"
PASSWORD = "four random words, long enough"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shown, str]]:
    home, _, run = furnished(tmp_path_factory.mktemp("browser"))
    with shown(home) as served:
        yield served, run.run_id


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_every_page_fits_and_nothing_is_refused(
    show: tuple[Shown, str], window: Browser, tmp_path: Path, page: str, width: int, dark: bool
) -> None:
    from PIL import Image

    served, run_id = show
    window.complaints.clear()
    window.size(width, 900, dark=dark)
    window.open(served.address + page.replace("{run}", run_id))
    window.wait(LIVE)
    assert window.value("document.documentElement.scrollWidth") <= width
    assert not window.complaints
    folder = Path(os.environ.get("ISOCENTER_PICTURES", tmp_path))
    name = page.strip("/").replace("/{run}", "") or "overview"
    picture = folder / f"{name}-{'one-' if '{run}' in page else ''}{width}-{'dark' if dark else 'light'}.png"
    window.picture(picture)
    with Image.open(picture) as drawn:
        corner = drawn.convert("L").getpixel((2, 2))
        assert drawn.size[0] == width and isinstance(corner, int) and (corner < 100) == dark


def test_text_stands_out_from_what_is_behind_it(show: tuple[Shown, str], window: Browser) -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1, in both schemes, of all text that is shown. Oracle: the formula of the standard."""
    script = """(() => {
      const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const lum = (c) => { const [r, g, b] = c.map(part);
                           return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const parse = (text) => text.match(/[0-9.]+/g).map(Number);
      const behind = (el) => { for (; el; el = el.parentElement) { const c = parse(getComputedStyle(el).backgroundColor);
                               if (c.length === 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
      const poor = [];
      for (const el of document.querySelectorAll("body *")) {
        if (![...el.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !el.getClientRects().length) continue;
        const style = getComputedStyle(el), svg = el instanceof SVGElement;
        const a = lum(parse(svg ? style.fill : style.color).slice(0, 3)), b = lum(behind(el));
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) poor.push(el.textContent.trim().slice(0, 30) + " " + ratio.toFixed(2));
      }
      return poor; })()"""
    served, run_id = show
    for dark in (False, True):
        for page in ("/", "/studies", f"/runs/{run_id}"):
            window.size(1280, 900, dark=dark)
            window.open(served.address + page)
            assert window.value(script) == []


def test_the_keyboard_is_enough(show: tuple[Shown, str], window: Browser) -> None:
    window.size(1280, 900, dark=False)
    window.open(show[0].address)
    where = "document.activeElement.textContent.trim()"
    window.press("Tab")
    assert window.value(where) == "Skip to the content"
    assert window.value("document.activeElement.getBoundingClientRect().left") >= 0  # it is seen once it is reached
    window.press("Enter")
    window.wait("document.activeElement.id === 'main'")
    window.press("Tab")
    assert window.value("document.querySelector('main').contains(document.activeElement)")


def test_an_open_page_follows_the_run_and_keeps_what_is_open(
    tmp_path: Path, window: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "TICK_S", 0.2)
    home, _, run = furnished(tmp_path)
    with shown(home) as served:
        window.complaints.clear()
        window.open(f"{served.address}/runs/{run.run_id}")
        window.wait(LIVE)
        window.value("document.querySelector('details').open = true; window.same = true")
        run.event("site", site="north", stage="train-report", seconds=77.5)
        window.wait("document.querySelector('main').innerText.includes('77.5')")
        run.event("round_done", round=2, seconds=3.0, contributors=["north"], missing={}, train_loss=0.4, clipped=0)
        window.wait("document.querySelector('main').innerText.includes('2 of 4 rounds')")
        assert window.value("document.querySelector('details').open && window.same")  # swapped, not reloaded
        assert not window.complaints
        window.open("about:blank")


def test_a_person_logs_in_and_out(tmp_path: Path, window: Browser) -> None:
    home, _, _ = furnished(tmp_path)
    door.set_password(home.root / "keys" / dashboard.PASSWORD, PASSWORD)
    with shown(home, login=True) as served:
        window.trust_anything()
        window.size(390, 900, dark=True)
        window.open(served.address)
        assert window.value("location.pathname") == "/login"
        for given, then in (("wrong", "document.querySelector('[role=alert]') !== null"), (PASSWORD, LIVE)):
            window.value(
                f"document.getElementById('password').value = {given!r}; document.querySelector('form').submit()"
            )
            window.wait(then)
        assert window.value("location.pathname") == "/" and window.value("document.cookie") == ""
        assert window.value("document.documentElement.scrollWidth") <= 390
        window.value("document.querySelector('header form').submit()")
        window.wait("location.pathname === '/login'")
        window.open("about:blank")
