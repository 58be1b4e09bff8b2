"""Model folders that a run writes: a network of a checkpoint (`run.py export RUN --out DIR`), and RUN/model."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from common.config import AdvantageEstimator, Config, ConfigError, DType, LoraConfig
from common.loading import config_of_run, read_config
from learner.checkpoint import complete_steps, damage, load_parameters, step_folder, torn
from learner.networks.export import export_adapter, export_critic, export_policy
from learner.networks.model import Critic, load_critics, load_policy

CPU = torch.device("cpu")


def main(
    run_dir: str, step: int | None, out_dir: str, is_critic: bool, dtype: DType | None, only_adapter: bool = False
) -> int:
    """Writes the policy, or the critic, after `step` (None: the newest checkpoint) to `out_dir`; of several critics
    each to a folder critic_N in it.

    With LoRA that is the model with the adapter merged into it, or `only_adapter`, in PEFT's format. `dtype` is the
    type of the stored weights (None: that of the model that the run started from; of an adapter alone float32).
    Returns the exit code. Raises ConfigError when there is no such checkpoint, critic or adapter, or `out_dir` is not
    an empty folder.
    """
    run, out = Path(run_dir), Path(out_dir)
    config = read_config(config_of_run(run))
    folder, chosen = checkpoint_of(run, step)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: choose another --out")
    if only_adapter and config.lora.rank == 0:
        raise ConfigError(f"{run} has no adapter: with lora.rank=0 it trains all weights, so leave out --adapter")
    if is_critic and config.algorithm.advantage is not AdvantageEstimator.gae:
        raise ConfigError(f"{run} has no critic: algorithm.advantage={config.algorithm.advantage} trains none")
    base, torch_dtype = config.model.path, None if dtype is None else getattr(torch, dtype.value)
    what = "critic" if is_critic else "policy"
    network = load_critics(config, CPU, None) if is_critic else load_policy(config, CPU, None)
    load_parameters(folder, what, network)
    if only_adapter:
        came_from = config.model.critic_path if is_critic else None
        export_adapter(network, came_from or base, out, torch_dtype)
    elif isinstance(network, nn.ModuleList):
        for number, critic in enumerate(network):
            assert isinstance(critic, Critic)
            export_critic(critic, base, out / f"critic_{number}", torch_dtype)
    elif isinstance(network, Critic):
        export_critic(network, base, out, torch_dtype)
    else:
        export_policy(network, base, out, torch_dtype)
    adapter = "'s adapter" if only_adapter else ""
    plural = "s" if isinstance(network, nn.ModuleList) else ""
    print(f"wrote the {what}{plural}{adapter} after step {chosen} to {out}")
    return 0


def checkpoint_of(run: Path, step: int | None) -> tuple[Path, int]:
    """(folder, step) of the checkpoint of `step`, or of the newest that is complete; which ones are not is printed.
    Raises ConfigError for one that is not there or is damaged."""
    checkpoints = run / "checkpoints"
    steps = complete_steps(checkpoints)
    if not steps:
        incomplete = _incomplete(checkpoints)
        raise ConfigError(f"{run} has no complete checkpoint{incomplete and f': {incomplete}'}")
    if step is not None and step not in steps:
        incomplete = _incomplete(checkpoints)
        which = f" ({incomplete})" if incomplete else ""
        raise ConfigError(f"{run} has no checkpoint of step {step}{which}: {_intact_ones(checkpoints, steps)}")
    chosen = steps[-1] if step is None else step
    folder = step_folder(checkpoints, chosen)
    if names := damage(folder):
        others = [other for other in steps if other != chosen]
        raise ConfigError(
            f"{folder} is damaged, it has other bytes than were written in {', '.join(names)}: "
            f"{_intact_ones(checkpoints, others)}"
        )
    if step is None and (incomplete := _incomplete(checkpoints, folder)):
        print(f"{checkpoints} is damaged ({incomplete}): step {chosen} is taken", file=sys.stderr)
    return folder, chosen


def _incomplete(checkpoints: Path, newer_than: Path | None = None) -> str:
    return "; ".join(torn(checkpoints, newer_than).values())


def _intact_ones(checkpoints: Path, steps: Sequence[int]) -> str:
    """What to do instead. Reads all of them."""
    intact = [str(step) for step in steps if not damage(step_folder(checkpoints, step))]
    return f"choose --step among {', '.join(intact)}" if intact else "bring its files there from a copy"


def with_tying(config: Config) -> Config:
    """The configuration with RUN/model in the place of model.path: the same model, tied or untied as it is asked for.

    Learner and engines then read one folder that says what it is. An engine that is merely told to tie a model which
    has an output layer of its own keeps that layer.
    """
    settled = tying_settled(config)
    whole = replace(config, lora=LoraConfig())  # the model as it is, without what is to be trained
    export_policy(load_policy(whole, CPU, None), config.model.path, settled.model.path)
    return settled


def tying_settled(config: Config) -> Config:
    """What `with_tying` returns, without the folder. The same object when nothing is asked for."""
    if config.model.tie_word_embeddings is None:
        return config
    return replace(config, model=replace(config.model, path=str(config.run_dir / "model"), tie_word_embeddings=None))
