"""How this site's contribution leaves the building: masked, sealed or plain, as the approved study says.

For masked studies this is where the keys of running sums live: in the memory of this process, and nowhere else. Sums of a run
follow each other; while one is open, the keys of the next are made. A new attempt forgets everything of the one before.

The process that trains makes these ephemeral keys itself, because they cover what it sends. It does not hold the site's key: the
node signs for it (`Signing`), for the order that it is working on and nothing else. To seal takes a public key only.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from fl_client.site import Site
from models.contributions import Contribution, Kind, bits_of, count_of, values_of
from models.study import Study
from privacy import keys
from privacy.errors import MaskKeysLost, MessageMalformed, SignatureRefused, StepRefused
from privacy.noise import GRID_BITS
from privacy.secagg import SIGNATURE_BYTES, Bundle, Member, Place, Signer
from privacy.sharing import Encoding
from privacy.wire import EvaluateOrder, KeysOrder, Order, TrainOrder, UnmaskOrder, WorkOrder

RUNS_MAX = 16  # runs of a site whose keys are held; the oldest is forgotten, and takes part again with fresh keys
OPEN_MAX = 2  # sums of a run whose keys are held: the one that is open, and the next
CONTEXT_BYTES = 32
_point = lru_cache(maxsize=1024)(keys.load_point)  # the roster of a study, whose keys are wanted in each sum


@dataclass
class Sums:
    """The open sum of one run and the one after it, by number. `attempt`: nothing of an earlier one is left."""

    attempt: int = 0
    last: int = 0  # the highest number that keys were made for: a number is used once in an attempt
    members: dict[int, Member] = field(default_factory=dict)


def own_key(site: Site) -> Signer:
    """Signs with the key of `site`, where one process is node and worker in one: in simulation and in tests."""
    return partial(keys.sign, site.key)


@dataclass
class Vault:
    """The keys of all running sums of the sites in this process (one site; several in a simulation).

    `signer`: who signs for a site; in the worker process, the node.
    """

    runs: dict[tuple[Path, str, str], Sums] = field(default_factory=dict)
    signer: Callable[[Site], Signer] = own_key

    def make_keys(self, site: Site, study: Study, order: KeysOrder | WorkOrder) -> bytes:
        """Fresh signed keys: of the ordered sum, or of the one after it if the order is about work."""
        number = keys_number(order)
        sums = self._of(site, order)
        if number <= sums.last:
            raise StepRefused(f"keys of sum {sums.last} were made before; those of sum {number} are too late")
        sums.last, members = number, sums.members
        while len(members) >= OPEN_MAX:
            members.pop(min(members)).close()
        place = Place(study.digest, order.run, order.attempt, number)
        members[number] = Member(place, site.name, self.signer(site))
        return members[number].public

    def begin(self, site: Site, study: Study, order: WorkOrder, parameters: int) -> "Sending":
        """Get ready to send one contribution. Masks are added up in the background while the site works on it."""
        kind = kind_of(order)
        named = study.asked(order.round) if kind == "train" else study.all_sites
        encoding = Encoding(
            values=values_of(study, kind, parameters),
            counts=count_of(study, kind),
            bits=bits_of(study, kind, order.round),
            scale=order.scale,
            sites=len(order.participants or named),
        )
        if not set(order.participants) <= set(named):
            # A site that only evaluates would count towards the quorum of the training sites, and not train.
            raise StepRefused("the order names sites for its sum that the study does not name for this work")
        if (
            kind == "train"
            and study.privacy != "none"
            and study.privacy.mode == "distributed"
            and order.scale != GRID_BITS
        ):
            # At another scale each site's noise would be rounded or cut off before the sum, and the sum would not have all of it.
            raise StepRefused(f"noise of all sites adds up at the scale {GRID_BITS} only, not at {order.scale}")
        if study.protection != "masked":
            return Sending(site, study, order, encoding)
        member = self._open(site, study, order)
        made = self.make_keys(site, study, order) if order.keys_next else b""
        return Sending(site, study, order, encoding, member, made)

    def unmask(self, site: Site, study: Study, order: UnmaskOrder) -> tuple[bytes, bytes]:
        """(shares that help to open the sum, encrypted shares of the next one); each empty if not asked for."""
        members, revealed, sealed = self._of(site, order).members, b"", b""
        if site.name in order.survivors:
            revealed = self._member(members, order.sum).reveal(
                order.survivors, order.vouches, study.participation.quorum
            )
        for number in [n for n in members if n <= order.sum]:
            members.pop(number).close()
        if site.name in order.members:
            roster = {name: _point(point) for name, point in study.roster.items()}
            sealed = self._member(members, order.sum + 1).share(order.keys, roster, order.survivors)
        return revealed, sealed

    def _open(self, site: Site, study: Study, order: WorkOrder) -> Member:
        member = self._member(self._of(site, order).members, order.sum)
        member.open(order.participants, order.shares, order.body(), study.participation.quorum)
        return member

    def _of(self, site: Site, order: Order) -> Sums:
        # By study as well: the keys of one study's sum, with its roster, must never cover work for another study.
        owner = (site.home, order.study, order.run)
        sums = self.runs.pop(owner, Sums())
        if order.attempt < sums.attempt:
            self.runs[owner] = sums
            raise StepRefused(f"attempt {order.attempt} is over; this site works on attempt {sums.attempt}")
        if order.attempt > sums.attempt:
            for member in sums.members.values():
                member.close()
            sums = Sums(order.attempt)
        self.runs[owner] = sums  # the last one used stands last
        for oldest in [key for key in self.runs if key[0] == site.home][:-RUNS_MAX]:
            del self.runs[oldest]
        return sums

    @staticmethod
    def _member(members: dict[int, Member], number: int) -> Member:
        if number not in members:
            raise MaskKeysLost(f"this process has no keys of sum {number}: it was started after they were made")
        return members[number]


@dataclass
class Sending:
    """One contribution on its way out. `keys`: this site's keys of the next sum, if the order asks for them."""

    site: Site
    study: Study
    order: WorkOrder
    encoding: Encoding
    member: Member | None = None
    keys: bytes = b""

    def __post_init__(self) -> None:
        self.covering: threading.Thread | None = None
        if self.member is not None:
            self.covering = threading.Thread(target=self.member.cover, args=(self.encoding,), daemon=True)
            self.covering.start()

    def protect(self, contribution: Contribution) -> tuple[bytes, bytes]:
        """(the packed words of `contribution`, masked, sealed to the aggregator, or as they are; what vouches for the masks)."""
        counts, vouch = contribution.counts(kind_of(self.order)), b""
        vector = self.encoding.encode(contribution.update, contribution.weight, counts)
        if self.covering is not None and self.member is not None:
            self.covering.join()
            vouch = self.member.mask(vector, self.encoding)
        packed = self.encoding.packed(vector)
        if self.study.protection == "sealed":
            packed = keys.seal(bytes.fromhex(self.study.aggregator), packed, self.order.about(self.site.name))
        return packed, vouch


