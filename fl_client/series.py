"""Which CT slices make one volume: grouped by what they say of themselves, told apart from what else a series holds.

A Series Instance UID is no volume: it may hold two kernels, two passages, a coronal copy or a localizer. Slices belong together
if patient, series, orientation, matrix and pixel spacing agree; `models.volumes.stack` then says whether they lie as a volume
does. Slices without a Series Instance UID belong to the others of their folder.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from fl_client.first_look import Header
from fl_client.sources import Reason
from models.volumes import Plane, Stack, plane_of, stack
from privacy.errors import ImageLeftOut


@dataclass(frozen=True)
class Slice:
    """One file that holds a CT slice."""

    file: str
    sha256: str
    header: Header

    @property
    def plane(self) -> Plane:
        numbers = self.header.plane
        return plane_of(numbers[:3], numbers[3:9], numbers[9:])

    @property
    def key(self) -> tuple[object, ...]:
        header = self.header
        orientation = tuple(
            round(number, 3) + 0.0 for number in header.plane[3:9]
        )  # + 0.0: -0 and 0 are the same direction
        spacing = tuple(round(number, 4) for number in header.plane[9:])
        series = header.series_uid or f"folder {self.file.rpartition('/')[0]}"
        return (header.patient, series, orientation, tuple(header.size), spacing)


@dataclass(frozen=True)
class Series:
    """Slices of one volume in order, `stack` saying where they lie; or slices that make none, with the reason."""

    slices: list[Slice]
    stack: Stack | None = None
    reason: Reason | None = None

    @property
    def name(self) -> str:
        """The file by which the volume is known: the first in order, or by name where there is no order."""
        return self.slices[0].file if self.stack else min(found.file for found in self.slices)


@dataclass
class _Group:
    slices: list[Slice] = field(default_factory=list)
    copies: list[Slice] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def add(self, found: Slice) -> None:
        """A slice that came twice, as a copy of its file or under its own number, is one slice."""
        marks = {found.sha256, *([f"uid {found.header.sop_uid}"] if found.header.sop_uid else [])}
        (self.copies if marks & self.seen else self.slices).append(found)
        self.seen |= marks


def assemble(slices: Iterable[Slice]) -> list[Series]:
    """Every slice in exactly one series, which has a stack or a reason; in an order that follows from the slices alone."""
    groups: dict[tuple[object, ...], _Group] = defaultdict(_Group)
    for found in sorted(slices, key=lambda one: one.file):
        groups[found.key].add(found)
    made: list[Series] = []
    for group in groups.values():
        made += _stacked(group.slices)
        made += [Series([copy], reason=Reason.DUPLICATE) for copy in group.copies]
    return sorted(made, key=lambda series: series.name)


def _stacked(slices: list[Slice]) -> list[Series]:
    """One series; or one for each passage of the scanner, where several lie at the same places."""
    found = _one(slices)
    passages = {one.header.acquisition for one in slices}
    if found.reason is not Reason.POSITION_TWICE or len(passages) < 2:
        return [found]
    return [_one([one for one in slices if one.header.acquisition == passage]) for passage in sorted(passages)]


def _one(slices: list[Slice]) -> Series:
    try:
        made = stack([found.plane for found in slices])
    except ImageLeftOut as refusal:
        return Series(slices, reason=Reason(refusal.reason))
    return Series([slices[number] for number in made.order], made)
