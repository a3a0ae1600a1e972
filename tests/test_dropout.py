"""Sites that vanish, come late, come back, refuse or lie while a masked run goes on: whole runs with real site programs.

The oracle trains every contributor by hand (`oracle.py`), so a mask left in a sum, a lost or doubled vector, or a site counted
without its update shows at once.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation
from flwr.app import Message
from grid import FaultyGrid
from hospital import study
from oracle import Trained

from fl_server.run import Run, read_facts
from models.study import parse
from privacy import secagg, wire
from privacy.sharing import SHARE_BYTES, threshold

FOUR = ["north", "south", "east", "west"]
SEVEN = [*FOUR, "alpha", "bravo", "charlie"]
Tamper = Callable[[Any], Any]
Fault = str | Tamper
"""silent: the order is never carried out; lost: its report does not arrive; late: it arrives when nobody asks any more;
restart: the site's program starts anew before; refuse: a refusal; or a function of the honest report."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid answers while it is asked, so what is not there at the first look never comes."""
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 0.05)
    monkeypatch.setattr("fl_server.rounds.LINGER_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.ONLINE_LOOK_S", 0.01)
    # Every order makes its site read the same site.yaml; to parse it once saves half of the time of this file.
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)  # processes end in these tests; machines do not


def masked(sites: list[str], rounds: int, quorum: int = 3) -> Any:
    change = {"sites__[north, south]": f"sites: [{', '.join(sites)}]", "quorum__2": f"quorum: {quorum}"}
    return study(**change, rounds__2=f"rounds: {rounds}", protection__plain="protection: masked")


@dataclasses.dataclass
class Sent:
    """One order that was carried out, and what the site answered, before any fault on the way back."""

    site: str
    stage: str
    order: Any
    report: Any


class Enough(BaseException):
    """Ends the coordinator's program where the rest of the run has nothing to add."""


class Play:
    """A run in which `faults` happen: (site, stage, round) -> what goes wrong, once in each of the attempts given."""

    def __init__(self, federation: Federation, faults: dict[tuple[str, str, int], Fault], attempts: Any = (1,)) -> None:
        self.federation, self.faults, self.attempts = federation, faults, attempts
        self.programs = {name: federation.answers(name) for name in federation.hospitals}
        self.grid = FaultyGrid({federation.node(name): self._answer(name) for name in federation.hospitals})
        self.log: list[Sent] = []
        self.working = 0
        self.happened: set[Any] = set()
        self.models: list[Any] = []
        self.committed: list[Any] = []

    def run(self, folder: Path | None = None, until: int = 0) -> Run:
        """Carry the run to its end, or until that round is committed. `models` are those before and after each round."""
        patch, commit, folder = pytest.MonkeyPatch(), Run.commit, folder or self.federation.new_run()

        def keep(run: Run, done: Any, model: Any, state: Any) -> None:
            self.models.append((run.model, model))
            self.committed.append(done)
            commit(run, done, model, state)
            if done.round == until:
                raise Enough

        patch.setattr(Run, "commit", keep)
        with contextlib.suppress(Enough):
            self.federation.run(self.grid, folder)
        patch.undo()
        return Run.open(folder)

    def check_models(self, trained: Trained | None = None) -> None:
        """Every committed model is the mean over exactly the contributors that its record names."""
        trained = trained or Trained(self.federation)
        for done, (before, after) in zip(self.committed, self.models, strict=True):
            trained.check(done, before, after, self.repeats(done))

    def repeats(self, done: Any) -> dict[str, int]:
        """How often each site had trained this round before the order that was committed."""
        earlier = Counter(s.site for s in self.of("train") if s.order.round == done.round)
        return {site: count - 1 for site, count in earlier.items()}

    def of(self, stage: str) -> list[Sent]:
        return [sent for sent in self.log if sent.stage == stage]

    def _stage(self, order: Any) -> str:
        if isinstance(order, wire.UnmaskOrder):
            return "unmask" if order.survivors else "shares"
        if isinstance(order, wire.WorkOrder):
            self.working = order.sum
        return "invite" if isinstance(order, wire.KeysOrder) and order.sum == self.working + 1 else order.kind

    def _answer(self, site: str) -> Any:
        def answer(message: Message) -> Message | None:
            order = wire.decode(message, *wire.ORDERS)
            stage = self._stage(order)
            fault, at = self.faults.get((site, stage, order.round)), (site, stage, order.round, order.attempt)
            if at in self.happened or order.attempt not in self.attempts:
                fault = None
            self.happened.add(at)
            if fault == "silent":
                return None
            if fault == "refuse":
                refusal = wire.Refusal(**order.naming(), site=site, code="training-stopped")
                return Message(refusal.to_records(), reply_to=message)
            if fault == "restart":
                self.programs[site] = self.federation.answers(site)
            reply = self.programs[site](message)
            assert reply is not None
            report: Any = wire.decode(reply, *wire.REPORTS)
            self.log.append(Sent(site, stage, order, report))
            if fault == "lost":
                return None
            if fault == "late":
                self._hold_back(reply)
                return None
            if callable(fault):
                return Message(fault(report).to_records(), reply_to=message)
            return reply

        return answer

    def _hold_back(self, reply: Message) -> None:
        """Let the reply arrive with whatever the next exchange brings."""
        push = self.grid.push_messages

        def push_and_release(messages: Any) -> Any:
            self.grid.push_messages = push  # type: ignore[method-assign]
            names = list(push(messages))
            self.grid.strays.append(reply)
            return names

        self.grid.push_messages = push_and_release  # type: ignore[method-assign]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def check_protocol(play: Play) -> None:
    """What must hold in whatever goes wrong: lists large enough, one list and one vector a sum, no vector or mask twice."""
    lists: dict[Any, Any] = {}
    for sent in play.log:
        order = sent.order
        if isinstance(order, wire.UnmaskOrder) and order.survivors:
            assert lists.setdefault((order.attempt, order.sum), order.survivors) == order.survivors
            assert len(order.survivors) >= 3
    vectors = [s.report.vector for s in play.log if isinstance(s.report, wire.WorkReport)]
    assert len(set(vectors)) == len(vectors)
    answered = [(s.site, s.order.kind, s.order.attempt, s.order.sum) for s in play.log]
    assert len(set(answered)) == len(answered), "an order was sent twice"
    for site in play.programs:
        places = [s.order.sum for s in play.log if s.site == site and isinstance(s.report, wire.WorkReport)]
        assert len(set(places)) == len(places) or len({s.order.attempt for s in play.log}) > 1


