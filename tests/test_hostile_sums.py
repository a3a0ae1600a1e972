"""A coordinator with the true signing key and no principles, against the sites' real programs, in secure aggregation.

It sends whatever signed orders it likes, and tries to get one site's update, two vectors under one mask, or both secrets of a
site. Each attempt ends in a refusal with a code, and nothing of use has left.
"""

import dataclasses
import functools
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from federation import Federation
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hospital import COORDINATOR, Hospital, first_model, study
from oracle import Trained

from fl_client.client_app import make_app
from models import contributions, learning
from models.study import Study, parse
from privacy import keys, wire
from privacy.errors import MessageMalformed, ProtectionError
from privacy.secagg import BUNDLE_BYTES, SIGNATURE_BYTES, Aggregator, Bundle, Circle, Member, Place
from privacy.sharing import Encoding

FOUR = ["north", "south", "east", "west"]
MASKED = {
    "[north, south], quorum__2": f"[{', '.join(FOUR)}], quorum: 3",
    "protection__plain": "protection: masked",
}
SUM = 2  # the first of an attempt, as the honest coordinator counts


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every order makes its site read the same site.yaml; to parse it once saves half of the time of this file.
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)  # processes end in these tests; machines do not


class Liar:
    """A coordinator with the true signing key and no principles. The sites' programs are real and keep running."""

    def __init__(self, federation: Federation, run: str, study: Study | None = None) -> None:
        self.federation, self.run, self.study = federation, run, study or federation.plan
        self.programs = {name: federation.answers(name) for name in federation.hospitals}
        self.model = first_model(self.study)
        self.roster = {site: keys.load_point(point) for site, point in self.study.roster.items()}
        self.vouched: dict[tuple[str, int], bytes] = {}  # (site, sum) -> its signature over what its masks are bound to

    def restart(self, site: str) -> None:
        self.programs[site] = self.federation.answers(site)

    def order(self, kind: type[wire.Order], number: int = SUM, **change: Any) -> Any:
        facts: dict[str, Any] = {"study": self.study.digest, "run": self.run, "round": 1, "attempt": 1, "sum": number}
        facts |= {"issued": int(time.time()), "signature": b""}
        if issubclass(kind, wire.WorkOrder):
            facts |= {"model": self.model, "scale": 10, "keys_next": False, "participants": (), "shares": b""}
        if kind is wire.EvaluateOrder:
            facts["split"] = "validation"
        if kind is wire.UnmaskOrder:
            facts |= {"survivors": (), "vouches": b"", "members": (), "keys": b""}
        return kind(**(facts | change)).signed(COORDINATOR)

    def ask(self, site: str, order: wire.Order) -> Any:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        message = Message(order.to_records(), dst_node_id=5, message_type=order.message_type)
        message.metadata.__dict__["_message_id"] = "m1"
        reply = self.programs[site](message)
        assert reply is not None
        report: Any = wire.decode(reply, *wire.REPORTS)
        if isinstance(report, wire.WorkReport):
            self.vouched[site, order.sum] = report.vouch
        return report

    def opening(self, survivors: tuple[str, ...], number: int = SUM, **change: Any) -> Any:
        """An order to open a sum, with what signatures of the survivors there are."""
        vouches = b"".join(self.vouched.get((site, number), bytes(SIGNATURE_BYTES)) for site in survivors)
        return self.order(wire.UnmaskOrder, number, **({"survivors": survivors, "vouches": vouches} | change))

    def refused(self, site: str, order: wire.Order) -> str:
        answer = self.ask(site, order)
        assert isinstance(answer, wire.Refusal), f"{site} carried out the order: {answer.kind}"
        return answer.code

    def make_keys(self, number: int = SUM, sites: list[str] = FOUR, attempt: int = 1) -> Aggregator:
        """Honest keys of `sites` for one sum, in the hands of the coordinator's honest half."""
        aggregator = Aggregator(Place(self.study.digest, self.run, attempt, number), self.roster, 3)
        for site in sites:
            aggregator.add_keys(site, self.ask(site, self.order(wire.KeysOrder, number, attempt=attempt)).keys)
        return aggregator

    def agree(self, number: int = SUM, sites: list[str] = FOUR, attempt: int = 1) -> tuple[Aggregator, dict[str, Any]]:
        """(honest half, fields of the order to work) after keys and shares of `sites` were exchanged as they should."""
        aggregator = self.make_keys(number, sites, attempt)
        more = {"members": aggregator.keyed, "keys": aggregator.close_keys(()), "attempt": attempt}
        for site in sites:
            order = self.order(wire.UnmaskOrder, number - 1, **more)
            aggregator.add_shares(site, self.ask(site, order).sealed)
        participants, shares = aggregator.close_shares()
        return aggregator, {"participants": participants, "shares": shares, "attempt": attempt}

    def encoding(self, sites: int = 4) -> Encoding:
        counts = contributions.count_of(self.study, "train")
        return Encoding(values=self.model.size, counts=counts, bits=32, scale=10, sites=sites)

    def words(self, vector: bytes) -> np.ndarray[Any, Any]:
        return np.array(self.encoding().vector_of(vector).values)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("hostile"), study(**MASKED))


