"""Secure aggregation: exact sums, whoever drops out; nothing but the sum, whoever lies. See `privacy.secagg` for the rules."""

import copy
import itertools
import json
import math
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import secagg_oracle as oracle
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_cast import ORDER, PLACE, SITES, Sum, check_uniform, refused, roster, signed_by, stream

from privacy import keys, secagg
from privacy.errors import PeerUntrusted, TooFewSurvivors
from privacy.secagg import SEALED_BYTES, Bundle, Circle, Member, Place
from privacy.sharing import Encoding, Vector, degree, threshold

ANSWERS = json.loads((Path(__file__).parent / "vectors" / "secagg.json").read_text())


# The sum is the sum --------------------------------------------------------------------------------------------------


@st.composite
def sums(draw: st.DrawFn) -> tuple[Sum, dict[str, set[str]]]:
    """A sum, and who vanishes at which stage: any number before the keys, at most n - threshold afterwards."""
    sites = draw(st.integers(3, 12))
    keyed = draw(st.integers(3, sites))
    encoding = Encoding(
        values=draw(st.sampled_from([0, 1, 7, 40])),
        counts=draw(st.integers(0, 3)),
        bits=draw(st.sampled_from([16, 24, 32, 64])),
        scale=0,
        sites=sites,
    )
    mixed = draw(st.permutations(SITES[:sites]))
    lost = {"keys": set(mixed[keyed:]), "shares": set(), "mask": set(), "reveal": set()}
    for site in mixed[: draw(st.integers(0, keyed - threshold(keyed)))]:
        lost[draw(st.sampled_from(["shares", "mask", "reveal"]))].add(site)
    return Sum(sites, encoding=encoding, seed=draw(st.integers(0, 99))), lost


@settings(max_examples=40, deadline=None)
@given(sums())
def test_the_opened_sum_is_the_plain_sum_to_the_last_bit(case: tuple[Sum, dict[str, set[str]]]) -> None:
    run, lost = case
    run.keys(lost["keys"]).share(lost["shares"]).open().mask(lost["mask"]).reveal(lost["reveal"])
    assert set(run.survivors) == set(run.names) - lost["keys"] - lost["shares"] - lost["mask"]
    independent = run.wire().open()
    assert run.aggregator.enough
    assert run.opened() == run.expected() == independent
    assert run.aggregator.wrong == {}


def test_above_fifty_sites_the_sum_over_the_sparse_graph_is_exact() -> None:
    sites, lost = 51, 10
    assert degree(sites) < sites - 1
    run = Sum(sites, encoding=Encoding(values=3, counts=0, bits=32, scale=0, sites=sites))
    names = list(run.names)
    run.random.shuffle(names)
    run.keys().share(names[:2]).open().mask(names[2:4])
    linked = run.circle.peers
    assert linked == oracle.ring(run.names, oracle.transcript(PLACE.canonical(), run.data), degree(sites))
    # Enough survivors in all, and too few of those who hold this site's own shares: it must not leave its masks alone.
    site = names[-1]
    near = [peer for peer in linked[site] if peer in run.survivors]
    far = near[threshold(len(linked[site]) + 1) - 2 :]
    few = tuple(name for name in run.survivors if name not in far)
    assert len(few) >= run.aggregator.least
    with refused(TooFewSurvivors, run.members[site]):
        run.ask(site, few)
    run.reveal(names[4:lost])
    assert run.opened() == run.expected()


def test_real_values_come_back_through_masks() -> None:
    encoding = Encoding(values=500, counts=1, bits=32, scale=20, sites=5)
    updates = np.random.default_rng(3).normal(size=(5, 500)).astype(np.float32)
    run = Sum(5, encoding=encoding).keys().share().open()
    run.mask({SITES[2]}, lambda site: encoding.encode(updates[SITES.index(site)], 3, np.array([7]))).reveal()
    total = encoding.decode(run.aggregator.finish())
    assert (
        np.abs(total.values - 3 * np.delete(updates, 2, axis=0).astype(np.float64).sum(0)).max() < 4 * 2.0**-21 * 1.01
    )
    assert list(total.counts) == [28]
    assert total.clipped == 0


@pytest.mark.parametrize("sites", [3, 4, 7, 12])
def test_below_the_threshold_no_stage_goes_on_and_nothing_is_revealed(sites: int) -> None:
    too_many = set(SITES[: sites - threshold(sites) + 1])
    with pytest.raises(TooFewSurvivors):
        Sum(sites).keys().share(too_many)
    run = Sum(sites).keys().share().open()
    with pytest.raises(TooFewSurvivors):
        run.mask(too_many)
    few = tuple(site for site in run.names if site not in too_many)
    for site in few:
        with refused(TooFewSurvivors, run.members[site]):
            run.ask(site, few)
    run = Sum(sites).keys().share().open().mask().reveal(too_many)
    assert not run.aggregator.enough
    with pytest.raises(TooFewSurvivors):
        run.aggregator.finish()
    assert run.aggregator.wrong == {}
    missing = min(too_many)
    run.answer(missing, run.ask(missing))  # it comes back late, and that is enough
    assert run.opened() == run.expected()


