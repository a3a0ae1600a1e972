"""Who takes part in the tests of fetching: certificates, free ports, a web archive and a DIMSE archive that may misbehave."""

import datetime as dt
import ipaddress
import select
import socket
import ssl
import threading
from contextlib import suppress
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


class TlsFront:
    """TLS in front of a plain port of this machine, as a clinic's reverse proxy does it."""

    def __init__(self, behind: int, certificates: Certificates) -> None:
        self._behind, self._context = behind, ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(*certificates.server)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._door.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._door.accept()
                threading.Thread(target=self._carry, args=(caller,), daemon=True).start()

    def _carry(self, caller: socket.socket) -> None:
        with suppress(OSError), caller, socket.create_connection(("127.0.0.1", self._behind)) as inner:
            with self._context.wrap_socket(caller, server_side=True) as outer:
                while True:
                    ready = [outer] if outer.pending() else select.select([outer, inner], [], [])[0]
                    for source in ready:
                        data = source.recv(65536)
                        if not data:
                            return
                        (inner if source is outer else outer).sendall(data)

    def close(self) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
