"""A process that handles a model now and then does not hold the copies for ever."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOLDS = """
import sys
from privacy import heap
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
if sys.argv[1] == "returns":
    heap.return_large()
block = b"1" * (24 << 20)
del block  # glibc takes it as a word for what is usual here
before = resident()
blocks = [b"1" * (4 << 20) for _ in range(16)]
pin = b"1" * (96 << 10)  # above them, if they are on the heap
del blocks
if sys.argv[1] == "gives back":
    heap.give_back()
print(resident() - before)
"""


def held_kib(kind: str) -> int:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": "."}
    words = [sys.executable, "-c", HOLDS, kind]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")
def test_what_was_large_goes_back_to_the_system_when_it_is_freed() -> None:
    assert held_kib("returns") < 4 << 10
    assert held_kib("gives back") < 4 << 10
    assert held_kib("as usual") > 32 << 10  # or nobody needs this module any more
