"""Turns Flower's polling into waiting: a pull that would find nothing is held until something was pushed.

Flower's Fleet and Runtime APIs answer a pull at once, so whoever wants to be quick has to ask often, and each question costs
both ends some milliseconds: four nodes asking 30 times a second keep the SuperLink from moving the models. Here a pull that finds
nothing waits for the bell and looks again. The answer itself comes from behind; nothing is read from it but whether it is empty.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from privacy import parcels

Scope = MutableMapping[str, Any]
Channel = Callable[..., Awaitable[Any]]
Application = Callable[[Scope, Channel, Channel], Awaitable[None]]
Events = list[MutableMapping[str, Any]]

ORDERS, REPORTS = "orders", "reports"
PULLS = {parcels.RECEIVE_ORDER: (ORDERS, 20.0), parcels.RECEIVE_REPORTS: (REPORTS, 1.0)}
"""Path -> what it waits for, and for how many seconds at most: a node's proxy may cut a silent connection after half a minute,
and a round looks at its deadline every second. Flower accepts a signed time for 300 s, so a held request is still fresh."""
PUSHES = {parcels.SEND_ORDERS: ORDERS, parcels.SEND_REPORT: REPORTS}
"""Path -> what it announces."""
BODY_BYTES_MAX = 256 * 1024 * 1024  # of a request, as long as no study needs more
ORDERS_BYTES_MAX = (
    2**30 + BODY_BYTES_MAX
)  # on loopback only: the largest model of `privacy.wire`, and what goes with it
BESIDE_BYTES = 64 * 1024 * 1024  # of a report beside its values: counts are 8 MiB at most


def report_bytes_max(orders: int) -> int:
    """Bytes of a report that answers orders of so many; zero if there were none."""
    return max(BODY_BYTES_MAX, 2 * orders + BESIDE_BYTES if orders else 0)


class Bell:
    """Counts what was announced. `count` only grows."""

    def __init__(self) -> None:
        self.count = 0
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self.count += 1
        self._rung.set()
        self._rung = asyncio.Event()

    async def news(self, count: int) -> None:
        """Return once more than `count` was announced."""
        while self.count == count:
            await self._rung.wait()


class Doorbell:
    """An ASGI application around the SuperLink; both of its servers have to share one, in one event loop."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.bells = {ORDERS: Bell(), REPORTS: Bell()}
        self.largest = 0  # body of orders that Flower took, in bytes

    def body_bytes_max(self) -> int:
        """Bytes of a request from outside: room for a report about the largest orders so far, 8 bytes for 4 of the model's."""
        return report_bytes_max(self.largest)

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        """Pass a request on once all of it is here.

        A slow line holds nobody up: what stands behind sees whole requests only, and the answer is sent after it was made.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope.get("path", "")
        orders = path == parcels.SEND_ORDERS
        body = await read_whole(receive, ORDERS_BYTES_MAX if orders else self.body_bytes_max())
        if body is None:  # the caller would not end, or has gone: nothing that Flower has to know of
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        answer = await (self._pulled if path in PULLS else self._asked)(scope, body, receive)
        if orders and answer and answer[0].get("status") == 200:
            self.largest = max(self.largest, len(body))
        for event in answer:
            await send(event)
        if path in PUSHES:
            self.bells[PUSHES[path]].ring()

    async def _pulled(self, scope: Scope, body: bytes, receive: Channel) -> Events:
        """The answer to a pull: something, a refusal, or nothing when its time is over or its caller has gone."""
        name, hold_s = PULLS[scope["path"]]
        bell, end = self.bells[name], asyncio.get_running_loop().time() + hold_s
        gone, rung = asyncio.ensure_future(_gone(receive)), None
        try:
            while True:
                count, answer = bell.count, await self._asked(scope, body, receive)
                if not _is_empty(answer):
                    return answer
                rung, left = asyncio.ensure_future(bell.news(count)), end - asyncio.get_running_loop().time()
                await asyncio.wait((rung, gone), timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
                # What is looked up for a caller who has gone counts as delivered, and would be lost.
                if gone.done() or not rung.done():
                    return answer
        finally:
            gone.cancel()
            if rung is not None:
                rung.cancel()

    async def _asked(self, scope: Scope, body: bytes, receive: Channel) -> Events:
        """What stands behind answers to a whole request."""
        whole, answer = [{"type": "http.request", "body": body, "more_body": False}], Events()

        async def read() -> MutableMapping[str, Any]:
            if whole:
                return whole.pop()
            gone: MutableMapping[str, Any] = await receive()
            return gone

        async def keep(event: MutableMapping[str, Any]) -> None:
            answer.append(event)

        await self.app(scope, read, keep)
        return answer


def _is_empty(answer: Events) -> bool:
    """Whether a pull found nothing; a refusal is not nothing."""
    return answer[0]["status"] == 200 and not any(event.get("body") for event in answer)


async def _gone(receive: Channel) -> None:
    """Return when the caller of a whole request has gone."""
    while (await receive())["type"] == "http.request":
        pass


async def read_whole(receive: Channel, most: int) -> bytes | None:
    """The whole body of a request; None if it did not come to its end within `most` bytes."""
    parts, size = list[bytes](), 0
    while size <= most:
        event = await receive()
        if event["type"] != "http.request":
            break
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if not event.get("more_body", False) and size <= most:
            return parts[0] if len(parts) == 1 else b"".join(parts)
    return None
