"""Shares, words and masks against arithmetic done another way: rationals, one-shot ciphers, the openssl program's answers."""

import hashlib
import itertools
import json
import math
import random
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import sharing
from privacy.errors import MessageMalformed, ShareInvalid
from privacy.sharing import COUNT_MAX, MASK_BLOCK_BYTES, PRIME, Encoding, Mask, Vector, add_masks, recover, split

VECTORS = json.loads((Path(__file__).parent / "vectors" / "sharing.json").read_text())
"""Made without the code under test: powers for polynomials, `openssl enc -aes-256-ctr` for keystreams, rationals for words."""

SECRET = hashlib.sha256(b"a secret").digest()
OTHER_SECRET = hashlib.sha256(b"another secret").digest()
BITS = (16, 24, 32, 64)
secrets = st.binary(min_size=32, max_size=32)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def is_secret(candidate: bytes) -> bool:
    return candidate == SECRET


def from_list(elements: list[int]) -> Callable[[int], bytes]:
    """Entropy that draws these field elements, one after the other, and has no more."""
    left = iter(elements)
    return lambda size: next(left).to_bytes(size, "big")


# The field and its polynomials -----------------------------------------------------------------------------------------


def looks_prime(n: int, rounds: int) -> bool:
    """Miller-Rabin: False is a proof, True is wrong with a probability below 4**-rounds."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(rounds):
        x = pow(random.Random(rounds + _).randrange(2, n - 1), odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def coefficients_through(points: dict[int, int]) -> list[int]:
    """Coefficients modulo PRIME of the polynomial through `points`, by Gauss elimination of its linear equations."""
    rows = [[pow(x, e, PRIME) for e in range(len(points))] + [y] for x, y in points.items()]
    for i in range(len(rows)):
        pivot = next(r for r in range(i, len(rows)) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        inverse = pow(rows[i][i], PRIME - 2, PRIME)
        rows[i] = [value * inverse % PRIME for value in rows[i]]
        for r in range(len(rows)):
            if r != i:
                rows[r] = [(a - rows[r][i] * b) % PRIME for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


def constant_of(shares: dict[int, bytes]) -> int:
    """The polynomial at 0 by Lagrange's formula over the rationals, taken modulo PRIME at the end only."""
    total = Fraction(0)
    for place, share in shares.items():
        weight = math.prod((Fraction(j + 1, j - place) for j in shares if j != place), start=Fraction(1))
        total += int.from_bytes(share, "big") * weight
    return total.numerator * pow(total.denominator, -1, PRIME) % PRIME


def test_the_field_is_the_smallest_prime_field_that_holds_every_secret() -> None:
    assert looks_prime(PRIME, 64)
    assert not any(looks_prime(n, 8) for n in range(2**256 + 1, PRIME, 2))


@pytest.mark.parametrize("holders", range(1, 1001, 7))
def test_a_threshold_is_the_least_number_above_two_thirds(holders: int) -> None:
    needed = sharing.threshold(holders)
    assert Fraction(needed) > Fraction(2 * holders, 3) >= needed - 1 and needed <= holders


@pytest.mark.parametrize("known", VECTORS["shares"], ids=lambda known: known["name"])
def test_shares_are_the_known_ones(known: dict[str, Any]) -> None:
    elements = [int(text, 16) for text in known["entropy"]]
    made = split(bytes.fromhex(known["secret"]), known["holders"], known["threshold"], from_list(elements))
    assert [share.hex() for share in made] == known["shares"]


@given(secrets, st.integers(1, 9), st.data())
def test_any_threshold_of_shares_give_the_secret(secret: bytes, holders: int, data: st.DataObject) -> None:
    needed = data.draw(st.integers(1, holders))
    shares = dict(enumerate(split(secret, holders, needed)))
    places = data.draw(st.permutations(range(holders)))[: data.draw(st.integers(needed, holders))]
    chosen = {place: shares[place] for place in places}
    assert recover(chosen, needed, lambda found: found == secret) == (secret, frozenset())
    some = {place: shares[place] for place in places[:needed]}
    assert constant_of(some) == int.from_bytes(secret, "big")


