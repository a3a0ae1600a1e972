"""Secure aggregation against liars: a coordinator that lies to sites, sites that lie to the coordinator, and both together."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import secagg_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_cast import ORDER, PLACE, SITES, Sum, check_uniform, corrupt, enrolled, refused, roster, signed_by

from privacy.errors import MessageMalformed, PeerUntrusted, ShareInvalid, StepRefused, TooFewSurvivors
from privacy.secagg import NO_SHARE, Aggregator, Bundle, Member, Place
from privacy.sharing import SHARE_BYTES, Encoding, split, threshold

# A coordinator that lies to a site -----------------------------------------------------------------------------------


def bundle_of(site: str, place: Place = PLACE, signer: str = "", **parts: bytes) -> bytes:
    """Keys of `site`, some of their parts replaced, signed by the key of `signer`."""
    made = vars(Bundle.from_bytes(Member(place, site, signed_by(site)).public)) | parts
    unsigned = Bundle(**made)
    message = oracle.signed_bytes(place.canonical(), unsigned.to_bytes()[:-64])
    return unsigned.to_bytes()[:-64] + oracle.sign(enrolled(signer or site), message)


def replaced(run: Sum, number: int, bundle: bytes) -> bytes:
    """The members' keys with other ones for a site."""
    return run.data[: number * 192] + bundle + run.data[(number + 1) * 192 :]


LIES_ABOUT_KEYS: dict[str, tuple[type[Exception], Callable[[Sum], bytes]]] = {
    "signed by another site": (PeerUntrusted, lambda run: replaced(run, 1, bundle_of(SITES[1], signer=SITES[2]))),
    "of another sum": (
        PeerUntrusted,
        lambda run: replaced(run, 1, bundle_of(SITES[1], Place(PLACE.study, "run-1", 1, 2))),
    ),
    "of another attempt": (
        PeerUntrusted,
        lambda run: replaced(run, 1, bundle_of(SITES[1], Place(PLACE.study, "run-1", 2, 1))),
    ),
    "of another run": (
        PeerUntrusted,
        lambda run: replaced(run, 1, bundle_of(SITES[1], Place(PLACE.study, "run-2", 1, 1))),
    ),
    "of another study": (
        PeerUntrusted,
        lambda run: replaced(run, 1, bundle_of(SITES[1], Place("0" * 64, "run-1", 1, 1))),
    ),
    "of another site": (MessageMalformed, lambda run: replaced(run, 1, run.data[2 * 192 : 3 * 192])),
    "with another mask key": (
        PeerUntrusted,
        lambda run: replaced(run, 1, run.data[192:256] + bytes(range(32)) + run.data[288:384]),
    ),
    "with another commitment": (
        PeerUntrusted,
        lambda run: replaced(run, 1, run.data[192:288] + bytes(32) + run.data[320:384]),
    ),
    "with no signature": (PeerUntrusted, lambda run: replaced(run, 1, run.data[192:320] + bytes(64))),
    "own ones replaced": (PeerUntrusted, lambda run: replaced(run, 0, bundle_of(SITES[0]))),
    "own ones signed anew": (PeerUntrusted, lambda run: replaced(run, 0, oracle.malleated(run.data[:192]))),
    "own ones missing": (PeerUntrusted, lambda run: run.data[192:]),
    "a stranger's": (PeerUntrusted, lambda run: run.data + bundle_of(SITES[40])),
    "of low order for masks": (PeerUntrusted, lambda run: replaced(run, 1, bundle_of(SITES[1], mask=bytes(32)))),
    "of low order for shares": (PeerUntrusted, lambda run: replaced(run, 1, bundle_of(SITES[1], cipher=bytes(32)))),
    "not sorted": (
        MessageMalformed,
        lambda run: run.data[:192] + run.data[384:576] + run.data[192:384] + run.data[576:],
    ),
    "twice": (MessageMalformed, lambda run: run.data[:192] + run.data),
    "cut off": (MessageMalformed, lambda run: run.data[:-1]),
    "one byte more": (MessageMalformed, lambda run: run.data + b"\0"),
    "of two sites": (TooFewSurvivors, lambda run: run.data[:384]),
    "of one site": (TooFewSurvivors, lambda run: run.data[:192]),
    "none": (TooFewSurvivors, lambda run: b""),
    "name in capitals": (MessageMalformed, lambda run: replaced(run, 1, b"S" + run.data[193:384])),
    "name not ASCII": (MessageMalformed, lambda run: replaced(run, 1, b"s\xff" + run.data[194:384])),
    "name with a gap": (MessageMalformed, lambda run: replaced(run, 1, b"s\0" + run.data[194:384])),
}


