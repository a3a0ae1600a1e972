"""The gateway's reading of a request head, its counting of refusals, and what it does when the roster cannot be read.

Attacks on a real coordinator are in `test_hostile_gateway.py`.
"""

import asyncio
import dataclasses
import datetime as dt
import itertools
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import authority_of
from coordinator import free_port, settings
from cryptography.hazmat.primitives.asymmetric import ec
from hospital import Hospital, study

from fl_server import gateway
from fl_server.door import listen
from fl_server.doorbell import BODY_BYTES_MAX
from fl_server.gateway import FLEET_PATHS, Gateway, Identity, Limits, Refusals, Refused, Standing, answer, read_head
from fl_server.link import roster_of
from fl_server.roster import Home
from privacy import keys
from privacy.errors import IsocenterError, public_codes

BEAT = b"POST /v1/fleet/send-node-heartbeat HTTP/1.1"


def head(line: bytes = BEAT, *fields: bytes) -> bytes:
    return b"\r\n".join([line, *(fields or (b"Host: x", b"Content-Length: 7")), b"", b""])


def test_a_head_is_read() -> None:
    read = read_head(head(BEAT, b"HOST: x", b"content-LENGTH:  7 ", b"flwr-public-key:\tabc= ", b"Accept: */*"))
    assert (read.path, read.length, read.shown) == ("/v1/fleet/send-node-heartbeat", 7, b"abc=")


@pytest.mark.parametrize("path", sorted(FLEET_PATHS))
def test_a_nodes_calls_pass_by_post_only(path: str) -> None:
    assert read_head(head(b"POST %s HTTP/1.1" % path.encode())).path == path
    for method in (b"GET", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"CONNECT"):
        with pytest.raises(Refused, match="path-unknown"):
            read_head(head(b"%s %s HTTP/1.1" % (method, path.encode())))


def test_a_refusal_for_who_somebody_is_names_one_of_our_public_codes() -> None:
    forbidden = {code for code, line in gateway.STATUS.items() if line.startswith(b"403")}
    assert forbidden == {"trust", "not-enrolled", "certificate-expired", "certificate-revoked"}
    assert forbidden < public_codes()
    for code in gateway.STATUS:
        text = answer(code)
        assert text.endswith(b"\r\n\r\n" + code.encode()) and f"content-length: {len(code)}\r\n".encode() in text


def test_the_largest_network_fits_into_a_body_many_times(tmp_path: Path) -> None:
    from models import networks

    largest = study(**{"images: {size_px: 32}": "images: {size_px: 32}\nnetwork: {name: densenet121}"})
    weights = networks.to_vector(networks.build(largest)).nbytes
    assert 20e6 < weights < BODY_BYTES_MAX / 8
    # And what a site sends is not larger than the weights, for the smallest network at least.
    hospital = Hospital.open(tmp_path)
    sent = hospital.encoding().size
    assert sent < 2 * networks.to_vector(networks.build(hospital.study)).nbytes


# Counting


class Notes:
    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.broken = False

    def __call__(self, kind: str, *, code: str, count: int) -> None:
        if self.broken:
            raise OSError("no space left on device")
        assert kind == "gateway-refused"
        self.lines.append((code, count))


def test_refusals_are_written_as_sums_and_ever_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    async def attacked() -> tuple[list[tuple[float, str, int]], int]:
        notes, written, total = Notes(), [], 0
        refusals = Refusals(notes)
        for second in range(24 * 3600):  # a day, a thousand times a second
            for _ in range(2):
                refusals.count("too-slow")
            total += 2
            if second % 3 == 0:
                before = len(notes.lines)
                await refusals.write(float(second))
                written += [(float(second), *line) for line in notes.lines[before:]]
        await refusals.write(24 * 3600.0, everything=True)
        return written, sum(count for _, count in notes.lines) - total

    written, missing = asyncio.run(attacked())
    assert missing == 0
    times = [time for time, _, _ in written]
    assert times[0] == 0 and times[1] >= 10 and min(b - a for a, b in itertools.pairwise(times)) >= 10
    assert len(written) < 170


def test_after_a_quiet_time_a_refusal_is_written_at_once_again() -> None:
    async def twice() -> list[tuple[str, int]]:
        notes = Notes()
        refusals = Refusals(notes)
        for moment in (0.0, 5.0, 2000.0, 4000.0):
            refusals.count("trust")
            await refusals.write(moment)
        return notes.lines

    assert asyncio.run(twice()) == [("trust", 1), ("trust", 2), ("trust", 1)]


def test_what_the_journal_does_not_take_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> list[tuple[str, int]]:
        notes = Notes()
        notes.broken = True
        refusals = Refusals(notes)
        refusals.count("trust")
        with caplog.at_level(logging.ERROR):
            await refusals.write(0.0)
        notes.broken = False
        refusals.count("trust")
        await refusals.write(1.0, everything=True)
        return notes.lines

    assert asyncio.run(broken()) == [("trust", 2)]
    assert "does not take" in caplog.text


