"""Gradients of many estimators on many batches of one policy, and the dot products of all of them.

A batch costs one forward pass of the policy and, on the same graph, one backward pass for each estimator.

Up to EXACT parameters the gradients are kept as they are. A larger model's are folded: coordinate p is multiplied by a
random sign and added to place p mod PLACES (feature hashing, arXiv 0902.2206; the hash is the remainder). Dot products
of folded gradients are those of the gradients on average over the signs, with an error of about
|a| |b| / sqrt(PLACES), 0.4% of the lengths. PLACES is prime, so that no column of a matrix meets itself.

Axes: E estimators, N batches, M numbers kept of a gradient.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.config import Config
from learner.algorithm.disagreement import members
from learner.algorithm.packing import Batch, partition
from learner.signal.estimators import Estimator, token_weights
from learner.signal.moments import Array

EXACT = 1 << 18
PLACES = 65_537
CHUNK = 1 << 14  # of M, in one product of float64


class Sketch:
    """What is kept of the gradients with respect to `parameters`, which stay the same."""

    def __init__(self, parameters: Sequence[nn.Parameter], exact: int = EXACT, places: int = PLACES) -> None:
        self._parameters = list(parameters)
        self.num_parameters = sum(p.numel() for p in parameters)
        self.is_exact = self.num_parameters <= exact
        self.size = self.num_parameters if self.is_exact else places

    def __call__(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """float32 (M,), on the CPU; linear in the gradients. None is a gradient of zeros."""
        if self.is_exact:
            pairs = zip(gradients, self._parameters, strict=True)
            return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).float() for g, p in pairs]).cpu()
        folded, offset = torch.zeros(self.size), 0
        for number, (gradient, parameter) in enumerate(zip(gradients, self._parameters, strict=True)):
            if gradient is not None:
                folded += self._fold(gradient.reshape(-1).float(), offset % self.size, seed=number).cpu()
            offset += parameter.numel()
        return folded

    def _fold(self, gradient: Tensor, first: int, seed: int) -> Tensor:
        """Of one parameter, whose first coordinate belongs to place `first`."""
        generator = torch.Generator(gradient.device).manual_seed(seed)
        signs = torch.randint(0, 2, gradient.shape, generator=generator, device=gradient.device, dtype=torch.int8)
        signed = gradient * signs.mul_(2).sub_(1)
        rest = -(first + len(gradient)) % self.size
        return nn.functional.pad(signed, (first, rest)).view(-1, self.size).sum(0)


def gram(
    config: Config,
    policy: nn.Module,
    critics: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    num_batches: int,
    estimators: Sequence[Estimator],
    on_batch: Callable[[int], None] = lambda done: None,
) -> Array:
    """The dot products of all gradients, float64 (E, N, E, N). `on_batch` is told how many batches are done."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    sketch = Sketch(parameters)
    kept = torch.empty(len(estimators), num_batches, sketch.size)
    for number, batch in enumerate(batches):
        values = {name: values_of(config, critic, batch) for name, critic in critics.items()}
        weights = [token_weights(config, batch, estimator, values) for estimator in estimators]
        kept[:, number] = batch_gradients(config, policy, batch, weights, sketch)
        on_batch(number + 1)
    shape = (len(estimators), num_batches)
    return products(kept.flatten(0, 1)).reshape(*shape, *shape)


def batch_gradients(
    config: Config, policy: nn.Module, batch: Batch, weights: Sequence[Tensor], sketch: Sketch
) -> Tensor:
    """SUM_t c_t grad log pi(y_t) for each of the `weights` c, (T,) each; what `sketch` keeps of it, float32 (E, M)."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    kept = torch.zeros(len(weights), sketch.size)
    for indices in _micro_batches(config, batch):
        micro, tokens = batch.select(indices), batch.select_tokens(indices)
        packed = (micro.token_ids_S, micro.cu_seqlens_B1, micro.prompt_lengths_B)
        logprobs_T, _ = policy(*packed, config.rollout.temperature)
        for number, weights_T in enumerate(weights):
            along_T = weights_T[tokens].to(logprobs_T.device)
            is_last = number == len(weights) - 1
            found = torch.autograd.grad(logprobs_T, parameters, along_T, retain_graph=not is_last, allow_unused=True)
            kept[number] += sketch(found)
    return kept


@torch.no_grad()
def values_of(config: Config, critic: nn.Module, batch: Batch) -> Tensor:
    """The critic's values of all response tokens, (T, M), on the CPU; M is 1 but for a list of several critics."""
    critics = members(critic)
    values_TM = torch.empty(batch.num_response_tokens, len(critics))
    for indices in _micro_batches(config, batch):
        micro = batch.select(indices)
        packed = (micro.token_ids_S, micro.cu_seqlens_B1, micro.prompt_lengths_B)
        values_TM[batch.select_tokens(indices)] = torch.stack([one(*packed) for one in critics], dim=1).cpu()
    return values_TM


def products(kept: Tensor) -> Array:
    """Dot products of the rows of `kept`, added up in float64."""
    total: Array = np.zeros((len(kept), len(kept)))
    for piece in kept.split(CHUNK, dim=1):
        wide = piece.double()
        total += (wide @ wide.T).numpy()
    return total


def _micro_batches(config: Config, batch: Batch) -> list[Tensor]:
    """The whole batch as one mini-batch, in pieces that fit."""
    return partition(batch, 1, 1, config.learner.tokens_per_micro_batch, seed=0)[0][0]
