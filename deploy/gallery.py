"""The pictures of docs/gallery.md: real runs on phantoms, and of what they wrote, pages in headless Chromium.

    python deploy/gallery.py [WORK]       everything below the folder WORK (demo/gallery), pictures into docs/pictures

What is in WORK already is not run again. Nothing is drawn by hand: a picture is the page of a program of ours, or a part of it.
"""

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from stage import Stage, free_port

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # where the browser is that tests of pages use

from browser import Browser, browser  # noqa: E402  the line above makes it importable

PICTURES = ROOT / "docs" / "pictures"
HOSPITALS = {"alpine": "aurora", "bayside": "boreal", "central": "cirrus"}
WIDTH, COLOURS, SIZE_MOST = 1100, 160, 150_000
EDGES = "[...document.querySelectorAll('h2, figure')].map(e => [e.innerText, e.getBoundingClientRect().top])"


def main(work: Path) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    stage = Stage(work / f"stage-{int(time.time())}", lambda text: print(text, flush=True))
    try:
        rehearse(stage, work, "phantoms", "--compare")
        rehearse(stage, work, "outlines")
        rehearse(stage, work, "extent")
        with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
            reports(window, work)
            consortium(stage, window)
    finally:
        stage.stop()
        shutil.rmtree(stage.folder)


def rehearse(stage: Stage, work: Path, template: str, *words: str) -> None:
    """A template of ours, rehearsed as it stands."""
    study, out = work / f"{template}.yaml", work / template
    if not (out / "report.html").is_file():
        study.unlink(missing_ok=True)
        stage.command("fl-study", "new", str(study), "--template", template)
        print(stage.command("fl-study", "simulate", str(study), "--out", str(out), *words), end="", flush=True)


def reports(window: Browser, work: Path) -> None:
    window.size(WIDTH, 900, dark=False)
    whole = show(window, (work / "phantoms" / "report.html").resolve().as_uri())
    save("gallery-report", whole.picture.resize((whole.picture.width // 3, whole.picture.height // 3)))
    for name, first, last in (
        ("gallery-answer", "", "Held-out performance"),
        ("gallery-performance", "Held-out performance", "Receiver operating"),
        ("gallery-thresholds", "At thresholds", "Calibration"),
        ("gallery-calibration", "Calibration", "Where the model looks"),
        ("gallery-saliency", "Where the model looks", "Beside models"),
        ("gallery-matrix", "Beside models", "How it was learned"),
        ("gallery-protection", "Protection and privacy", "Study settings"),
    ):
        save(name, whole.part(first, last))
    outlines = show(window, (work / "outlines" / "report.html").resolve().as_uri())
    save("gallery-outlines", outlines.part("Held-out outlines", "Who took part"))
    number = show(window, (work / "extent" / "report.html").resolve().as_uri())
    save("gallery-number", number.part("Held-out performance", "Where the model looks"))


class Shown:
    """A page as a picture from top to bottom, and where its headings are."""

    def __init__(self, picture: Image.Image, edges: list[tuple[str, float]]) -> None:
        self.picture, self.edges = picture, edges

    def part(self, first: str, last: str) -> Image.Image:
        """From the heading that begins with `first` (or the top) to the one that begins with `last`."""
        top = 0 if not first else self._place(first) - 16
        return self.picture.crop((0, top, self.picture.width, self._place(last) - 16))

    def _place(self, beginning: str) -> int:
        found = [int(top) for text, top in self.edges if text.startswith(beginning)]
        if not found:
            raise SystemExit(f"no heading begins with {beginning!r}; there are {[text for text, _ in self.edges]}")
        return found[0]


def show(window: Browser, address: str) -> Shown:
    window.open(address)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.png"
        window.picture(path)
        picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    return Shown(picture, window.value(EDGES))


def save(name: str, picture: Image.Image) -> None:
    """As a PNG of few colours, which text and plots need no more of, without the margins that a wide screen leaves."""
    path = PICTURES / f"{name}.png"
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {picture.width} x {picture.height}, {size // 1000} kB", flush=True)
    if size > SIZE_MOST:
        raise SystemExit(f"{path} is larger than {SIZE_MOST} bytes")


def consortium(stage: Stage, window: Browser) -> None:
    """Three hospitals and a run between them as separate processes: the dashboard, and one hospital's own page."""
    stage.found()
    stage.serve()
    for name, vendor in HOSPITALS.items():
        stage.open_hospital(name, vendor, 120)
    stage.join_researcher()
    study = stage.folder / "study.yaml"
    stage.command("fl-study", "new", str(study), "--template", "phantoms")
    study.write_text(study.read_text(encoding="utf-8").replace("rounds: 8", "rounds: 3"), encoding="utf-8")
    digest = stage.submit(study)
    for name in HOSPITALS:
        stage.command("fl-client", "check", "--home", str(stage.site(name)))
        stage.approve(name, digest)
        stage.node(name)
    stage.study("run", digest)
    page = stage.folder / "readiness.html"
    stage.command("fl-client", "check", "--page", str(page), "--home", str(stage.site("alpine")))
    ready = show(window, page.resolve().as_uri())
    save("gallery-readiness", ready.picture.crop((0, 0, WIDTH, min(1500, ready.picture.height))))
    port = str(free_port())
    stage.start("dashboard", "http", "fl-server", "dashboard", "--port", port, "--home", str(stage.coordinator))
    for name, path in (("overview", "/"), ("run", f"/runs/{run_of(stage)}")):
        save(f"gallery-dashboard-{name}", show(window, f"http://127.0.0.1:{port}{path}").picture)


def run_of(stage: Stage) -> str:
    return next(path.name for path in (stage.coordinator / "runs").iterdir() if path.is_dir())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "demo" / "gallery")
