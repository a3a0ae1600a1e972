"""Sums over tiny sites: masked equals plain to the last bit, whoever is away is named, and a void sum costs one attempt.

The sites here keep no images. Their half of the protocol is the true one (`fl_client.protection`), and what they contribute
is numbers that a test chose, so the right sum is known without the code under test.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Message
from grid import FaultyGrid
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.protection import Vault
from fl_client.site import Site
from fl_server import rounds, sums
from fl_server.roster import Home
from fl_server.run import Run
from fl_server.sums import MaskedSumming, OpenSumming, Summing, Task, Total, next_scale
from models.contributions import Contribution, Sheet, figures
from models.metrics import ScoreHistogram
from models.study import Study
from models.subgroups import Groups, Scored
from privacy import keys, wire
from privacy.errors import QuorumLost
from privacy.journal import Journal
from privacy.sharing import Encoding

UNHURRIED = settings(max_examples=100, deadline=None)  # a machine under load is no defect

BINS, PARAMETERS = 10, 6
NAMES = ("east", "north", "south", "west")
MODEL = np.zeros(PARAMETERS, np.float32)
SITE_KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in (*NAMES, "abbey")}
COORDINATOR, AGGREGATOR = ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate()


def made_study(sites: tuple[str, ...] = NAMES, **change: Any) -> Study:
    part = {"sites": list(sites), "quorum": 3, "minimum_patients": 1, "round_timeout_s": 5} | change.pop("part", {})
    facts = {
        "name": "s",
        "title": "t",
        "purpose": "p",
        "task": {"targets": ["opacity"]},
        "training": {"rounds": 5},
        "protection": "masked",
        "privacy": "none",
        "participation": part,
        "evaluation": {"bins": BINS},
        "roster": {name: keys.point_hex(key.public_key()) for name, key in SITE_KEYS.items()},
        "aggregator": AGGREGATOR.public_key().public_bytes_raw().hex(),
    }
    return Study.model_validate(facts | change)


def contribution_of(name: str) -> Contribution:
    """Numbers that differ from site to site; multiples of 1/8, so that the fixed point is exact."""
    place = (*NAMES, "abbey").index(name) + 1
    counts = np.zeros((1, 2, BINS), np.int64)
    counts[0, 0, place], counts[0, 1, BINS - place] = 10 + place, 11 * place
    update = (np.arange(PARAMETERS, dtype=np.float32) - 3 * place) / 8
    return Contribution(100 * place, Sheet(5 * place, 60 + place, 0.5, ScoreHistogram(counts)), 7 * place, 0.25, update)


class TinySite:
    """One site's node without images: it answers orders with its contribution, through the true client half."""

    def __init__(self, name: str, study: Study) -> None:
        self.name, self.study, self.vault = name, study, Vault()
        self.contribution = contribution_of(name)
        self.site = cast(Site, SimpleNamespace(home=Path("/nowhere") / name, name=name, key=SITE_KEYS[name]))

    def __call__(self, message: Message) -> Message | None:
        order = wire.decode(message, *wire.ORDERS)
        order.verify(COORDINATOR.public_key())
        report = self.report(order)
        return None if report is None else Message(report.to_records(), reply_to=message)

    def report(self, order: wire.Order) -> wire.Report | None:
        named = {**order.naming(), "site": self.name}
        if isinstance(order, wire.UnmaskOrder):
            revealed, sealed = self.vault.unmask(self.site, self.study, order)
            return wire.UnmaskReport(**named, seconds=0.1, revealed=revealed, sealed=sealed)
        if isinstance(order, wire.KeysOrder):
            return wire.KeysReport(**named, seconds=0.1, keys=self.vault.make_keys(self.site, self.study, order))
        return self.work(cast(wire.WorkOrder, order), named)

    def work(self, order: wire.WorkOrder, named: dict[str, Any]) -> wire.Report | None:
        given = self.contribution
        if isinstance(order, wire.EvaluateOrder):
            given = Contribution(given.ingested, given.sheet, groups=given.groups or Groups.empty(self.study))
        sending = self.vault.begin(self.site, self.study, order, order.model.size)
        vector, vouch = sending.protect(given)
        facts = {**named, "seconds": 0.2, "vector": vector, "vouch": vouch, "keys": sending.keys}
        if isinstance(order, wire.TrainOrder):
            return wire.TrainReport(**facts)
        split = cast(wire.EvaluateOrder, order).split
        released = figures(self.study, spread(self.contribution.sheet.histogram), release=split == "test")
        return wire.EvaluateReport(**facts, split=split, figures=released)


