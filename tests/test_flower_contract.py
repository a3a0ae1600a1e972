"""What Isocenter relies on inside Flower 1.41 and no document promises. An upgrade that changes it fails here, by name."""

import inspect
from base64 import b64decode
from importlib import metadata
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import verify_signature
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fl_client.client_app import make_app
from fl_client.fleet import Identity
from fl_server.gateway import FLEET_PATHS
from fl_server.link import superlink_app
from fl_server.mailbox import Mailbox
from privacy import parcels
from privacy.wire import ORDERS

VALID_TYPES = {"train", "evaluate", "query"}
CALLED = ["ActivateNode", "DeactivateNode", "SendNodeHeartbeat"]


def test_flower_is_the_version_whose_facts_were_verified() -> None:
    assert metadata.version("flwr").startswith("1.41.")


def test_the_fleet_paths_exist_in_the_superlink() -> None:
    routes = {route["path"] for route in _paths(superlink_app(1, b"x" * 32))}
    own = {parcels.RECEIVE_ORDER, parcels.SEND_REPORT, parcels.SEND_ORDERS, parcels.RECEIVE_REPORTS}
    assert routes >= FLEET_PATHS - own and not routes & own
    # What the gateway has to keep in is where it was: unauthenticated, in the same application.
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/get-fab"} <= routes


def _paths(app: object) -> list[dict[str, str]]:
    schema = app.openapi()  # type: ignore[attr-defined]
    return [{"path": path} for path in schema["paths"]]


def test_the_clients_have_the_calls_that_node_and_executor_make() -> None:
    for name in CALLED:
        assert callable(getattr(FleetHttpClient, name))
        source = inspect.getsource(getattr(FleetHttpClient, name))
        assert any(path in source for path in FLEET_PATHS), name
    for name in ("AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat"):
        assert callable(getattr(RuntimeHttpClient, name))


def test_a_node_says_on_each_request_what_flowers_own_interceptors_say() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    theirs: list[Any] = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    found = []
    for said in ([Identity(key)], theirs):
        request = httpx.Request("POST", "https://gateway/v1/fleet/activate-node")
        for interceptor in said:
            answer = interceptor.intercept(
                ProtobufRequestContext("rpc", ObjectTree(), request), lambda _: httpx.Response(204)
            )
            assert answer.status_code == 204
        found.append(dict(request.headers))
    ours, flowers = found
    assert ours.keys() == flowers.keys()
    differ = {name for name in ours if ours[name] != flowers[name]}
    assert differ == {"flwr-timestamp", "flwr-signature"}
    signature = b64decode(ours["flwr-signature"])
    assert verify_signature(key.public_key(), ours["flwr-timestamp"].encode(), signature)


def test_the_superlink_is_configured_by_exactly_these_fields() -> None:
    assert set(inspect.signature(SuperLinkLifespanConfig).parameters) == {
        *(
            "control_address",
            "health_server_address",
            "host",
            "port",
            "insecure",
            "certificates",
            "superexec_auth_secret",
        ),
        *("authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log", "artifact_provider"),
        *(
            "enable_supernode_auth",
            "fleet_api_type",
            "fleet_api_address",
            "simulation",
            "ssl_ca_certfile",
            "ssl_certfile",
        ),
        *("ssl_keyfile", "database", "isolation", "runtime_dependency_install"),
    }


def test_the_grid_offers_what_the_mailbox_stands_on() -> None:
    assert callable(ProtobufClient._send) and not Mailbox.__abstractmethods__
    tree = ObjectTree(object_id="whole", children=[ObjectTree(object_id="part")])
    assert [found.object_id for found in iterate_object_tree(tree)] == ["part", "whole"]


def test_equal_arrays_are_one_object() -> None:
    one, two = (Array(dtype="float32", shape=(2,), stype="isocenter.raw", data=b"12345678") for _ in range(2))
    assert one.object_id == two.object_id


def test_a_message_needs_a_task_and_takes_a_reply() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records = RecordDict({"header": ConfigRecord({"kind": "x"}), "arrays": ArrayRecord()})
    message = Message(records, dst_node_id=5, message_type="train")
    message.metadata.__dict__["_message_id"] = "m1"
    assert Message(records, reply_to=message).metadata.reply_to_message_id == "m1"


def test_the_three_kinds_of_orders_are_message_types_with_a_handler_each() -> None:
    """Work goes to train and evaluate; keys and shares to query, which runs nothing of Flower's own."""
    assert {kind.message_type for kind in ORDERS} == set(VALID_TYPES)
    registered = make_app()._registered_funcs
    assert {f"{kind.message_type}.default" for kind in ORDERS} <= set(registered)


def test_a_reply_carries_the_number_of_its_order_and_the_type_of_its_order() -> None:
    """The coordinator knows by nothing else which of its orders is answered."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records = RecordDict({"isocenter": ConfigRecord({"kind": "x"})})
    for kind in sorted(VALID_TYPES):
        message = Message(records, dst_node_id=5, message_type=kind, ttl=90.0)
        message.metadata.__dict__["_message_id"] = "m7"
        reply = Message(records, reply_to=message)
        assert (reply.metadata.reply_to_message_id, reply.metadata.message_type) == ("m7", kind)
        assert message.metadata.ttl == 90.0 and reply.metadata.ttl <= 90.0


def test_empty_texts_and_bytes_survive_and_an_empty_list_forgets_what_it_was_of() -> None:
    """That is why lists of names travel as one text."""
    facts = {"text": "", "bytes": b"", "large": 2**53 - 1, "negative": -200, "true": True, "small": 5e-324}
    sent = recorddict_to_proto(RecordDict({"isocenter": ConfigRecord(dict(facts))}))
    received = recorddict_from_proto(type(sent).FromString(sent.SerializeToString()))["isocenter"]
    assert dict(received) == facts
    assert {name: type(value) for name, value in dict(received).items()} == {n: type(v) for n, v in facts.items()}
    lists = recorddict_to_proto(RecordDict({"isocenter": ConfigRecord({"names": []})}))
    assert lists.items[0].config_record.items[0].value.WhichOneof("value") == "bool_list"


def test_a_record_holds_a_whole_vector_as_one_value() -> None:
    """Seven million words of 32 bits."""
    data = bytes(28 * 2**20)
    record = ConfigRecord({"vector": data})
    assert dict(ConfigRecord.inflate(record.deflate(), {}))["vector"] == data
