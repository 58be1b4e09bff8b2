"""The probe: does an actor compute the policy that it was sent?

After each publication every actor scores one fixed text, and its log-probs are compared with the learner's own. Two
questions are asked, because rounding alone makes them differ: by 1e-6 nats a token in float32, and in bfloat16 by 0.04
on average and up to 0.35, so that a single token says nothing there.

1. Is the mean |difference| beyond `weights.probe_factor` times its floor, which is measured at version 0? No limit is
   above what arithmetic explains, so that a wrong engine does not become its own floor.
2. Have they moved? An actor that no update reached stays a floor away from the learner's log-probs of version 0, while
   the learner's own go on; a right one is as far from them as the learner, whatever the rounding. STANDSTILL floors are
   enough to tell, and the first question takes `probe_factor` of them, which is late in bfloat16: of 135M parameters
   that all moved alike, at a mean of 0.07 nats a token instead of 0.18.

A large vocabulary, a byte tokenizer and one that knows ten characters all have to take the text, so it is plain English
with sums and code; a random sequence would be twice as noisy in bfloat16.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.config import Config
from common.tasks.tokenizing import load_tokenizer
from common.types import JSON, Float32Array, WeightsReport
from learner.networks.model import Policy
from learner.networks.pretrained import read_config
from learner.publication.sentinel import LARGEST_FLOOR, SMALLEST_FLOOR

TEXT = """\
A farmer sells 12 baskets of apples at 7 coins each and keeps 5 baskets for the winter. She earns 12*7=84 coins. If
she then buys 3 hens for 9 coins each, she pays 3*9=27 and has 84-27=57 coins left.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Why is the sky dark at night? If stars filled it evenly and for ever, every line of sight would end on one of them, so
the night would be bright. It is not, because the light of most stars has not had the time to reach us.

Let x be the number that we look for. From 2x+6=20 follows 2x=14, and so x=7. We check: 2*7+6=20, as it should be.
1+2=3, 10-4=6, 8>5, 47+3=50, 50-8=42#42. The first primes are 2, 3, 5, 7, 11, 13, 17 and 19; their sum is 77.

Dear Anna, the train leaves on Friday at half past nine. Please bring the blue umbrella, two maps and the old camera.
In the evening we walk along the river to the mill, where my brother bakes bread, and we come back before the rain.
"""

# The learner has moved this many times as far from version 0 as the floor, and as an actor that stands still. Rounding
# alone, however much it grows, moves a right actor at least 0.7 times as far as the learner.
STANDSTILL = 1.5

Judge = Callable[[Float32Array], str | None]
Member = TypeVar("Member", bound=Hashable)  # whatever tells actors apart


def probe_token_ids(config: Config) -> Tensor:
    """int64 [tokens]: TEXT in the run's tokens, as many as `weights.probe_tokens` and `model.max_model_len` allow.

    Tokens that the model does not have, and special ones (unknown characters), are left out; a short rest is repeated.
    A tokenizer that knows nothing of the text gives the tokens that it has, in their order.
    """
    tokenizer = load_tokenizer(config.model)
    model = read_config(config.model.path, config.model.trust_remote_code)
    usable = set(range(model.get_text_config().vocab_size)) - set(tokenizer.all_special_ids)
    text = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    known = [token for token in text if token in usable] or sorted(usable) or [0]
    length = min(config.weights.probe_tokens, config.model.max_model_len - 1)  # scoring draws one token more
    return torch.tensor(list(islice(cycle(known), length)))


@dataclass(frozen=True, kw_only=True)
class Verdict(Generic[Member]):
    """On all members of one publication. Differences are None when nobody's log-probs came."""

    good: tuple[Member, ...]
    refused: dict[Member, str]  # and why, in one sentence
    difference: float | None  # nats a token, mean over the text, of the member where it is largest
    largest: float | None  # nats, of all members and tokens


