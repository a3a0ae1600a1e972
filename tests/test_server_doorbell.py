"""Pulls that would find nothing wait for the bell; a slow caller holds nobody up."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fl_server import doorbell, gateway
from fl_server.doorbell import Doorbell

FLEET, RUNTIME = "/v1/fleet/receive", "/v1/runtime/receive"


class Flower:
    """A stand-in for the SuperLink: answers each path with what stands in `answers`, and records how it was called."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.bodies: list[bytes] = []
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        self.bodies.append(event.get("body", b""))
        await asyncio.sleep(0.005)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.answers.get(scope["path"], b"")})


async def call(
    app: Doorbell,
    path: str,
    parts: tuple[bytes, ...] = (b"",),
    gap_s: float = 0.0,
    gone: asyncio.Event | None = None,
) -> bytes:
    """One request; its answer's body. `gone`: is set when the caller goes away."""
    waiting = list(parts)
    got = b""

    async def receive() -> dict[str, Any]:
        if not waiting:
            await (asyncio.sleep(3600) if gone is None else gone.wait())
            return {"type": "http.disconnect"}
        await asyncio.sleep(gap_s)
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(event: Any) -> None:
        nonlocal got
        got += event.get("body", b"")

    await app({"type": "http", "path": path, "headers": []}, receive, send)
    return got


def seconds(of: Callable[[], Awaitable[Any]]) -> float:
    async def timed() -> float:
        began = time.monotonic()
        await of()
        return time.monotonic() - began

    return asyncio.run(timed())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doorbell.PULLS, FLEET, (doorbell.ORDERS, 0.3))
    monkeypatch.setitem(doorbell.PULLS, RUNTIME, (doorbell.REPORTS, 0.3))


@pytest.mark.usefixtures("short")
def test_a_pull_that_finds_nothing_is_held() -> None:
    flower = Flower()

    async def once() -> None:
        assert await call(Doorbell(flower), FLEET) == b""

    assert 0.3 <= seconds(once) < 2
    assert len(flower.bodies) == 1


def test_a_push_ends_the_waiting_of_everybody() -> None:
    async def ringing() -> float:
        flower = Flower()
        app = Doorbell(flower)
        held = [asyncio.create_task(call(app, FLEET)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in held)
        flower.answers[FLEET] = b"an order"
        began = time.monotonic()
        await call(app, "/v1/runtime/send")
        assert await asyncio.gather(*held) == [b"an order"] * 3
        return time.monotonic() - began

    assert asyncio.run(ringing()) < 2  # and not the 20 s that an idle pull is held


def test_who_is_rung_for_in_vain_waits_on() -> None:
    async def vain() -> None:
        flower = Flower()
        app = Doorbell(flower)
        held = asyncio.create_task(call(app, FLEET))
        for _ in range(3):
            await asyncio.sleep(0.05)
            await call(app, "/v1/runtime/send")
        assert not held.done()
        flower.answers[FLEET] = b"an order"
        await call(app, "/v1/runtime/send")
        assert await held == b"an order"

    assert seconds(vain) < 2


def test_what_is_pushed_during_a_look_is_found() -> None:
    async def meanwhile() -> None:
        flower = Flower()
        app = Doorbell(flower)
        held = asyncio.create_task(call(app, FLEET))
        while not flower.bodies:  # Flower looks now, and sees nothing
            await asyncio.sleep(0)
        app.bells[doorbell.ORDERS].ring()
        await asyncio.sleep(0.006)
        flower.answers[FLEET] = b"an order"
        assert await held == b"an order"

    assert seconds(meanwhile) < 2


def test_nothing_is_looked_up_for_a_caller_who_has_gone() -> None:
    async def leaving() -> None:
        flower, gone = Flower(), asyncio.Event()
        app = Doorbell(flower)
        held = asyncio.create_task(call(app, FLEET, gone=gone))
        await asyncio.sleep(0.05)
        flower.answers[FLEET] = b"an order"
        gone.set()
        assert await held == b""
        await call(app, "/v1/runtime/send")
        await asyncio.sleep(0.05)
        assert len(flower.bodies) == 2  # the first look and the push

    assert seconds(leaving) < 2


def test_who_goes_at_the_moment_of_the_ring_is_given_nothing() -> None:
    async def leaving() -> None:
        flower, gone = Flower(), asyncio.Event()
        app = Doorbell(flower)
        held = asyncio.create_task(call(app, FLEET, gone=gone))
        await asyncio.sleep(0.05)
        flower.answers[FLEET] = b"an order"
        app.bells[doorbell.ORDERS].ring()
        gone.set()
        assert await held == b"" and len(flower.bodies) == 1

    assert seconds(leaving) < 2


def test_a_refusal_without_a_body_is_answered_at_once() -> None:
    async def refused() -> None:
        flower = Flower()
        flower.status = 401
        await call(Doorbell(flower), FLEET)

    assert seconds(refused) < 2


@pytest.mark.usefixtures("short")
def test_reports_do_not_ring_for_orders() -> None:
    async def other() -> None:
        app = Doorbell(Flower())
        held = asyncio.create_task(call(app, FLEET))
        await asyncio.sleep(0.05)
        await call(app, "/v1/fleet/send")
        await asyncio.sleep(0.1)
        assert not held.done()
        await held

    assert seconds(other) >= 0.25


def test_a_caller_for_whom_there_is_something_is_not_held() -> None:
    async def busy() -> None:
        flower = Flower()
        app = Doorbell(flower)
        flower.answers[FLEET] = b"an order"
        for _ in range(3):
            assert await call(app, FLEET) == b"an order"

    assert seconds(busy) < 2


def test_a_slow_upload_holds_nobody_up_and_arrives_whole() -> None:
    async def slow() -> None:
        flower = Flower()
        app = Doorbell(flower)
        crawling = asyncio.create_task(call(app, "/v1/fleet/send", (b"1", b"2", b"3", b"4"), gap_s=0.2))
        await asyncio.sleep(0.05)
        await asyncio.gather(*(call(app, "/v1/fleet/send", (b"x",)) for _ in range(5)))
        assert not crawling.done()
        await crawling
        assert flower.bodies == [b"x"] * 5 + [b"1234"]

    asyncio.run(slow())


def test_a_body_without_end_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "BODY_BYTES_MAX", 1000)
    flower, read, statuses = Flower(), 0, list[int]()

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 100
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def send(event: Any) -> None:
        statuses.extend([event["status"]] if "status" in event else [])

    scope = {"type": "http", "path": "/v1/fleet/send", "headers": []}
    asyncio.run(Doorbell(flower)(scope, receive, send))
    assert read == 1100 and statuses == [413] and flower.bodies == []
    for size, reached in ((1000, 1), (1001, 1)):
        asyncio.run(call(Doorbell(flower), "/v1/fleet/send", parts=(b"x" * size,)))
        assert len(flower.bodies) == reached


