"""What the updates of one step share, and where its time goes.

Axes: B responses, T response tokens of the batch, laid end to end.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from learner.algorithm.diagnostics import Metrics, Totals
from learner.algorithm.experience import Experience
from learner.algorithm.packing import Batch, MicroBatches


class Stopwatch:
    """Adds up seconds by stage. On CUDA a stage ends when its kernels have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def metrics(self, num_response_tokens: int) -> Metrics:
        """Seconds per stage, tokens per second of the whole step so far, and the peak of memory."""
        total = time.perf_counter() - self._started
        times = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        return times | {
            "time/train_s": total,
            "throughput/trained_tokens_per_s": num_response_tokens / total,
            "memory/peak_gib": self._peak_gib(),
        }

    def _peak_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


@dataclass(frozen=True)
class Work:
    """What the updates of one step share. The batch and the experience hold the same responses in order."""

    batch: Batch
    experience: Experience
    version: int
    is_warmup: bool
    is_published: bool
    num_updates: int  # of the policy, before the step
    totals: Totals
    clock: Stopwatch

    @cached_property
    def num_gaps(self) -> int:
        """One more than the largest version gap in the loss mask, 0 without a token there; the same on all ranks."""
        e = self.experience
        return int(torch.where(e.mask_T, e.gap_T, -1).max()) + 1

    def share(self, micros: MicroBatches) -> Iterator[tuple[Batch, Experience]]:
        """Batch and experience of each of these micro-batches, empty ones included."""
        device = self.experience.mask_T.device
        for indices in micros:
            tokens = self.batch.select_tokens(indices).to(device)
            yield self.batch.select(indices), self.experience.select(tokens)
