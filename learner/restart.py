"""A learner that follows another one of the same run: at which port it listens, and what is lost."""

import logging
import os
from pathlib import Path

from common.config import Config, ConfigError
from common.metrics import read_jsonl
from common.processes import RESTARTED
from learner.resume import Standing

logger = logging.getLogger(__name__)


def former_port(run_dir: Path) -> int:
    """Port of the learner that wrote RUN/endpoint, where actors that outlived it look for the next; 0: there was none.

    `train` deletes the file when it starts, so that one which is there is of this run.
    """
    endpoint = run_dir / "endpoint"
    port = endpoint.read_text().strip().rpartition(":")[2] if endpoint.is_file() else ""
    return int(port) if port.isdigit() else 0


def write_endpoint(run_dir: Path, endpoint: str) -> None:
    """RUN/endpoint, complete or not there at all."""
    temporary = run_dir / "endpoint.tmp"
    temporary.write_text(endpoint)
    temporary.replace(run_dir / "endpoint")


def refuse_loss(config: Config, stands: Standing | None) -> None:
    """Raises ConfigError when a supervisor has restarted a learner whose steps are all lost; says how many are if some.

    A resume by hand may begin anew, because who asks for it has seen that there is no checkpoint.
    """
    if RESTARTED not in os.environ:
        return
    metrics = config.run_dir / "metrics.jsonl"
    done = max((row["step"] for row in read_jsonl(metrics)), default=0) if metrics.is_file() else 0
    if stands is None and done > 0:
        raise ConfigError(
            f"the {done} steps that {config.run_dir} had done are lost, because there is no checkpoint to go on from "
            f"(checkpoint.every={config.checkpoint.every}): set checkpoint.every, and begin anew with --overwrite"
        )
    step = 0 if stands is None else stands.step
    again = f", {done - step} steps are done again" if done > step else ""
    logger.warning("the learner was started again: it goes on after step %d%s", step, again)
