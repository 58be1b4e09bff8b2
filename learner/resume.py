"""Where a run stands, from its files alone, and whether it can go on with the settings that it is given."""

import json
import logging
import operator
from dataclasses import dataclass

from common.config import Config, ConfigError
from common.metrics import is_evaluated
from common.model_folder import weights_fingerprint
from common.types import JSON
from learner.checkpoint import complete_steps, step_folder, torn
from learner.checksums import STATE

logger = logging.getLogger(__name__)

WARMUP = "algorithm.critic_warmup_steps"
# What a run is: with another one of these it would be another run. All else may change at a resume.
FIXED = (
    "seed",
    "task.name",
    "task.seed",
    "task.num_train",
    "model.tie_word_embeddings",
    "model.critic",
    "model.critic_frozen",
    "model.num_critics",
    "lora.rank",
    "lora.alpha",
    "lora.target_modules",
    "algorithm.advantage",
)


# Of the files with the weights that LoRA leaves as they are: checkpoints do not hold those.
FROZEN = "lora.frozen_weights"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A run with a complete checkpoint. It is complete when it has nothing left to train, to export or to evaluate."""

    step: int  # of the newest checkpoint, warm-up included
    policy_steps: int
    is_complete: bool


def settings(config: Config) -> dict[str, JSON]:
    """What a checkpoint keeps of the configuration, for `standing`."""
    values = {key: operator.attrgetter(key)(config) for key in (*FIXED, WARMUP)}
    if config.lora.rank > 0:
        values[FROZEN] = weights_fingerprint(config.model.path, config.model.critic_path)
    return {key: str(value) if isinstance(value, str) else value for key, value in values.items()}


def standing(config: Config) -> Standing | None:
    """Where the run of `config` stands; None when it has no complete checkpoint and so begins anew. Looks only whether
    all files are there and the state is what was written: the rest is read by the learner (learner/rundir.py).

    Raises ConfigError when it cannot go on with these settings.
    """
    checkpoints = config.run_dir / "checkpoints"
    step = max(complete_steps(checkpoints), default=None)
    folder = None if step is None else step_folder(checkpoints, step)
    incomplete = torn(checkpoints, folder)
    for sentence in incomplete.values():
        logger.warning("checkpoint %s: it is left out", checkpoints / sentence)
    if incomplete and folder is None:
        raise ConfigError(
            f"no checkpoint in {checkpoints} is complete ({'; '.join(incomplete.values())}): bring these files there, "
            "or begin anew with another name=..."
        )
    if step is None or folder is None:
        return None
    state = json.loads((folder / STATE).read_text())
    values = state["values"]
    missing = sorted({"warmup_steps", *(f"settings/{key}" for key in (*FIXED, WARMUP))} - values.keys())
    if missing:
        raise ConfigError(f"checkpoint {folder} lacks {missing[0]}, it was made by another version of the program")
    _check_fixed(config, values)
    warmup_steps = _check_warmup(config, step, values)
    policy_steps = max(0, step - warmup_steps)
    if config.learner.steps < policy_steps:
        raise ConfigError(
            f"learner.steps={config.learner.steps} is less than the {policy_steps} policy steps that {config.run_dir} "
            "has done: leave it out, or raise it to train on"
        )
    is_trained = step == warmup_steps + config.learner.steps
    return Standing(
        step=step,
        policy_steps=policy_steps,
        is_complete=is_trained and _is_delivered(config, state["version"]),
    )


def _check_fixed(config: Config, values: dict[str, JSON]) -> None:
    now = settings(config)
    for key in FIXED:
        value, before = now[key], values[f"settings/{key}"]
        if value != before:
            raise ConfigError(
                f"{key}={value} cannot change at a resume, {config.run_dir} began with {before}: "
                "leave it out, or start another run with name=..."
            )

    if FROZEN in now and now[FROZEN] != values.get(f"settings/{FROZEN}"):
        folders = " or ".join(filter(None, (config.model.path, config.model.critic_path)))
        raise ConfigError(
            f"{folders} holds other weights than those that {config.run_dir} trains adapters of: set model.path and "
            "model.critic_path to where the same ones are now"
        )


def _check_warmup(config: Config, step: int, values: dict[str, JSON]) -> int:
    """Warm-up steps of the run that goes on: those of the checkpoint, which its gate may have cut, or other ones."""
    wanted, done = config.algorithm.critic_warmup_steps, min(step, values["warmup_steps"])
    if wanted == values[f"settings/{WARMUP}"]:
        return int(values["warmup_steps"])
    if step > values["warmup_steps"]:
        raise ConfigError(
            f"{WARMUP}={wanted} comes too late, the warm-up of {config.run_dir} was over after {done} steps: "
            "leave it out"
        )
    if wanted < done:
        raise ConfigError(f"{WARMUP}={wanted} is less than the {done} warm-up steps that {config.run_dir} has done")
    return wanted


def _is_delivered(config: Config, version: int) -> bool:
    """Whether the policy was exported and its version evaluated, which follows the last checkpoint."""
    is_exported = (config.run_dir / "checkpoints" / "final" / "config.json").is_file()
    return is_exported and is_evaluated(config.run_dir, version)