def spread(histogram: ScoreHistogram) -> Scored:
    """Images with these counts, each at the middle of its bin and of a patient of its own."""
    labels, places = (np.repeat(part.ravel(), histogram.counts[0].ravel()) for part in np.indices((2, histogram.bins)))
    scores = (places[:, None] + 0.5) / histogram.bins
    return Scored(scores, labels[:, None] * 1.0, np.ones(scores.shape), np.arange(len(labels)))


class Bench:
    """A run of a study over tiny sites, its grid and its sums."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.study, everyone = study, study.all_sites
        self.nodes = {name: number for number, name in enumerate(everyone, start=1)}
        self.sites = {name: TinySite(name, study) for name in everyone}
        self.grid = FaultyGrid({self.nodes[name]: site for name, site in self.sites.items()})
        self.run = Run.create(folder, study, "ada", everyone)
        self.run.start()
        self.journal = Journal(folder / "journal.jsonl")
        self.revoked: set[str] = set()
        facts: dict[str, Any] = {"coordinator_key": COORDINATOR, "aggregator_key": AGGREGATOR, "journal": self.journal}
        home = cast(
            Home, SimpleNamespace(roster=SimpleNamespace(revoked=lambda: self.revoked), runs=Path("/nowhere"), **facts)
        )
        self.summing: Summing = sums.build(self.grid, self.run, home)
        self.summing.timeout_s = 0.15  # five seconds are the least that a study may say

    def trainers(self) -> dict[str, int]:
        return {name: self.nodes[name] for name in self.study.participation.sites}

    def task(self, number: int = 1, **change: Any) -> Task:
        facts: dict[str, Any] = {"kind": wire.TrainOrder, "model": MODEL, "round": number, "scale": 10}
        facts |= {"sites": self.trainers(), "least": self.study.participation.quorum, "afterwards": self.trainers()}
        return Task(**(facts | change))

    def test_task(self) -> Task:
        kind = {"kind": wire.EvaluateOrder, "scale": 0, "more": {"split": "test"}}
        return self.task(**kind, sites=dict(self.nodes), afterwards=None)

    def train(self, number: int = 1, **change: Any) -> Total:
        return self.summing.carry_out(self.task(number, **change))

    def orders(self) -> list[tuple[str, str, int, int]]:
        """(kind, site, attempt, sum) of everything sent since the last look."""
        names = {node: name for name, node in self.nodes.items()}
        found = [(wire.decode(m, *wire.ORDERS), names[m.metadata.dst_node_id]) for m in self.grid.sent]
        self.grid.sent.clear()
        return [(order.kind, name, order.attempt, order.sum) for order, name in found]

    def falls_silent(self, name: str, at: Callable[[wire.Order], bool] = lambda order: True) -> None:
        """From now on `name` does not answer the orders of which `at` is true."""
        site = self.sites[name]

        def answer(message: Message) -> Message | None:
            return None if at(wire.decode(message, *wire.ORDERS)) else site(message)

        self.grid.answers[self.nodes[name]] = answer


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "LINGER_S", 0.05)
    monkeypatch.setattr(rounds, "GRACE_S", 0.0)
    monkeypatch.setattr(rounds, "ONLINE_LOOK_S", 0.02)


def check_total(total: Total, sites: list[str], kind: str = "train") -> None:
    """Oracle: exact fractions over the contributions of `sites`, which know nothing of words or masks."""
    parts = [contribution_of(name) for name in sites]
    assert total.contributors == sorted(sites)
    assert total.mean.ingested == sum(part.ingested for part in parts)
    assert total.mean.sheet.patients == sum(part.sheet.patients for part in parts)
    assert (total.mean.sheet.histogram.counts == sum(part.sheet.histogram.counts for part in parts)).all()
    assert total.mean.sheet.loss == pytest.approx(0.5, abs=1e-6) and total.clipped == 0
    if kind != "train":
        assert (total.mean.cases, total.mean.update.size, total.peak) == (0, 0, 0.0)
        return
    cases = sum(part.cases for part in parts)
    assert total.mean.cases == cases and total.mean.loss == pytest.approx(0.25, abs=1e-6)
    summed = [sum(Fraction(float(part.update[i])) * part.cases for part in parts) for i in range(PARAMETERS)]
    assert [float(value) for value in total.mean.update] == [float(np.float32(float(s) / cases)) for s in summed]
    assert total.peak == max(abs(float(s)) for s in summed)


PROTECTIONS = ["masked", "sealed", "plain"]


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("bits", [16, 24, 32, 64])
def test_a_sum_is_exact_whatever_protects_it(tmp_path: Path, protection: str, bits: int) -> None:
    bench = Bench(tmp_path, made_study(protection=protection, encoding_bits=bits))
    scale = 3 if bits == 16 else 10
    check_total(bench.train(scale=scale), list(NAMES))
    check_total(bench.summing.carry_out(bench.test_task()), list(NAMES), "evaluate")


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_what_a_site_sends_shows_its_update_only_where_it_is_plain(tmp_path: Path, protection: str) -> None:
    bench, seen = Bench(tmp_path, made_study(protection=protection)), []
    site, facts = bench.sites["east"], contribution_of("east")

    def listen(message: Message) -> Message | None:
        reply = site(message)
        report = wire.decode(reply, *wire.REPORTS) if reply is not None else None
        if isinstance(report, wire.TrainReport):
            seen.append(report.vector)
        return reply

    bench.grid.answers[bench.nodes["east"]] = listen
    bench.train()
    sites = len(NAMES)
    encoding = Encoding(values=PARAMETERS, counts=26, bits=32, scale=10, sites=sites)
    open_words = bytes(encoding.bytes_of(encoding.encode(facts.update, facts.cases, facts.counts("train"))))
    assert (seen == [open_words]) == (protection == "plain")
    assert protection == "plain" or all(open_words[i : i + 8] not in seen[0] for i in range(0, len(open_words) - 8, 4))


# How many exchanges --------------------------------------------------------------------------------------------------


def test_the_first_masked_sum_takes_four_exchanges_and_every_later_one_two(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study())
    for number, expected in ((1, ["keys", "unmask", "train", "unmask"]), (2, ["train", "unmask"])):
        check_total(bench.train(number), list(NAMES))
        sent = bench.orders()
        assert [kind for kind, _, _, _ in sent] == [kind for kind in expected for _ in NAMES]
    check_total(bench.summing.carry_out(bench.test_task()), list(NAMES), "evaluate")
    assert [kind for kind, _, _, _ in bench.orders()] == [kind for kind in ("evaluate", "unmask") for _ in NAMES]


def test_no_site_gets_the_same_order_of_the_same_sum_twice(tmp_path: Path) -> None:
    """A site answers each (attempt, sum, kind) once; the coordinator must never need it twice."""
    bench, sent = Bench(tmp_path, made_study()), []
    bench.falls_silent("west", lambda order: order.kind == "unmask" and order.round == 2)
    for number in range(1, 5):
        bench.train(number)
        sent += bench.orders()
    assert len(sent) == len(set(sent))


def test_after_the_last_sum_no_keys_are_asked_for_and_none_are_left(tmp_path: Path) -> None:
    bench, asked = Bench(tmp_path, made_study()), []
    bench.train()
    answer = bench.sites["north"]

    def listen(message: Message) -> Message | None:
        asked.append(wire.decode(message, *wire.ORDERS))
        return answer(message)

    bench.grid.answers[bench.nodes["north"]] = listen
    bench.summing.carry_out(bench.test_task())
    work, unmask = asked
    assert isinstance(work, wire.EvaluateOrder) and not work.keys_next
    assert isinstance(unmask, wire.UnmaskOrder) and (unmask.members, unmask.keys) == ((), b"")
    assert all(not held.members for site in bench.sites.values() for held in site.vault.runs.values())


@pytest.mark.parametrize("protection", ["sealed", "plain"])
def test_an_open_sum_takes_one_exchange_and_names_nobodys_keys(tmp_path: Path, protection: str) -> None:
    bench = Bench(tmp_path, made_study(protection=protection))
    bench.train()
    orders = [wire.decode(message, wire.TrainOrder) for message in bench.grid.sent]
    assert len(orders) == len(NAMES)
    assert all((order.participants, order.shares, order.keys_next) == ((), b"", False) for order in orders)


# Sites that are away -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_site_that_is_offline_is_not_asked_and_named(tmp_path: Path, protection: str) -> None:
    bench = Bench(tmp_path, made_study(protection=protection))
    bench.grid.online = {node for name, node in bench.nodes.items() if name != "south"}
    total = bench.train()
    check_total(total, ["east", "north", "west"])
    assert total.missing == {"south": "offline"}
    assert "south" not in {name for _, name, _, _ in bench.orders()}


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_site_that_falls_silent_at_work_is_named_and_the_sum_is_that_of_the_others(
    tmp_path: Path, protection: str
) -> None:
    bench = Bench(tmp_path, made_study(protection=protection))
    bench.falls_silent("south", lambda order: order.kind == "train")
    total = bench.train()
    check_total(total, ["east", "north", "west"])
    assert total.missing == {"south": "timeout"} and set(total.seconds) == {"east", "north", "west"}


def test_a_site_that_falls_silent_after_its_vector_is_in_the_sum(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study())
    bench.falls_silent("south", lambda order: order.kind == "unmask" and order.sum > 1)
    total = bench.train()
    check_total(total, list(NAMES))
    assert total.missing == {}


@pytest.mark.parametrize("stage", ["keys", "unmask"])
def test_a_site_that_falls_silent_before_its_shares_are_there_has_no_part(tmp_path: Path, stage: str) -> None:
    bench = Bench(tmp_path, made_study())
    bench.falls_silent("south", lambda order: order.kind == stage and order.sum <= 2)
    total = bench.train()
    check_total(total, ["east", "north", "west"])
    assert set(total.missing) == {"south"}


def test_a_site_that_comes_back_gets_keys_while_the_others_work_and_is_in_the_sum_after(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study())
    bench.grid.online = {node for name, node in bench.nodes.items() if name != "south"}
    bench.train(1)
    bench.orders()
    bench.grid.online = None
    total = bench.train(2)
    check_total(total, ["east", "north", "west"])
    assert total.missing == {"south": "joining"}
    mine = [kind for kind, name, _, _ in bench.orders() if name == "south"]
    assert mine == ["keys", "unmask"]
    total = bench.train(3)
    check_total(total, list(NAMES))
    assert total.missing == {}
    assert len(bench.orders()) == 2 * len(NAMES)


def test_sites_that_only_evaluate_join_for_the_last_sum_without_an_exchange_more(tmp_path: Path) -> None:
    plan = made_study(part={"evaluate_only": ["abbey"]})
    bench = Bench(tmp_path, plan)
    check_total(bench.train(1), list(NAMES))
    bench.orders()
    bench.summing.carry_out(
        bench.task(1, kind=wire.EvaluateOrder, more={"split": "validation"}, afterwards=bench.nodes)
    )
    assert [kind for kind, name, _, _ in bench.orders() if name == "abbey"] == ["keys", "unmask"]
    total = bench.summing.carry_out(bench.test_task())
    check_total(total, [*NAMES, "abbey"], "evaluate")
    assert set(total.figures) == {*NAMES, "abbey"}
    assert [kind for kind, _, _, _ in bench.orders()] == ["evaluate"] * 5 + ["unmask"] * 5


def test_when_too_few_of_the_prepared_sites_are_here_keys_are_agreed_on_anew(tmp_path: Path) -> None:
    """Prepared: south, east, north. Then south and east go, west and abbey come: quorum is there, but not with those keys."""
    plan = made_study((*NAMES, "abbey"))
    bench = Bench(tmp_path, plan)

    def only(*names: str) -> None:
        bench.grid.online = {bench.nodes[name] for name in names}

    only("south", "east", "north")
    bench.train(1)
    bench.orders()
    only("north", "west", "abbey")
    total = bench.train(2)
    assert total.contributors == ["abbey", "north", "west"]
    assert [kind for kind, _, _, _ in bench.orders()] == [
        k for k in ("keys", "unmask", "train", "unmask") for _ in "abc"
    ]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_below_the_quorum_there_is_no_sum_and_everybodys_reason_is_told(tmp_path: Path, protection: str) -> None:
    bench = Bench(tmp_path, made_study(protection=protection))
    bench.falls_silent("south")
    bench.falls_silent("west")
    with pytest.raises(QuorumLost, match="south: timeout, west: timeout"):
        bench.train()
    bench.grid.online = {1}
    with pytest.raises(QuorumLost, match="1 of 3 sites needed are online"):
        bench.train()


def test_an_open_evaluation_of_one_site_is_better_than_none(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study(protection="plain"))
    for name in ("east", "south", "west"):
        bench.falls_silent(name)
    total = bench.summing.carry_out(bench.task(kind=wire.EvaluateOrder, least=1, more={"split": "test"}))
    check_total(total, ["north"], "evaluate")


# Void sums -----------------------------------------------------------------------------------------------------------


def events(bench: Bench) -> str:
    return (bench.run.folder / "events.jsonl").read_text()


def test_a_void_sum_is_tried_again_under_a_new_attempt_with_nothing_of_the_old(tmp_path: Path) -> None:
    """Two of four vanish between their vectors and the opening: nothing was learned. They are back for the next attempt."""
    bench, vectors = Bench(tmp_path, made_study()), dict[int, set[bytes]]()
    for name in ("south", "west"):
        bench.falls_silent(name, lambda order: order.kind == "unmask" and order.attempt == 1 and order.sum > 1)
    north = bench.sites["north"]

    def listen(message: Message) -> Message | None:
        reply = north(message)
        report = None if reply is None else wire.decode(reply, *wire.REPORTS)
        for part in (getattr(report, "vector", b""), getattr(report, "keys", b"")):
            vectors.setdefault(cast(wire.Report, report).attempt, set()).add(part)
        return reply

    bench.grid.answers[bench.nodes["north"]] = listen
    total = bench.train()
    check_total(total, list(NAMES))
    assert bench.run.attempt == 2 and Run.open(bench.run.folder).attempt == 2
    assert '"too-few-survivors"' in events(bench)
    assert vectors[1] & vectors[2] <= {b""}
    attempts = [attempt for _, _, attempt, _ in bench.orders()]
    assert attempts == sorted(attempts)


def test_a_sum_that_cannot_be_opened_ends_by_name_after_three_attempts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study())
    for name in ("south", "west"):
        bench.falls_silent(name, lambda order: order.kind == "unmask" and order.sum > 1)
    with pytest.raises(QuorumLost, match="no sum of round 1 could be opened in 3 attempts"):
        bench.train()
    assert events(bench).count('"void"') == 3
    assert [attempt for kind, name, attempt, _ in bench.orders() if (kind, name) == ("train", "north")] == [1, 2, 3]


def test_a_wrong_share_that_the_others_outvote_is_told_and_costs_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study((*NAMES, "abbey")))
    west = bench.sites["west"]

    def lie(message: Message) -> Message | None:
        report = west.report(wire.decode(message, *wire.ORDERS))
        if isinstance(report, wire.UnmaskReport) and report.revealed:
            report = wire.UnmaskReport(**(vars(report) | {"revealed": bytes(len(report.revealed))}))
        return Message(cast(wire.Report, report).to_records(), reply_to=message)

    bench.grid.answers[bench.nodes["west"]] = lie
    for number in (1, 2):
        total = bench.train(number)
        check_total(total, [*NAMES, "abbey"])  # its vector was sound, and four others opened the sum
        assert total.missing == {} and bench.run.attempt == 1
    told = [json.loads(line) for line in events(bench).splitlines()]
    wrong = [(line["site"], line["reason"]) for line in told if line["event"] == "wrong_share"]
    assert wrong == [("west", "share-invalid")] * 2


def test_a_site_whose_secret_nobody_can_rebuild_is_left_out_of_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave its peers shares of nothing, so its mask cannot be taken away: the sum is void, and it is known whose fault."""
    bench = Bench(tmp_path, made_study((*NAMES, "abbey")))
    west = bench.sites["west"]

    def deal_nothing(message: Message) -> Message | None:
        with monkeypatch.context() as patch:
            patch.setattr(
                "privacy.secagg.split", lambda _, holders, *__: [b"\0" + os.urandom(32) for _ in range(holders)]
            )
            return west(message)

    bench.grid.answers[bench.nodes["west"]] = deal_nothing
    total = bench.train(1)
    check_total(total, ["abbey", "east", "north", "south"])
    assert total.missing == {"west": "share-invalid"} and bench.run.attempt == 2
    bench.orders()
    assert bench.train(2).missing == {"west": "share-invalid"}
    assert "west" not in {name for _, name, _, _ in bench.orders()}