@pytest.mark.parametrize("lie", LIES_ABOUT_KEYS)
def test_a_site_refuses_keys_that_are_not_what_the_roster_signed(lie: str) -> None:
    error, lying = LIES_ABOUT_KEYS[lie]
    run = Sum(5).keys()
    with refused(error, run[0]):
        run[0].share(lying(run), roster(run.names))
    run.complete()


def test_a_site_refuses_another_roster_and_lists_that_are_none() -> None:
    run = Sum(5).keys()
    with refused(PeerUntrusted, run[0]):
        run[0].share(run.data, roster(run.names) | {SITES[3]: enrolled(SITES[9]).public_key()})
    with refused(PeerUntrusted, run[0]):
        run[0].share(run.data, roster(run.names[:-1]))
    for previous in (("s01", "s00"), ("s00", "s00"), ("s00 s01",), ("stranger",)):
        with refused(MessageMalformed, run[0]):
            run[0].share(run.data, roster(run.names), previous)
    run.complete()


LISTS: dict[str, tuple[type[Exception], tuple[int, ...]]] = {
    "nobody": (TooFewSurvivors, ()),
    "without the site": (StepRefused, (1, 2, 3, 4, 5, 6)),
    "below the threshold": (TooFewSurvivors, (0, 1, 2, 3)),
    "below the quorum": (TooFewSurvivors, (0, 1, 2, 3, 4)),
    "not sorted": (StepRefused, (1, 0, 2, 3, 4, 5, 6)),
    "one twice": (StepRefused, (0, 1, 1, 2, 3, 4, 5, 6)),
    "with a stranger": (StepRefused, (0, 1, 2, 3, 4, 5, 6, 40)),
}


@pytest.mark.parametrize("lie", LISTS)
def test_a_site_refuses_lists_of_participants_and_survivors(lie: str) -> None:
    error, numbers = LISTS[lie]
    told = tuple(SITES[i] for i in numbers)
    run = Sum(7, quorum=6).keys().share()
    with refused(error, run[0]):
        run[0].open(told, run.sealed, ORDER, 6)
    run.open().mask()
    with refused(error, run[0]):
        run.ask(SITES[0], told)
    run.complete()


def test_a_survivor_must_have_taken_part() -> None:
    run = Sum(7).keys().share({SITES[6]}).open().mask({SITES[5]})
    with refused(StepRefused, run[0]):
        run.ask(SITES[0], (*run.survivors, SITES[6]))  # it made keys, but no masks
    run.complete()


def _rows(run: Sum) -> list[bytes]:
    size = len(run.sealed) // len(run.participants)
    return [run.sealed[i : i + size] for i in range(0, len(run.sealed), size)]


LIES_ABOUT_SHARES: dict[str, tuple[type[Exception], Callable[[Sum], bytes]]] = {
    "cut off": (MessageMalformed, lambda run: run.sealed[:-1]),
    "longer": (MessageMalformed, lambda run: run.sealed + bytes(82)),
    "none": (MessageMalformed, lambda run: b""),
    "swapped between senders": (ShareInvalid, lambda run: b"".join([*_rows(run)[1:], _rows(run)[0]])),
    "swapped between receivers": (ShareInvalid, lambda run: b"".join(row[82:] + row[:82] for row in _rows(run))),
    "of another sum": (ShareInvalid, lambda run: Sum(5).keys().share().sealed),
    "all garbage": (ShareInvalid, lambda run: bytes(len(run.sealed))),
    "two senders' garbage": (ShareInvalid, lambda run: b"".join([*_rows(run)[:3], bytes(2 * 4 * 82)])),
}


@pytest.mark.parametrize("lie", LIES_ABOUT_SHARES)
def test_a_site_refuses_shares_that_it_cannot_read(lie: str) -> None:
    error, lying = LIES_ABOUT_SHARES[lie]
    run = Sum(5).keys().share()
    with refused(error, run[0]):
        run[0].open(run.participants, lying(run), ORDER, 3)
    run.complete()


