"""The gateway's room for reports: memory flat in the number of sites, everybody's turn comes, and nobody keeps the others out.

A real gateway over TLS in this process, and sites that send what a test tells them. Behind it stands a counter of bytes.
"""

import asyncio
import contextlib
import os
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import authority_of
from coordinator import free_port, settings
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest

from fl_client import node
from fl_client.fleet import Identity
from fl_server.door import listen
from fl_server.doorbell import Doorbell
from fl_server.gateway import Gateway, Limits, Standing, gateway_context
from fl_server.room import Room, Turn, room_bytes
from fl_server.roster import Home
from privacy import keys, parcels

MB = 2**20
SITES = ("north", "south", "west", "east", "mars", "moon", "rome", "oslo")
PATIENT = Limits(look_s=0.02, bodies_bytes=8 * MB, sign_s=0.05)


@dataclass
class Counter:
    """Stands where Flower does: keeps reports until the test lets it answer. `live`: bytes of bodies that it holds."""

    may_answer: asyncio.Event
    began: list[str] = field(default_factory=list)
    bodies: dict[str, bytes] = field(default_factory=dict)
    live = most = others = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name = dict(scope["headers"]).get(b"x-site", b"").decode()
        if scope["path"] == parcels.SEND_REPORT:
            await self._report(name, scope, receive, send)
            return
        self.others += 1
        await self._say(send)

    async def _report(self, name: str, scope: Any, receive: Any, send: Any) -> None:
        self.began.append(name)
        got = 0

        async def counted() -> Any:
            nonlocal got
            event = await receive()
            new = len(event.get("body", b""))
            got += new
            self.live += new
            self.most = max(self.most, self.live)
            return event

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            self.bodies[name] = (await receive())["body"]
            await self.may_answer.wait()
            await self._say(send)

        try:
            await Doorbell(answer)(scope, counted, send)
        finally:
            self.live -= got

    @staticmethod
    async def _say(send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


@dataclass
class Bed:
    door: Gateway
    counter: Counter
    port: int
    standing: dict[str, str]
    contexts: dict[str, ssl.SSLContext]
    own: dict[str, keys.PrivateKey]
    serving: "asyncio.Task[None]"

    def head(self, name: str, size: int, path: str = parcels.SEND_REPORT) -> bytes:
        shown = b64encode(keys.public_pem(self.own[name])).decode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"flwr-public-key: {shown}", f"x-site: {name}"]
        return "\r\n".join([*lines, f"Content-Length: {size}", "", ""]).encode()

    async def caller(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.contexts[name], server_hostname="127.0.0.1"
        )

    async def report(self, name: str, body: bytes) -> int:
        """Send a whole report; the status of its answer, which signs of life may precede."""
        reader, writer = await self.caller(name)
        try:
            writer.write(self.head(name, len(body)) + body)
            return (await answered(reader))[0]
        finally:
            writer.transport.abort()

    async def begun(self, name: str, size: int = 4 * MB, sent: int = 0) -> "Begun":
        """A report that announces `size` bytes, sends the first of them, and stops."""
        reader, writer = await self.caller(name)
        writer.write(self.head(name, size) + bytes(sent))
        return Begun(reader, writer)

    async def sending(self, name: str, body: bytes) -> "asyncio.Task[int]":
        """`report` under way, once the gateway knows of it: so several arrive in the order of the calls."""
        before = self.turns()
        task = asyncio.create_task(self.report(name, body))
        await until(lambda: self.turns() > before or task.done())
        return task

    def turns(self) -> int:
        return len(self.door.room._inside) + len(self.door.room._queue)

    def inside(self) -> int:
        return len(self.door.room._inside)

    def waiting(self) -> int:
        return len(self.door.room._queue)


@dataclass
class Begun:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, bytes, int]:
        return await answered(self.reader)

    def vanish(self) -> None:
        self.writer.transport.abort()


async def answered(reader: asyncio.StreamReader) -> tuple[int, bytes, int]:
    """Status and body of the answer, and the number of signs of life before it."""
    signs = 0
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        if status != 102:
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return status, await reader.readexactly(length), signs
        signs += 1


