"""Who is speaking: the versions of both sides of a connection, who has to upgrade to what, and whether a site is ready.

A version is four whole numbers: the wire's (messages that one side understands), and Isocenter's major, minor and patch. Nothing
else can be said of a version, so nothing else can be kept or shown of one. An earlier Isocenter tells none, and is understood.

Of itself a site tells whether it is ready, and which of WORDS stand in the way; never a count, a path or a sentence.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from privacy.errors import MessageMalformed

WIRE = 4  # of the messages in privacy/wire.py, and of the calls that carry them
NUMBER_MAX = 9999
HEADER = "isocenter-versions"  # of requests to the gateway and of its answers: the four numbers with dots between
WORDS = (
    *("settings", "membership", "certificate", "unchecked", "images", "labels", "worker", "policy", "budget"),
    *("disk", "journal", "paused", "other"),
)
"""What may keep a site from being ready; "other" stands for what a later version calls by a word of its own."""

_HEADER = re.compile(r"(0|[1-9][0-9]{0,3})(?:\.(0|[1-9][0-9]{0,3})){3}", re.ASCII)
_RELEASE = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?:\.([0-9]{1,4}))?")


@dataclass(frozen=True, order=True)
class Versions:
    """What one side speaks and runs. The later one compares as larger."""

    wire: int
    major: int
    minor: int
    patch: int

    @property
    def release(self) -> str:
        """0.1.0"""
        return f"{self.major}.{self.minor}.{self.patch}"

    def __str__(self) -> str:
        """As HEADER carries it; `read` is the inverse."""
        return f"{self.wire}.{self.release}"

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.wire, self.major, self.minor, self.patch

    @classmethod
    def read(cls, text: str) -> "Versions | None":
        """The versions in a header; None for anything else, which counts as not told."""
        return cls(*map(int, text.split("."))) if _HEADER.fullmatch(text) else None

    @classmethod
    def of(cls, *numbers: object) -> "Versions | None":
        """The versions of these four numbers; None unless each is one in range, and the wire's is above 0."""
        whole = [number for number in numbers if type(number) is int and 0 <= number <= NUMBER_MAX]
        return cls(*whole) if len(whole) == len(numbers) == len(cls.__dataclass_fields__) and whole[0] else None


@functools.cache
def own() -> Versions:
    """Of this installation; 0.0.0 if it was never installed."""
    try:
        found = _RELEASE.match(metadata.version("isocenter"))
    except metadata.PackageNotFoundError:
        found = None
    major, minor, patch = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    return Versions(WIRE, major, minor, patch)


@dataclass(frozen=True)
class Skew:
    """Two sides with different versions. `must`: neither understands the other's orders and reports until it is mended."""

    who: str
    to: str
    must: bool
    sentence: str

    @property
    def remedy(self) -> str:
        return f"{_begun(self.who)} has to upgrade to Isocenter {self.to}."


def skew(here: Versions, there: Versions | None, us: str, them: str) -> Skew | None:
    """Who has to upgrade, None for equal versions: always the earlier one, to the version of the later one.

    `us` and `them`: how a sentence calls the two sides. `there` None: the other side spoke and told no version, as none did
    before they were exchanged.
    """
    if there == here:
        return None
    told = f"Isocenter {there.release}" if there else "an Isocenter that tells no version yet"
    sentence = f"{_begun(them)} runs {told}, {us} {here.release}"
    must = there is not None and there.wire != here.wire
    if there is not None and must:
        sentence += f"; their messages (wire {there.wire} and {here.wire}) are not understood by each other"
    later, who = (here, them) if there is None or there < here else (there, us)
    return Skew(who, later.release, must, f"{sentence}.")


def _begun(who: str) -> str:
    """As a sentence begins; the name of a party stays as it is."""
    return f"{who[0].upper()}{who[1:]}" if " " in who else who


@dataclass(frozen=True)
class Readiness:
    """Whether a site is ready, and what stands in the way: distinct ones of WORDS, in their order."""

    ready: bool
    reasons: tuple[str, ...] = ()

    @classmethod
    def of(cls, reasons: Iterable[str]) -> "Readiness":
        """Ready if there are none. A word that is none of WORDS becomes "other"."""
        given = {word if word in WORDS else "other" for word in reasons}
        return cls(not given, tuple(word for word in WORDS if word in given))

    @classmethod
    def read(cls, ready: bool, reasons: Sequence[Any]) -> "Readiness":
        """What came over a connection; raises MessageMalformed if word and reasons contradict each other, or are too many."""
        found = cls.of(str(word) for word in reasons[: len(WORDS) + 1])
        if len(reasons) > len(WORDS) or found.ready != ready:
            raise MessageMalformed("a site is ready without reasons against it, or it is not, and says why")
        return found