@pytest.fixture(scope="module")
def four_trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(Federation(tmp_path_factory.mktemp("four"), masked(FOUR, 2)))


@pytest.fixture
def four(four_trained: Trained) -> Federation:
    """Four sites that have answered no order of any run."""
    return forgetful(four_trained.federation)


@pytest.fixture
def trained(four_trained: Trained) -> Trained:
    """The oracle of `four`, which remembers what it has trained."""
    return four_trained


def forgetful(federation: Federation) -> Federation:
    for hospital in federation.hospitals.values():
        (hospital.home / "orders.sqlite").unlink(missing_ok=True)
    return federation


def test_two_exchanges_a_round_once_keys_are_agreed_on(tmp_path: Path) -> None:
    """Steady state: each site is asked to train and to unmask, and nothing else; keys and shares travel with these."""
    play = Play(Federation(tmp_path, masked(FOUR, 3)), {})
    run = play.run()
    assert run.facts["state"] == "complete"
    play.check_models()
    check_protocol(play)
    for site in FOUR:
        counted = Counter((s.stage, s.order.round) for s in play.log if s.site == site)
        rounds = {("train", r): 1 for r in (1, 2, 3)} | {("unmask", 1): 1, ("unmask", 2): 1}
        # The validation of the last model and the test belong to a round's number; each is one sum of its own.
        ends = Counter(s.stage for s in play.log if s.site == site and s.stage in ("evaluate", "unmask"))
        assert ends == {"evaluate": 2, "unmask": 5}
        assert {key: counted[key] for key in rounds} | {("keys", 1): counted["keys", 1]} == rounds | {("keys", 1): 1}
        assert sum(counted.values()) == 2 + 2 * 5


SEVEN_FAULTS: dict[tuple[str, str, int], Fault] = {
    ("alpha", "keys", 1): "silent",
    ("alpha", "invite", 1): "silent",
    ("bravo", "shares", 1): "silent",
    ("charlie", "train", 2): "lost",
    ("north", "train", 3): "refuse",
    ("south", "train", 5): "silent",
    ("east", "unmask", 5): "silent",
    ("west", "train", 7): "restart",
    ("south", "train", 7): "late",
    ("alpha", "unmask", 8): "restart",
}
SEVEN_MISSING = {
    1: {"alpha": "timeout", "bravo": "timeout"},
    2: {"alpha": "joining", "charlie": "timeout"},
    3: {"charlie": "joining", "north": "training-stopped"},
    4: {"north": "joining"},
    5: {"south": "timeout"},
    6: {"south": "joining", "east": "timeout"},
    7: {"west": "mask-keys-lost", "south": "timeout"},
    8: {"west": "joining", "south": "joining"},
}


