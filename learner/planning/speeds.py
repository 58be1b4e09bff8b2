"""How fast learner and actors are, and how long responses: what a simulation takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.config import Device
from learner.planning.engine import EngineSpeed

# Share of a full engine's forward pass that takes as long for one sequence, where no run tells. On CPUs as measured
# with the demo, 28 and 104 sequences; on GPUs chosen.
OVERHEAD = {Device.cpu: 0.1, Device.cuda: 0.5}
APART = 1.5  # ratio of two concurrencies from which on a line through them says something


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a simulation takes. Measured lists are used over and over, in their order."""

    train_token_s: tuple[float, ...]  # seconds of a step per response token, without waiting and publishing
    publish_s: tuple[float, ...]  # of each publication
    engine: EngineSpeed
    pause_share: float = 1.0  # of a publication, from its beginning, for which the engines pause
    groups: tuple[tuple[int, ...], ...] = ()  # response lengths of groups; empty: log-normal as follows
    length_mean: float = 0.0  # tokens
    length_sigma: float = 0.0  # standard deviation of the logarithm
    uninformative: float = 0.0  # share of groups that are all right or all wrong
    max_sequences: int | None = None  # that one engine's key-value cache holds; None: all that it is given

    @property
    def mean_length(self) -> float:
        if not self.groups:
            return self.length_mean
        return sum(map(sum, self.groups)) / sum(map(len, self.groups))

    @property
    def pause_s(self) -> float:
        """Of a publication, on average."""
        return self.pause_share * sum(self.publish_s) / len(self.publish_s)

    def train_s(self, step: int, num_tokens: int) -> float:
        return self.train_token_s[step % len(self.train_token_s)] * num_tokens

    def publication_s(self, version: int) -> float:
        return self.publish_s[version % len(self.publish_s)]

    def lengths(
        self, number: int, random: np.random.Generator, num_samples: int, max_tokens: int
    ) -> npt.NDArray[np.int32]:
        """Of the responses of the group with this number [num_samples], from 1 to max_tokens each. Measured groups stay
        together, because easy prompts have short responses, and in order, because a policy learns to be brief or long.
        """
        if self.groups:
            group = self.groups[number % len(self.groups)]
            drawn = random.choice(group, num_samples, replace=num_samples > len(group))
        else:
            location = math.log(self.length_mean) - self.length_sigma**2 / 2
            drawn = np.rint(random.lognormal(location, self.length_sigma, num_samples))
        return np.clip(drawn, 1, max_tokens).astype(np.int32)


def assumed(
    *,
    actor_tokens_per_s: float,
    learner_tokens_per_s: float,
    publish_s: float,
    length_mean: float,
    length_sigma: float,
    sequences: int,
    overhead: float,
    uninformative: float = 0.0,
) -> Speeds:
    """`actor_tokens_per_s` is what one actor draws while `sequences` run."""
    pass_s = sequences / actor_tokens_per_s
    return Speeds(
        train_token_s=(1 / learner_tokens_per_s,),
        publish_s=(publish_s,),
        engine=EngineSpeed(base_s=overhead * pass_s, sequence_s=(1 - overhead) * pass_s / sequences),
        length_mean=length_mean,
        length_sigma=length_sigma,
        uninformative=uninformative,
    )


def token_s(groups: Sequence[tuple[float, int, int]], pause_s: float) -> float:
    """Seconds for a token of one sequence, from (generation_s, versions from oldest to newest token, longest response)
    of groups: a group takes as long as its longest response, and what pauses there were."""
    sampled_s = sum(max(0.0, generation_s - pause_s * versions) for generation_s, versions, _ in groups)
    return sampled_s / sum(longest for _, _, longest in groups)


def through(points: Sequence[tuple[float, float]], overhead: float, verification_s: float = 0.0) -> EngineSpeed:
    """The engine that takes t seconds for a token with n sequences, for each (n, t); the first point holds exactly."""
    n, t = points[0]
    rest = [(m - n, u - t) for m, u in points[1:] if max(m, n) / min(m, n) >= APART]
    slope = (1 - overhead) * t / n
    if rest:  # least squares through the first point, and neither part of a pass takes less than no time
        slope = sum(dn * dt for dn, dt in rest) / sum(dn * dn for dn, _ in rest)
    slope = min(max(slope, 0.0), t / n)
    return EngineSpeed(base_s=t - slope * n, sequence_s=slope, verification_s=verification_s)
