"""One held-out evaluation: which prompts are still to be sampled, and what came back."""

import hashlib
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from common.config import Config
from common.scores import Estimate, clusters, estimate
from common.types import JSON, CompletedGroup, FinishReason, Prompt, Verdict
from learner.rollouts.partial import Pending


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Held-out accuracy of one version: avg@k, the mean over prompts and samples.

    What could not be sampled or judged counts as wrong: an accuracy over what is left would be of other prompts each
    time, and higher.
    """

    version: int  # the learner's when the evaluation was started
    oldest_version: int  # of all sampled tokens; differs from `version` when a publication came in between
    newest_version: int
    accuracy: float  # share of correct responses among all that were asked for
    accuracy_low: float  # the 95% interval over different prompts (common/scores.py), as the next
    accuracy_high: float
    length_mean: float  # tokens, of the responses that were sampled, as the next
    truncated_fraction: float  # share of responses that reached max_tokens
    num_prompts: int
    num_samples: int  # responses that were sampled, of all prompts
    num_failed: int  # prompts that no actor could sample
    num_errors: int  # responses on which the verifier failed
    seconds: float  # from its start to the arrival of its last group


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An evaluation that a checkpoint found under way."""

    asked: JSON  # see `asked`
    sampled: tuple[str, ...]  # uids of the prompts of `groups`
    groups: tuple[CompletedGroup, ...]
    failed: tuple[str, ...]  # uids of prompts that no actor could sample; all others have no result yet
    seconds: float  # since its start


@dataclass
class Evaluation:
    """Prompts go pending -> leased -> done or failed; the coordinator keeps the leases."""

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    temperature: float
    version: int
    started_s: float = 0.0  # on the coordinator's clock
    pending: deque[Pending] = field(init=False)
    _groups: dict[str, CompletedGroup] = field(default_factory=dict, init=False)  # uid of its prompt -> group
    _drawn_by: dict[str, dict[str, int]] = field(default_factory=dict, init=False)  # likewise, see Partial
    _failed: list[str] = field(default_factory=list, init=False)  # uids
    moved_s: float = field(default=0.0, init=False)  # when the newest of them came

    def __post_init__(self) -> None:
        self.pending = deque(Pending(prompt=prompt, turn=turn) for turn, prompt in enumerate(self.prompts))
        self.moved_s = self.started_s

    def add(self, uid: str, group: CompletedGroup, drawn_by: dict[str, int], now: float) -> None:
        """The group of the prompt `uid`."""
        self._groups[uid], self._drawn_by[uid] = group, drawn_by
        self.moved_s = now

    def distrust(self, actor: str, version: int) -> list[CompletedGroup]:
        """Gives up, to be sampled again, what this actor has sampled with tokens of `version` or a newer one."""
        given_up = []
        for turn, prompt in enumerate(self.prompts):
            if self._drawn_by.get(prompt.uid, {}).get(actor, -1) >= version:
                given_up.append(self._groups.pop(prompt.uid))
                del self._drawn_by[prompt.uid]
                insort(self.pending, Pending(prompt=prompt, turn=turn), key=lambda waiting: waiting.turn)
        return given_up

    def fail(self, uid: str) -> None:
        self._failed.append(uid)

    def under_way(self, config: Config, now: float) -> Begun:
        """For a checkpoint."""
        return Begun(
            asked=asked(config, self),
            sampled=tuple(self._groups),
            groups=tuple(self._groups.values()),
            failed=tuple(self._failed),
            seconds=now - self.started_s,
        )

    def go_on(self, begun: Begun, now: float) -> None:
        """From where it was, with what it had; the time in between does not count."""
        self._groups, self._failed = dict(zip(begun.sampled, begun.groups, strict=True)), list(begun.failed)
        has_result = self._groups.keys() | set(self._failed)
        self.pending = deque(waiting for waiting in self.pending if waiting.prompt.uid not in has_result)
        self.started_s, self.moved_s = now - begun.seconds, now

    def describe(self) -> str:
        done = len(self._groups) + len(self._failed)
        return f"{done} of {len(self.prompts)} prompts of the evaluation of version {self.version} are done"

    def result(self) -> EvalResult | None:
        """None until every prompt is done or failed."""
        if len(self._groups) + len(self._failed) < len(self.prompts):
            return None
        groups = self._groups.values()
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        reasons = [reason for group in groups for reason in group.finish_reasons]
        num_samples = len(verdicts)
        per_sample = 1.0 / max(num_samples, 1)
        accuracy = self._accuracy()
        return EvalResult(
            version=self.version,
            oldest_version=min((int(group.versions.min()) for group in groups), default=self.version),
            newest_version=max((int(group.versions.max()) for group in groups), default=self.version),
            accuracy=accuracy.value,
            accuracy_low=accuracy.low,
            accuracy_high=accuracy.high,
            length_mean=sum(int(group.lengths.sum()) for group in groups) * per_sample,
            truncated_fraction=reasons.count(FinishReason.LENGTH) * per_sample,
            num_prompts=len(self.prompts),
            num_samples=num_samples,
            num_failed=len(self._failed),
            num_errors=verdicts.count(Verdict.ERROR),
            seconds=self.moved_s - self.started_s,
        )

    def _accuracy(self) -> Estimate:
        correct = np.zeros(len(self.prompts))
        for place, prompt in enumerate(self.prompts):
            if prompt.uid in self._groups:
                correct[place] = self._groups[prompt.uid].verdicts.count(Verdict.CORRECT)
        cluster = clusters(self.prompts)
        return estimate(np.bincount(cluster, correct), np.bincount(cluster) * self.samples_per_prompt)


def asked(config: Config, evaluation: Evaluation) -> JSON:
    """All that two parts of one evaluation must have in common besides the weights."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in evaluation.prompts:
        digest.update(repr(prompt).encode("utf-8", "surrogatepass"))
    return {
        "prompts": digest.hexdigest(),
        "samples_per_prompt": evaluation.samples_per_prompt,
        "temperature": evaluation.temperature,
        "top_p": config.eval.top_p,
        "top_k": config.eval.top_k,
        "max_tokens": config.rollout.max_tokens,
        "stop": list(config.rollout.stop),
        "verifier": [config.verifier.function, str(config.verifier.answer_form)],
    }