_RUNS = iter(range(1, 1000))


@pytest.fixture
def liar(federation: Federation) -> Liar:
    """Each test is a run of its own at the same sites."""
    return Liar(federation, f"run-{next(_RUNS)}")


@pytest.fixture
def trained(federation: Federation) -> Iterator[Trained]:
    yield Trained(federation)


def looks_random(words: np.ndarray[Any, Any]) -> bool:
    """Whether half of the bits are ones, within six standard deviations, and all top bytes occur."""
    ones = np.unpackbits(words.view(np.uint8)).mean()
    return bool(abs(ones - 0.5) < 6 * 0.5 / np.sqrt(8 * words.nbytes)) and len(np.unique(words >> 24)) == 256


def signed_size(words: np.ndarray[Any, Any]) -> int:
    return int(np.abs(words.view(np.int32).astype(np.int64)).max())


def test_an_honest_sum_by_hand_opens_to_the_plain_sum(liar: Liar, trained: Trained) -> None:
    """What the lies below start from; oracle: each site trained by hand, rounded with numpy, summed as integers."""
    aggregator, work = liar.agree()
    order = liar.order(wire.TrainOrder, **work)
    aggregator.start(order.body(), liar.encoding())
    for site in FOUR:
        report = liar.ask(site, order)
        assert looks_random(liar.words(report.vector))
        aggregator.add_vector(site, liar.encoding().vector_of(report.vector), report.vouch)
    opening = liar.opening(aggregator.close_vectors())
    for site in FOUR:
        aggregator.add_revealed(site, liar.ask(site, opening).revealed)
    total = aggregator.finish()
    expected = np.zeros(liar.model.size, np.int64)
    for site in FOUR:
        change, cases = trained.site(site, liar.model, 1)
        expected += np.rint(change.astype(np.float32).astype(np.float64) * cases * 2.0**10).astype(np.int64)
    assert (total.values.view(np.int32) == expected).all()


# Keys that are not those of the study's sites


def test_the_coordinators_own_keys_in_place_of_a_peers(liar: Liar) -> None:
    """It knows a secret key of `west` then, if anybody believes it."""
    aggregator = liar.make_keys()
    own = Member(aggregator.place, "west", functools.partial(keys.sign, ec.generate_private_key(ec.SECP256R1())))
    bundles = aggregator.close_keys(())
    assert FOUR.index("west") == 3 and bundles[-BUNDLE_BYTES:][:4] == b"west"
    order = liar.order(
        wire.UnmaskOrder, SUM - 1, members=tuple(sorted(FOUR)), keys=bundles[:-BUNDLE_BYTES] + own.public
    )
    for site in ("north", "south", "east"):
        assert liar.refused(site, order) == "peer-untrusted"


