"""A second implementation of the masked sum, naive and slow, that shares no code with `privacy.secagg`.

It knows the layout of the wire from the protocol's text alone: HKDF is written out over HMAC, AES-CTR over single blocks of AES,
Shamir over Python's integers, sums over lists. Of the library it takes X25519, ECDSA, AES and AES-GCM. What it opens from the
bytes on the wire must be what `Aggregator.finish` opens; what it derives is frozen in vectors/secagg.json.
"""

import hashlib
import hmac
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PRIME = 2**256 + 297
BUNDLE, SHARE, SEALED = 32 + 32 + 32 + 32 + 64, 33, 66 + 16
NONE = b"\xff" * SHARE
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
LABEL = b"isocenter/v1/sum/"


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, one block of output."""
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def derive(secret: bytes, use: bytes, context: bytes, *names: str) -> bytes:
    info = LABEL + use + b"\n" + context
    for name in names:
        info += b"\n" + name.encode()
    return hkdf(secret, info)


def canonical(study: str, run: str, attempt: int, number: int) -> bytes:
    """The place of a sum as JSON with sorted keys and no spaces."""
    text = f'{{"attempt":{attempt},"run":{json.dumps(run)},"study":{json.dumps(study)},"sum":{number},"version":1}}'
    return text.encode()


def commitment(seed: bytes) -> bytes:
    return sha256(LABEL, b"commitment\n", seed)


def agree(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def unsigned_bundle(site: str, cipher: bytes, mask: bytes, seed: bytes) -> bytes:
    """Name, two public keys and commitment: what stands before the signature."""
    return site.encode() + bytes(32 - len(site)) + public_of(cipher) + public_of(mask) + commitment(seed)


def signed_bytes(place: bytes, unsigned: bytes) -> bytes:
    """What the enrolled key signs, its label included."""
    return b"isocenter/v1/sum-keys\n" + place + b"\n" + unsigned


def vouch_bytes(bound: bytes) -> bytes:
    """What a site signs when it has masked, the label included."""
    return b"isocenter/v1/sum-context\n" + bound


def sign(enrolled: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """r and s of the deterministic signature of RFC 6979."""
    r, s = decode_dss_signature(enrolled.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def malleated(bundle: bytes) -> bytes:
    """The same keys with the other signature that ECDSA lets anybody compute."""
    s = P256_ORDER - int.from_bytes(bundle[-32:], "big")
    return bundle[:-32] + s.to_bytes(32, "big")


def low_order_points() -> list[bytes]:
    """Every encoding of a point of order 1, 2, 4 or 8 on Curve25519 and its twist, canonical or not."""
    p = 2**255 - 19
    eight = [
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    ]
    values = [0, 1, *eight, p - 1, p, p + 1]
    return [(value + high).to_bytes(32, "little") for value in values for high in (0, 2**255)]


def transcript(place: bytes, data: bytes, previous: Sequence[str] = ()) -> bytes:
    before = sha256(LABEL, b"survivors\n", " ".join(previous).encode())
    return sha256(LABEL, b"transcript\n", place, b"\n", before, data)


def context(told: bytes, participants: Sequence[str], order: bytes) -> bytes:
    return sha256(LABEL, b"context\n", told, b"\n", " ".join(participants).encode(), b"\n", order)


def keystream(key: bytes, size: int) -> bytes:
    """AES-256-CTR from a counter of zero, block by block."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the parts of CTR
    return block.update(b"".join(i.to_bytes(16, "big") for i in range(-(-size // 16))))[:size]


def share_value(share: bytes) -> int:
    return int.from_bytes(share, "big")


def lagrange(points: Mapping[int, int], at: int = 0) -> int:
    """The value at `at` of the polynomial through `points`, over the field."""
    total = 0
    for x, y in points.items():
        above, below = 1, 1
        for other in points:
            if other != x:
                above, below = above * (at - other) % PRIME, below * (x - other) % PRIME
        total += y * above * pow(below, PRIME - 2, PRIME)
    return total % PRIME


def rebuild(shares: Mapping[int, bytes], needed: int, public: bytes, commit: bytes) -> dict[str, bytes]:
    """The secrets, as s or b, that some `needed` of the shares (place -> share) give."""
    found = {}
    usable = {place + 1: share_value(share) for place, share in shares.items() if share_value(share) < PRIME}
    for chosen in itertools.combinations(sorted(usable), needed):
        value = lagrange({x: usable[x] for x in chosen})
        if value < 2**256:
            secret = value.to_bytes(32, "big")
            if public_of(secret) == public:
                found["s"] = secret
            if commitment(secret) == commit:
                found["b"] = secret
        if found:
            break
    return found


@dataclass(frozen=True)
class Wire:
    """What the coordinator sees of one sum, as bytes, and what it told the sites. `linked`: who masks with whom."""

    place: bytes
    data: bytes
    previous: tuple[str, ...]
    participants: tuple[str, ...]
    order: bytes
    vectors: Mapping[str, bytes]
    revealed: Mapping[str, bytes]
    linked: Mapping[str, Sequence[str]]
    bits: int
    values: int

    def bundle(self, site: str) -> tuple[bytes, bytes, bytes]:
        """(cipher key, mask key, commitment) of a site."""
        for start in range(0, len(self.data), BUNDLE):
            one = self.data[start : start + BUNDLE]
            if one[:32].rstrip(b"\0").decode() == site:
                return one[32:64], one[64:96], one[96:128]
        raise KeyError(site)

    def words(self, packed: bytes) -> tuple[list[int], list[int]]:
        width = self.bits // 8
        border = self.values * width
        values = [int.from_bytes(packed[i : i + width], "little") for i in range(0, border, width)]
        return values, [int.from_bytes(packed[i : i + 8], "little") for i in range(border, len(packed), 8)]

    def mask_words(self, key: bytes, counts: int) -> tuple[list[int], list[int]]:
        width = 8 if self.bits == 64 else 4
        stream = keystream(key, self.values * width + counts * 8)
        border = self.values * width
        values = [int.from_bytes(stream[i : i + width], "little") for i in range(0, border, width)]
        return values, [int.from_bytes(stream[i : i + 8], "little") for i in range(border, len(stream), 8)]

    def holders(self, site: str) -> list[str]:
        return sorted([*self.linked[site], site])

    def shares_of(self, site: str, revealed: Mapping[str, bytes] | None = None) -> dict[int, bytes]:
        """The shares of one secret of `site` that its holders revealed, by place."""
        shares = {}
        for place, holder in enumerate(self.holders(site)):
            row = (revealed or self.revealed).get(holder)
            if row is not None:
                order = [other for other in self.holders(holder) if other in self.participants]
                at = order.index(site) * SHARE
                shares[place] = row[at : at + SHARE]
        return shares

    def context(self) -> bytes:
        return context(transcript(self.place, self.data, self.previous), self.participants, self.order)

    def open(self, shares: Mapping[str, Mapping[int, bytes]] | None = None) -> bytes:
        """The packed sum of the vectors, from nothing but the wire. `shares`: those of each site's secret, by place."""
        survivors, told = sorted(self.vectors), self.context()
        received = [self.words(packed) for packed in self.vectors.values()]
        sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*received, strict=True)]
        for key, sign in self._masks(
            survivors, told, shares or {site: self.shares_of(site) for site in self.participants}
        ):
            for part, mask in zip(sums, self.mask_words(key, len(sums[1])), strict=True):
                part[:] = [a - sign * m for a, m in zip(part, mask, strict=True)]
        width = self.bits // 8
        values = b"".join((value % 2**self.bits).to_bytes(width, "little") for value in sums[0])
        return values + b"".join((count % 2**64).to_bytes(8, "little") for count in sums[1])

    def _masks(
        self, survivors: Sequence[str], told: bytes, shares: Mapping[str, Mapping[int, bytes]]
    ) -> Iterable[tuple[bytes, int]]:
        """(key, sign) of every mask that is still in the sum of the survivors."""
        for site in self.participants:
            _, public, commit = self.bundle(site)
            needed = 2 * len(self.holders(site)) // 3 + 1
            found = rebuild(shares[site], needed, public, commit)
            if site in survivors:
                yield derive(found["b"], b"self-mask", told, site), 1
                continue
            for peer in self.linked[site]:
                if peer in survivors:
                    first, second = min(site, peer), max(site, peer)
                    key = derive(agree(found["s"], self.bundle(peer)[1]), b"pair-mask", told, first, second)
                    yield key, 1 if peer == first else -1


def ring(names: Sequence[str], seed: bytes, degree: int) -> dict[str, list[str]]:
    """Who masks with whom: everybody with everybody, or with the `degree` nearest on a ring."""
    order = sorted(names, key=lambda name: sha256(seed, b"isocenter/v1/secagg/ring", name.encode()))
    if degree >= len(names) - 1:
        return {name: sorted(set(names) - {name}) for name in names}
    reach = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {name: sorted(order[(at + step) % len(order)] for step in reach) for at, name in enumerate(order)}


def left_out(n: int, c: int, t: int, *, agreed: bool) -> int:
    """How many honest sites the coordinator can leave out of the sum that it opens: every way to lie is tried.

    It shows lists to the n - c honest sites, each of at least t sites with the site itself, and needs t shares of s of each
    honest site that it leaves out; colluders give all theirs. The sites in the sum were told of the same participants, or
    their masks do not cancel; `absent` sites are not among these. Not `agreed`: the others may have been told of more, and the
    absent ones as well, and give shares all the same. Sites are numbered victims first, then absent ones, without loss of
    generality.
    """
    most = 0
    for absent, out in itertools.product(range(n - t + 1), range(n - c)):
        if absent + out >= n - c:
            continue  # somebody honest must be in the sum, or there is nobody to harm
        reached = {(0,) * out}
        for site in range(n - c):
            is_absent = out <= site < out + absent
            outside = site < out + absent
            slots = 0 if agreed and is_absent else n - t if outside and not agreed else n - t - absent
            accused = [victim for victim in range(out) if victim != site]
            ways = list(itertools.combinations(accused, min(slots, len(accused))))
            found = {
                tuple(min(t - c, count + (victim in way)) for victim, count in enumerate(counts))
                for counts in reached
                for way in ways
            }
            reached = found if site < out - 1 else {tuple(sorted(counts)) for counts in found}  # from here on all alike
        if any(min(counts, default=t) >= t - c for counts in reached):
            most = max(most, absent + out)
    return most


def known_answers() -> dict[str, object]:
    """Every derivation for one small sum whose secrets are known; tests/vectors/secagg.json holds what it says."""
    names, place = ["east", "north", "south", "west"], canonical("0f" * 32, "run-7", 2, 5)
    previous, order = ["east", "north", "south"], b'{"kind":"train","round":3}'
    secret = {
        (site, use): sha256(f"{use} of {site}".encode())
        for site in names
        for use in ("cipher", "mask", "seed", "enrolled")
    }
    scalars = {site: int.from_bytes(secret[site, "enrolled"], "big") for site in names}
    enrolled = {site: ec.derive_private_key(scalar, ec.SECP256R1()) for site, scalar in scalars.items()}
    bundles = {}
    for site in names:
        unsigned = unsigned_bundle(site, secret[site, "cipher"], secret[site, "mask"], secret[site, "seed"])
        bundles[site] = unsigned + sign(enrolled[site], signed_bytes(place, unsigned))
    data = b"".join(bundles[site] for site in names)
    told = transcript(place, data, previous)
    bound = context(told, names, order)
    pairs = list(itertools.permutations(names, 2))
    return {
        "place": place.decode(),
        "previous": previous,
        "order": order.decode(),
        "sites": {
            site: {use: secret[site, use].hex() for use in ("cipher", "mask", "seed", "enrolled")}
            | {
                "commitment": commitment(secret[site, "seed"]).hex(),
                "signed": signed_bytes(place, bundles[site][:-64]).hex(),
                "bundle": bundles[site].hex(),
                "vouch": sign(enrolled[site], vouch_bytes(bound)).hex(),
                "self_mask": derive(secret[site, "seed"], b"self-mask", bound, site).hex(),
            }
            for site in names
        },
        "transcript": told.hex(),
        "context": bound.hex(),
        "share_keys": {
            f"{a} {b}": derive(agree(secret[a, "cipher"], public_of(secret[b, "cipher"])), b"share", told, a, b).hex()
            for a, b in pairs
        },
        "pair_masks": {
            f"{a} {b}": derive(agree(secret[a, "mask"], public_of(secret[b, "mask"])), b"pair-mask", bound, a, b).hex()
            for a, b in pairs
            if a < b
        },
    }


def read_share(answers: Mapping[str, Mapping[str, str]], told: str, sender: str, receiver: str, sealed: bytes) -> bytes:
    """What `sender` encrypted for `receiver`, with the frozen key."""
    key = bytes.fromhex(answers["share_keys"][f"{sender} {receiver}"])
    return AESGCM(key).decrypt(bytes(12), sealed, bytes.fromhex(told))
