"""The vault: keys of a sum serve one attempt at it, once, in the memory of one process, and masks never leave alone."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_client import protection
from fl_client.protection import RUNS_MAX, Signing, Vault
from fl_client.site import Site
from models.contributions import Contribution, Sheet, count_of
from models.metrics import ScoreHistogram
from models.study import Study
from privacy import keys, wire
from privacy.errors import (
    MaskKeysLost,
    MessageMalformed,
    PeerUntrusted,
    ProtectionError,
    SealBroken,
    SignatureRefused,
    StepRefused,
    TooFewSurvivors,
)
from privacy.secagg import Aggregator, Member, Place
from privacy.sharing import Encoding

NAMES = ("east", "north", "south", "west")
KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in (*NAMES, "abbey")}
AGGREGATOR = X25519PrivateKey.generate()
PARAMETERS, BINS = 5, 10
MODEL = np.zeros(PARAMETERS, np.float32)


def made_study(protection: str = "masked", **change: Any) -> Study:
    facts = {
        "name": "s",
        "title": "t",
        "purpose": "p",
        "task": {"targets": ["opacity"]},
        "training": {"rounds": 9},
        "protection": protection,
        "privacy": "none",
        "participation": {"sites": list(NAMES), "evaluate_only": ["abbey"], "quorum": 3},
        "evaluation": {"bins": BINS},
        "roster": {name: keys.point_hex(key.public_key()) for name, key in KEYS.items()},
        "aggregator": AGGREGATOR.public_key().public_bytes_raw().hex(),
    }
    return Study.model_validate(facts | change)


STUDY = made_study()


def made_site(name: str, home: str = "") -> Site:
    return cast(Site, SimpleNamespace(home=Path("/nowhere") / (home or name), name=name, key=KEYS[name]))


def made_order(kind: type[wire.Order], number: int, attempt: int = 1, **change: Any) -> Any:
    facts: dict[str, Any] = {"study": STUDY.digest, "run": "run-1", "round": 1, "attempt": attempt, "sum": number}
    facts |= {"issued": 1, "signature": b""}
    if issubclass(kind, wire.WorkOrder):
        facts |= {"model": MODEL, "scale": 10, "participants": (), "shares": b"", "keys_next": False}
    if kind is wire.EvaluateOrder:
        facts["split"] = "test"
    if kind is wire.UnmaskOrder:
        facts |= {"survivors": (), "vouches": b"", "members": (), "keys": b""}
    return kind(**(facts | change))


def contribution(seed: int, kind: str = "train") -> Contribution:
    rng = np.random.default_rng(seed)
    sheet = Sheet(4, 9, 0.5, ScoreHistogram(rng.integers(0, 3, (1, 2, BINS)) % 2))
    sheet = Sheet(4, int(sheet.histogram.counts.sum()) + 4, 0.5, sheet.histogram)
    if kind != "train":
        return Contribution(20 + seed, sheet)
    update = rng.integers(-400, 400, PARAMETERS).astype(np.float32) / 8
    return Contribution(20 + seed, sheet, 3 + seed, 0.25, update)


class Circle:
    """Vaults of several sites and the coordinator's half of their sums, without messages between them."""

    def __init__(self, names: tuple[str, ...] = NAMES, vault: Vault | None = None, run: str = "run-1") -> None:
        self.names, self.run = names, run
        self.vouches: dict[str, bytes] = {}  # of the last sum
        self.sites = {name: made_site(name) for name in names}
        self.vaults = {name: vault or Vault() for name in names}
        self.roster = {name: key.public_key() for name, key in KEYS.items()}

    def order(self, kind: type[wire.Order], number: int, attempt: int = 1, **change: Any) -> Any:
        return made_order(kind, number, attempt, **({"run": self.run} | change))

    def unmask_order(self, survivors: tuple[str, ...], **change: Any) -> Any:
        """An order to open sum 2 for `survivors`, each of whom vouched, where there is such a site."""
        vouches = b"".join(self.vouches.get(name, bytes(64)) for name in survivors)
        return self.order(wire.UnmaskOrder, 2, **({"survivors": survivors, "vouches": vouches} | change))

    def unmask(self, name: str, order: wire.UnmaskOrder) -> tuple[bytes, bytes]:
        return self.vaults[name].unmask(self.sites[name], STUDY, order)

    def prepare(self, number: int, attempt: int = 1) -> Aggregator:
        """Keys and shares of a first sum."""
        half = Aggregator(Place(STUDY.digest, self.run, attempt, number), self.roster, 3)
        for name in self.names:
            order = self.order(wire.KeysOrder, number, attempt)
            half.add_keys(name, self.vaults[name].make_keys(self.sites[name], STUDY, order))
        order = self.order(wire.UnmaskOrder, number - 1, attempt, members=half.keyed, keys=half.close_keys())
        for name in self.names:
            revealed, sealed = self.unmask(name, order)
            assert revealed == b""
            half.add_shares(name, sealed)
        return half

    def work(self, half: Aggregator, kind: type[wire.WorkOrder] = wire.TrainOrder, **change: Any) -> wire.WorkOrder:
        """Masked vectors of everyone, and, if the order asks for them, keys of the next sum into `self.following`."""
        participants, shares = half.close_shares()
        place = half.place
        change = {"participants": participants, "shares": shares, "keys_next": True} | change
        order: wire.WorkOrder = self.order(kind, place.sum, place.attempt, **change)
        word = "train" if kind is wire.TrainOrder else "evaluate"
        values = PARAMETERS if word == "train" else 0
        self.encoding = Encoding(values, count_of(STUDY, cast(Any, word)), 32, order.scale, len(participants))
        half.start(order.body(), self.encoding)
        self.following = Aggregator(Place(STUDY.digest, self.run, place.attempt, place.sum + 1), self.roster, 3)
        for seed, name in enumerate(participants):
            vault, site = self.vaults[name], self.sites[name]
            sending = vault.begin(site, STUDY, order, PARAMETERS)
            packed, vouch = sending.protect(contribution(seed, word))
            half.add_vector(name, self.encoding.vector_of(packed), vouch)
            self.vouches[name] = vouch
            if order.keys_next:
                self.following.add_keys(name, sending.keys)
        return order

    def open(self, half: Aggregator, last: bool = False) -> Any:
        """The opened sum; unless it is the `last`, shares of the next one go into `self.following`."""
        survivors = half.close_vectors()
        more = {} if last else {"members": self.following.keyed, "keys": self.following.close_keys(survivors)}
        more |= {"survivors": survivors, "vouches": half.vouches}
        order = self.order(wire.UnmaskOrder, half.place.sum, half.place.attempt, **more)
        for name in survivors:
            revealed, sealed = self.unmask(name, order)
            half.add_revealed(name, revealed)
            if not last:
                self.following.add_shares(name, sealed)
        return self.encoding.decode(half.finish())

    def plain_sum(self, word: str = "train") -> tuple[list[float], list[int]]:
        """Oracle: the contributions added up as they are; they are multiples of 1/8, so nothing is rounded."""
        parts = [contribution(seed, word) for seed in range(len(self.names))]
        size = PARAMETERS if word == "train" else 0
        values = [sum(float(part.update[i]) * part.cases for part in parts) for i in range(size)]
        counts = sum(part.counts(cast(Any, word)) for part in parts)
        return values, [int(n) for n in cast(Any, counts)] + [0]


