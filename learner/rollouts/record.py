"""What a run consumed, step by step (learner.record=true), for a replay of its training.

    RUN/record/step_00000007     the groups of step 7, counted from 1, in the order in which they were consumed, and the
                                 settings that they were trained with (learner/rollouts/archive.py)

A file is complete before its step is trained, so that a step which fails is there too. Steps that are done again
after a resume replace those of before.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from common.config import ConfigError
from common.types import JSON, TrajectoryGroup
from learner.rollouts.archive import ArchiveError, as_groups, as_messages, read_about, read_archive, write_archive

_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")


class Recorder:
    """Writes the record of one run; the one writer is the learner's rank 0.

    `settings` are those that a replay has to have in common, by name.
    """

    def __init__(self, run_dir: Path, settings: dict[str, JSON]) -> None:
        self._folder = run_dir / "record"
        self._folder.mkdir(exist_ok=True)
        self._settings = settings

    def write(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        about = {"actors": [group.actor for group in groups], "settings": self._settings}
        temporary = self._folder / "incomplete"
        write_archive(temporary, about, as_messages(groups))
        temporary.replace(_file(self._folder, step))


class Record:
    """The record of a run, to be read from its first step to `last_step`, the last one without a gap before it.

    Raises ConfigError when the first step is not there.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "record"
        steps = _steps(self._folder)
        if not steps:
            raise ConfigError(f"{run_dir} has no record of what it trained on: train it with learner.record=true")
        self.spans = _spans(steps)
        if steps[0] != 1:
            raise ConfigError(
                f"{run_dir} has recorded the steps {self.spans}, but a replay begins with step 1: train it from its "
                "start with learner.record=true"
            )
        self.last_step = next(n for n, step in enumerate([*steps[1:], None], start=1) if step != n + 1)

    def settings(self, step: int) -> dict[str, JSON]:
        """Those that `step` was trained with. Raises ConfigError when it cannot be read, as the next does."""
        try:
            settings: dict[str, JSON] = read_about(_file(self._folder, step))["settings"]
        except ArchiveError as error:
            raise ConfigError(f"{error}; the steps before it can be replayed with learner.steps") from error
        return settings

    def groups(self, step: int) -> list[TrajectoryGroup]:
        try:
            about, messages = read_archive(_file(self._folder, step))
            return as_groups(messages, about["actors"], arrived_s=0.0)
        except ArchiveError as error:
            raise ConfigError(f"step {step} cannot be replayed: {error}") from error


def forget_after(run_dir: Path, step: int) -> None:
    """Removes the steps after `step`, which are about to be done again, recorded or not."""
    for later in _steps(run_dir / "record"):
        if later > step:
            _file(run_dir / "record", later).unlink()


def _steps(folder: Path) -> list[int]:
    """Of its files; what else lies there, as a copy that somebody has made, is left alone."""
    matches = (_NAME.fullmatch(path.name) for path in folder.glob("step_*"))
    return sorted(int(match[1]) for match in matches if match)


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _spans(steps: Sequence[int]) -> str:
    """ "1 to 10, 21 to 30": consecutive numbers, of which there is at least one."""
    firsts = [step for step in steps if step - 1 not in steps]
    lasts = [step for step in steps if step + 1 not in steps]
    return ", ".join(f"{first} to {last}" for first, last in zip(firsts, lasts, strict=True))
