"""What `run.py eval` is asked for, made into a configuration, prompts and a folder; nothing is started here."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from common.config import Config, ConfigError, Placement, TaskConfig, TransferBackend
from common.launcher import RUN_PY
from common.loading import load_config, read_config
from common.model_folder import weights_fingerprint
from common.tasks import default_verifier, load_heldout, verifier_function
from common.tasks.columns import value_at
from common.tasks.dataset import Dataset, tokenized
from common.types import JSON, Prompt
from common.validation import LARGEST_INTEGER, validate

# What a run, or a recipe, says of its learner does not limit what is only sampled.
NO_LEARNER = ("model.critic_path=null", "learner.replay=null", f"learner.tokens_per_micro_batch={LARGEST_INTEGER}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line. `files` and `overrides` are those of `train`."""

    model: str  # a model folder, OWNER/NAME on the Hub, or a run directory
    step: int | None  # of a run's checkpoint; None: its final export
    data: str | None  # file of prompts; None: the held-out set of the configuration
    by: tuple[str, ...]  # columns of the data whose values get scores of their own
    num_prompts: int | None  # the first so many; None: all
    out: str | None
    is_json: bool
    files: tuple[str, ...]
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`config` is settled: one engine that has its device for itself, and the model folder to load."""

    config: Config
    source: str  # what is evaluated, in words
    data: Dataset
    prompts: tuple[Prompt, ...]  # of its held-out set
    num_samples: int
    out: Path
    settings: dict[str, JSON]


@contextmanager
def planned(request: Request) -> Iterator[Plan]:
    """The plan, while the model folder is there that a step of a run is exported to.

    Raises ConfigError for what cannot be evaluated, by file and line where it is the data.
    """
    run = Path(request.model) if (Path(request.model) / "config.yaml").is_file() else None
    if request.num_prompts is not None and request.num_prompts < 1:
        raise ConfigError(f"--prompts {request.num_prompts} must be at least 1")
    if run is None and request.step is not None:
        raise ConfigError(f"--step {request.step} is of a run, but {request.model} is no run directory: leave it out")
    config = _config(request, run)
    data = tokenized(config, load_heldout(config.task), folder=None, num_processes=len(os.sched_getaffinity(0)))
    prompts = tuple(data.task.heldout[: request.num_prompts])
    for column in request.by:
        check_column(prompts, column)
    num_samples = config.eval.samples_per_prompt if config.eval.temperature > 0 else 1  # greedy ones are all alike
    with _exported(request, run) as exported:
        if exported is not None:
            config = replace(config, model=replace(config.model, path=exported))
        settings = _settings(config, prompts, num_samples)
        yield Plan(
            config=config,
            source=request.model if request.step is None else f"{request.model}, step {request.step}",
            data=data,
            prompts=prompts,
            num_samples=num_samples,
            out=Path(request.out) if request.out is not None else _usual_folder(request, run, config, settings),
            settings=settings,
        )


def column_of(prompt: Prompt, name: str) -> str:
    """What the row of a prompt has in a column, as text."""
    return str(value_at(prompt.row, name))


def check_column(prompts: tuple[Prompt, ...], name: str) -> None:
    """Raises ConfigError unless every row has the column."""
    for prompt in prompts:
        try:
            value_at(prompt.row, name)
        except KeyError:
            there = ", ".join(sorted(prompt.row)) or "none"
            raise ConfigError(f"--by {name}: the row of {prompt.uid} has no such column (there is: {there})") from None


def _config(request: Request, run: Path | None) -> Config:
    """Of a run its own, then files and overrides; the data is the request's, and nothing of the training is left that
    could be in the way."""
    own = [] if run is None else [str(run / "config.yaml")]
    model = _model_of(request, run)
    config = load_config([*own, *request.files], [f"model.path={model}", *NO_LEARNER, *request.overrides])
    if request.data is not None:
        function = config.verifier.function
        if function is None and run is not None:  # what the run was trained on grades it, whatever the prompts are
            function = default_verifier(config.task)
        task = TaskConfig(
            name="file",
            train_file=None,
            heldout_file=request.data,
            prompt_field=config.task.prompt_field,
            answer_field=config.task.answer_field,
            on_bad_row=config.task.on_bad_row,
            chat_template_kwargs=config.task.chat_template_kwargs,
        )
        config = replace(config, task=task, verifier=replace(config.verifier, function=function))
    config = _alone(config)
    validate(config)
    return config


def _alone(config: Config) -> Config:
    """With an engine that has its device for itself, whatever the run's shared."""
    if not config.is_shared:
        return config
    actors = replace(
        config.actors,
        placement=Placement.separate,
        sleep_while_training=False,
        gpu_memory_utilization=None,
    )
    return replace(config, actors=actors, weights=replace(config.weights, backend=TransferBackend.auto))


def _model_of(request: Request, run: Path | None) -> str:
    """The folder to check and to take the tokenizer from."""
    if run is None:
        return request.model
    if request.step is not None:
        return read_config(run / "config.yaml").model.path
    final = run / "checkpoints" / "final"
    if not (final / "config.json").is_file():
        raise ConfigError(f"{run} has no final export yet: name a checkpoint with --step")
    return str(final)


@contextmanager
def _exported(request: Request, run: Path | None) -> Iterator[str | None]:
    """The model folder of --step, which is there for as long as it is needed; None without."""
    if run is None or request.step is None:
        yield None
        return
    evaluations = run / "eval"
    evaluations.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=".model-", dir=evaluations) as folder:
        command = [sys.executable, str(RUN_PY), "export", str(run), "--step", str(request.step), "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise ConfigError(reason.removeprefix("error: "))
        yield folder


def _usual_folder(request: Request, run: Path | None, config: Config, settings: dict[str, JSON]) -> Path:
    """RUN/eval/DATA-DIGEST, or runs_dir/eval/MODEL-DATA-DIGEST: another one for other settings."""
    parts = [Path(request.data).stem if request.data is not None else config.task.name]
    parts += [] if request.step is None else [f"step-{request.step}"]
    parts.append(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8])
    if run is not None:
        return run / "eval" / "-".join(parts)
    return Path(config.runs_dir) / "eval" / "-".join([Path(request.model).name, *parts])


def _settings(config: Config, prompts: tuple[Prompt, ...], num_samples: int) -> dict[str, JSON]:
    """All that two parts of one evaluation must have in common."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr(prompt).encode("utf-8", "surrogatepass"))
    evaluation, rollout = config.eval, config.rollout
    return {
        "weights": weights_fingerprint(config.model.path),
        "prompts": digest.hexdigest(),
        "chat_template_kwargs": config.task.chat_template_kwargs,
        "samples": num_samples,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "top_k": evaluation.top_k,
        "max_tokens": rollout.max_tokens,
        "stop": list(rollout.stop),
        "dtype": str(config.model.dtype),
        "seed": config.seed,
        "verifier": verifier_function(config),
        "answer_form": str(config.verifier.answer_form),
    }
