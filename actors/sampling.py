"""The completions of one lease while they are sampled: where each begins, what has been drawn, how it ends.

A completion with a prefix is a request whose prompt is the lease's prompt and that prefix. Positions count from the
start of the completion, the prefix included.

What has been drawn so far is read from the engine's output processor, which keeps tokens, log-probs and version stamps
of every request anyway. vLLM's streaming outputs would wake this process for every token, and carry version stamps only
at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from common.seeds import hashed
from common.types import FinishReason, Float32Array, Int32Array, Lease, Progress

MAX_PROGRESS_TOKENS = 1 << 14  # of one Progress message: 200 kB


class EngineError(RuntimeError):
    """The engine could not be started or has died; the message is one sentence."""


class RequestRefused(ValueError):
    """The engine lives but did not sample this request: its content, or a fault that concerns it alone."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """L tokens of one completion, one after another."""

    token_ids: Int32Array  # [L]
    behavior_logprobs: Float32Array  # [L], at the sampling temperature
    versions: Int32Array  # [L], stamped by the engine

    def __len__(self) -> int:
        return len(self.token_ids)

    def cut(self, start: int, end: int | None = None) -> "Drawn":
        part = slice(start, end)
        return Drawn(
            token_ids=self.token_ids[part],
            behavior_logprobs=self.behavior_logprobs[part],
            versions=self.versions[part],
        )

    def then(self, other: "Drawn") -> "Drawn":
        return concatenated([self, other])


@dataclass(frozen=True, kw_only=True)
class Completion(Drawn):
    """One sampled response of L tokens, the end-of-sequence token or stop string included when it was drawn."""

    finish_reason: FinishReason
    text: str

    @classmethod
    def of(cls, drawn: Drawn, finish_reason: FinishReason, text: str) -> Self:
        return cls(
            token_ids=drawn.token_ids,
            behavior_logprobs=drawn.behavior_logprobs,
            versions=drawn.versions,
            finish_reason=finish_reason,
            text=text,
        )


def concatenated(parts: list[Drawn]) -> Drawn:
    """All of them, one after another; of at least one part."""
    return Drawn(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        behavior_logprobs=np.concatenate([part.behavior_logprobs for part in parts]),
        versions=np.concatenate([part.versions for part in parts]),
    )


def drawn_by(token_ids: Any, logprobs: Any, spans: list[tuple[str, int, int]]) -> Drawn:
    """What one request has drawn; `spans` are (version, start, end). Raises EngineError when they do not add up."""
    versions = np.empty(len(token_ids), dtype=np.int32)
    for version, start, end in spans:
        versions[start:end] = int(version)
    covered = sum(end - start for _, start, end in spans)
    if covered != len(versions) or len(logprobs) != len(versions):
        raise EngineError(
            f"the engine returned {len(versions)} tokens with {covered} version stamps and {len(logprobs)} log-probs"
        )
    return Drawn(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        behavior_logprobs=np.asarray(logprobs, dtype=np.float32),
        versions=versions,
    )


class Sample:
    """One completion of a lease. `completion` is None until it has ended."""

    def __init__(self, lease: Lease, index: int, request_id: str) -> None:
        self.request_id = request_id
        self.prefix, reason = _prefix(lease, index)
        self.prefix_finish_reason = reason if len(self.prefix) else None
        # What is drawn after a prefix must not repeat the random numbers that the prefix was drawn with, and
        # evaluation leases of one prompt have one seed.
        start = len(self.prefix)
        self.seed = hashed(f"{lease.seed}/{index}/{start}") if start else lease.seed + index
        self.completion: Completion | None = None
        self.num_sent = start  # tokens that the learner has
        self._num_drawn = 0  # tokens that were seen of it; what a cancelled request had is not seen again

    def see(self, state: Any) -> int:
        """Tokens drawn so far, the prefix not counted. `state` is the output processor's, None when it has none."""
        if self.completion is not None:
            self._num_drawn = max(self._num_drawn, len(self.completion) - len(self.prefix))
        elif state is not None:
            self._num_drawn = max(self._num_drawn, state.detokenizer.num_output_tokens())
        return self._num_drawn

    def unsent(self, state: Any) -> tuple[Drawn, FinishReason | None]:
        """The tokens from position `num_sent` on, and why it ended if it has."""
        if self.completion is not None:
            return self.completion.cut(self.num_sent), self.completion.finish_reason
        if state is None:
            return self.prefix.cut(len(self.prefix)), None
        return _accumulated(state, self.num_sent - len(self.prefix)), None