def is_sum(found: Any, expected: tuple[list[float], list[int]]) -> bool:
    return (found.values.tolist(), [*found.counts.tolist(), found.clipped]) == expected


def test_a_run_of_sums_opens_to_what_was_contributed() -> None:
    circle = Circle()
    half = circle.prepare(2)
    for _ in range(3):
        circle.work(half)
        assert is_sum(circle.open(half), circle.plain_sum())
        half = circle.following
    circle.work(half, wire.EvaluateOrder, scale=0, keys_next=False)
    assert is_sum(circle.open(half, last=True), circle.plain_sum("evaluate"))
    assert all(not held.members for vault in circle.vaults.values() for held in vault.runs.values())


def test_one_vault_serves_several_homes_side_by_side_as_in_a_simulation() -> None:
    """Twenty sites in one process, more than RUNS_MAX: none takes another's place."""
    names = tuple(f"s{number:02d}" for number in range(RUNS_MAX + 4))
    more = {name: ec.generate_private_key(ec.SECP256R1()) for name in names}
    study = made_study(
        participation={"sites": list(names), "quorum": 3},
        roster={name: keys.point_hex(key.public_key()) for name, key in more.items()},
    )
    vault, made = Vault(), {}
    sites = {n: cast(Site, SimpleNamespace(home=Path("/nowhere") / n, name=n, key=more[n])) for n in names}
    half = Aggregator(Place(study.digest, "run-1", 1, 2), {n: key.public_key() for n, key in more.items()}, 3)
    for name, site in sites.items():
        made[name] = vault.make_keys(site, study, made_order(wire.KeysOrder, 2, study=study.digest))
        half.add_keys(name, made[name])
    order = made_order(wire.UnmaskOrder, 1, members=half.keyed, keys=half.close_keys(), study=study.digest)
    for name, site in sites.items():
        half.add_shares(name, vault.unmask(site, study, order)[1])
    assert len(set(made.values())) == len(names) and half.shared_by(names)


