"""What `fl-client egress` lists is what crossed: counted at the grid, where replies arrive, by an oracle of its own."""

import ast
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation import Federation
from flwr.app import Message
from hospital import Hospital, study

from fl_client import egress
from fl_client.egress import Egress
from privacy import journal, wire
from privacy.errors import JournalDamaged
from privacy.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
FOUR = ["north", "south", "east", "west"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


def of_four(protection: str) -> Any:
    sites = {"sites__[north, south]": f"sites: [{', '.join(FOUR)}]", "quorum__2": "quorum: 3"}
    return study(**sites, protection__plain=f"protection: {protection}")


Crossed = dict[str, list[dict[str, Any]]]


def run_and_watch(
    federation: Federation, alter: Callable[[str, Message], Message] = lambda name, order: order
) -> Crossed:
    """What each site's replies held when they arrived, read from Flower's records without a class of ours."""
    crossed: Crossed = {name: [] for name in federation.hospitals}
    grid = federation.grid()

    def watched(name: str, answer: Callable[[Message], Message | None]) -> Callable[[Message], Message | None]:
        def reply(message: Message) -> Message | None:
            answered = answer(alter(name, message))
            assert answered is not None
            crossed[name].append(dict(answered.content["isocenter"]))  # type: ignore[arg-type]
            return answered

        return reply

    for name in federation.hospitals:
        grid.answers[federation.node(name)] = watched(name, grid.answers[federation.node(name)])
    federation.run(grid)
    return crossed


def content_bytes(reply: dict[str, Any]) -> int:
    return sum(len(reply.get(name, b"")) for name in ("vector", "keys", "revealed", "sealed"))


@pytest.mark.parametrize("protection", ["masked", "plain"])
def test_every_reply_of_a_run_is_one_row_with_its_bytes(tmp_path: Path, protection: str) -> None:
    plan = of_four(protection) if protection == "masked" else study()
    federation = Federation(tmp_path, plan)
    crossed = run_and_watch(federation)
    for name, hospital in federation.hospitals.items():
        report, replies = egress.read(hospital.home), crossed[name]
        assert len(replies) >= 4
        for row, reply in zip(report.rows, replies, strict=True):
            assert (row.kind, row.study, row.run, row.round) == tuple(
                reply[k] for k in ("kind", "study", "run", "round")
            )
            assert row.bytes == content_bytes(reply)
            assert row.protection == (protection if "vector" in reply else "")
        (total,) = report.totals
        trained = [reply for reply in replies if reply["kind"] == "train-report"]
        assert total.rounds == len(trained) == 2
        assert total.bytes == sum(map(content_bytes, replies)) > sum(len(reply["vector"]) for reply in trained) > 0
        assert all((row.norm is not None) == (row.kind == "train-report") for row in report.rows)
        assert (total.study, total.title, total.refusals) == (federation.plan.digest, "Opacity in phantoms", 0)


def test_words_say_what_a_masked_run_sent(tmp_path: Path) -> None:
    federation = Federation(tmp_path, of_four("masked"))
    crossed = run_and_watch(federation)["north"]
    report = egress.read(federation.hospitals["north"].home)
    words = [row.words for row in report.rows]
    first = words[[row.kind for row in report.rows].index("train-report")]
    assert first == (
        "masked part of a sum: model update (with SCAFFOLD also a mean gradient), "
        "losses, counts and score histograms (of outlined structures and predicted numbers: sums of how well they agree) "
        "of round 1, and public keys for the next sum"
    )
    for row, reply in zip(report.rows, crossed, strict=True):
        assert ("public keys" in row.words) == bool(reply.get("keys")), row.words
        assert ("shares that open the sum of 4 sites" in row.words) == bool(reply.get("revealed")), row.words
        assert ("encrypted shares" in row.words) == bool(reply.get("sealed")), row.words
        assert f"round {reply['round']}" in row.words
        if reply["kind"] == "evaluate-report":
            assert f"of the {reply['split']} split" in row.words


def test_released_figures_are_those_that_crossed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of -1 is one that was not released: the oracle counts the others in the bytes of the replies."""
    monkeypatch.setattr("models.contributions.RELEASE_MIN", 1)
    federation = Federation(tmp_path, study(**{"test__0.2": "test: 0.5"}))
    crossed = run_and_watch(federation)
    found = []
    for name, hospital in federation.hospitals.items():
        columns = [memoryview(reply["figures"]).cast("f")[::7] for reply in crossed[name] if "figures" in reply]
        found.append(sum(value >= 0 for values in columns for value in values))
        report = egress.read(hospital.home)
        assert report.totals[0].figures == found[-1]
        assert sum("figures of the test split for 1 target" in row.words for row in report.rows) == found[-1]
    assert sum(found) >= 1, "nothing was released, so nothing was tested"


def test_a_refusal_is_a_row_with_its_code_and_counts_for_its_study(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path)
    other = "0" * 64
    for order in (hospital.order(wire.KeysOrder), hospital.order(wire.TrainOrder, study=other, round=3)):
        assert isinstance(hospital.answer(order), wire.Refusal)
    report = egress.read(hospital.home)
    assert [row.code for row in report.rows] == ["step-refused", "study-not-approved"]
    assert report.rows[1].words == "refusal of an order, round 3: the code study-not-approved"
    assert [(total.study, total.title, total.refusals, total.bytes) for total in report.totals] == [
        (hospital.study.digest, "Opacity in phantoms", 1, 0),
        (other, "", 1, 0),
    ]
    assert [row.study for row in egress.read(hospital.home, other[:8]).rows] == [other]
    assert egress.read(hospital.home, "f" * 64).rows == ()


def test_a_round_that_was_tried_again_is_one_round_and_two_updates(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path)
    replies = [hospital.answer(hospital.order(attempt=attempt)) for attempt in (1, 2)]
    (total,) = egress.read(hospital.home).totals
    assert total.rounds == 1
    assert total.bytes == sum(len(reply.vector) for reply in replies if isinstance(reply, wire.TrainReport)) > 0


def test_every_kind_of_report_has_words() -> None:
    """A new report fails here until somebody says in words what it carries."""
    assert {kind.kind for kind in wire.REPORTS} <= egress.WORDS.keys()


def test_every_line_that_a_site_writes_is_known_to_leave_or_to_stay() -> None:
    """A new kind of line fails here until somebody says which. The kinds are read from the source."""
    known = egress.WORDS.keys() | egress.STAYS
    assert not egress.WORDS.keys() & egress.STAYS
    found = set()
    for path in [*(ROOT / "fl_client").glob("*.py"), *(ROOT / "privacy").glob("*.py")]:
        tree = ast.parse(path.read_text())
        names = constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                receiver, first = ast.unparse(node.func.value).lower(), node.args[0]
                value = first.value if isinstance(first, ast.Constant) else names.get(ast.unparse(first))
                if node.func.attr == "append" and "journal" in receiver and isinstance(value, str):
                    found.add(value)
    assert {"joined", "no-order", "worker-replaced", "budget"} <= found, "the reader of the source finds nothing"
    assert found <= known, f"neither in WORDS nor in STAYS: {sorted(found - known)}"


def constants(tree: ast.Module) -> dict[str, str]:
    """Module-level names of strings, also those assigned several at once."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = (
                zip(target.elts, value.elts, strict=True)
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                else [(target, value)]
            )
            found |= {
                ast.unparse(name): text.value
                for name, text in pairs
                if isinstance(text, ast.Constant) and isinstance(text.value, str)
            }
    return found


