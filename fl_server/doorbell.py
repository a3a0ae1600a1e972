"""Turns Flower's polling into waiting: a pull that would find nothing new is held until something was pushed.

Flower's Fleet and Runtime APIs answer a pull at once, so whoever wants to be quick has to ask often, and each question costs
the SuperLink some milliseconds: four nodes asking 30 times a second keep it from moving the models. Here the second empty-handed
pull of a caller waits for the bell. The answer itself comes from behind; nothing is read from it but whether it is empty.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from privacy import parcels

Scope = MutableMapping[str, Any]
Channel = Callable[..., Awaitable[Any]]
Application = Callable[[Scope, Channel, Channel], Awaitable[None]]

ORDERS, REPORTS = "orders", "reports"
PULLS = {parcels.RECEIVE_ORDER: (ORDERS, 20.0), parcels.RECEIVE_REPORTS: (REPORTS, 1.0)}
"""Path -> what it waits for, and for how many seconds at most: a node's proxy may cut a silent connection after half a minute,
and a round looks at its deadline every second. Flower accepts a signed time for 300 s, so a held request is still fresh."""
PUSHES = {parcels.SEND_ORDERS: ORDERS, parcels.SEND_REPORT: REPORTS}
"""Path -> what it announces."""
CALLERS_MAX = (
    10_000  # whoever is remembered passed the gateway's TLS; more than this are forgotten, and only ask once more
)
CALLER_HEADERS = (b"flwr-public-key", b"flwr-task-token")
BODY_BYTES_MAX = 256 * 1024 * 1024  # of a request, as long as no study needs more
ORDERS_BYTES_MAX = (
    2**30 + BODY_BYTES_MAX
)  # on loopback only: the largest model of `privacy.wire`, and what goes with it
BESIDE_BYTES = 64 * 1024 * 1024  # of a report beside its values: counts are 8 MiB at most


class Bell:
    """Counts what was announced. `count` only grows."""

    def __init__(self) -> None:
        self.count = 0
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self.count += 1
        self._rung.set()
        self._rung = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Return at the next ring, or after `seconds`."""
        try:
            await asyncio.wait_for(self._rung.wait(), seconds)
        except TimeoutError:
            return


class Doorbell:
    """An ASGI application around the SuperLink; both of its servers have to share one, in one event loop."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.bells = {ORDERS: Bell(), REPORTS: Bell()}
        self.empty_at: dict[tuple[str, bytes], int] = {}
        """(path, caller) -> count of the bell before that caller's last empty pull."""
        self.largest = 0  # body of orders that Flower took, in bytes

    def body_bytes_max(self) -> int:
        """Bytes of a request from outside: room for a report about the largest orders so far, 8 bytes for 4 of the model's."""
        return max(BODY_BYTES_MAX, 2 * self.largest + BESIDE_BYTES if self.largest else 0)

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        path = scope.get("path", "")
        if path in PULLS:
            await self._pull(scope, receive, send)
            return
        await self._whole(scope, receive, send)
        if path in PUSHES:
            self.bells[PUSHES[path]].ring()

    async def _pull(self, scope: Scope, receive: Channel, send: Channel) -> None:
        name, hold_s = PULLS[scope["path"]]
        bell, who = self.bells[name], (scope["path"], _caller(scope))
        if self.empty_at.get(who) == bell.count:
            await bell.wait(hold_s)
        before = bell.count
        found = await self._whole(scope, receive, send)
        self.empty_at.pop(who, None)
        if not found:
            if len(self.empty_at) >= CALLERS_MAX:
                self.empty_at.clear()
            self.empty_at[who] = before

    async def _whole(self, scope: Scope, receive: Channel, send: Channel) -> bool:
        """Pass a request on once all of it is here; whether its answer had a body.

        A slow line holds nobody up: what stands behind sees whole requests only, and the answer is sent after it was made.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return False
        orders = scope["path"] == parcels.SEND_ORDERS
        body = await _read(receive, ORDERS_BYTES_MAX if orders else self.body_bytes_max())
        answer, size = list[MutableMapping[str, Any]](), sum(len(event["body"]) for event in body)
        if not body:  # the caller would not end, or has gone and reads no answer: nothing that Flower has to know of
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return False

        async def read() -> MutableMapping[str, Any]:
            if body:
                return body.pop()
            gone: MutableMapping[str, Any] = await receive()  # the only news left: the caller has gone
            return gone

        async def keep(event: MutableMapping[str, Any]) -> None:
            answer.append(event)

        await self.app(scope, read, keep)
        if orders and answer and answer[0].get("status") == 200:
            self.largest = max(self.largest, size)
        for event in answer:
            await send(event)
        return any(event.get("body") for event in answer)


async def _read(receive: Channel, most: int) -> list[MutableMapping[str, Any]]:
    """The whole body of a request as one event; none if it did not come to its end within `most` bytes."""
    parts, size = list[bytes](), 0
    while size <= most:
        event = await receive()
        if event["type"] != "http.request":
            break
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if not event.get("more_body", False) and size <= most:
            return [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
    return []


def _caller(scope: Scope) -> bytes:
    """Who asks: the key or token that Flower authenticates afterwards. A wrong one waits and is then refused."""
    return next((value for key, value in scope["headers"] if key in CALLER_HEADERS), b"")
