"""Model folders that a run writes: a network of a checkpoint (`run.py export RUN --out DIR`), and RUN/model."""

from dataclasses import replace
from pathlib import Path

import torch

from common.config import AdvantageEstimator, Config, ConfigError, DType
from common.loading import read_config
from learner.checkpoint import complete_steps, load_parameters, step_folder
from learner.networks.export import export_critic, export_policy
from learner.networks.model import load_critic, load_policy

CPU = torch.device("cpu")


def main(run_dir: str, step: int | None, out_dir: str, is_critic: bool, dtype: DType | None) -> int:
    """Writes the policy, or the critic, after `step` (None: the newest checkpoint) to `out_dir`.

    `dtype` is the type of the stored weights (None: that of the model that the run started from). Returns the exit
    code. Raises ConfigError when there is no such checkpoint or critic, or `out_dir` is not an empty folder.
    """
    run, out = Path(run_dir), Path(out_dir)
    config = read_config(run / "config.yaml")
    folder, chosen = _checkpoint(run, step)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: choose another --out")
    base, torch_dtype = config.model.path, None if dtype is None else getattr(torch, dtype.value)
    if not is_critic:
        policy = load_policy(config, CPU, None)
        load_parameters(folder, "policy", policy)
        export_policy(policy, base, out, torch_dtype)
    elif config.algorithm.advantage is AdvantageEstimator.gae:
        critic = load_critic(config, CPU, None)
        load_parameters(folder, "critic", critic)
        export_critic(critic, base, out, torch_dtype)
    else:
        raise ConfigError(f"{run} has no critic: algorithm.advantage={config.algorithm.advantage} trains none")
    print(f"wrote the {'critic' if is_critic else 'policy'} after step {chosen} to {out}")
    return 0


def _checkpoint(run: Path, step: int | None) -> tuple[Path, int]:
    """(folder, step) of the checkpoint of `step`, or of the newest."""
    steps = complete_steps(run / "checkpoints")
    if not steps:
        raise ConfigError(f"{run} has no complete checkpoint to export")
    if step is not None and step not in steps:
        raise ConfigError(f"{run} has no checkpoint of step {step}: choose --step among {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    return step_folder(run / "checkpoints", chosen), chosen


def with_tying(config: Config) -> Config:
    """The configuration with RUN/model in the place of model.path: the same model, tied or untied as it is asked for.

    Learner and engines then read one folder that says what it is. An engine that is merely told to tie a model which
    has an output layer of its own keeps that layer.
    """
    settled = tying_settled(config)
    export_policy(load_policy(config, CPU, None), config.model.path, settled.model.path)
    return settled


def tying_settled(config: Config) -> Config:
    """What `with_tying` returns, without the folder. The same object when nothing is asked for."""
    if config.model.tie_word_embeddings is None:
        return config
    return replace(config, model=replace(config.model, path=str(config.run_dir / "model"), tie_word_embeddings=None))
