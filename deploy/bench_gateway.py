"""Memory of the gateway when large reports of many sites come at the same moment, with room for some of them and without a limit.

`python deploy/bench_gateway.py` prints it. The gateway is the real one, over TLS with certificates, in a process of its own; what
stands behind it takes each report apart and forgets it, so what is measured is the way in.
"""

import asyncio
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from stage import free_port

from fl_server.door import listen
from fl_server.doorbell import Doorbell
from fl_server.gateway import Gateway, Limits, Standing, gateway_context
from fl_server.roster import Home
from fl_server.settings import ServerFile
from privacy import keys, parcels

REPORT_BYTES, ROOM_BYTES, NO_LIMIT = 32 * 2**20, 128 * 2**20, 2**50
SITES = (4, 16, 64)
PIECE_BYTES = 64 * 1024


def main() -> None:
    found = [
        {"sites": sites, "room_mib": above(sites, ROOM_BYTES), "unlimited_mib": above(sites, NO_LIMIT)}
        for sites in SITES
    ]
    print(json.dumps(found, indent=1))


def above(sites: int, room: int) -> int:
    """MiB of the gateway's process at its highest, above its start, while so many sites send at once."""
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        command = [sys.executable, __file__, "serve", folder, str(sites), str(room)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as served:
            if served.stdin is None or served.stdout is None:
                raise RuntimeError("the gateway has no pipes")
            port, together = int(served.stdout.readline()), threading.Barrier(sites)
            senders = [threading.Thread(target=send, args=(Path(folder), n, port, together)) for n in range(sites)]
            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join()
            served.stdin.write("\n")
            served.stdin.flush()
            return int(served.stdout.readline())


def send(folder: Path, number: int, port: int, together: threading.Barrier) -> None:
    """One site's report, until the gateway has answered it."""
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / f"{number}.pem", folder / f"{number}.key")
    shown = b64encode(keys.public_pem(keys.load_key(folder / f"{number}.key"))).decode()
    body = struct.pack(">IQQ", 2, 1, REPORT_BYTES) + b"x" + bytes(REPORT_BYTES)
    head = f"POST {parcels.SEND_REPORT} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {shown}\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as line,
    ):
        line.sendall(head.encode())
        together.wait()
        for start in range(0, len(body), PIECE_BYTES):
            line.sendall(body[start : start + PIECE_BYTES])
        answer = b""
        while b" 200 " not in answer:  # before it may stand that it has to wait
            if not (more := line.recv(4096)):
                raise RuntimeError(f"no answer but {answer!r}")
            answer += more


async def serve(folder: Path, sites: int, room: int) -> None:
    port = free_port()
    settings = ServerFile.model_validate({"version": 1, "name": "bench", "host": "127.0.0.1", "service_port": port})
    home = Home.found(folder / "coordinator", settings)
    (folder / "ca.pem").write_bytes(home.ca_pem)
    standing = dict(enrolled(folder, home, sites))
    door = Gateway(
        Doorbell(take_apart),
        keys.load_certificate(home.ca_pem),
        lambda: Standing(standing, ()),
        home.journal.append,
        Limits(bodies_bytes=room),
    )
    door.body_bytes_max = lambda: REPORT_BYTES + 2**20
    process, peak = psutil.Process(), [0]
    start = process.memory_info().rss

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    serving = asyncio.create_task(door.serve(listen("127.0.0.1", port), gateway_context(home)))
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    serving.cancel()
    print(round((peak[0] - start) / 2**20), flush=True)
    os._exit(0)


def enrolled(folder: Path, home: Home, sites: int) -> Iterator[tuple[str, str]]:
    """Sites with key and certificate in `folder`: name and key of each."""
    authority = keys.Authority(keys.load_key(home.root / "keys" / "ca.key"), keys.load_certificate(home.ca_pem))
    for number in range(sites):
        name, key = f"site-{number}", keys.make_key(folder / f"{number}.key")
        issued = keys.issue(authority, keys.make_csr(key, name), name, "site", 5)
        keys.write_public(folder / f"{number}.pem", keys.certificate_pem(issued))
        yield name, keys.point_hex(key.public_key())


async def take_apart(scope: Any, receive: Any, send: Any) -> None:
    event = await receive()
    await asyncio.to_thread(parcels.unpack, event["body"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
    else:
        main()
