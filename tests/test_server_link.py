"""The public gateway passes exactly the calls of a node; everything else is 404 and never reaches Flower."""

import asyncio
from typing import Any

import pytest

from fl_server.link import FLEET_PATHS, only_fleet


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
