"""Attention over a packed stream: sequences laid end to end never see each other, and nothing is quadratic
in the pack.

Registered with transformers under the name "packed", so it serves every causal language model whose
attention goes through `AttentionInterface`. No mask is registered with it: transformers then builds none.
What else a model asks of its attention (capped scores, sinks, a bias) is refused, never ignored;
learner/networks/reference.py finds what does not pass through here at all.

    CPU, or float32   sequences of equal or near-equal length go through one batched causal SDPA call
    CUDA              flash-attention's varlen kernel, which torch carries. Tested with a stand-in for the
                      kernel only: we had no GPU

Near-equal lengths are padded inside the batched function only. That is exact: under a causal mask a row never
sees what comes after it, so padding at the end changes no real row, and padded rows are dropped (zero
gradient). The padding repeats the sequence's own last token, so no value, not even a NaN, crosses from one
sequence to another.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from common.config import ConfigError
from learner.algorithm.packing import boundaries, spans

IMPLEMENTATION = "packed"

# Keywords of transformers' attention calls without influence on causal attention over the packed stream: a model's
# forward hands down whatever it was called with. Dropout is left out on purpose.
WITHOUT_EFFECT = frozenset(
    ("dropout", "position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position")
)

# Padding costs (longest^2 - length^2) x heads x head width of wasted multiply-adds; another call costs its
# overhead. Measured on one core: a call is worth about this many.
MULTIPLY_ADDS_PER_CALL = 150_000


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the sequences of a packed stream lie. Computed once per forward pass, used by every layer."""

    lengths: tuple[int, ...]  # tokens of each sequence, in stream order
    position_ids_S: Tensor  # int64, restarts at 0 with each sequence
    cu_seqlens_B1: Tensor  # int32, on the device
    buckets: dict[int, "Buckets"] = field(default_factory=dict)  # by multiply-adds of one pair of tokens

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
        return cls(
            lengths=tuple(lengths),
            position_ids_S=spans(torch.zeros_like(lengths_B), lengths_B).to(device),
            cu_seqlens_B1=boundaries(lengths_B).to(device, torch.int32),
        )

    def buckets_for(self, pair_cost: int) -> "Buckets":
        if pair_cost not in self.buckets:
            self.buckets[pair_cost] = Buckets.from_lengths(self.lengths, pair_cost, self.cu_seqlens_B1.device)
        return self.buckets[pair_cost]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Batches of sequences of near-equal length. N tokens in all, padding included.

    Invariant: stream[to_padded_N][to_stream_S] is stream.
    """

    shapes: tuple[tuple[int, int], ...]  # (sequences, tokens of the longest) of each bucket
    to_padded_N: Tensor  # int64, the stream position that each place of the buckets holds
    to_stream_S: Tensor  # int64, the place of each stream position
    is_identity: bool  # the stream already is the buckets: nothing to move

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], pair_cost: int, device: torch.device) -> "Buckets":
        groups = _group(lengths, MULTIPLY_ADDS_PER_CALL / pair_cost)
        order = torch.tensor([index for group in groups for index in group], dtype=torch.int64)
        widths = torch.tensor([lengths[group[0]] for group in groups for _ in group], dtype=torch.int64)
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
        starts = boundaries(lengths_B)[:-1]
        last_N = (starts + lengths_B - 1)[order].repeat_interleave(widths)
        to_padded_N = torch.minimum(spans(starts[order], widths), last_N)
        places = torch.empty_like(starts)
        places[order] = boundaries(widths)[:-1]
        to_stream_S = spans(places, lengths_B)
        identity = len(to_padded_N) == len(to_stream_S) and bool((to_padded_N.diff() == 1).all())
        return cls(
            shapes=tuple((len(group), lengths[group[0]]) for group in groups),
            to_padded_N=to_padded_N.to(device),
            to_stream_S=to_stream_S.to(device),
            is_identity=identity,
        )


def _group(lengths: Sequence[int], padding_allowance: float) -> list[list[int]]:
    """Indices by decreasing length; a sequence joins while its padding costs less than a call of its own."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or longest**2 - lengths[index] ** 2 > padding_allowance:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


