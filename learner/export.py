"""Model folders that a run writes: the policy of a checkpoint (`run.py export RUN --out DIR`), and RUN/model."""

from dataclasses import replace
from pathlib import Path

import torch

from common.config import Config, ConfigError
from common.loading import read_config
from learner.checkpoint import complete_steps, load_parameters, step_folder
from learner.networks.model import export_hf, load_policy


def main(run_dir: str, step: int | None, out_dir: str) -> int:
    """Writes the policy after `step` (None: the newest checkpoint) to `out_dir`. Returns the exit code.

    Raises ConfigError when there is no such checkpoint or `out_dir` is not an empty folder.
    """
    run, out = Path(run_dir), Path(out_dir)
    config = read_config(run / "config.yaml")
    steps = complete_steps(run / "checkpoints")
    if not steps:
        raise ConfigError(f"{run} has no complete checkpoint to export")
    if step is not None and step not in steps:
        raise ConfigError(f"{run} has no checkpoint of step {step}: choose --step among {', '.join(map(str, steps))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: choose another --out")
    chosen = steps[-1] if step is None else step
    policy = load_policy(config, torch.device("cpu"), None)
    load_parameters(step_folder(run / "checkpoints", chosen), "policy", policy)
    export_hf(policy, config.model.path, out)
    print(f"wrote the policy after step {chosen} to {out}")
    return 0


def with_tying(config: Config) -> Config:
    """The configuration with RUN/model in the place of model.path: the same model, tied or untied as it is asked for.

    Learner and engines then read one folder that says what it is. An engine that is merely told to tie a model which
    has an output layer of its own keeps that layer.
    """
    out = config.run_dir / "model"
    export_hf(load_policy(config, torch.device("cpu"), None), config.model.path, out)
    return replace(config, model=replace(config.model, path=str(out), tie_word_embeddings=None))