def _prefix(lease: Lease, index: int) -> tuple[Drawn, FinishReason | None]:
    lengths = lease.prefix_lengths if len(lease.prefix_lengths) else np.zeros(lease.num_samples, dtype=np.int32)
    end = int(lengths[: index + 1].sum())
    part = slice(end - int(lengths[index]), end)
    prefix = Drawn(
        token_ids=lease.prefix_token_ids[part],
        behavior_logprobs=lease.prefix_behavior_logprobs[part],
        versions=lease.prefix_versions[part],
    )
    return prefix, lease.prefix_finish_reasons[index] if lease.prefix_finish_reasons else None


def _accumulated(state: Any, start: int) -> Drawn:
    """What a running request has drawn from its own token `start` on."""
    token_ids = state.detokenizer.output_token_ids
    if not len(token_ids):  # it waits behind others, and no version has been noted either
        return drawn_by((), (), [])
    starts = state.weight_version_starts
    ends = [first for _, first in starts[1:]] + [len(token_ids)]
    spans = [
        (version, max(0, first - start), end - start)
        for (version, first), end in zip(starts, ends, strict=True)
        if end > start
    ]
    return drawn_by(token_ids[start:], state.logprobs_processor.logprobs.logprobs[start:], spans)


class Sampling:
    """All completions of a lease. `state_of(request id)` gives a running request's state in the output processor."""

    def __init__(self, lease: Lease, request_ids: list[str], state_of: Callable[[str], Any]) -> None:
        self.lease = lease
        self.samples = [Sample(lease, index, request_id) for index, request_id in enumerate(request_ids)]
        self.began_s: float | None = None
        self._state_of = state_of
        self._sent_reasons: list[FinishReason | None] = [None] * len(request_ids)

    def begin(self, now: float) -> None:
        """One of them has got a place in the engine; `now` is of the engine's clock."""
        self.began_s = now if self.began_s is None else self.began_s

    def num_drawn(self) -> int:
        """Tokens so far, prefixes not counted; it never falls."""
        return sum(sample.see(self._state_of(sample.request_id)) for sample in self.samples)

    def progress(self) -> Progress | None:
        """What the learner has not got yet, MAX_PROGRESS_TOKENS at most; None when there is nothing new."""
        starts = [sample.num_sent for sample in self.samples]
        parts: list[Drawn] = []
        reasons: list[FinishReason | None] = []
        room = MAX_PROGRESS_TOKENS
        for sample in self.samples:
            drawn, reason = sample.unsent(self._state_of(sample.request_id))
            part = drawn.cut(0, room)
            parts.append(part)
            reasons.append(reason if len(part) == len(drawn) else None)
            room -= len(part)
            sample.num_sent += len(part)
        if room == MAX_PROGRESS_TOKENS and reasons == self._sent_reasons:
            return None
        self._sent_reasons = reasons
        new = concatenated(parts)
        return Progress(
            lease_id=self.lease.lease_id,
            starts=np.array(starts, dtype=np.int32),
            lengths=np.array([len(part) for part in parts], dtype=np.int32),
            token_ids=new.token_ids,
            behavior_logprobs=new.behavior_logprobs,
            versions=new.versions,
            finish_reasons=tuple(reasons),
        )

    def send_again(self) -> None:
        """The learner may not have got what was sent: `progress` begins anew after the prefixes."""
        for sample in self.samples:
            sample.num_sent = len(sample.prefix)
        self._sent_reasons = [None] * len(self.samples)


@dataclass(frozen=True)
class Reading:
    """A completion as the engine reads it: `num_tokens` of it count, the rest comes after a stop string."""

    num_tokens: int
    text: str
    is_stopped: bool  # by a stop string


def read(
    tokenizer: Any, prompt_token_ids: Int32Array, token_ids: Int32Array, parameters: Any, *, ends_with_token: bool
) -> Reading:
    """vLLM's own reading of prompt and completion, for a completion that was not sampled by one request.

    `ends_with_token`: its last token is the end-of-sequence or a stop token, which texts leave out.
    """
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request = SimpleNamespace(
        request_id="prefix", sampling_params=parameters, prompt_token_ids=prompt_token_ids.tolist(), prompt_embeds=None
    )
    detokenizer: Any = IncrementalDetokenizer.from_new_request(tokenizer, request)  # type: ignore[arg-type]
    stop = detokenizer.update(token_ids.tolist(), ends_with_token)
    # The engine cuts the stop string off the text; the policy drew it, so it is trained and graded.
    return Reading(detokenizer.num_output_tokens(), detokenizer.output_text + (stop or ""), stop is not None)