def test_a_simulated_run_of_one_shared_vault_opens_like_any_other() -> None:
    circle = Circle(vault=Vault())
    half = circle.prepare(2)
    circle.work(half)
    assert is_sum(circle.open(half), circle.plain_sum())


# Attempts ------------------------------------------------------------------------------------------------------------


def test_a_new_attempt_forgets_every_key_of_the_old_one() -> None:
    circle = Circle()
    half = circle.prepare(2)
    circle.work(half)
    vault, site = circle.vaults["north"], circle.sites["north"]
    old = list(next(iter(vault.runs.values())).members.values())
    assert len(old) == 2  # of the open sum and of the next
    vault.make_keys(site, STUDY, circle.order(wire.KeysOrder, 2, attempt=2))
    for member in old:
        with pytest.raises(StepRefused):
            member.reveal(NAMES, bytes(4 * 64), 3)
        assert not member.covers
    (held,) = vault.runs.values()
    assert held.attempt == 2 and not set(held.members.values()) & set(old)


def test_a_sum_of_the_old_attempt_cannot_be_opened_after_the_new_one_began() -> None:
    circle = Circle()
    half = circle.prepare(2)
    circle.work(half)
    unmask = circle.unmask_order(half.close_vectors())
    circle.vaults["north"].make_keys(circle.sites["north"], STUDY, circle.order(wire.KeysOrder, 2, attempt=2))
    with pytest.raises(StepRefused, match="attempt 1 is over"):
        circle.unmask("north", unmask)


def test_an_order_of_an_older_attempt_is_refused_and_changes_nothing() -> None:
    circle = Circle()
    half = circle.prepare(2, attempt=3)
    vault, site = circle.vaults["north"], circle.sites["north"]
    old = [
        lambda: vault.make_keys(site, STUDY, circle.order(wire.KeysOrder, 3, attempt=2)),
        lambda: circle.unmask("north", circle.order(wire.UnmaskOrder, 2, attempt=1, survivors=NAMES)),
        lambda: circle.unmask("north", circle.order(wire.UnmaskOrder, 9, attempt=2)),
        lambda: vault.begin(site, STUDY, circle.order(wire.TrainOrder, 2, 2, participants=NAMES), PARAMETERS),
    ]
    before = {number: member for held in vault.runs.values() for number, member in held.members.items()}
    for late in old:
        with pytest.raises(StepRefused, match="is over"):
            late()
    assert {number: member for held in vault.runs.values() for number, member in held.members.items()} == before
    circle.work(half)
    assert is_sum(circle.open(half), circle.plain_sum())


def test_every_attempt_has_keys_of_its_own() -> None:
    vault, site = Vault(), made_site("north")
    made = {vault.make_keys(site, STUDY, made_order(wire.KeysOrder, 2, attempt)) for attempt in range(1, 6)}
    assert len({part for data in made for part in (data[32:64], data[64:96], data[96:128])}) == 15


# Keys ----------------------------------------------------------------------------------------------------------------