# Who


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    yield Home.found(tmp_path / "consortium", settings())


def made(home: Home, roster: Any, limits: Limits = Limits(look_s=0.01)) -> Gateway:  # noqa: B008  frozen
    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks Flower here")

    return Gateway(nothing, keys.load_certificate(home.ca_pem), roster, home.journal.append, limits)


def identity_of(home: Home, door: Gateway, name: str, key: keys.PrivateKey, days: int = 5) -> Identity:
    issued = keys.issue(authority_of(home), keys.make_csr(key, name), name, "site", days)
    return door.identify(ssl.PEM_cert_to_DER_cert(keys.certificate_pem(issued).decode()))


def test_the_roster_says_who_may_pass(home: Home) -> None:
    """Of the roster itself: one enrolled, one revoked, one revoked and enrolled anew, one never seen."""
    own = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("north", "south", "east", "mars", "again")}
    for name in ("north", "south", "east"):
        enrol(home, name, own[name])
    for name in ("south", "east"):
        home.revoke(name)
    enrol(home, "east", own["again"])

    async def faults() -> list[str | None]:
        door = made(home, roster_of(home))
        await door._look()
        watch = asyncio.create_task(door._watch())
        asked = [("north", "north"), ("south", "south"), ("east", "again"), ("east", "east"), ("mars", "mars")]
        asked += [("north", "mars"), ("south", "north")]
        found = [await door.fault(identity_of(home, door, name, own[key])) for name, key in asked]
        watch.cancel()
        return found

    expected = [
        None,
        "certificate-revoked",
        None,
        "not-enrolled",
        "not-enrolled",
        "not-enrolled",
        "certificate-revoked",
    ]
    assert asyncio.run(faults()) == expected


def enrol(home: Home, name: str, key: keys.PrivateKey) -> None:
    from fl_server import authority

    authority.enrol(home, home.invite(name, "site").token, name, "site", keys.make_csr(key, name))


def test_who_joined_a_moment_ago_is_looked_for_once_more(home: Home) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    enrolled: dict[str, str] = {}

    async def joins() -> str | None:
        door = made(home, lambda: Standing(dict(enrolled), ()))
        await door._look()
        watch = asyncio.create_task(door._watch())
        enrolled["north"] = keys.point_hex(key.public_key())
        found = await door.fault(identity_of(home, door, "north", key))
        watch.cancel()
        return found

    assert asyncio.run(joins()) is None


def test_a_roster_that_cannot_be_read_for_long_admits_nobody(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    point = keys.point_hex(key.public_key())
    whole = [True]

    def roster() -> Standing:
        if not whole:
            raise IsocenterError("the disk is gone")
        return Standing({"north": point}, ())

    async def fails() -> list[str | None]:
        door = made(home, roster)
        await door._look()
        found = [await door.fault(identity_of(home, door, "north", key))]
        whole.clear()
        watch = asyncio.create_task(door._watch())
        await asyncio.sleep(0.1)
        found.append(await door.fault(identity_of(home, door, "north", key)))  # for a moment the last reading counts
        monkeypatch.setattr(gateway, "STALE_S", 0.05)
        found.append(await door.fault(identity_of(home, door, "north", key)))
        found.append(await door.fault(identity_of(home, door, "mars", key)))
        watch.cancel()
        return found

    assert asyncio.run(fails()) == [None, None, "unavailable", "unavailable"]


def test_a_certificate_counts_only_while_it_is_valid(home: Home) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    point, now, day = keys.point_hex(key.public_key()), dt.datetime.now(dt.UTC), dt.timedelta(days=1)

    async def aged() -> list[str | None]:
        door = made(home, lambda: Standing({"north": point}, ()))
        await door._look()
        shown = identity_of(home, door, "north", key, days=5)
        assert abs(shown.ends - now - 5 * day) < dt.timedelta(minutes=1) and shown.begins < now
        periods = [(shown.begins, shown.ends), (now - 2 * day, now - day), (now + day, now + 2 * day)]
        return [await door.fault(dataclasses.replace(shown, begins=begins, ends=ends)) for begins, ends in periods]

    assert asyncio.run(aged()) == [None, "certificate-expired", "certificate-expired"]


def test_nonsense_in_place_of_a_certificate_is_nobody(home: Home) -> None:
    async def nobody() -> list[Identity]:
        door = made(home, lambda: Standing({}, ()))
        return [door.identify(der) for der in (b"", b"\x30\x00", bytes(300))]

    assert {identity.fault for identity in asyncio.run(nobody())} == {"trust"}


def test_a_server_sends_an_answer_in_pieces_without_waiting_for_the_first_to_be_acknowledged() -> None:
    """asyncio switches Nagle's algorithm off only where a socket names its protocol; each answer took 40 ms more without."""
    options: list[int] = []

    async def serve() -> None:
        listening = listen("127.0.0.1", free_port())
        done = asyncio.Event()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            options.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            done.set()

        async with await asyncio.start_server(accepted, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            await done.wait()
            writer.close()

    asyncio.run(serve())
    assert options == [1]
