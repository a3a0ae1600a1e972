"""Crashes by fault injection: a party of a consortium in memory ends at any durable write or any message, and is started again.

A place to die is a call that changes a disk for good (flush of a file, renaming, a line of a journal, a transaction of SQLite) or
a message between coordinator and site. A party that died stays dead: whatever its program still tries on its way out, such as
tidying up, does not happen either. Its files stay as they are at that moment, half a line or half a file included.
"""

import os
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_RANDOM = re.compile(r"\.[0-9a-f]{16}(?=\.part$)")  # in the names of files that are being written


class Crash(BaseException):
    """The end of one party's process. Nothing in the programs catches it."""


@dataclass
class Places:
    """Counts places to die, by party (the folder below `root` that is written to), and ends a party at the `at`-th.

    `trace`: (party, what, file) of each place so far. `unsynced`: files and folders whose changes a power loss could still take
    back, with the party they belong to.
    """

    root: Path
    at: int = -1
    trace: list[tuple[str, str, str]] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    unsynced: dict[Path, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def party(self, path: Path) -> str:
        try:
            return path.relative_to(self.root).parts[0]
        except (ValueError, IndexError):
            return ""

    def kept(self, path: Path) -> bool:
        """Whether a power loss must not take the file back; a site's `state` is checked when read, and made again."""
        party = self.party(path)
        return bool(party) and not path.is_relative_to(self.root / party / "state")

    def step(self, party: str, what: str, about: str, torn: Callable[[], None] | None = None) -> None:
        """One place. Raises Crash if this is the one, after `torn` did half of what comes next, or if the party is dead."""
        if not party:
            return
        if party in self.dead:
            raise Crash
        self.trace.append((party, what, _RANDOM.sub("", about)))
        if len(self.trace) - 1 == self.at:
            if torn is not None:
                torn()
            self.dead.add(party)
            raise Crash

    def told(self, party: str) -> None:
        """`party` is about to tell somebody something: all that it did must be on the disk by now."""
        self.complaints += [
            f"{party} spoke before {path} was flushed" for path, its in self.unsynced.items() if its == party
        ]

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch every durable write of the programs from now on. No flush is carried out: processes end here, machines do not."""
        self._patch_files(monkeypatch)
        self._patch_databases(monkeypatch)

    def _patch_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pwrite, replace, unlink = os.pwrite, Path.replace, Path.unlink
        truncate = os.ftruncate

        def fsync(descriptor: int) -> None:
            path = _path_of(descriptor)
            party = self.party(path)
            half = (lambda: truncate(descriptor, os.fstat(descriptor).st_size // 2)) if path.suffix == ".part" else None
            self.step(party, "before flush", path.name, half)
            self.unsynced.pop(path, None)
            self.step(party, "after flush", path.name)

        def watched_pwrite(descriptor: int, data: bytes, offset: int) -> int:
            path = _path_of(descriptor)
            party = self.party(path)
            self.step(
                party, "torn line", path.name, lambda: pwrite(descriptor, data[: len(data) // 2], offset) and None
            )
            written = pwrite(descriptor, data, offset)
            self.unsynced[path] = party
            self.step(party, "after line", path.name)
            return written

        def watched_replace(source: Path, target: Any) -> Path:
            party = self.party(source)
            self.step(party, "before rename", Path(target).name)
            if source in self.unsynced:
                self.complaints.append(f"{target} was renamed before its content was flushed")
            done = replace(source, target)
            if self.kept(source):
                self.unsynced[Path(target).parent] = party
            self.step(party, "after rename", Path(target).name)
            return done

        def watched_unlink(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self.step(self.party(path), "before removal", path.name)
            elif self.party(path) in self.dead:
                raise Crash
            unlink(path, missing_ok=missing_ok)

        def watched_open(path: Any, flags: int, *mode: Any, **more: Any) -> int:
            descriptor = opened(path, flags, *mode, **more)
            if str(path).endswith(".part") and flags & os.O_CREAT and self.kept(Path(path)):
                self.unsynced[Path(path)] = self.party(Path(path))
            return descriptor

        opened = os.open
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "pwrite", watched_pwrite)
        monkeypatch.setattr(os, "open", watched_open)
        monkeypatch.setattr(Path, "replace", watched_replace)
        monkeypatch.setattr(Path, "unlink", watched_unlink)

    def _patch_databases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        connect, places = sqlite3.connect, self

        class Watched(sqlite3.Connection):
            """Dies before or after what makes a transaction durable. An open transaction is taken back, as SQLite does."""

            file = Path()

            def _commit(self, really: Callable[[], Any]) -> Any:
                party = places.party(self.file)
                places.step(party, "before commit", self.file.name)
                if self.file.name in ("ledger.sqlite", "orders.sqlite") and self._synchronous() != 3:  # EXTRA
                    places.complaints.append(f"a power loss can take back a transaction of {self.file}")
                done = really()
                places.step(party, "after commit", self.file.name)
                return done

            def _synchronous(self) -> int:
                return int(super().execute("PRAGMA synchronous").fetchone()[0])

            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                if places.party(self.file) in places.dead:
                    raise Crash
                if statement == "COMMIT":
                    return self._commit(lambda: super(Watched, self).execute(statement))  # type: ignore[no-any-return]
                return super().execute(statement, *values)

            def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
                if kind is not None or not self.in_transaction:
                    return super().__exit__(kind, error, trace)
                return self._commit(lambda: super(Watched, self).__exit__(None, None, None))

        def watched_connect(path: Any, *more: Any, **named: Any) -> sqlite3.Connection:
            if self.party(Path(str(path))) in self.dead:
                raise Crash
            connection = connect(path, *more, **named, factory=Watched)
            connection.file = Path(str(path))
            return connection

        monkeypatch.setattr(sqlite3, "connect", watched_connect)


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
