"""Secret shares, mask expansion and fixed-point words: the exact arithmetic below secure aggregation.

Everything here is a function of its arguments. Which secrets are shared, which keys make masks and who may see what is
decided in `privacy.secagg`; this module promises that

1. any `threshold` shares give the secret back and fewer say nothing about it (Shamir 1979);
2. masks that were added with +1 at one site and -1 at another vanish from the sum, to the last bit;
3. no sum of the agreed number of sites leaves the range of its word, whatever the sites' values are; what had to be
   clipped for that is counted;
4. above FULL_GRAPH_SITES sites, masking with some of the others (Bell et al. 2020) protects as stated in `degree`.

Python's integers do not compute in constant time. That is accepted: a secret is split once, in under a millisecond, and
the coordinator has no other clock on it than the network.
"""

import hashlib
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from privacy.errors import MessageMalformed, ShareInvalid

SECRET_BYTES = 32
SHARE_BYTES = 33  # a field element does not fit into 32 bytes
PRIME = 2**256 + 297  # the smallest prime above 2**256: every secret of 32 bytes is an element of the field
HOLDERS_MAX = 1000  # of one secret, and sites of one sum
SUBSETS_MAX = 2000  # subsets of shares that `recover` tries: under 2 s for 50 holders, whatever the liars send

COUNT_MAX = 2**53  # of one site; 1000 sites stay below 2**63, and a JSON reader keeps every digit
SCALE_MAX = 256  # float32 x 2**31 x 2**256 is below 2**416: no product overflows or underflows a float64 (2**±1022)
WEIGHT_MAX = 2**31 - 1
VALUES_MAX = 2**40
COUNTS_MAX = 2**20
ENCODE_VALUES = 64 * 1024  # values per block of `encode`: 512 KiB of float64 stay in the L2 cache

MASK_KEY_BYTES = 32
MASK_BLOCK_BYTES = 192 * 1024  # zeros, keystream and words of a block fit into an L2 cache of 1 MiB, and calls are few

FULL_GRAPH_SITES = 50
RING = b"isocenter/v1/secagg/ring"

Words = NDArray[np.unsignedinteger[Any]]
Mask = tuple[bytes, int]
"""A 32-byte key that is used for this one vector only, and the sign, +1 or -1, with which its keystream is added."""


# Shares of a secret --------------------------------------------------------------------------------------------------


def threshold(holders: int) -> int:
    """The smallest number of shares above two thirds of `holders`."""
    return 2 * holders // 3 + 1


