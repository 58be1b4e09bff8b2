"""An actor, as `run.py actor` starts it, with an engine that does not get ready. In a process of its own, which Python
alone would not end: a thread of it waits for ever, as one does in which vLLM waits for its processes."""

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import Any

import actors.engine
import actors.main
from common.config import Config


class Deaf(actors.engine.Engine):
    """It is up, and does not answer."""

    async def start(self) -> None:
        return

    async def score(self, token_ids: Any) -> Any:
        await asyncio.get_running_loop().create_future()


def stuck_actor(config: Config, endpoint: str, name: str, log: Path) -> None:
    """`deaf` has that engine; with another name it never starts."""
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stderr.fileno())
    if name == "deaf":
        actors.main.Engine = Deaf  # type: ignore[misc]
    else:
        actors.engine._build = lambda config: threading.Event().wait()
    sys.exit(actors.main.main(config, endpoint, name))