def test_keys_of_a_sum_are_made_once() -> None:
    """By an order for keys, by work on the sum before, or first one and then the other."""
    vault, site = Vault(), made_site("north")
    first = vault.make_keys(site, STUDY, made_order(wire.KeysOrder, 3))
    for again in (made_order(wire.KeysOrder, 3), made_order(wire.TrainOrder, 2), made_order(wire.EvaluateOrder, 2)):
        with pytest.raises(StepRefused, match="sum 3 were made before"):
            vault.make_keys(site, STUDY, again)
    (held,) = vault.runs.values()
    assert held.members[3].public == first
    assert vault.make_keys(site, STUDY, made_order(wire.TrainOrder, 3)) != first


def test_keys_are_signed_for_their_study_run_attempt_and_sum() -> None:
    vault, site = Vault(), made_site("north")
    made = vault.make_keys(site, STUDY, made_order(wire.TrainOrder, 3, attempt=2))
    right = {"study": STUDY.digest, "run": "run-1", "attempt": 2, "sum": 4}
    roster = {"north": KEYS["north"].public_key()}
    Aggregator(Place(**cast(Any, right)), roster, 3).add_keys("north", made)
    others: list[dict[str, Any]] = [{"study": "ab" * 32}, {"run": "run-2"}, {"attempt": 1}, {"sum": 3}, {"sum": 5}]
    for other in others:
        with pytest.raises(PeerUntrusted):
            Aggregator(Place(**(right | other)), roster, 3).add_keys("north", made)


def test_a_process_without_the_keys_says_so_at_every_step() -> None:
    """After a restart: the vault is empty, and what the sum needs is gone with the process that made it."""
    circle = Circle()
    half = circle.prepare(2)
    data = b"".join(half._bundles[name] for name in NAMES)
    participants, shares = half.close_shares()
    circle.vaults["north"] = Vault()
    site, vault = circle.sites["north"], circle.vaults["north"]
    work = circle.order(wire.TrainOrder, 2, participants=participants, shares=shares)
    lost = [
        lambda: vault.begin(site, STUDY, work, PARAMETERS),
        lambda: circle.unmask("north", circle.order(wire.UnmaskOrder, 2, survivors=NAMES)),
        lambda: circle.unmask("north", circle.order(wire.UnmaskOrder, 1, members=NAMES, keys=data)),
    ]
    for step in lost:
        with pytest.raises(MaskKeysLost):
            step()


def test_only_so_many_runs_are_held_and_the_one_used_longest_ago_goes_first() -> None:
    vault, site = Vault(), made_site("north")
    runs = [f"run-{number}" for number in range(RUNS_MAX)]
    for run in runs:
        vault.make_keys(site, STUDY, made_order(wire.KeysOrder, 2, run=run))
    vault.unmask(site, STUDY, made_order(wire.UnmaskOrder, 1, run=runs[0]))  # the oldest is used again
    vault.make_keys(site, STUDY, made_order(wire.KeysOrder, 2, run="run-new"))
    assert len(vault.runs) == RUNS_MAX
    with pytest.raises(StepRefused, match="made before"):
        vault.make_keys(site, STUDY, made_order(wire.KeysOrder, 2, run=runs[0]))
    lost = made_order(wire.TrainOrder, 2, run=runs[1], participants=NAMES)
    with pytest.raises(MaskKeysLost):
        vault.begin(site, STUDY, lost, PARAMETERS)


def test_another_run_or_study_has_keys_of_its_own_and_attempts_of_its_own() -> None:
    vault, site, other = Vault(), made_site("north"), made_study(title="another")
    orders = [
        (STUDY, made_order(wire.KeysOrder, 2, attempt=5)),
        (STUDY, made_order(wire.KeysOrder, 2, attempt=1, run="run-2")),
        (other, made_order(wire.KeysOrder, 2, attempt=1, study=other.digest)),
    ]
    assert len({vault.make_keys(site, study, order) for study, order in orders}) == 3
    for study, order in orders:
        with pytest.raises(StepRefused, match="made before"):
            vault.make_keys(site, study, order)


# Opening -------------------------------------------------------------------------------------------------------------