@dataclass
class Signing:
    """What the node signs for the process that works on `order`: keys of one sum and the context of one, each once.

    Keys must be this site's, for the study, run, attempt and sum of the order. A context is a hash: that it belongs to the order
    is checked by those who take part in the sum, and here only that the order is about masked work.
    """

    site: Site
    study: Study
    order: Order
    signed: set[bytes] = field(default_factory=set)

    def sign(self, label: bytes, body: bytes) -> bytes:
        """The signature of the site's key; raises SignatureRefused for anything but the above, and signs nothing then."""
        if self.study.protection != "masked" or label in self.signed or not self._due(label, body):
            raise SignatureRefused(
                f"asked to sign {len(body)} bytes ({label[:64]!r}) while working on {self.order.kind}"
            )
        self.signed.add(label)
        return keys.sign(self.site.key, label, body)

    def _due(self, label: bytes, body: bytes) -> bool:
        order = self.order
        if label == keys.SUM_CONTEXT:
            return isinstance(order, WorkOrder) and len(body) == CONTEXT_BYTES
        if label != keys.SUM_KEYS or not (
            isinstance(order, KeysOrder) or (isinstance(order, WorkOrder) and order.keys_next)
        ):
            return False
        place = Place(self.study.digest, order.run, order.attempt, keys_number(order))
        try:
            bundle = Bundle.from_bytes(body[len(place.canonical()) + 1 :] + bytes(SIGNATURE_BYTES))
        except MessageMalformed:
            return False
        return bundle.site == self.site.name and bundle.signed(place) == body


def keys_number(order: KeysOrder | WorkOrder) -> int:
    """The sum that keys are made for in answer to `order`."""
    return order.sum if isinstance(order, KeysOrder) else order.sum + 1


def kind_of(order: WorkOrder) -> Kind:
    """What a contribution in answer to `order` consists of."""
    if isinstance(order, TrainOrder):
        return "train"
    return "test" if isinstance(order, EvaluateOrder) and order.split == "test" else "evaluate"