def test_fewer_than_three_sites_or_the_quorum_never_make_a_sum() -> None:
    few = Sum(2, quorum=0)
    with pytest.raises(TooFewSurvivors):
        few.keys()
    run = Sum(7, quorum=6)
    with pytest.raises(TooFewSurvivors):
        run.keys(SITES[:2])
    run.names = SITES[:2]
    run = Sum(7, quorum=6).keys()
    assert run.aggregator.least == 6
    with pytest.raises(TooFewSurvivors):
        run.share(SITES[:2])


# Known answers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cast(monkeypatch: pytest.MonkeyPatch) -> dict[str, Member]:
    """The sites of vectors/secagg.json with the secrets that stand there, and signatures without chance."""

    def sign(key: ec.EllipticCurvePrivateKey, label: bytes, body: bytes) -> bytes:
        return key.sign(label + b"\n" + body, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))

    monkeypatch.setattr(keys, "sign", sign)
    members = {}
    for site, known in ANSWERS["sites"].items():
        secrets, later = iter([bytes.fromhex(known[use]) for use in ("cipher", "mask", "seed")]), stream(site)
        key = ec.derive_private_key(int(known["enrolled"], 16), ec.SECP256R1())
        members[site] = Member(_place(), site, partial(sign, key), partial(_draw, secrets, later))
    return members


def _draw(known: Iterator[bytes], later: Callable[[int], bytes], size: int) -> bytes:
    return next(known, None) or later(size)


def _place() -> Place:
    return Place(**{name: value for name, value in json.loads(ANSWERS["place"]).items() if name != "version"})


def _roster() -> dict[str, keys.PublicKey]:
    known = {site: int(values["enrolled"], 16) for site, values in ANSWERS["sites"].items()}
    return {site: ec.derive_private_key(value, ec.SECP256R1()).public_key() for site, value in known.items()}


def test_the_known_answers_are_those_of_the_independent_implementation() -> None:
    assert oracle.known_answers() == ANSWERS


def test_every_derivation_gives_its_known_answer(cast: dict[str, Member]) -> None:
    place, sites = _place(), ANSWERS["sites"]
    names = tuple(sites)
    data = b"".join(cast[site].public for site in names)
    assert place.canonical().decode() == ANSWERS["place"]
    for site, known in sites.items():
        bundle = Bundle.from_bytes(cast[site].public)
        assert cast[site].public.hex() == bundle.to_bytes().hex() == known["bundle"]
        assert (keys.SUM_KEYS + b"\n" + bundle.signed(place)).hex() == known["signed"]
        assert secagg.commitment(bytes.fromhex(known["seed"])).hex() == bundle.commitment.hex() == known["commitment"]
    circle = Circle(place, data, _roster(), tuple(ANSWERS["previous"]))
    context = circle.context(names, ANSWERS["order"].encode())
    assert (circle.transcript.hex(), context.hex()) == (ANSWERS["transcript"], ANSWERS["context"])
    for pair, key in ANSWERS["pair_masks"].items():
        first, second = pair.split()
        for site, peer, sign in ((first, second, 1), (second, first, -1)):
            own = secagg.X25519PrivateKey.from_private_bytes(bytes.fromhex(sites[site]["mask"]))
            assert circle.pair_mask(own, site, peer, context) == (bytes.fromhex(key), sign)


