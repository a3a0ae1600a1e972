"""What keeps a coordinator from its sites, or a researcher from it: the checks of `fl-server doctor` and `fl-study doctor`.

A home of which half is missing cannot be opened as a whole, so its files are looked at one by one here.
"""

import errno
import socket
from functools import partial
from pathlib import Path

from cryptography.x509 import Certificate

from fl_server import researcher
from fl_server.roster import Roster
from fl_server.settings import ServerFile
from models.study import read
from privacy import calls, doctor, journal, keys, reach
from privacy.doctor import Advice, Check
from privacy.errors import DocumentError, IsocenterError, NotEnrolled, Unreachable
from privacy.reach import Proxy, Way

PRIVATE = ("coordinator.key", "aggregator.key", "tls.key")


def of_coordinator(home: Path) -> list[Check]:
    """All checks of the consortium in `home`."""
    found = doctor.of_machine(home, [home / "runs"])
    path = home / "server.yaml"
    found.append(("server.yaml", partial(_settings, path)))
    settings = doctor.attempt(lambda: read(ServerFile, path))
    if settings is None:  # the finding above says why; the rest needs to know where to look
        return found
    gateway, service = (f"{settings.host}:{port}" for port in (settings.gateway_port, settings.service_port))
    return [
        *found,
        ("keys", partial(_keys, home)),
        ("certificate", partial(_certificate, home)),
        ("dns", partial(_name, settings)),
        ("gateway port", partial(_port, home, settings, settings.gateway_port)),
        ("service port", partial(_port, home, settings, settings.service_port)),
        ("gateway", partial(_from_outside, home, gateway)),
        ("service", partial(_from_outside, home, service)),
        ("sites", partial(_sites, home)),
        ("journal", partial(_journal, home)),
    ]


def of_researcher(home: Path, line: str | None = None, proxy: Proxy | None = None) -> list[Check]:
    """All checks of a researcher's folder. `line`: an invitation to try before joining; `proxy`: one instead of the file's."""
    found = doctor.of_machine(home)
    invitation = calls.InvitationLine.parse(line) if line else None
    enrolled = doctor.attempt(lambda: calls.Enrolment.open(home / "keys"))

    def way() -> Way | None:
        return proxy.way(home) if proxy else researcher.way_of(home)

    known = enrolled.service if enrolled else f"{invitation.host}:{invitation.service_port}" if invitation else None
    found += [
        ("membership", partial(_membership, home)),
        ("proxy", lambda: doctor.proxy(way(), known, "researcher.yaml")),
    ]
    if known:
        found.append(("dns", lambda: doctor.name(known.rpartition(":")[0], way())))
    if enrolled is None:
        return [*found, ("service", lambda: doctor.invited(invitation, way()))] if invitation else found
    ca = home / "keys" / "ca.pem"

    def caller() -> calls.Caller:  # without the renewal on the way that other commands make
        key = keys.load_key(home / "keys" / "researcher.key")
        return calls.Caller(enrolled.service, ca.read_bytes(), enrolled.name, key, way())

    greeting = doctor.Greeting(caller, "this machine")
    return [
        *found,
        ("certificate", lambda: doctor.certificate(home / "keys" / "researcher.pem", "researcher")),
        ("service", lambda: doctor.door(enrolled.service, way(), keys.load_certificate(ca.read_bytes()))),
        ("greeting", greeting.membership),
        ("clock", greeting.clock),
        ("versions", greeting.versions),
    ]


def _membership(home: Path) -> str:
    try:
        enrolled = calls.Enrolment.open(home / "keys")
    except NotEnrolled as error:
        raise Advice(
            str(error),
            "Name the folder with --home. Before joining, `fl-study doctor LINE` also tries the way; the invitation stays "
            "unused. To write, check and simulate studies nobody has to join.",
        ) from None
    keys.load_key(home / "keys" / "researcher.key")
    return f"joined as {enrolled.name}; the private key is readable by this account alone"


def _settings(path: Path) -> str:
    if not path.is_file():
        raise DocumentError(
            f"there is no consortium in {path.parent.absolute()} (no server.yaml)",
            remedy="Name its folder with --home, or found one with `fl-server init HOME`.",
        )
    settings = read(ServerFile, path)
    return f"consortium {settings.name}, for the sites at {settings.host}"


def _keys(home: Path) -> str:
    folder = home / "keys"
    for name in PRIVATE:
        keys.read_private(folder / name)
    where = (
        "at hand" if (folder / "ca.key").exists() else "offline: certificates are signed by hand (`fl-server requests`)"
    )
    return f"{', '.join(PRIVATE)} are there; the authority's key is {where}"


