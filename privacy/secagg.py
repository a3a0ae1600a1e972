"""Secure aggregation: the coordinator learns the sum over the sites that reported, and of a single site nothing.

The protocol of Bonawitz et al. (2017, "Practical secure aggregation for privacy-preserving machine learning") with double
masking, over the full graph up to 50 sites and over the k-regular graph of Bell et al. (2020) above. Two state machines
without input or output carry it: `Member` at each site and `Aggregator` at the coordinator, one pair for each sum. Bytes in,
bytes out; a step out of turn, repeated, or against the rules raises and changes nothing.

    keys     each site makes three secrets for this sum: c and s (X25519) and b (32 random bytes). It signs the public halves of c
             and s, and a commitment to b, with its enrolled key.
    share    each site checks every peer's signature against the study's roster, splits s and b among its holders (its peers
             in the graph and itself; threshold above two thirds), and encrypts each share for its holder.
    mask     vector + PRG(b) + sum over peers of +-PRG(agreement of s). The second kind cancels in the sum. The site signs what
             its masks are bound to (`Circle.context`): the participants, and the order with its model.
    reveal   for a sum over `survivors`, all of whom signed the same context: each site gives its share of b for those who are in
             the sum and of s for those who are not. The coordinator rebuilds b of the former, s of the latter, and takes the
             masks away.

Trust rules, and where they bite:
 1. Every derived key binds the protocol's version, study, run, attempt, sum, the sorted members with their signed keys, the
    survivors of the sum before (`_transcript`), and the whole order with its model (`Circle.context`). Sites that are shown
    different models, rosters, settings or lists derive different masks, and their sum is noise.
 2. A site gives one kind of share for each peer, once per sum (`Member.reveal`). To rebuild both secrets of an honest site
    somebody needs t shares of each; of the N holders the honest give one kind each and c colluding ones both, so 2t <= N + c.
    As t > 2N/3, that takes more than N/3 colluding holders. Nothing else stands between a lying coordinator and both secrets.
 3. A site reveals for a list of survivors only if each of them signed the context that it signed itself, and signs one
    context in a sum. Two contexts would take two lists of more than 2N/3 signers with fewer than N/3 in both, so all that is
    ever revealed in a sum is for the same participants, order and model.
    The sites do not wait to hear what list of survivors the others got; that would be a third exchange in each round. So a
    coordinator may show different lists and, with c colluders of n members, leave up to (n-c)(n-t)/(t-c) honest sites out of
    the sum that it opens (docs/secure-aggregation.md has the table). The list is part of the next sum's transcript, so sites
    with different lists cannot read each other's shares: who told two has to begin anew, with keys that all journals show.
 4. No site helps to open a list of fewer sites than the threshold, or than the study's quorum (`Member.open`, `Member.reveal`).
 5. Secrets exist in memory only, for one sum. A process that ends takes them with it, so no mask can be used twice.

This hides updates. It does not judge them: a site may add whatever it likes to the sum.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Literal, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy import keys
from privacy.errors import MessageMalformed, PeerUntrusted, ShareInvalid, SignatureInvalid, StepRefused, TooFewSurvivors
from privacy.sharing import (
    SECRET_BYTES,
    SHARE_BYTES,
    Encoding,
    Mask,
    Vector,
    add_masks,
    neighbours,
    recover,
    split,
    threshold,
)

VERSION = 1
SITES_MIN = 3  # in a sum of two, each of the two knows the other's part
NAME_BYTES, SIGNATURE_BYTES = 32, 64
BUNDLE_BYTES = NAME_BYTES + 3 * SECRET_BYTES + SIGNATURE_BYTES
TAG_BYTES = 16
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES  # a share of s and one of b, encrypted for one holder
NO_SHARE = b"\xff" * SHARE_BYTES  # no element of the field: "I have no share of this site"
COMMIT, TRANSCRIPT = b"isocenter/v1/sum/commitment", b"isocenter/v1/sum/transcript"
CONTEXT = b"isocenter/v1/sum/context"
SHARE_KEY, PAIR_MASK, SELF_MASK = (
    b"isocenter/v1/sum/share",
    b"isocenter/v1/sum/pair-mask",
    b"isocenter/v1/sum/self-mask",
)
SURVIVORS = b"isocenter/v1/sum/survivors"
# Whichever key it is, it agrees with every usable one and with no point of low order. It is no secret and agrees on nothing else.
_PROBE = X25519PrivateKey.generate()

Entropy = Callable[[int], bytes]
Signer = Callable[[bytes, bytes], bytes]
"""(label, body) -> what `keys.sign` makes of them with a site's enrolled key, wherever that key is."""
Names = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Which sum of which run: the identity that every key of it is bound to. `sum` counts from 1 within an attempt."""

    study: str
    run: str
    attempt: int
    sum: int

    def canonical(self) -> bytes:
        return self._canonical

    @cached_property
    def _canonical(self) -> bytes:
        return json.dumps({"version": VERSION} | asdict(self), sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Bundle:
    """One site's public part of a sum: its two X25519 keys, its commitment to b, and its enrolled key's signature over them."""

    site: str
    cipher: bytes
    mask: bytes
    commitment: bytes
    signature: bytes  # r and s of ECDSA, 32 bytes each

    def signed(self, place: Place) -> bytes:
        """What the signature covers."""
        return place.canonical() + b"\n" + self.to_bytes()[:-SIGNATURE_BYTES]

    def to_bytes(self) -> bytes:
        name = self.site.encode().ljust(NAME_BYTES, b"\0")
        return name + self.cipher + self.mask + self.commitment + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> "Bundle":
        """Raises MessageMalformed unless `data` is one bundle to the letter."""
        if len(data) != BUNDLE_BYTES:
            raise MessageMalformed("the keys of a site have another size than they should")
        name, rest = data[:NAME_BYTES].rstrip(b"\0"), data[NAME_BYTES:]
        cipher, mask, commitment = (rest[i * SECRET_BYTES : (i + 1) * SECRET_BYTES] for i in range(3))
        try:
            site = keys.check_name(name.decode("ascii"))
        except UnicodeDecodeError:
            raise MessageMalformed("the keys are of a site without a proper name") from None
        return cls(site, cipher, mask, commitment, rest[3 * SECRET_BYTES :])

    def check(self, place: Place, enrolled: keys.PublicKey) -> None:
        """Raise PeerUntrusted unless the owner of `enrolled` signed these keys for this sum, and they can be used."""
        if not _signed(enrolled, keys.SUM_KEYS, self.signed(place), self.signature):
            raise PeerUntrusted(f"{self.site} did not sign the keys that were shown for it in this sum")
        for public in (self.cipher, self.mask):
            _agree(_PROBE, public)  # a point of low order would make every peer stumble


class Circle:
    """The sites that made keys for one sum, their keys, and who holds whose shares. Both halves compute it alike."""

    def __init__(
        self,
        place: Place,
        data: bytes,
        roster: Mapping[str, keys.PublicKey],
        previous: Names,
        checked: Collection[bytes] = (),
    ) -> None:
        """Raises MessageMalformed, PeerUntrusted for a site out of the roster or a wrong signature, TooFewSurvivors.

        `checked`: keys that whoever asks checked for this place and with this roster, byte for byte.
        """
        if len(data) % BUNDLE_BYTES:
            raise MessageMalformed("the members' keys have another size than they should")
        found = [Bundle.from_bytes(data[i : i + BUNDLE_BYTES]) for i in range(0, len(data), BUNDLE_BYTES)]
        self.place, self.roster, self.bundles = place, roster, {bundle.site: bundle for bundle in found}
        self.names: Names = tuple(self.bundles)
        if list(self.names) != sorted(self.names) or len(self.names) != len(found):
            raise MessageMalformed("the members' keys are not sorted by site, or one stands twice")
        if len(self.names) < SITES_MIN:
            raise TooFewSurvivors(f"a masked sum needs {SITES_MIN} sites; there are {len(self.names)}")
        for bundle in found:
            if bundle.site not in roster:
                raise PeerUntrusted(f"{bundle.site} is not one of the study's sites")
            if bundle.to_bytes() not in checked:
                bundle.check(place, roster[bundle.site])
        if list(previous) != sorted(set(previous)) or not set(previous) <= set(roster):
            raise MessageMalformed("the survivors of the sum before are not a sorted list of the study's sites")
        self.transcript = _transcript(place, data, previous)
        self.peers = neighbours(self.names, self.transcript)
        self.holders = {site: sorted([*peers, site]) for site, peers in self.peers.items()}

    def least(self, quorum: int) -> int:
        """The fewest sites that a sum of this circle may be opened for."""
        return max(threshold(len(self.names)), quorum, SITES_MIN)

    def threshold_of(self, site: str) -> int:
        """How many holders' shares rebuild a secret of `site`."""
        return threshold(len(self.holders[site]))

    def seal_key(self, own: X25519PrivateKey, sender: str, receiver: str, other: str) -> AESGCM:
        """The cipher of the shares that `sender` gives to `receiver`; used for one message, so its nonce may be constant."""
        shared = _agree(own, self.bundles[other].cipher)
        return AESGCM(_derive(shared, SHARE_KEY, self.transcript, sender, receiver))

    def pair_mask(self, own: X25519PrivateKey, site: str, peer: str, context: bytes) -> Mask:
        """The mask that `site` shares with `peer`: what the one adds the other subtracts."""
        shared = _agree(own, self.bundles[peer].mask)
        first, second = sorted((site, peer))
        return _derive(shared, PAIR_MASK, context, first, second), 1 if site == first else -1

    def context(self, participants: Names, order: bytes) -> bytes:
        """32 bytes that every mask is bound to: members, keys, participants, and the order with its model."""
        told = " ".join(participants).encode()
        return hashlib.sha256(b"\n".join([CONTEXT, self.transcript, told, order])).digest()

    def check_vouch(self, site: str, context: bytes, signature: bytes) -> None:
        """Raise PeerUntrusted unless `site` signed that its masks are bound to `context`."""
        if not _signed(self.roster[site], keys.SUM_CONTEXT, context, signature):
            raise PeerUntrusted(f"{site} did not sign that its masks are bound to this order and these participants")

    def check_list(self, names: Names, within: Sequence[str], quorum: int) -> None:
        """Raise unless `names` is a sorted list of distinct sites of `within`, large enough to be opened."""
        if list(names) != sorted(set(names)) or not set(names) <= set(within):
            raise StepRefused("the list of sites is not a sorted part of those who could be in it")
        if len(names) < self.least(quorum):
            raise TooFewSurvivors(f"{len(names)} sites; the sum needs {self.least(quorum)}")


