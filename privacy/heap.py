"""Memory that is free inside a process goes back to the system, which has other use for it.

glibc maps a large block by itself and returns it when it is freed, until the first one is. From then on blocks of that size, up
to 32 MiB, come from the heap, which shrinks only when its very top is free: so a process that handles a model now and then holds
the copies of its busiest moment for ever. A bound that is set does not move (`return_large`).

Not in the process that trains: there large blocks come and go at each step, and to get them anew costs half as much again. It
gives back everything at once when no order comes (`give_back`): the next one may be days away.
"""

import ctypes

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BYTES = 1024 * 1024


def return_large() -> None:
    """Blocks of LARGE_BYTES and more are given back when they are freed, from now on; without glibc nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back() -> None:
    """Return whatever is free now, from all over the heap; without glibc nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
