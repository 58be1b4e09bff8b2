"""The data side of a checkpoint: everything that makes each prompt be trained as often as in an undisturbed run.

Of the prompts that were drawn but not trained, those whose group has come are kept with it, the others are sampled
again; their order is kept in any case. Of an evaluation under way, what has come is kept. Taken between two steps,
under the lock of the service, which costs next to nothing: groups do not change, so they can be written later.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from common.config import Config
from common.types import JSON, CompletedGroup, DropReason, Lease, TrajectoryGroup
from learner.rollouts.archive import ArchiveError, as_groups, as_messages, read_about, read_archive, write_archive
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.evaluation import Begun
from learner.rollouts.leases import Slots, train_lease
from learner.rollouts.ledger import Ledger
from learner.rollouts.partial import Partial, Pending

logger = logging.getLogger(__name__)

_BEGUN = ("asked", "sampled", "failed", "seconds")  # of Begun, besides its groups


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What `take` takes and `restore` restores."""

    state: dict[str, JSON]
    groups: tuple[TrajectoryGroup, ...]  # of the entries of state["untrained"] that are finished, in order
    partials: tuple[Lease, ...]  # of those that have begun: what would be leased now, with the tokens as its prefix
    evaluation: Begun | None


def take(coordinator: Coordinator, now: float) -> Snapshot:
    ledger = coordinator.ledger
    slots, evaluation = ledger.slots, ledger.evaluation
    waiting = [slot.pending() for slot in slots.train.values()] + list(ledger.pending)
    waiting.sort(key=lambda pending: pending.turn)
    groups = tuple(pending.group for pending in waiting if pending.group is not None)
    partials = tuple(_lease_of(ledger, pending) for pending in waiting if _has_begun(pending))
    state = {
        "stream": ledger.stream.state_dict(),
        "untrained": [_entry(pending, slots) for pending in waiting],
        "judged_with": _judged_with(ledger.config),
        "version": ledger.version,
        "pace": ledger.pace.state_dict(),
        "next_lease_id": slots.next_lease_id,
        "counts": ledger.counts.state_dict(),
        "selection": ledger.selection.state_dict(),
        "verdicts": ledger.verdicts.state_dict(),
        "work": coordinator.work(),
    }
    begun = evaluation.under_way(ledger.config, now) if evaluation is not None else None
    return Snapshot(state=state, groups=groups, partials=partials, evaluation=begun)


def restore(coordinator: Coordinator, snapshot: Snapshot) -> None:
    """Before any actor has joined. The evaluation is for Ledger.evaluate. Raises ConfigError when the training set
    is another one."""
    ledger, state = coordinator.ledger, snapshot.state
    coordinator.inherit(state["work"])
    ledger.stream.load_state_dict(state["stream"])
    ledger.version = state["version"]
    ledger.pace.load_state_dict(state["pace"])
    ledger.slots.go_on_after(state["next_lease_id"])
    ledger.counts.load_state_dict(state["counts"])
    ledger.selection.load_state_dict(state["selection"])
    ledger.verdicts.load_state_dict(state["verdicts"])
    ledger.pending = deque(_untrained(ledger, snapshot))


def write_snapshot(path: Path, snapshot: Snapshot, about: JSON) -> None:
    """With `about`, the caller's own."""
    begun, messages = snapshot.evaluation, [*as_messages(snapshot.groups), *snapshot.partials]
    evaluation = None
    if begun is not None:
        evaluation = {name: getattr(begun, name) for name in _BEGUN}
        messages += begun.groups
    write_archive(path, {"about": about, "state": snapshot.state, "evaluation": evaluation}, messages)


