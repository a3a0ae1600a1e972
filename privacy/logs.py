"""Log files: one JSON object a line, turned over by size, readable by their owner only. Made for `privacy.deidentify.guard`.

    {"time":"2026-01-31T12:00:00.123Z","level":"INFO","logger":"isocenter.node","process":"node","pid":4711,"text":"round 3: ..."}

NAME.jsonl is written; NAME.1.jsonl is the one before it, and so on. What stands in a line was made safe where its record was
made; a record that was not is replaced by a sentence. A disk that takes nothing stops nobody: lines are counted, and their number
is written when there is room again.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Process = Literal["node", "worker", "coordinator", "executor", "dashboard"]
LINE_BYTES_MAX = 8 * 1024
UNSAFE = "a record that was not made safe is left out"
_LOGGER = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,63}")


class LogFiles(BaseModel):
    """What the long-running processes did, as JSON lines without anything that identifies a patient."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    folder: str = Field(default="logs", min_length=1, description="where they lie; relative to this file's folder")
    size_mb: float = Field(default=10, ge=0.01, le=10_000, description="size in MB at which a file is turned over")
    count: int = Field(default=5, ge=0, le=1000, description="files kept for each process; 0: no log files")


class FileHandler(logging.Handler):
    """Writes to `folder`/`process`.jsonl. Several processes may write to one file; never raises for a disk."""

    def __init__(self, folder: Path, process: Process, settings: LogFiles) -> None:
        super().__init__(logging.INFO)
        self.path, self.process, self.settings = folder / f"{process}.jsonl", process, settings
        self.lost = 0
        with contextlib.suppress(OSError):
            self._make_folder()

    def emit(self, record: logging.LogRecord) -> None:
        line = self._line(record.levelname, record.name, _text(record), record.created)
        try:
            if self.lost:
                told = f"{self.lost} lines were lost before this one: the disk did not take them"
                self._write(self._line("WARNING", "isocenter.logs", told, record.created))
                self.lost = 0
            self._write(line)
        except OSError:  # a log must not stop what it is about
            self.lost += 1

    def _line(self, level: str, logger: str, text: str, moment: float) -> bytes:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
        facts = {
            "time": f"{stamp}.{int(moment * 1000) % 1000:03d}Z",
            "level": level if level in logging.getLevelNamesMapping() else "OTHER",
            "logger": logger if _LOGGER.fullmatch(logger) else "other",
            "process": self.process,
            "pid": os.getpid(),
            "text": text[: LINE_BYTES_MAX // 8],
        }
        return json.dumps(facts, separators=(",", ":")).encode() + b"\n"

    def _write(self, line: bytes) -> None:
        """One whole line at the end, or none: what a full disk took of it is taken back."""
        with self._locked():
            file = self._open()
            try:
                size = os.fstat(file).st_size
                if size and size + len(line) > self.settings.size_mb * 1e6:
                    os.close(file)
                    file = -1
                    self._turn_over()
                    file, size = self._open(), 0
                if os.write(file, line) != len(line):
                    os.ftruncate(file, size)
                    raise OSError("a line was not taken whole")
            finally:
                if file >= 0:
                    os.close(file)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.path, flags, 0o600)

    def _turn_over(self) -> None:
        """NAME.jsonl becomes NAME.1.jsonl, each other the next, and what is more than `count` files goes."""
        last = self.settings.count - 1
        for number in range(last, 0, -1):
            older = self._numbered(number)
            newer = self._numbered(number - 1)
            if newer.exists():
                newer.replace(older)
        if not last:
            self.path.unlink()
        for path in self.path.parent.glob(f"{self.process}.*.jsonl"):  # of a time when more were kept
            named = path.name.split(".")[1]
            if named.isdecimal() and int(named) > last:
                path.unlink()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.process}.{number}.jsonl") if number else self.path

    def _make_folder(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            lock = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # somebody removed it, or the disk was full at the start
            self._make_folder()
            lock = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def handler(home: Path, process: Process, settings: LogFiles) -> FileHandler | None:
    """The handler for one process of the home in `home`; None where no files are wanted."""
    return FileHandler(home / settings.folder, process, settings) if settings.count else None


def _text(record: logging.LogRecord) -> str:
    """The text of a record that `privacy.deidentify` made: it has no arguments and no traceback any more."""
    if record.args or record.exc_info or record.exc_text or record.stack_info or not getattr(record, "safe", False):
        return UNSAFE
    return str(record.msg)