def test_counts_that_contradict_each_other_void_a_masked_sum(tmp_path: Path) -> None:
    """Nobody can say whose they were; it is noticed, and the run ends by name rather than with a wrong model."""
    bench = Bench(tmp_path, made_study())
    sheet = Sheet(10**6, 3, 0.5, ScoreHistogram.empty(1, BINS))
    bench.sites["west"].contribution = Contribution(1, sheet, 5, 0.1, np.zeros(PARAMETERS, np.float32))
    with pytest.raises(QuorumLost, match="contradict"):
        bench.train()
    assert events(bench).count('"message-malformed"') == 3


# Hostile reports -----------------------------------------------------------------------------------------------------


def tampering(bench: Bench, name: str, change: Callable[[wire.WorkReport], dict[str, Any]]) -> None:
    site = bench.sites[name]

    def answer(message: Message) -> Message | None:
        report = site.report(wire.decode(message, *wire.ORDERS))
        if isinstance(report, wire.WorkReport):
            report = type(report)(**(vars(report) | change(report)))
        return Message(cast(wire.Report, report).to_records(), reply_to=message)

    bench.grid.answers[bench.nodes[name]] = answer


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("size", [0, -1, 1, 4])
def test_a_vector_of_another_size_costs_its_site_the_place_and_no_other(
    tmp_path: Path, protection: str, size: int
) -> None:
    bench = Bench(tmp_path, made_study(protection=protection))

    def resized(report: wire.WorkReport) -> dict[str, Any]:
        return {"vector": b"" if size == 0 else report.vector[:size] if size < 0 else report.vector + bytes(size)}

    tampering(bench, "south", resized)
    total = bench.train()
    check_total(total, ["east", "north", "west"])
    assert total.missing == {"south": "seal-broken" if protection == "sealed" else "message-malformed"}


