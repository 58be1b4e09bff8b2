"""One actor on a virtual clock: an engine that batches continuously, and its verifier.

All sequences that run get one token per forward pass, which takes base_s + sequence_s x running. Time between two
events is computed at once: `_drawn` counts the passes, so that a sequence of l tokens that began at pass d ends at pass
d + l, whatever the speed was meanwhile.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import simpy

from common.types import CompletedGroup, FinishReason, Lease, Verdict


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """A forward pass of `running` sequences takes base_s + sequence_s x running seconds."""

    base_s: float
    sequence_s: float = 0.0
    verification_s: float = 0.0  # from a group's last token to its arrival at the learner

    def pass_s(self, running: float) -> float:
        return self.base_s + self.sequence_s * running

    def tokens_per_s(self, running: float) -> float:
        return running / self.pass_s(running)

    def slowed(self, times: float) -> "EngineSpeed":
        return replace(self, base_s=times * self.base_s, sequence_s=times * self.sequence_s)


@dataclass
class _Group:
    lease: Lease
    lengths: npt.NDArray[np.int32]  # [n]
    verdicts: tuple[Verdict, ...]
    began_s: float | None = None  # when the first of its sequences did
    begun: dict[int, float] = field(default_factory=dict)  # sequence: the pass at which it began
    num_left: int = 0


class Engine:
    """Calls `deliver` with every group that has been sampled and verified.

    Args:
        places: sequences that run at once; others wait in order.
    """

    def __init__(
        self,
        environment: simpy.Environment,
        speed: EngineSpeed,
        places: int,
        deliver: Callable[[CompletedGroup], None],
    ) -> None:
        self._environment = environment
        self._speed = speed
        self._places = places
        self._deliver = deliver
        self._running: list[tuple[float, int, int]] = []  # (last pass, lease id, sequence), descending
        self._waiting: deque[tuple[int, int]] = deque()
        self._groups: dict[int, _Group] = {}
        self._loaded = [0.0]  # passes done when version 0, 1, ... was loaded
        self._drawn = 0.0  # passes since the start
        self._since_s = environment.now
        self._is_paused = False
        self._next: simpy.Event | None = None
        self.tokens = 0.0  # drawn so far, as of the last event
        self.busy_s = 0.0  # with a sequence, and not paused
        self.sequence_s = 0.0  # integral of the sequences that run while it is busy

    def sample(self, lease: Lease, lengths: npt.NDArray[np.int32], verdicts: tuple[Verdict, ...]) -> None:
        group = _Group(lease, lengths, verdicts, num_left=len(lengths))
        self._groups[lease.lease_id] = group
        self._waiting.extend((lease.lease_id, sequence) for sequence in range(len(lengths)))
        self._go_on()

    def pause(self) -> None:
        """What runs goes on after `resume`."""
        self.catch_up()
        self._is_paused = True
        self._next = None

    def resume(self) -> None:
        self.catch_up()
        self._is_paused = False
        self._go_on()

    def load(self) -> None:
        """The next version."""
        self.catch_up()
        self._loaded.append(self._drawn)

    def catch_up(self) -> None:
        """Counts what has been drawn until now."""
        now, running = self._environment.now, len(self._running)
        if running and not self._is_paused:
            seconds = now - self._since_s
            passes = seconds / self._speed.pass_s(running)
            self._drawn += passes
            self.tokens += running * passes
            self.busy_s += seconds
            self.sequence_s += running * seconds
        self._since_s = now

    def _go_on(self) -> None:
        """Starts what there is room for, and waits for the first sequence to end."""
        self.catch_up()
        while self._waiting and len(self._running) < self._places:
            lease_id, sequence = self._waiting.popleft()
            group = self._groups[lease_id]
            group.begun[sequence] = self._drawn
            group.began_s = self._environment.now if group.began_s is None else group.began_s
            insort(self._running, (-self._drawn - int(group.lengths[sequence]), lease_id, sequence))
        self._next = None
        if self._running and not self._is_paused:
            passes = max(0.0, -self._running[-1][0] - self._drawn)
            self._next = self._environment.timeout(passes * self._speed.pass_s(len(self._running)))
            self._next.callbacks.append(self._end_sequences)

    def _end_sequences(self, event: simpy.Event) -> None:
        if event is not self._next:  # the batch has changed since
            return
        self.catch_up()
        self._drawn = -self._running[-1][0]  # exactly
        while self._running and -self._running[-1][0] <= self._drawn:
            _, lease_id, _ = self._running.pop()
            self._groups[lease_id].num_left -= 1
            if not self._groups[lease_id].num_left:
                self._finish(self._groups.pop(lease_id))
        self._go_on()

    def _finish(self, group: _Group) -> None:
        assert group.began_s is not None, "none of its sequences has begun"
        completed = CompletedGroup(
            lease_id=group.lease.lease_id,
            lengths=group.lengths,
            token_ids=np.zeros(int(group.lengths.sum()), np.int32),
            behavior_logprobs=np.zeros(int(group.lengths.sum()), np.float32),
            versions=self._versions(group),
            rewards=np.zeros(len(group.lengths), np.float32),
            verdicts=group.verdicts,
            verifier_error=None,
            finish_reasons=(FinishReason.STOP,) * len(group.lengths),
            generation_s=self._environment.now - group.began_s,
            verification_s=self._speed.verification_s,
        )
        verified = self._environment.timeout(self._speed.verification_s)
        verified.callbacks.append(lambda event: self._deliver(completed))

    def _versions(self, group: _Group) -> npt.NDArray[np.int32]:
        """Of all tokens: the k-th of a sequence is drawn by the k-th pass after its beginning."""
        begun = np.array([group.begun[sequence] for sequence in range(len(group.lengths))])
        ends = np.cumsum(group.lengths)
        passes = np.arange(1, ends[-1] + 1) - np.repeat(ends - group.lengths, group.lengths)
        drawn = passes + np.repeat(begun, group.lengths)
        versions: npt.NDArray[np.int32] = np.searchsorted(self._loaded, drawn, side="left").astype(np.int32) - 1
        return versions