def test_garbage_from_one_sender_stops_neither_the_site_nor_the_sum() -> None:
    run = Sum(5).keys().share()
    run.aggregator.start(ORDER, run.encoding)
    rows = _rows(run)
    for site in run.participants:
        rows_shown = [*rows[:4], bytes(len(rows[4]))] if site == SITES[0] else rows
        run.members[site].open(run.participants, b"".join(rows_shown), ORDER, 3)
    run.mask().reveal()
    at = list(run.participants).index(SITES[4]) * SHARE_BYTES
    assert run.revealed[SITES[0]][at : at + SHARE_BYTES] == NO_SHARE
    run.complete()
    assert run.aggregator.wrong == {}


STEPS: dict[str, Callable[[Sum], object]] = {
    "share": lambda run: run[0].share(run.data, roster(run.names)),
    "open": lambda run: run[0].open(run.names, getattr(run, "sealed", b""), ORDER, 3),
    "cover": lambda run: run[0].cover(run.encoding),
    "mask": lambda run: run[0].mask(run.words(), run.encoding),
    "reveal": lambda run: run.ask(SITES[0], run.names),
}


@pytest.mark.parametrize("due", ["share", "open", "mask", "reveal", "closed"])
def test_a_step_out_of_turn_or_repeated_is_refused_and_changes_nothing(due: str) -> None:
    run = Sum(4).keys()
    order = ["share", "open", "mask", "reveal", "closed"]
    for step in order[: order.index(due)]:
        getattr(run, step)()
    for name, step in STEPS.items():
        if name not in (due, "cover" if due == "mask" else due):
            with refused(StepRefused, run[0]):
                step(run)
    assert run[0].covers == (due == "reveal")
    run.complete()


def test_nothing_is_opened_for_a_second_list() -> None:
    run = Sum(7).keys().share().open().mask()
    first = run.ask(SITES[0])
    for told in (run.names, run.names[:-1], run.names[:5]):
        with refused(StepRefused, run[0]):
            run.ask(SITES[0], told)
    run.answer(SITES[0], first)
    for site in run.names[1:]:
        run.answer(site, run.ask(site))
    run.complete()


def test_a_vector_of_another_encoding_is_refused_and_spends_no_mask() -> None:
    run = Sum(4).keys().share().open()
    for cover in (False, True):
        if cover:
            run[0].cover(run.encoding)
            run[0].cover(run.encoding)
        for other in (Encoding(8, 2, 32, 10, 4), Encoding(9, 2, 64, 10, 4), Encoding(9, 3, 32, 10, 4)):
            with refused(MessageMalformed, run[0]):
                run[0].mask(run.words(), other) if not cover else run[0].mask(other.zeros(), other)
    run.complete()


def test_a_closed_member_has_no_secrets_and_no_steps() -> None:
    run = Sum(4).keys().share().open().mask()
    run[0].close()
    assert run[0]._secrets is None
    for step in STEPS.values():
        with pytest.raises(StepRefused):
            step(run)


def test_no_message_can_bring_a_threshold_or_weaken_the_quorum() -> None:
    doors = {
        name: list(inspect.signature(getattr(Member, name)).parameters)[1:] for name in ("share", "open", "reveal")
    }
    assert doors == {
        "share": ["data", "roster", "previous"],
        "open": ["participants", "sealed", "order", "quorum"],
        "reveal": ["survivors", "vouches", "quorum"],
    }
    assert list(vars(Bundle.from_bytes(Sum(3)[0].public))) == ["site", "cipher", "mask", "commitment", "signature"]
    circle = Sum(9).keys().circle
    for quorum in (-5, 0, 1, 6, 7):
        assert circle.least(quorum) == 7
    assert all(3 * threshold(n) > 2 * n and 3 * (threshold(n) - 1) <= 2 * n for n in range(1, 200))


# A coordinator that tells different sites different things -----------------------------------------------------------