def test_a_peers_keys_of_another_sum_run_or_attempt(federation: Federation, liar: Liar) -> None:
    """Signed by the true peer, for something else: what the coordinator knows of that is no key to this sum."""
    other = Liar(federation, f"{liar.run}-b")
    older = [liar.ask("west", liar.order(wire.KeysOrder, 1)).keys, other.ask("west", other.order(wire.KeysOrder)).keys]
    bundles = liar.make_keys().close_keys(())
    for number, keys_of_west in enumerate(older):
        data = bundles[:-BUNDLE_BYTES] + keys_of_west
        order = liar.order(wire.UnmaskOrder, SUM - 1, members=tuple(sorted(FOUR)), keys=data)
        assert liar.refused(FOUR[number], order) == "peer-untrusted"


def test_a_sites_own_keys_swapped_for_others_that_it_made(liar: Liar) -> None:
    """Two sites' bundles exchanged, and a site's own bundle with one key changed."""
    bundles = liar.make_keys().close_keys(())
    parts = [bundles[i : i + BUNDLE_BYTES] for i in range(0, len(bundles), BUNDLE_BYTES)]
    members = tuple(sorted(FOUR))
    swapped = liar.order(wire.UnmaskOrder, SUM - 1, members=members, keys=b"".join([parts[1], parts[0], *parts[2:]]))
    assert liar.refused("north", swapped) == "message-malformed"  # not sorted by site
    changed = dataclasses.replace(Bundle.from_bytes(parts[members.index("south")]), cipher=bytes(range(32))).to_bytes()
    parts[members.index("south")] = changed
    order = liar.order(wire.UnmaskOrder, SUM - 1, members=members, keys=b"".join(parts))
    assert liar.refused("south", order) == "peer-untrusted"
    assert liar.refused("east", order) == "peer-untrusted"


def test_a_sites_own_older_keys_of_the_same_sum(liar: Liar) -> None:
    """It made keys of the next sum, lost them in a restart, and made new ones: both are signed, only one is in its memory."""
    _, work = liar.agree()
    older = liar.ask("north", liar.order(wire.TrainOrder, keys_next=True, **work)).keys
    liar.restart("north")
    aggregator = liar.make_keys(SUM + 1)
    data, members = aggregator.close_keys(()), aggregator.keyed
    at = members.index("north") * BUNDLE_BYTES
    assert Bundle.from_bytes(older).site == Bundle.from_bytes(data[at : at + BUNDLE_BYTES]).site == "north"
    order = liar.order(wire.UnmaskOrder, members=members, keys=data[:at] + older + data[at + BUNDLE_BYTES :])
    assert liar.refused("north", order) == "peer-untrusted"


def test_a_study_whose_roster_names_another_key_as_this_sites(tmp_path: Path, federation: Federation) -> None:
    """Should anybody have approved such a study, this site is still no part of its sums."""
    shutil.copytree(federation.hospitals["north"].home, tmp_path / "north", symlinks=True)
    foreign = keys.point_hex(ec.generate_private_key(ec.SECP256R1()).public_key())
    plan = federation.plan.with_keys(dict(federation.plan.roster) | {"north": foreign}, federation.plan.aggregator)
    hospital = Hospital(tmp_path / "north", plan)
    hospital.approve(plan)
    place = Place(plan.digest, "run-r", 1, SUM)
    app = Liar(federation, "run-r", plan)
    app.programs["north"] = lone(hospital)
    own = app.ask("north", app.order(wire.KeysOrder)).keys
    others = {
        name: Member(place, name, functools.partial(keys.sign, federation.hospitals[name].site.key)).public
        for name in FOUR
        if name != "north"
    }
    data = b"".join(bundle for _, bundle in sorted((others | {"north": own}).items()))
    order = app.order(wire.UnmaskOrder, SUM - 1, members=tuple(sorted(FOUR)), keys=data)
    assert app.refused("north", order) == "peer-untrusted"


def lone(hospital: Hospital) -> Any:
    """The program of one hospital."""
    client = make_app()
    return lambda message: client(message, Context(1, 5, {"site": str(hospital.home)}, RecordDict(), {}))