def test_lines_outside_of_rounds(tmp_path: Path) -> None:
    mine = Journal(tmp_path / "journal.jsonl")
    digest = "a" * 64
    mine.append("joined", site="north", authority="b" * 64)
    mine.append("offer-refused", code="bad-document")
    mine.append("settings", digest="f" * 64)
    mine.append("approved", study=digest)
    mine.append("declined", study=digest)
    mine.append("renewed", certificate="c" * 64)
    mine.append("budget", entry="reserve", study=digest, seq=1)
    mine.append("head-signed", party="north", lines=6, head="d" * 64, time_s=1, signature="e" * 128)
    mine.append("head-witnessed", party="coordinator", lines=9, head="d" * 64, time_s=1, signature="e" * 128)
    mine.append("worker-replaced", why="memory", study=digest, run="r", round=1, attempt=1, sum=1)
    mine.append("no-order", code="message-malformed")
    report = egress.read(tmp_path)
    assert report.lines == 11
    assert [(row.n, row.kind, row.study) for row in report.rows] == [
        (1, "joined", ""),
        (4, "approved", digest),
        (5, "declined", digest),
        (6, "renewed", ""),
        (8, "head-signed", ""),
        (11, "no-order", ""),
    ]
    assert report.rows[4].words == f"signed head of this journal: 6 lines, hash {'d' * 64}"
    assert [total.sentence() for total in report.totals] == [
        f"Study {'a' * 12}: 0 rounds trained, 0 bytes, figures of 0 targets released, 0 orders refused."
    ]
    assert list(report.sentences())[-1] == (
        "6 messages with 0 bytes of content left this site, by the 11 lines of its journal, which are all in place."
    )