def test_sites_vanish_at_every_stage_of_a_long_run_and_come_back(tmp_path: Path) -> None:
    """Seven sites, threshold five: up to two at a time are away, in every stage and way, and are named with the reason."""
    play = Play(Federation(tmp_path, masked(SEVEN, 8)), SEVEN_FAULTS)
    run = play.run()
    assert run.attempt == 1 and not events(run, "void")
    found = {done.round: done.missing for done in run.history}
    assert found == SEVEN_MISSING
    assert all(sorted({*done.contributors, *done.missing}) == sorted(SEVEN) for done in run.history)
    assert not any(set(done.contributors) & set(done.missing) for done in run.history)
    play.check_models()
    check_protocol(play)
    assert [s.order.round for s in play.of("keys")] == [1] * 6, "keys were agreed on a second time"
    results = json.loads((run.folder / "results.json").read_text())
    # Who lost its keys when the last round was opened is asked for new ones during the validation, and is in the test.
    assert run.history[-1].validation_missing == {"alpha": "mask-keys-lost"}
    assert results["test"]["sites"] == sorted(SEVEN) and results["test_missing"] == {}
    assert run.facts["state"] == "partial"


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("keys", "lost"),
        ("keys", "restart"),
        ("shares", "refuse"),
        ("shares", "restart"),
        ("train", "refuse"),
        ("train", "restart"),
        ("unmask", "silent"),
        ("unmask", "lost"),
        ("unmask", "restart"),
    ],
)
def test_one_of_four_fails_at_one_stage(four: Federation, trained: Trained, stage: str, how: str) -> None:
    """Four sites tolerate one. Who vanishes after its vector arrived is a contributor all the same."""
    play = Play(four, {("south", stage, 1): how})
    run = play.run(until=2)
    assert run.attempt == 1 and len(run.history) == 2
    play.check_models(trained)
    check_protocol(play)
    first, second = run.history
    refusal = {"refuse": "training-stopped", "restart": "mask-keys-lost"}.get(how, "timeout")
    if (stage, how) == ("keys", "restart"):
        assert first.contributors == second.contributors == sorted(FOUR)  # there were no keys to lose
    elif stage == "unmask":
        assert first.contributors == sorted(FOUR) and second.missing == {"south": refusal}
    else:
        assert first.missing == {"south": refusal}
        assert second.missing == ({"south": "joining"} if stage == "train" else {})


def test_a_site_that_is_away_for_a_round_is_back_two_sums_later(tmp_path: Path) -> None:
    """Offline, not silent. The others go on without new set-up, and the site gets its keys while they work."""
    play = Play(Federation(tmp_path, masked(FOUR, 4)), {})
    away = play.federation.node("east")

    def leave(report: Any) -> Any:
        play.grid.online = set(play.grid.answers) - {away}
        return report

    def come_back(report: Any) -> Any:
        play.grid.online = None
        return report

    play.faults = {("west", "unmask", 1): leave, ("west", "unmask", 2): come_back}
    run = play.run()
    assert [done.missing for done in run.history] == [{}, {"east": "offline"}, {"east": "joining"}, {}]
    assert len(play.of("keys")) == 4 and [s.site for s in play.of("invite")] == ["east"]
    play.check_models()
    check_protocol(play)
    assert run.facts["label"] == "partial (3 of 4, east missed 2 of 4 rounds: offline and joining)"


def test_a_site_that_only_evaluates_and_is_slow_at_first_is_in_the_test(tmp_path: Path) -> None:
    """It reads its images when it is asked for keys, which takes longer than the others are kept waiting in a round."""
    plan = masked(FOUR[:3], 1)
    part = plan.participation.model_copy(update={"evaluate_only": ["west"]})
    play = Play(Federation(tmp_path, plan.model_copy(update={"participation": part})), {})
    play.faults = {("west", "invite", 1): "lost"}
    run = play.run()
    assert run.facts["label"] == "complete"
    assert [s.site for s in play.of("invite")] == ["west"]
    assert sorted(s.site for s in play.of("evaluate") if s.order.split == "test") == sorted(FOUR)


