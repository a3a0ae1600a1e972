"""Flower's Control API on loopback, for the processes of the coordinator: nothing here loads the SuperLink itself."""

import contextlib
from collections.abc import Iterator

import httpx
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from privacy.errors import RunError

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def control(port: int) -> Iterator[ControlHttpClient]:
    """A client of the SuperLink on `port`, its failures as our errors."""
    client = ControlHttpClient.from_server_address(
        f"{LOOPBACK}:{port}", True, None, [RuntimeVersionHttpInterceptor(component_name="isocenter")]
    )
    try:
        yield client
    except httpx.HTTPError as error:
        raise RunError(f"Flower's SuperLink did not do what was asked ({type(error).__name__})") from error
    finally:
        client.close()
