"""What this site was offered and what it decided: the only place where a study becomes permitted here.

One file for each study the site answered, studies/<digest>.json (0600): the offer with its signatures, and the signed
statement that went to the coordinator. This file, not what the coordinator remembers, decides about orders.
"""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from models.study import Study
from privacy import disk, keys
from privacy.errors import (
    DocumentError,
    IsocenterError,
    NewerVersion,
    OrderForged,
    RunUnknown,
    SignatureInvalid,
    StudyNotApproved,
)
from privacy.statements import Decision, Statement

VERSION = 1
FILE_BYTES_MAX = 2 * 1024 * 1024  # a study is at most 256 KiB; the rest is signatures
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Offer:
    """A study as the coordinator offers it. `decision` is what holds at this site, None while it has not answered."""

    study: Study
    researcher: str
    researcher_certificate: bytes  # PEM
    researcher_signature: bytes  # label STUDY_SUBMIT over the canonical study
    coordinator_signature: bytes  # label STUDY_OFFER over the canonical study
    submitted: str  # UTC, 2026-01-31T12:00:00Z
    decision: Decision | None = None

    @property
    def digest(self) -> str:
        return self.study.digest


@dataclass(frozen=True)
class Consent:
    """An answered offer: the site's statement, signed with its key (label STUDY_DECISION)."""

    offer: Offer
    statement: Statement
    signature: bytes

    def store(self, home: Path) -> None:
        """Make the decision hold from now on; it is on the disk when this returns."""
        offer = self.offer
        content = {
            "version": VERSION,
            "study": offer.study.canonical().decode(),
            "researcher": offer.researcher,
            "researcher_certificate": offer.researcher_certificate.decode("ascii"),
            "researcher_signature": offer.researcher_signature.hex(),
            "coordinator_signature": offer.coordinator_signature.hex(),
            "submitted": offer.submitted,
            "statement": self.statement.body().decode(),
            "signature": self.signature.hex(),
        }
        keys.write_private(_path(home, offer.digest), json.dumps(content, indent=1).encode())

    @classmethod
    def open(cls, home: Path, digest: str) -> "Consent | None":
        """This site's decision about a study, None if it has not answered. Raises DocumentError for a damaged file."""
        path = _path(home, digest)
        try:
            with path.open("rb") as file:
                content = json.loads(file.read(FILE_BYTES_MAX))
            disk.require_known(path, content["version"], VERSION)
            statement = Statement.read(content["statement"].encode())
            offer = Offer(
                study=_study(content["study"].encode()),
                researcher=content["researcher"],
                researcher_certificate=content["researcher_certificate"].encode("ascii"),
                researcher_signature=bytes.fromhex(content["researcher_signature"]),
                coordinator_signature=bytes.fromhex(content["coordinator_signature"]),
                submitted=content["submitted"],
                decision=statement.decision,
            )
            signature = bytes.fromhex(content["signature"])
            fits = content["version"] == VERSION and digest == offer.digest == statement.digest
        except FileNotFoundError:
            return None
        except NewerVersion:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsocenterError):
            fits = False
        if not fits:
            raise DocumentError(f"{path} is damaged", remedy="Remove it, then approve or decline the study again.")
        return cls(offer, statement, signature)


def approved(home: Path, digest: str, coordinator: keys.PublicKey) -> Study:
    """The study behind `digest`, if the coordinator offered it and this site's present decision is to approve it.

    Raises StudyNotApproved, or OrderForged if the stored study does not carry the coordinator's signature.
    """
    consent = Consent.open(home, digest) if _DIGEST.fullmatch(digest) else None
    if consent is None:
        raise StudyNotApproved("this site has not approved the study")
    if consent.statement.decision != "approved":
        raise StudyNotApproved("this site declined the study")
    try:
        keys.verify(coordinator, keys.STUDY_OFFER, consent.offer.study.canonical(), consent.offer.coordinator_signature)
    except SignatureInvalid:
        raise OrderForged("the study that was approved here is not signed by the coordinator") from None
    return consent.offer.study


@contextmanager
def deciding(home: Path) -> Iterator[None]:
    """One decision at a time, whichever process makes it: a rule must not overtake a person who is just deciding."""
    folder = home / "studies"
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    with (folder / "deciding.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def consents(home: Path) -> list[Consent]:
    """Every decision of this site, in order of digest. Raises DocumentError for a damaged file."""
    names = sorted(path.stem for path in (home / "studies").glob("*.json"))
    found = (Consent.open(home, name) for name in names if _DIGEST.fullmatch(name))
    return [consent for consent in found if consent is not None]


def find_consent(home: Path, text: str) -> Consent:
    """The one answered study whose digest begins with `text`, as this site's own files say. Raises RunUnknown."""
    found = [consent for consent in consents(home) if text and consent.offer.digest.startswith(text)]
    if len(found) != 1:
        what = "more than one study" if found else "no study"
        raise RunUnknown(f"{what} that was answered here begins with {text!r}", remedy="See `fl-client studies`.")
    return found[0]


@lru_cache(maxsize=4)
def _study(text: bytes) -> Study:
    """A study's file is read at each order, its signature verified, and its text seldom another one than before."""
    return Study.from_canonical(text)


def _path(home: Path, digest: str) -> Path:
    if not _DIGEST.fullmatch(digest):  # it becomes a file name
        raise StudyNotApproved("this is no digest of a study")
    return home / "studies" / f"{digest}.json"
