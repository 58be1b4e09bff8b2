"""Part b: packed attention, as the learner calls it, against one causal product per sequence.

On a GPU in bfloat16 that is torch's variable-length kernel, elsewhere batches through SDPA. The inputs are drawn on the
CPU and the reference is computed there in float64, so that no wrong kernel can hide another one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.values import name_of
from learner.networks.attention import Packing, packed_attention

LENGTHS = (5, 130, 1, 64)
HEADS = ((14, 2), (8, 8), (4, 1))  # of queries, of keys and values
WIDTHS = (32, 64, 128)
WINDOWS = (None, 20)
# Relative error of output and of gradients. bfloat16 keeps 8 bits, which is 4e-3.
LIMITS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-2, 2e-2)}
# As much as a micro-batch of long responses.
TIMED = {"cuda": (2048, 1900, 1500, 1024, 800, 500, 300, 120), "cpu": (40, 30, 9)}
REPEATS = 7

ATTENTION = nn.Module()  # whose name an error would give


def run(report: Report, device: torch.device, folder: Path) -> None:
    for dtype, limits in LIMITS.items():
        worst = dict.fromkeys(("output", "dq", "dk", "dv"), 0.0)
        for heads in HEADS:
            for width in WIDTHS:
                for window in WINDOWS:
                    errors = compare(device, dtype, heads, width, window)
                    worst = {name: max(worst[name], errors[name]) for name in worst}
        for name, error in worst.items():
            report.at_most(f"{name_of(dtype)}: {name}, largest relative error", error, limits[name != "output"])
    measure(report, device)


def compare(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], width: int, window: int | None
) -> dict[str, float]:
    """Relative errors of the output and of the three gradients."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    inputs = [torch.randn(1, count, total, width).to(dtype) for count in (heads[0], heads[1], heads[1])]
    slope = torch.randn(1, total, heads[0], width).to(dtype)
    here = [x.to(device).requires_grad_() for x in inputs]
    there = [x.double().requires_grad_() for x in inputs]
    packing = Packing.from_lengths(LENGTHS, device)
    found, _ = packed_attention(ATTENTION, *here, None, packing=packing, sliding_window=window)
    expected = by_sequence(*there, LENGTHS, window)
    results = {"output": (found, expected)}
    gradients = torch.autograd.grad(found, here, slope.to(device))
    references = torch.autograd.grad(expected, there, slope.double())
    results |= dict(zip(("dq", "dk", "dv"), zip(gradients, references, strict=True), strict=True))
    return {name: ((a.cpu().double() - b).norm() / b.norm()).item() for name, (a, b) in results.items()}


def by_sequence(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None = None) -> Tensor:
    """[1, S, heads, width] of [1, heads, S, width]: causal SDPA on each sequence alone."""
    outputs = []
    for q, k, v in zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True):
        length, mask = q.shape[2], None
        if window is not None:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = ones.tril() & ones.triu(1 - window)
        is_grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def measure(report: Report, device: torch.device) -> None:
    """Milliseconds of forward and backward, 14 query and 2 key heads of width 64, bfloat16."""
    lengths = TIMED[device.type]
    packing = Packing.from_lengths(lengths, device)
    heads = [
        torch.randn(1, count, sum(lengths), 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for count in (14, 2, 2)
    ]
    sides: dict[str, Callable[[], Tensor]] = {
        "packed": lambda: packed_attention(ATTENTION, *heads, None, packing=packing)[0],
        "by sequence": lambda: by_sequence(*heads, lengths),
    }
    for name, side in sides.items():
        times = [milliseconds(side, heads, device) for _ in range(REPEATS)]
        report.number(f"{name}, {sum(lengths)} tokens, ms", statistics.median(times[1:]))


def milliseconds(side: Callable[[], Tensor], inputs: Sequence[Tensor], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    output = side()
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
