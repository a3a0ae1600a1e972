"""Fixtures that more than one test file uses, and the settings under which every test runs."""

import os

# Set before anything imports torch or flwr: tests share few cores with each other, and nothing of ours phones home.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
