"""Advantages and value targets on packed streams: tensors and numbers in, tensors out.

Axes: B sequences, T tokens of all B responses laid end to end, B1 = B + 1 boundaries: response b is tokens
cu_seqlens[b] .. cu_seqlens[b+1] - 1 and has at least one token. There is no padding, and no loop over tokens.

A stream holds trainable tokens only (for several turns: what the environment wrote is left out before the
call), so that the next token in the stream is the next action. values[t] is the critic's output at the
position that predicts token t, V(x, y_<t). A response always ends the episode, truncated or not: the value
after its last token is 0 and nothing is bootstrapped. The only reward is that of the whole response, on its
last token.
"""

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK = 64  # tokens of one block of the scan; 32 to 256 measure alike


def response_lengths(cu_seqlens_B1: Tensor) -> Tensor:
    """Tokens of each response, int64 (B,)."""
    return cu_seqlens_B1[1:] - cu_seqlens_B1[:-1]


def expand(x_B: Tensor, cu_seqlens_B1: Tensor, num_tokens: int) -> Tensor:
    """x_B[b] at every token of response b, (T,); `num_tokens` is T, given to spare the device a sync."""
    return torch.repeat_interleave(x_B, response_lengths(cu_seqlens_B1), output_size=num_tokens)


def length_adaptive_lambda(lengths_B: Tensor, alpha: float) -> Tensor:
    """lambda = clamp(1 - 1/(alpha l), 0, 1) for a response of l tokens, float32 (B,).

    VAPO (arXiv 2504.05118) eq. 5. The paper is silent about alpha l <= 1, where the formula is negative;
    there lambda is clamped to 0, which is one-step TD. l counts every response token, the end-of-sequence
    token included.
    """
    if alpha <= 0.0:
        raise ValueError(f"length_adaptive_alpha is {alpha}: it must be positive")
    return (1.0 - 1.0 / (alpha * lengths_B.double())).clamp(0.0, 1.0).float()


