"""Tasks: where prompts come from and who grades their responses.

`load_task` turns a TaskConfig into a train set, a held-out set that shares no prompt with it, and the name
of the default verifier. `chain_sum` and `number_walk` are procedural; `file` reads JSONL or Parquet.
`load_heldout` is for what is only evaluated. `load_dataset` (common/tasks/dataset.py) adds the token ids and leaves out
what a model cannot be asked.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Protocol

from common.config import Config, ConfigError, OnBadRow, TaskConfig, TrainFile
from common.tasks import chain_sum, file, number_walk
from common.tasks.file import DataFile
from common.tasks.rows import BadRow, Problem, settle
from common.types import JSON, Prompt

# Held-out prompts are drawn without repetition; the rarest lengths of either task have few distinct ones.
MAX_HELDOUT = 2000

_FILE_SETTINGS = (
    "train_file",
    "train_files",
    "heldout_file",
    "prompt_field",
    "answer_field",
    "on_bad_row",
    "chat_template_kwargs",
)
_PROCEDURAL_SETTINGS = ("seed", "num_train", "num_heldout")


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of the training prompts, which lie one after another, and its weight in the stream."""

    uid_prefix: str
    num_prompts: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts with unique uids; no prompt of `heldout` occurs in `train`. `verifier` is "module:function"."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    verifier: str
    shares: tuple[Share, ...] = ()  # of several train files; they add up to `train`
    files: tuple[DataFile, ...] = ()  # that were read, the held-out one last
    problems: tuple[Problem, ...] = ()  # rows that were left out

    def place(self, prompt: Prompt) -> str:
        """Where the user finds this prompt: "FILE, line N", or its uid."""
        label, _, line = prompt.uid.rpartition(":")
        path = next((f.path for f in self.files if f.uid_prefix == label), None)
        return prompt.uid if path is None else file.place(path, line)

    def without(self, problems: Sequence[Problem], bad: Callable[[Prompt], bool]) -> "Task":
        """The task less the `bad` prompts, which are the rows of `problems`. ConfigError when a set is empty then."""
        train = [prompt for prompt in self.train if not bad(prompt)]
        heldout = [prompt for prompt in self.heldout if not bad(prompt)]
        counts = Counter(_prefix(prompt) for prompt in train)
        left = replace(
            self,
            train=train,
            heldout=heldout,
            shares=tuple(replace(share, num_prompts=counts[share.uid_prefix]) for share in self.shares),
            problems=(*self.problems, *problems),
        )
        left.refuse_empty()
        return left

    def refuse_empty(self) -> None:
        """Raises ConfigError when no row of a file can be used."""
        labels = Counter(_prefix(prompt) for prompt in (*self.train, *self.heldout))
        for data in self.files:
            if not labels[data.uid_prefix]:
                first = next(problem for problem in self.problems if problem.place.startswith(f"{data.path}, "))
                raise ConfigError(
                    f"{data.path}: none of its {data.num_rows} rows can be used; {first.place}: {first.text}."
                )


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


def load_heldout(config: TaskConfig) -> Task:
    """The held-out set alone: what is only evaluated needs no file to train on. Raises ConfigError as `load_task`."""
    if config.name != "file":
        return replace(load_task(replace(config, num_train=1)), train=())  # held-out problems are drawn first
    path = _heldout_path(config)
    data = file.read_file(path, f"heldout/{path.name}", config.prompt_field, config.answer_field)
    settle(data.problems, config.on_bad_row)
    task = Task(
        name=config.name,
        train=(),
        heldout=data.prompts,
        verifier=file.VERIFIER,
        files=(data,),
        problems=data.problems,
    )
    task.refuse_empty()
    return task


def default_verifier(config: TaskConfig) -> str:
    """The "module:function" that grades this task's responses, without making its data."""
    return file.VERIFIER if config.name == "file" else _PROCEDURAL[config.name][1]


def verifier_function(config: Config) -> str:
    """The "module:function" that grades a run's responses."""
    return config.verifier.function or default_verifier(config.task)