@dataclass(repr=False)  # a log or a traceback that shows variables must not show these
class _Secrets:
    """What a site knows of one sum and nobody else may. Dropped when the sum is closed."""

    sign: Signer
    cipher: X25519PrivateKey
    mask: X25519PrivateKey
    seed: bytes
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # site -> its share of s, of b
    masks: list[Mask] = field(default_factory=list)
    cover: Vector | None = None


class Member:
    """A site's half of one sum. Steps, each once and in this order: keys, share, open, (cover,) mask, reveal.

    Its process needs not hold the enrolled key: `sign` is asked twice in a sum, with the labels SUM_KEYS and SUM_CONTEXT. The
    secrets of the sum itself are made here and stay here.
    """

    def __init__(self, place: Place, site: str, sign: Signer, entropy: Entropy = os.urandom) -> None:
        self.place, self.site, self._entropy = place, site, entropy
        self._secrets: _Secrets | None = _Secrets(
            sign,
            X25519PrivateKey.from_private_bytes(entropy(SECRET_BYTES)),
            X25519PrivateKey.from_private_bytes(entropy(SECRET_BYTES)),
            entropy(SECRET_BYTES),
        )
        self._step: Literal["keys", "share", "open", "mask", "reveal", "closed"] = "share"
        self._bundle = self._make_bundle(self._secrets)
        self._circle: Circle | None = None
        self._context = b""
        self._participants: Names = ()

    @property
    def public(self) -> bytes:
        """This site's signed keys for the sum."""
        return self._bundle.to_bytes()

    def share(self, data: bytes, roster: Mapping[str, keys.PublicKey], previous: Names = ()) -> bytes:
        """This site's shares, encrypted for its peers in the order of their names.

        `data`: the sorted keys of all members; `roster`: enrolled keys by site, from the signed study; `previous`: survivors
        of the sum before. Raises PeerUntrusted for keys that are not those of a roster's site, or not this site's own.
        """
        secrets = self._at("share")
        circle = Circle(self.place, data, roster, previous)
        if circle.bundles.get(self.site) != self._bundle:
            raise PeerUntrusted("the keys shown as this site's own are not those that it made for this sum")
        holders, needed = circle.holders[self.site], circle.threshold_of(self.site)
        secret_s = split(secrets.mask.private_bytes_raw(), len(holders), needed, self._entropy)
        secret_b = split(secrets.seed, len(holders), needed, self._entropy)
        sealed = []
        for holder, share_s, share_b in zip(holders, secret_s, secret_b, strict=True):
            if holder == self.site:
                secrets.held[self.site] = (share_s, share_b)
            else:
                cipher = circle.seal_key(secrets.cipher, self.site, holder, holder)
                sealed.append(cipher.encrypt(bytes(12), share_s + share_b, circle.transcript))
        self._circle, self._step = circle, "open"
        return b"".join(sealed)

    def open(self, participants: Names, sealed: bytes, order: bytes, quorum: int) -> None:
        """Take in the others' shares and derive the masks of this sum.

        `participants`: sites whose shares arrived, sorted; `sealed`: what each of them encrypted, one after the other;
        `order`: the body of the order, which every mask is bound to; `quorum`: the study's. Raises TooFewSurvivors, or
        ShareInvalid if this site cannot read enough of the shares meant for it, as when the coordinator lied to some.
        """
        secrets, circle = self._at("open"), self._of_circle()
        circle.check_list(participants, circle.names, quorum)
        if self.site not in participants:
            raise StepRefused("this site is not in the sum")
        held = self._read_shares(circle, secrets, participants, sealed)
        needed = circle.threshold_of(self.site)
        if len(held) < needed:
            raise ShareInvalid(f"shares of {len(held)} sites could be read; {needed} are needed")
        context = circle.context(participants, order)
        peers = [peer for peer in circle.peers[self.site] if peer in participants]
        secrets.held = held
        secrets.masks = [circle.pair_mask(secrets.mask, self.site, peer, context) for peer in peers]
        secrets.masks.append((_derive(secrets.seed, SELF_MASK, context, self.site), 1))
        self._participants, self._context, self._step = participants, context, "mask"

    def cover(self, encoding: Encoding) -> None:
        """Add up the masks beforehand, so that `mask` is one addition: they depend on keys and order, not on the vector."""
        secrets = self._at("mask")
        if secrets.cover is None:
            cover = encoding.zeros()
            add_masks(cover, secrets.masks)
            secrets.cover, secrets.masks = cover, []

    def mask(self, vector: Vector, encoding: Encoding) -> bytes:
        """Mask `vector` in place and return this site's signature over the context of its masks, which goes with it.

        Once: the masks are gone afterwards. Raises MessageMalformed for another encoding.
        """
        secrets = self._at("mask")
        cover = secrets.cover
        if cover is None:
            cover = encoding.zeros()
            add_masks(cover, secrets.masks)
        vector.add(cover)  # refuses another shape before it changes anything
        secrets.cover, secrets.masks, self._step = None, [], "reveal"
        return _fixed(secrets.sign(keys.SUM_CONTEXT, self._context))

    def reveal(self, survivors: Names, vouches: bytes, quorum: int) -> bytes:
        """One share for each participant that this site holds shares of, by name: of b for survivors, of s for the others.

        Once, and for one list: this is what the counting argument above rests on. Closes the sum and drops every secret.
        `vouches`: what `mask` returned at each survivor, one after the other. Raises TooFewSurvivors below threshold or
        quorum, StepRefused if this site is not among the survivors, PeerUntrusted if one of them masked for another order.
        """
        secrets, circle = self._at("reveal"), self._of_circle()
        circle.check_list(survivors, self._participants, quorum)
        if self.site not in survivors:
            raise StepRefused("this site's vector is not in the sum, so it does not help to open it")
        if len(set(circle.holders[self.site]) & set(survivors)) < circle.threshold_of(self.site):
            raise TooFewSurvivors("too few of the sites that hold this site's shares are in the sum")
        if len(vouches) != len(survivors) * SIGNATURE_BYTES:
            raise MessageMalformed("the survivors' signatures have another size than they should")
        for place, site in enumerate(survivors):
            signature = vouches[place * SIGNATURE_BYTES : (place + 1) * SIGNATURE_BYTES]
            circle.check_vouch(site, self._context, signature)
        alive, shares = set(survivors), []
        for site in circle.holders[self.site]:
            if site in self._participants:
                share_s, share_b = secrets.held.get(site, (NO_SHARE, NO_SHARE))
                shares.append(share_b if site in alive else share_s)
        self.close()
        return b"".join(shares)

    def close(self) -> None:
        """Forget every secret of this sum; no step is possible afterwards."""
        self._secrets, self._step = None, "closed"

    def __reduce__(self) -> NoReturn:
        """Nobody copies or stores a member: a copy could mask or reveal a second time."""
        raise TypeError("the secrets of a sum are not copied and not stored")

    @property
    def covers(self) -> bool:
        """Whether a vector was masked and the sum is still open."""
        return self._step == "reveal"

    def _at(self, step: str) -> _Secrets:
        if self._secrets is None or self._step != step:
            raise StepRefused(f"step {step!r} of sum {self.place.sum} is not due: the next one is {self._step!r}")
        return self._secrets

    def _of_circle(self) -> Circle:
        if self._circle is None:
            raise StepRefused("no keys of peers have been taken in")
        return self._circle

    def _make_bundle(self, secrets: _Secrets) -> Bundle:
        cipher, mask = secrets.cipher.public_key().public_bytes_raw(), secrets.mask.public_key().public_bytes_raw()
        unsigned = Bundle(self.site, cipher, mask, commitment(secrets.seed), bytes(SIGNATURE_BYTES))
        return replace(unsigned, signature=_fixed(secrets.sign(keys.SUM_KEYS, unsigned.signed(self.place))))

    def _read_shares(
        self, circle: Circle, secrets: _Secrets, participants: Names, sealed: bytes
    ) -> dict[str, tuple[bytes, bytes]]:
        """The shares that open, by the site they come from, with this site's own. Those that do not open are left out."""
        held = dict(secrets.held)
        for sender, row in zip(participants, _rows(circle, participants, sealed), strict=True):
            if sender == self.site or self.site not in circle.peers[sender]:
                continue
            at = circle.peers[sender].index(self.site) * SEALED_BYTES
            cipher = circle.seal_key(secrets.cipher, sender, self.site, sender)
            try:
                plain = cipher.decrypt(bytes(12), row[at : at + SEALED_BYTES], circle.transcript)
            except InvalidTag:
                continue  # one site's garbage must not stop the others; too much of it does, in `open`
            held[sender] = (plain[:SHARE_BYTES], plain[SHARE_BYTES:])
        return held