async def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def bed(root: Path, limits: Limits = PATIENT) -> AsyncIterator[Bed]:
    """Eight sites. The largest report is 4 MiB, and there is room for two of them."""
    home = Home.found(root / "consortium", settings())
    own = {name: keys.make_key(root / f"{name}.key") for name in SITES}
    standing = {name: keys.point_hex(key.public_key()) for name, key in own.items()}
    contexts = dict[str, ssl.SSLContext]()
    for name, key in own.items():
        issued = keys.issue(authority_of(home), keys.make_csr(key, name), name, "site", 5)
        keys.write_public(root / f"{name}.pem", keys.certificate_pem(issued))
        contexts[name] = ssl.create_default_context(cadata=home.ca_pem.decode())
        contexts[name].load_cert_chain(root / f"{name}.pem", root / f"{name}.key")
    counter = Counter(asyncio.Event())

    def roster() -> Standing:
        return Standing(dict(standing), set(own) - set(standing))

    door = Gateway(counter, keys.load_certificate(home.ca_pem), roster, home.journal.append, limits)
    door.body_bytes_max = lambda: 4 * MB
    port = free_port()
    serving = asyncio.create_task(door.serve(listen("127.0.0.1", port), gateway_context(home)))
    try:
        yield Bed(door, counter, port, standing, contexts, own, serving)
    finally:
        counter.may_answer.set()
        serving.cancel()
        await asyncio.wait([serving])