def test_a_sealed_vector_of_another_site_order_or_key_does_not_open(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study(protection="sealed"))
    order, good = cast(wire.WorkOrder, bench.summing._work_order(bench.task(), (), b"")), bench.sites["south"]
    facts = contribution_of("south")
    encoding = Encoding(values=PARAMETERS, counts=26, bits=32, scale=10, sites=4)
    packed = bytes(encoding.bytes_of(encoding.encode(facts.update, facts.cases, facts.counts("train"))))
    public, stranger = AGGREGATOR.public_key().public_bytes_raw(), X25519PrivateKey.generate().public_key()
    forged = [
        keys.seal(public, packed, order.about("north")),
        keys.seal(stranger.public_bytes_raw(), packed, order.about("south")),
        packed,
    ]
    for vector in forged:
        tampering(bench, good.name, lambda report, sent=vector: {"vector": sent})
        total = bench.train()
        check_total(total, ["east", "north", "west"])
        assert total.missing == {"south": "seal-broken"}


IMPOSSIBLE: list[dict[str, Any]] = [
    {"cases": 0},
    {"sheet": Sheet(10**6, 3, 0.5, ScoreHistogram.empty(1, BINS))},
    {"sheet": Sheet(1, 3, 0.5, ScoreHistogram(np.full((1, 2, BINS), 5)))},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
@pytest.mark.parametrize("protection", ["sealed", "plain"])
def test_impossible_counts_cost_a_site_its_place_where_they_can_be_seen(
    tmp_path: Path, protection: str, change: dict[str, Any]
) -> None:
    bench = Bench(tmp_path, made_study(protection=protection))
    facts = contribution_of("west")
    sound = {"ingested": facts.ingested, "sheet": facts.sheet, "cases": facts.cases, "update": facts.update}
    bench.sites["west"].contribution = Contribution(**(sound | change))
    total = bench.train()
    check_total(total, ["east", "north", "south"])
    assert total.missing == {"west": "message-malformed"}


def test_bad_keys_of_the_next_sum_cost_a_site_that_sum_and_not_this_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study())
    tampering(bench, "west", lambda report: {"keys": report.keys[:-1] + bytes([report.keys[-1] ^ 1])})
    check_total(bench.train(1), list(NAMES))
    total = bench.train(2)
    check_total(total, ["east", "north", "south"])
    assert total.missing == {"west": "peer-untrusted"}
    check_total(bench.train(3), list(NAMES))  # and for round 3 it sent good ones