def test_a_refused_list_of_survivors_leaves_the_sum_to_be_opened_by_the_right_one() -> None:
    circle = Circle()
    half = circle.prepare(2)
    circle.work(half)
    wrong: list[tuple[tuple[str, ...], type[ProtectionError]]] = [
        (("north", "south"), TooFewSurvivors),
        (("abbey", "north", "south", "west"), StepRefused),
        (("north",), TooFewSurvivors),
    ]
    for survivors, error in wrong:
        with pytest.raises(error):
            circle.unmask("north", circle.unmask_order(survivors))
    mixed = b"".join(circle.vouches[name] for name in reversed(NAMES))
    for vouches in (b"", bytes(4 * 64), mixed, mixed[:-1]):
        with pytest.raises((MessageMalformed, PeerUntrusted)):
            circle.unmask("north", circle.unmask_order(NAMES, vouches=vouches))
    assert is_sum(circle.open(half), circle.plain_sum())


def test_a_sum_is_opened_once() -> None:
    circle = Circle()
    half = circle.prepare(2)
    circle.work(half)
    circle.open(half)
    for survivors in (NAMES, ("east", "north", "south")):
        with pytest.raises(MaskKeysLost):
            circle.unmask("north", circle.unmask_order(survivors))


def test_a_site_whose_vector_is_not_in_the_sum_opens_nothing_and_closes_it() -> None:
    """It was too late; it takes in the next sum's keys and can never help to open this one."""
    circle = Circle()
    half = circle.prepare(2)
    circle.work(half)
    rest = ("east", "north", "south")
    data = circle.following.close_keys(rest)
    order = circle.unmask_order(rest, members=NAMES, keys=data)
    revealed, sealed = circle.unmask("west", order)
    assert revealed == b"" and sealed
    with pytest.raises(MaskKeysLost):
        circle.unmask("west", circle.unmask_order(NAMES))


def test_bad_keys_of_the_next_sum_give_away_nothing_of_this_one() -> None:
    circle = Circle()
    half = circle.prepare(2)
    circle.work(half)
    data = bytearray(circle.following.close_keys(half.close_vectors()))
    data[-1] ^= 1
    order = circle.unmask_order(NAMES, members=NAMES, keys=bytes(data))
    with pytest.raises(PeerUntrusted):
        circle.unmask("north", order)


def test_work_cannot_be_masked_twice_with_the_same_keys() -> None:
    circle = Circle()
    half = circle.prepare(2)
    order = circle.work(half, keys_next=False)
    with pytest.raises(StepRefused):
        circle.vaults["north"].begin(circle.sites["north"], STUDY, order, PARAMETERS)
    assert is_sum(circle.open(half, last=True), circle.plain_sum())


def test_one_sending_leaves_once() -> None:
    circle = Circle()
    half = circle.prepare(2)
    participants, shares = half.close_shares()
    order = circle.order(wire.TrainOrder, 2, participants=participants, shares=shares)
    sending = circle.vaults["north"].begin(circle.sites["north"], STUDY, order, PARAMETERS)
    first, _ = sending.protect(contribution(1))
    with pytest.raises(StepRefused):
        sending.protect(contribution(2))
    assert len(first) == sending.encoding.size


# What the order may name ---------------------------------------------------------------------------------------------


def test_sites_that_only_evaluate_are_in_no_sum_of_updates() -> None:
    """Five made keys; a sum of updates that counts the fifth would open for fewer training sites than the quorum."""
    names = ("abbey", *NAMES)
    circle = Circle(names)
    half = circle.prepare(2)
    participants, shares = half.close_shares()
    site, vault = circle.sites["north"], circle.vaults["north"]
    order = circle.order(wire.TrainOrder, 2, participants=participants, shares=shares)
    with pytest.raises(StepRefused, match="does not name"):
        vault.begin(site, STUDY, order, PARAMETERS)
    order = circle.order(wire.EvaluateOrder, 2, participants=participants, shares=shares)
    vault.begin(site, STUDY, order, PARAMETERS).protect(contribution(0, "evaluate"))