def test_masked_bytes_and_sealed_shares_follow_from_the_known_answers(cast: dict[str, Member]) -> None:
    names, told, counts = tuple(ANSWERS["sites"]), tuple(ANSWERS["previous"]), 2
    data, encoding = b"".join(cast[site].public for site in names), Encoding(5, 1, 32, 0, 4)
    sealed = {site: cast[site].share(data, _roster(), told) for site in names}
    dealt: dict[str, dict[int, bytes]] = {}
    for sender, receiver in itertools.permutations(names, 2):
        at = [name for name in names if name != sender].index(receiver) * SEALED_BYTES
        row = sealed[sender][at : at + SEALED_BYTES]
        plain = oracle.read_share(ANSWERS, ANSWERS["transcript"], sender, receiver, row)
        dealt.setdefault(sender, {})[names.index(receiver) + 1] = plain
    for site in names:
        secrets = [{x: oracle.share_value(both[i : i + 33]) for x, both in dealt[site].items()} for i in (0, 33)]
        rebuilt = [oracle.lagrange(shares).to_bytes(32, "big").hex() for shares in secrets]
        assert rebuilt == [ANSWERS["sites"][site]["mask"], ANSWERS["sites"][site]["seed"]]
        cast[site].open(names, b"".join(sealed.values()), ANSWERS["order"].encode(), 3)
        vector = encoding.zeros()
        vouch = cast[site].mask(vector, encoding)
        assert vouch.hex() == ANSWERS["sites"][site]["vouch"]
        streams = [(ANSWERS["sites"][site]["self_mask"], 1)]
        streams += [
            (key, 1 if pair.startswith(site) else -1)
            for pair, key in ANSWERS["pair_masks"].items()
            if site in pair.split()
        ]
        values, whole = np.zeros(5, np.uint32), np.zeros(counts, np.uint64)
        for key, sign in streams:
            mask = oracle.keystream(bytes.fromhex(key), 20 + 8 * counts)
            values += np.frombuffer(mask[:20], "<u4") * np.uint32(sign % 2**32)
            whole += np.frombuffer(mask[20:], "<u8") * np.uint64(sign % 2**64)
        assert bytes(encoding.bytes_of(vector)) == values.tobytes() + whole.tobytes()


# The coordinator's view ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("constant", [0, 0xFFFF])
def test_masked_vectors_of_constant_inputs_look_uniform(bits: int, constant: int) -> None:
    encoding = Encoding(values=2**15, counts=0, bits=bits, scale=0, sites=4)
    run = Sum(4, encoding=encoding).keys().share().open()
    run.mask(fill=lambda site: _constant(encoding, constant)).reveal()
    for packed in run.vectors.values():
        check_uniform(packed)
    seen = [np.frombuffer(packed, f"<u{bits // 8}") for packed in run.vectors.values()]
    for few in (2, 3):  # sums of some of the sites are as good as noise; only the whole one says anything
        for chosen in itertools.combinations(seen, few):
            check_uniform(np.add.reduce(chosen, dtype=chosen[0].dtype).tobytes())
    assert run.opened() == run.expected()


def _constant(encoding: Encoding, word: int) -> Vector:
    made = encoding.zeros()
    made.values[:] = word
    return made


def _masked_zeros(monkeypatch: pytest.MonkeyPatch, place: Place, order: bytes) -> dict[str, np.ndarray]:
    """What four sites send that all draw the same secrets again and again, as no site ever does."""
    encoding = Encoding(values=2**14, counts=0, bits=32, scale=0, sites=4)
    monkeypatch.setattr(
        keys,
        "sign",
        lambda key, label, body: key.sign(label + b"\n" + body, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)),
    )
    run = Sum(4, place=place, encoding=encoding)
    run.members = {site: Member(place, site, signed_by(site), stream(site)) for site in run.names}
    run.keys().share().open(lambda site: order).mask(fill=lambda site: encoding.zeros())
    return {site: np.frombuffer(packed, "<u4") for site, packed in run.vectors.items()}


def test_masks_of_other_places_orders_and_sites_have_nothing_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    study, run = PLACE.study, PLACE.run
    places = [
        PLACE,
        Place("b" * 64, run, 1, 1),
        Place(study, "run-2", 1, 1),
        Place(study, run, 2, 1),
        Place(study, run, 1, 2),
    ]
    views = [_masked_zeros(monkeypatch, place, ORDER) for place in places]
    views.append(_masked_zeros(monkeypatch, PLACE, b"the order with another model"))
    again = _masked_zeros(monkeypatch, PLACE, ORDER)
    assert all(
        (again[site] == views[0][site]).all() for site in again
    )  # so the differences below come from the place alone
    masks = [words for view in views for words in view.values()]
    for first, second in itertools.combinations(masks, 2):
        for mixed in (first - second, first + second, first ^ second):
            check_uniform(mixed.tobytes())
    check_uniform(b"".join(Sum(12).keys().share().sealed for _ in range(3)))


TRIALS = 120
FEATURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mean": lambda own, others: float(own.view("<i4").mean()),
    "low bits": lambda own, others: float((own & 0xFF).mean()) - 127.5,
    "ones": lambda own, others: float(np.unpackbits(own.view(np.uint8)).mean()) - 0.5,
    "against the others": lambda own, others: float((own - others).view("<i4").mean()),
    "with the others": lambda own, others: float((own + others).view("<i4").mean()),
    "first word": lambda own, others: float(own.view("<i4")[0]),
}


