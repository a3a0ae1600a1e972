"""Whether this site is ready, as a running node tells the coordinator: in words, and without opening what holds a patient.

What the node itself can look at (settings, membership, certificate, disk, journal, pause) it looks at anew. Images, labels,
budget and worker are looked at by `fl-client check`, which leaves its words in state/readiness.json; "unchecked" until it ran.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from fl_client import sandbox
from fl_client.enrol import fingerprint
from fl_client.policy import Pause
from fl_client.site import Site
from models.study import Protection
from privacy import disk as files
from privacy import keys
from privacy.errors import IsocenterError
from privacy.greeting import Readiness

FREE_BYTES_LEAST = 2 * 1024**3  # a network's weights, a worker's scratch and a log; the cache is counted at ingestion
CERTIFICATE_DAYS_LEAST = 7  # a node renews ten days before the end of thirty
VERSION = 1  # of readiness.json
BYTES_MAX = 4096
CHECKED = ("images", "labels", "worker", "policy", "budget")
"""Subjects of `fl-client check` that only it looks at."""


_AT_LEAST: dict[Protection, str] = {
    "masked": "masked",
    "sealed": "masked or sealed",
    "plain": "masked, sealed or plain (unprotected)",
}


def told(home: Path) -> Readiness:
    """Ready, or the words of what is not good here now."""
    found = set(checked(home))
    for word, look in _LOOKS.items():
        try:
            look(home)
        except (IsocenterError, OSError, ValueError):
            found.add(word)
    return Readiness.of(found)


def note(home: Path, subjects: Iterable[str]) -> None:
    """Leave behind for the node which subjects `fl-client check` found not to be good; where there is no site, nothing."""
    try:
        folder = Site.state_of(home)
    except IsocenterError:
        return
    content = {"version": VERSION, "not_good": sorted(set(subjects) & set(CHECKED))}
    files.write_file(folder / "readiness.json", json.dumps(content).encode(), 0o600)


def checked(home: Path) -> list[str]:
    """The words that the last check left; any other file is as good as none."""
    try:
        with (Site.state_of(home) / "readiness.json").open("rb") as file:
            found = json.loads(file.read(BYTES_MAX))
        words = found["not_good"] if found["version"] == VERSION else ["unchecked"]
        return [str(word) for word in words if word in CHECKED or word == "unchecked"]
    except (IsocenterError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return ["unchecked"]


# What is looked at: each returns a sentence, or raises what is wrong. -------------------------------------------------


def settings(home: Path) -> str:
    return f"site {Site.settings_of(home).site}"


def membership(home: Path) -> str:
    site = Site.open(home)
    own = fingerprint(keys.point_hex(keys.load_key(home / "keys" / "site.key").public_key()))
    return f"joined as {site.name}; the private key is readable by you alone; its fingerprint is {own}"


def certificate(home: Path) -> str:
    path = home / "keys" / "site.pem"
    if not path.is_file():
        raise IsocenterError("no certificate yet.", remedy="Run `fl-client join LINE`.")
    certificate = keys.load_certificate(path.read_bytes())
    days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if days < CERTIFICATE_DAYS_LEAST:
        raise IsocenterError(
            f"the certificate ends in {days} days, and was not renewed.",
            remedy="Start the node, which renews it; if it has ended, join again with a new invitation in this folder.",
        )
    return f"valid for {days} more days"


def disk(home: Path) -> str:
    free = shutil.disk_usage(home).free
    if free < FREE_BYTES_LEAST:
        raise IsocenterError(f"{free / 1024**3:.1f} GiB free.", remedy="Free at least 2 GiB on this disk.")
    return f"{free / 1024**3:.0f} GiB free"


def worker(home: Path) -> str:
    """About a process that is started for it."""
    sandbox.require(home / "keys")
    return "the process that trains is confined by the kernel: no network, no other program, no key"


def policy(home: Path) -> str:
    asked = Site.settings_of(home).policy
    return (
        f"studies must be {_AT_LEAST[asked.least_protection]}; at least {asked.minimum_patients} patients, "
        f"at most {asked.maximum_rounds} rounds; an ε of at most {asked.epsilon_per_study:g} a study"
        f"{', or none' if asked.permit_without_privacy else ''}"
    )


def journal(home: Path) -> str:
    from privacy.journal import verify

    path = home / "journal.jsonl"
    return f"{verify(path)} entries, unbroken" if path.exists() else "empty"


def paused(home: Path) -> str:
    if pause := Pause.open(home, time.time()):
        raise IsocenterError(f"the site is {pause}")
    return "not paused"


_LOOKS: dict[str, Callable[[Path], str]] = {
    "settings": settings,
    "membership": membership,
    "certificate": certificate,
    "disk": disk,
    "journal": journal,
    "paused": paused,
}
