"""A line between nodes and a coordinator that counts what passes and may be as slow as a real one: a TCP relay on loopback.

All connections share one line, as sites share a coordinator's connection: `mbit` in each direction at the same time, and half
of `latency_ms` each way. It sees the bytes of TLS and looks at nothing. What it does not have is TCP's own slow start over a
long way, and losses.
"""

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field

PIECE_BYTES = 64 * 1024
IN_FLIGHT = 32  # pieces of one connection on the way in one direction, 2 MiB: more than 100 Mbit/s times 100 ms


@dataclass
class Way:
    """One direction of the line: bytes that went through, and when it is free again."""

    passed: int = 0
    free_at: float = 0.0


@dataclass
class Relay:
    """Passes connections to its `port` on to `to`, in a thread of its own. `mbit` 0: as fast as it can."""

    to: int
    mbit: float = 0.0
    latency_ms: float = 0.0
    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)
    port: int = 0

    def start(self) -> None:
        """Return when the line is open."""
        opened = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(opened)), daemon=True).start()
        if not opened.wait(10):
            raise RuntimeError("the line did not open")

    @property
    def passed(self) -> int:
        """Bytes in both directions so far."""
        return self.up.passed + self.down.passed

    async def _serve(self, opened: threading.Event) -> None:
        server = await asyncio.start_server(self._join, "127.0.0.1", 0, limit=PIECE_BYTES)
        self.port = int(server.sockets[0].getsockname()[1])
        opened.set()
        async with server:
            await server.serve_forever()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind = await asyncio.open_connection("127.0.0.1", self.to, limit=PIECE_BYTES)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._carry(reader, behind[1], self.up), self._carry(behind[0], writer, self.down))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        """Take pieces from one end as the line has room, and give each to the other end when it has come through."""
        under_way = asyncio.Queue[tuple[float, bytes]](IN_FLIGHT)
        arriving = asyncio.create_task(self._deliver(under_way, writer))
        loop, piece = asyncio.get_running_loop(), b"."
        while piece:
            try:
                piece = await reader.read(PIECE_BYTES)
            except OSError:
                piece = b""
            way.passed += len(piece)
            seconds = len(piece) * 8 / (self.mbit * 1e6) if self.mbit else 0.0
            way.free_at = max(way.free_at, loop.time()) + seconds
            due = way.free_at + self.latency_ms / 2000
            await asyncio.sleep(way.free_at - loop.time())
            await under_way.put((due, piece))
        await arriving

    async def _deliver(self, under_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        loop, gone = asyncio.get_running_loop(), False
        while True:
            due, piece = await under_way.get()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not piece:
                break
            if not gone:
                try:
                    writer.write(piece)
                    await writer.drain()
                except OSError:
                    gone = True
        with contextlib.suppress(OSError):
            writer.close()