def _certificate(home: Path) -> str:
    """The server's own certificate, which sites look at, and the authority's."""
    server, authority = keys.load_certificate(_first(home / "keys" / "tls.pem")), _authority(home)
    for what, held in (("the server's certificate", server), ("the authority", authority)):
        if keys.ended(held):
            raise IsocenterError(
                f"{what} ended on {held.not_valid_after_utc:%Y-%m-%d}",
                remedy="No site can connect any more. Found a new consortium (`fl-server init`), and invite the sites anew.",
            )
    if not doctor.issued_by(authority, server):
        raise IsocenterError(
            "the server's certificate is not from the authority beside it", remedy="Restore keys/ from your backup."
        )
    days = min(doctor.days_left(each) for each in (server, authority))
    if days < doctor.CERTIFICATE_DAYS:
        raise Advice(
            f"{days} days left of the server's certificate or the authority",
            "Found a new consortium before then (`fl-server init`), and invite the sites to it.",
        )
    return f"the server's certificate and the authority are valid for {days} more days"


def _first(path: Path) -> bytes:
    """The first certificate of a chain in PEM form."""
    end = b"-----END CERTIFICATE-----\n"
    return path.read_bytes().partition(end)[0] + end


def _authority(home: Path) -> Certificate:
    return keys.load_certificate((home / "keys" / "ca.pem").read_bytes())


def _name(settings: ServerFile) -> str:
    """Whether sites can find the host, as seen from here."""
    said = doctor.name(settings.host, None)
    if settings.listen.startswith("127.") and settings.host != "localhost" and not settings.host.startswith("127."):
        raise Advice(
            f"{said}, and the ports listen on {settings.listen}, where only this machine reaches them",
            "Set `listen` in server.yaml to this machine's address or 0.0.0.0, and start the coordinator again.",
        )
    return said


def _port(home: Path, settings: ServerFile, port: int) -> str:
    """Free, ours, or somebody else's."""
    here = "127.0.0.1" if settings.listen == "0.0.0.0" else settings.listen  # noqa: S104  compared, not bound
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.listen, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise IsocenterError(
                f"{settings.listen}:{port} cannot be listened on ({error.strerror})",
                remedy="`listen` in server.yaml has to be an address of this machine; ports below 1024 need a right of their "
                "own.",
            ) from None
    else:
        raise Advice(f"{settings.listen}:{port} is free: no coordinator runs here", "`fl-server start`")
    try:
        chain = reach.shown_chain(here, port, None, doctor.NETWORK_S)
        ours = doctor.issued_by(_authority(home), chain[0])
    except Unreachable:
        ours = False
    if not ours:
        raise IsocenterError(
            f"another program listens at {here}:{port}",
            remedy=f"Find it with `ss -ltnp 'sport = :{port}'` and stop it, or change the port in server.yaml before sites join.",
        )
    return f"the coordinator listens at {here}:{port}"


def _from_outside(home: Path, address: str) -> str:
    """The name that sites use, tried from here. A router that leads nobody back to itself is no fault."""
    try:
        return doctor.door(address, None, _authority(home))
    except Unreachable as error:
        raise Advice(
            f"{error}, from this machine", f"{error.remedy} Some routers do not lead back in: then try it at a site."
        ) from None


def _sites(home: Path) -> str:
    """Who runs another version, or whose certificate was not renewed."""
    path = home / "roster.sqlite"
    if not path.is_file():
        raise DocumentError(f"{path} is missing", remedy="Restore the folder from your backup.")
    roster = Roster(path)
    parties = [party for party in (*roster.sites(), *roster.researchers()) if not party.revoked]
    told, odd = roster.told(), list[str]()
    for party in parties:
        if keys.ended(party.certificate):
            odd.append(f"the certificate of {party.name} has ended (`fl-server invite {party.name}`)")
        if party.name in told and (found := told[party.name].skew(party.name)):
            odd.append(f"{found.sentence.rstrip('.')} ({found.remedy.rstrip('.')})")
    if odd:
        raise Advice("; ".join(odd), "`fl-server sites` lists them all; tell those it names.")
    return f"{len(parties)} sites and researchers are enrolled, none of another version"


def _journal(home: Path) -> str:
    path = home / "journal.jsonl"
    return f"{journal.verify(path)} entries, unbroken" if path.exists() else "empty"