class _ToPadded(torch.autograd.Function):
    """Rows of the stream to rows of the buckets. Padding has zero gradient, so backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, stream_SW: Tensor, buckets: Buckets) -> Tensor:
        ctx.buckets = buckets
        return stream_SW.index_select(0, buckets.to_padded_N)

    @staticmethod
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor, None]:
        return grad_NW.index_select(0, ctx.buckets.to_stream_S), None


class _ToStream(torch.autograd.Function):
    """Rows of the buckets back to rows of the stream; padded rows are dropped."""

    @staticmethod
    def forward(ctx: Any, padded_NW: Tensor, buckets: Buckets) -> Tensor:
        ctx.buckets = buckets
        return padded_NW.index_select(0, buckets.to_stream_S)

    @staticmethod
    def backward(ctx: Any, grad_SW: Tensor) -> tuple[Tensor, None]:
        num_rows = len(ctx.buckets.to_padded_N)
        grad_NW = grad_SW.new_zeros(num_rows, grad_SW.shape[1])
        return grad_NW.index_copy_(0, ctx.buckets.to_stream_S, grad_SW), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence. query [1, heads, S, width], key [1, kv heads, S, width], value
    [1, kv heads, S, value width].

    Returns [1, S, heads, value width], as transformers expects. Dropout is never applied: a policy's log-probs
    must be reproducible. `sliding_window` counts the token itself. Raises ConfigError for a keyword that would
    change the result and is not computed here.
    """
    if packing is None:
        raise ConfigError(f"the model does not tell its {type(module).__name__} where the packed sequences end")
    _refuse_unknown(module, attention_mask, is_causal, others)
    has_kernel = query.is_cuda and query.dtype is not torch.float32
    attend = _attend_varlen if has_kernel else _attend_batched
    return attend(query, key, value, packing, scaling, sliding_window), None


def _refuse_unknown(
    module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None, others: dict[str, object]
) -> None:
    asked = {name: value for name, value in others.items() if value is not None and name not in WITHOUT_EFFECT}
    if attention_mask is not None:
        asked["attention_mask"] = attention_mask
    if is_causal is False:
        asked["is_causal"] = is_causal
    if asked:
        settings = ", ".join(
            name if isinstance(value, Tensor) else f"{name}={value!r}" for name, value in asked.items()
        )
        raise ConfigError(
            f"the model's {type(module).__name__} asks for attention with {settings}, which the learner's packed "
            "attention does not compute: train another model"
        )


def _attend_batched(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    num_heads, width, value_width = query.shape[1], query.shape[3], value.shape[3]
    buckets = packing.buckets_for(num_heads * width)
    sizes = [count * length for count, length in buckets.shapes]
    parts = []
    for heads in (query, key, value):
        rows_SW = heads[0].transpose(0, 1).flatten(1)  # a view: projections lay tokens outermost
        rows_NW = rows_SW if buckets.is_identity else _ToPadded.apply(rows_SW, buckets)
        parts.append(rows_NW.split(sizes))
    outputs = []
    for (count, length), *rows in zip(buckets.shapes, *parts, strict=True):
        widths = (width, width, value_width)
        q, k, v = (part.view(count, length, -1, w).transpose(1, 2) for part, w in zip(rows, widths, strict=True))
        is_causal = window is None or length <= window
        mask = None if is_causal else _banded_mask(length, window, query.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=k.shape[1] != num_heads
        )
        outputs.append(out.transpose(1, 2).reshape(count * length, num_heads * value_width))
    rows_NW = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    rows_SW = rows_NW if buckets.is_identity else _ToStream.apply(rows_NW, buckets)
    return rows_SW.view(1, -1, num_heads, value_width)


def _banded_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a row may look: itself and the window - 1 tokens before it."""
    assert window is not None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    longest = max(packing.lengths)
    boundaries_B1 = packing.cu_seqlens_B1
    grouped: dict[str, bool] = {}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in _keywords(varlen_attn):
            grouped["enable_gqa"] = True
        else:  # torch before 2.12
            k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        boundaries_B1,
        boundaries_B1,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # (-1, 0): everything before, nothing after
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[None]


@cache
def _keywords(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def hide_from_compiler() -> None:
    """Compiled layers call packed attention as it is: where sequences end is not for a compiler to trace. Not done
    before it is asked for, because it imports the compiler."""
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(packed_attention))


AttentionInterface.register(IMPLEMENTATION, packed_attention)
