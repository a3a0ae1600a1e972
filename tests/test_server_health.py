"""The health service: whether consortium service and gateway serve, for anybody, and no place for nobody to hold."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from coordinator import Coordinator, coordinator
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fl_server import consortium
from privacy.calls import SERVICE


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("health")) as demo:
        yield demo


def test_the_standard_health_service_answers(served: Coordinator) -> None:
    with grpc.secure_channel(served.address, grpc.ssl_channel_credentials(served.home.ca_pem)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        of_gateway = stub.Check(health_pb2.HealthCheckRequest(service=consortium.GATEWAY), timeout=5)
        assert of_gateway.status == health_pb2.HealthCheckResponse.NOT_SERVING  # nobody serves one here
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=5)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_nobody_holds_a_place_by_way_of_the_health_service(
    served: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key or a certificate: neither by watching, nor by calls that are begun and never sent."""
    monkeypatch.setattr(consortium, "REQUEST_S", 0.3)
    never = threading.Event()

    def nothing() -> Any:
        never.wait(20)
        yield b""

    with grpc.secure_channel(served.address, grpc.ssl_channel_credentials(served.home.ca_pem)) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(watching))
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        begun = [channel.stream_unary(consortium.HEALTH_CHECK).future(nothing(), timeout=20) for _ in range(40)]
        assert {each.exception(timeout=10).code() for each in begun} == {grpc.StatusCode.CANCELLED}
        never.set()


def test_nothing_serves_any_more_as_soon_as_the_coordinator_stops() -> None:
    status = consortium.health_status()
    status.set(consortium.GATEWAY, consortium.SERVING)

    def answers(name: str) -> int:
        return int(status.Check(health_pb2.HealthCheckRequest(service=name), None).status)

    assert {answers(name) for name in ("", consortium.GATEWAY)} == {consortium.SERVING}
    status.enter_graceful_shutdown()
    status.set(consortium.GATEWAY, consortium.SERVING)  # too late
    assert {answers(name) for name in ("", consortium.GATEWAY)} == {consortium.NOT_SERVING}