# Scales --------------------------------------------------------------------------------------------------------------


def total_of(peak: float, clipped: int = 0) -> Total:
    return Total(Contribution(0, Sheet(0, 0, 0.0, ScoreHistogram.empty(1, BINS))), [], {}, {}, clipped, peak, {})


def named(count: int) -> tuple[str, ...]:
    return tuple(f"s{number:04d}" for number in range(count))


def limit_of(study: Study) -> int:
    """Independent of the code: the largest word of which as many as there are sites stay in the signed range.

    Of 64 bits a word has 53 significant ones, because it is computed as a float64.
    """
    limit = (2 ** (study.encoding_bits - 1) - 1) // len(study.participation.sites)
    return limit if limit < 2**53 else int(f"{limit:b}"[:53], 2) << limit.bit_length() - 53


ROSTERS = st.sampled_from([1, 2, 3, 4, 7, 8, 20, 64, 1000])
BITS = st.sampled_from([16, 24, 32, 64])
PEAKS = st.one_of(
    st.floats(2.0**-120, 2.0**120),
    st.integers(-100, 100).map(lambda power: 2.0**power),
    st.integers(-100, 100).map(lambda power: float(np.nextafter(2.0**power, 0))),
)


def open_study(count: int, bits: int) -> Study:
    part = {"sites": list(named(count)), "quorum": 1}
    return made_study(part=part, encoding_bits=bits, protection="plain")