def test_a_late_vector_is_in_no_sum_and_harms_none(four: Federation, trained: Trained) -> None:
    """The vector comes after the order to open the sum went out: it was given up, and so was the site's part in the sum."""
    play = Play(four, {("south", "train", 1): "late"})
    run = play.run(until=2)
    assert run.history[0].missing == {"south": "timeout"} and run.history[1].missing == {"south": "joining"}
    opened = {s.order.survivors for s in play.of("unmask") if s.order.sum == 2}
    assert opened == {("east", "north", "west")}
    assert "south" not in {s.site for s in play.of("unmask") if s.order.sum == 2}
    play.check_models(trained)
    check_protocol(play)


@pytest.mark.parametrize("how", ["silent", "lost"])
def test_too_few_vectors_are_never_opened_and_the_round_is_tried_anew(
    four: Federation, trained: Trained, how: str
) -> None:
    """Two of four vectors are fewer than the threshold: nobody is asked to open their sum, the next attempt has new keys and
    new training, and its mean is that of the new training."""
    play = Play(four, {(site, "train", 1): how for site in ("south", "east")})
    run = play.run(until=2)
    assert [(e["attempt"], e["reason"]) for e in events(run, "void")] == [(1, "too-few-survivors")]
    assert run.attempt == 2 and [done.attempt for done in run.history] == [2, 2]
    assert [s for s in play.of("unmask") if s.order.attempt == 1] == []
    keys = [s.report.keys for s in play.of("keys")]
    assert len(set(keys)) == len(keys) == 8
    again = {"north": 1, "west": 1} | ({"south": 1, "east": 1} if how == "lost" else {"south": 0, "east": 0})
    assert play.repeats(run.history[0]) == again
    before = play.models[0][0]
    assert np.abs(trained.site("north", before, 1, 0)[0] - trained.site("north", before, 1, 1)[0]).max() > 1e-6
    play.check_models(trained)
    check_protocol(play)


@pytest.mark.parametrize(("stage", "code"), [("shares", "too-few-survivors"), ("unmask", "too-few-survivors")])
def test_below_the_threshold_in_other_stages_the_sum_is_void_too(
    four: Federation, trained: Trained, stage: str, code: str
) -> None:
    play = Play(four, {(site, stage, 1): "lost" for site in ("south", "east")})
    run = play.run(until=1)
    assert [(e["attempt"], e["reason"]) for e in events(run, "void")] == [(1, code)]
    assert run.history[0].contributors == sorted(FOUR) and run.history[0].attempt == 2
    play.check_models(trained)
    check_protocol(play)


def test_three_void_attempts_end_the_run_by_name_and_it_goes_on_later(four: Federation, trained: Trained) -> None:
    """Round 1 is committed; round 2 cannot be opened; launched again, the run goes on there and ends complete."""
    play = Play(four, {(site, "train", 2): "silent" for site in ("south", "east")}, attempts=range(1, 4))
    run = play.run()
    assert run.facts["label"] == "failed after round 1: quorum-lost" and len(run.history) == 1
    assert [e["attempt"] for e in events(run, "void")] == [1, 2, 3]
    assert {s.order.attempt for s in play.of("unmask")} == {1}, "a void sum was opened"
    run.requeue()
    run = play.run(run.folder)
    assert run.facts["state"] == "complete"
    # Sums that fail count as attempts, and so does a launch: no attempt is used twice.
    assert [done.attempt for done in run.history] == [1, 5]
    play.check_models(trained)
    check_protocol(play)


def test_too_few_sites_with_keys_are_a_lost_quorum_with_everybodys_reason(four: Federation) -> None:
    faults: dict[tuple[str, str, int], Fault] = {("south", "keys", 1): "silent", ("east", "keys", 1): "refuse"}
    play = Play(four, faults, attempts=range(1, 4))
    run = play.run()
    assert run.facts["label"] == "failed after round 0: quorum-lost"
    assert "east: training-stopped, south: timeout" in events(run, "failed")[0]["message"]
    # South may come back, and with it there would be enough: it is waited for by name.
    assert [e["sites"] for e in events(run, "waiting")] == [["south"]] * 3
    assert [(e["attempt"], e["reason"]) for e in events(run, "void")] == [(n, "quorum-lost") for n in (1, 2, 3)]
    assert not play.of("train") and not play.of("shares")