def test_every_subset_of_seven_shares_that_is_large_enough_gives_the_secret() -> None:
    shares = dict(enumerate(split(SECRET, 7, 5)))
    for size in range(8):
        for places in itertools.combinations(range(7), size):
            chosen = {place: shares[place] for place in places}
            if size >= 5:
                assert recover(chosen, 5, is_secret) == (SECRET, frozenset())
            else:
                with pytest.raises(ShareInvalid):
                    recover(chosen, 5, is_secret)


@given(secrets, secrets, st.integers(2, 8), st.data())
def test_one_share_short_of_the_threshold_every_secret_is_as_likely(
    secret: bytes, other: bytes, holders: int, data: st.DataObject
) -> None:
    """For each other secret there is exactly one draw of coefficients that gives the very same shares, and coefficients
    are uniform: what the places saw says nothing about which of the secrets it was."""
    needed = data.draw(st.integers(2, holders))
    places = data.draw(st.permutations(range(holders)))[: needed - 1]
    seen = split(secret, holders, needed)
    points = {place + 1: int.from_bytes(seen[place], "big") for place in places}
    coefficients = coefficients_through({0: int.from_bytes(other, "big")} | points)
    again = split(other, holders, needed, from_list(coefficients[1:]))
    assert [again[place] for place in places] == [seen[place] for place in places]


def test_coefficients_are_drawn_from_the_whole_field_and_nothing_else() -> None:
    drawn = [PRIME - 1, PRIME, 2**257 - 1, 2**256 + 296, 5]
    made = split(SECRET, 4, 4, from_list(drawn))
    values = {0: int.from_bytes(SECRET, "big")} | {i + 1: int.from_bytes(share, "big") for i, share in enumerate(made)}
    assert coefficients_through({x: values[x] for x in range(4)})[1:] == [PRIME - 1, 2**256 + 296, 5]
    # Bits above the 257th carry nothing; a draw of them alone is a zero.
    zero = split(SECRET, 2, 2, lambda size: b"\xfe" + bytes(size - 1))
    assert zero[0] == zero[1] == SECRET.rjust(33, b"\0")


