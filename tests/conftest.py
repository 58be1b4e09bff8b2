"""What every test process sees: no network, one thread, and with pytest-xdist a share of the cores to itself."""

import os
import signal

import pytest

from common.processes import deal_cores

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would every process of a test

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...

if WORKER is not None:
    # A run puts its actors on the last of the cores that it may use: two runs at once would leave the first one idle.
    shares = deal_cores(sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.sched_setaffinity(0, shares[int(WORKER.removeprefix("gw"))])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first when several run at once, so that no worker is left with one while the others are done."""
    if WORKER is not None:
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("vllm", "slow")])