def _guesses(trial: int, encoding: Encoding) -> tuple[bool, dict[str, bool], bool]:
    """One game: site 0 sends zeros and site 1 the limit, or the other way round, so the sum is the same.

    The coordinator knows the self masks of all survivors, so it takes them off before it guesses. Returns the truth, what it
    guesses by each feature, and what the first feature says once the masks of the pairs are off as well.
    """
    truth = bool(np.random.default_rng(trial).integers(2))
    run = Sum(3, encoding=encoding, seed=trial).keys().share().open()
    high = SITES[0] if truth else SITES[1]
    run.mask(fill=lambda site: _constant(encoding, encoding.limit if site == high else 0)).reveal()
    wire, told = run.wire(), run.wire().context()
    bare = {}
    for site in run.survivors:
        _, public, commit = wire.bundle(site)
        seed = oracle.rebuild(wire.shares_of(site), 3, public, commit)["b"]
        mask = oracle.keystream(oracle.derive(seed, b"self-mask", told, site), encoding.values * 4)
        bare[site] = np.frombuffer(run.vectors[site], "<u4", encoding.values) - np.frombuffer(mask, "<u4")
    total = sum(bare.values())
    assert (total == encoding.limit).all()  # the masks that are left cancel: the coordinator's view is a real one
    guesses = {name: judge(bare[SITES[0]], bare[SITES[1]]) > 0 for name, judge in FEATURES.items()}
    return truth, guesses, FEATURES["mean"](run.plain[SITES[0]].values, total) > 0


def test_who_put_what_into_the_sum_is_guessed_no_better_than_by_chance() -> None:
    encoding = Encoding(values=64, counts=0, bits=32, scale=0, sites=3)
    games = [_guesses(trial, encoding) for trial in range(TRIALS)]
    # Hoeffding: each of the features is off by this much, in either direction, less than once in 10**9 / 2 runs of all.
    margin = math.sqrt(math.log(2 * len(FEATURES) * 2e9) / (2 * TRIALS))
    for name in FEATURES:
        right = sum(truth == guesses[name] for truth, guesses, _ in games) / TRIALS
        assert abs(right - 0.5) < margin, name
    assert all(truth == unmasked for truth, _, unmasked in games)  # and without masks it is guessed every time


def test_secrets_are_neither_shown_nor_copied_nor_stored() -> None:
    run = Sum(4).keys().share().open()
    member = run[0]
    secrets = member._secrets
    assert secrets is not None
    raw = [secrets.seed, secrets.mask.private_bytes_raw(), secrets.cipher.private_bytes_raw(), secrets.masks[0][0]]
    raw += [share for both in secrets.held.values() for share in both]
    for shown in (repr(member), str(member), repr(vars(member)), repr(secrets), f"{[secrets]}"):
        assert not any(secret.hex() in shown or repr(secret) in shown for secret in raw)
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copying(member)
    run.complete()


def test_memory_of_the_coordinator_does_not_grow_with_the_sites() -> None:
    peaks = {}
    for sites in (4, 40):
        encoding = Encoding(values=200_000, counts=0, bits=32, scale=0, sites=sites)
        run = Sum(sites, encoding=encoding).keys().share()
        sent = {}
        for site in run.participants:
            run.members[site].open(run.participants, run.sealed, ORDER, 3)
            sent[site] = run.send(site, encoding.zeros(), arrives=False)
        tracemalloc.start()
        try:
            run.aggregator.start(ORDER, encoding)
            for site, packed in sent.items():
                run.aggregator.add_vector(site, encoding.vector_of(packed), run.vouches[site])
            run.survivors = run.aggregator.close_vectors()
            run.reveal()
            total = run.aggregator.finish()
            peaks[sites] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert not total.values.any()
    assert peaks[4] < 3 * 800_000  # the sum, the vector that arrives, and room for one block
    assert peaks[40] < peaks[4] + 800_000


def test_each_signature_under_keys_is_verified_once_by_the_coordinator_and_by_every_site(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the coordinator checked as it came it knows; a site has only the coordinator's word for what it is shown."""
    verified, verify = list[bytes](), keys.verify

    def counted(key: keys.PublicKey, label: bytes, body: bytes, signature: bytes) -> None:
        verified.append(label)
        verify(key, label, body, signature)

    monkeypatch.setattr(keys, "verify", counted)
    run = Sum(5).keys()
    assert verified.count(keys.SUM_KEYS) == 5
    run.share()
    assert verified.count(keys.SUM_KEYS) == 5 + 5 * 5


def test_keys_that_were_checked_are_those_bytes_and_no_others() -> None:
    run = Sum(4)
    for site in run.names:
        run.aggregator.add_keys(site, run.members[site].public)
    data, other = (
        b"".join(run.members[site].public for site in run.names),
        Sum(4, place=Place("b6" * 32, "run-1", 1, 1)),
    )
    checked = {run.members[site].public for site in run.names}
    assert Circle(run.place, data, roster(run.names), (), checked).names == run.names
    foreign = b"".join(other.members[site].public for site in run.names)
    with pytest.raises(PeerUntrusted):
        Circle(run.place, foreign, roster(run.names), (), checked)