def test_coefficients_are_uniform() -> None:
    generator = random.Random(3)
    counts = [0] * 16
    for _ in range(4000):
        share = split(SECRET, 2, 2, generator.randbytes)[0]
        coefficient = (int.from_bytes(share, "big") - int.from_bytes(SECRET, "big")) % PRIME
        counts[coefficient * 16 // PRIME] += 1
    assert sum((count - 250) ** 2 / 250 for count in counts) < 45  # chi-square, 15 degrees: one in 10,000 above 44.3


def test_shares_of_one_secret_differ_each_time() -> None:
    assert not set(split(SECRET, 5, 4)) & set(split(SECRET, 5, 4))


@pytest.mark.parametrize(
    ("secret", "holders", "needed"),
    [
        (b"", 3, 3),
        (SECRET[:-1], 3, 3),
        (SECRET + b"\0", 3, 3),
        (SECRET, 3, 4),
        (SECRET, 3, 0),
        (SECRET, 0, 0),
        (SECRET, 1001, 668),
    ],
)
def test_what_cannot_be_shared_is_refused(secret: bytes, holders: int, needed: int) -> None:
    with pytest.raises(ShareInvalid):
        split(secret, holders, needed)


# Liars -----------------------------------------------------------------------------------------------------------------


def falsified(shares: dict[int, bytes], liars: tuple[int, ...]) -> dict[int, bytes]:
    """`shares` where each liar gives a well-formed share that is off by a number of its own."""
    changed = {liar: (int.from_bytes(shares[liar], "big") + 12345 + liar) % PRIME for liar in liars}
    return shares | {liar: value.to_bytes(33, "big") for liar, value in changed.items()}


@pytest.mark.parametrize(("holders", "given"), [(4, 4), (7, 6), (7, 7), (10, 9), (10, 10), (12, 12)])
def test_liars_are_outvoted_and_named_wherever_they_sit(holders: int, given: int) -> None:
    needed = sharing.threshold(holders)
    honest = dict(list(enumerate(split(SECRET, holders, needed)))[:given])
    for number in range(1, (given - needed + 1) // 2 + 1):
        for liars in itertools.combinations(honest, number):
            if given - number >= needed:
                assert recover(falsified(honest, liars), needed, is_secret) == (SECRET, frozenset(liars))


def test_as_many_liars_as_there_are_shares_to_spare_cannot_hide_the_secret() -> None:
    honest = dict(enumerate(split(SECRET, 13, 9)))
    for liars in [(0, 1, 2, 3), (9, 10, 11, 12), (0, 4, 8, 12)]:
        assert recover(falsified(honest, liars), 9, is_secret) == (SECRET, frozenset(liars))


def test_one_liar_too_many_leaves_no_secret() -> None:
    honest = dict(enumerate(split(SECRET, 7, 5)))
    with pytest.raises(ShareInvalid):
        recover(falsified(honest, (0, 3, 5)), 5, is_secret)


def test_two_liars_whose_errors_cancel_blame_nobody_else() -> None:
    """Places 0 and 1 lie so that the first subset gives the secret all the same; the polynomial through it is not the true
    one, and honest places 7, 8 and 9 would stand accused."""
    honest = dict(enumerate(split(SECRET, 10, 7)))
    chosen = range(7)
    weight = [math.prod((Fraction(j + 1, j - i) for j in chosen if j != i), start=Fraction(1)) for i in (0, 1)]
    ratio = -weight[0] / weight[1]
    error = 999
    shift = {0: error, 1: error * ratio.numerator * pow(ratio.denominator, -1, PRIME)}
    lying = honest | {i: ((int.from_bytes(honest[i], "big") + e) % PRIME).to_bytes(33, "big") for i, e in shift.items()}
    assert constant_of({i: lying[i] for i in chosen}) == int.from_bytes(SECRET, "big")
    assert recover(lying, 7, is_secret) == (SECRET, frozenset({0, 1}))


def test_four_liars_among_fifty_are_outvoted() -> None:
    honest = dict(enumerate(split(SECRET, 50, 34)))
    assert recover(falsified(honest, (0, 10, 20, 49)), 34, is_secret) == (SECRET, frozenset({0, 10, 20, 49}))


MALFORMED = [b"", b"\0" * 32, b"\0" * 34, b"\xff" * 33, PRIME.to_bytes(33, "big"), b"\2" + b"\0" * 32]


@pytest.mark.parametrize("share", MALFORMED)
def test_a_malformed_share_is_a_wrong_share_of_its_place(share: bytes) -> None:
    honest = dict(enumerate(split(SECRET, 5, 4)))
    assert recover(honest | {2: share}, 4, is_secret) == (SECRET, frozenset({2}))
    with pytest.raises(ShareInvalid):
        recover(honest | {2: share, 3: share}, 4, is_secret)


@pytest.mark.parametrize("place", [0, 4])
def test_a_share_is_written_in_one_way_only(place: int) -> None:
    honest = dict(enumerate(split(SECRET, 5, 4)))
    again = (int.from_bytes(honest[place], "big") + PRIME).to_bytes(33, "big")
    assert recover(honest | {place: again}, 4, is_secret) == (SECRET, frozenset({place}))


@pytest.mark.parametrize("place", [-1, 1000, PRIME - 1, 10**90])
def test_a_place_that_does_not_exist_holds_no_share(place: int) -> None:
    """At place -1 the polynomial is the secret itself."""
    honest = dict(enumerate(split(SECRET, 5, 4)))
    assert recover(honest | {place: SECRET.rjust(33, b"\0")}, 4, is_secret) == (SECRET, frozenset({place}))


def test_a_constant_that_is_no_secret_is_passed_over() -> None:
    large = (2**256 + 5).to_bytes(33, "big")  # a field element, but not 32 bytes
    with pytest.raises(ShareInvalid):
        recover({0: large, 1: large, 2: large}, 1, is_secret)


@pytest.mark.parametrize("needed", [0, -1, 6])
def test_a_threshold_out_of_range_gives_nothing(needed: int) -> None:
    with pytest.raises(ShareInvalid):
        recover(dict(enumerate(split(SECRET, 5, 4))), needed, lambda _: True)


def test_the_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "SUBSETS_MAX", 50)
    asked: list[bytes] = []
    with pytest.raises(ShareInvalid):
        recover(dict(enumerate(split(SECRET, 30, 21))), 21, lambda found: bool(asked.append(found)))
    assert 1 <= len(asked) <= 50


# Masks -----------------------------------------------------------------------------------------------------------------


def keystream(key: bytes, size: int) -> bytes:
    """All of it at once."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))


def masked_plainly(vector: Vector, masks: list[Mask]) -> tuple[list[int], list[int]]:
    """What `add_masks` should make of `vector`, in Python's integers."""
    width = vector.values.itemsize
    values, counts = vector.values.tolist(), vector.counts.tolist()
    for key, sign in masks:
        stream = keystream(key, vector.values.nbytes + vector.counts.nbytes)
        of_values, of_counts = stream[: vector.values.nbytes], stream[vector.values.nbytes :]
        words = struct.unpack(f"<{len(values)}{'Q' if width == 8 else 'I'}", of_values)
        values = [(v + sign * w) % 2 ** (8 * width) for v, w in zip(values, words, strict=True)]
        words = struct.unpack(f"<{len(counts)}Q", of_counts)
        counts = [(c + sign * w) % 2**64 for c, w in zip(counts, words, strict=True)]
    return values, counts


def keys_of(number: int) -> list[Mask]:
    return [(hashlib.sha256(f"mask {i}".encode()).digest(), 1 if i % 3 else -1) for i in range(number)]


def test_the_keystream_is_aes_256_in_counter_mode_from_zero() -> None:
    vector = Encoding(4, 0, 32, 0, 3).zeros()
    add_masks(vector, [(bytes.fromhex(VECTORS["keystream"]["key"]), 1)])
    assert vector.values.tobytes().hex() == VECTORS["keystream"]["first_block"]  # NIST's AESAVS, KeySbox of 256 bits


@pytest.mark.parametrize("known", VECTORS["masks"], ids=lambda known: f"{known['bits']}-{len(known['masks'])}")
def test_masks_are_the_known_ones(known: dict[str, Any]) -> None:
    encoding = Encoding(known["values"], known["counts"], known["bits"], 0, 3)
    vector = encoding.zeros()
    add_masks(vector, [(bytes.fromhex(key), sign) for key, sign in known["masks"]])
    assert encoding.bytes_of(vector).tobytes().hex() == encoding.packed(vector).hex() == known["packed"]


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=40),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9),
    st.sampled_from([np.dtype("<u4"), np.dtype("<u8")]),
    st.lists(st.tuples(secrets, st.sampled_from([1, -1])), max_size=4),
)
def test_masks_are_added_as_with_whole_numbers(
    values: list[int], counts: list[int], word: np.dtype[Any], masks: list[Mask]
) -> None:
    vector = Vector(np.array(values, np.uint64).astype(word), np.array(counts, np.uint64))
    expected = masked_plainly(vector, masks)
    add_masks(vector, masks)
    assert (vector.values.tolist(), vector.counts.tolist()) == expected


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("beyond", [-5, -1, 0, 1, 3])
@pytest.mark.parametrize("blocks", [1, 2])
def test_nothing_happens_at_the_border_of_a_block(bits: Any, beyond: int, blocks: int) -> None:
    length = blocks * MASK_BLOCK_BYTES * 8 // bits + beyond
    vector = Encoding(length, 3, bits, 0, 3).zeros()
    vector.values[:] = np.arange(length)
    expected = masked_plainly(vector, keys_of(2))
    add_masks(vector, keys_of(2))
    assert (vector.values.tolist(), vector.counts.tolist()) == expected


