"""`run.py learner` and `run.py actor` in processes that are forked with their libraries loaded, on hosts of their own.

The actors have the learner's own network in the place of vLLM (network_engine.py); everything else is real.
"""

import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import actors.main
import run
from tests.support.network_engine import NetworkEngine
from tests.support.transfer_process import start


def start_role(host: str | None, log: Path, arguments: list[str], **environment: str) -> ForkServerProcess:
    """`run.py ARGUMENTS` in the namespace `host`, with `environment` on top; its output is appended to `log`. None:
    where everybody is."""
    return start(_main, log, arguments, environment, host=host)


def _main(log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    with log.open("ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    actors.main.Engine = NetworkEngine  # type: ignore[assignment,misc]
    sys.exit(run.main(arguments))
