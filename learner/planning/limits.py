"""What `plan` refuses: options that describe no machine, and runs whose simulation would not end in a minute or two."""

import math
import time

from common.config import Config, ConfigError

# Of each option: the least and the most that it can be.
RANGES = {
    "actor_tokens_per_s": (1e-3, 1e9),
    "learner_tokens_per_s": (1e-3, 1e9),
    "publish_s": (0.0, 1e6),
    "length_mean": (1.0, 1e12),
    "length_sigma": (0.0, 10.0),
    "uninformative": (0.0, 0.999),
    "steps": (1, 10_000),
    "gpus": (1, 100_000),
    "gpu_gib": (1e-3, 1e6),
}
MOST_ACTORS = 10_000  # that are simulated side by side
MOST_AHEAD = 500  # steps by which sampling runs ahead of training, and which go by before the first that counts
MOST_RESPONSES = 2_000_000  # of one simulation
MOST_S = 60.0  # for all simulations of one plan


def check_option(name: str, value: float) -> None:
    """Raises ConfigError when it is not in its range."""
    least, most = RANGES[name]
    if not least <= value <= most:  # NaN is in none
        raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be from {least:g} to {most:g}")


def check_size(config: Config, ahead: int, num_steps: int) -> None:
    """Raises ConfigError when a simulation of so many steps, those before the first that counts included, is too
    large. `ahead` is by how many of them sampling runs ahead of training."""
    staleness, rollout, evaluation = config.staleness, config.rollout, config.eval
    if config.actors.count > MOST_ACTORS:
        raise ConfigError(f"actors.count={config.actors.count} is too many to simulate: lower it to {MOST_ACTORS:,}")
    if ahead > MOST_AHEAD:
        raise ConfigError(
            f"staleness.max_staleness={staleness.max_staleness} and weights.publish_every="
            f"{config.weights.publish_every} let sampling run {ahead:,} steps ahead, too many to simulate: lower one "
            f"of them until it is {MOST_AHEAD} at most"
        )
    responses = num_steps * rollout.prompts_per_step * rollout.group_size
    if evaluation.every:
        responses += num_steps // evaluation.every * evaluation.num_prompts * evaluation.samples_per_prompt
    if responses > MOST_RESPONSES:
        raise ConfigError(
            f"{num_steps:,} steps have {responses:,} responses, evaluations included, too many to simulate: lower "
            f"--steps, rollout.prompts_per_step, rollout.group_size or eval.num_prompts until it is {MOST_RESPONSES:,} "
            "at most"
        )


class Patience:
    """How long all simulations of a plan may take together."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._seconds = seconds
        self._ends_s = time.monotonic() + seconds

    def check(self, actors: int, step: int, num_steps: int) -> None:
        """Raises ConfigError when it is over."""
        if time.monotonic() > self._ends_s:
            raise ConfigError(
                f"the simulations have not ended within {self._seconds:g} s, the last is at step {step:,} of "
                f"{num_steps:,} with {actors} actors: lower --steps, --uninformative, staleness.max_staleness, "
                "rollout.prompts_per_step or rollout.group_size"
            )