def read_snapshot(path: Path, now: float) -> tuple[Snapshot, JSON]:
    """The snapshot and the caller's own. Groups of another version of the program are left out, and sampled again."""
    try:
        content, messages = read_archive(path)
    except ArchiveError as error:
        logger.warning("what had been sampled is sampled again: %s", error)
        content = read_about(path)
        return Snapshot(state=content["state"], groups=(), partials=(), evaluation=None), content["about"]
    untrained = content["state"]["untrained"]
    actors = [entry["finished"]["actor"] for entry in untrained if entry["finished"] is not None]
    num_messages, begun = 2 * len(actors), None
    end = num_messages + sum(entry["has_begun"] for entry in untrained)
    if content["evaluation"] is not None:
        groups = [message for message in messages[end:] if isinstance(message, CompletedGroup)]
        begun = Begun(groups=tuple(groups), **content["evaluation"])
    trained = tuple(as_groups(messages[:num_messages], actors, now))
    partials = tuple(message for message in messages[num_messages:end] if isinstance(message, Lease))
    return Snapshot(state=content["state"], groups=trained, partials=partials, evaluation=begun), content["about"]


def _entry(pending: Pending, slots: Slots) -> JSON:
    group = pending.group
    finished = {"lease_id": group.lease.lease_id, "actor": group.actor} if group is not None else None
    behind = slots.num_fresh_before(pending.turn)
    return {"uid": pending.prompt.uid, "finished": finished, "has_begun": _has_begun(pending), "behind": behind}


def _has_begun(pending: Pending) -> bool:
    return pending.group is None and pending.partial is not None and pending.partial.num_tokens > 0


def _lease_of(ledger: Ledger, pending: Pending) -> Lease:
    """What would be leased now."""
    token_ids = ledger.tokenize(pending.prompt)
    return train_lease(ledger.config, 0, pending.prompt, token_ids, pending.partial)


def _untrained(ledger: Ledger, snapshot: Snapshot) -> Iterator[Pending]:
    """In order; a group that is not what would be asked for now is dropped, and its prompt sampled again."""
    config = ledger.config
    is_judged_alike = snapshot.state["judged_with"] == _judged_with(config)
    groups = {group.lease.lease_id: group for group in snapshot.groups}
    partials = iter(snapshot.partials)
    for entry in snapshot.state["untrained"]:
        prompt, finished = ledger.stream.find(entry["uid"]), entry["finished"]
        behind = entry.get("behind", 0)  # those that have failed are the last
        turn = ledger.slots.turn_behind(behind) if behind else ledger.slots.next_turn()
        pending = Pending(prompt=prompt, turn=turn)
        if finished is None:
            before = next(partials, None) if entry["has_begun"] else None
            if before is not None and _is_same_request(before, _lease_of(ledger, pending)):
                pending = replace(pending, partial=Partial.of_prefix(before))
            elif before is not None:
                ledger.counts.dropped_tokens[DropReason.CHANGED] += len(before.prefix_token_ids)
            yield pending
            continue
        group = groups.get(finished["lease_id"])  # none of them is there when they are of another version
        lease = train_lease(config, finished["lease_id"], prompt, ledger.tokenize(prompt), None)
        if group is None or not is_judged_alike or not _is_same_request(group.lease, lease):
            num_tokens = 0 if group is None else len(group.completed.token_ids)
            ledger.counts.drop(DropReason.CHANGED, finished["lease_id"], finished["actor"], num_tokens)
            group = None
        yield replace(pending, group=group)


def _judged_with(config: Config) -> JSON:
    """What rewards follow from besides the responses."""
    verifier = [config.verifier.function, str(config.verifier.answer_form)]
    return {"verifier": verifier, "reward": asdict(config.reward)}


def _is_same_request(before: Lease, now: Lease) -> bool:
    """Whether `now` asks for what `before` asked for, but for the random numbers."""
    names = ("prompt_uid", "reference", "row", "num_samples", "temperature", "max_tokens", "stop", "top_p", "top_k")
    same = all(getattr(before, name) == getattr(now, name) for name in names)
    return same and np.array_equal(before.prompt_token_ids, now.prompt_token_ids)
