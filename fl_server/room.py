"""Room for large bodies: so many bytes of them may come in at the same time, over all sites. Who does not fit waits.

First come, first served: a large body at the head of the queue is not overtaken by small ones, so everybody's turn comes.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

BODIES_BYTES = 512 * 1024 * 1024


def room_bytes(body_bytes_max: int, bodies_bytes: int = BODIES_BYTES) -> int:
    """Bytes of large bodies that may be here at a time: `bodies_bytes`, and in any case the two largest.

    One site holds one largest body at most, so no site alone keeps the others out.
    """
    return max(bodies_bytes, 2 * body_bytes_max)


@dataclass(eq=False)
class Turn:
    """One body. `granted` is done when it may come; to cancel it is to go away."""

    size: int
    granted: asyncio.Future[None]
    since: float = 0.0  # when it was let in, by the loop's clock


class Room:
    """Who is inside, and who waits. One event loop."""

    def __init__(self, most: Callable[[], int], beside: Callable[[], int]) -> None:
        """`most`: bytes, never fewer than one body. `beside`: bytes that others hold of them; each for a limited time only."""
        self.most, self.beside = most, beside
        self._inside, self._queue = set[Turn](), deque[Turn]()
        self._crowded_since: float | None = None

    @property
    def taken(self) -> int:
        """Bytes of the bodies that were let in."""
        return sum(turn.size for turn in self._inside)

    def ask(self, size: int) -> Turn:
        """A turn, granted at once if there is room and nobody waits. Whoever asks has to `leave`, granted or not."""
        turn = Turn(size, asyncio.get_running_loop().create_future())
        self._queue.append(turn)
        self.look()
        return turn

    def leave(self, turn: Turn) -> None:
        """The body is not in memory any more, or will never come."""
        if turn in self._inside:
            self._inside.remove(turn)
        else:
            self._queue.remove(turn)
        self.look()

    def look(self) -> None:
        """Let in whoever fits now."""
        now = asyncio.get_running_loop().time()
        while self._queue and self.taken + self.beside() + self._queue[0].size <= self.most():
            turn = self._queue.popleft()
            self._inside.add(turn)
            turn.since = now
            if not turn.granted.done():  # who has gone away leaves in a moment
                turn.granted.set_result(None)
        if not self._queue:
            self._crowded_since = None
        elif self._crowded_since is None:
            self._crowded_since = now

    def held_up_s(self, turn: Turn) -> float:
        """Seconds for which a body that is inside has kept others waiting."""
        if self._crowded_since is None or turn not in self._inside:
            return 0.0
        return asyncio.get_running_loop().time() - max(turn.since, self._crowded_since)