def test_keys_of_a_sum_are_made_once(liar: Liar) -> None:
    liar.make_keys()
    assert liar.refused("north", liar.order(wire.KeysOrder)) == "order-replayed"
    _, work = liar.agree(SUM + 10)
    liar.ask("north", liar.order(wire.TrainOrder, SUM + 10, keys_next=True, **work))
    assert liar.refused("north", liar.order(wire.KeysOrder, SUM + 11)) == "step-refused"


# Lists


@pytest.mark.parametrize("members", [["north", "south"], ["north"], []])
def test_a_sum_of_too_few_sites_gets_no_shares(liar: Liar, members: list[str]) -> None:
    made = {site: liar.ask(site, liar.order(wire.KeysOrder)).keys for site in FOUR}
    data = b"".join(made[site] for site in members)
    order = liar.order(wire.UnmaskOrder, SUM - 1, members=("north",), keys=data)
    assert liar.refused("north", order) == "too-few-survivors"


@pytest.mark.parametrize(
    ("participants", "code"),
    [
        ((), "too-few-survivors"),
        (("north",), "too-few-survivors"),
        (("north", "south"), "too-few-survivors"),
        (("east", "south", "west"), "step-refused"),
        (("east", "mallory", "north", "south"), "step-refused"),
    ],
)
def test_orders_to_train_for_lists_that_would_lay_an_update_bare(
    liar: Liar, participants: tuple[str, ...], code: str
) -> None:
    """Nobody, this site alone, too few, all but this site, a stranger: nothing is sent, least of all unmasked."""
    _, work = liar.agree()
    order = liar.order(wire.TrainOrder, **(work | {"participants": participants}))
    assert liar.refused("north", order) == code


def test_a_masked_study_sends_nothing_without_keys_of_a_sum(liar: Liar) -> None:
    """An order to work that says nothing of masks, as those of plain studies do."""
    for kind in (wire.TrainOrder, wire.EvaluateOrder):
        assert liar.refused("north", liar.order(kind)) == "mask-keys-lost"
    liar.ask("north", liar.order(wire.KeysOrder, 40))
    for kind in (wire.TrainOrder, wire.EvaluateOrder):
        assert liar.refused("north", liar.order(kind, 40)) == "step-refused"  # keys, but no peers


def test_a_sum_below_the_studys_quorum_is_never_worked_for(tmp_path: Path) -> None:
    """Three of four is the threshold; this study's quorum is all four."""
    federation = Federation(tmp_path, study(**(MASKED | {"quorum: 3": "quorum: 4"})))
    liar = Liar(federation, "run-q")
    _, work = liar.agree(sites=["north", "south", "east"])
    assert liar.refused("north", liar.order(wire.TrainOrder, **work)) == "too-few-survivors"


@pytest.mark.parametrize("wrong", [("south", "north"), ("north", "north"), ("North",), ("n\u00f6rth",), ("../north",)])
def test_lists_that_are_no_sorted_lists_of_sites_are_no_orders(liar: Liar, wrong: tuple[str, ...]) -> None:
    """Neither made nor read: what travels is checked by both sides."""
    for field in ("participants", "survivors", "members"):
        kind = wire.TrainOrder if field == "participants" else wire.UnmaskOrder
        with pytest.raises(MessageMalformed):
            liar.order(kind, SUM, **{field: wrong})
        honest = liar.order(kind, SUM, **{field: ("north",)})
        records = honest.to_records()
        records["isocenter"][field] = " ".join(wrong)
        message = Message(records, dst_node_id=5, message_type=honest.message_type)
        with pytest.raises(MessageMalformed):
            liar.programs["north"](message)


# Opening


@pytest.fixture
def sent(liar: Liar) -> tuple[Liar, Aggregator, dict[str, bytes]]:
    """Everybody sent a masked vector."""
    aggregator, work = liar.agree()
    order = liar.order(wire.TrainOrder, **work)
    aggregator.start(order.body(), liar.encoding())
    return liar, aggregator, {site: liar.ask(site, order).vector for site in FOUR}


