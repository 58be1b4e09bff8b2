"""What a lease becomes, with stand-ins for engine and verifier: the text that is judged, verdicts, rewards, errors."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from actors.engine import Completion
from actors.rollout import complete
from actors.verifier.judgement import Judgement
from actors.verifier.math import verify
from common.config import RewardConfig
from common.types import CompletedGroup, FinishReason, Lease, Purpose, Verdict

PLAIN = "<|user|>2+2=<|assistant|>"


def token_ids(text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array([ord(character) for character in text], dtype=np.int32)


@dataclass
class TextEngine:
    """One token per character; "samples" the given texts. `special` are left out of texts, as vLLM does."""

    texts: list[str]
    special: tuple[str, ...] = ("<|user|>", "<|assistant|>")

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))

    async def sample(self, lease: Lease) -> list[Completion]:
        return [self._completion(text) for text in self.texts]

    def sampling_s(self, lease_id: int) -> float:
        return 1.5

    def forget(self, lease_id: int) -> None:
        self.forgotten = lease_id

    def _completion(self, text: str) -> Completion:
        ids, seen = token_ids(text), text
        for token in self.special:
            seen = seen.replace(token, "")
        return Completion(
            token_ids=ids,
            behavior_logprobs=np.zeros(len(ids), np.float32),
            versions=np.zeros(len(ids), np.int32),
            finish_reason=FinishReason.STOP,
            text=seen,
        )


@dataclass
class Recorder:
    """A verifier that remembers what it was asked."""

    judgements: list[Judgement] | None = None
    seen: list[str] = field(default_factory=list)

    async def judge(self, response: str, reference: str, row: dict[str, Any]) -> Judgement:
        self.seen.append(response)
        return self.judgements[len(self.seen) - 1] if self.judgements else Judgement(verify(response, reference, row))


def completed(engine: TextEngine, verifier: Recorder, prompt: str = PLAIN, **rewards: Any) -> CompletedGroup:
    lease = Lease(
        lease_id=3,
        purpose=Purpose.TRAIN,
        prompt_uid="p",
        prompt_token_ids=token_ids(prompt),
        reference="4",
        row={},
        num_samples=len(engine.texts),
        seed=0,
        temperature=1.0,
        max_tokens=100,
    )
    return asyncio.run(complete(lease, engine, verifier, RewardConfig(**rewards)))  # type: ignore[arg-type]


@pytest.mark.parametrize("opened", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_box_in_reasoning_that_the_template_opened_and_nobody_closed_is_no_answer(opened: str) -> None:
    engine = TextEngine([r"maybe \boxed{4}, but wait, let me", r"maybe \boxed{5}</think>It is \boxed{4}."])
    verifier = Recorder()
    group = completed(engine, verifier, PLAIN + opened)
    assert verifier.seen == [opened + text for text in engine.texts]
    assert group.verdicts == (Verdict.UNANSWERED, Verdict.CORRECT)


@pytest.mark.parametrize(
    "prompt",
    [
        PLAIN,
        f"Put your reasoning into <think> </think>. {PLAIN}",
        f"{PLAIN}<think>\n\n</think>\n\n",
        "Begin with <think>:",
    ],
)
def test_a_tag_that_the_prompt_only_speaks_of_or_has_closed_is_not_open(prompt: str) -> None:
    engine, verifier = TextEngine([r"\boxed{4}"]), Recorder()
    assert completed(engine, verifier, prompt).verdicts == (Verdict.CORRECT,)
    assert verifier.seen == engine.texts


def test_where_texts_leave_the_closing_tag_out_a_response_that_closed_it_is_judged_without_tags() -> None:
    engine = TextEngine([r"hm</think>\boxed{4}", r"hm \boxed{4}"], special=("<think>", "</think>"))
    verifier = Recorder()
    group = completed(engine, verifier, f"{PLAIN}<think>\n")
    assert verifier.seen == [r"hm\boxed{4}", "<think>\n" + r"hm \boxed{4}"]
    assert group.verdicts == (Verdict.CORRECT, Verdict.UNANSWERED)


def test_verdicts_rewards_and_the_first_error_travel_with_the_group() -> None:
    judgements = [
        Judgement(Verdict.CORRECT),
        Judgement(Verdict.WRONG, 0.25),
        Judgement(Verdict.ERROR, None, "raised KeyError: 'x'"),
        Judgement(Verdict.ERROR, None, "returned None (NoneType)"),
    ]
    group = completed(TextEngine(["a", "bb", "c", "d"]), Recorder(judgements))
    assert group.verdicts == (Verdict.CORRECT, Verdict.WRONG, Verdict.ERROR, Verdict.ERROR)
    assert group.rewards.tolist() == [1.0, 0.25, 0.0, 0.0]
    assert group.verifier_error == "raised KeyError: 'x'"
    assert group.lengths.tolist() == [1, 2, 1, 1]


def test_the_overlong_penalty_is_added_to_a_reward_that_the_verifier_gave() -> None:
    engine = TextEngine(["x" * 90])
    judged = Recorder([Judgement(Verdict.WRONG, 0.25)])
    group = completed(engine, judged, overlong_penalty=True, overlong_buffer=20)
    assert group.rewards.tolist() == [pytest.approx(0.25 - 0.5)]


def test_a_group_took_the_time_for_which_its_engine_was_busy() -> None:
    """Not that of a publication, in which it is paused: its actor would be too slow for any lease."""
    assert completed(TextEngine(["x"]), Recorder()).generation_s == pytest.approx(1.5)
