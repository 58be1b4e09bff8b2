"""Where every prompt is. No sockets, no clock, no threads, and no actors beyond their names.

A training prompt goes   pending -> leased(actor) -> buffered -> trained | dropped(reason)

- Lease ids count up and are never used twice. A prompt that comes back is leased again first, under a new id, with what
  was sampled of its responses: the next actor goes on from there.
- Admission: groups leased + buffered + trained stay below the window (learner/rollouts/pace.py), so that actors run
  ahead of the learner by at most `max_staleness` versions.
- Consumption is in the order of the prompt stream, also for a prompt that came back, and a batch waits for its earlier
  leases; or, by `staleness.batching`, in that of arrival, except that what would get too old goes first
  (learner/rollouts/batching.py). Either way the admission window keeps every group young enough; the gate at
  consumption holds for whatever an actor sends.
- Evaluation leases count nowhere in the above. They have all the room before the first step and whenever no training
  lease may go out.
- A prompt on which an actor failed goes behind others, so that the actor may try one of them, and is given up when
  several actors, or all that could sample it, have failed on it.
"""

import logging
import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from common.config import Batching, Config, OverAge
from common.types import CompletedGroup, DropReason, Int32Array, Prompt, Purpose, TrajectoryGroup
from learner.rollouts.archive import renumbered
from learner.rollouts.batching import next_slots
from learner.rollouts.counts import Counts
from learner.rollouts.evaluation import Begun, EvalResult, Evaluation, asked
from learner.rollouts.leases import Slot, Slots, eval_lease, is_over_age, train_lease
from learner.rollouts.pace import Pace
from learner.rollouts.partial import Partial, Pending
from learner.rollouts.prompts import PromptStream
from learner.rollouts.selection import Fate, Selection
from learner.rollouts.verdicts import Verdicts, is_informative

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # of one prompt, and on as many actors if so many could sample it, before it is given up


