"""Log files: turned over, for their owner only, as safe as the screen; and a disk that takes nothing stops nobody."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hospital import Hospital
from test_disk import Mounted

from fl_server.settings import ServerFile
from models.study import parse
from privacy import logs, wire
from privacy.deidentify import REPORTED, guard
from privacy.errors import DataError, DocumentError
from privacy.logs import LogFiles

ROOT = Path(__file__).resolve().parent.parent
MARK = "ZZTEST^MARIA"
log = logging.getLogger("isocenter.node")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A guard with a log file for a process of this home; the file."""
    undone: list[Callable[[], None]] = []

    def start(**settings: Any) -> Path:
        made = logs.handler(tmp_path, "node", LogFiles(**settings))
        undone.append(guard(tmp_path, file=made))
        return tmp_path / "logs" / "node.jsonl"

    yield start
    for undo in undone:
        undo()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_json_from_info_on_and_the_screen_stays_quiet(
    begin: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = begin()
    log.info("an order was answered: %s, in %.1f s", "train-report", 2.0)
    log.debug("nothing of this")
    logging.getLogger("httpx").info("nothing of libraries below a warning")
    [line] = lines(path)
    assert line.pop("pid") == os.getpid() and re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    text = "an order was answered: train-report, in 2.0 s"
    assert line == {"level": "INFO", "logger": "isocenter.node", "process": "node", "text": text}
    assert capfd.readouterr().err == ""


def test_words_of_reports_are_those_of_the_wire() -> None:
    assert {kind.kind for kind in wire.REPORTS} == REPORTED


def test_the_filter_holds_in_files_too(begin: Callable[..., Path]) -> None:
    path = begin()
    log.warning("%s is %d", MARK, 3)
    logging.getLogger("pydicom").warning("Invalid value %s", MARK, extra={"patient": MARK})
    try:
        raise DataError(MARK) from KeyError(MARK)
    except DataError:
        log.exception("refused")
    logging.getLogger().handle(logging.LogRecord(MARK, 50, MARK, 1, MARK, (), None))  # past the factory
    logging.getLogger().handle(logging.makeLogRecord({"name": "isocenter", "levelno": 50, "msg": MARK, "safe": False}))
    text = path.read_text()
    assert "MARIA" not in text and "ZZTEST" not in text and len(lines(path)) == 5
    assert lines(path)[-2]["text"] == logs.UNSAFE and lines(path)[-2]["logger"] == "other"


def test_files_are_turned_over_by_size_and_no_more_are_kept(begin: Callable[..., Path]) -> None:
    path = begin(size_mb=0.01, count=3)
    for number in range(400):
        log.info("line %d", number)
    found = sorted(each.name for each in path.parent.iterdir())
    assert found == ["node.1.jsonl", "node.2.jsonl", "node.jsonl"]
    assert all(each.stat().st_size <= 10_000 and each.stat().st_mode & 0o777 == 0o600 for each in path.parent.iterdir())
    assert path.parent.stat().st_mode & 0o777 == 0o700
    texts = [
        line["text"] for name in ("node.2.jsonl", "node.1.jsonl", "node.jsonl") for line in lines(path.with_name(name))
    ]
    assert texts == [f"line {number}" for number in range(400 - len(texts), 400)] and len(texts) > 100


def test_fewer_files_than_before_are_kept_and_one_alone_starts_anew(begin: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir(mode=0o700)
    for name in ("node.4.jsonl", "node.1.jsonl", "node.x.jsonl", "worker.4.jsonl"):
        (tmp_path / "logs" / name).write_text("{}\n")
    path = begin(size_mb=0.01, count=1)
    for number in range(100):
        log.info("line %d", number)
    assert {each.name for each in path.parent.iterdir()} == {"node.jsonl", "node.x.jsonl", "worker.4.jsonl"}
    assert lines(path)[-1]["text"] == "line 99" and path.stat().st_size <= 10_000


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_stops_nobody_and_lost_lines_are_counted(
    begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, real = begin(), os.write
    log.info("before")

    def fails(file: int, content: bytes) -> int:
        if number == errno.ENOSPC:
            return real(file, content[:20])  # what a full disk does to a line
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fails)
    for _ in range(3):
        log.info("lost")
    monkeypatch.undo()
    log.info("after")
    told = [line["text"] for line in lines(path)]
    assert told == ["before", "3 lines were lost before this one: the disk did not take them", "after"]


def test_a_real_full_disk_stops_no_answer(hospital: Hospital) -> None:
    """The folder of the log is a file system of its own, which is full: the node answers its orders all the same."""
    folder = hospital.home / "logs"
    folder.mkdir()
    mounted = Mounted(folder, 1)
    undo = guard(hospital.home, file=logs.handler(hospital.home, "node", LogFiles()))
    try:
        with (folder / "filler").open("wb") as file, pytest.raises(OSError, match="No space left"):
            for _ in range(100):
                file.write(bytes(100_000))
                file.flush()
        reply = hospital.answer(hospital.order(study="ab" * 32))
        assert isinstance(reply, wire.Refusal) and reply.code == "study-not-approved"
        (folder / "filler").unlink()
        log.info("room again")
        assert "lines were lost" in lines(folder / "node.jsonl")[0]["text"]
    finally:
        undo()
        mounted.end()


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital.open(tmp_path)


def test_no_link_is_followed_and_a_folder_that_went_comes_back(begin: Callable[..., Path], tmp_path: Path) -> None:
    path = begin()
    path.symlink_to(tmp_path / "elsewhere")
    log.info("one")
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    path.parent.rmdir()
    log.info("two")
    assert [line["text"] for line in lines(path)][-1] == "two"


WRITER = """
import logging, sys
from pathlib import Path
from privacy import logs
from privacy.deidentify import guard
guard(Path(sys.argv[1]), file=logs.handler(Path(sys.argv[1]), "node", logs.LogFiles(size_mb=0.02, count=50)))
for number in range(200):
    logging.getLogger("isocenter").info("%d", number)
"""


def test_two_processes_share_a_file_and_lose_no_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [each.wait(60) for each in writers] == [0, 0]
    found = [line for path in (tmp_path / "logs").iterdir() for line in lines(path)]
    for each in writers:
        assert sorted(int(line["text"]) for line in found if line["pid"] == each.pid) == list(range(200))


def test_no_files_where_none_are_wanted_and_settings_are_strict(begin: Callable[..., Path]) -> None:
    path = begin(count=0)
    log.warning("on the screen")
    assert not path.parent.exists()
    plain = "version: 1\nname: x\nhost: a.example\n"
    assert parse(ServerFile, plain + "log: {size_mb: 3, count: 2}\n", "s").log == LogFiles(size_mb=3, count=2)
    for wrong in ("{size_mb: 0}", "{count: -1}", "{folder: ''}", "{sice_mb: 1}", '{count: "5"}', "yes"):
        with pytest.raises(DocumentError):
            parse(ServerFile, f"{plain}log: {wrong}\n", "s")
