"""`train` as far as its terminal is concerned: a supervisor with what console_for gives it, over a learner that says
where it is, answers observers and prints steps.

    python tests/support/watched_run.py RUN HOW         the supervisor; HOW: "dies" or "waits"
    python tests/support/watched_run.py RUN HOW learner
"""

import os
import signal
import sys
import time
from pathlib import Path

from common.child import ChildSpec
from common.config import Config, ModelConfig, TransportConfig
from common.console import console_for
from common.metrics import format_progress
from common.processes import Supervisor
from common.transport import LearnerSocket
from common.types import Watch
from tests.support.statuses import make_status

NUM_ANSWERS = 2  # before the learner ends


def learner(run_dir: Path, how: str) -> int:
    router = LearnerSocket("127.0.0.1", 0, 1)
    (run_dir / "endpoint").write_text(router.endpoint)
    print("a line of the learner's", flush=True)
    num_answers, deadline = 0, time.monotonic() + 30.0
    while time.monotonic() < deadline:
        router.poll(0.1)
        for identity, message in router.receive():
            assert isinstance(message, Watch)
            router.send(identity, make_status())
            num_answers += 1
            print(format_progress(num_answers, 20, {"reward/mean": 0.5}), flush=True)
        if num_answers >= NUM_ANSWERS and how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
    return 0


def train(run_dir: Path, how: str) -> int:
    config = Config(
        name=run_dir.name, runs_dir=str(run_dir.parent), model=ModelConfig(path="none"),
        transport=TransportConfig(curve=False),
    )  # fmt: skip
    spec = ChildSpec(
        name="learner-0",
        command=(sys.executable, __file__, str(run_dir), how, "learner"),
        environment={},
        is_leader=True,
        is_echoed=True,
    )
    outcome = Supervisor([spec], run_dir / "logs", console=console_for(config)).run()
    print(f"ended with {outcome.exit_code}: {outcome.message}", flush=True)
    return outcome.exit_code


if __name__ == "__main__":
    run, how = Path(sys.argv[1]), sys.argv[2]
    sys.exit(learner(run, how) if len(sys.argv) > 3 else train(run, how))
