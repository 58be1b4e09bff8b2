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
from learner.networks.prefixes import Prefixes

IMPLEMENTATION = "packed"

# Of the batched calls: in bfloat16 a CPU's backward pass takes up to 40 times as long, on short sequences.
BATCHED_DTYPE = torch.float32

# Keywords of transformers' attention calls without influence on causal attention over the packed stream: a model's
# forward hands down whatever it was called with. Dropout is left out on purpose.
WITHOUT_EFFECT = frozenset(
    ("dropout", "position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position")
)

# Padding costs (longest^2 - length^2) x heads x head width of wasted multiply-adds; another call costs its
# overhead. Measured on one core: a call is worth about this many.
MULTIPLY_ADDS_PER_CALL = 150_000


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What each sequence attends to, where it is more than the sequence itself: learner/networks/prefixes.py."""

    lengths: tuple[int, ...]  # tokens before the sequence's first one in the stream, and its own there
    places_K: Tensor  # int64, the stream position of each of these
    cu_seqlens_B1: Tensor  # int32, on the device


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the sequences of a packed stream lie. Computed once per forward pass, used by every layer."""

    lengths: tuple[int, ...]  # tokens of each sequence, in stream order
    position_ids_S: Tensor  # int64, restarts with each sequence, at 0 unless the stream lacks its first tokens
    cu_seqlens_B1: Tensor  # int32, on the device
    keys: Keys | None = None  # None: those of the sequence itself
    buckets: dict[int, "Buckets"] = field(default_factory=dict)  # by multiply-adds of one pair of tokens

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        lengths_B = torch.tensor(lengths, dtype=torch.int64)
        return cls(
            lengths=tuple(lengths),
            position_ids_S=spans(torch.zeros_like(lengths_B), lengths_B).to(device),
            cu_seqlens_B1=boundaries(lengths_B).to(device, torch.int32),
        )

    @classmethod
    def from_prefixes(cls, prefixes: Prefixes, device: torch.device) -> "Packing":
        """Of the stream of tokens that are computed."""
        lengths_B, key_lengths_B = torch.tensor(prefixes.lengths), torch.tensor(prefixes.key_lengths)
        keys = Keys(
            lengths=prefixes.key_lengths,
            places_K=prefixes.keys_K.to(device),
            cu_seqlens_B1=boundaries(key_lengths_B).to(device, torch.int32),
        )
        return cls(
            lengths=prefixes.lengths,
            position_ids_S=spans(key_lengths_B - lengths_B, lengths_B).to(device),
            cu_seqlens_B1=boundaries(lengths_B).to(device, torch.int32),
            keys=keys,
        )

    def buckets_for(self, pair_cost: int) -> "Buckets":
        if pair_cost not in self.buckets:
            self.buckets[pair_cost] = Buckets.of(self, pair_cost)
        return self.buckets[pair_cost]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One bucket: as many sequences, padded to as many queries and keys."""

    count: int
    queries: int
    keys: int
    num_before_B: Tensor | None  # int64 (count,) or (1,): keys before each sequence's first query; None: none


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Batches of sequences of near-equal length. N queries and M keys in all, padding included.

    Invariant: stream[to_padded_N][to_stream_S] is stream.
    """

    shapes: tuple[Shape, ...]
    to_padded_N: Tensor  # int64, the stream position that each place of the buckets holds
    to_stream_S: Tensor  # int64, the place of each stream position
    is_identity: bool  # the stream already is the buckets: nothing to move
    keys_M: Tensor | None  # int64, the stream position of each key; None: as queries

    @classmethod
    def of(cls, packing: Packing, pair_cost: int) -> "Buckets":
        device, lengths = packing.cu_seqlens_B1.device, packing.lengths
        key_lengths = lengths if packing.keys is None else packing.keys.lengths
        groups = _group(lengths, key_lengths, MULTIPLY_ADDS_PER_CALL / pair_cost)
        shapes = tuple(_shape(group, lengths, key_lengths, device) for group in groups)
        order = torch.tensor([index for group in groups for index in group], dtype=torch.int64)
        counts = torch.tensor([shape.count for shape in shapes])
        widths = torch.tensor([shape.queries for shape in shapes]).repeat_interleave(counts)
        to_padded_N, starts, lengths_B = _padded(lengths, order, widths)
        keys_M = None
        if packing.keys is not None:
            key_widths = torch.tensor([shape.keys for shape in shapes]).repeat_interleave(counts)
            keys_M = packing.keys.places_K[_padded(key_lengths, order, key_widths)[0].to(device)]
        places = torch.empty_like(starts)
        places[order] = boundaries(widths)[:-1]
        to_stream_S = spans(places, lengths_B)
        identity = len(to_padded_N) == len(to_stream_S) and bool((to_padded_N.diff() == 1).all())
        return cls(
            shapes=shapes,
            to_padded_N=to_padded_N.to(device),
            to_stream_S=to_stream_S.to(device),
            is_identity=identity,
            keys_M=keys_M,
        )

    def queries(self, heads: Tensor) -> tuple[Tensor, ...]:
        """[1, heads, S, width] as the rows of each bucket."""
        rows_SW = _rows(heads)
        rows_NW = rows_SW if self.is_identity else _ToPadded.apply(rows_SW, self)
        return rows_NW.split([shape.count * shape.queries for shape in self.shapes])

    def keys(self, heads: Tensor) -> tuple[Tensor, ...]:
        """The same for keys or values."""
        if self.keys_M is None:
            return self.queries(heads)
        rows_MW = _Gather.apply(_rows(heads), self.keys_M)
        return rows_MW.split([shape.count * shape.keys for shape in self.shapes])


