"""Append-only journal: a line that was written is on the disk, and a changed, removed or reordered line is found.

One JSON object per line:
    {"n":3,"time":"2026-01-31T12:00:00Z","kind":"order-refused","facts":{...},"previous":"<64 hex>","hash":"<64 hex>"}
`hash` is SHA-256 over a label and the line without `hash`; `previous` is the hash of the line before (the first line
has 64 zeros). Someone who can rewrite the file can forge a whole new chain or cut its end; against that, keep `head`
elsewhere and give it to `verify`.

Facts are numbers and enumerated names: a string that is not a short lower-case word, a digest or a code is refused, so
free text, paths, DICOM UIDs and most else cannot get in by accident.
"""

import datetime as dt
import errno
import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.disk import faults_named, flush_folder
from privacy.errors import JournalDamaged, MessageMalformed

LABEL = b"isocenter/v1/journal\n"
BEGINNING = "0" * 64
LINE_BYTES_MAX = 256 * 1024  # a list of 1000 names, the most a study can have, is about 40 KiB
TAIL_BYTES = 8 * 1024  # the last line is seldom longer, and it is looked for at each append
LIST_MAX = 1000
INT_MAX = 2**63 - 1

Fact = str | int | float | list[str]
_WORD = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,31}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _End:
    """Where the chain stands: bytes in whole lines, number of lines, hash of the last one."""

    size: int
    lines: int
    head: str


