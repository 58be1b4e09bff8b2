"""A minute of chaos over six actors and the learner: each prompt is trained once, no token is too old, nobody innocent
has to leave, nothing is left over. `benchmarks/chaos.py` does the same for longer."""

import os
import time
from pathlib import Path

import pytest

from tests.support.chaos import STEPS_A_MINUTE, Chaos


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_chaos(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=int(os.environ.get("CHAOS_SEED", time.time_ns() % 100_000)), steps=STEPS_A_MINUTE)
    print(f"CHAOS_SEED={chaos.seed}")
    found = chaos.run()
    print(found)
    assert not found.faults, chaos.report(found)