class Probe:
    """The learner's own log-probs of the probe, and what a member's may differ by.

    State of a run, which a checkpoint holds: `floor`, and the log-probs of version 0.
    """

    def __init__(self, config: Config, token_ids: Tensor) -> None:
        """`token_ids` int64 [tokens], at least two, are what the actors score too."""
        self._factor = config.weights.probe_factor
        self._dtype = config.model.dtype
        self._token_ids = token_ids
        self.floor: float | None = None  # mean |difference| at version 0, nats a token; None until it was measured
        self._initial: Float32Array | None = None  # [tokens - 1], the learner's at version 0
        self._expected: Float32Array = np.empty(0, np.float32)  # [tokens - 1], the learner's at the present version
        self._agreed: dict[Hashable, int] = {}  # who agreed when last asked, in the present version or the one before

    @property
    def limit(self) -> float:
        """Nats a token."""
        most = LARGEST_FLOOR[self._dtype]
        return most if self.floor is None else min(self._factor * max(self.floor, SMALLEST_FLOOR), most)

    @torch.no_grad()
    def measure(self, policy: Policy, version: int) -> None:
        """Scores the probe at temperature 1 with the weights that `version` is about to be; a collective."""
        tokens = self._token_ids
        logprobs, _ = policy(tokens, torch.tensor([0, len(tokens)]), torch.tensor([1]), temperature=1.0)
        self._expected = logprobs.float().cpu().numpy()
        if version == 0 and self._initial is None:
            self._initial = self._expected

    def judge(
        self, version: int, members: tuple[Member, ...], reports: Mapping[Member, WeightsReport]
    ) -> Verdict[Member]:
        """Who of `members` samples from what was measured last, published as `version`, by their reports of RESUME.
        They may be all, or those that joined after the others.

        The first time that version 0 reached somebody sets the floor: the largest of those who are within the limit.
        """
        found = {name: r.probe_logprobs for name, r in reports.items() if r.error is None and self._fits(r)}
        means = {name: _mean_difference(logprobs, self._expected) for name, logprobs in found.items()}
        refused = {name: self._missing(version, reports.get(name)) for name in members if name not in found}
        for name, logprobs in found.items():
            problem = self._disagreement(name, version, means[name]) or self._standstill(version, logprobs)
            if problem is not None:
                refused[name] = problem
        good = tuple(name for name in members if name not in refused)
        if version == 0 and self.floor is None and good:
            self.floor = max(means[name] for name in good)
        known = {name: agreed for name, agreed in self._agreed.items() if agreed >= version}
        self._agreed = known | dict.fromkeys(good, version)
        largest = [np.abs(logprobs - self._expected).max() for logprobs in found.values()]
        return Verdict(
            good=good,
            refused=refused,
            difference=float(np.max(list(means.values()))) if means else None,
            largest=float(np.max(largest)) if largest else None,
        )

    def at_ready(self) -> Judge:
        """Judges an actor that has the weights measured last from elsewhere, by what it scored: None, or why it must
        leave. Another thread may call it, and later publications do not change it."""
        expected = self._expected

        def judge(logprobs: Float32Array) -> str | None:
            if len(logprobs) != len(expected):
                return f"it scored {len(logprobs)} tokens of the probe, not {len(expected)}"
            difference = _mean_difference(logprobs, expected)
            if difference <= self.limit:
                return None
            return (
                f"its log-probs of the probe differ from those of the learner's initial policy by {difference:.3g} "
                f"nats a token {self._limit_in_words()}: give it the learner's model.path; if it has that, its engine "
                "computes this model otherwise than the learner"
            )

        return judge

    def state_dict(self) -> dict[str, JSON]:
        return {"floor": self.floor, "initial": None if self._initial is None else self._initial.tolist()}

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """The log-probs of version 0 are of no use when weights.probe_tokens was changed since."""
        self.floor, initial = state["floor"], state["initial"]
        if initial is not None and len(initial) == len(self._token_ids) - 1:
            self._initial = np.array(initial, dtype=np.float32)

    def _fits(self, report: WeightsReport) -> bool:
        return len(report.probe_logprobs) == len(self._expected)

    def _missing(self, version: int, report: WeightsReport | None) -> str:
        problem = "it did not answer" if report is None else report.error or "it scored another sequence"
        return f"no log-probs of the probe after version {version}: {problem}"

    def _disagreement(self, name: Hashable, version: int, difference: float) -> str | None:
        """What it means that a member's probe differs: it computes another function, or lost a tensor on the way."""
        if difference <= self.limit:
            return None
        by = f"{difference:.3g} nats a token"
        if name in self._agreed:
            return (
                f"its log-probs of the probe agreed with the learner's at version {self._agreed[name]} and differ by "
                f"{by} after version {version} {self._limit_in_words()}: a tensor was not loaded"
            )
        cause = "its engine computes this model otherwise than the learner, or in another dtype"
        return (
            f"its log-probs of the probe never agreed with the learner's: they differ by {by} at version {version}, "
            f"the first that it was sent {self._limit_in_words()}: {cause}"
            + (", or a tensor was not loaded" if version > 0 else "")
        )

    def _standstill(self, version: int, logprobs: Float32Array) -> str | None:
        """An actor that samples from the initial policy, although its log-probs are within the limit."""
        if version == 0 or self.floor is None or self._initial is None:
            return None
        learner = _mean_difference(self._expected, self._initial)
        actor = _mean_difference(logprobs, self._initial)
        if learner <= STANDSTILL * max(self.floor, SMALLEST_FLOOR, actor):
            return None
        return (
            f"its log-probs of the probe are {actor:.3g} nats a token away from those of version 0 after version "
            f"{version}, and the learner's {learner:.3g}: updates do not reach the model that it samples from"
        )

    def _limit_in_words(self) -> str:
        most = f"{LARGEST_FLOOR[self._dtype]:g}, the most that arithmetic explains with model.dtype={self._dtype}"
        if self.limit == LARGEST_FLOOR[self._dtype]:
            return f"(the limit is {most})"
        return (
            f"(the limit is {self.limit:.3g}: weights.probe_factor={self._factor:g} times what was seen at version 0, "
            f"at least {SMALLEST_FLOOR:g})"
        )


def _mean_difference(a: Float32Array, b: Float32Array) -> float:
    return float(np.abs(a - b).mean())