def test_more_counts_than_fit_into_a_block_are_masked_too() -> None:
    vector = Encoding(1, MASK_BLOCK_BYTES // 8 + 5, 32, 0, 3).zeros()
    expected = masked_plainly(vector, keys_of(1))
    add_masks(vector, keys_of(1))
    assert vector.counts.tolist() == expected[1]


@settings(max_examples=50)
@given(st.sampled_from(BITS), st.integers(0, 30), st.integers(0, 3), st.integers(2, 6), st.integers(0, 2**32))
def test_masks_of_pairs_vanish_from_the_sum(bits: Any, values: int, counts: int, sites: int, seed: int) -> None:
    draw, encoding = np.random.default_rng(seed), Encoding(values, counts, bits, 3, sites)
    plain, masked = encoding.zeros(), encoding.zeros()
    pair = {couple: draw.bytes(32) for couple in itertools.combinations(range(sites), 2)}
    for site in range(sites):
        update = draw.normal(0, 9, values).astype(np.float32)
        sent = encoding.encode(update, int(draw.integers(100)), draw.integers(0, 1000, counts))
        plain.add(sent)
        add_masks(sent, [(key, 1 if couple[0] == site else -1) for couple, key in pair.items() if site in couple])
        masked.add(encoding.vector_of(encoding.bytes_of(sent).tobytes()))
    assert bytes(encoding.bytes_of(masked)) == bytes(encoding.bytes_of(plain))


@pytest.mark.parametrize("bad", [(b"", 1), (bytes(16), 1), (bytes(33), 1), (bytes(32), 0), (bytes(32), 2)])
def test_a_malformed_mask_leaves_the_vector_as_it_was(bad: Mask) -> None:
    vector = Encoding(8, 1, 32, 0, 3).zeros()
    with pytest.raises(MessageMalformed):
        add_masks(vector, [(bytes(32), 1), bad])
    assert not vector.values.any() and not vector.counts.any()


# Words -----------------------------------------------------------------------------------------------------------------


def word_of(value: np.float32, weight: int, encoding: Encoding) -> tuple[int, bool]:
    """A value's word and whether it was clipped, in rationals; the one rounding before the last is that of a float64."""
    product = Fraction(float(value)) * weight * Fraction(2) ** encoding.scale
    word = round(Fraction(float(product)))
    return max(-encoding.limit, min(encoding.limit, word)), abs(word) > encoding.limit


def signed(word: int, bits: int) -> int:
    word %= 2**bits
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def no_counts() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.zeros(0, np.int64)


@pytest.mark.parametrize("known", VECTORS["encodings"], ids=lambda known: str(known["bits"]))
def test_words_are_the_known_ones(known: dict[str, Any]) -> None:
    values = np.frombuffer(bytes.fromhex("".join(known["values"])), "<f4")
    encoding = Encoding(len(values), len(known["counts"]), known["bits"], known["scale"], known["sites"])
    made = encoding.encode(values, known["weight"], np.array(known["counts"], np.int64))
    assert [signed(word, known["bits"]) for word in made.values.tolist()] == known["words"]
    assert encoding.bytes_of(made).tobytes().hex() == encoding.packed(made).hex() == known["packed"]
    assert encoding.bytes_of(encoding.vector_of(bytes.fromhex(known["packed"]))).tobytes().hex() == known["packed"]


@given(
    st.lists(finite, max_size=30), st.integers(0, 2**31 - 1), st.sampled_from(BITS), st.integers(-256, 256),
    st.integers(1, 1000),
)  # fmt: skip
def test_values_become_the_words_of_rational_arithmetic(
    values: list[float], weight: int, bits: Any, scale: int, sites: int
) -> None:
    encoding = Encoding(len(values), 0, bits, scale, sites)
    floats = np.array(values, np.float32)
    expected = [word_of(value, weight, encoding) for value in floats]
    made = encoding.encode(floats, weight, no_counts())
    assert [signed(word, bits) for word in made.values.tolist()] == [word for word, _ in expected]
    assert made.counts.tolist() == [sum(clipped for _, clipped in expected)]


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20), st.integers(0, 500), st.sampled_from([32, 64]))
def test_a_word_is_within_half_a_unit_of_the_exact_product(values: list[float], weight: int, bits: Any) -> None:
    encoding = Encoding(len(values), 0, bits, 12, 20)
    made = encoding.encode(np.array(values, np.float32), weight, no_counts())
    for value, word in zip(values, made.values.tolist(), strict=True):
        assert abs(signed(word, bits) - Fraction(value) * weight * 2**12) <= Fraction(1, 2)


