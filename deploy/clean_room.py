"""The three guides, played as printed by a consortium of strangers, with an installation that knows nothing of the checkout.

    python deploy/clean_room.py [--demo]       (`make clean-room`)

The release folder is made from the checkout. Then each person works in an empty folder elsewhere, and types the ```bash blocks of
their guide, in order: docs/coordinator.md, docs/site-it.md (three hospitals of phantoms) and docs/researcher.md. Coordinator and
hospitals install from the release folder without an index, the researcher with pip from an index. Between the sections the
persons wait for each other as they would in life: PLAY says who does what when.

What is not as printed: the words in capitals are filled in (`Room.word`); the ports are free ones, entered into server.yaml, and
only loopback listens; a question is answered with y; commands that stay (STAY) run beside the others; a block that is marked
`as root` is not run. Every command has to end with 0. Commands and decisions are counted, and seconds measured, for
docs/benchmarks.md.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import wheelhouse
from stage import READY_S, STOP_S, free_port

ROOT = Path(__file__).resolve().parent.parent
HOSPITALS = {"alpine": "aurora", "bayside": "boreal", "central": "cirrus"}
GUIDES = {"coordinator": "coordinator", "researcher": "researcher"} | dict.fromkeys(HOSPITALS, "site-it")
PLAY = [
    ("researcher", "Install"), ("researcher", "Rehearse"),
    ("coordinator", "Install"), ("coordinator", "Found the consortium"), ("coordinator", "Invite"),
    ("hospitals", "Install"), ("hospitals", "Join"), ("hospitals", "Point it at your images"),
    ("researcher", "Submit it"),
    ("hospitals", "Decide"), ("hospitals", "Run"),
    ("researcher", "Run it"),
    ("coordinator", "Watch"),
    ("researcher", "Release the model"),
    ("coordinator", "Release"),
    ("hospitals", "What left"), ("hospitals", "Upgrade"), ("hospitals", "Leave"),
    ("coordinator", "Upgrade, and let somebody go"),
]  # fmt: skip
"""Who types which section of their guide; every section with a block is in it, which `sections_left` checks."""
STAY = {"fl-server start": "is ready", "fl-client start": "waits for orders", "fl-server dashboard": "Dashboard: "}
"""Commands that a person leaves running in a terminal of its own -> what they print when they are ready."""
ASK = ("fl-client approve", "fl-server revoke")
"""Commands that ask before they do it."""
COMMAND_S = 1500
WORD = re.compile(r"(?<![\w$-])[A-Z]{3,}\b")
WORDS = {"RELEASE", "HOST", "LINE", "NAME", "VENDOR", "DIGEST", "RUN", "PACKAGE"}
BLOCK = re.compile(r"^```bash([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class RoomError(Exception):
    """A command of a guide failed, or the guides and the play do not fit."""


@dataclass
class Person:
    name: str
    folder: Path
    environment: dict[str, str]
    before: str = ""  # what this person's terminal has done that lasts: activated an environment
    typed: list[tuple[str, str, float]] = field(default_factory=list)  # section, command as printed, seconds
    words: set[str] = field(default_factory=set)  # what had to be filled in
    answers: int = 0


def sections(guide: str) -> dict[str, list[str]]:
    """Title -> the commands of its ```bash blocks, as printed; blocks that are marked stay out."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
    for part in text.split("\n## ")[1:]:
        lines = [line for mark, body in BLOCK.findall(part) if not mark for line in body.splitlines()]
        found[part.partition("\n")[0]] = lines
    return found


def sections_left() -> list[tuple[str, str]]:
    """(guide, section) of every section with commands that nobody plays."""
    played = {(GUIDES["alpine" if who == "hospitals" else who], title) for who, title in PLAY}
    there = {(guide, title) for guide in GUIDES.values() for title, lines in sections(guide).items() if lines}
    return sorted(there ^ played)


class Room:
    """The persons, what they told each other, and the programs that they left running."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.release = folder, folder / "release"
        self.persons = {name: self._person(name) for name in GUIDES}
        self.lines: dict[str, str] = {}  # whom an invitation is for -> the line
        self.told: dict[str, str] = {}  # DIGEST, RUN, PACKAGE, as somebody's screen showed them
        self.screen = ""
        self.running: list[subprocess.Popen[bytes]] = []

    def _person(self, name: str) -> Person:
        place = self.folder / name
        place.mkdir(parents=True)
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        bare = Path(
            getattr(sys, "_base_executable", sys.executable)
        ).parent  # python3 of this version, without our packages
        kept["PATH"] = f"{bare}{os.pathsep}{os.defpath}"
        if name != "researcher":  # no index, no other place to find a package in: what a hospital has
            kept = {key: value for key, value in kept.items() if not key.startswith("PIP_")} | {
                "PIP_CONFIG_FILE": os.devnull
            }
        return Person(name, place, kept)

    def play(self) -> None:
        for who, title in PLAY:
            for name in HOSPITALS if who == "hospitals" else (who,):
                print(f"# {name}: {title}", flush=True)
                self.section(self.persons[name], title)

    def section(self, person: Person, title: str) -> None:
        for line in sections(GUIDES[person.name])[title]:
            began = time.monotonic()
            if title == "Install" and person.name in HOSPITALS:
                self.share(person, line)  # one machine: the same commands, counted, with the result that is there
            else:
                self.type(person, line)
            seconds = time.monotonic() - began
            person.typed.append((title, line, seconds))
            print(f"{seconds:7.1f} s  {line}", flush=True)
            self.hear(person, line)

    def share(self, person: Person, line: str) -> None:
        if line not in sections("coordinator")["Install"]:
            raise RoomError(f"the guides of hospital and coordinator install differently: {line}")
        person.words |= {word for word in WORD.findall(line) if word in WORDS}
        person.before = f". {shlex.quote(str(self.persons['coordinator'].folder / 'env/bin/activate'))}\n"

    def type(self, person: Person, line: str) -> None:
        """One command as a person types it, with the words filled in. Raises RoomError unless it ends with 0."""
        command = WORD.sub(lambda match: self.word(person, match[0]), line)
        until = next((said for start, said in STAY.items() if line.startswith(start)), None)
        if until is not None:
            self.stay(person, command, until)
            return
        question = line.startswith(ASK)
        person.answers += question
        log = person.folder / "screen.txt"
        done = subprocess.run(
            ["bash", "-c", person.before + command],
            cwd=person.folder, env=person.environment, input="y\n" if question else "", timeout=COMMAND_S,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        with log.open("a", encoding="utf-8") as screen:
            screen.write(f"$ {line}\n{done.stdout}{done.stderr}")
        if done.returncode != 0:
            raise RoomError(f"{person.name}: {line}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
        if line.startswith(". "):
            person.before += line + "\n"
        self.screen = done.stdout

    def stay(self, person: Person, command: str, until: str) -> None:
        """Start a command that goes on, and wait until it is ready."""
        path = person.folder / f"{command.split()[1]}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"{person.before}exec {command}"],
                cwd=person.folder, env=person.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        self.screen = ""
        end = time.monotonic() + 4 * READY_S
        while until not in path.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > end:
                raise RoomError(f"{person.name}: {command} did not get ready:\n{path.read_text(encoding='utf-8')}")
            time.sleep(0.1)

    def word(self, person: Person, word: str) -> str:
        """What this person writes for a word in capitals."""
        if word not in WORDS:
            return word
        person.words.add(word)
        known = {"RELEASE": str(self.release), "HOST": "127.0.0.1", "NAME": person.name}
        known |= {"VENDOR": HOSPITALS.get(person.name, ""), "LINE": self.lines.get(person.name, "")} | self.told
        if not known.get(word):
            raise RoomError(f"{person.name} was not told any {word}")
        return known[word]

    def hear(self, person: Person, line: str) -> None:
        """What others learn from a command: by telephone, by mail, or from their own screen."""
        if line.startswith("fl-server init"):
            self._ports(person.folder / "consortium" / "server.yaml")
        elif line.startswith("fl-server invite"):
            guest = "researcher" if "--researcher" in line else line.split()[2]
            self.lines[guest] = self._found(r"isocenter-join:\S+")
        elif line.startswith("fl-study submit"):
            self.told["DIGEST"] = self._found(r"\b[0-9a-f]{64}\b")
        elif line.startswith("fl-study report"):
            runs = self.persons["coordinator"].folder / "consortium" / "runs"
            self.told["RUN"] = next(runs.iterdir()).name
        elif line.startswith("fl-study release"):
            self.told["PACKAGE"] = str(next(person.folder.glob("*.isocenter")))

    def _found(self, pattern: str) -> str:
        match = re.search(pattern, self.screen)
        if match is None:
            raise RoomError(f"no {pattern} on the screen:\n{self.screen}")
        return match[0]

    def _ports(self, settings: Path) -> None:
        text = settings.read_text(encoding="utf-8").replace('"0.0.0.0"', '"127.0.0.1"')
        text = text.replace("9440", str(free_port())).replace("9441", str(free_port()))
        settings.write_text(text, encoding="utf-8")

    def stop(self) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in reversed(self.running):
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def counted(room: Room) -> Iterator[dict[str, object]]:
    """Of each kind of person: words to fill in, questions, and commands and seconds by section."""
    for name in ("alpine", "coordinator", "researcher"):
        person = room.persons[name]
        parts: dict[str, dict[str, float]] = {}
        for title, _, took in person.typed:
            part = parts.setdefault(title, {"commands": 0, "seconds": 0.0})
            part["commands"] += 1
            part["seconds"] = round(part["seconds"] + took, 1)
        words = sorted(person.words)
        yield {"guide": f"docs/{GUIDES[name]}.md", "words": words, "questions": person.answers, "sections": parts}


def invited_to_ready(room: Room) -> float:
    """Seconds of the commands between the line of the invitation and a good `fl-client check`, the installation included."""
    first = [("coordinator", "Install"), ("alpine", "Join"), ("alpine", "Point it at your images")]
    return sum(took for name, section in first for title, _, took in room.persons[name].typed if title == section)


def rehearsed(room: Room) -> float:
    """Seconds of the researcher's commands from an empty folder to the report of a simulated study."""
    return sum(took for title, _, took in room.persons["researcher"].typed if title in ("Install", "Rehearse"))


def clone_to_report() -> float:
    """Seconds of `git clone` and `make demo` in an empty folder, the environment included."""
    with tempfile.TemporaryDirectory(prefix="isocenter-clone-") as scratch:
        began = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), "isocenter"], cwd=scratch, check=True)
        subprocess.run(["make", "demo"], cwd=Path(scratch) / "isocenter", check=True)
        return time.monotonic() - began


def main() -> None:
    options = argparse.ArgumentParser(description="Play the three guides as printed, away from the checkout.")
    options.add_argument("--out", type=Path, default=ROOT / "clean-room.json", help="where the figures go")
    options.add_argument("--demo", action="store_true", help="measure from `git clone` to the demo's report as well")
    options.add_argument("--keep", type=Path, help="an empty folder to work in, which stays")
    chosen = options.parse_args()
    if left := sections_left():
        raise SystemExit(f"sections that nobody plays, or that are not there: {left}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so what was started is ended
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="isocenter-clean-room-"))
    room = Room(folder.resolve())
    began = time.monotonic()
    try:
        print("# a release folder is made", flush=True)
        wheelhouse.make(room.release)
        made = time.monotonic()
        room.play()
    except RoomError as error:
        raise SystemExit(f"the clean room failed: {error}") from None
    finally:
        room.stop()
        if chosen.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    figures = {
        "release_s": round(made - began, 1), "all_s": round(time.monotonic() - began, 1),
        "rehearsed_s": round(rehearsed(room), 1), "invited_to_ready_s": round(invited_to_ready(room), 1),
        "guides": list(counted(room)),
    }  # fmt: skip
    if chosen.demo:
        figures["clone_to_report_s"] = round(clone_to_report(), 1)
    chosen.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