class Ledger:
    """Prompts, leases and groups; what of them a run counts.

    Invariant: every training prompt drawn from the stream is in exactly one place: pending, one slot, trained, or
    dropped for good.
    """

    def __init__(
        self,
        config: Config,
        stream: PromptStream,
        tokenize: Callable[[Prompt], Sequence[int] | Int32Array],
        incarnation: int,
    ) -> None:
        self.config = config
        self.stream = stream
        self.tokenize = tokenize
        self.version = 0
        self.pace = Pace(config)
        self.pending: deque[Pending] = deque()  # training prompts that came back, in the order of the stream
        self.slots = Slots(incarnation)
        self.evaluation: Evaluation | None = None
        self.counts = Counts()
        self.selection = Selection()
        self.verdicts = Verdicts(config)
        self.window_fill: float | None = None  # when the last step ended

    @property
    def admitted(self) -> int:
        """Groups leased, buffered or trained; those that were dropped have given their place back."""
        return self.pace.taken + len(self.slots.train)

    @property
    def is_full(self) -> bool:
        """No training prompt may be leased."""
        return self.admitted >= self.pace.window

    def end_step(self, version: int, steps_done: int) -> None:
        """What is current from now on. How full the window was is noted before, while the ended step's was still the
        one that held sampling back: its places are those behind the batches that were taken, if it has any."""
        places = self.pace.window - self.pace.taken
        self.window_fill = len(self.slots.train) / places if places > 0 else None
        self.version, self.pace.steps_done = version, steps_done

    def is_window_sampled(self) -> bool:
        """The window is full and every group in it has arrived."""
        return self.is_full and not self.slots.num_in_flight

    # ---- leases out

    def buffer_finished(self, now: float) -> None:
        """What a checkpoint held of finished groups takes its place in the order when all before it have theirs."""
        while self.pending and not self.is_full and (group := self.pending[0].group) is not None:
            group, pending = renumbered(group, self.slots.next_lease_id), self.pending.popleft()
            oldest = group.oldest_version
            slot = Slot(group.lease, pending.prompt, pending.turn, group.actor, granted_s=now, oldest_version=oldest)
            self.slots.buffer(self.slots.add(slot), group)
            self.selection.add(Fate.SAMPLED, group.completed)

    def lease(self, actor: str, now: float, *, may_evaluate: bool) -> Slot | None:
        """The next lease, for this actor; None when there is nothing to sample. `may_evaluate` although training waits
        too. Before the first step training does not count as waiting: version 0 is evaluated first."""
        lease_id, evaluation = self.slots.next_lease_id, self.evaluation
        may_evaluate |= self.pace.steps_done == 0 or self.is_full
        if evaluation is not None and evaluation.pending and may_evaluate:
            pending = evaluation.pending.popleft()
            prompt, partial = pending.prompt, pending.partial
            lease = eval_lease(self.config, lease_id, prompt, self.tokenize(prompt), partial, evaluation)
        elif not self.is_full:
            pending = self._next_pending()
            prompt, partial = pending.prompt, self._young_enough(pending)
            lease = train_lease(self.config, lease_id, prompt, self.tokenize(prompt), partial)
        else:
            return None
        self.counts.totals["prefix_tokens"] += len(lease.prefix_token_ids)
        oldest = partial.oldest_version if partial is not None and partial.num_tokens else self.version
        slot = Slot(lease, prompt, pending.turn, actor, granted_s=now, oldest_version=oldest, partial=partial)
        return self.slots.add(slot)

    def _next_pending(self) -> Pending:
        if self.pending and self.slots.is_due(self.pending[0].turn):
            return self.pending.popleft()
        return Pending(prompt=self.stream.next(), turn=self.slots.next_turn())

    def _young_enough(self, pending: Pending) -> Partial | None:
        """What is known of it, unless its oldest token could be too old when the group is trained. With
        `first_finished` its turn does not tell when that is: only tokens of this version are kept."""
        partial, staleness = pending.partial, self.config.staleness
        if partial is None or not partial.num_tokens or staleness.over_age is OverAge.mask:
            return partial
        version, bound = self.version, 0
        if staleness.batching is Batching.admission_order:
            version += self.pace.versions_until(self.slots.num_before(pending.turn))
            bound = staleness.max_staleness
        if version - partial.oldest_version <= bound:
            return partial
        self.counts.dropped_tokens[DropReason.STALE] += partial.num_tokens
        return None

    # ---- leases back

    def settle(self, slot: Slot, group: CompletedGroup, now: float) -> None:
        """A good group of a lease that is out; it may turn out to be of no use."""
        self.counts.failures.pop(slot.prompt.uid, None)
        self.counts.receive(group)
        self.verdicts.add(group, slot.lease.purpose)
        if slot.lease.purpose is Purpose.EVAL:
            assert self.evaluation is not None
            self.slots.remove(slot)
            self.evaluation.add(slot.prompt.uid, group, slot.drawers(slot.actor, group), now)
            return
        self.selection.add(Fate.SAMPLED, group)
        slot.drawn_by = slot.drawers(slot.actor, group)
        self.slots.buffer(slot, TrajectoryGroup(lease=slot.lease, actor=slot.actor, completed=group, arrived_s=now))
        if (reason := self.verdicts.reason_to_drop(group, self._is_filtering())) is not None:
            self._forget(slot, reason)

    def fail(self, slot: Slot, reason: DropReason | None, problem: str, able: Collection[str]) -> None:
        """The prompt is leased again, behind others, unless it has failed too often. `reason`: why a group of it is
        dropped, if one has come. `able`: the actors that it could be leased to."""
        uid, failures = slot.prompt.uid, self.counts.fail(slot.prompt.uid, slot.actor)
        logger.warning("prompt %s, failure %d on actor %s: %s", uid, failures.total(), slot.actor, problem)
        has_untried = len(failures) < MAX_FAILURES and any(actor not in failures for actor in able)
        if failures.total() < MAX_FAILURES or has_untried:
            slot.turn = self._turn_behind(slot)
            self.withdraw(slot, reason)
            return
        del self.counts.failures[uid]
        logger.error("prompt %s is given up after %d failures: %s", uid, failures.total(), problem)
        self._forget(slot, DropReason.FAILED)

    def withdraw(self, slot: Slot, reason: DropReason | None, *, keeps_partial: bool = False) -> None:
        """The prompt goes back to its place in the queue that it came from."""
        self._remove(slot, reason, 0 if keeps_partial else slot.num_tokens)
        pending = Pending(prompt=slot.prompt, partial=slot.partial if keeps_partial else None, turn=slot.turn)
        insort(self._queue_of(slot), pending, key=lambda waiting: waiting.turn)

    def _turn_behind(self, slot: Slot) -> int:
        """Behind the prompts of one more step, or behind the evaluation's others."""
        if slot.lease.purpose is Purpose.TRAIN:
            return self.slots.turn_behind(self.config.rollout.prompts_per_step)
        queue = self._queue_of(slot)
        return queue[-1].turn + 1 if queue else slot.turn

    def distrust(self, actor: str, version: int) -> None:
        """What this actor has drawn with weights called `version` or later, which turn out to be wrong, is neither
        trained on nor handed on, nor does it count as held-out accuracy, whoever went on from it. Leases that are out
        with such tokens have been taken back."""
        for slot in reversed(list(self.slots.buffered.values())):
            if slot.is_of(actor, version):
                self.withdraw(slot, DropReason.ACTOR_LOST)
        for queue in (self.pending, self.evaluation.pending if self.evaluation is not None else deque[Pending]()):
            for place, waiting in enumerate(queue):
                if waiting.is_of(actor, version):
                    self.counts.dropped_tokens[DropReason.ACTOR_LOST] += waiting.num_tokens
                    queue[place] = replace(waiting, partial=None)
        for group in self.evaluation.distrust(actor, version) if self.evaluation is not None else ():
            self.counts.drop(DropReason.ACTOR_LOST, group.lease_id, actor, len(group.token_ids))

    def _queue_of(self, slot: Slot) -> deque[Pending]:
        if slot.lease.purpose is Purpose.TRAIN:
            return self.pending
        assert self.evaluation is not None
        return self.evaluation.pending

    def _forget(self, slot: Slot, reason: DropReason) -> None:
        """The prompt is done with for this epoch; the stream's next takes its place."""
        self._remove(slot, reason, slot.num_tokens)
        if slot.lease.purpose is Purpose.EVAL:
            assert self.evaluation is not None
            self.evaluation.fail(slot.prompt.uid)

    def _remove(self, slot: Slot, reason: DropReason | None, num_lost: int) -> None:
        """With it so many tokens are lost."""
        self.slots.remove(slot)
        if reason is not None:
            self.counts.drop(reason, slot.lease.lease_id, slot.actor, num_lost)
        else:
            self.counts.dropped_tokens[DropReason.FAILED] += num_lost
        if slot.group is not None:
            self.selection.add(Fate.DROPPED, slot.group.completed)

    # ---- consumption

    def take_batch(self) -> list[TrajectoryGroup] | None:
        """The next step's groups, or None while one of them is still being sampled."""
        slots = self._next_slots()
        if slots is not None and self._drop_what_may_not_be_trained(slots):
            slots = self._next_slots()
        if slots is None:
            return None
        batch = [slot.group for slot in slots if slot.group is not None]
        for slot in slots:
            self.slots.remove(slot)
        for group in batch:
            self.selection.add(Fate.TRAINED, group.completed)
        self.counts.totals["trained_groups"] += len(batch)
        self.pace.steps_taken += 1
        self.verdicts.batch_taken()
        return batch

    def _next_slots(self) -> list[Slot] | None:
        first = self.pending[0].turn if self.pending else None
        returned = first if first is not None and self.slots.is_due(first) else None
        return next_slots(self.slots, returned, self.config, self.pace, self.version)

    def _drop_what_may_not_be_trained(self, slots: list[Slot]) -> bool:
        """If that holds for one of `slots`, all that is buffered is looked through."""
        if not any(self._reason_to_drop(slot) for slot in slots):
            return False
        for slot in sorted(self.slots.buffered.values(), key=lambda slot: slot.lease.lease_id, reverse=True):
            if (reason := self._reason_to_drop(slot)) is DropReason.STALE:
                self.withdraw(slot, reason)
            elif reason is not None:  # it came during warm-up; not one in a row: its neighbours here may be kept
                self._forget(slot, reason)
        return True

    def _reason_to_drop(self, slot: Slot) -> DropReason | None:
        assert slot.group is not None
        if is_over_age(self.config.staleness, slot.group, self.version):
            return DropReason.STALE
        return DropReason.UNINFORMATIVE if self._is_filtering() and not is_informative(slot.group.completed) else None

    def _is_filtering(self) -> bool:
        """Dynamic sampling, in policy steps only: the critic's warm-up wants the policy's own distribution."""
        return self.config.algorithm.dynamic_sampling and not self.pace.is_warmup

    # ---- evaluation

    def evaluate(self, evaluation: Evaluation, begun: Begun | None = None) -> None:
        """Starts it, or goes on from what a checkpoint held of it, unless something else is asked for now: then it
        starts again, of the present version. Raises RuntimeError while another evaluation runs."""
        if self.evaluation is not None:
            raise RuntimeError(f"the evaluation of version {self.evaluation.version} is still running")
        if begun is not None and begun.asked == asked(self.config, evaluation):
            evaluation.go_on(begun, now=evaluation.started_s)
        elif begun is not None:
            logger.warning("the evaluation of version %d starts again: its settings changed", evaluation.version)
            evaluation.version = self.version
        self.evaluation = evaluation

    def poll_evaluation(self) -> EvalResult | None:
        """The finished evaluation's result, once; else None."""
        result = self.evaluation.result() if self.evaluation is not None else None
        if result is not None:
            self.evaluation = None
        return result

    def evaluation_moved_s(self) -> float:
        """When a group of the evaluation came last, or it was begun; -inf while there is none."""
        return -math.inf if self.evaluation is None else self.evaluation.moved_s

    # ---- reports

    @property
    def num_due(self) -> int:
        """Training prompts that wait for an actor now."""
        return sum(waiting.group is None and self.slots.is_due(waiting.turn) for waiting in self.pending)

    @property
    def num_buffered(self) -> int:
        """Groups that have come and wait to be trained on."""
        return len(self.slots.buffered)

    def stats(self) -> dict[str, float]:
        """Counters since the start of the run and gauges of now."""
        return {
            "admitted_groups": self.admitted,
            "window_groups": self.pace.window,
            **({} if self.window_fill is None else {"window_fill": self.window_fill}),
            "buffered_groups": self.num_buffered,
            "in_flight_groups": self.slots.num_in_flight,
            "in_flight_eval_groups": len(self.slots.evaluation),
            "pending_prompts": len(self.pending),
            **self.counts.stats(),
            **self.selection.stats(),
            **self.verdicts.stats(),
        }

    def describe(self) -> list[str]:
        """For the message of a time-out."""
        groups = f"{self.num_buffered} groups are buffered, {self.admitted} of {self.pace.window} admitted"
        evaluation = [] if self.evaluation is None else [self.evaluation.describe()]
        return [groups, *evaluation, *self.verdicts.describe()]