def test_norm_and_epsilon_are_shown_where_the_line_has_them(tmp_path: Path) -> None:
    facts = {"study": "a" * 64, "run": "run-1", "round": 2, "attempt": 1, "sum": 1, "protection": "sealed"}
    facts |= {"vector_bytes": 31_000, "keys_bytes": 0}
    Journal(tmp_path / "journal.jsonl").append("train-report", **facts, norm=0.51234, epsilon=1.25)
    Journal(tmp_path / "journal.jsonl").append("train-report", **facts)
    first, second = egress.read(tmp_path).rows
    assert (first.norm, first.epsilon, second.norm, second.epsilon) == (0.51234, 1.25, None, None)
    words = (
        "part of a sum, sealed for the coordinator: model update (with SCAFFOLD also a mean gradient), "
        "losses, counts and score histograms (of outlined structures and predicted numbers: sums of how well they agree) "
        "of round 2"
    )
    assert first.row()[1:] == ("2", words, "31,000", "0.512", "1.25")
    assert second.row()[-2:] == ("", "") and len(first.row()) == len(egress.HEADINGS)


def test_norm_and_epsilon_that_were_noted_before_are_those_of_the_same_order(tmp_path: Path) -> None:
    mine = Journal(tmp_path / "journal.jsonl")
    first: dict[str, Any] = {"study": "a" * 64, "run": "run-1", "round": 1, "attempt": 1, "sum": 1}
    sent: dict[str, Any] = {"protection": "masked", "vector_bytes": 8, "keys_bytes": 0}
    mine.append("release", **first, norm=0.5, epsilon=2.0)
    mine.append("release", **(first | {"attempt": 2}), norm=0.7, epsilon=3.0)
    mine.append("refusal", **first, code="mask-keys-lost")
    mine.append("train-report", **(first | {"attempt": 2}), **sent)
    mine.append("train-report", **(first | {"attempt": 3}), **sent)
    found = [(row.kind, row.norm, row.epsilon) for row in egress.read(tmp_path).rows]
    assert found == [("refusal", None, None), ("train-report", 0.7, 3.0), ("train-report", None, None)]


def test_json_holds_every_row_and_every_total(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path)
    hospital.answer(hospital.order())
    report = egress.read(hospital.home)
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert told["left"] == [dataclasses.asdict(row) for row in report.rows] and len(told["left"]) == 1
    assert told["studies"] == [
        {
            "study": hospital.study.digest,
            "title": "Opacity in phantoms",
            "rounds": 1,
            "bytes": report.rows[0].bytes,
            "figures": 0,
            "refusals": 0,
        }
    ]