@pytest.mark.parametrize(
    ("survivors", "code"),
    [
        (("north",), "too-few-survivors"),
        (("north", "south"), "too-few-survivors"),
        (("east", "mallory", "north", "south"), "step-refused"),
    ],
)
def test_a_sum_is_not_opened_for_too_few_or_for_strangers(
    sent: tuple[Liar, Aggregator, dict[str, bytes]], survivors: tuple[str, ...], code: str
) -> None:
    liar, _, _ = sent
    assert liar.refused("north", liar.opening(survivors)) == code


def test_two_lists_of_survivors_and_so_both_secrets_of_a_site(sent: tuple[Liar, Aggregator, dict[str, bytes]]) -> None:
    """First everybody survived, then west did not: the second list would give s of west, whose b is known by then."""
    liar, _, _ = sent
    everybody, without_west = tuple(sorted(FOUR)), ("east", "north", "south")
    for site in FOUR:
        first = liar.ask(site, liar.opening(everybody))
        assert len(first.revealed) > 0
        # As another order with the same number, and as one with the next number.
        assert liar.refused(site, liar.opening(without_west)) == "order-replayed"
        if site != "west":
            assert liar.refused(site, liar.opening(without_west, SUM + 1)) == "mask-keys-lost"


def test_after_a_restart_no_share_of_the_sum_is_left_to_give(sent: tuple[Liar, Aggregator, dict[str, bytes]]) -> None:
    liar, _, _ = sent
    for site in FOUR:
        liar.restart(site)
        assert liar.refused(site, liar.opening(tuple(sorted(FOUR)))) == "mask-keys-lost"


def test_claiming_that_all_dropped_out_opens_nothing(sent: tuple[Liar, Aggregator, dict[str, bytes]]) -> None:
    """With everybody's s all pair masks could be taken away. Nobody gives a share for a sum that it is not in."""
    liar, _, _ = sent
    for site in FOUR:
        others = tuple(sorted(set(FOUR) - {site}))
        report = liar.ask(site, liar.opening(() if site == "north" else others))
        assert isinstance(report, wire.UnmaskReport) and report.revealed == b"" and report.sealed == b""
        # The order closed the sum, so there is no second chance with another list.
        again = liar.opening(tuple(sorted(FOUR)), SUM + 1)
        assert liar.refused(site, again) == "mask-keys-lost"