def test_replies_that_come_twice_and_in_any_order_change_nothing(
    four: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Play(four, {})
    first = quiet.run()
    shaken = Play(forgetful(four), {})
    shaken.grid.twice = set(shaken.grid.answers)
    shaken.grid.shuffle = random.Random(7)
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 30.0)
    monkeypatch.setattr("fl_server.rounds.LINGER_S", 30.0)
    second = shaken.run()
    assert first.facts["state"] == second.facts["state"] == "complete"
    assert first.model is not None and second.model is not None and (first.model == second.model).all()
    check_protocol(shaken)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_whatever_happens_a_committed_model_is_the_mean_over_whom_the_record_names(tmp_path: Path, seed: int) -> None:
    """Faults at random, more than can be tolerated now and then. A run may end early, by name; it is never wrong."""
    dice, stages = random.Random(seed), ("keys", "invite", "shares", "train", "unmask", "evaluate")
    faults: dict[tuple[str, str, int], Fault] = {
        place: dice.choice(["silent", "lost", "late", "refuse", "restart"])
        for place in itertools.product(SEVEN, stages, (1, 2))
        if dice.random() < 0.12
    }
    play = Play(Federation(tmp_path, masked(SEVEN, 2)), faults, attempts=(1, 2))
    run = play.run(until=2)
    assert faults and (len(run.history) == 2 or "quorum-lost" in run.facts["label"])
    assert run.history, "nothing was committed, so nothing was checked"
    play.check_models()
    check_protocol(play)
    for done in run.history:
        assert sorted({*done.contributors, *done.missing}) == sorted(SEVEN)
        assert len(done.contributors) >= 3 and not set(done.contributors) & set(done.missing)
        given = {s.site for s in play.of("train") if (s.order.round, s.order.attempt) == (done.round, done.attempt)}
        assert set(done.contributors) <= given


# Hostile sites -------------------------------------------------------------------------------------------------------


def junk(count: int) -> bytes:
    return random.Random(count).randbytes(count)


def foreign_keys(report: Any) -> Any:
    """Keys that carry another site's name."""
    other = secagg.Bundle.from_bytes(report.keys)
    return dataclasses.replace(report, keys=dataclasses.replace(other, site="north").to_bytes())


def low_order_key(report: Any) -> Any:
    """A mask key with which every agreement fails; the signature no longer fits either."""
    own = secagg.Bundle.from_bytes(report.keys)
    return dataclasses.replace(report, keys=dataclasses.replace(own, mask=bytes(32)).to_bytes())


def wrong_shares(count: int) -> Tamper:
    """The last `count` shares are well-formed and not those that this site was given."""

    def tamper(report: Any) -> Any:
        shares = np.frombuffer(report.revealed, np.uint8).reshape(-1, SHARE_BYTES).copy()
        shares[-count:, -1] ^= 1
        return dataclasses.replace(report, revealed=shares.tobytes())

    return tamper


def other_kind(report: Any) -> Any:
    return wire.KeysReport(**report.naming(), site=report.site, seconds=0.0, keys=report.keys)


HOSTILE: dict[str, tuple[str, Tamper, str]] = {
    "keys of another size": ("keys", lambda r: dataclasses.replace(r, keys=junk(17)), "message-malformed"),
    "keys of noise": ("keys", lambda r: dataclasses.replace(r, keys=junk(len(r.keys))), "message-malformed"),
    "keys of another site": ("keys", foreign_keys, "peer-untrusted"),
    "a key of low order": ("keys", low_order_key, "peer-untrusted"),
    "shares of another size": ("shares", lambda r: dataclasses.replace(r, sealed=junk(100)), "message-malformed"),
    "a vector of another size": ("train", lambda r: dataclasses.replace(r, vector=junk(999)), "message-malformed"),
    "a signature of noise": ("train", lambda r: dataclasses.replace(r, vouch=junk(len(r.vouch))), "peer-untrusted"),
    "no signature": ("train", lambda r: dataclasses.replace(r, vouch=b""), "peer-untrusted"),
    "an answer to another sum": ("train", lambda r: dataclasses.replace(r, sum=r.sum + 1), "message-malformed"),
    "another site's name": ("train", lambda r: dataclasses.replace(r, site="north"), "message-malformed"),
    "keys instead of a vector": ("train", other_kind, "message-malformed"),
}  # fmt: skip
FIVE = [*FOUR, "alpha"]


@pytest.fixture(scope="module")
def five_trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(Federation(tmp_path_factory.mktemp("five"), masked(FIVE, 1)))