def is_own_verifier(config: Config) -> bool:
    """Whether that is one of ours, which return a verdict and never a number."""
    return verifier_function(config).partition(".")[0] in ("actors", "common")


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
    sources = _train_files(config)
    heldout_path, columns = _heldout_path(config), (config.prompt_field, config.answer_field)
    parts = [
        file.read_file(Path(source.path), f"train/{label}", *columns)
        for source, label in zip(sources, _labels(sources), strict=True)
    ]
    heldout = file.read_file(heldout_path, f"heldout/{heldout_path.name}", *columns)
    problems = [problem for part in (*parts, heldout) for problem in part.problems]
    settle(problems, config.on_bad_row)
    task = Task(
        name=config.name,
        train=[prompt for part in parts for prompt in part.prompts],
        heldout=heldout.prompts,
        verifier=file.VERIFIER,
        shares=tuple(
            Share(uid_prefix=part.uid_prefix, num_prompts=len(part.prompts), weight=source.weight)
            for source, part in zip(sources, parts, strict=True)
        ),
        files=(*parts, heldout),
        problems=tuple(problems),
    )
    return _apart(task, config.on_bad_row)


def _heldout_path(config: TaskConfig) -> Path:
    if config.heldout_file is None:
        raise ConfigError("task.heldout_file is not set; task.name=file needs both of its files.")
    return Path(config.heldout_file)


def _train_files(config: TaskConfig) -> list[TrainFile]:
    """Raises ConfigError unless there is one file or a list of files with weights."""
    if config.train_file is not None and config.train_files is not None:
        raise ConfigError("task.train_file and task.train_files are both set; put all files into task.train_files.")
    if config.train_file is not None:
        return [TrainFile(path=config.train_file)]
    if not config.train_files:
        raise ConfigError("task.train_file is not set; task.name=file needs both of its files.")
    for source in config.train_files:
        if not 0 < source.weight < float("inf"):
            raise ConfigError(f"task.train_files: weight={source.weight} of {source.path} must be above 0.")
    paths = [Path(source.path).resolve() for source in config.train_files]
    if len(set(paths)) < len(paths):
        twice = config.train_files[paths.index(max(paths, key=paths.count))].path
        raise ConfigError(f"task.train_files names {twice} twice; give it one larger weight.")
    return config.train_files


def _labels(sources: Sequence[TrainFile]) -> list[str]:
    """What uids call each file: its name, or its whole path where two have the same name."""
    names = Counter(Path(source.path).name for source in sources)
    paths = [Path(source.path) for source in sources]
    return [path.name if names[path.name] == 1 else path.as_posix() for path in paths]


def _prefix(prompt: Prompt) -> str:
    return prompt.uid.rpartition(":")[0]


def _refuse_settings(config: TaskConfig, names: tuple[str, ...], reason: str) -> None:
    """Raises ConfigError when a setting that this task does not use differs from its default."""
    defaults = TaskConfig()
    for name in names:
        value: JSON = getattr(config, name)
        if value != getattr(defaults, name):
            raise ConfigError(f"task.{name} is {value!r}, but task.name is '{config.name}' and that {reason}.")


def _apart(task: Task, policy: OnBadRow) -> Task:
    """No prompt is both trained on and held out: refused, or not trained on."""
    heldout = {(prompt.text, repr(prompt.messages)): prompt for prompt in task.heldout}
    twins = {
        prompt.uid: heldout[key] for prompt in task.train if (key := (prompt.text, repr(prompt.messages))) in heldout
    }
    problems = [
        Problem(
            place=task.place(prompt),
            reason=BadRow.HELD_OUT,
            text=f"its prompt is also that of {task.place(twins[prompt.uid])}, and held-out prompts must not be "
            "trained on",
        )
        for prompt in task.train
        if prompt.uid in twins
    ]
    settle(problems, policy)
    return task.without(problems, lambda prompt: prompt.uid in twins)
