"""What deployment scripts would start: they run for real, with stand-ins for the programs that they call.

A stand-in writes down its arguments; `torchrun` and `python` then end as a test wants. `srun` starts its command.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.run

from common.commandline import parse
from common.config import Config
from common.keys import LearnerKeys, actor_keys, make_keys
from common.loading import load_config
from tests.support.runs import ROOT

RECORDER = """#!/bin/bash
{{ printf '%s\\0' {name} "$@"; printf '\\n'; }} >> {calls}
{then}
"""


@dataclass(frozen=True)
class Programs:
    """Stand-ins in `folder`."""

    folder: Path

    def add(self, name: str, then: str = "exit 0") -> None:
        """One that goes on with `then`, a line of bash."""
        program = self.folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RECORDER.format(name=name, calls=self.folder / "calls", then=then))
        program.chmod(0o755)

    def add_srun(self) -> None:
        self.add("srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')

    def start(self, script: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env={**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", **environment},
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of this program so far."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        calls = [line.rstrip("\0").split("\0") for line in lines]
        return [call[1:] for call in calls if call[0] == name]


@dataclass(frozen=True)
class Learner:
    """A call of torchrun, taken apart by torchrun's parser and ours."""

    nodes: int
    node_rank: int
    ranks_per_node: int
    master: str
    master_port: int
    shutdown_s: int  # that torchrun gives its ranks to stop
    config: Config


def learner_of(call: list[str], files: dict[str, Path] | None = None) -> Learner:
    """What `torchrun ...` starts; `files` are files of the other machine that lie elsewhere here. Fails where torchrun,
    the command line or the configuration does."""
    torchrun = torch.distributed.run.get_args_parser().parse_args(call)
    assert (ROOT / torchrun.training_script).samefile(ROOT / "run.py")
    arguments = parse(torchrun.training_script_args)
    assert arguments.command == "learner"
    return Learner(
        nodes=int(torchrun.nnodes),
        node_rank=torchrun.node_rank,
        ranks_per_node=int(torchrun.nproc_per_node),
        master=torchrun.master_addr,
        master_port=torchrun.master_port,
        shutdown_s=torchrun.shutdown_timeout,
        config=load_config([str((files or {}).get(arguments.config, arguments.config))], arguments.overrides),
    )


@dataclass(frozen=True)
class Actor:
    """A call of `python run.py actor`, taken apart by our parser."""

    connect: str
    name: str
    keys: str | None
    config_files: list[str]
    overrides: list[str]


def actor_of(call: list[str]) -> Actor:
    script, *rest = call
    assert (ROOT / script).samefile(ROOT / "run.py")
    arguments = parse(rest)
    assert arguments.command == "actor"
    return Actor(arguments.connect, arguments.name, arguments.keys, arguments.config, arguments.overrides)


def check_keys_fit(learner: Learner, actor: Actor, volumes: dict[str, dict[str, Any]], folder: Path) -> None:
    """Fails unless learner and actor get along with the keys that docs/cluster.md says to make, where `volumes` mounts
    them: by role, the `keys` volume of its pod, mounted at /keys."""
    assert learner.config.transport.keys == actor.keys == "/keys"
    make_keys(folder / "KEYS")
    command = (ROOT / "docs" / "cluster.md").read_text().partition("create secret generic async-vapo-keys")[2]
    secret = {Path(path).name: folder / path for path in re.findall(r"--from-file=(\S+)", command)}
    for role, volume in volumes.items():
        assert volume["secret"]["secretName"] == "async-vapo-keys"
        for item in volume["secret"]["items"]:
            (folder / role / item["path"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(secret[item["key"]], folder / role / item["path"])
    theirs, ours = actor_keys(learner.config, actor.name, folder / "actor"), LearnerKeys(folder / "learner")
    assert theirs is not None and theirs.learner == ours.own.public
    assert ours.callback("", theirs.own.public)
    assert not (folder / "actor" / "learner.key_secret").exists()