class Journal:
    """One journal file (mode 0600), safe for several threads and processes at once: the chain never forks."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal. A torn last line is set aside; JournalDamaged if the last whole one is bad."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked() as file:
            self._whole(file)

    @property
    def head(self) -> str:
        """Hash of the last line (64 hex; zeros for an empty journal): what a witness keeps."""
        return self.position[1]

    @property
    def position(self) -> tuple[int, str]:
        """Number of lines, and the hash of the last one."""
        with self._locked() as file:
            end = self._end(file)
            return end.lines, end.head

    def last(self, kind: str, **where: Fact) -> dict[str, Any] | None:
        """The facts of the latest line of this kind (and with these facts), None if there is none. Searched from the end."""
        mark = f'"kind":"{kind}",'.encode()
        with self._locked() as file:
            place = self._end(file).size  # behind it there may be a torn line
            if place == 0:
                return None
            with mmap.mmap(file, place, access=mmap.ACCESS_READ) as text:
                # A fact is a number or an enumerated name, so no fact can look like this.
                while (place := text.rfind(mark, 0, place)) >= 0:
                    line = text[text.rfind(b"\n", 0, place) + 1 : text.find(b"\n", place)]
                    _read_line(line, f"{self.path}, last line about {kind}")
                    facts: dict[str, Any] = json.loads(line)["facts"]
                    if all(facts.get(key) == value for key, value in where.items()):
                        return facts
        return None

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The facts of every line of this kind, oldest first; raises JournalDamaged unless the whole chain is in place."""
        with self._locked() as file:
            self._whole(file)
            return [entry["facts"] for entry in entries(self.path) if entry["kind"] == kind]

    def append(self, kind: str, **facts: Fact) -> str:
        """Write one line and return its hash, after it has reached the disk.

        Raises MessageMalformed for free text, and DiskUnusable; then the journal is as it was.
        """
        check_facts(kind, facts)
        with self._locked() as file:
            return _write(file, self._whole(file), kind, facts).head

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """A descriptor under an exclusive lock; a fresh one each time, so that the lock holds between threads too."""
        with faults_named(self.path):
            created = not self.path.exists()
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if created:
                    flush_folder(self.path.parent)
                yield file
            finally:
                os.close(file)  # which also gives the lock back

    def _end(self, file: int) -> _End:
        """The last whole line, found from the end of the file, so that opening does not depend on its length."""
        size = os.fstat(file).st_size
        start, stop, begin, tail = 0, -1, 0, b""
        for reach in (TAIL_BYTES, 2 * LINE_BYTES_MAX):
            start = max(0, size - reach)
            tail = os.pread(file, size - start, start)
            stop = tail.rfind(b"\n")
            begin = tail.rfind(b"\n", 0, max(stop, 0)) + 1
            if start == 0 or begin > 0:
                break
        if stop < 0:
            if start > 0:
                raise JournalDamaged(f"{self.path}: the last line is longer than any line of a journal")
            return _End(0, 0, BEGINNING)
        number, _, own = _read_line(tail[begin:stop], f"{self.path}, last line")
        return _End(start + stop + 1, number, own)

    def _whole(self, file: int) -> _End:
        """Where the chain stands, after a line in which some process died was set aside."""
        end = self._end(file)
        torn = self._torn(file, end)
        return self._set_aside(file, end, torn) if torn else end

    @staticmethod
    def _torn(file: int, end: _End) -> bytes:
        return os.pread(file, os.fstat(file).st_size - end.size, end.size)

    def _set_aside(self, file: int, end: _End, torn: bytes) -> _End:
        """Keep the torn bytes beside the journal, cut them off, say so in the log and in the chain."""
        aside = self.path.with_name(f"{self.path.name}.torn-after-{end.lines}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, torn)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        flush_folder(self.path.parent)
        os.ftruncate(file, end.size)
        _log.warning(
            "%s: line %d was torn (power loss?); its %d bytes are in %s", self.path, end.lines + 1, len(torn), aside
        )
        return _write(file, end, "torn-line-set-aside", {"bytes": len(torn)})


def verify(path: Path, head: str | None = None) -> int:
    """Number of lines, all of them in place. Raises JournalDamaged naming the first line that is not.

    With `head`, a hash noted earlier, the line it belongs to must be there too: nothing before it was changed and the
    journal was not cut off before it.
    """
    count, seen = 0, head in (None, BEGINNING)
    for entry in entries(path):
        count, seen = count + 1, seen or entry["hash"] == head
    if not seen:
        raise JournalDamaged(f"{path}: the noted head is not in the chain after line {count} (cut off or rewritten)")
    return count


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Every line of a journal as an object, in order; raises JournalDamaged at the first one that is not in its place."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise JournalDamaged(f"{path} cannot be read: {error.strerror}") from None
    count, previous = 0, BEGINNING
    with file:
        while line := file.readline(LINE_BYTES_MAX + 1):
            place = f"{path}, line {count + 1}"
            if not line.endswith(b"\n"):
                raise JournalDamaged(f"{place}: torn or too long")
            number, before, own = _read_line(line[:-1], place)
            if number != count + 1 or before != previous:
                raise JournalDamaged(f"{place}: does not continue line {count} (removed, inserted or reordered lines)")
            count, previous = number, own
            yield _checked(json.loads(line), place)


def _checked(entry: dict[str, Any], place: str) -> dict[str, Any]:
    """The entry; JournalDamaged if its hash fits, but `append` would not have written it: whoever forged a chain writes neither
    on the reader's screen nor into a reader that expects facts."""
    kind, when, facts = entry["kind"], entry["time"], entry["facts"]
    try:
        if not (isinstance(kind, str) and isinstance(when, str) and isinstance(facts, dict) and _TIME.fullmatch(when)):
            raise MessageMalformed("not an entry of a journal")
        check_facts(kind, facts)
    except MessageMalformed:
        raise JournalDamaged(f"{place}: not a line that a journal writes") from None
    return entry


def _write(file: int, end: _End, kind: str, facts: dict[str, Fact]) -> _End:
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    entry = {"n": end.lines + 1, "time": now, "kind": kind, "facts": facts, "previous": end.head}
    own = _hash(entry)
    line = json.dumps({**entry, "hash": own}, separators=(",", ":")).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise MessageMalformed(f"a journal line of {len(line)} bytes; at most {LINE_BYTES_MAX} are permitted")
    try:
        written = os.pwrite(file, line, end.size)
        if written != len(line):
            raise OSError(
                errno.ENOSPC, f"only {written} of {len(line)} bytes of a journal line were written; is the disk full?"
            )
        os.fsync(file)
    except OSError:
        with suppress(OSError):  # if this fails too, the next to open the journal sets the piece aside
            os.ftruncate(file, end.size)
        raise
    return _End(end.size + len(line), end.lines + 1, own)


def _hash(entry: dict[str, object]) -> str:
    return hashlib.sha256(LABEL + json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_line(line: bytes, place: str) -> tuple[int, str, str]:
    """(number, previous, hash) of a line that hashes to what it says; raises JournalDamaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise JournalDamaged(f"{place}: not a journal line") from None
    if not isinstance(entry, dict) or set(entry) != {"n", "time", "kind", "facts", "previous", "hash"}:
        raise JournalDamaged(f"{place}: not a journal line")
    own = entry.pop("hash")
    # The bytes must be the ones `_write` makes, or two spellings of a line would share a hash.
    if json.dumps({**entry, "hash": own}, separators=(",", ":")).encode() != line or own != _hash(entry):
        raise JournalDamaged(f"{place}: was changed after it was written")
    number, previous = entry["n"], entry["previous"]
    if type(number) is not int or not isinstance(previous, str):
        raise JournalDamaged(f"{place}: not a journal line")
    return number, previous, own


def check_facts(kind: str, facts: dict[str, Fact]) -> None:
    """Only numbers and enumerated names may be written down; raises MessageMalformed for anything else."""
    if not _WORD.fullmatch(kind):
        raise MessageMalformed("the kind of a journal line is a lower-case word")
    for key, value in facts.items():
        if not _KEY.fullmatch(key):
            raise MessageMalformed("the key of a journal fact is a lower-case word")
        items = value if isinstance(value, list) else [value]
        if len(items) > LIST_MAX:
            raise MessageMalformed(f"journal fact {key}: more than {LIST_MAX} items")
        for item in items:
            if isinstance(item, str):
                valid = _WORD.fullmatch(item) is not None
            elif isinstance(item, int):
                valid = abs(item) <= INT_MAX and not isinstance(value, list)
            else:
                valid = isinstance(item, float) and math.isfinite(item) and not isinstance(value, list)
            if not valid:  # the value itself is not quoted: it may be what must not be written down
                raise MessageMalformed(f"journal fact {key}: neither a number nor an enumerated name")
