"""Who signs certificates: the authority's key in this home, or one that lives on another machine and signs by hand.

With the key at hand (HOME/keys/ca.key) a request is answered at once. Without it the request is kept in the roster; then

    coordinator   `fl-server requests --out LIST`     the waiting requests, signed by the coordinator
    other machine `fl-server sign LIST --authority F` shows each, asks, and writes certificates; needs F and no network
    coordinator   `fl-server accept CERTIFICATES`     each is checked against its request before it counts

and both files are carried by hand. F holds ca.key, ca.pem and coordinator.pem, so a list of somebody else is not signed. What a
certificate says (name, role, days) stands in the signed list and is shown; the request itself is trusted for its key alone.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509

from fl_server.roster import Home, Party, party_role
from privacy import disk, keys
from privacy.calls import PartyRole
from privacy.errors import AwaitingSignature, DocumentError, IsocenterError, KeyFileUnsafe, NotEnrolled, TrustError

LIST_BYTES_MAX = 16 * 1024 * 1024  # a request is under 1 KiB


@dataclass(frozen=True)
class Request:
    """One certificate that is asked for."""

    name: str
    role: PartyRole
    csr: str  # PEM
    asked: str  # UTC, 2026-01-31T12:00:00Z
    days: int

    @property
    def key(self) -> keys.PublicKey:
        return keys.key_of_csr(self.csr.encode())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key, in groups: what its owner can read out over the telephone (`fl-client check`)."""
        return keys.grouped(keys.digest(bytes.fromhex(keys.point_hex(self.key)))[:16])


def enrol(home: Home, token: str, name: str, role: str, csr: bytes) -> Party:
    """Redeem an invitation. Repeating it with the same key is harmless. Raises AwaitingSignature while nobody has signed."""
    party, fresh = home.roster.redeem(token, name, role, csr, _issuing(home, name, role, csr))
    if party is None:
        if fresh:
            home.journal.append("signature-requested", party=name, role=role)
        raise _awaiting(name)
    if fresh:
        home.journal.append("enrolled", party=name, role=role, certificate=keys.fingerprint(party.certificate))
    return party


def renew(home: Home, party: Party, csr: bytes) -> x509.Certificate:
    """The present certificate of `party`, a new one if it is time. Asked twice, the second answer is the first.

    The key stays: studies name it. Raises TrustError for another key, AwaitingSignature while nobody has signed.
    """
    if keys.key_of_csr(csr) != party.public_key:
        raise TrustError(
            "a certificate is renewed for the enrolled key only",
            remedy="If the key was lost, ask the coordinator to revoke it, and join with a new invitation.",
        )
    if not keys.renewal_due(party.certificate):
        return party.certificate
    issue = _issuing(home, party.name, party.role, csr)
    if issue is None:
        if home.roster.ask(party.name, party.role, csr):
            home.journal.append("signature-requested", party=party.name, role=party.role)
        raise _awaiting(party.name)
    renewed = home.roster.renewed(party.name, issue())
    home.journal.append("renewed", party=party.name, certificate=keys.fingerprint(renewed.certificate))
    return renewed.certificate


def _issuing(home: Home, name: str, role: str, csr: bytes) -> Callable[[], x509.Certificate] | None:
    path = home.root / "keys" / "ca.key"
    if not path.exists():
        return None

    def issue() -> x509.Certificate:
        authority = keys.Authority(keys.load_key(path), keys.load_certificate(home.ca_pem))
        return keys.issue(authority, csr, name, party_role(role), home.settings.certificate_days)

    return issue


def _awaiting(name: str) -> AwaitingSignature:
    return AwaitingSignature(f"the certificate of {name} waits for a signature: the consortium's authority is offline")


# By hand -------------------------------------------------------------------------------------------------------------


def waiting(home: Home) -> list[Request]:
    """The requests that nobody has signed yet, oldest first."""
    days = home.settings.certificate_days
    return [Request(name, role, csr.decode(), asked, days) for name, role, csr, asked in home.roster.requests()]


def signing_list(home: Home) -> bytes:
    """The waiting requests as one file for the authority, signed by the coordinator."""
    body = json.dumps([asdict(request) for request in waiting(home)], sort_keys=True, separators=(",", ":"))
    signature = keys.sign(home.coordinator_key, keys.SIGNING_LIST, body.encode())
    return json.dumps({"version": 1, "requests": body, "signature": signature.hex()}, indent=1).encode() + b"\n"