@UNHURRIED
@given(ROSTERS, BITS, PEAKS)
def test_the_next_scale_is_the_largest_that_fits_what_a_site_may_reach(count: int, bits: int, peak: float) -> None:
    """Twice the sum's peak; of 16 bits less with many sites, but always eight even shares of it."""
    study, times = open_study(count, bits), Fraction(2)
    if bits == 16:
        times = next(Fraction(2) / 2**halved for halved in range(9) if count < 4 ** (halved + 2))
        assert times >= min(2, Fraction(8, count))
    scale, room = next_scale(study, total_of(peak), -wire.SCALE_MAX), Fraction(limit_of(study))
    assert times * Fraction(peak) * Fraction(2) ** scale <= room or scale == -wire.SCALE_MAX
    assert times * Fraction(peak) * Fraction(2) ** (scale + 1) > room or scale == wire.SCALE_MAX
    if bits == 16:  # one bit finer a round, as long as eight even shares of the peak have room
        fine = min(Fraction(2), Fraction(8, count)) * Fraction(peak)
        finer, same = next_scale(study, total_of(peak), scale), next_scale(study, total_of(peak), scale - 1)
        assert (finer, same) == (min(scale + 1, max(scale, finer)), scale)
        assert finer == scale or fine * Fraction(2) ** finer <= room * Fraction(2**40 + 1, 2**40)