def test_a_kind_that_this_version_does_not_know_is_shown(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl").append("something-new", study="a" * 64, sent_bytes=7)
    (row,) = egress.read(tmp_path).rows
    assert (row.kind, row.words, row.study) == ("something-new", egress.UNKNOWN, "a" * 64)


def test_a_damaged_file_about_a_study_hides_nothing(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path)
    hospital.answer(hospital.order())
    (hospital.home / "studies" / f"{hospital.study.digest}.json").write_bytes(b"{")
    assert [(total.title, total.rounds) for total in egress.read(hospital.home).totals] == [("", 1)]


def test_a_changed_removed_or_torn_line_is_found_before_anything_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    mine = Journal(path)
    for number in range(1, 5):
        mine.append("refusal", study="a" * 64, run="r", round=number, attempt=1, sum=1, code="policy-forbids")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    broken = {
        whole.replace(b'"round":2', b'"round":3'): "line 2",
        b"".join(lines[:1] + lines[2:]): "line 2",
        b"".join(lines[1:]): "line 1",
        b"".join([lines[1], lines[0], *lines[2:]]): "line 1",
        whole[:-5]: "line 4",
    }
    for content, named in broken.items():
        path.write_bytes(content)
        with pytest.raises(JournalDamaged, match=named):
            egress.read(tmp_path, study="f" * 64)
    with pytest.raises(JournalDamaged, match="cannot be read"):
        egress.read(tmp_path / "elsewhere")


HOSTILE: list[tuple[Any, Any]] = [
    ("refusal", {"study": "a" * 64, "code": "policy-forbids"}),  # no round
    ("train-report", {"round": 1, "vector_bytes": 1, "keys_bytes": 0}),  # no protection
    ("train-report", {"round": "one", "vector_bytes": 1, "keys_bytes": 0, "protection": "masked"}),
    ("train-report", {"round": 1, "vector_bytes": "many", "keys_bytes": 0, "protection": "masked"}),
    ("train-report", {"round": 1, "vector_bytes": 1, "keys_bytes": 0, "protection": ["masked"]}),
    ("train-report", {"round": 1, "vector_bytes": 1, "keys_bytes": 0, "protection": "masked", "norm": "nan?"}),
    ("train-report", {"round": 1, "vector_bytes": 1, "keys_bytes": 0, "protection": "masked", "norm": float("inf")}),
    ("train-report", {"round": float("inf"), "vector_bytes": 1, "keys_bytes": 0, "protection": "masked"}),
    ("refusal", {"study": "\x1b[2J", "round": 1, "code": "policy-forbids"}),
    ("\x1b]0;title\x07", {}),
    ("joined", {"\x1b": 1}),
    ("joined", []),
    ("joined", None),
    ("release", None),
    ("train-report", []),
    ("release", {"norm": "\x1b"}),
    ({}, {}),
    (7, {}),
]


@pytest.mark.parametrize(("kind", "facts"), HOSTILE)
def test_a_forged_chain_with_lines_that_no_site_writes(tmp_path: Path, kind: Any, facts: Any) -> None:
    """The hashes fit; only what stands in the line does not."""
    entry = {"n": 1, "time": "2026-01-31T12:00:00Z", "kind": kind, "facts": facts, "previous": journal.BEGINNING}
    line = json.dumps({**entry, "hash": journal._hash(entry)}, separators=(",", ":"))
    (tmp_path / "journal.jsonl").write_text(line + "\n")
    with pytest.raises(JournalDamaged, match="line 1") as caught:
        egress.read(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_a_forged_chain_with_another_time(tmp_path: Path) -> None:
    entry = {"n": 1, "time": "\x1b[2J", "kind": "joined", "facts": {}, "previous": journal.BEGINNING}
    line = json.dumps({**entry, "hash": journal._hash(entry)}, separators=(",", ":"))
    (tmp_path / "journal.jsonl").write_text(line + "\n")
    with pytest.raises(JournalDamaged, match="line 1"):
        egress.read(tmp_path)


def test_figures_that_were_sent_again_are_the_same_figures(tmp_path: Path) -> None:
    mine = Journal(tmp_path / "journal.jsonl")
    for run, attempt, figures in (("run-1", 1, 3), ("run-1", 2, 3), ("run-2", 1, 2)):
        facts: dict[str, Any] = {
            "study": "a" * 64,
            "run": run,
            "round": 1,
            "attempt": attempt,
            "sum": 1,
            "split": "test",
        }
        mine.append("evaluate-report", **facts, protection="masked", vector_bytes=8, keys_bytes=0, figures=figures)
    report = egress.read(tmp_path)
    assert report.totals[0].figures == 3 + 2
    assert report.rows[0].words == (
        "masked part of a sum: losses, counts and score histograms (of outlined structures and predicted numbers: sums of "
        "how well they agree) of the test split, round 1; beside it, figures of the test "
        "split for 3 targets"
    )


def test_rows_are_what_their_fields_say() -> None:
    row = Egress(n=1, time="2026-01-31T12:00:00Z", kind="no-order", words="error code")
    assert row.row() == ("2026-01-31T12:00:00Z", "", "error code", "", "", "")
