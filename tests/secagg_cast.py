"""One masked sum on a stage: honest sites and an honest coordinator, which tests interrupt and corrupt step by step."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from secagg_oracle import SHARE, Wire

from privacy import keys
from privacy.secagg import Aggregator, Circle, Member, Names, Place, Signer
from privacy.sharing import Encoding, Vector

PLACE = Place("a5" * 32, "run-1", 1, 1)
ORDER = b"the order with its model"
SITES = tuple(f"s{i:02d}" for i in range(64))


@cache
def enrolled(site: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def signed_by(site: str) -> Signer:
    return partial(keys.sign, enrolled(site))


def roster(sites: Collection[str] = SITES) -> dict[str, ec.EllipticCurvePublicKey]:
    return {site: enrolled(site).public_key() for site in sites}


def stream(seed: str) -> Callable[[int], bytes]:
    """Entropy that repeats itself, for known answers."""
    counter = iter(range(10**9))
    return lambda size: hashlib.shake_256(f"{seed} {next(counter)}".encode()).digest(size)


class Sum:
    """A sum of `sites` sites. `plain`: what they put in, packed; `vectors`: what the coordinator received, packed."""

    def __init__(
        self, sites: int, *, quorum: int = 3, place: Place = PLACE, encoding: Encoding | None = None, seed: int = 1
    ) -> None:
        self.names, self.quorum, self.place = SITES[:sites], quorum, place
        self.encoding = encoding or Encoding(values=9, counts=2, bits=32, scale=10, sites=sites)
        self.random = np.random.default_rng(seed)
        self.members = {site: Member(place, site, signed_by(site)) for site in self.names}
        self.aggregator = Aggregator(place, roster(self.names), quorum)
        self.previous: Names = ()
        self.plain: dict[str, Vector] = {}
        self.vectors: dict[str, bytes] = {}
        self.vouches: dict[str, bytes] = {}
        self.revealed: dict[str, bytes] = {}

    def __getitem__(self, number: int) -> Member:
        return self.members[SITES[number]]

    def keys(self, drop: Collection[str] = ()) -> "Sum":
        for site in self.names:
            if site not in drop:
                self.aggregator.add_keys(site, self.members[site].public)
        self.data = self.aggregator.close_keys(self.previous)
        self.keyed = self.aggregator.keyed
        return self

    def share(self, drop: Collection[str] = (), instead: Mapping[str, bytes] | None = None) -> "Sum":
        """Sites of `drop` send nothing; those of `instead` something else."""
        shares = {site: self.members[site].share(self.data, roster(self.names), self.previous) for site in self.keyed}
        for site, sealed in (shares | dict(instead or {})).items():
            if site not in drop:
                self.aggregator.add_shares(site, sealed)
        self.participants, self.sealed = self.aggregator.close_shares()
        return self

    def open(self, order: Callable[[str], bytes] = lambda site: ORDER) -> "Sum":
        self.aggregator.start(order(self.names[0]), self.encoding)
        for site in self.participants:
            self.members[site].open(self.participants, self.sealed, order(site), self.quorum)
        return self

    def mask(self, drop: Collection[str] = (), fill: Callable[[str], Vector] | None = None) -> "Sum":
        """All mask a vector of uniform words, or what `fill` says; those of `drop` do not send theirs."""
        for site in self.participants:
            self.send(site, fill(site) if fill else self.words(), arrives=site not in drop)
        self.survivors = self.aggregator.close_vectors()
        return self

    def send(self, site: str, vector: Vector, *, arrives: bool = True) -> bytes:
        """Mask `vector`; its packed words, which the coordinator gets if it `arrives`."""
        self.plain[site] = self.encoding.vector_of(self.encoding.bytes_of(vector))
        self.vouches[site] = self.members[site].mask(vector, self.encoding)
        packed = bytes(self.encoding.bytes_of(vector))
        if arrives:
            self.vectors[site] = packed
            self.aggregator.add_vector(site, self.encoding.vector_of(packed), self.vouches[site])
        return packed

    def reveal(self, drop: Collection[str] = ()) -> "Sum":
        for site in self.survivors:
            if site not in drop:
                self.answer(site, self.ask(site))
        return self

    def ask(self, site: str, survivors: Names | None = None, vouches: Mapping[str, bytes] | None = None) -> bytes:
        """The shares of `site` for a sum over `survivors`; those who signed nothing get an empty signature."""
        told = self.survivors if survivors is None else survivors
        signed = b"".join((self.vouches | dict(vouches or {})).get(name, bytes(64)) for name in told)
        return self.members[site].reveal(told, signed, self.quorum)

    def answer(self, site: str, data: bytes) -> None:
        self.aggregator.add_revealed(site, data)
        self.revealed[site] = data

    def opened(self) -> bytes:
        return bytes(self.encoding.bytes_of(self.aggregator.finish()))

    def expected(self, sites: Collection[str] | None = None) -> bytes:
        """The plain sum of what `sites`, or the survivors, put in, added up word by word."""
        chosen = [self.plain[site] for site in (self.survivors if sites is None else sites)]
        values = [sum(int(word) for word in column) for column in zip(*(v.values for v in chosen), strict=True)]
        counts = [sum(int(word) for word in column) for column in zip(*(v.counts for v in chosen), strict=True)]
        width = self.encoding.bits // 8
        packed = b"".join((value % 2**self.encoding.bits).to_bytes(width, "little") for value in values)
        return packed + b"".join((count % 2**64).to_bytes(8, "little") for count in counts)

    def words(self) -> Vector:
        made = self.encoding.zeros()
        for part in (made.values, made.counts):
            part[:] = np.frombuffer(self.random.bytes(part.nbytes), part.dtype)
        return made

    def wire(self) -> Wire:
        place = self.place.canonical()
        facts = (place, self.data, self.previous, self.participants, ORDER, self.vectors, self.revealed)
        return Wire(*facts, linked=self.circle.peers, bits=self.encoding.bits, values=self.encoding.values)

    @property
    def circle(self) -> Circle:
        return Circle(self.place, self.data, roster(self.names), self.previous)

    def complete(self) -> None:
        """Whatever happened before, the sum goes on from here and is right to the last bit."""
        if not hasattr(self, "data"):
            self.keys()
        if not hasattr(self, "sealed"):
            self.share()
        if self.aggregator._step == "start":
            self.open()
        if not hasattr(self, "survivors"):
            self.mask()
        if not self.revealed:
            self.reveal()
        assert self.opened() == self.expected()


def check_uniform(data: bytes) -> None:
    """Chi-square over bytes with 255 degrees of freedom; each side fails by chance once in 10**13 (Laurent and Massart 2000)."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    statistic = float(((counts - len(data) / 256) ** 2).sum() * 256 / len(data))
    assert 255 - 2 * math.sqrt(255 * 30) < statistic < 255 + 2 * math.sqrt(255 * 30) + 60


def corrupt(row: bytes, at: int) -> bytes:
    """`row` of shares with another element of the field at one place."""
    start = at * SHARE
    value = (int.from_bytes(row[start : start + SHARE], "big") + 12345) % 2**256
    return row[:start] + value.to_bytes(SHARE, "big") + row[start + SHARE :]


def state(member: Member) -> dict[str, Any]:
    """Everything a member holds, by value."""
    kept = {name: value for name, value in vars(member).items() if name != "_secrets"}
    if member._secrets is not None:
        for name, value in vars(member._secrets).items():
            kept[name] = type(value)(value) if isinstance(value, dict | list) else value
        cover = member._secrets.cover
        kept["cover"] = cover and (cover.values.tobytes(), cover.counts.tobytes())
    return kept


@contextlib.contextmanager
def refused(error: type[Exception], member: Member) -> Iterator[None]:
    """The step raises `error`, and nothing of the member is another afterwards."""
    before = state(member)
    with pytest.raises(error):
        yield
    assert state(member) == before
