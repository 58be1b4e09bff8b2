"""Responses of a small model, by plain torch with a key-value cache, as an actor would send them.

Axes: R responses that are under way, V the vocabulary.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from actors.verifier.judgement import Judgement
from actors.verifier.rewards import reward
from common.config import Config
from common.tasks import verifier_function
from common.tasks.tokenizing import tokenizing
from common.types import CompletedGroup, FinishReason, Lease, Prompt, Purpose, TrajectoryGroup, Verdict

COMPACT_BELOW = 0.75  # share of responses that still go on, below which the others leave the cache


@dataclass(frozen=True, kw_only=True)
class Response:
    token_ids: np.ndarray  # int32
    logprobs: np.ndarray  # float32, at the sampling temperature
    is_truncated: bool


class Sampler:
    """Samples with whatever weights were loaded last. Prompts of any lengths."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self.model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        self._tokenize = tokenizing(config)
        module, _, name = verifier_function(config).partition(":")
        self._verify = getattr(importlib.import_module(module), name)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Parameters by their Hugging Face names."""
        self.model.load_state_dict(weights, strict=False)

    def groups(self, prompts: Sequence[Prompt], group_size: int, version: int, seed: int) -> list[TrajectoryGroup]:
        """One verified group for each prompt, all of its tokens drawn by `version`."""
        responses = self.sample([p for p in prompts for _ in range(group_size)], self.config.rollout.temperature, seed)
        return [
            self._group(index, prompt, responses[index * group_size : (index + 1) * group_size], version)
            for index, prompt in enumerate(prompts)
        ]

    def accuracy(self, prompts: Sequence[Prompt], samples: int, seed: int) -> float:
        """Mean over `samples` responses of each prompt, at temperature 1."""
        asked = [p for p in prompts for _ in range(samples)]
        found = self.sample(asked, 1.0, seed)
        return float(np.mean([self._verdict(p, r) is Verdict.CORRECT for p, r in zip(asked, found, strict=True)]))

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Response]:
        """One response for each of the prompts, at most rollout.max_tokens long."""
        generator = torch.Generator().manual_seed(seed)
        encoded = [self._tokenize(prompt) for prompt in prompts]
        width, limit = max(map(len, encoded)), self.config.rollout.max_tokens
        tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in encoded])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])
        is_padded = bool((mask == 0).any())
        drawn = torch.zeros(len(prompts), limit, dtype=torch.int64)
        logprobs = torch.zeros(len(prompts), limit)
        lengths = torch.full((len(prompts),), limit)
        is_over = torch.zeros(len(prompts), dtype=torch.bool)
        cache, rows = DynamicCache(config=self.model.config), torch.arange(len(prompts))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for step in range(limit):
            ids_R, logprobs_R = self._next(
                tokens, mask if is_padded else None, positions, cache, temperature, generator
            )
            drawn[rows, step], logprobs[rows, step] = ids_R, logprobs_R
            ends_R = ids_R == self.tokenizer.eos_token_id
            lengths[rows[ends_R & ~is_over[rows]]] = step + 1
            is_over[rows[ends_R]] = True
            keep = (~is_over[rows]).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < COMPACT_BELOW * len(rows):
                cache.batch_select_indices(keep)
                rows, ids_R, mask, positions = rows[keep], ids_R[keep], mask[keep], positions[keep]
            tokens, positions = ids_R[:, None], positions[:, -1:] + 1
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        return [
            Response(
                token_ids=drawn[i, :length].numpy().astype(np.int32),
                logprobs=logprobs[i, :length].numpy(),
                is_truncated=not bool(is_over[i]),
            )
            for i, length in enumerate(lengths.tolist())
        ]

    def _next(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, temperature: float, generator: Any
    ) -> tuple[Tensor, Tensor]:
        """(token ids, their log-probs), (R,) each."""
        logits_RV = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        logprobs_RV = (logits_RV.float() / temperature).log_softmax(-1)
        ids_R1 = torch.multinomial(logprobs_RV.exp(), 1, generator=generator)
        return ids_R1[:, 0], logprobs_RV.gather(1, ids_R1)[:, 0]

    def _verdict(self, prompt: Prompt, response: Response) -> Verdict:
        text = self.tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
        verdict: Verdict = self._verify(text, prompt.reference, prompt.row)
        return verdict

    def _group(self, index: int, prompt: Prompt, responses: Sequence[Response], version: int) -> TrajectoryGroup:
        config, verdicts = self.config, tuple(self._verdict(prompt, response) for response in responses)
        lengths = np.array([len(response.token_ids) for response in responses], np.int32)
        judged = zip(verdicts, lengths.tolist(), strict=True)
        limit = config.rollout.max_tokens
        return TrajectoryGroup(
            lease=Lease(
                lease_id=index,
                purpose=Purpose.TRAIN,
                prompt_uid=prompt.uid,
                prompt_token_ids=np.array(self._tokenize(prompt), np.int32),
                reference=prompt.reference,
                row=prompt.row,
                num_samples=len(responses),
                seed=0,
                temperature=config.rollout.temperature,
                max_tokens=limit,
            ),
            actor="sampler",
            completed=CompletedGroup(
                lease_id=index,
                lengths=lengths,
                token_ids=np.concatenate([response.token_ids for response in responses]),
                behavior_logprobs=np.concatenate([response.logprobs for response in responses]),
                versions=np.full(int(lengths.sum()), version, np.int32),
                rewards=np.array([reward(Judgement(v), n, limit, config.reward) for v, n in judged], np.float32),
                verdicts=verdicts,
                verifier_error=None,
                finish_reasons=tuple(
                    FinishReason.LENGTH if response.is_truncated else FinishReason.STOP for response in responses
                ),
                generation_s=0.0,
                verification_s=0.0,
            ),
            arrived_s=0.0,
        )
