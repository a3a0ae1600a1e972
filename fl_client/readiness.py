"""Whether a site is ready, as a list of findings: each says what was looked at, and what to do where it is not good."""

import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fl_client import sandbox
from fl_client.enrol import fingerprint
from fl_client.ingest import Index
from fl_client.site import Site
from models.labels import LabelTable
from models.study import Protection
from privacy import keys
from privacy.errors import DataError, IsocenterError

FREE_BYTES_LEAST = 2 * 1024**3  # a network's weights, a worker's scratch and a log; the cache is counted at ingestion
CERTIFICATE_DAYS_LEAST = 7  # a node renews ten days before the end of thirty
CONNECT_S = 5.0
_AT_LEAST: dict[Protection, str] = {
    "masked": "masked",
    "sealed": "masked or sealed",
    "plain": "masked, sealed or plain (unprotected)",
}


@dataclass(frozen=True)
class Finding:
    subject: str
    good: bool
    sentence: str


def findings(home: Path) -> list[Finding]:
    """One finding per subject, about a dozen; never raises for what it looks at."""
    found: list[Finding] = []
    looks: list[tuple[str, Callable[[Path], str]]] = [
        ("site.yaml", _settings),
        ("membership", _membership),
        ("certificate", _certificate),
        ("gateway", lambda path: _reachable(path, "gateway")),
        ("service", lambda path: _reachable(path, "service")),
        ("images", _images),
        ("labels", _labels),
        ("disk", _disk),
        ("worker", _worker),
        ("policy", _policy),
        ("budget", _budget),
        ("journal", _journal),
    ]
    for subject, look in looks:
        try:
            found.append(Finding(subject, True, look(home)))
        except IsocenterError as error:
            found.append(Finding(subject, False, f"{error} {error.remedy}"))
        except OSError as error:
            found.append(Finding(subject, False, f"{error.strerror or error}"))
    return found


def _settings(home: Path) -> str:
    return f"site {Site.settings_of(home).site}"


def _membership(home: Path) -> str:
    site = Site.open(home)
    own = fingerprint(keys.point_hex(keys.load_key(home / "keys" / "site.key").public_key()))
    return f"joined as {site.name}; the private key is readable by you alone; its fingerprint is {own}"


def _certificate(home: Path) -> str:
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


def _reachable(home: Path, which: str) -> str:
    coordinator = Site.open(home).settings.coordinator
    if coordinator is None:
        raise IsocenterError("site.yaml names no coordinator.", remedy="Run `fl-client join LINE`.")
    address = coordinator.gateway if which == "gateway" else coordinator.service
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise IsocenterError(
            f"nothing answers at {address} ({error.strerror or error}).",
            remedy="The coordinator may be down, or a firewall blocks outgoing connections to this port.",
        ) from None
    return f"{address} answers"


def _images(home: Path) -> str:
    index = Index.open(Site.state_of(home))
    if not index.taken:
        raise DataError("no image was taken.", remedy="Run `fl-client ingest` and read its table.")
    return f"{index.taken} images of {index.patients} patients in the cache"


def _labels(home: Path) -> str:
    source = Site.source_of(Site.settings_of(home), home)
    table = LabelTable.read(home / source.labels.table, source.labels)
    unmapped = sum(sum(words.values()) for words in table.unmapped.values())
    note = f"; {unmapped} label words are not mapped and count as missing" if unmapped else ""
    return f"{len(table)} rows for {', '.join(source.labels.targets)}{note}"


def _disk(home: Path) -> str:
    free = shutil.disk_usage(home).free
    if free < FREE_BYTES_LEAST:
        raise IsocenterError(f"{free / 1024**3:.1f} GiB free.", remedy="Free at least 2 GiB on this disk.")
    return f"{free / 1024**3:.0f} GiB free"


def _worker(home: Path) -> str:
    sandbox.require(home / "keys")
    return "the process that trains is confined by the kernel: no network, no other program, no key"


def _policy(home: Path) -> str:
    policy = Site.settings_of(home).policy
    return (
        f"studies must be {_AT_LEAST[policy.least_protection]}; at least {policy.minimum_patients} patients, "
        f"at most {policy.maximum_rounds} rounds; an ε of at most {policy.epsilon_per_study:g} a study"
        f"{', or none' if policy.permit_without_privacy else ''}"
    )


def _budget(home: Path) -> str:
    from fl_client.budget import open_budget, shown

    found = open_budget(home)
    unbounded = f"; {len(found.unprotected)} runs without differential privacy" if found.unprotected else ""
    return (
        f"ε {shown(found.total)} of {found.caps['total']:g} charged to the most used patient, {shown(found.year)} of "
        f"{found.caps['year']:g} in the last 365 days{unbounded}"
    )


def _journal(home: Path) -> str:
    from privacy.journal import verify

    path = home / "journal.jsonl"
    return f"{verify(path)} entries, unbroken" if path.exists() else "empty"
