"""Lines and heads made by somebody who knows how a journal is hashed."""

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from privacy import heads, journal, journal_cli, keys
from privacy.errors import HeadContradicted, IsocenterError, JournalDamaged
from privacy.journal import Journal, entries

KEY = ec.generate_private_key(ec.SECP256R1())


def signed(lines: int, head: str) -> heads.SignedHead:
    bare = heads.SignedHead("north", lines, head, 1)
    return replace(bare, signature=keys.signature_hex(keys.sign(KEY, keys.JOURNAL_HEAD, bare.body())))


def forged(path: Path, kind: Any, facts: Any, at: Any = "2026-01-31T12:00:00Z") -> Path:
    entry = {"n": 1, "time": at, "kind": kind, "facts": facts, "previous": journal.BEGINNING}
    path.write_text(json.dumps({**entry, "hash": journal._hash(entry)}, separators=(",", ":")) + "\n")
    return path


def test_of_contradicting_heads_shown_at_once_one_is_witnessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    real, gate = Journal.last, threading.Barrier(2)

    def slow(self: Journal, kind: str, **where: Any) -> Any:
        found = real(self, kind, **where)
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait(timeout=0.3)  # both have looked before either writes, if nothing keeps them apart
        return found

    monkeypatch.setattr(Journal, "last", slow)
    refused: list[str] = []

    def show(digit: str) -> None:
        try:
            heads.witness(Journal(tmp_path / "j"), signed(5, digit * 64), [KEY.public_key()])
        except HeadContradicted as error:
            refused.append(error.code)

    threads = [threading.Thread(target=show, args=(digit,)) for digit in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry["kind"] for entry in entries(tmp_path / "j")) == ["head-contradicted", "head-witnessed"]
    assert len(refused) == 1


@pytest.mark.parametrize("kind", ["head-signed", "head-witnessed", "head-contradicted", "joined"])
@pytest.mark.parametrize("facts", [None, [], 7, "x", {"a": "\x1b[2J"}, {"\x1b": 1}])
def test_a_forged_line_that_no_journal_writes_is_named(tmp_path: Path, kind: str, facts: Any) -> None:
    path = forged(tmp_path / "j", kind, facts)
    readers: list[Any] = [lambda: journal.verify(path), lambda: heads.verify(path, "north", [], {})]
    for read in [*readers, lambda: list(heads.held_of(path, "north"))]:
        with pytest.raises(JournalDamaged, match="line 1"):
            read()


@pytest.mark.parametrize(
    ("kind", "at"),
    [("\x1b]0;t\x07", "2026-01-31T12:00:00Z"), (7, "2026-01-31T12:00:00Z"), ("joined", 7), ("joined", "\x1b")],
)
def test_nothing_forged_reaches_the_screen(tmp_path: Path, kind: Any, at: Any) -> None:
    path = forged(tmp_path / "j", kind, {}, at)
    app = journal_cli.commands(lambda home: journal_cli.Book(path, "north", [], {}))
    for args in (["show"], ["show", "--json"]):
        told = CliRunner().invoke(app, args)
        assert isinstance(told.exception, IsocenterError) and "\x1b" not in told.output


def test_a_line_about_a_head_that_holds_none_is_named(tmp_path: Path) -> None:
    path = forged(tmp_path / "j", "head-witnessed", {"party": "north", "lines": 1})
    for read in (lambda: heads.verify(path, "north", [], {}), lambda: list(heads.held_of(path, "north"))):
        with pytest.raises(JournalDamaged, match="line 1"):
            read()