@pytest.mark.parametrize("participants", [(), ("north",), ("east", "north"), ("east", "south", "west")])
def test_a_masked_sum_of_too_few_or_without_this_site_is_refused(participants: tuple[str, ...]) -> None:
    circle = Circle()
    half = circle.prepare(2)
    _, shares = half.close_shares()
    order = circle.order(wire.TrainOrder, 2, participants=participants, shares=shares)
    with pytest.raises(ProtectionError):
        circle.vaults["north"].begin(circle.sites["north"], STUDY, order, PARAMETERS)


def test_a_words_room_is_that_of_the_sites_that_may_be_in_the_sum() -> None:
    """All that are named, where nobody knows who will come; the participants, where the order says who they are."""
    for kind, named in ((wire.TrainOrder, 4), (wire.EvaluateOrder, 5)):
        for protected in ("plain", "sealed"):
            sending = Vault().begin(made_site("north"), made_study(protected), made_order(kind, 1), PARAMETERS)
            assert sending.encoding.sites == named
    circle = Circle(("east", "north", "south"))
    participants, shares = circle.prepare(2).close_shares()
    order = circle.order(wire.TrainOrder, 2, participants=participants, shares=shares)
    assert circle.vaults["north"].begin(circle.sites["north"], STUDY, order, PARAMETERS).encoding.sites == 3


# Without masks -------------------------------------------------------------------------------------------------------


def words(kind: str, sites: int) -> Encoding:
    values = PARAMETERS if kind == "train" else 0
    return Encoding(values, count_of(STUDY, cast(Any, kind)), 32, 10, sites)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_plain_contribution_is_its_words_for_all_the_sites_the_study_names(kind: str) -> None:
    order = made_order(wire.TrainOrder if kind == "train" else wire.EvaluateOrder, 1)
    sending = Vault().begin(made_site("north"), made_study("plain"), order, PARAMETERS)
    sent, vouch = sending.protect(contribution(1, kind))
    assert vouch == b""
    encoding = words(kind, 4 if kind == "train" else 5)
    total = encoding.zeros()
    total.add(encoding.vector_of(sent))
    found, expected = encoding.decode(total), contribution(1, kind)
    assert found.values.tolist() == [float(value) * expected.cases for value in expected.update]
    assert found.counts.tolist() == expected.counts(cast(Any, kind)).tolist()


def test_a_sealed_contribution_opens_with_the_aggregators_key_for_this_order_and_site_alone() -> None:
    order = made_order(wire.TrainOrder, 1)

    def sent(protected: str) -> bytes:
        packed, vouch = (
            Vault().begin(made_site("north"), made_study(protected), order, PARAMETERS).protect(contribution(1))
        )
        assert vouch == b""
        return packed

    sealed, plain = sent("sealed"), sent("plain")
    assert keys.unseal(AGGREGATOR, sealed, order.about("north")) == plain and plain not in sealed
    wrong: list[tuple[X25519PrivateKey, bytes]] = [
        (X25519PrivateKey.generate(), order.about("north")),
        (AGGREGATOR, order.about("south")),
        (AGGREGATOR, made_order(wire.TrainOrder, 2).about("north")),
        (AGGREGATOR, made_order(wire.TrainOrder, 1, attempt=2).about("north")),
    ]
    for key, about in wrong:
        with pytest.raises(SealBroken):
            keys.unseal(key, sealed, about)
    assert sent("sealed") != sealed


def test_a_sealed_study_without_an_aggregators_key_sends_nothing() -> None:
    order = made_order(wire.TrainOrder, 1)
    sending = Vault().begin(made_site("north"), made_study("sealed", aggregator=""), order, PARAMETERS)
    with pytest.raises(MessageMalformed):
        sending.protect(contribution(1))


@pytest.mark.parametrize("kind", ["plain", "sealed", "masked"])
def test_an_update_that_is_no_number_is_not_sent(kind: str) -> None:
    circle, good = Circle(), contribution(1)
    half = circle.prepare(2)
    participants, shares = half.close_shares()
    masked = {"participants": participants, "shares": shares} if kind == "masked" else {}
    order = circle.order(wire.TrainOrder, 2, **masked)
    study = STUDY if kind == "masked" else made_study(kind)
    sending = circle.vaults["north"].begin(circle.sites["north"], study, order, PARAMETERS)
    update = good.update.copy()
    update[3] = np.nan
    with pytest.raises(MessageMalformed):
        sending.protect(Contribution(good.ingested, good.sheet, good.cases, good.loss, update))


