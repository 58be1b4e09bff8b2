"""Which leases are to be taken from the actors that hold them: questions only, the coordinator acts."""

from collections.abc import Iterator, Mapping

from common.config import TransportConfig
from learner.rollouts.clock import LeaseTimes
from learner.rollouts.leases import Slot, Slots
from learner.rollouts.members import Member


def hung(member: Member, slots: Slots, transport: TransportConfig) -> list[int]:
    """Leases that are being sampled, when the whole engine stands still."""
    sampling = [id_ for id_ in member.held if not slots[id_].is_sampled]
    return sampling if member.clock.stalled_s > transport.lease_timeout_s else []


def stuck(member: Member, slots: Slots, transport: TransportConfig) -> list[int]:
    """Leases that do not grow although they have begun, of an engine that gets on with others."""
    limit_s = transport.lease_timeout_s
    return [id_ for id_ in member.held if not slots[id_].is_sampled and member.clock.stuck_s(id_) > limit_s]


def stragglers(
    slots: Slots, times: LeaseTimes, room: Mapping[str, int], num_pending: int, now: float
) -> Iterator[Slot]:
    """Leases that keep the next batch waiting, oldest first, as long as other actors have room for them and for
    the `num_pending` prompts that wait for it. `room`: leases that each actor may be granted now."""
    for slot in slots.train.values():
        if slot.group is not None:
            continue
        if slot.is_sampled or not times.is_straggler(now - slot.granted_s, slot.num_steps):
            return
        if num_pending >= sum(free for name, free in room.items() if name != slot.actor):
            return
        num_pending += 1
        yield slot