class Aggregator:
    """The coordinator's half of one sum. Memory: one vector, whatever the number of sites.

    add_keys*, close_keys, add_shares*, close_shares, start, add_vector*, close_vectors, add_revealed*, finish.
    """

    def __init__(self, place: Place, roster: Mapping[str, keys.PublicKey], quorum: int) -> None:
        self.place, self.roster, self.quorum = place, roster, quorum
        self._step: Literal["keys", "shares", "start", "vectors", "reveal", "done"] = "keys"
        self._bundles: dict[str, bytes] = {}
        self._sealed: dict[str, bytes] = {}
        self._vouches: dict[str, bytes] = {}
        self._revealed: dict[str, list[bytes]] = {}
        self._rebuilt: dict[str, bytes] = {}
        self._disputed: set[tuple[str, str]] = set()  # (who made a share, who gave it) where it was wrong
        self._participants: Names = ()
        self._circle: Circle | None = None
        self._context = b""
        self._total: Vector | None = None
        self.wrong: dict[str, str] = {}
        """Sites that are behind wrong shares, as `finish` found, with the code of what they did."""

    @property
    def keyed(self) -> Names:
        """Sites whose keys are here."""
        return tuple(sorted(self._bundles))

    @property
    def ready(self) -> Names:
        """Sites whose shares are here: the participants of the sum, once `close_shares` has said so."""
        return tuple(sorted(self._sealed))

    @property
    def survivors(self) -> Names:
        """Sites whose vectors are in the sum, once `close_vectors` has said so."""
        return tuple(sorted(self._vouches)) if self._step in ("reveal", "done") else ()

    @property
    def least(self) -> int:
        """The fewest sites that a sum of those whose keys are here may be opened for."""
        return max(threshold(max(1, len(self._bundles))), self.quorum, SITES_MIN)

    def shared_by(self, sites: Collection[str]) -> bool:
        """Whether enough of `sites` sent their shares for the sum to begin."""
        return self._step == "shares" and len(set(self._sealed) & set(sites)) >= self.least

    def add_keys(self, site: str, data: bytes) -> None:
        """Raises PeerUntrusted unless `data` are keys that `site` signed for this sum; StepRefused if it sent some before."""
        self._due("keys")
        if site in self._bundles:
            raise StepRefused(f"{site} sent its keys twice")
        bundle = Bundle.from_bytes(data)
        if bundle.site != site or site not in self.roster:
            raise PeerUntrusted(f"{site} sent keys of {bundle.site}, or is not one of the study's sites")
        bundle.check(self.place, self.roster[site])
        self._bundles[site] = data

    def close_keys(self, previous: Names = ()) -> bytes:
        """The sorted keys of all members, for every one of them. Raises TooFewSurvivors and stays open for more."""
        self._due("keys")
        data = b"".join(self._bundles[site] for site in self.keyed)
        circle = Circle(self.place, data, self.roster, previous, {*self._bundles.values()})
        if len(circle.names) < self.least:
            raise TooFewSurvivors(f"{len(circle.names)} sites made keys; the sum needs {self.least}")
        self._circle, self._step = circle, "shares"
        return data

    def add_shares(self, site: str, sealed: bytes) -> None:
        """Raises MessageMalformed for another size, StepRefused for a site that is no member or sent its shares before."""
        self._due("shares")
        circle = self._of_circle()
        if site not in circle.bundles or site in self._sealed:
            raise StepRefused(f"{site} is not a member of this sum, or sent its shares twice")
        if len(sealed) != len(circle.peers[site]) * SEALED_BYTES:
            raise MessageMalformed(f"the shares of {site} have another size than they should")
        self._sealed[site] = sealed

    def close_shares(self) -> tuple[Names, bytes]:
        """(participants, everything they encrypted), for every participant. Raises TooFewSurvivors and stays open."""
        self._due("shares")
        circle, names = self._of_circle(), self.ready
        circle.check_list(names, circle.names, self.quorum)
        self._participants, self._step = names, "start"
        sealed = b"".join(self._sealed[site] for site in names)
        self._sealed = {}
        return names, sealed

    def start(self, order: bytes, encoding: Encoding) -> None:
        """Take vectors of `encoding` from now on, masked under the order of that body."""
        self._due("start")
        self._context = self._of_circle().context(self._participants, order)
        self._total, self._step = encoding.zeros(), "vectors"

    def add_vector(self, site: str, vector: Vector, vouch: bytes) -> None:
        """Add one site's masked vector. Raises StepRefused if it is late, a second one, or of a site not in the sum.

        `vouch` is what `Member.mask` returned with it; PeerUntrusted if it was masked for another order.
        """
        self._due("vectors")
        if self._total is None or site not in self._participants or site in self._vouches:
            raise StepRefused(f"{site} is not in this sum, or sent its vector twice")
        self._of_circle().check_vouch(site, self._context, vouch)
        self._total.add(vector)
        self._vouches[site] = vouch

    @property
    def vouches(self) -> bytes:
        """The survivors' signatures, in the order of their names: what each of them needs to help open the sum."""
        return b"".join(self._vouches[site] for site in self.survivors)

    def close_vectors(self) -> Names:
        """The survivors, whose vectors are in the sum. From now on a vector is late. Raises TooFewSurvivors."""
        self._due("vectors")
        survivors = tuple(sorted(self._vouches))
        self._of_circle().check_list(survivors, self._participants, self.quorum)
        self._step = "reveal"
        return survivors

    def add_revealed(self, site: str, data: bytes) -> None:
        """One site's shares. Raises MessageMalformed for another size, StepRefused for a second answer or a stranger."""
        self._due("reveal")
        if site not in self._vouches or site in self._revealed:
            raise StepRefused(f"{site} is not in this sum, or opened it twice")
        if len(data) != len(self._held_by(site)) * SHARE_BYTES:
            raise MessageMalformed(f"the opened shares of {site} have another size than they should")
        self._revealed[site] = [data[i : i + SHARE_BYTES] for i in range(0, len(data), SHARE_BYTES)]

    @property
    def enough(self) -> bool:
        """Whether the shares here rebuild every secret that the sum needs, whatever the others may still send."""
        try:
            return all(self._rebuild(self._of_circle(), site) for site in self._participants)
        except (ShareInvalid, TooFewSurvivors):
            return False

    def finish(self) -> Vector:
        """The sum of the survivors' vectors.

        Raises TooFewSurvivors if fewer holders of a secret answered than it needs, and ShareInvalid, which names the sites,
        if a secret cannot be rebuilt from what they answered; the sum stays open for more. `wrong` is set in any case.
        """
        self._due("reveal")
        circle, total, lost = self._of_circle(), self._total, []
        if total is None:
            raise StepRefused("there is no vector to open")
        for site in self._participants:
            try:
                self._rebuild(circle, site)
            except ShareInvalid:
                lost.append(site)
        self.wrong = self._blame(circle, lost)
        if lost:
            raise ShareInvalid(f"the shares that were given do not rebuild the secrets of {', '.join(lost)}")
        # One pass over the vector for all masks; those of the self masks and of the dropped sites' pairs alike.
        masks = [mask for site in self._participants for mask in self._masks_of(circle, site)]
        add_masks(total, [(key, -sign) for key, sign in masks])
        self._total, self._revealed, self._rebuilt, self._step = None, {}, {}, "done"
        return total

    def _masks_of(self, circle: Circle, site: str) -> list[Mask]:
        """Masks that are left in the sum because of `site`: its self mask, or, if it dropped out, what its peers added."""
        secret = self._rebuild(circle, site)
        if site in self._vouches:
            return [(_derive(secret, SELF_MASK, self._context, site), 1)]
        own = X25519PrivateKey.from_private_bytes(secret)
        present = [peer for peer in circle.peers[site] if peer in self._vouches]
        theirs = [circle.pair_mask(own, site, peer, self._context) for peer in present]
        return [(key, -sign) for key, sign in theirs]  # the peer's part of the pair has the other sign

    def _rebuild(self, circle: Circle, site: str) -> bytes:
        """b of a survivor, s of a site that dropped out. Raises TooFewSurvivors if few answered, else ShareInvalid."""
        if site in self._rebuilt:
            return self._rebuilt[site]
        answers = self._answers(circle, site)
        if len(answers) < circle.threshold_of(site):
            raise TooFewSurvivors(
                f"{len(answers)} sites helped to open the sum; {circle.threshold_of(site)} are needed"
            )
        shares = {place: share for place, share in answers.items() if share != NO_SHARE}
        secret, wrong = recover(shares, circle.threshold_of(site), lambda found: self._fits(circle, site, found))
        self._rebuilt[site] = secret
        self._disputed |= {(site, circle.holders[site][place]) for place in wrong}
        return secret

    def _answers(self, circle: Circle, site: str) -> dict[int, bytes]:
        """What the holders of the secret of `site` gave, by place."""
        return {
            place: self._revealed[holder][self._held_by(holder).index(site)]
            for place, holder in enumerate(circle.holders[site])
            if holder in self._revealed
        }

    def _fits(self, circle: Circle, site: str, secret: bytes) -> bool:
        """Whether this is the secret that `site` stood for when it signed its keys."""
        bundle = circle.bundles[site]
        if site in self._vouches:
            return commitment(secret) == bundle.commitment
        return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == bundle.mask

    def _blame(self, circle: Circle, lost: list[str]) -> dict[str, str]:
        """Who is behind wrong shares. One liar alone cannot make this name another site.

        For a wrong share the site that made it and the site that gave it blame each other: believed is the one that is
        disputed less often, and neither if they are equal. A secret that is lost is its owner's fault if more holders than
        needed answered, since one of them could not have spoilt it.
        """
        made, gave = Counter(site for site, _ in self._disputed), Counter(holder for _, holder in self._disputed)
        blamed = [site for site in lost if len(self._answers(circle, site)) > circle.threshold_of(site)]
        for site, holder in self._disputed:
            if made[site] != gave[holder]:
                blamed.append(site if made[site] > gave[holder] else holder)
        return dict.fromkeys(sorted(blamed), ShareInvalid.code)

    def _held_by(self, site: str) -> list[str]:
        """Participants that `site` holds shares of, in the order in which it gives them."""
        return [other for other in self._of_circle().holders[site] if other in self._participants]

    def _of_circle(self) -> Circle:
        if self._circle is None:
            raise StepRefused("the members' keys are not closed yet")
        return self._circle

    def _due(self, step: str) -> None:
        if self._step != step:
            raise StepRefused(f"step {step!r} of sum {self.place.sum} is not due: the next one is {self._step!r}")


