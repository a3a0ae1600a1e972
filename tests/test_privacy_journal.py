"""The journal: what was written is found, and any change of it is found too."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import journal as journal_module
from privacy.errors import DiskUnusable, JournalDamaged, MessageMalformed
from privacy.journal import BEGINNING, Journal, verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(5):
        journal.append("order", round=number, study="ab" * 32, loss=0.5, sites=["north", "south"])
    return journal.path


def test_lines_are_what_the_module_documents(path: Path) -> None:
    """Oracle: the chain recomputed from the documentation alone."""
    previous = "0" * 64
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        entry = json.loads(line)
        own = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert entry["n"] == number
        assert entry["previous"] == previous
        assert entry["facts"]["round"] == number - 1
        assert own == hashlib.sha256(b"isocenter/v1/journal\n" + text.encode()).hexdigest()
        previous = own
    assert verify(path) == 5
    assert Journal(path).head == previous
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_empty_journal_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "journal.jsonl")
    assert journal.head == BEGINNING
    assert verify(journal.path) == 0
    assert verify(journal.path, BEGINNING) == 0


Damage = Callable[[list[bytes]], list[bytes]]


def _changed(line: bytes) -> bytes:
    return line.replace(b'"round":2', b'"round":7')


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda x: [*x[:2], _changed(x[2]), *x[3:]], 3),
        (lambda x: [x[0], x[2], *x[3:]], 2),
        (lambda x: [x[1], x[0], *x[2:]], 1),
        (lambda x: [*x[:3], x[2], *x[3:]], 4),
        (lambda x: [*x[:4], x[4].replace(b" ", b"") + b" "], 5),
        (lambda x: [b"{}", *x[1:]], 1),
        (lambda x: [*x[:2], b"", *x[2:]], 3),
        (lambda x: [*x[:2], b"\xff\xfe", *x[3:]], 3),
        (lambda x: [*x[:2], b"[" * 100_000, *x[3:]], 3),
        (lambda x: [*x[:2], x[2][:-30], *x[3:]], 3),
    ],
)
def test_the_first_damaged_line_is_named(path: Path, damage: Damage, line: int) -> None:
    path.write_bytes(b"".join(entry + b"\n" for entry in damage(path.read_bytes().splitlines())))
    with pytest.raises(JournalDamaged, match=f"line {line}:"):
        verify(path)


def test_a_line_rewritten_with_a_hash_of_its_own_breaks_the_chain_behind_it(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    entry = json.loads(lines[1])
    del entry["hash"]
    entry["facts"]["round"] = 7
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    entry["hash"] = hashlib.sha256(b"isocenter/v1/journal\n" + text.encode()).hexdigest()
    lines[1] = json.dumps(entry, separators=(",", ":")).encode()
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(JournalDamaged, match=r"line 3: does not continue line 2"):
        verify(path)


def test_every_flipped_bit_is_found(path: Path) -> None:
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(JournalDamaged):
            verify(path)


def test_a_cut_or_rewritten_end_is_found_with_a_noted_head(path: Path, tmp_path: Path) -> None:
    noted = Journal(path).head
    Journal(path).append("order", round=9)
    assert verify(path, noted) == 6
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    assert verify(path) == 4
    with pytest.raises(JournalDamaged, match="noted head"):
        verify(path, noted)
    forged = Journal(tmp_path / "forged.jsonl")
    for number in range(5):
        forged.append("order", round=number + 1)
    with pytest.raises(JournalDamaged, match="noted head"):
        verify(forged.path, noted)


def test_a_torn_last_line_is_set_aside_and_the_chain_goes_on(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"n":6,"time":"20')
    with caplog.at_level(logging.WARNING):
        journal = Journal(path)
    assert "torn" in caplog.text
    assert path.with_name("journal.jsonl.torn-after-5").read_bytes() == b'{"n":6,"time":"20'
    assert path.read_bytes().startswith(whole)
    journal.append("order", round=6)
    assert verify(path) == 7
    assert json.loads(path.read_bytes().splitlines()[5])["kind"] == "torn-line-set-aside"


def test_every_torn_length_recovers(tmp_path: Path) -> None:
    first = Journal(tmp_path / "whole.jsonl")
    first.append("one", n=1)
    begin = first.path.stat().st_size
    first.append("two", n=2)
    content = first.path.read_bytes()
    for cut in range(0, len(content), 5):
        copy = tmp_path / f"cut-{cut}" / "journal.jsonl"
        copy.parent.mkdir()
        copy.write_bytes(content[:cut])
        Journal(copy).append("after", cut=cut)
        lines = (1 if cut >= begin else 0) + (0 if cut in (0, begin) else 1) + 1
        assert verify(copy) == lines


def test_a_line_torn_by_another_process_is_noticed_at_the_next_append(path: Path) -> None:
    journal = Journal(path)
    with path.open("ab") as file:
        file.write(b"\0\0\0\0")
    journal.append("order", round=6)
    assert verify(path) == 7


def test_a_damaged_last_line_stops_the_journal(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"round":4', b'"round":5'))
    with pytest.raises(JournalDamaged, match="last line"):
        Journal(path)


def test_an_endless_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"x" * (journal_module.LINE_BYTES_MAX * 3))
    with pytest.raises(JournalDamaged):
        Journal(path)
    with pytest.raises(JournalDamaged, match="line 1"):
        verify(path)
    with pytest.raises(JournalDamaged, match="cannot be read"):
        verify(tmp_path / "absent")


def test_a_full_disk_leaves_the_chain_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, real = Journal(path), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:40], offset))
    with pytest.raises(DiskUnusable, match="40 of"):
        journal.append("order", round=5)
    monkeypatch.undo()
    assert verify(path) == 5  # nothing of the line is left
    journal.append("order", round=5)
    assert verify(path) == 6


def test_the_latest_line_of_a_kind_is_found_and_no_other(path: Path) -> None:
    journal = Journal(path)
    assert journal.last("budget") is None
    journal.append("budget", seq=1)
    journal.append("budget", seq=2, about="order", sites=["budget", "kind"])
    journal.append("budgets", seq=3)
    journal.append("order", budget=4)
    assert journal.last("budget") == {"seq": 2, "about": "order", "sites": ["budget", "kind"]}
    assert journal.lines("budget") == [{"seq": 1}, {"seq": 2, "about": "order", "sites": ["budget", "kind"]}]
    assert [facts.get("round") for facts in journal.lines("order")] == [0, 1, 2, 3, 4, None]
    assert journal.lines("budg") == []


def test_an_empty_journal_has_no_latest_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.last("budget") is None
    assert journal.lines("budget") == []


def test_a_torn_line_is_not_the_latest_one(path: Path) -> None:
    journal = Journal(path)
    journal.append("budget", seq=1)
    with path.open("ab") as file:
        file.write(b'{"n":7,"time":"2026-01-31T12:00:00Z","kind":"budget","facts":{"seq":2}')
    assert journal.last("budget") == {"seq": 1}
    assert journal.lines("budget") == [{"seq": 1}]  # which also sets the torn line aside
    assert verify(path) == 7


def test_a_changed_line_is_neither_the_latest_nor_one_of_many(path: Path) -> None:
    journal = Journal(path)
    journal.append("budget", seq=1)
    journal.append("order", round=9)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"seq":1', b'"seq":2'))
    with pytest.raises(JournalDamaged, match="last line about budget"):
        journal.last("budget")
    with pytest.raises(JournalDamaged, match="line 6"):
        journal.lines("budget")
    path.write_bytes(whole.replace(b'"round":2', b'"round":7'))
    assert journal.last("budget") == {"seq": 1}  # the whole chain is read only where all of it is used
    with pytest.raises(JournalDamaged, match="line 3"):
        journal.lines("budget")
    path.write_bytes(whole.replace(b'"round":9', b'"round":8'))
    for read in (journal.last, journal.lines):
        with pytest.raises(JournalDamaged, match="last line"):
            read("budget")


def _append_many(path: Path, name: str) -> None:
    journal = Journal(path)
    for number in range(25):
        journal.append("note", who=name, number=number)


def test_processes_and_threads_share_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_many, args=(path, f"p{i}")) for i in range(2)]
    threads = [threading.Thread(target=_append_many, args=(path, f"t{i}")) for i in range(2)]
    workers: list[Any] = [*processes, *threads]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert verify(path) == 100
    written = [json.loads(line)["facts"] for line in path.read_bytes().splitlines()]
    for name in ("p0", "p1", "t0", "t1"):
        assert [fact["number"] for fact in written if fact["who"] == name] == list(range(25))


@pytest.mark.parametrize(
    "value",
    [
        "Smith",
        "free text",
        "/data/chest",
        "1.2.840.10008",
        "2026.01.31",
        "a\nb",
        "",
        "é",
        "x" * 129,
        float("nan"),
        float("inf"),
        2**64,
        ["north", "Two Words"],
        [1, 2],
        ["a"] * 1001,
        None,
        {"a": 1},
        b"bytes",
    ],
)
def test_free_text_is_refused_without_being_quoted(path: Path, value: Any) -> None:
    before = path.read_bytes()
    with pytest.raises(MessageMalformed) as caught:
        Journal(path).append("order", fact=value)
    assert path.read_bytes() == before
    assert not (isinstance(value, str) and len(value) > 3 and value in str(caught.value))


@pytest.mark.parametrize(("kind", "key"), [("Order refused", "a"), ("", "a"), ("order", "A"), ("order", "a-b")])
def test_kinds_and_keys_are_words(path: Path, kind: str, key: str) -> None:
    with pytest.raises(MessageMalformed):
        Journal(path).append(kind, **{key: 1})


_words = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)
_facts = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda key: key not in ("kind", "self")),
    _words | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.lists(_words),
    max_size=4,
)


@settings(max_examples=30, deadline=None)  # each example waits for the disk several times
@given(st.lists(st.tuples(_words, _facts), max_size=4))
def test_whatever_is_accepted_comes_back(tmp_path_factory: pytest.TempPathFactory, entries: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder / "journal.jsonl")
    for kind, facts in entries:
        journal.append(kind, **facts)
    read = [json.loads(line) for line in journal.path.read_bytes().splitlines()]
    assert [(entry["kind"], entry["facts"]) for entry in read] == entries
    assert verify(journal.path) == len(entries)
    for kind, facts in dict(entries).items():  # the later of two of one kind
        assert journal.last(kind) == facts == journal.lines(kind)[-1]
    shutil.rmtree(folder)


@pytest.mark.parametrize("names", [1, 60, 61, 62, 63, 1000])
def test_a_last_line_of_any_permitted_length_is_found_from_the_end(tmp_path: Path, names: int) -> None:
    """Beyond some 8 KiB the short look at the end of the file does not reach the beginning of the line."""
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(3):
        journal.append("order", round=number)
        head = journal.append("asked", sites=["s" * 126] * names)
        assert Journal(journal.path).position == (2 * number + 2, head)
    assert verify(journal.path, head) == 6
    with journal.path.open("ab") as file:  # a torn line that is longer than the short look
        file.write(b"x" * 9000)
    assert journal.position == (6, head)
    journal.append("order", round=9)
    assert verify(journal.path, head) == 8
