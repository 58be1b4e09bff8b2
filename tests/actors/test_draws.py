"""Sampling on CPUs with seeds: the tokens that vLLM draws, from numbers that are asked for many at once."""

import pytest
import torch
from torch import Generator
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from actors import draws

VLLM_FORWARD = TopKTopPSampler.forward_cpu  # before any test has installed ours


def generators(rows: list[int]) -> dict[int, Generator]:
    return {row: Generator().manual_seed(100 + row) for row in rows}


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's build for CPUs")
def test_tokens_and_log_probs_are_vllms_own_with_and_without_seeds_and_across_a_refill() -> None:
    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        sampler = TopKTopPSampler("processed_logprobs")
    theirs, ours = generators([0, 2, 3]), generators([0, 2, 3])  # row 1 has no seed
    for step in range(draws.AHEAD + 10):
        logits = torch.randn(4, 17, generator=Generator().manual_seed(step))
        torch.manual_seed(step)
        expected, expected_logprobs = VLLM_FORWARD(sampler, logits.clone(), theirs, None, None)
        torch.manual_seed(step)
        tokens, logprobs = draws.forward_cpu(sampler, logits.clone(), ours, None, None)
        assert tokens.tolist() == expected.tolist()
        assert torch.equal(logprobs, expected_logprobs)


def test_what_a_generator_has_waiting_goes_with_it() -> None:
    generator = Generator().manual_seed(1)
    draws.next_number(generator)
    before = len(draws._waiting)
    del generator
    assert len(draws._waiting) == before - 1