PLANTED: dict[str, Any] = {
    "another model": lambda liar: {"model": liar.model * np.float32(0.5)},
    "another scale": lambda liar: {"scale": 11},
    "another round": lambda liar: {"round": 2},
    "another second": lambda liar: {"issued": int(time.time()) - 100},
    "other shares": lambda liar: {"shares": b""},
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_sum_of_sites_that_were_shown_different_orders_is_not_opened_and_would_be_noise(
    liar: Liar, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The coordinator plants a model of its own at west, in the hope to tell its part from the others'."""
    aggregator, work = liar.agree()
    order = liar.order(wire.TrainOrder, **work)
    aggregator.start(order.body(), liar.encoding())
    planted = liar.order(wire.TrainOrder, **(work | PLANTED[what](liar)))
    if what == "other shares":
        assert liar.refused("west", planted) == "message-malformed"
        return
    vectors = {site: liar.ask(site, planted if site == "west" else order).vector for site in FOUR}
    with pytest.raises(ProtectionError):
        aggregator.add_vector("west", liar.encoding().vector_of(vectors["west"]), liar.vouched["west", SUM])
    opening = liar.opening(tuple(sorted(FOUR)))
    assert [liar.refused(site, opening) for site in ("north", "west")] == ["peer-untrusted"] * 2
    # Were the signatures not looked at, by neither side, the masks would not cancel.
    monkeypatch.setattr(Circle, "check_vouch", lambda *_: None)
    for site in FOUR:
        aggregator.add_vector(site, liar.encoding().vector_of(vectors[site]), liar.vouched[site, SUM])
    opening = dataclasses.replace(opening, survivors=aggregator.close_vectors()).signed(COORDINATOR)
    for site in ("east", "south"):
        aggregator.add_revealed(site, liar.ask(site, opening).revealed)
    for site in ("north", "west"):  # their one answer to this sum was the refusal; their memory of it is wiped here
        forget(liar, site)
        aggregator.add_revealed(site, liar.ask(site, opening).revealed)
    total = aggregator.finish()
    assert looks_random(np.array(total.values))
    with pytest.raises(MessageMalformed):
        liar.encoding().decode(total)


def forget(liar: Liar, site: str) -> None:
    """What an attacker with the site's disk could do: make it forget which orders to unmask it has answered."""
    with sqlite3.connect(liar.federation.hospitals[site].home / "orders.sqlite") as memory:
        (table,) = memory.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchone()
        deleted = memory.execute(f"DELETE FROM {table} WHERE run = ? AND kind = 'unmask' AND sum = ?", (liar.run, SUM))  # noqa: S608
        assert deleted.rowcount == 1


def test_signatures_of_the_survivors_are_asked_for_in_full(sent: tuple[Liar, Aggregator, dict[str, bytes]]) -> None:
    """None, one missing, those of another list, exchanged."""
    liar, _, _ = sent
    everybody = tuple(sorted(FOUR))
    good = [liar.vouched[site, SUM] for site in everybody]
    wrong = (b"", b"".join(good[:-1]), b"".join([good[1], good[0], *good[2:]]), bytes(4 * SIGNATURE_BYTES))
    for site, vouches in zip(FOUR, wrong, strict=True):
        code = liar.refused(site, liar.opening(everybody, vouches=vouches))
        assert code in ("peer-untrusted", "message-malformed")


def test_lists_that_differ_from_site_to_site_end_the_next_sum(sent: tuple[Liar, Aggregator, dict[str, bytes]]) -> None:
    """Half of the sites are told that west dropped out. They cannot read the others' shares for the next sum."""
    liar, _, _ = sent
    everybody, without_west = tuple(sorted(FOUR)), ("east", "north", "south")
    following = liar.make_keys(SUM + 1)
    more: dict[str, Any] = {"members": following.keyed, "keys": following.close_keys(everybody)}
    for site in FOUR:
        told = without_west if site in ("north", "south") else everybody
        following.add_shares(site, liar.ask(site, liar.opening(told, **more)).sealed)
    participants, shares = following.close_shares()
    order = liar.order(wire.TrainOrder, SUM + 1, participants=participants, shares=shares)
    assert [liar.refused(site, order) for site in FOUR] == ["share-invalid"] * 4


# One mask, two vectors


def test_one_sum_is_trained_for_once_whatever_the_model(sent: tuple[Liar, Aggregator, dict[str, bytes]]) -> None:
    """Two vectors under one mask would show their difference."""
    liar, _, _ = sent
    work: dict[str, Any] = {"participants": tuple(sorted(FOUR)), "shares": b""}
    other = liar.order(wire.TrainOrder, **(work | {"model": liar.model * np.float32(2)}))
    assert liar.refused("north", other) == "order-replayed"
    assert liar.refused("north", liar.order(wire.TrainOrder, **(work | {"round": 2}))) == "order-replayed"
    # The same sum once more, for work of another kind.
    assert liar.refused("north", liar.order(wire.EvaluateOrder, **work)) == "step-refused"


def test_every_kind_of_order_is_answered_once(liar: Liar) -> None:
    made = liar.order(wire.KeysOrder)
    bundles = liar.make_keys()
    more = {"members": bundles.keyed, "keys": bundles.close_keys(())}
    sharing = liar.order(wire.UnmaskOrder, SUM - 1, **more)
    for site in FOUR:
        bundles.add_shares(site, liar.ask(site, sharing).sealed)
    participants, shares = bundles.close_shares()
    training = liar.order(wire.TrainOrder, participants=participants, shares=shares)
    for site in FOUR:
        liar.ask(site, training)
    opening = liar.opening(participants)
    liar.ask("north", opening)
    for order in (made, sharing, training, opening):
        assert liar.refused("north", order) == "order-replayed"
        # Signed again, at another second, in another round: the sum is the same.
        again = dataclasses.replace(order, issued=order.issued + 1, round=2).signed(COORDINATOR)
        assert liar.refused("north", again) == "order-replayed"


@pytest.mark.parametrize("where", ["before the mask", "between mask and send", "between send and unmask"])
def test_a_site_that_is_killed_never_masks_a_second_vector_for_the_same_sum(
    liar: Liar, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The process ends; the new one knows from the disk what was answered, and has no key to mask anything with."""
    _, work = liar.agree()
    order, masked = liar.order(wire.TrainOrder, **work), []
    mask = Member.mask

    class Killed(BaseException):
        pass

    def die(self: Member, vector: Any, encoding: Any) -> bytes:
        if where == "before the mask":
            raise Killed
        vouch = mask(self, vector, encoding)
        masked.append(bytes(encoding.bytes_of(vector)))
        if where == "between mask and send":
            raise Killed
        return vouch

    with monkeypatch.context() as patch:
        patch.setattr(Member, "mask", die)
        if where == "between send and unmask":
            assert liar.ask("north", order).vector == masked[0]
        else:
            with pytest.raises(Killed):
                liar.ask("north", order)
    liar.restart("north")
    assert liar.refused("north", order) == "order-replayed"
    evaluation = liar.order(wire.EvaluateOrder, **work)
    assert liar.refused("north", evaluation) == "mask-keys-lost"
    assert liar.refused("north", liar.opening(tuple(sorted(FOUR)))) == "mask-keys-lost"
    # The next attempt has new keys: its vector has nothing in common with the first one.
    assert liar.refused("north", dataclasses.replace(order, attempt=2).signed(COORDINATOR)) == "mask-keys-lost"
    _, more = liar.agree(SUM + 2, attempt=2)
    vector = liar.ask("north", liar.order(wire.TrainOrder, SUM + 2, **more)).vector
    assert looks_random(liar.words(vector))
    for before in masked:
        assert looks_random(liar.words(vector) - liar.words(before))


def test_keys_of_one_study_never_cover_work_for_another(tmp_path: Path) -> None:
    """A site approved two studies. The coordinator makes keys under the one, with sites that it owns in the roster, and asks
    for an update of the other under the same run and sum."""
    federation = Federation(tmp_path, study(**MASKED))
    plan = federation.plan
    owned = {name: ec.generate_private_key(ec.SECP256R1()) for name in FOUR if name != "north"}
    puppets = plan.model_copy(update={"title": "Puppets"}).with_keys(
        {"north": plan.roster["north"]} | {name: keys.point_hex(key.public_key()) for name, key in owned.items()},
        plan.aggregator,
    )
    federation.hospitals["north"].approve(puppets)
    liar, trap = Liar(federation, "run-t"), Liar(federation, "run-t", puppets)
    trap.programs = liar.programs
    aggregator = Aggregator(Place(puppets.digest, "run-t", 1, SUM), trap.roster, 3)
    members = {name: Member(aggregator.place, name, functools.partial(keys.sign, key)) for name, key in owned.items()}
    aggregator.add_keys("north", trap.ask("north", trap.order(wire.KeysOrder)).keys)
    for name, member in members.items():
        aggregator.add_keys(name, member.public)
    data = aggregator.close_keys(())
    order = trap.order(wire.UnmaskOrder, SUM - 1, members=aggregator.keyed, keys=data)
    aggregator.add_shares("north", trap.ask("north", order).sealed)
    for name, member in members.items():
        aggregator.add_shares(name, member.share(data, trap.roster))
    participants, shares = aggregator.close_shares()
    # Under its own study the site would work, as it agreed to; under the other there are no such keys.
    foreign = liar.order(wire.TrainOrder, participants=participants, shares=shares)
    assert liar.refused("north", foreign) == "mask-keys-lost"


def test_orders_of_another_run_find_no_keys_and_spoil_none(federation: Federation, liar: Liar) -> None:
    _, work = liar.agree()
    other = Liar(federation, f"{liar.run}-other")
    other.programs = liar.programs
    assert other.refused("north", other.order(wire.TrainOrder, **work)) == "mask-keys-lost"
    assert isinstance(liar.ask("north", liar.order(wire.TrainOrder, **work)), wire.TrainReport)


def test_an_attempt_that_is_over_does_not_come_back(liar: Liar) -> None:
    """The keys of the first attempt are gone with the first order of the second one."""
    _, first = liar.agree()
    liar.ask("north", liar.order(wire.KeysOrder, 50, attempt=2))
    assert liar.refused("north", liar.order(wire.TrainOrder, **first)) == "step-refused"
    assert liar.refused("north", liar.opening(first["participants"])) == "step-refused"
    assert liar.refused("north", liar.order(wire.KeysOrder, 60)) == "step-refused"


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every update that a site learns."""
    learn, seen = learning.learn, []

    def watch(*args: Any, **more: Any) -> Any:
        update = learn(*args, **more)
        seen.append(update.delta.tobytes())
        return update

    monkeypatch.setattr("models.learning.learn", watch)
    return seen


def train_north(liar: Liar, number: int, attempt: int) -> None:
    _, work = liar.agree(number, attempt=attempt)
    assert isinstance(liar.ask("north", liar.order(wire.TrainOrder, number, **work)), wire.TrainReport)


def test_training_a_round_again_is_never_the_same_update(liar: Liar, updates: list[bytes]) -> None:
    """Two sums over different sites whose difference would be one site's update, if that were the same in both."""
    for attempt, number in ((1, 10), (1, 20), (2, 10)):
        train_north(liar, number, attempt)
    assert len(updates) == len(set(updates)) == 3


def test_training_a_round_again_under_an_earlier_attempt_is_not_the_same_update(
    liar: Liar, updates: list[bytes]
) -> None:
    """The site's programs start anew in between, so nothing in memory says that the attempt is over."""
    train_north(liar, 10, attempt=2)
    for site in FOUR:
        liar.restart(site)
    train_north(liar, 10, attempt=1)
    assert len(updates) == len(set(updates)) == 2


def test_the_same_round_in_another_run_of_the_study_is_not_the_same_update(
    federation: Federation, liar: Liar, updates: list[bytes]
) -> None:
    """A coordinator need not lie for this: it launches a study twice, the second time without one of the sites."""
    train_north(liar, 10, attempt=1)
    train_north(Liar(federation, f"{liar.run}-again"), 10, attempt=1)
    assert len(updates) == len(set(updates)) == 2


def test_sites_that_only_evaluate_do_not_fill_the_quorum_of_training(tmp_path: Path) -> None:
    """Three sites train, four more would make any list long enough; they would add nothing to hide an update in."""
    plan = study(
        **{"[north, south], quorum__2": "[north, south, east], evaluate_only: [west, alpha], quorum: 3"},
        protection__plain="protection: masked",
    )
    federation = Federation(tmp_path, plan)
    liar, everybody = Liar(federation, "run-e"), ["north", "south", "east", "west", "alpha"]
    _, work = liar.agree(sites=everybody)
    assert liar.refused("north", liar.order(wire.TrainOrder, **work)) == "step-refused"
    assert liar.refused("west", liar.order(wire.TrainOrder, **work)) == "study-not-approved"
    _, work = liar.agree(SUM + 5, sites=everybody)
    assert isinstance(liar.ask("north", liar.order(wire.EvaluateOrder, SUM + 5, **work)), wire.EvaluateReport)


@pytest.mark.parametrize("scale", [-200, 200])
def test_extreme_scales_cost_precision_and_never_secrecy(liar: Liar, scale: int) -> None:
    """At one end every word is 0, at the other it is clipped to its limit: masked they look like any other."""
    _, work = liar.agree()
    report = liar.ask("north", liar.order(wire.TrainOrder, **(work | {"scale": scale})))
    assert looks_random(liar.words(report.vector))


def test_a_scale_beyond_the_limits_is_no_order(liar: Liar) -> None:
    with pytest.raises(MessageMalformed):
        liar.order(wire.TrainOrder, scale=201)
