"""The pictures of the guides, made anew by the real programs from phantoms, into docs/pictures (`make pictures`).

A consortium of three phantom hospitals runs the study of the demo. Terminals are drawn by rich from what the commands printed,
80 columns wide; pages are taken by a headless Chromium, which has to be installed. Nothing in a picture is of a person, and no
picture loads anything.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import tempfile
import termios
import time
from pathlib import Path

from demo import HOSPITALS
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from stage import BIN, Stage, StageError

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "pictures"
COLUMNS = 80
PATIENTS = 100
WAIT_S = 900


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium and no google-chrome: install one, for example: apt install chromium")
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Stage(Path(scratch) / "stage", lambda text: print(text, flush=True))
        try:
            take(stage, browser)
        finally:
            stage.stop()
    for path in sorted(OUT.iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def take(stage: Stage, browser: str) -> None:
    stage.found()
    stage.serve()
    stage.join_researcher()
    for name, vendor in HOSPITALS.items():
        stage.open_hospital(name, vendor, PATIENTS)
    study = stage.folder / "study.yaml"
    stage.command("fl-study", "new", str(study), "--template", "phantoms")
    digest = stage.submit(study)
    for name in HOSPITALS:
        site = str(stage.site(name))
        draw("check", "fl-client check --home site", terminal("fl-client", "check", "--home", site), site)
        stage.approve(name, digest)
        stage.node(name)
    home = str(stage.coordinator)
    stage.start("dashboard", "Dashboard: ", "fl-server", "dashboard", "--port", "0", "--home", home)
    address = re.search(r"http://\S+/", (stage.folder / "logs" / "dashboard.log").read_text(encoding="utf-8"))
    researcher = str(stage.researcher)
    watched = stage.start("run", "Run ", "fl-study", "run", digest, "--home", researcher)
    log = stage.folder / "logs" / "run.log"
    launched = re.search(r"Run (\S+)", log.read_text(encoding="utf-8"))
    if launched is None or address is None:
        raise StageError("the run or the dashboard did not start")
    run_id = launched[1]
    wait_for_round(stage, run_id, 4)
    page(browser, f"{address[0]}runs/{run_id}", "dashboard", (1000, 900))
    draw("sites", "fl-server sites --home consortium", terminal("fl-server", "sites", "--home", home), home)
    watched.wait(WAIT_S)
    # As a file gets it: lines that stay, without the bar that moves.
    draw("run", "fl-study run study.yaml --home me", log.read_text(encoding="utf-8"), researcher)
    report = stage.folder / "report"
    stage.study("report", digest, "--out", str(report))
    page(browser, (report / "report.html").as_uri(), "report", (900, 1000))


def wait_for_round(stage: Stage, run_id: str, number: int) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        shown = json.loads(stage.command("fl-server", "show", run_id, "--json", "--home", str(stage.coordinator)))
        if shown["round"] >= number:
            return
        time.sleep(1)
    raise StageError(f"round {number} did not come")


def terminal(*words: str) -> str:
    """What a command prints on a terminal of COLUMNS, colours included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen([str(BIN / words[0]), *words[1:]], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        printed += part
    os.close(ours)
    if process.wait() != 0:
        raise StageError(f"{' '.join(words)} failed:\n{printed.decode(errors='replace')}")
    return printed.decode().replace("\r\n", "\n")


def draw(name: str, command: str, printed: str, home: str) -> None:
    """A terminal as SVG, under docs/pictures; the temporary folder reads as the reader's own."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text.from_ansi(printed.replace(home, command.rsplit(" ", 1)[1]).rstrip()))
    # rich's frame asks a server for its font; a reader's own monospace will do.
    frame = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    drawn = console.export_svg(title=command.split(maxsplit=1)[0], theme=MONOKAI, code_format=frame, unique_id=name)
    (OUT / f"{name}.svg").write_text(drawn.replace("Fira Code, monospace", "monospace"), encoding="utf-8")


def page(browser: str, address: str, name: str, size: tuple[int, int]) -> None:
    """The top of a page as PNG."""
    path = OUT / f"{name}.png"
    with tempfile.TemporaryDirectory() as profile:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        words += [f"--window-size={size[0]},{size[1]}", "--timeout=6000", f"--screenshot={path}", address]
        subprocess.run([browser, *words], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
