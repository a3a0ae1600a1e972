"""What a node puts on each request to Flower's Fleet API: the version of Flower, and the site's signature over the time.

Flower has an interceptor for each of the two, which say the same (`tests/test_flower_contract.py`). They load a web server's
framework, 11 MiB of every node, for a table of status codes; and theirs ends the process when the other side runs another
version, where a node says who has to upgrade and goes on (`privacy.greeting`).
"""

from base64 import b64encode

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    FLWR_COMPONENT_NAME_METADATA_KEY,
    FLWR_PACKAGE_NAME_METADATA_KEY,
    FLWR_PACKAGE_VERSION_METADATA_KEY,
)
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.version import package_name, package_version


class Identity:
    """Shows the gateway which site asks; `key` is the site's."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self.key = key
        self.fixed = {
            FLWR_PACKAGE_NAME_METADATA_KEY: package_name,
            FLWR_PACKAGE_VERSION_METADATA_KEY: package_version,
            FLWR_COMPONENT_NAME_METADATA_KEY: "SuperNode",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        }

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        moment = now().isoformat()
        signature = b64encode(sign_message(self.key, moment.encode("ascii"))).decode()
        context.request.headers.update(self.fixed | {TIMESTAMP_HEADER: moment, FLEET_HTTP_SIGNATURE_HEADER: signature})
        return call_next(context)