def play(test: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(120):
            await test

    asyncio.run(within())


def test_eight_large_reports_at_once_are_never_more_than_the_room_and_all_arrive_whole_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with bed(tmp_path) as at:
            bodies = {name: os.urandom(4 * MB) for name in SITES}
            tasks = [await at.sending(name, body) for name, body in bodies.items()]
            await until(lambda: len(at.counter.bodies) == 2)
            assert (at.inside(), at.waiting(), at.counter.began) == (2, 6, ["north", "south"])
            held = [
                len(each.cycle.body) for each in at.door.connections if each.cycle and not each._turn.granted.done()
            ]
            assert len(held) == 6 and max(held) < MB  # the others are with their senders
            at.counter.may_answer.set()
            assert await asyncio.gather(*tasks) == [200] * 8
            assert at.counter.began == list(SITES) and at.counter.bodies == bodies
            assert 4 * MB < at.counter.most <= 8 * MB
            await until(lambda: at.turns() == 0)

    play(test())


def test_small_requests_pass_while_reports_wait_and_who_waits_is_not_slow(tmp_path: Path) -> None:
    """The room is taken for longer than any body is waited for: the time of who waits begins when it is let in."""
    limits = Limits(look_s=0.02, bodies_bytes=8 * MB, sign_s=0.05, body_s=0.3, bytes_per_s=1000)

    async def test() -> None:
        async with bed(tmp_path, limits) as at:
            inside = [await at.sending(name, bytes(4 * MB)) for name in SITES[:2]]
            await until(lambda: len(at.counter.bodies) == 2)
            waiting = await at.begun("west", sent=600)
            await until(lambda: at.waiting() == 1)
            for path in ("/v1/fleet/send-node-heartbeat", parcels.RECEIVE_ORDER):
                reader, writer = await at.caller("west")
                writer.write(at.head("west", 0, path))
                assert (await answered(reader))[0] == 200
                writer.transport.abort()
            await asyncio.sleep(1.0)
            assert (at.waiting(), at.counter.others, waiting.reader.at_eof()) == (1, 2, False)
            at.counter.may_answer.set()
            assert await asyncio.gather(*inside) == [200, 200]
            await asyncio.sleep(0.5)
            waiting.writer.write(bytes(4 * MB - 600))
            status, _, signs = await waiting.answer()
            assert status == 200 and signs > 3

    play(test())


def test_who_waits_goes_on_when_another_is_cut(tmp_path: Path) -> None:
    async def test() -> None:
        async with bed(tmp_path) as at:
            at.counter.may_answer.set()
            cut = [await at.begun(name, sent=MB) for name in SITES[:2]]
            await until(lambda: at.inside() == 2)
            third = await at.sending("west", bytes(4 * MB))
            assert at.waiting() == 1
            cut[0].vanish()
            assert await third == 200
            assert list(at.counter.bodies) == ["west"]

    play(test())


@pytest.mark.parametrize("sent", [0, 100_000, 4 * MB], ids=["nothing", "a-little", "everything"])
@pytest.mark.parametrize("how", ["reset", "end"])
def test_who_vanishes_while_waiting_gives_the_place_up(tmp_path: Path, sent: int, how: str) -> None:
    """Nothing is read of who waits, and the room stays taken, so only a sign of life can find out."""

    async def test() -> None:
        async with bed(tmp_path) as at:
            inside = [await at.sending(name, bytes(4 * MB)) for name in SITES[:2]]
            gone = await at.begun("west", sent=sent)
            await until(lambda: at.waiting() == 1)
            if how == "end":
                gone.writer.close()
            else:
                await asyncio.sleep(0.05)
                gone.vanish()
            await until(lambda: at.waiting() == 0)
            again = await at.sending("west", bytes(4 * MB))  # and is not refused for what it announced before
            assert at.waiting() == 1
            at.counter.may_answer.set()
            assert await asyncio.gather(*inside, again) == [200] * 3

    play(test())


def test_who_is_revoked_while_waiting_is_refused_and_never_let_in(tmp_path: Path) -> None:
    async def test() -> None:
        async with bed(tmp_path) as at:
            inside = [await at.sending(name, bytes(4 * MB)) for name in SITES[:2]]
            out = await at.begun("west", sent=100)
            last = await at.sending("east", bytes(4 * MB))
            del at.standing["west"]
            status, code, _ = await out.answer()
            assert (status, code) == (403, b"certificate-revoked")
            out.vanish()
            asked, ask = list[int](), at.door.room.ask
            at.door.room.ask = lambda size: (asked.append(size), ask(size))[1]  # type: ignore[method-assign,func-returns-value]
            await until(lambda: at.waiting() == 1 and len(at.door.connections) == 3)
            late = await at.begun("west", sent=100)  # a revoked site never waits, so it takes no turn
            assert (await late.answer())[:2] == (403, b"certificate-revoked") and asked == []
            at.counter.may_answer.set()
            assert await asyncio.gather(*inside, last) == [200] * 3 and "west" not in at.counter.began

    play(test())


def test_the_gateway_stops_while_some_wait(tmp_path: Path) -> None:
    async def test() -> None:
        async with bed(tmp_path) as at:
            begun = [await at.begun(name, sent=10) for name in SITES[:4]]
            await until(lambda: (at.inside(), at.waiting()) == (2, 2))
            at.serving.cancel()
            assert [(await one.answer())[:2] for one in begun] == [(503, b"unavailable")] * 4
            await asyncio.wait([at.serving])
            assert at.turns() == 0

    play(test())


def test_who_announces_much_and_sends_nothing_stops_nobody_for_longer_than_a_body_is_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with bed(tmp_path, Limits(look_s=0.02, bodies_bytes=8 * MB, body_s=1.0)) as at:
            at.counter.may_answer.set()
            hostile = [await at.begun(name) for name in SITES[:2]]
            await until(lambda: at.inside() == 2)
            honest = await at.sending("west", bytes(4 * MB))
            assert at.waiting() == 1 and await honest == 200
            assert [(await one.answer())[:2] for one in hostile] == [(408, b"too-slow")] * 2

    play(test())


def test_one_site_alone_never_keeps_the_others_out(tmp_path: Path) -> None:
    """It holds one largest body, however many connections it has, and two fit."""

    async def test() -> None:
        async with bed(tmp_path, Limits(look_s=0.02, bodies_bytes=1)) as at:
            at.counter.may_answer.set()
            first = await at.begun("north")
            await until(lambda: at.inside() == 1)
            second = await at.begun("north")
            assert (await second.answer())[:2] == (503, b"too-many-connections")
            for name in SITES[1:4]:
                assert await at.report(name, bytes(4 * MB)) == 200
            assert at.inside() == 1
            first.vanish()

    play(test())


@pytest.mark.parametrize("others", [True, False])
def test_who_trickles_gives_way_only_to_those_who_wait(tmp_path: Path, others: bool) -> None:
    """Fast enough for `bytes_per_s`. A full room at `bodies_bytes_per_s` takes half a second here, after `body_s`."""
    limits = Limits(look_s=0.02, bodies_bytes=8 * MB, body_s=0.5, bytes_per_s=10, bodies_bytes_per_s=16 * MB)

    async def test() -> None:
        async with bed(tmp_path, limits) as at:
            at.counter.may_answer.set()
            slow = [await at.begun(name, sent=1000) for name in SITES[:2]]
            await until(lambda: at.inside() == 2)
            await asyncio.sleep(1.5)
            assert at.inside() == 2  # nobody waits: as slow as ever
            if others:
                assert await at.report("west", bytes(4 * MB)) == 200
                assert (await slow[0].answer())[:2] == (408, b"too-slow")
            else:
                for one in slow:
                    one.writer.write(bytes(4 * MB - 1000))
                assert [(await one.answer())[0] for one in slow] == [200, 200]

    play(test())


def test_what_no_run_has_fetched_yet_takes_room(tmp_path: Path) -> None:
    async def test() -> None:
        async with bed(tmp_path) as at:
            unfetched = [6 * MB]
            at.door.unfetched = lambda: unfetched[0]
            at.counter.may_answer.set()
            task = await at.sending("north", bytes(4 * MB))
            await asyncio.sleep(0.2)
            assert at.waiting() == 1
            unfetched[0] = 0
            assert await task == 200

    play(test())


@pytest.mark.parametrize("size", [2, 32], ids=["fits-into-the-sockets", "does-not"])
def test_a_node_waits_for_room_longer_than_for_any_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Oracle: the same client without the timeouts of a report gives up while it writes."""
    short = httpx.Timeout(1.0, write=node.REPORT_TIMEOUT.write)

    async def test() -> None:
        async with bed(tmp_path) as at:
            at.door.body_bytes_max = lambda: 33 * MB
            inside = [await at.sending(name, bytes(33 * MB)) for name in SITES[:2]]
            key = at.own["west"]
            client = node._Fleet(f"127.0.0.1:{at.port}", at.contexts["west"], Identity(key))
            client._client.timeout = httpx.Timeout(1.0)
            call, content = PushMessagesRequest(), [bytes(size * MB)]
            if size == 32:
                with pytest.raises(httpx.WriteTimeout):
                    await asyncio.to_thread(parcels.post, client, parcels.SEND_REPORT, call, content)
                await until(lambda: at.waiting() == 0)
            sending = asyncio.create_task(
                asyncio.to_thread(parcels.post, client, parcels.SEND_REPORT, call, content, short)
            )
            await until(lambda: at.waiting() == 1)
            await asyncio.sleep(2.5)
            look = PullMessagesRequest()
            assert await asyncio.to_thread(parcels.post, client, parcels.RECEIVE_ORDER, look) == b""
            assert at.waiting() == 1
            at.counter.may_answer.set()
            assert await sending == b"" and await asyncio.gather(*inside) == [200, 200]
            client.close()

    play(test())


# The room itself


def test_a_large_body_is_not_overtaken_by_small_ones_and_leaving_is_always_counted() -> None:
    async def test() -> None:
        beside = [0]
        room = Room(lambda: 10, lambda: beside[0])
        first, large, small = room.ask(6), room.ask(5), room.ask(1)

        def granted() -> list[bool]:
            return [turn.granted.done() and not turn.granted.cancelled() for turn in (first, large, small)]

        assert granted() == [True, False, False] and room.taken == 6
        room.leave(first)
        assert granted() == [True, True, True] and room.taken == 6
        waits = room.ask(10)
        waits.granted.cancel()
        room.leave(waits)  # before it was let in
        beside[0] = 10
        room.leave(large)
        held = room.ask(1)
        assert not held.granted.done()
        beside[0] = 0
        room.look()
        assert held.granted.done()
        for turn in (small, held):
            room.leave(turn)
        assert room.taken == 0 and room.held_up_s(held) == 0.0
        first, waits = room.ask(10), room.ask(1)
        await asyncio.sleep(0.01)
        assert room.held_up_s(first) > 0 and room.held_up_s(waits) == 0.0
        room.leave(waits)
        assert room.held_up_s(first) == 0.0  # nobody waits any more
        room.leave(first)
        gone: Turn = room.ask(10)
        after = room.ask(10)
        after.granted.cancel()
        room.leave(gone)  # lets in who has gone away, and who leaves in a moment
        room.leave(after)
        assert room.taken == 0 and room.ask(10).granted.done()

    asyncio.run(test())


def test_there_is_room_for_the_two_largest_reports_in_any_case() -> None:
    assert room_bytes(256 * MB) == 512 * MB and room_bytes(864 * MB) == 1728 * MB
    assert room_bytes(4 * MB, 8 * MB) == 8 * MB