@pytest.fixture
def five(five_trained: Trained) -> tuple[Federation, Trained]:
    return forgetful(five_trained.federation), five_trained


@pytest.mark.parametrize("what", HOSTILE)
def test_one_hostile_site_costs_itself_its_place_and_nobody_else(five: tuple[Federation, Trained], what: str) -> None:
    """Garbage inside the sum cannot be seen and is not tested: whatever a site adds is added (it hides, it does not judge)."""
    stage, tamper, code = HOSTILE[what]
    play = Play(five[0], {("alpha", stage, 1): tamper})
    run = play.run(until=1)
    assert run.history[0].missing == {"alpha": code} and run.history[0].contributors == sorted(FOUR)
    assert run.attempt == 1
    play.check_models(five[1])
    check_protocol(play)


def test_a_site_whose_next_keys_are_garbage_contributes_and_is_named_in_the_next_sum(tmp_path: Path) -> None:
    play = Play(
        Federation(tmp_path, masked(FOUR, 2)), {("south", "train", 1): lambda r: dataclasses.replace(r, keys=b"")}
    )
    run = play.run()
    assert run.history[0].missing == {} and run.history[1].missing == {"south": "message-malformed"}
    play.check_models()


@pytest.mark.parametrize("tamper", [wrong_shares(5), lambda r: dataclasses.replace(r, revealed=junk(len(r.revealed)))])
def test_wrong_shares_are_outvoted_and_their_giver_is_named(five: tuple[Federation, Trained], tamper: Tamper) -> None:
    """Its vector counts, since it was in the sum before it lied, and the sum is right: no reason to leave it out."""
    play = Play(five[0], {("alpha", "unmask", 1): tamper})
    run = play.run(until=1)
    assert run.history[0].contributors == sorted(FIVE) and run.attempt == 1
    assert [(e["site"], e["reason"]) for e in events(run, "wrong_share")] == [("alpha", "share-invalid")]
    play.check_models(five[1])


def test_a_single_wrong_share_is_outvoted(five: tuple[Federation, Trained]) -> None:
    """Whether its maker or its giver lied nobody can tell, so nobody is named."""
    play = Play(five[0], {("alpha", "unmask", 1): wrong_shares(1)})
    run = play.run(until=1)
    assert run.attempt == 1 and run.history[0].missing == {} and not events(run, "wrong_share")
    play.check_models(five[1])


def test_too_few_opened_shares_are_named_at_once(five: tuple[Federation, Trained]) -> None:
    short = lambda r: dataclasses.replace(r, revealed=r.revealed[:-SHARE_BYTES])  # noqa: E731
    play = Play(five[0], {("alpha", "unmask", 1): short})
    run = play.run()
    assert run.history[0].contributors == sorted(FIVE) and run.attempt == 1
    assert run.history[0].validation_missing == {"alpha": "message-malformed"}
    play.check_models(five[1])


def test_shares_that_nobody_can_read_cost_one_attempt_and_their_dealer_its_place(
    five: tuple[Federation, Trained],
) -> None:
    """Noise in place of encrypted shares: nobody can help to take this site's masks away, so the sum is void, once."""
    play = Play(
        five[0], {("alpha", "shares", 1): lambda r: dataclasses.replace(r, sealed=junk(len(r.sealed)))}, range(99)
    )
    run = play.run()
    assert [e["reason"] for e in events(run, "void")] == ["share-invalid"]
    assert run.history[0].missing == {"alpha": "share-invalid"} and run.history[0].contributors == sorted(FOUR)
    play.check_models(five[1])
    check_protocol(play)


def test_five_sites_have_a_threshold_of_four() -> None:
    """What the tests above rely on."""
    assert [threshold(n) for n in (3, 4, 5, 6, 7)] == [3, 3, 4, 5, 5]


def test_a_run_of_sums_leaves_nothing_of_single_sites_in_what_the_coordinator_saw(four: Federation) -> None:
    """The vectors as they arrived: no two are alike, none is nearly the plain one, their words look like dice."""
    play = Play(four, {})
    run = play.run()
    assert read_facts(run.folder)["state"] == "complete"
    for sent in play.of("train"):
        words = np.frombuffer(sent.report.vector, "<u4")
        # 32 bits x N words: a share of ones beyond six standard deviations would be no dice.
        ones = np.unpackbits(words.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 6 * 0.5 / np.sqrt(32 * len(words))
        # A plain word of this study is small; its top 8 bits would be all alike.
        assert len(np.unique(words >> 24)) > 200
