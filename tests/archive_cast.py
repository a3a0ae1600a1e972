"""Who takes part in the tests of fetching: certificates, free ports, a web archive and a DIMSE archive that may misbehave."""

import datetime as dt
import ipaddress
import socket
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Certificates:
    """An authority with a certificate for 127.0.0.1 on either side; RSA, as devices in hospitals have it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])
        made = self._make(self._name, self._key, authority=True)
        self.authority = folder / "ca.pem"
        self.authority.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        self.server, self.client = self._party(folder, "server"), self._party(folder, "client")

    def _party(self, folder: Path, name: str) -> tuple[Path, Path]:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        made = self._make(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, authority=False)
        paths = (folder / f"{name}.pem", folder / f"{name}.key")
        paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
            )
        )
        paths[1].chmod(0o600)
        return paths

    def _make(self, name: x509.Name, key: rsa.RSAPrivateKey, *, authority: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([loopback, x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
