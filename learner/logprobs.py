"""Log-probs and entropy of given tokens under a linear output layer, without the logits of more than one
chunk.

For token t with hidden state h, output layer W and temperature tau:

    z = W h / tau,   logprob = z[target] - logsumexp(z),   entropy = -sum_v p_v log p_v,   p = softmax(z)

The logits of a chunk live only while the chunk is processed and are recomputed in backward, so the peak is
chunk_tokens x V floats, whatever the number of tokens. Axes: T tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logprobs_T, entropy_T) in float32: log-prob of each target and exact entropy of its distribution, in
    nats.

    The matrix product runs in the type of `hidden_TD`, everything after it in float32. Gradients flow to
    hidden_TD and weight_VD from the log-probs, and from the entropy only when `entropy_grad`.
    """
    logprobs_T, entropy_T = _ChunkedLogProbs.apply(
        hidden_TD, weight_VD, targets_T, temperature, chunk_tokens, entropy_grad
    )
    return logprobs_T, entropy_T


def _log_softmax(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_CV = F.linear(hidden_CD, weight_VD).float()
    if temperature != 1.0:
        logits_CV = logits_CV.div_(temperature)
    return logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        temperature: float,
        chunk_tokens: int,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TD.device)
        entropy_T = torch.empty_like(logprobs_T)
        for start in range(0, len(targets_T), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logp_CV = _log_softmax(hidden_TD[chunk], weight_VD, temperature)
            logprobs_T[chunk] = logp_CV.gather(1, targets_T[chunk, None]).squeeze(1)
            entropy_T[chunk] = -torch.linalg.vecdot(logp_CV.exp(), logp_CV)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, entropy_T)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy);  dz / d(Wh) = 1 / tau."""
        hidden_TD, weight_VD, targets_T, entropy_T = ctx.saved_tensors
        grad_hidden_TD = torch.empty_like(hidden_TD)
        # float32 whatever the compute type: the sum runs over all chunks
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(targets_T), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            logp_CV = _log_softmax(hidden_TD[chunk], weight_VD, ctx.temperature)
            probs_CV = logp_CV.exp()
            if grad_entropy_T is None:
                grad_CV = probs_CV.mul_(-_column(grad_logprobs_T, targets_T, chunk))
            else:
                slope_CV = logp_CV.add_(entropy_T[chunk, None]).mul_(grad_entropy_T[chunk, None])
                grad_CV = probs_CV.mul_(-(slope_CV.add_(_column(grad_logprobs_T, targets_T, chunk))))
            if grad_logprobs_T is not None:
                grad_CV.scatter_add_(1, targets_T[chunk, None], grad_logprobs_T[chunk, None])
            grad_CV = grad_CV.div_(ctx.temperature).to(hidden_TD.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_TD[chunk])
            grad_weight_VD += grad_CV.T @ hidden_TD[chunk]
        return grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype), None, None, None, None


def _column(grad_T: Tensor | None, like_T: Tensor, chunk: slice) -> Tensor:
    if grad_T is None:
        return torch.zeros(len(like_T[chunk]), 1, device=like_T.device)
    return grad_T[chunk, None]