@UNHURRIED
@given(
    ROSTERS,
    st.sampled_from([24, 32, 64]),
    st.integers(-60, 60),
    st.integers(2**23, 2**24 - 1),
    st.integers(1, 2**31 - 1),
)
def test_nothing_is_clipped_if_no_site_exceeds_twice_the_peak(
    count: int, bits: int, power: int, mantissa: int, cases: int
) -> None:
    """A site that sends exactly twice the peak, up or down, beside others that do: encoded by the true encoding."""
    study, value = open_study(count, bits), np.float32(mantissa * 2.0 ** (power - 24))
    peak = Fraction(float(value)) * cases / 2
    if float(peak) != peak:
        peak = Fraction(float(np.nextafter(float(peak), np.inf)))
    scale = next_scale(study, total_of(float(peak)), 0)
    encoding = Encoding(values=2, counts=0, bits=study.encoding_bits, scale=scale, sites=count)
    vector = encoding.encode(np.array([value, -value], np.float32), cases, np.zeros(0, np.int64))
    assert int(vector.counts[-1]) == 0
    half = np.array([value / 2, 0], np.float32)
    assert int(encoding.encode(half, cases, np.zeros(0, np.int64)).counts[-1]) == 0


def test_a_clipped_value_is_counted_through_every_kind_of_sum(tmp_path: Path) -> None:
    for protection in PROTECTIONS:
        bench = Bench(tmp_path / protection, made_study(protection=protection))
        total = bench.train(scale=30)
        large = sum(
            abs(float(v)) * c.cases * 2**30 > (2**31 - 1) // 4 for c in map(contribution_of, NAMES) for v in c.update
        )
        assert total.clipped == large > 0