def test_halves_go_to_the_even_neighbour() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    made = Encoding(6, 0, 32, 0, 3).encode(values, 1, no_counts())
    assert [signed(word, 32) for word in made.values.tolist()] == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("length", [0, 1, 65535, 65536, 65537, 131072, 131073])
def test_blocks_of_encode_leave_no_trace(length: int) -> None:
    values = np.random.default_rng(length).normal(0, 1, length).astype(np.float32)
    encoding = Encoding(length, 1, 32, 24, 20)
    made = encoding.encode(values, 7, np.array([3]))
    words = np.rint(values.astype(np.float64) * 7 * 2**24)
    assert made.counts.tolist() == [3, int((abs(words) > encoding.limit).sum())]
    assert np.array_equal(made.values.view(np.int32), np.clip(words, -encoding.limit, encoding.limit))


@pytest.mark.parametrize("sites", [1, 2, 3, 20, 999, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_the_limit_is_the_largest_that_the_word_has_room_for(bits: Any, sites: int) -> None:
    limit = Encoding(1, 0, bits, 0, sites).limit
    assert limit * sites <= 2 ** (bits - 1) - 1 and int(float(limit)) == limit
    assert (limit + 1) * sites > 2 ** (bits - 1) - 1 or (bits == 64 and limit.bit_length() >= 53)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sites", [1, 2, 3, 20, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_no_sum_of_all_sites_leaves_the_word(bits: Any, sites: int, sign: int) -> None:
    """Every site as far out as it can be: more would be clipped, and the sum is still exact."""
    encoding = Encoding(3, 1, bits, -30, sites)
    sent = encoding.encode(np.full(3, sign * 3e38, np.float32), 2**31 - 1, np.array([COUNT_MAX]))
    total = encoding.zeros()
    for _ in range(sites):
        total.add(encoding.vector_of(encoding.bytes_of(sent)))
    said = encoding.decode(encoding.vector_of(encoding.bytes_of(total)))
    assert said.values.tolist() == [float(sign * encoding.limit * sites) * 2.0**30] * 3
    assert said.counts.tolist() == [sites * COUNT_MAX] and said.clipped == 3 * sites


@given(st.sampled_from(BITS), st.integers(1, 12), st.integers(-20, 20), st.data())
def test_a_sum_is_the_sum_of_what_was_encoded(bits: Any, sites: int, scale: int, data: st.DataObject) -> None:
    encoding = Encoding(4, 2, bits, scale, sites)
    total, words, clipped, counted = encoding.zeros(), [0] * 4, 0, [0, 0]
    for _ in range(sites):
        values = np.array(data.draw(st.lists(finite, min_size=4, max_size=4)), np.float32)
        weight = data.draw(st.integers(0, 1000))
        counts = data.draw(st.lists(st.integers(0, COUNT_MAX), min_size=2, max_size=2))
        expected = [word_of(value, weight, encoding) for value in values]
        words = [a + b for a, (b, _) in zip(words, expected, strict=True)]
        clipped += sum(c for _, c in expected)
        counted = [a + b for a, b in zip(counted, counts, strict=True)]
        total.add(encoding.encode(values, weight, np.array(counts, np.int64)))
    said = encoding.decode(total)
    assert said.values.tolist() == [float(word) * 2.0**-scale for word in words]
    assert (said.counts.tolist(), said.clipped) == (counted, clipped)
    assert said.values.dtype == np.float64 and said.counts.dtype == np.int64


def test_clipping_begins_beyond_the_limit() -> None:
    encoding = Encoding(2, 0, 32, 0, 3)
    values = np.array([1, -1], np.float32)
    assert encoding.encode(values, encoding.limit, no_counts()).counts.tolist() == [0]
    made = encoding.encode(values, encoding.limit + 1, no_counts())
    assert made.counts.tolist() == [2]
    assert made.values.view(np.int32).tolist() == [encoding.limit, -encoding.limit]


def test_what_was_added_can_be_taken_away() -> None:
    encoding = Encoding(50, 2, 32, 20, 3)
    first, second = encoding.zeros(), encoding.zeros()
    add_masks(first, keys_of(1))
    add_masks(second, keys_of(2))
    before = bytes(encoding.bytes_of(first))
    first.add(second)
    assert bytes(encoding.bytes_of(first)) != before
    first.subtract(second)
    assert bytes(encoding.bytes_of(first)) == before


@given(st.sampled_from([16, 24]), st.lists(st.integers(0, 2**32 - 1), max_size=12))
def test_packing_keeps_each_word_modulo_its_width(bits: Any, words: list[int]) -> None:
    encoding = Encoding(len(words), 0, bits, 0, 3)
    packed = bytes(encoding.bytes_of(Vector(np.array(words, np.uint32), np.zeros(1, np.uint64))))
    assert packed == b"".join((word % 2**bits).to_bytes(bits // 8, "little") for word in words) + bytes(8)
    assert encoding.vector_of(packed).values.tolist() == [word % 2**bits for word in words]


def mean_error(values: int, sites: int = 20) -> float:
    """Relative error (L2) of the mean, weighted by cases, of updates that went through words and back."""
    generator = np.random.default_rng(7)
    encoding = Encoding(values, 0, 32, 18, sites)  # the largest words are below 7 millions of a limit of 107 millions
    total, exact, cases = encoding.zeros(), np.zeros(values), 0
    for site in range(sites):
        update = generator.standard_normal(values, np.float32) * np.float32(0.01)
        weight = 25 * site + 20
        total.add(encoding.encode(update, weight, no_counts()))
        exact += update.astype(np.float64) * weight
        cases += weight
    said = encoding.decode(total)
    assert said.clipped == 0
    return float(np.linalg.norm(said.values / cases - exact / cases) / np.linalg.norm(exact / cases))


def test_the_mean_of_twenty_sites_is_right_to_one_in_a_million() -> None:
    assert 0 < mean_error(100_000) < 1e-6


@pytest.mark.slow
def test_the_mean_of_twenty_large_updates_is_right_to_one_in_a_million() -> None:
    assert 0 < mean_error(7_000_000) < 1e-6


# Hostile contributions and bytes ---------------------------------------------------------------------------------------

GOOD = Encoding(3, 2, 32, 10, 5)
OK_VALUES, OK_COUNTS = np.zeros(3, np.float32), np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("values", "weight", "counts"),
    [
        (np.zeros(2, np.float32), 1, OK_COUNTS),
        (np.zeros(4, np.float32), 1, OK_COUNTS),
        (np.zeros((3, 1), np.float32), 1, OK_COUNTS),
        (np.zeros(3, np.float16), 1, OK_COUNTS),
        (np.zeros(3, np.int32), 1, OK_COUNTS),
        (np.array([0, np.nan, 0], np.float32), 1, OK_COUNTS),
        (np.array([np.inf, 0, 0], np.float32), 1, OK_COUNTS),
        (np.array([0, 0, -np.inf], np.float32), 1, OK_COUNTS),
        (np.array([np.inf, -np.inf, np.nan], np.float32), 0, OK_COUNTS),
        (np.array([0, np.inf, 0], np.float32), 0, OK_COUNTS),
        (OK_VALUES, -1, OK_COUNTS),
        (OK_VALUES, 2**31, OK_COUNTS),
        (OK_VALUES, 1, np.zeros(1, np.int64)),
        (OK_VALUES, 1, np.zeros(3, np.int64)),
        (OK_VALUES, 1, np.zeros(2, np.uint64)),
        (OK_VALUES, 1, np.zeros(2, np.float64)),
        (OK_VALUES, 1, np.array([0, -1])),
        (OK_VALUES, 1, np.array([COUNT_MAX + 1, 0])),
    ],
)  # fmt: skip
def test_a_contribution_out_of_range_becomes_no_vector(values: Any, weight: int, counts: Any) -> None:
    with pytest.raises(MessageMalformed):
        GOOD.encode(values, weight, counts)


def test_one_value_that_is_not_finite_is_found_in_any_block() -> None:
    for at in (0, 65535, 65536, 99_999):
        values = np.zeros(100_000, np.float32)
        values[at] = np.nan
        with pytest.raises(MessageMalformed):
            Encoding(100_000, 0, 32, 0, 3).encode(values, 1, no_counts())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("values", [0, 1, 3, 5])
def test_bytes_of_another_size_are_no_vector(bits: Any, values: int) -> None:
    encoding = Encoding(values, 1, bits, 0, 3)
    assert encoding.size == len(encoding.bytes_of(encoding.zeros())) == values * bits // 8 + 16
    for size in {0, 1, 8, encoding.size - 1, encoding.size + 1, encoding.size * 2} - {encoding.size}:
        with pytest.raises(MessageMalformed):
            encoding.vector_of(bytes(size))


@given(st.binary(max_size=80), st.sampled_from(BITS), st.integers(0, 5))
def test_any_bytes_are_a_vector_or_malformed(data: bytes, bits: Any, values: int) -> None:
    encoding = Encoding(values, 1, bits, 0, 3)
    try:
        vector = encoding.vector_of(data)
    except MessageMalformed:
        assert len(data) != encoding.size
    else:
        assert bytes(encoding.bytes_of(vector)) == data


@pytest.mark.parametrize("bits", BITS)
def test_a_vector_does_not_follow_the_bytes_it_was_read_from(bits: Any) -> None:
    encoding = Encoding(3, 1, bits, 0, 3)
    data = bytearray(b"\1" * (encoding.size + 1))
    vector = encoding.vector_of(memoryview(data)[1:])  # not aligned either
    before = bytes(encoding.bytes_of(vector))
    data[:] = bytes(len(data))
    vector.values[0] += 1
    vector.values[0] -= 1
    assert bytes(encoding.bytes_of(vector)) == before


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ([5 * COUNT_MAX + 1, 0, 0], "one more than five sites can have"),
        ([0, 2**63, 0], "wrapped"),
        ([0, 2**64 - 1, 0], "minus one"),
        ([0, 0, 16], "more clipped values than there are"),
    ],
)
def test_counts_that_sites_cannot_have_are_not_decoded(counts: list[int], why: str) -> None:
    with pytest.raises(MessageMalformed):
        GOOD.decode(Vector(np.zeros(3, np.uint32), np.array(counts, np.uint64)))


def test_a_sum_with_a_mask_left_in_it_is_not_decoded() -> None:
    for key, sign in keys_of(20):
        vector = GOOD.zeros()
        add_masks(vector, [(key, sign)])
        with pytest.raises(MessageMalformed):
            GOOD.decode(vector)


FOREIGN = [Encoding(4, 2, 32, 10, 5), Encoding(3, 1, 32, 10, 5), Encoding(3, 2, 64, 10, 5)]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_vector_of_another_encoding_is_not_taken(foreign: Encoding) -> None:
    vector, mine = foreign.zeros(), GOOD.zeros()
    for attempt in (GOOD.bytes_of, GOOD.packed, GOOD.decode, mine.add, mine.subtract):
        with pytest.raises(MessageMalformed):
            attempt(vector)
    assert not mine.values.any() and not mine.counts.any()


@pytest.mark.parametrize(
    "change",
    [{"bits": 8}, {"bits": 33}, {"sites": 0}, {"sites": 1001}, {"scale": 257}, {"scale": -257}, {"values": -1}, {"counts": -1}],
)  # fmt: skip
def test_an_encoding_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MessageMalformed):
        Encoding(**({"values": 3, "counts": 2, "bits": 32, "scale": 0, "sites": 3} | change))
