"""Looking at findings, and servers on loopback for `doctor` to meet: shared by the tests of its parts."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from privacy import keys
from privacy.doctor import Check, Examination, Finding

PATIENT = "Doe^Jane 1943-02-01"


def examined(checks: list[Check]) -> dict[str, Finding]:
    found = Examination(checks).run(lambda done, left: None, 60.0)
    assert [each.subject for each in found] == [subject for subject, _ in checks]
    for each in found:
        assert each.sentence.isprintable() and bool(each.remedy) == (each.state != "ok"), each
    return {each.subject: each for each in found}


def look(subject: str, checks: list[Check]) -> Finding:
    return examined([check for check in checks if check[0] == subject])[subject]


class Authority:
    """An authority of somebody's, and a TLS server with a certificate of it on loopback."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.made = keys.make_ca(ec.generate_private_key(ec.SECP256R1()), name)

    @contextmanager
    def serving(self, host: str = "127.0.0.1", days: int = 10) -> Iterator[int]:
        key = ec.generate_private_key(ec.SECP256R1())
        shown = keys.issue(self.made, keys.make_csr(key, "server"), "server", "server", days, host)
        (self.folder / "tls.pem").write_bytes(keys.certificate_pem(shown))
        (self.folder / "tls.key").unlink(missing_ok=True)
        keys.copy_key(key, self.folder / "tls.key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "tls.pem", self.folder / "tls.key")
        with listening(lambda link: context.wrap_socket(link, server_side=True).close()) as port:
            yield port


@contextmanager
def listening(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:
                    return
                try:
                    serve(link)
                except OSError:
                    link.close()

        threading.Thread(target=take, daemon=True).start()
        yield int(server.getsockname()[1])
