"""The public gateway passes exactly the calls of a node; everything else is 404 and never reaches Flower."""

import asyncio
import socket
from typing import Any

import pytest
from coordinator import free_port

from fl_server.link import FLEET_PATHS, _listen, only_fleet


def through(method: str, path: str, raw: bytes | None = None, kind: str = "http") -> tuple[bool, list[dict[str, Any]]]:
    """Whether one request reached the application behind the gateway, and what was answered."""
    reached, sent = [], []

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    scope = {"type": kind, "method": method, "path": path, "raw_path": path.encode() if raw is None else raw}
    asyncio.run(only_fleet(flower)(scope, receive, send))
    return bool(reached), sent


@pytest.mark.parametrize("path", sorted(FLEET_PATHS))
def test_a_nodes_calls_pass_by_post_only(path: str) -> None:
    assert through("POST", path) == (True, [])
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT"):
        reached, sent = through(method, path)
        assert not reached and sent[0]["status"] == 404


BLOCKED = [
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet/get-fab",
    "/v1/fleet/get-run",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages/../../control/start-run",
    "//v1/fleet/pull-messages",
    "/docs",
    "",
]


@pytest.mark.parametrize("path", BLOCKED)
def test_everything_else_is_404(path: str) -> None:
    reached, sent = through("POST", path)
    assert not reached and sent[0]["status"] == 404


def test_an_encoded_spelling_of_a_path_is_404() -> None:
    reached, _ = through("POST", "/v1/fleet/pull-messages", b"/v1/fleet/pull%2Dmessages")
    assert not reached


def test_web_sockets_are_closed() -> None:
    reached, sent = through("GET", "/v1/fleet/pull-messages", kind="websocket")
    assert not reached and sent == [{"type": "websocket.close", "code": 1008}]


def test_a_server_sends_an_answer_in_pieces_without_waiting_for_the_first_to_be_acknowledged() -> None:
    """asyncio switches Nagle's algorithm off only where a socket names its protocol; each answer took 40 ms more without."""
    options: list[int] = []

    async def serve() -> None:
        listening = _listen("127.0.0.1", free_port())
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
