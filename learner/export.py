"""`run.py export RUN --out DIR`: the policy of a checkpoint as a Hugging Face folder."""

from pathlib import Path

import torch

from common.config import ConfigError, read_config
from learner.checkpoint import complete_steps, load_parameters, step_folder
from learner.model import export_hf, load_policy


def main(run_dir: str, step: int | None, out_dir: str) -> int:
    """Writes the policy after `step` (None: the newest checkpoint) to `out_dir`. Returns the exit code.

    Raises ConfigError when there is no such checkpoint or `out_dir` is not empty.
    """
    run, out = Path(run_dir), Path(out_dir)
    config = read_config(run / "config.yaml")
    steps = complete_steps(run / "checkpoints")
    if not steps or (step is not None and step not in steps):
        raise ConfigError(f"{run} has no checkpoint of step {step}: there are {steps or 'none'}")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another --out")
    chosen = steps[-1] if step is None else step
    policy = load_policy(config, torch.device("cpu"), None)
    load_parameters(step_folder(run / "checkpoints", chosen), "policy", policy)
    export_hf(policy, config.model.path, out)
    print(f"wrote the policy after step {chosen} to {out}")
    return 0
