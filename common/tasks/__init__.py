"""Tasks: where prompts come from and who grades their responses.

`load_task` turns a TaskConfig into a train set, a held-out set that shares no prompt with it, and the name
of the default verifier. `chain_sum` and `number_walk` are procedural; `file` reads JSONL or Parquet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Protocol

from common.config import ConfigError, TaskConfig
from common.tasks import chain_sum, file, number_walk
from common.types import JSON, Prompt

# Held-out prompts are drawn without repetition; the rarest lengths of either task have few distinct ones.
MAX_HELDOUT = 2000

_FILE_SETTINGS = ("train_file", "heldout_file", "prompt_field", "answer_field")
_PROCEDURAL_SETTINGS = ("seed", "num_train", "num_heldout")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts with unique uids; no prompt of `heldout` occurs in `train`. `verifier` is "module:function"."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    verifier: str


class _Problem(Protocol):
    @property
    def text(self) -> str: ...

    def prompt(self, uid: str) -> Prompt: ...


_PROCEDURAL: dict[str, tuple[Callable[[Random], _Problem], str]] = {
    chain_sum.NAME: (chain_sum.sample_problem, chain_sum.VERIFIER),
    number_walk.NAME: (number_walk.sample_problem, number_walk.VERIFIER),
}


def load_task(config: TaskConfig) -> Task:
    """The task that `config` describes. Raises ConfigError for a setting or a row that cannot be used."""
    if config.name == "file":
        return _load_files(config)
    if config.name not in _PROCEDURAL:
        known = ", ".join([*_PROCEDURAL, "file"])
        raise ConfigError(f"task.name is '{config.name}', but the tasks are: {known}.")
    return _generate(config)


def default_verifier(config: TaskConfig) -> str:
    """The "module:function" that grades this task's responses, without making its data."""
    return file.VERIFIER if config.name == "file" else _PROCEDURAL[config.name][1]


def _generate(config: TaskConfig) -> Task:
    _refuse_settings(config, _FILE_SETTINGS, "needs task.name=file")
    if config.num_train < 1 or not 1 <= config.num_heldout <= MAX_HELDOUT:
        raise ConfigError(
            f"task.num_train is {config.num_train} and task.num_heldout is {config.num_heldout}, but the "
            f"first must be at least 1 and the second 1..{MAX_HELDOUT}."
        )
    sample, verifier = _PROCEDURAL[config.name]
    rng = Random(f"{config.name}/{config.seed}")
    heldout: dict[str, _Problem] = {}
    while len(heldout) < config.num_heldout:
        problem = sample(rng)
        heldout.setdefault(problem.text, problem)
    train: list[_Problem] = []
    while len(train) < config.num_train:
        problem = sample(rng)
        if problem.text not in heldout:
            train.append(problem)
    return Task(
        name=config.name,
        train=[problem.prompt(f"train/{i}") for i, problem in enumerate(train)],
        heldout=[problem.prompt(f"heldout/{i}") for i, problem in enumerate(heldout.values())],
        verifier=verifier,
    )


def _load_files(config: TaskConfig) -> Task:
    _refuse_settings(config, _PROCEDURAL_SETTINGS, "belongs to the procedural tasks")
    if config.train_file is None or config.heldout_file is None:
        missing = "train_file" if config.train_file is None else "heldout_file"
        raise ConfigError(f"task.{missing} is not set; task.name=file needs both of its files.")
    columns = (config.prompt_field, config.answer_field)
    train = file.read_prompts(Path(config.train_file), "train", *columns)
    heldout = file.read_prompts(Path(config.heldout_file), "heldout", *columns)
    _refuse_overlap(train, heldout)
    return Task(name=config.name, train=train, heldout=heldout, verifier=file.VERIFIER)


def _refuse_settings(config: TaskConfig, names: tuple[str, ...], reason: str) -> None:
    """Raises ConfigError when a setting that this task does not use differs from its default."""
    defaults = {f.name: f.default for f in fields(TaskConfig)}
    for name in names:
        value: JSON = getattr(config, name)
        if value != defaults[name]:
            raise ConfigError(f"task.{name} is {value!r}, but task.name is '{config.name}' and that {reason}.")


def _refuse_overlap(train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    uid_of = {(prompt.text, repr(prompt.messages)): prompt.uid for prompt in train}
    for prompt in heldout:
        twin = uid_of.get((prompt.text, repr(prompt.messages)))
        if twin is not None:
            raise ConfigError(
                f"the prompt of {prompt.uid} is also that of {twin}; remove it from one file, because "
                f"held-out prompts must not be trained on."
            )
