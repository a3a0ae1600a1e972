"""The guides of the first hour and what they stand on: every command is played, pages stay pages, packages cannot be swapped.

`make clean-room` plays the guides whole, which takes minutes; here is what can be said of them in seconds.
"""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import clean_room
import pytest
import wheelhouse

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted(set(clean_room.GUIDES.values()))
LINES_MOST = 120  # a page and its pictures
PICTURE_BYTES_MOST = 150_000


def text_of(guide: str) -> str:
    return (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")


# The guides ----------------------------------------------------------------------------------------------------------


def test_every_section_with_commands_is_played_and_every_played_section_is_there() -> None:
    assert clean_room.sections_left() == []


def test_a_section_that_nobody_plays_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean_room, "PLAY", [step for step in clean_room.PLAY if step != ("hospitals", "Decide")])
    assert clean_room.sections_left() == [("site-it", "Decide")]


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_is_one_page_and_its_words_to_fill_in_are_known(guide: str) -> None:
    assert len(text_of(guide).splitlines()) <= LINES_MOST
    used = {
        word
        for lines in clean_room.sections(guide).values()
        for line in lines
        for word in clean_room.WORD.findall(line)
    }
    assert used <= clean_room.WORDS
    assert "Words in capitals are yours to fill in" in text_of(guide)


@pytest.mark.parametrize("guide", GUIDES)
def test_only_blocks_for_root_are_left_out(guide: str) -> None:
    fences = re.findall(r"^```(\w.*)$", text_of(guide), re.MULTILINE)
    assert set(fences) <= {"bash", "bash as root"}


def test_hospital_and_coordinator_install_with_the_same_commands() -> None:
    assert clean_room.sections("site-it")["Install"] == clean_room.sections("coordinator")["Install"]


def test_the_counts_in_the_benchmarks_are_those_of_the_guides() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    number = {guide: {title: len(lines) for title, lines in clean_room.sections(guide).items()} for guide in GUIDES}
    node = sum(number["site-it"][title] for title in ("Install", "Join", "Point it at your images", "Decide", "Run"))
    phantoms = [
        line for line in clean_room.sections("site-it")["Point it at your images"] if not line.startswith("fl-client")
    ]
    phantoms += [line for line in clean_room.sections("site-it")["Point it at your images"] if "phantom" in line]
    coordinator = number["coordinator"]
    once = coordinator["Install"] + coordinator["Found the consortium"]
    model = once + sum(coordinator[title] for title in ("Invite", "Watch", "Release"))
    assert f"| hospital, to the running node | {node} |" in text
    assert f"| coordinator, to the published model | {model} |" in text
    assert f"| researcher, to the released model | {sum(number['researcher'].values())} |" in text
    assert f"| {node}, or {node - len(phantoms)} with images of its own |" in text
    assert f"| the release folder, one line | {once}, and 1 |" in text


# The room ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def room(tmp_path: Path) -> clean_room.Room:
    return clean_room.Room(tmp_path / "room")


def test_a_command_that_fails_ends_the_play_with_what_it_printed(room: clean_room.Room) -> None:
    with pytest.raises(clean_room.RoomError, match=r"(?s)alpine: echo no; exit 3.*no\n"):
        room.type(room.persons["alpine"], "echo no; exit 3")


def test_a_word_that_nobody_told_is_not_made_up(room: clean_room.Room) -> None:
    with pytest.raises(clean_room.RoomError, match="alpine was not told any DIGEST"):
        room.type(room.persons["alpine"], "fl-client approve DIGEST")


def test_words_are_filled_in_and_nothing_else_of_a_command_is_changed(room: clean_room.Room) -> None:
    person = room.persons["bayside"]
    room.type(person, "echo NAME VENDOR $PATH SHA256SUMS XYZ 'NAMES' > said.txt")
    said = (person.folder / "said.txt").read_text().split()
    assert said[:2] == ["bayside", "boreal"] and said[-3:] == ["SHA256SUMS", "XYZ", "NAMES"]
    assert person.words == {"NAME", "VENDOR"}


def test_nothing_of_the_checkout_is_on_the_way_of_a_person(room: clean_room.Room) -> None:
    for person in room.persons.values():
        seen = " ".join(f"{key}={value}" for key, value in person.environment.items() if key != "PWD")
        assert "PYTHONPATH" not in person.environment and "VIRTUAL_ENV" not in person.environment
        assert str(Path(sys.prefix)) not in person.environment["PATH"], seen
    assert not [
        key for key in room.persons["alpine"].environment if key.startswith("PIP_") and key != "PIP_CONFIG_FILE"
    ]


# The release folder --------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, content: str = "") -> Path:
    """A wheel that pip takes, with one module."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_requirements_name_every_wheel_with_its_hash(tmp_path: Path) -> None:
    mine, other = wheel(tmp_path, "isocenter", "0.1.0"), wheel(tmp_path, "torch", "2.13.0+cpu")
    said = wheelhouse.requirements(tmp_path, "torch==2.13.0\n")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (mine, other)]
    assert said == f"isocenter==0.1.0 --hash=sha256:{hashes[0]}\ntorch==2.13.0+cpu --hash=sha256:{hashes[1]}\n"


@pytest.mark.parametrize("lock", ["", "leftpad==1.0.1\n", "leftpad==1.0\n"])
def test_a_package_without_its_pin_is_not_packed(tmp_path: Path, lock: str) -> None:
    wheel(tmp_path, "leftpad", "1.0.2")
    with pytest.raises(ValueError, match=r"leftpad-1\.0\.2.* is not what constraints\.txt pins"):
        wheelhouse.requirements(tmp_path, lock)


def install(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [
        "install",
        "--no-index",
        "--find-links",
        ".",
        "--require-hashes",
        "-r",
        "requirements.txt",
        "--target",
        "put",
    ]
    return subprocess.run(
        [sys.executable, "-m", "pip", *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_swapped_wheel_is_refused_by_the_hashes_and_by_the_sums(tmp_path: Path) -> None:
    wheel(tmp_path, "leftpad", "1.0.2", "ours = 1")
    (tmp_path / "requirements.txt").write_text(wheelhouse.requirements(tmp_path, "leftpad==1.0.2\n"))
    (tmp_path / "SHA256SUMS").write_text(wheelhouse.sums(tmp_path))
    check = ["sha256sum", "--quiet", "--check", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 0
    assert install(tmp_path).returncode == 0 and (tmp_path / "put" / "leftpad.py").read_text() == "ours = 1"
    wheel(tmp_path, "leftpad", "1.0.2", "theirs = 1")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode != 0
    refused = install(tmp_path)
    assert refused.returncode != 0 and "DO NOT MATCH THE HASHES" in refused.stderr


# Pictures ------------------------------------------------------------------------------------------------------------


def test_every_picture_is_shown_small_and_loads_nothing() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    shown = set(re.findall(r"!\[[^]]+\]\(pictures/([^)]+)\)", pages))
    there = {path.name: path for path in (ROOT / "docs" / "pictures").iterdir()}
    assert shown == set(there)
    for name, path in there.items():
        assert path.stat().st_size < PICTURE_BYTES_MOST, name
        if path.suffix == ".svg":
            addresses = re.findall(r"https?://[^\"' )]+", path.read_text(encoding="utf-8"))
            assert set(addresses) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}, name
