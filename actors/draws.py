"""Sampling on CPUs with a seed for each request, at the cost of sampling without.

vLLM asks each request's generator for one number a token, by a call of torch and a transfer to Python: for a small
model a tenth of its time. Here a generator is asked for many at once, which are the same numbers in the same order, so
that the same tokens are drawn.
"""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

AHEAD = 128  # numbers that are asked for at once
LIMIT = 2**31  # of the numbers

_waiting: WeakKeyDictionary[Generator, list[int]] = WeakKeyDictionary()  # the next one last


def next_number(generator: Generator) -> int:
    """What `torch.randint(0, LIMIT, (1,), generator=generator)` would draw next if nobody else used it."""
    waiting = _waiting.get(generator)
    if not waiting:
        drawn = torch.randint(0, LIMIT, (AHEAD,), generator=generator, dtype=torch.long)
        waiting = _waiting[generator] = drawn.tolist()[::-1]
    return waiting.pop()


def forward_cpu(
    self: TopKTopPSampler, logits: Tensor, generators: Mapping[int, Generator], k: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(tokens [requests], their distributions' log-probs [requests, vocabulary]); `generators` by row."""
    assert self.logprobs_mode == "processed_logprobs" and not self.use_fp64_gumbel
    logits = apply_top_k_top_p(logits, k, p).float()
    numbers = torch.randint(0, LIMIT, (len(logits),), dtype=torch.long)  # for rows without a seed
    if generators:
        numbers[list(generators)] = torch.tensor([next_number(generator) for generator in generators.values()])
    return torch.ops._C.fused_gumbel_argmax(logits, numbers), logits.log_softmax(dim=-1)


def install() -> None:
    """In the process that holds the model, before it builds its sampler."""
    TopKTopPSampler.forward_cpu = forward_cpu