def discounted_scan(x_T: Tensor, decay_T: Tensor) -> Tensor:
    """y_t = x_t + decay_t * y_{t+1} with y_T = 0, (T,) in x's dtype.

    decay_t = 0 at the last token of a response keeps neighbours apart. Blocks of _BLOCK tokens are scanned
    side by side (one vector operation per offset in the block), the block ends are joined by the same scan
    over T / _BLOCK elements: linear in T, and 2 * _BLOCK vector operations per level whatever T is. There
    are only products and sums (no division by powers of the decay, no logarithm), so that a decay of
    exactly 0 or 1 is nothing special and the rounding error grows with the number of blocks, not of tokens.
    """
    num_tokens = x_T.numel()
    num_blocks = -(-num_tokens // _BLOCK)
    if num_blocks <= 1:
        return _scan_in_order(x_T, decay_T)
    # Row i holds offset i of every block, contiguous.
    sums = _block_columns(x_T, num_blocks)
    products = _block_columns(decay_T, num_blocks)
    for i in range(_BLOCK - 2, -1, -1):
        sums[i].addcmul_(products[i], sums[i + 1])
        products[i].mul_(products[i + 1])
    starts = discounted_scan(sums[0], products[0])  # y at the first token of each block
    sums[:, :-1].addcmul_(products[:, :-1], starts[1:])
    return sums.t().reshape(-1)[:num_tokens]


def _scan_in_order(x_T: Tensor, decay_T: Tensor) -> Tensor:
    """The recursion as written, for at most one block."""
    y = x_T.clone()
    for i in range(y.numel() - 2, -1, -1):
        y[i].addcmul_(decay_T[i], y[i + 1])
    return y


def _block_columns(x_T: Tensor, num_blocks: int) -> Tensor:
    """(_BLOCK, num_blocks) copy of x_T, one block a column, zeros after its end."""
    # Padded first, because torch has a fast transposition only into a whole contiguous tensor.
    tail = num_blocks * _BLOCK - x_T.numel()
    x = torch.nn.functional.pad(x_T, (0, tail)) if tail else x_T
    return x.view(num_blocks, _BLOCK).t().clone(memory_format=torch.contiguous_format)


def td_errors(values_T: Tensor, rewards_B: Tensor, cu_seqlens_B1: Tensor, gamma: float) -> Tensor:
    """delta_t = r_t + gamma V_{t+1} - V_t, (T,): at a response's last token r = R and V_{t+1} = 0."""
    delta_T = torch.zeros_like(values_T)
    torch.mul(values_T[1:], gamma, out=delta_T[:-1])
    delta_T[cu_seqlens_B1[1:] - 1] = rewards_B.to(values_T.dtype)
    return delta_T.sub_(values_T)


@torch.no_grad()
def gae(
    values_T: Tensor,
    rewards_B: Tensor,
    cu_seqlens_B1: Tensor,
    gae_lambda_B: Tensor,
    gamma: float = 1.0,
    starts_T: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimates with a lambda per response, (T,).

    A_t = SUM_{k=0}^{l-1-t} (gamma lambda)^k delta_{t+k},  t = 0 .. l-1   (VAPO eq. 3, arXiv 1506.02438)

    `starts_T`, bool, marks the tokens that start a segment of their response (SAE, arXiv 2601.07320):
    A_t = delta_t + gamma lambda_t A_{t+1}, where lambda_t is lambda when t + 1 is a start, and 1 within a segment.
    So only the values at starts are bootstrapped from, those before the token there is drawn; with none, that is of
    lambda 1. A response's first token starts one, marked or not. None means all tokens.
    """
    decay_T = expand((gamma * gae_lambda_B).to(values_T.dtype), cu_seqlens_B1, values_T.numel())
    if starts_T is not None:
        decay_T[:-1].masked_fill_(~starts_T[1:], gamma)
    decay_T[cu_seqlens_B1[1:] - 1] = 0.0  # the trace ends with the response
    return discounted_scan(td_errors(values_T, rewards_B, cu_seqlens_B1, gamma), decay_T)


@torch.no_grad()
def monte_carlo_returns(rewards_B: Tensor, cu_seqlens_B1: Tensor, num_tokens: int, gamma: float = 1.0) -> Tensor:
    """G_t = gamma^(l-1-t) R, (T,): the outcome itself at gamma = 1, with no value in it that could cancel."""
    returns_T = expand(rewards_B, cu_seqlens_B1, num_tokens)
    if gamma == 1.0:
        return returns_T
    ends_T = expand(cu_seqlens_B1[1:], cu_seqlens_B1, num_tokens)
    remaining_T = ends_T - 1 - torch.arange(num_tokens, device=rewards_B.device)
    return returns_T * gamma**remaining_T


@torch.no_grad()
def value_targets(
    values_T: Tensor, rewards_B: Tensor, cu_seqlens_B1: Tensor, critic_lambda: float, gamma: float = 1.0
) -> Tensor:
    """The critic's regression target, (T,): the lambda-return G_t = V_t + A_t^lambda.

    At lambda = 1 this is the Monte-Carlo return and is computed as such, so that the target does not depend
    on the values, not even through rounding (VC-PPO, arXiv 2503.01491).
    """
    if critic_lambda == 1.0:
        return monte_carlo_returns(rewards_B.to(values_T.dtype), cu_seqlens_B1, values_T.numel(), gamma)
    gae_lambda_B = torch.full_like(rewards_B, critic_lambda)
    return values_T + gae(values_T, rewards_B, cu_seqlens_B1, gae_lambda_B, gamma)


@torch.no_grad()
def vtrace(
    values_T: Tensor,
    rewards_B: Tensor,
    log_ratios_T: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Value targets v and policy advantages of V-trace (IMPALA, arXiv 1802.01561 eq. 1), both (T,).

    ratio_t = pi(y_t) / pi_b(y_t),  rho_t = min(rho_bar, ratio_t),  c_t = gae_lambda min(c_bar, ratio_t)
    v_t = V_t + rho_t delta_t + gamma c_t (v_{t+1} - V_{t+1})
    advantage_t = rho_t (r_t + gamma v_{t+1} - V_t)

    `log_ratios_T` are log pi - log pi_b (current policy against the one that sampled). The advantage has
    rho inside: do not multiply it by a correction weight again. At ratio 1 the target is `value_targets`
    and, at gae_lambda = 1, the advantage is `gae`. With c_bar = 1 the weight of the outcome decays like
    exp(-l E|log ratio| / 2) even when the ratios are unbiased noise: a short horizon for long responses.
    """
    if rho_bar < c_bar:
        raise ValueError(f"vtrace_rho_bar {rho_bar} must be at least vtrace_c_bar {c_bar}")
    ratio_T = log_ratios_T.to(values_T.dtype).clamp(-20.0, 20.0).exp()
    rho_T = ratio_T.clamp(max=rho_bar)
    delta_T = td_errors(values_T, rewards_B, cu_seqlens_B1, gamma)
    step_T = gae_lambda * ratio_T.clamp(max=c_bar) * gamma
    step_T[cu_seqlens_B1[1:] - 1] = 0.0
    correction_T = discounted_scan(rho_T * delta_T, step_T)  # v - V
    next_T = torch.zeros_like(values_T)
    torch.mul(correction_T[1:], gamma, out=next_T[:-1])
    next_T[cu_seqlens_B1[1:] - 1] = 0.0
    return values_T + correction_T, rho_T * (delta_T + next_T)


@torch.no_grad()
def group_normalised_advantages(rewards_B: Tensor, group_index_B: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO (arXiv 2402.03300): (R - group mean) / (group standard deviation + eps), (B,).

    The variance of a group of n divides by n - 1. A group whose rewards are all equal gets 0. Raises
    ValueError for a group of one.
    """
    group_B, count_G = _groups(group_index_B)
    centred_B = rewards_B - (_sum_by_group(rewards_B, group_B, count_G) / count_G)[group_B]
    variance_G = _sum_by_group(centred_B.square(), group_B, count_G) / (count_G - 1)
    return centred_B / (variance_G.sqrt()[group_B] + eps)


@torch.no_grad()
def leave_one_out_advantages(rewards_B: Tensor, group_index_B: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): R minus the mean reward of the group's other members, (B,).

    Raises ValueError for a group of one.
    """
    group_B, count_G = _groups(group_index_B)
    centred_B = rewards_B - (_sum_by_group(rewards_B, group_B, count_G) / count_G)[group_B]
    return centred_B * (count_G / (count_G - 1))[group_B]


def _groups(group_index_B: Tensor) -> tuple[Tensor, Tensor]:
    """Group numbers 0 .. G-1 of each response, and responses of each group."""
    _, group_B, count_G = torch.unique(group_index_B, return_inverse=True, return_counts=True)
    if count_G.numel() and int(count_G.min()) < 2:
        raise ValueError("a group has one response: rollout.group_size must be at least 2 for this estimator")
    return group_B, count_G


def _sum_by_group(x_B: Tensor, group_B: Tensor, count_G: Tensor) -> Tensor:
    return x_B.new_zeros(count_G.shape).index_add_(0, group_B, x_B)


@torch.no_grad()
def whiten(x_T: Tensor, mask_T: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the masked tokens of all ranks, 0 elsewhere, (T,).

    Each rank passes its own tokens. A collective, see `moments`.
    """
    mean, variance = moments(x_T, mask_T, process_group)
    whitened_T = ((x_T.double() - mean) * (variance + 1e-8).rsqrt()).to(x_T.dtype)
    return torch.where(mask_T, whitened_T, 0.0)


@torch.no_grad()
def moments(x_T: Tensor, mask_T: Tensor, process_group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """(mean, variance) of x over the masked tokens of all ranks, float64 scalars; 0 without any.

    The three sums are accumulated in float64 (float32 on devices without it would lose a small variance
    beside a large mean) and all-reduced over `process_group`. Every rank of the group must call this, with
    zero tokens too: a rank that stays away blocks the others. None means there is one rank.
    """
    kept_T = torch.where(mask_T, x_T, 0.0).double()
    sums = torch.stack([kept_T.sum(), kept_T.square().sum(), mask_T.sum().double()])
    if process_group is not None:
        dist.all_reduce(sums, group=process_group)
    count = sums[2].clamp(min=1.0)
    mean = sums[0] / count
    return mean, (sums[1] / count - mean.square()).clamp(min=0.0)