def _group(lengths: Sequence[int], key_lengths: Sequence[int], padding_allowance: float) -> list[list[int]]:
    """Indices by decreasing length; a sequence joins while its padding costs less than a call of its own."""
    groups: list[list[int]] = []
    queries = keys = 0  # of the last group
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -key_lengths[i])):
        length, key_length = lengths[index], key_lengths[index]
        widest = max(keys, key_length)
        padding = queries * widest - length * key_length
        if groups:
            padding += len(groups[-1]) * queries * (widest - keys)  # for those that are there
        if not groups or padding > padding_allowance:
            groups.append([])
            queries, widest = length, key_length
        groups[-1].append(index)
        keys = widest
    return groups


def _shape(group: Sequence[int], lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> Shape:
    before = [key_lengths[i] - lengths[i] for i in group]
    distinct = before[:1] if len(set(before)) == 1 else before
    return Shape(
        count=len(group),
        queries=lengths[group[0]],
        keys=max(key_lengths[i] for i in group),
        num_before_B=torch.tensor(distinct, device=device) if any(before) else None,
    )


def _padded(lengths: Sequence[int], order: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The positions of sequences in this order, each padded to its width by its last one; also where each sequence
    starts, and its length."""
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    starts = boundaries(lengths_B)[:-1]
    last_N = (starts + lengths_B - 1)[order].repeat_interleave(widths)
    return torch.minimum(spans(starts[order], widths), last_N), starts, lengths_B


def _rows(heads: Tensor) -> Tensor:
    """[1, heads, S, width] to [S, heads x width]: a view, because projections lay tokens outermost."""
    return heads[0].transpose(0, 1).flatten(1)


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


class _Gather(torch.autograd.Function):
    """Rows at places that may be named more than once. Gradients of what is shared are summed in float32."""

    @staticmethod
    def forward(ctx: Any, rows_SW: Tensor, places_K: Tensor) -> Tensor:
        ctx.save_for_backward(places_K)
        ctx.num_rows = len(rows_SW)
        return rows_SW.index_select(0, places_K)

    @staticmethod
    def backward(ctx: Any, grad_KW: Tensor) -> tuple[Tensor, None]:
        (places_K,) = ctx.saved_tensors
        grad_SW = grad_KW.new_zeros(ctx.num_rows, grad_KW.shape[1], dtype=torch.float32)
        return grad_SW.index_add_(0, places_K, grad_KW.float()).to(grad_KW.dtype), None


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
    dtype, num_heads, width, value_width = query.dtype, query.shape[1], query.shape[3], value.shape[3]
    query, key, value = query.to(BATCHED_DTYPE), key.to(BATCHED_DTYPE), value.to(BATCHED_DTYPE)
    buckets = packing.buckets_for(num_heads * width)
    parts = buckets.queries(query), buckets.keys(key), buckets.keys(value)
    outputs = []
    for shape, *rows in zip(buckets.shapes, *parts, strict=True):
        sizes = (shape.queries, width), (shape.keys, width), (shape.keys, value_width)
        q, k, v = (part.view(shape.count, n, -1, w).transpose(1, 2) for part, (n, w) in zip(rows, sizes, strict=True))
        is_causal = shape.num_before_B is None and (window is None or shape.keys <= window)
        mask = None if is_causal else _mask(shape, window, query.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=k.shape[1] != num_heads
        )
        outputs.append(out.transpose(1, 2).reshape(shape.count * shape.queries, num_heads * value_width))
    rows_NW = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    rows_SW = rows_NW if buckets.is_identity else _ToStream.apply(rows_NW, buckets)
    return rows_SW.view(1, -1, num_heads, value_width).to(dtype)


def _mask(shape: Shape, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look: at itself and all before it, or the window - 1 before it. [1 or count, 1, queries,
    keys]."""
    first_B = torch.zeros(1, dtype=torch.int64, device=device) if shape.num_before_B is None else shape.num_before_B
    queries, keys = (torch.arange(n, device=device) for n in (shape.queries, shape.keys))
    distance = (first_B[:, None, None, None] + queries[:, None]) - keys
    is_seen = distance >= 0
    return is_seen if window is None else is_seen & (distance < window)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """Where a sequence has more keys than queries, the kernel aligns the last of both, as flash-attention does since
    2.1."""
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    boundaries_B1, longest = packing.cu_seqlens_B1, max(packing.lengths)
    key_boundaries_B1, longest_key = boundaries_B1, longest
    if packing.keys is not None:
        places_K = packing.keys.places_K
        k, v = (_Gather.apply(heads.flatten(1), places_K).unflatten(1, heads.shape[1:]) for heads in (k, v))
        key_boundaries_B1, longest_key = packing.keys.cu_seqlens_B1, max(packing.keys.lengths)
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
        key_boundaries_B1,
        longest,
        longest_key,
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