# The door ------------------------------------------------------------------------------------------------------------


def test_the_study_chooses_the_protection_and_a_task_is_named_after_its_order(tmp_path: Path) -> None:
    for protection, kind in (("masked", MaskedSumming), ("sealed", OpenSumming), ("plain", OpenSumming)):
        bench = Bench(tmp_path / protection, made_study(protection=protection))
        assert type(bench.summing) is kind
    assert (bench.task().name, bench.test_task().name) == ("train", "test")
    assert sums.timeout_of(bench.study) == 5.0


def test_orders_are_signed_now_and_say_what_the_task_says(tmp_path: Path) -> None:
    bench = Bench(tmp_path, made_study())
    bench.train(3, scale=-7)
    sent = [wire.decode(message, *wire.ORDERS) for message in bench.grid.sent]
    for order in sent:
        assert abs(order.issued - time.time()) < 60
        assert (order.study, order.run, order.round) == (bench.study.digest, bench.run.run_id, 3)
    work = [order for order in sent if isinstance(order, wire.TrainOrder)]
    assert all(order.scale == -7 and order.participants == NAMES and order.keys_next for order in work)
    assert len({order.body() for order in work}) == 1  # everybody was shown the same


@pytest.mark.parametrize("protection", ["sealed", "plain"])
def test_a_robust_strategy_gets_each_update_and_one_site_cannot_coarsen_the_words_of_all(
    tmp_path: Path, protection: str
) -> None:
    study = made_study(protection=protection, strategy={"name": "median"})
    bench = Bench(tmp_path, study)
    honest, kept = bench.train(1), bench.sites["west"].contribution
    assert {name: update.tolist() for name, update in honest.updates.items()} == {
        name: contribution_of(name).update.tolist() for name in NAMES
    }
    bench.sites["west"].contribution = replace(kept, update=kept.update * 1e5)
    hostile = bench.train(2)
    assert next_scale(study, hostile, 10) >= next_scale(study, honest, 10) - 2 and hostile.clipped > 0
    assert next_scale(made_study(protection=protection), hostile, 10) < 10
    evaluated = bench.summing.carry_out(bench.test_task())
    assert evaluated.updates == {} and evaluated.contributors == sorted(NAMES)