def read_list(content: bytes, folder: Path) -> list[Request]:
    """On the authority's machine: the requests of a signing list, if the coordinator known to `folder` signed it.

    Raises DocumentError, or SignatureInvalid for a list of somebody else.
    """
    coordinator = keys.load_public(_file_of(folder, "coordinator.pem"))
    try:
        found = json.loads(content[: LIST_BYTES_MAX + 1])
        body, signature = found["requests"].encode(), bytes.fromhex(found["signature"])
        fits = found["version"] == 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise DocumentError("this is no list of `fl-server requests --out`", remedy="Have it written again.")
    keys.verify(coordinator, keys.SIGNING_LIST, body, signature)
    requests = [Request(**entry) for entry in json.loads(body)]
    for request in requests:
        party_role(request.role)
        keys.check_name(request.name)
        keys.key_of_csr(request.csr.encode())
    return requests


def sign(requests: list[Request], folder: Path) -> bytes:
    """On the authority's machine: certificates for `requests`, as one file for `accept`."""
    authority = keys.Authority(keys.load_key(folder / "ca.key"), keys.load_certificate(_file_of(folder, "ca.pem")))
    if keys.public_key_of(authority.certificate) != authority.key.public_key():
        raise TrustError(f"ca.key and ca.pem in {folder} do not belong together", remedy="Restore the folder.")
    made = [
        keys.issue(authority, request.csr.encode(), request.name, request.role, request.days) for request in requests
    ]
    pems = [keys.certificate_pem(certificate).decode() for certificate in made]
    names = [{"name": request.name, "certificate": pem} for request, pem in zip(requests, pems, strict=True)]
    return json.dumps({"version": 1, "certificates": names}, indent=1).encode() + b"\n"


def accept(home: Home, content: bytes) -> tuple[list[Party], dict[str, str]]:
    """Make signed certificates count: (parties that now have one, name -> why not). Each is held against its request."""
    try:
        found = json.loads(content[: LIST_BYTES_MAX + 1])
        pairs = [(str(entry["name"]), str(entry["certificate"]).encode()) for entry in found["certificates"]]
        fits = found["version"] == 1
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise DocumentError("these are no certificates of `fl-server sign`", remedy="Have them signed again.")
    asked, ca = {request.name: request for request in waiting(home)}, keys.load_certificate(home.ca_pem)
    parties: list[Party] = []
    refused: dict[str, str] = {}
    for name, pem in pairs:
        try:
            if name not in asked:
                raise TrustError("nothing of this name waits for a signature")
            certificate = keys.load_certificate(pem)
            keys.check_issued(ca, certificate, name, asked[name].role)
            if keys.public_key_of(certificate) != asked[name].key:
                raise TrustError("the certificate is over another key than the one that waits")
            parties.append(home.roster.signed(name, certificate))
            home.journal.append(
                "enrolled", party=name, role=asked[name].role, certificate=keys.fingerprint(certificate)
            )
        except IsocenterError as error:
            refused[name if name in asked else "unknown"] = str(error)
    return parties, refused


def move(home: Home, folder: Path) -> None:
    """Take the authority's key out of the home: copy what signs into `folder`, then remove keys/ca.key here."""
    key = keys.load_key(home.root / "keys" / "ca.key")
    if folder.exists() and any(folder.iterdir()):
        raise KeyFileUnsafe(f"{folder} is not empty", remedy="Choose a new folder, such as one on a USB stick.")
    keys.copy_key(key, folder / "ca.key")
    keys.write_public(folder / "ca.pem", home.ca_pem)
    keys.write_public(folder / "coordinator.pem", keys.public_pem(home.coordinator_key))
    keys.load_key(folder / "ca.key")  # it can be read again before the only other copy goes
    (home.root / "keys" / "ca.key").unlink()
    disk.flush_folder(home.root / "keys")
    home.journal.append("authority-moved")


def _file_of(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError:
        raise NotEnrolled(
            f"{folder} is no folder of an authority: {name} cannot be read",
            remedy="Give the folder that `fl-server offline` made.",
        ) from None