@pytest.mark.parametrize("colluders", [0, 1, 2, 3])
def test_a_victim_called_survivor_by_some_and_lost_by_others_keeps_one_of_its_secrets(colluders: int) -> None:
    """Seven sites, five shares needed. The break of Flower's SecAgg+; here it takes more than a third of colluders."""
    both = []
    for told_lost in range(7 - colluders):
        run = Sum(7).keys().share().open().mask()
        wire, victim, honest = run.wire(), SITES[0], run.names[: 7 - colluders]
        kept = {site: run.members[site]._secrets for site in run.names[7 - colluders :]}
        alive, lost, without = {}, {}, tuple(site for site in run.names if site != victim)
        for site in honest:
            calls_it_lost = site in honest[1 : 1 + told_lost]
            row = run.ask(site, without if calls_it_lost else run.names)
            (lost if calls_it_lost else alive)[site] = row
        shares_b, shares_s = wire.shares_of(victim, alive), wire.shares_of(victim, lost) if lost else {}
        for site, secrets in kept.items():
            assert secrets is not None
            shares_s[run.names.index(site)], shares_b[run.names.index(site)] = secrets.held[victim]
        _, public, commit = wire.bundle(victim)
        found = oracle.rebuild(shares_s, 5, public, commit) | oracle.rebuild(shares_b, 5, public, commit)
        both.append(set(found) == {"s", "b"})
    assert any(both) == (7 + colluders >= 2 * 5)


@pytest.mark.parametrize("n", [3, 4, 5, 6, 7])
def test_the_bound_on_sites_left_out_by_different_lists_of_survivors_holds_for_every_lie(n: int) -> None:
    t = threshold(n)
    for c in range(n - 1):
        if 2 * t > n + c:
            most = oracle.left_out(n, c, t, agreed=True)
            assert most <= (n - c) * (n - t) // (t - c), c
            assert n - c - most >= 2  # so never is it the vector of one site
        one_kind_each = max(min(b, n - c - b) + c for b in range(n - c + 1))
        assert (one_kind_each >= t) == (2 * t <= n + c)


def test_the_bound_needs_sites_that_agree_on_the_participants() -> None:
    assert (7 - 2) * (7 - 5) // (5 - 2) == oracle.left_out(7, 2, 5, agreed=True) == 3
    assert oracle.left_out(7, 2, 5, agreed=False) == 4  # one of five is left: the next test does it


def test_one_vector_is_not_opened_by_different_lists_of_participants() -> None:
    """Seven sites, two colluding: site 0 is told of 0, 1, 2, 5, 6; all others of everybody. 1 and 2 are to be lost.

    Without signatures over the context each site would answer, and the vector of site 0 could be read.
    """
    run = Sum(7).keys().share()
    told = dict.fromkeys(run.names, run.names) | {SITES[0]: tuple(SITES[i] for i in (0, 1, 2, 5, 6))}
    told_of = oracle.transcript(PLACE.canonical(), run.data)
    for site in run.names:
        shown = b"".join(_rows(run)[SITES.index(name)] for name in told[site])
        run.members[site].open(told[site], shown, ORDER, 3)
        run.send(site, run.words(), arrives=False)
    for number, lost in {0: (), 1: (2,), 2: (1,), 3: (1, 2), 4: (1, 2)}.items():
        context = oracle.context(told_of, told[SITES[number]], ORDER)
        vouches = {site: vouch(site, context) for site in SITES[5:7]}  # colluders sign whatever helps
        alive = tuple(name for name in told[SITES[number]] if name not in {SITES[i] for i in lost})
        with refused(PeerUntrusted, run[number]):
            run.ask(SITES[number], alive, vouches)


VOUCHES: dict[str, tuple[type[Exception], Callable[[Sum], bytes]]] = {
    "none": (MessageMalformed, lambda run: b""),
    "cut off": (MessageMalformed, lambda run: run.aggregator.vouches[:-1]),
    "one too many": (MessageMalformed, lambda run: run.aggregator.vouches + bytes(64)),
    "empty": (PeerUntrusted, lambda run: bytes(5 * 64)),
    "in another order": (PeerUntrusted, lambda run: run.aggregator.vouches[64:] + run.aggregator.vouches[:64]),
    "of another sum": (PeerUntrusted, lambda run: Sum(5).keys().share().open().mask().aggregator.vouches),
    "one for another model": (PeerUntrusted, lambda run: run.aggregator.vouches[:-64] + vouch(SITES[4], bytes(32))),
    "one by another site": (
        PeerUntrusted,
        lambda run: (
            run.aggregator.vouches[:-64] + oracle.sign(enrolled(SITES[3]), oracle.vouch_bytes(run.wire().context()))
        ),
    ),
    "one under another label": (
        PeerUntrusted,
        lambda run: (
            run.aggregator.vouches[:-64]
            + oracle.sign(enrolled(SITES[4]), b"isocenter/v1/sum-keys\n" + run.wire().context())
        ),
    ),
}