def _fixed(signature: bytes) -> bytes:
    """r and s in 32 bytes each, so that every signature has one size."""
    r, s = decode_dss_signature(signature)
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _signed(key: keys.PublicKey, label: bytes, body: bytes, signature: bytes) -> bool:
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = (int.from_bytes(signature[i : i + 32], "big") for i in (0, 32))
    try:
        keys.verify(key, label, body, encode_dss_signature(r, s))
    except SignatureInvalid:
        return False
    return True


def commitment(seed: bytes) -> bytes:
    """What a site says of b beforehand: it binds the site, and tells nothing of 32 random bytes."""
    return hashlib.sha256(COMMIT + b"\n" + seed).digest()


def _transcript(place: Place, data: bytes, previous: Names) -> bytes:
    """32 bytes that stand for the sum, its members with their keys, and what everyone was told of the sum before."""
    before = hashlib.sha256(SURVIVORS + b"\n" + " ".join(previous).encode()).digest()
    return hashlib.sha256(b"\n".join([TRANSCRIPT, place.canonical(), before]) + data).digest()


def _derive(secret: bytes, label: bytes, context: bytes, *names: str) -> bytes:
    """A 32-byte key for one use: HKDF-SHA256 with the label, the 32-byte context and the names as info."""
    info = b"\n".join([label, context, *(name.encode() for name in names)])
    return HKDF(hashes.SHA256(), SECRET_BYTES, None, info).derive(secret)


def _agree(own: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise PeerUntrusted("a key of a site cannot be used for an agreement") from None


def _rows(circle: Circle, participants: Names, sealed: bytes) -> list[bytes]:
    """`sealed` cut into what each participant encrypted; raises MessageMalformed for another size."""
    sizes = [len(circle.peers[site]) * SEALED_BYTES for site in participants]
    if len(sealed) != sum(sizes):
        raise MessageMalformed("the encrypted shares have another size than they should")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [sealed[end - size : end] for size, end in zip(sizes, ends, strict=True)]