def split(secret: bytes, holders: int, threshold: int, entropy: Callable[[int], bytes] = os.urandom) -> list[bytes]:
    """One share of 33 bytes for each of `holders` places: any `threshold` give `secret` back, fewer say nothing.

    The share of place i is the value at x = i + 1, big-endian, of a polynomial over GF(PRIME) whose constant term is
    the secret and whose other coefficients are uniform. Raises ShareInvalid for a secret that is not 32 bytes long or a
    threshold outside 1..holders..1000.
    """
    if len(secret) != SECRET_BYTES:
        raise ShareInvalid(f"a secret of {len(secret)} bytes; only secrets of {SECRET_BYTES} bytes are shared")
    if not 1 <= threshold <= holders <= HOLDERS_MAX:
        raise ShareInvalid(f"no {holders} shares of which {threshold} are needed; at most {HOLDERS_MAX} can be made")
    coefficients = [int.from_bytes(secret, "big"), *(_element(entropy) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, holders + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def _element(entropy: Callable[[int], bytes]) -> int:
    """A uniform element of the field: 257 bits, drawn again (every second time) until they are below PRIME."""
    while (value := int.from_bytes(entropy(SHARE_BYTES), "big") % 2**257) >= PRIME:
        pass
    return value


def recover(
    shares: Mapping[int, bytes], threshold: int, correct: Callable[[bytes], bool]
) -> tuple[bytes, frozenset[int]]:
    """The secret of which `shares` maps places (from 0) to shares, and the places whose share is wrong.

    `correct` knows the true secret when it sees it, by its public key or a commitment. At most SUBSETS_MAX subsets of
    `threshold` shares are tried: all of them where there are no more (up to 15 holders with a threshold above two
    thirds: every liar is outvoted if `threshold` honest shares are there), otherwise the first and then random ones,
    which no liar can foresee. Among 50 shares of which 34 are needed, 4 liars are outvoted but for one case in eight
    million, 5 but for one in sixty.

    The places are certain while at most (m - threshold + 1) / 2 of the m well-formed shares are wrong. With more, liars
    who work together can put the blame on others, but never another secret in place of the true one. A share is
    also wrong if whoever made it made it so. A malformed share is a wrong share of its place. Raises ShareInvalid if
    fewer than `threshold` are well-formed or no subset tried gives the secret.
    """
    read = {place: int.from_bytes(share, "big") for place, share in shares.items() if _is_share(place, share)}
    if not 1 <= threshold <= len(read):
        raise ShareInvalid(f"{len(read)} of {len(shares)} shares can be used, and {threshold} are needed")
    found: tuple[bytes, frozenset[int]] | None = None
    for chosen in _subsets(sorted(read), threshold):
        polynomial = _polynomial({place + 1: read[place] for place in chosen})
        constant = polynomial(0)
        if constant >= 2**256 or not correct(secret := constant.to_bytes(SECRET_BYTES, "big")):
            continue
        wrong = frozenset(place for place in read.keys() - set(chosen) if polynomial(place + 1) != read[place])
        if found is None or len(wrong) < len(found[1]):
            found = secret, wrong
        # Two polynomials with the same constant term share at most threshold - 2 further values, so no other has as few
        # wrong ones. Otherwise go on: liars inside the subset whose errors cancel at 0 would frame the others.
        if 2 * len(wrong) <= len(read) - threshold + 1:
            break
    if found is None:
        raise ShareInvalid(f"no {threshold} of the {len(shares)} shares that were tried together give the secret")
    return found[0], found[1] | (shares.keys() - read.keys())


def _is_share(place: int, share: bytes) -> bool:
    return 0 <= place < HOLDERS_MAX and len(share) == SHARE_BYTES and int.from_bytes(share, "big") < PRIME


def _subsets(places: list[int], size: int) -> Iterator[tuple[int, ...]]:
    if math.comb(len(places), size) <= SUBSETS_MAX:
        yield from itertools.combinations(places, size)
        return
    yield tuple(places[:size])
    draw = random.SystemRandom()
    for _ in range(SUBSETS_MAX - 1):
        yield tuple(sorted(draw.sample(places, size)))


def _polynomial(known: Mapping[int, int]) -> Callable[[int], int]:
    """The polynomial of least degree with these values, to be asked at any other point (barycentric Lagrange)."""
    points = tuple(known)
    terms = [value * weight % PRIME for value, weight in zip(known.values(), _weights(points), strict=True)]

    def value_at(x: int) -> int:
        product, total = 1, 0
        for point, term in zip(points, terms, strict=True):
            product = product * (x - point) % PRIME
            total += term * _inverse(x - point)
        return product * total % PRIME

    return value_at


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """1 / product of (x - other), for each x of `points`. Kept, since the secrets of one sum share their holders."""
    weights = []
    for x in points:
        product = 1
        for other in points:
            if other != x:
                product = product * (x - other) % PRIME
        weights.append(pow(product, -1, PRIME))
    return tuple(weights)


@lru_cache(maxsize=2 * HOLDERS_MAX + 1)
def _inverse(difference: int) -> int:
    return pow(difference, -1, PRIME)


# Words that can be summed --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Vector:
    """Words of one contribution, masked or not, or of a sum. They are added and subtracted modulo the word.

    values: uint32 (values,), or uint64 for an encoding of 64 bits; counts: uint64 (counts + 1,).
    """

    values: Words
    counts: Words

    def add(self, other: "Vector") -> None:
        """Add `other` in place; raises MessageMalformed if it has another shape or kind of word."""
        self._check_like(other)
        np.add(self.values, other.values, out=self.values)
        np.add(self.counts, other.counts, out=self.counts)

    def subtract(self, other: "Vector") -> None:
        """Subtract `other` in place; raises MessageMalformed if it has another shape or kind of word."""
        self._check_like(other)
        np.subtract(self.values, other.values, out=self.values)
        np.subtract(self.counts, other.counts, out=self.counts)

    def _check_like(self, other: "Vector") -> None:
        for mine, theirs in ((self.values, other.values), (self.counts, other.counts)):
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                raise MessageMalformed(
                    f"a vector of {theirs.shape} words of {theirs.dtype} for a sum of {mine.shape} words of {mine.dtype}"
                )


@dataclass(frozen=True, eq=False)
class Total:
    """What a sum says: the weighted sum (not the mean) of the values, the sums of the counts, how much was clipped."""

    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    clipped: int


@dataclass(frozen=True)
class Encoding:
    """How contributions become words that can be summed: fixed point for values, whole numbers for counts.

    values, counts: how many of each a contribution has; bits: width of a value's word; scale: a value is multiplied by
    2**scale before it is rounded; sites: how many contributions may be summed. Raises MessageMalformed for an encoding
    that is out of range.
    """

    values: int
    counts: int
    bits: Literal[16, 24, 32, 64]
    scale: int
    sites: int

    def __post_init__(self) -> None:
        ranges = {
            "values": (0, VALUES_MAX),
            "counts": (0, COUNTS_MAX),
            "scale": (-SCALE_MAX, SCALE_MAX),
            "sites": (1, HOLDERS_MAX),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise MessageMalformed(f"an encoding with {name} = {getattr(self, name)}, not in {low}..{high}")
        if self.bits not in (16, 24, 32, 64):
            raise MessageMalformed(f"an encoding of {self.bits} bits; there are 16, 24, 32 and 64")

    @property
    def limit(self) -> int:
        """The largest magnitude of one site's word: `sites` such words stay inside the signed range of `bits`.

        (2**(bits - 1) - 1) // sites, for 64 bits rounded down to the 53 significant bits of the float64 it is compared
        with.
        """
        largest = ((1 << self.bits - 1) - 1) // self.sites
        excess = max(0, largest.bit_length() - 53)
        return largest >> excess << excess

    @property
    def size(self) -> int:
        """Bytes of a packed vector."""
        return self.values * self.bits // 8 + (self.counts + 1) * 8

    @property
    def _word(self) -> np.dtype[Any]:
        return np.dtype("<u8" if self.bits == 64 else "<u4")

    def zeros(self) -> Vector:
        """The sum of no contributions."""
        return Vector(np.zeros(self.values, self._word), np.zeros(self.counts + 1, "<u8"))

    def encode(
        self, values: NDArray[np.float32] | NDArray[np.float64], weight: int, counts: NDArray[np.int64]
    ) -> Vector:
        """One site's contribution as words.

        values: float32 or float64 (values,), weight: 0..2**31 - 1, counts: int64 (counts,), each 0..COUNT_MAX. A value's word is
        value * weight * 2**scale as a float64, rounded half to even, in two's complement. Words beyond ±limit are
        clipped to it, and their number follows the caller's counts as one more count. Raises MessageMalformed for
        another length or type, a value that is not finite, a weight or a count out of range.
        """
        self._check_contribution(values, weight, counts)
        factor, limit = weight * 2.0**self.scale, float(self.limit)
        made = self.zeros()
        signed = made.values.view("<i8" if self.bits == 64 else "<i4")
        clipped = 0
        for start in range(0, self.values, ENCODE_VALUES):
            block = values[start : start + ENCODE_VALUES].astype(np.float64)
            largest = max(float(block.max()), -float(block.min()))
            if not math.isfinite(largest):  # so is the largest of a block with a NaN
                raise MessageMalformed("a value of the contribution is not a finite number")
            block *= factor
            np.rint(block, out=block)
            if largest * factor > limit:
                clipped += int(np.count_nonzero(np.abs(block) > limit))
                np.clip(block, -limit, limit, out=block)
            signed[start : start + ENCODE_VALUES] = block
        made.counts[:-1] = counts.view(np.uint64)
        made.counts[-1] = clipped
        return made

    def _check_contribution(
        self, values: NDArray[np.float32] | NDArray[np.float64], weight: int, counts: NDArray[np.int64]
    ) -> None:
        if values.dtype not in (np.float32, np.float64) or values.shape != (self.values,):
            raise MessageMalformed(
                f"values of shape {values.shape} and type {values.dtype}, not float32 or float64 ({self.values},)"
            )
        if counts.dtype != np.int64 or counts.shape != (self.counts,):
            raise MessageMalformed(
                f"counts of shape {counts.shape} and type {counts.dtype}, not int64 ({self.counts},)"
            )
        if not 0 <= weight <= WEIGHT_MAX:
            raise MessageMalformed(f"a weight of {weight}, not in 0..{WEIGHT_MAX}")
        if self.counts and not 0 <= counts.min() <= counts.max() <= COUNT_MAX:
            raise MessageMalformed(f"a count that is not in 0..{COUNT_MAX}")

    def bytes_of(self, vector: Vector) -> NDArray[np.uint8]:
        """uint8 (size,): the low `bits` of each value word, then each count in 8 bytes, all little-endian.

        Raises MessageMalformed if `vector` is of another encoding.
        """
        self._check_vector(vector)
        packed = np.empty(self.size, np.uint8)
        border = self.size - vector.counts.nbytes
        if self.bits == 24:
            packed[:border].reshape(-1, 3)[:] = vector.values.view(np.uint8).reshape(-1, 4)[:, :3]
        else:
            packed[:border].view(f"<u{self.bits // 8}")[:] = vector.values
        packed[border:] = vector.counts.view(np.uint8)
        return packed

    def packed(self, vector: Vector) -> bytes:
        """`bytes_of` as bytes: for whole words without a copy in between, which is as long as the model."""
        self._check_vector(vector)
        if self.bits < 32:
            return self.bytes_of(vector).tobytes()
        return b"".join((vector.values.data, vector.counts.data))

    def vector_of(self, data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> Vector:
        """The vector that `bytes_of` packed, in memory of its own; raises MessageMalformed for another size."""
        packed = np.frombuffer(data, np.uint8)
        if packed.size != self.size:
            raise MessageMalformed(f"a packed vector of {packed.size} bytes, not {self.size}")
        made = self.zeros()
        border = self.size - made.counts.nbytes
        if self.bits == 24:
            made.values.view(np.uint8).reshape(-1, 4)[:, :3] = packed[:border].reshape(-1, 3)
        else:
            made.values[:] = packed[:border].view(f"<u{self.bits // 8}")
        made.counts[:] = packed[border:].view("<u8")
        return made

    def decode(self, total: Vector) -> Total:
        """What the sum of up to `sites` encoded vectors says: values float64 (values,), counts int64 (counts,).

        Values are words modulo 2**bits, read as signed, divided by 2**scale: exact up to the 53 bits of a float64.
        Raises MessageMalformed for a vector of another encoding, or a count that `sites` sites cannot have: then masks
        are left in the sum, or somebody forged it.
        """
        self._check_vector(total)
        if total.counts[:-1].max(initial=0) > self.sites * COUNT_MAX or total.counts[-1] > self.sites * self.values:
            raise MessageMalformed("a count of the sum that no site can have: masks are left in it, or it is forged")
        signed = total.values.view("<i8" if self.bits == 64 else "<i4")
        if self.bits < 32:
            signed = (signed << (32 - self.bits)) >> (32 - self.bits)  # the sign is the top bit of the low `bits`
        values = signed.astype(np.float64)
        values *= 2.0**-self.scale
        return Total(values, total.counts[:-1].astype(np.int64), int(total.counts[-1]))

    def _check_vector(self, vector: Vector) -> None:
        values, counts = vector.values, vector.counts
        if values.dtype != self._word or values.shape != (self.values,):
            raise MessageMalformed(f"words of shape {values.shape} and type {values.dtype}, not ({self.values},)")
        if counts.dtype != np.uint64 or counts.shape != (self.counts + 1,):
            raise MessageMalformed(f"counts of shape {counts.shape} and type {counts.dtype}, not ({self.counts + 1},)")


# Masks ---------------------------------------------------------------------------------------------------------------


def add_masks(vector: Vector, masks: Sequence[Mask]) -> None:
    """Add to `vector`, in place and modulo the word, each mask's keystream times its sign.

    The keystream of a key is AES-256-CTR from a counter block of zeros, read as little-endian words: first as many
    bytes as `vector.values` has, then as many as `vector.counts` has. A zero counter block is safe because a key serves
    one vector only. For 16 and 24 bits the words in memory have 32: what `Encoding.bytes_of` cuts off does no harm to
    the sum, since 2**16 and 2**24 divide 2**32. Raises MessageMalformed, with `vector` untouched, for a key that is not
    32 bytes long or a sign that is not +1 or -1.
    """
    for key, sign in masks:
        if len(key) != MASK_KEY_BYTES or sign not in (1, -1):
            raise MessageMalformed(f"a mask with a key of {len(key)} bytes and the sign {sign}")
    streams = [
        (Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor(), np.add if sign == 1 else np.subtract)
        for key, sign in masks
    ]
    zeros = memoryview(bytes(MASK_BLOCK_BYTES))
    keystream = np.empty(MASK_BLOCK_BYTES, np.uint8)
    sink = keystream.data
    for words in (vector.values, vector.counts):
        step, whole = MASK_BLOCK_BYTES // words.itemsize, keystream.view(words.dtype)
        for start in range(0, len(words), step):
            # All masks go over one block before the next one is touched, so that it stays in the cache.
            block = words[start : start + step]
            source, mask = zeros[: block.nbytes], whole[: len(block)]
            for stream, combine in streams:
                stream.update_into(source, sink)
                combine(block, mask, out=block)


# Who masks with whom -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def degree(sites: int) -> int:
    """With how many of the others each of `sites` participants exchanges masks and shares.

    With all of them up to FULL_GRAPH_SITES. Above, the smallest even k for which nothing below can happen, about 0.68
    of the sites; the counts are worst cases, so no order of the ring and no choice of participants is a lucky one.

    Assumed: at most c = sites // 10 participants collude with the coordinator, and as many are lost before the vectors
    are in and again before the sum is opened. The secrets of a site are shared among N = k + 1 holders (its neighbours
    and itself), t = threshold(N) of whom rebuild one. An honest site gives one kind of share for each peer, once; only
    when at least t of its own holders survived, so it counts at most N - t as absent or lost; and only when all
    survivors named to it masked for the same participants, of whom at most sites - threshold(sites) are absent.

    1. Both secrets of a site take 2t shares. Honest holders give one each and colluding ones two: 2t <= N + c.
    2. The sum of a part of the survivors can be read once no mask links it to the rest. On the ring this takes two gaps
       of k/2 places in a row, so k - c honest sites that are absent or counted as lost, even if the coordinator tells
       every site of other losses. A lost one takes t - c honest shares. With q absent ones, sites - c - q honest sites
       can give N - t each, less one for every absent holder of theirs: q(k - c - q + 1) less. Hence the part is read
       only if (k - c - q)(t - c) <= (sites - c - q)(N - t) - q(k - c - q + 1). The difference of the two sides is
       convex in q, so its ends 0 and sites - threshold(sites) decide.
    3. A secret is beyond reach if more than N - t of its holders are lost.

    Raises MessageMalformed for more than 1000 sites.
    """
    if not 0 <= sites <= HOLDERS_MAX:
        raise MessageMalformed(f"a sum of {sites} sites; at most {HOLDERS_MAX} can take part")
    if sites > FULL_GRAPH_SITES:
        c = sites // 10
        for k in range(2, sites - 1, 2):
            holders, t = k + 1, threshold(k + 1)
            one_kind = 2 * t > holders + c
            one_part = all(
                (k - c - q) * (t - c) > (sites - c - q) * (holders - t) - q * (k - c - q + 1)
                for q in (0, sites - threshold(sites))
            )
            if one_kind and one_part and 2 * c <= holders - t:
                return k
    return max(0, sites - 1)


def neighbours(names: Sequence[str], seed: bytes) -> dict[str, list[str]]:
    """For each participant the names, sorted, of those it exchanges masks and shares with: `degree` of them.

    The participants stand on a ring in the order of SHA-256(seed + label + name), and each is linked to the nearest on
    either side. The relation is symmetric and does not depend on the order of `names`. Raises MessageMalformed for a
    name that comes twice or more than 1000 names.
    """
    if len(set(names)) != len(names):
        raise MessageMalformed("a site comes twice among the participants of a sum")
    ring = sorted(names, key=lambda name: hashlib.sha256(seed + RING + name.encode()).digest())
    k = degree(len(ring))
    if k >= len(ring) - 1:
        return {name: sorted(other for other in ring if other != name) for name in sorted(ring)}
    around = [offset for offset in range(-k // 2, k // 2 + 1) if offset]
    linked = {name: sorted(ring[(place + o) % len(ring)] for o in around) for place, name in enumerate(ring)}
    return dict(sorted(linked.items()))