@pytest.mark.parametrize("lie", VOUCHES)
def test_a_site_reveals_only_for_survivors_who_signed_its_own_context(lie: str) -> None:
    error, lying = VOUCHES[lie]
    run = Sum(5).keys().share().open().mask()
    with refused(error, run[0]):
        run[0].reveal(run.survivors, lying(run), 3)
    run.complete()


def vouch(site: str, context: bytes) -> bytes:
    return oracle.sign(enrolled(site), oracle.vouch_bytes(context))


def test_six_of_ten_sites_can_be_summed_with_different_lists_and_then_no_next_sum_begins() -> None:
    """The price that rule 3 states, paid once: 10 sites, none colluding, threshold 7, (10 * 3) // 7 = 4 sites left out."""
    run = Sum(10).keys().share().open().mask()
    victims, lists = SITES[6:10], {}
    demand = dict.fromkeys(victims, 7)
    for site in (*victims, *SITES[:6]):
        accused = sorted((v for v in victims if v != site), key=lambda v: -demand[v])[:3]
        demand |= {victim: demand[victim] - 1 for victim in accused}
        lists[site] = tuple(name for name in run.names if name not in accused)
        run.revealed[site] = run.ask(site, lists[site])
    assert max(demand.values()) <= 0
    wire = replace(run.wire(), vectors={site: run.vectors[site] for site in SITES[:6]})
    chosen = {}
    for site in run.names:  # the shares of the kind that the coordinator wants, from the sites that were told so
        tellers = {
            teller: row for teller, row in run.revealed.items() if (site in lists[teller]) == (site in SITES[:6])
        }
        chosen[site] = wire.shares_of(site, tellers)
    assert wire.open(chosen) == run.expected(SITES[:6])
    following = Sum(10, place=Place(PLACE.study, PLACE.run, 1, 2))
    following.keys()
    sealed = b"".join(
        following.members[site].share(following.data, roster(following.names), lists[site]) for site in following.names
    )
    for site in following.names:
        with refused(ShareInvalid, following.members[site]):
            following.members[site].open(following.names, sealed, ORDER, 3)


