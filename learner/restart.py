"""A learner that follows another one of the same run: at which port it listens, and what is lost."""

import logging
import os
import re
from pathlib import Path

from common.config import Config, ConfigError
from common.metrics import is_step, read_jsonl
from common.processes import RESTARTED
from learner.resume import Standing

logger = logging.getLogger(__name__)


def former_port(run_dir: Path) -> int:
    """Port of the learner that wrote RUN/endpoint, where actors that outlived it look for the next; 0: there was none.

    `train` deletes the file when it starts, so that one which is there is of this run.
    """
    endpoint = run_dir / "endpoint"
    text = endpoint.read_text(errors="replace").strip() if endpoint.is_file() else ""
    port = re.search(r":([0-9]{1,5})$", text)
    return int(port[1]) if port is not None and int(port[1]) < 2**16 else 0


def write_endpoint(run_dir: Path, endpoint: str) -> None:
    """RUN/endpoint, complete or not there at all."""
    temporary = run_dir / "endpoint.tmp"
    temporary.write_text(endpoint)
    temporary.replace(run_dir / "endpoint")


def refuse_loss(config: Config, stands: Standing | None) -> None:
    """Raises ConfigError when all steps that a run has done are lost, or its checkpoints are elsewhere; beginning anew
    would delete what is left of it. Of a learner that a supervisor has restarted, says how many are if some.
    """
    metrics = config.run_dir / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.is_file() else ()
    done = max((row["step"] for row in rows if is_step(row.get("step"))), default=0)
    if stands is None and done > 0:
        raise ConfigError(
            f"the {done} steps that {config.run_dir} had done are lost, because there is no checkpoint to go on from "
            f"(checkpoint.every={config.checkpoint.every}): bring {config.run_dir / 'checkpoints'} back if it is "
            "elsewhere, else set checkpoint.every and begin anew with --overwrite"
        )
    if RESTARTED not in os.environ:
        return
    step = 0 if stands is None else stands.step
    again = f", {done - step} steps are done again" if done > step else ""
    logger.warning("the learner was started again: it goes on after step %d%s", step, again)