# Masks in the background ---------------------------------------------------------------------------------------------


def test_masks_are_added_up_while_the_site_works_and_waited_for_before_it_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    circle = Circle()
    half = circle.prepare(2)
    participants, shares = half.close_shares()
    order = circle.order(wire.TrainOrder, 2, participants=participants, shares=shares)
    begun, may_go, cover = threading.Event(), threading.Event(), protection.Member.cover

    def slowly(self: protection.Member, encoding: Encoding) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert may_go.wait(5)
        cover(self, encoding)

    monkeypatch.setattr(protection.Member, "cover", slowly)
    sending = circle.vaults["north"].begin(circle.sites["north"], STUDY, order, PARAMETERS)
    assert begun.wait(5)  # in another thread, while this one goes on
    threading.Timer(0.2, may_go.set).start()
    sent, _ = sending.protect(contribution(1))
    assert may_go.is_set()
    open_words = bytes(sending.encoding.bytes_of(sending.encoding.encode(*open_parts(contribution(1)))))
    assert sum(a == b for a, b in zip(sent, open_words, strict=True)) < len(sent) / 4


def open_parts(given: Contribution) -> tuple[Any, int, Any]:
    return given.update, given.cases, given.counts("train")


# What the node signs -------------------------------------------------------------------------------------------------


def asked_by_a_member(place: Place, name: str = "north") -> bytes:
    """What a true member of that sum asks its node to sign when it makes keys."""
    asked: list[tuple[bytes, bytes]] = []

    def sign(label: bytes, body: bytes) -> bytes:
        asked.append((label, body))
        return keys.sign(KEYS[name], label, body)

    Member(place, name, sign)
    ((label, body),) = asked
    assert label == keys.SUM_KEYS
    return body


PLACE = Place(STUDY.digest, "run-1", 1, 3)


def signing(order: wire.Order, study: Study = STUDY) -> Signing:
    return Signing(made_site("north"), study, order)


@pytest.mark.parametrize(
    "order",
    [
        made_order(wire.KeysOrder, 3),
        made_order(wire.TrainOrder, 2, keys_next=True),
        made_order(wire.EvaluateOrder, 2, keys_next=True),
    ],
    ids=lambda order: order.kind,
)
def test_the_node_signs_the_keys_that_its_order_needs_once(order: wire.Order) -> None:
    body, node = asked_by_a_member(PLACE), signing(order)
    keys.verify(KEYS["north"].public_key(), keys.SUM_KEYS, body, node.sign(keys.SUM_KEYS, body))
    for again in (body, asked_by_a_member(PLACE)):
        with pytest.raises(SignatureRefused):
            node.sign(keys.SUM_KEYS, again)


@pytest.mark.parametrize("kind", [wire.TrainOrder, wire.EvaluateOrder])
def test_the_node_signs_one_context_of_masked_work(kind: type[wire.Order]) -> None:
    node = signing(made_order(kind, 2))
    keys.verify(KEYS["north"].public_key(), keys.SUM_CONTEXT, bytes(32), node.sign(keys.SUM_CONTEXT, bytes(32)))
    with pytest.raises(SignatureRefused):
        node.sign(keys.SUM_CONTEXT, bytes(range(32)))