@pytest.mark.parametrize("lie", ["survivors before", "members"])
def test_a_site_that_was_told_something_else_cannot_read_and_the_others_go_on(lie: str) -> None:
    run = Sum(7)
    run.previous = SITES[:7]
    run.keys()
    data, previous = (run.data[: 6 * 192], SITES[:7]) if lie == "members" else (run.data, SITES[:6])
    run[0].share(data, roster(run.names), previous)
    sealed = [run.members[site].share(run.data, roster(run.names), run.previous) for site in run.names[1:]]
    shown = sealed[0][: len(data) // 192 * 82 - 82]
    with refused(ShareInvalid, run[0]):
        run[0].open(run.names[: len(data) // 192], shown * (len(data) // 192), ORDER, 3)
    for site, row in zip(run.names[1:], sealed, strict=True):
        run.aggregator.add_shares(site, row)
    run.participants, run.sealed = run.aggregator.close_shares()
    run.complete()


@pytest.mark.parametrize("lie", ["none", "model", "participants"])
def test_sites_that_were_shown_different_things_add_up_to_noise(lie: str) -> None:
    encoding = Encoding(values=2**14, counts=0, bits=32, scale=0, sites=7)
    run = Sum(7, encoding=encoding).keys().share()
    run.aggregator.start(ORDER, encoding)
    left = np.zeros(2**14, np.uint32)
    for site in run.names:
        told = run.names[:6] if lie == "participants" and site in SITES[:3] else run.names
        order = b"another model" if lie == "model" and site == SITES[0] else ORDER
        run.members[site].open(told, b"".join(_rows(run)[: len(told)]), order, 3)
        secrets = run.members[site]._secrets
        assert secrets is not None
        context = oracle.context(run.circle.transcript, told, order)
        key = oracle.derive(secrets.seed, b"self-mask", context, site)  # the coordinator may know all self masks
        left -= np.frombuffer(oracle.keystream(key, left.nbytes), "<u4")
    for site in run.names:
        left += np.frombuffer(run.send(site, encoding.zeros(), arrives=False), "<u4", len(left))
    if lie == "none":
        assert not left.any()
    else:
        check_uniform(left.tobytes())


# Sites that lie to the coordinator -----------------------------------------------------------------------------------


def untouched(aggregator: Aggregator) -> dict[str, object]:
    kept = {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value
        for name, value in vars(aggregator).items()
        if name != "_total"
    }
    total = aggregator._total
    return kept | {"_total": total and (total.values.tobytes(), total.counts.tobytes())}


@contextlib.contextmanager
def rejected(error: type[Exception], run: Sum) -> Iterator[None]:
    """The coordinator raises `error`, and goes on as if nothing had come."""
    before = untouched(run.aggregator)
    with pytest.raises(error):
        yield
    assert untouched(run.aggregator) == before


def test_keys_that_a_site_did_not_sign_for_this_sum_are_rejected() -> None:
    run = Sum(4)
    add = run.aggregator.add_keys
    good = run[0].public
    lies: list[tuple[type[Exception], str, bytes]] = [
        (PeerUntrusted, SITES[0], run[1].public),
        (PeerUntrusted, SITES[40], bundle_of(SITES[40])),
        (PeerUntrusted, SITES[0], bundle_of(SITES[0], signer=SITES[1])),
        (PeerUntrusted, SITES[0], bundle_of(SITES[0], Place(PLACE.study, PLACE.run, 1, 2))),
        (PeerUntrusted, SITES[0], good[:-1] + bytes([good[-1] ^ 1])),
        (MessageMalformed, SITES[0], good[:-1]),
        (MessageMalformed, SITES[0], good + b"\0"),
        (MessageMalformed, SITES[0], b""),
        (MessageMalformed, SITES[0], b"\0" * 192),
    ]
    for error, site, data in lies:
        with rejected(error, run):
            add(site, data)
    add(SITES[0], good)
    for again in (good, bundle_of(SITES[0])):
        with rejected(StepRefused, run):
            add(SITES[0], again)
    for site in run.names[1:]:
        add(site, run.members[site].public)
    run.data, run.keyed = run.aggregator.close_keys(), run.names
    with rejected(StepRefused, run):
        add(SITES[1], run[1].public)
    run.complete()


@pytest.mark.parametrize("part", ["cipher", "mask"])
def test_points_of_low_order_are_rejected(part: str) -> None:
    run = Sum(4)
    for point in oracle.low_order_points():
        with rejected(PeerUntrusted, run):
            run.aggregator.add_keys(SITES[0], bundle_of(SITES[0], **{part: point}))
    run.complete()


def test_shares_of_strangers_of_another_size_or_twice_are_rejected() -> None:
    run = Sum(4)
    with rejected(StepRefused, run):
        run.aggregator.add_shares(SITES[0], bytes(3 * 82))
    run.keys({SITES[3]})
    sealed = {site: run.members[site].share(run.data, roster(run.names)) for site in run.keyed}
    for site, data in ((SITES[3], sealed[SITES[0]]), (SITES[40], sealed[SITES[0]])):
        with rejected(StepRefused, run):
            run.aggregator.add_shares(site, data)
    for data in (b"", sealed[SITES[0]][:-1], sealed[SITES[0]] + bytes(82)):
        with rejected(MessageMalformed, run):
            run.aggregator.add_shares(SITES[0], data)
    with rejected(TooFewSurvivors, run):
        run.aggregator.close_shares()
    for site, data in sealed.items():
        run.aggregator.add_shares(site, data)
        with rejected(StepRefused, run):
            run.aggregator.add_shares(site, data)
    run.participants, run.sealed = run.aggregator.close_shares()
    with rejected(StepRefused, run):
        run.aggregator.add_shares(SITES[0], sealed[SITES[0]])
    run.complete()


def test_vectors_of_strangers_of_another_size_twice_or_late_are_rejected() -> None:
    run = Sum(5).keys().share({SITES[4]})
    with rejected(StepRefused, run):
        run.aggregator.add_vector(SITES[0], run.words(), bytes(64))
    run.open()
    for site in (SITES[4], SITES[40]):
        with rejected(StepRefused, run):
            run.aggregator.add_vector(site, run.words(), bytes(64))
    first = run.encoding.vector_of(run.send(SITES[0], run.words(), arrives=False))
    good = run.vouches[SITES[0]]
    for other in (Encoding(8, 2, 32, 0, 5), Encoding(9, 1, 32, 0, 5), Encoding(9, 2, 64, 0, 5)):
        with rejected(MessageMalformed, run):
            run.aggregator.add_vector(SITES[0], other.zeros(), good)
    for bad in (
        b"",
        bytes(64),
        good[:-1],
        good + b"\0",
        vouch(SITES[0], bytes(32)),
        vouch(SITES[1], run.wire().context()),
    ):
        with rejected(PeerUntrusted, run):
            run.aggregator.add_vector(SITES[0], first, bad)
    with rejected(TooFewSurvivors, run):
        run.aggregator.close_vectors()
    run.vectors[SITES[0]] = bytes(run.encoding.bytes_of(first))
    run.aggregator.add_vector(SITES[0], first, good)
    with rejected(StepRefused, run):
        run.aggregator.add_vector(SITES[0], first, good)
    for number in (1, 2):
        run.send(SITES[number], run.words())
    late = run.encoding.vector_of(run.send(SITES[3], run.words(), arrives=False))
    run.aggregator.add_vector(SITES[3], late, run.vouches[SITES[3]])
    run.survivors = run.aggregator.close_vectors()
    with rejected(StepRefused, run):
        run.aggregator.add_vector(SITES[3], late, run.vouches[SITES[3]])
    run.complete()


def test_opened_shares_of_strangers_of_another_size_or_twice_are_rejected() -> None:
    run = Sum(7).keys().share().open()
    with rejected(StepRefused, run):
        run.aggregator.finish()
    run.mask({SITES[6]})
    row = run.ask(SITES[0])
    for site in (SITES[6], SITES[40]):
        with rejected(StepRefused, run):
            run.aggregator.add_revealed(site, row)
    for data in (b"", row[:-1], row + bytes(33)):
        with rejected(MessageMalformed, run):
            run.aggregator.add_revealed(SITES[0], data)
    run.answer(SITES[0], row)
    with rejected(StepRefused, run):
        run.aggregator.add_revealed(SITES[0], row)
    for site in run.survivors[1:]:
        run.answer(site, run.ask(site))
    run.complete()
    for late in (run.aggregator.finish, lambda: run.aggregator.add_revealed(SITES[0], row)):
        with pytest.raises(StepRefused):
            late()


@pytest.mark.parametrize("lie", ["changed", "garbage", "none", "above the field"])
def test_a_site_that_opens_with_wrong_shares_is_outvoted_and_named(lie: str) -> None:
    run = Sum(7).keys().share().open().mask({SITES[6]})
    for site in run.survivors:
        row = run.ask(site)
        if site == SITES[2]:
            wrong = {
                "changed": row,
                "garbage": bytes(len(row)),
                "none": NO_SHARE * 7,
                "above the field": b"\xfe" * len(row),
            }
            row = wrong[lie]
            for at in range(7 if lie == "changed" else 0):
                row = corrupt(row, at)
        run.answer(site, row)
    assert run.aggregator.enough
    run.complete()
    # Who says that a share did not arrive accuses nobody, and does no harm.
    assert run.aggregator.wrong == ({} if lie == "none" else {SITES[2]: "share-invalid"})


def test_a_liar_who_answers_first_cannot_end_the_waiting() -> None:
    run = Sum(5).keys().share().open().mask()
    run.answer(SITES[0], corrupt(run.ask(SITES[0]), 1))
    for number in (1, 2, 3):
        assert not run.aggregator.enough
        run.answer(SITES[number], run.ask(SITES[number]))
    assert not run.aggregator.enough  # four answers, one of them wrong, and four are needed
    with pytest.raises(ShareInvalid, match=SITES[1]):
        run.aggregator.finish()
    assert run.aggregator.wrong == {}
    run.answer(SITES[4], run.ask(SITES[4]))
    assert run.aggregator.enough
    run.complete()


def deal(run: Sum, dealer: str, shares: dict[str, bytes]) -> bytes:
    """The sealed shares of `dealer`, with other ones for some holders: 66 bytes each, encrypted as they should be."""
    member = run.members[dealer]
    honest, circle, secrets = member.share(run.data, roster(run.names)), member._circle, member._secrets
    assert circle is not None
    assert secrets is not None
    for holder, both in shares.items():
        at = circle.peers[dealer].index(holder) * 82
        cipher = circle.seal_key(secrets.cipher, dealer, holder, holder)
        honest = honest[:at] + cipher.encrypt(bytes(12), both, circle.transcript) + honest[at + 82 :]
    return honest


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("lie", ["inconsistent", "unreadable", "another secret"])
def test_a_site_that_deals_useless_shares_is_named_and_leaves_the_others_blameless(lie: str, lost: bool) -> None:
    run = Sum(7).keys()
    others = run.names[1:]
    if lie == "another secret":
        parts = [split(run.random.bytes(32), 7, threshold(7)) for _ in range(2)]
        shares = {site: parts[0][i] + parts[1][i] for i, site in enumerate(run.names) if i}
    else:
        shares = {site: bytes([0] + [7] * 32 + [0] + [7] * 31 + [i]) for i, site in enumerate(others)}
    sealed = deal(run, SITES[0], shares)
    if lie == "unreadable":
        sealed = bytes(len(sealed))
    honest = {site: run.members[site].share(run.data, roster(run.names)) for site in others}
    for site, data in (honest | {SITES[0]: sealed}).items():
        run.aggregator.add_shares(site, data)
    run.participants, run.sealed = run.aggregator.close_shares()
    run.open().mask({SITES[0]} if lost else ()).reveal()
    assert not run.aggregator.enough
    with pytest.raises(ShareInvalid, match=SITES[0]):
        run.aggregator.finish()
    assert run.aggregator.wrong == {SITES[0]: "share-invalid"}


@pytest.mark.parametrize("part", ["commitment", "mask"])
def test_a_site_whose_keys_do_not_fit_its_secrets_is_named(part: str) -> None:
    run = Sum(5)
    made = vars(run[0]._bundle) | {part: oracle.public_of(bytes(range(32))) if part == "mask" else bytes(range(32))}
    unsigned = Bundle(**made).to_bytes()[:-64]
    signature = oracle.sign(enrolled(SITES[0]), oracle.signed_bytes(PLACE.canonical(), unsigned))
    run[0]._bundle = Bundle.from_bytes(unsigned + signature)
    run.keys().share().open().mask({SITES[0]} if part == "mask" else ()).reveal()
    with pytest.raises(ShareInvalid, match=SITES[0]):
        run.aggregator.finish()


@pytest.mark.parametrize(("harmed", "blamed"), [((3,), {}), ((3, 4), {SITES[0]: "share-invalid"})])
def test_wrong_shares_that_a_site_deals_are_not_held_against_those_who_pass_them_on(
    harmed: tuple[int, ...], blamed: dict[str, str]
) -> None:
    """Ten sites answer where seven are needed, so the sum is opened all the same. One against one, nobody is believed."""
    run = Sum(10).keys()
    sealed = {site: run.members[site].share(run.data, roster(run.names)) for site in run.names[1:]}
    sealed[SITES[0]] = deal(run, SITES[0], {SITES[number]: bytes([0] + [9] * 32) * 2 for number in harmed})
    for site, data in sealed.items():
        run.aggregator.add_shares(site, data)
    run.participants, run.sealed = run.aggregator.close_shares()
    run.complete()
    assert run.aggregator.wrong == blamed


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 8), st.randoms(use_true_random=False))
def test_one_liar_cannot_have_another_site_blamed_and_cannot_change_the_sum(n: int, chance: Random) -> None:
    """Site 0 deals some wrong shares and gives some wrong ones; some of the others drop out, and it chooses whom it harms."""
    run, liar = Sum(n).keys(), SITES[0]
    harmed = chance.sample(run.names[1:], chance.randint(0, n - 1))
    sealed = {site: run.members[site].share(run.data, roster(run.names)) for site in run.names[1:]}
    sealed[liar] = deal(
        run, liar, {site: bytes([0]) + chance.randbytes(32) + bytes([0]) + chance.randbytes(32) for site in harmed}
    )
    for site, data in sealed.items():
        run.aggregator.add_shares(site, data)
    run.participants, run.sealed = run.aggregator.close_shares()
    gone = chance.sample(run.names[1:], chance.randint(0, n - threshold(n)))
    late = chance.randint(0, len(gone))
    run.open().mask(gone[:late])
    for site in chance.sample(run.survivors, len(run.survivors)):
        if site in gone:
            continue
        row = run.ask(site)
        for at in chance.sample(range(n), chance.randint(0, n)) if site == liar else ():
            row = corrupt(row, at)
        run.answer(site, row)
        assert run.aggregator.enough in (True, False)
    try:
        assert run.opened() == run.expected()
    except ShareInvalid:
        assert len(run.revealed) < n or harmed
    assert set(run.aggregator.wrong) <= {liar}