def test_a_report_about_a_large_model_is_as_large_as_the_study_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "BODY_BYTES_MAX", 1000)
    monkeypatch.setattr(doorbell, "BESIDE_BYTES", 10)
    flower = Flower()
    app = Doorbell(flower)
    assert app.body_bytes_max() == 1000
    asyncio.run(call(app, "/v1/fleet/send", parts=(b"x" * 3000,)))  # from outside, before such a model was sent
    assert (flower.bodies, app.body_bytes_max()) == ([], 1000)
    flower.status = 401  # of somebody without the token of a run
    asyncio.run(call(app, "/v1/runtime/send", parts=(b"x" * 1500,)))
    assert app.body_bytes_max() == 1000
    flower.status = 200
    asyncio.run(call(app, "/v1/runtime/send", parts=(b"x" * 1500,)))
    assert app.body_bytes_max() == 2 * 1500 + 10  # 64 bits of each of the model's 32, and counts
    flower.bodies.clear()
    for size, reached in ((3010, 1), (3011, 1)):
        asyncio.run(call(app, "/v1/fleet/send", parts=(b"x" * size,)))
        assert len(flower.bodies) == reached
    asyncio.run(call(app, "/v1/runtime/send", parts=(b"x",)))
    assert app.body_bytes_max() == 3010  # reports about the orders before may be under way


def test_the_gateway_takes_a_report_as_large_as_it_is_told_and_nothing_else() -> None:
    def length(path: str, size: int) -> bytes:
        return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode()

    assert gateway.read_head(length("/v1/fleet/send", 2**29), 2**29).length == 2**29
    for path, size in (("/v1/fleet/send", 2**29 + 1), ("/v1/fleet/receive", 2**29)):  # only a report may be large
        with pytest.raises(gateway.Refused, match=gateway.TOO_LARGE):
            gateway.read_head(length(path, size), 2**29)
    with pytest.raises(gateway.Refused, match=gateway.TOO_LARGE):
        gateway.read_head(length("/v1/fleet/send", doorbell.BODY_BYTES_MAX + 1))


def test_orders_end_where_the_largest_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "ORDERS_BYTES_MAX", 2000)
    flower = Flower()
    for size, reached in ((2000, 1), (2001, 1)):
        asyncio.run(call(Doorbell(flower), "/v1/runtime/send", parts=(b"x" * size,)))
        assert len(flower.bodies) == reached


def test_flower_does_not_hear_of_a_caller_who_has_gone_in_the_middle() -> None:
    flower, events = Flower(), [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return events.pop(0)

    async def send(event: Any) -> None:
        return None

    asyncio.run(Doorbell(flower)({"type": "http", "path": "/v1/fleet/send", "headers": []}, receive, send))
    assert flower.bodies == [] and events == []