NOT_SIGNED: dict[str, tuple[wire.Order, bytes, bytes]] = {
    "keys of the sum itself, in an order to work": (
        made_order(wire.TrainOrder, 3, keys_next=True),
        keys.SUM_KEYS,
        asked_by_a_member(PLACE),
    ),
    "keys that the order does not ask for": (made_order(wire.TrainOrder, 2), keys.SUM_KEYS, asked_by_a_member(PLACE)),
    "keys while opening a sum": (made_order(wire.UnmaskOrder, 2), keys.SUM_KEYS, asked_by_a_member(PLACE)),
    "a context while opening a sum": (made_order(wire.UnmaskOrder, 2), keys.SUM_CONTEXT, bytes(32)),
    "a context while making keys": (made_order(wire.KeysOrder, 3), keys.SUM_CONTEXT, bytes(32)),
    "a longer context": (made_order(wire.TrainOrder, 2), keys.SUM_CONTEXT, bytes(33)),
    "a study's digest under another label": (made_order(wire.TrainOrder, 2), keys.STUDY_DECISION, bytes(32)),
    "an offer": (made_order(wire.KeysOrder, 3), keys.STUDY_OFFER, asked_by_a_member(PLACE)),
    "a call": (made_order(wire.KeysOrder, 3), keys.CALL, asked_by_a_member(PLACE)),
    "keys of another study": (
        made_order(wire.KeysOrder, 3),
        keys.SUM_KEYS,
        asked_by_a_member(Place("ab" * 32, "run-1", 1, 3)),
    ),
    "keys of another run": (
        made_order(wire.KeysOrder, 3),
        keys.SUM_KEYS,
        asked_by_a_member(Place(STUDY.digest, "run-2", 1, 3)),
    ),
    "keys of another attempt": (
        made_order(wire.KeysOrder, 3),
        keys.SUM_KEYS,
        asked_by_a_member(Place(STUDY.digest, "run-1", 2, 3)),
    ),
    "keys of a later sum": (
        made_order(wire.KeysOrder, 3),
        keys.SUM_KEYS,
        asked_by_a_member(Place(STUDY.digest, "run-1", 1, 33)),
    ),
    "keys of another site": (made_order(wire.KeysOrder, 3), keys.SUM_KEYS, asked_by_a_member(PLACE, "south")),
    "more than keys": (made_order(wire.KeysOrder, 3), keys.SUM_KEYS, asked_by_a_member(PLACE) + b"x"),
    "less than keys": (made_order(wire.KeysOrder, 3), keys.SUM_KEYS, asked_by_a_member(PLACE)[:-1]),
    "a name that is none": (
        made_order(wire.KeysOrder, 3),
        keys.SUM_KEYS,
        PLACE.canonical() + b"\n" + b"\xff" * 32 + bytes(96),
    ),
    "nothing": (made_order(wire.KeysOrder, 3), keys.SUM_KEYS, b""),
}


@pytest.mark.parametrize("case", NOT_SIGNED)
def test_the_node_signs_nothing_else_and_what_is_right_afterwards(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order, label, body = NOT_SIGNED[case]
    node, sign = signing(order), keys.sign
    monkeypatch.setattr(keys, "sign", lambda *_: pytest.fail("it was signed"))
    with pytest.raises(SignatureRefused):
        node.sign(label, body)
    monkeypatch.setattr(keys, "sign", sign)
    if isinstance(order, wire.KeysOrder):
        assert node.sign(keys.SUM_KEYS, asked_by_a_member(PLACE))


@pytest.mark.parametrize("protection", ["plain", "sealed"])
def test_the_node_signs_nothing_for_a_study_without_masks(protection: str) -> None:
    study = made_study(protection)
    place = Place(study.digest, "run-1", 1, 3)
    with pytest.raises(SignatureRefused):
        signing(made_order(wire.KeysOrder, 3, study=study.digest), study).sign(keys.SUM_KEYS, asked_by_a_member(place))
    with pytest.raises(SignatureRefused):
        signing(made_order(wire.TrainOrder, 3, study=study.digest), study).sign(keys.SUM_CONTEXT, bytes(32))


def test_a_vault_never_asks_for_the_key_where_somebody_else_signs() -> None:
    """As in the process that trains: the site it knows has no key that it could read."""
    asked: list[bytes] = []

    def node(label: bytes, body: bytes) -> bytes:
        asked.append(label)
        return keys.sign(KEYS["north"], label, body)

    keyless = cast(Site, SimpleNamespace(home=Path("/nowhere"), name="north"))
    made = Vault(signer=lambda site: node).make_keys(keyless, STUDY, made_order(wire.KeysOrder, 3))
    Aggregator(PLACE, {"north": KEYS["north"].public_key()}, 3).add_keys("north", made)
    assert asked == [keys.SUM_KEYS]
