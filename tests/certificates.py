"""Certificates of any age, made with an authority's key by hand: what no command of ours would issue."""

import datetime as dt
import sqlite3
from pathlib import Path

from coordinator import Coordinator
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_server.roster import Home
from privacy import keys


def certificate(
    authority: keys.Authority, public: keys.PublicKey, name: str, role: str, *, begun_days: float, left_days: float
) -> x509.Certificate:
    """One that began `begun_days` ago and ends in `left_days`, both of any sign."""
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=begun_days))
        .not_valid_after(now + dt.timedelta(days=left_days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"{name}.{role}.isocenter")]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def authority_of(home: Home) -> keys.Authority:
    return keys.Authority(keys.load_key(home.root / "keys" / "ca.key"), keys.load_certificate(home.ca_pem))


def age(served: Coordinator, name: str, role: str = "site", *, begun_days: float, left_days: float) -> x509.Certificate:
    """Exchange a party's certificate, in its own folder and in the roster, for one of that age over the same key."""
    key = keys.load_key(served.keys_of(name) / f"{role}.key")
    made = certificate(
        authority_of(served.home), key.public_key(), name, role, begun_days=begun_days, left_days=left_days
    )
    keys.write_public(served.keys_of(name) / f"{role}.pem", keys.certificate_pem(made))
    put(served.home.roster.path, name, made)
    return made


def put(roster: Path, name: str, made: x509.Certificate) -> None:
    with sqlite3.connect(roster) as db:
        row = (keys.certificate_pem(made), f"{made.serial_number:x}", name)
        db.execute("UPDATE parties SET certificate = ?, serial = ? WHERE name = ?", row)


def held(served: Coordinator, name: str, role: str = "site") -> x509.Certificate:
    """The certificate in a party's own folder."""
    return keys.load_certificate((served.keys_of(name) / f"{role}.pem").read_bytes())
