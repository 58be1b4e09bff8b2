"""GAE on a packed stream against a loop over the columns of a padded batch.

    python benchmarks/gae.py [--json FILE] [--repeats N] [--threads N]

Both sides compute what one step of VAPO needs from the values of a batch: advantages with a length-adaptive
lambda per response, and lambda = 1 targets for the critic. The padded side is what trainers commonly do:
rows of equal length, rewards on the last real token, one pass of a handful of tensor operations per column
for each lambda, and a stack of the columns at the end. The padded side is not charged for making the padded
tensors. Both results are compared before anything is timed. Sides alternate, and the fastest of the repeats
counts.

"growth" is the time per token of the packed side relative to the smallest shape of the same kind.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or learner.py here would hide the package

import torch
from torch import Tensor

from learner.algorithm.advantages import gae, length_adaptive_lambda, value_targets

ALPHA = 0.05
SHAPES = [(16, 512), (64, 1024), (128, 2048), (256, 4096), (512, 8192)]  # responses x longest response


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured shape."""

    responses: int
    longest: int
    lengths: str
    tokens: int
    packed_ms: float
    padded_loop_ms: float
    speedup: float
    packed_ns_per_token: float


def ragged_lengths(num_responses: int, longest: int, kind: str, generator: torch.Generator) -> Tensor:
    """`uniform` in 1..longest, or `long_tail`: log-normal around a quarter of the longest. One is the
    longest."""
    if kind == "uniform":
        lengths_B = torch.randint(1, longest + 1, (num_responses,), generator=generator)
    else:
        spread_B = torch.randn(num_responses, generator=generator).mul(0.8).exp()
        lengths_B = (spread_B * longest / 4).long().clamp(1, longest)
    lengths_B[0] = longest
    return lengths_B


def packed(values_T: Tensor, rewards_B: Tensor, cu_seqlens_B1: Tensor) -> tuple[Tensor, Tensor]:
    lambda_B = length_adaptive_lambda(cu_seqlens_B1.diff(), ALPHA)
    advantages_T = gae(values_T, rewards_B, cu_seqlens_B1, lambda_B)
    return advantages_T, value_targets(values_T, rewards_B, cu_seqlens_B1, critic_lambda=1.0)


def padded_pass(values_BL: Tensor, rewards_BL: Tensor, mask_BL: Tensor, lambda_B: Tensor | float) -> Tensor:
    """Advantages by a loop over columns; accumulators are carried over masked columns."""
    next_value_B = torch.zeros(len(values_BL))
    last_B = torch.zeros(len(values_BL))
    columns = []
    for t in reversed(range(values_BL.shape[1])):
        delta_B = rewards_BL[:, t] + next_value_B - values_BL[:, t]
        advantage_B = delta_B + lambda_B * last_B
        next_value_B = values_BL[:, t] * mask_BL[:, t] + (1 - mask_BL[:, t]) * next_value_B
        last_B = advantage_B * mask_BL[:, t] + (1 - mask_BL[:, t]) * last_B
        columns.append(last_B)
    return torch.stack(columns[::-1], dim=1)


def padded(values_BL: Tensor, rewards_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    lambda_B = length_adaptive_lambda(mask_BL.sum(1).long(), ALPHA)
    advantages_BL = padded_pass(values_BL, rewards_BL, mask_BL, lambda_B)
    return advantages_BL, padded_pass(values_BL, rewards_BL, mask_BL, 1.0) + values_BL


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(num_responses: int, longest: int, kind: str, repeats: int) -> Row:
    """One row of the table. Raises AssertionError when the two sides disagree."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = ragged_lengths(num_responses, longest, kind, generator)
    cu_seqlens_B1 = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
    mask_BL = torch.arange(longest) < lengths_B[:, None]
    values_BL = torch.rand(num_responses, longest, generator=generator) * 2 - 1
    rewards_B = torch.randint(0, 2, (num_responses,), generator=generator).float() * 2 - 1
    rewards_BL = torch.zeros_like(values_BL)
    rewards_BL[torch.arange(num_responses), lengths_B - 1] = rewards_B
    values_T, float_mask_BL = values_BL[mask_BL], mask_BL.float()

    for ours_T, theirs_BL in zip(
        packed(values_T, rewards_B, cu_seqlens_B1), padded(values_BL, rewards_BL, float_mask_BL), strict=True
    ):
        torch.testing.assert_close(ours_T, theirs_BL[mask_BL], atol=2e-3, rtol=1e-3)
    packed_s = padded_s = float("inf")
    for _ in range(repeats):
        packed_s = min(packed_s, fastest(lambda: packed(values_T, rewards_B, cu_seqlens_B1), 5))
        padded_s = min(padded_s, fastest(lambda: padded(values_BL, rewards_BL, float_mask_BL), 1))
    tokens = int(lengths_B.sum())
    return Row(
        responses=num_responses,
        longest=longest,
        lengths=kind,
        tokens=tokens,
        packed_ms=packed_s * 1e3,
        padded_loop_ms=padded_s * 1e3,
        speedup=padded_s / packed_s,
        packed_ns_per_token=packed_s / tokens * 1e9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="GAE on packed streams against a loop over padded columns")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s), float32")
    print("responses  longest  lengths       tokens   packed ms   loop ms   speed-up   ns/token   growth")
    rows = []
    for kind in ("uniform", "long_tail"):
        base = 0.0
        for num_responses, longest in SHAPES:
            row = measure(num_responses, longest, kind, arguments.repeats)
            base = base or row.packed_ns_per_token
            growth = row.packed_ns_per_token / base
            rows.append(asdict(row) | {"growth": growth})
            print(
                f"{num_responses:9d}  {longest:7d}  {kind:9s} {row.tokens:10,d} {row.packed_ms:11.3f} "
                f"{row.padded_loop_ms:9.1f} {row.speedup:9.1f}x {row.packed_ns_per_token:10.2f} {growth:8.2f}"
            )
    print(json.dumps(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
