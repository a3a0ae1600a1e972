"""Fixtures that more than one test file uses, and the settings under which every test runs."""

import os
from pathlib import Path

import psutil
import pytest

# Set before anything imports torch or flwr: tests share few cores with each other, and nothing of ours phones home.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"


def in_memory(folder: Path = Path("/dev/shm"), least: int = 4 * 1024**3) -> bool:  # noqa: S108
    """Whether `folder` is a file system in memory with room for what a session of tests leaves, less than 2 GiB."""
    try:
        room = os.statvfs(folder)
    except OSError:
        return False
    return min(room.f_bavail * room.f_frsize, psutil.virtual_memory().available) >= least and os.access(folder, os.W_OK)


# Journals, ledgers and rosters flush every line to the disk, and tests write many thousands: where there is memory enough, their
# folders are there. Every call stays the same and is waited for. `--basetemp FOLDER` puts them on a disk.
if in_memory():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")  # noqa: S108


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=4, help="processes that tests/test_kill_processes.py kills in its run"
    )
