"""Who is to blame when a phase of a publication fails, from what the members reported."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from common.broadcast import BrokenTransfer
from common.types import MemberId, WeightsPhase, WeightsReport
from learner.publication.control import Channel, Costs, Deadlines, PublishError

A, B, C = MemberId("a", 1), MemberId("b", 2), MemberId("c", 3)
SHARED, OWN, FINE, SILENT, LOST = "shared", "own", "fine", "silent", "lost"


class Control:
    """Members that answer as they are told to."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers
        self.dismissed: dict[str, str] = {}
        self.lost: tuple[MemberId, ...] = ()

    def member_ids(self) -> tuple[MemberId, ...]:
        return (A, B, C)

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        if meanwhile is not None:
            meanwhile()
        answers = {member: self.answers.get(member.name, FINE) for member in payloads}
        self.lost = tuple(member for member, answer in answers.items() if answer == LOST)
        return {member: report(phase, answer) for member, answer in answers.items() if answer not in (SILENT, LOST)}

    def lost_ids(self) -> tuple[MemberId, ...]:
        return self.lost

    def dismiss(self, member: MemberId, reason: str) -> None:
        self.dismissed[member.name] = reason

    def quarantine(self, member: MemberId, reason: str, version: int) -> None:
        raise AssertionError(reason)


def report(phase: WeightsPhase, answer: str) -> WeightsReport:
    return WeightsReport(
        command_id=1,
        phase=phase,
        version=7,
        error={FINE: None, OWN: "out of memory", SHARED: "connection closed by peer"}[answer],
        is_shared=answer == SHARED,
        probe_logprobs=np.empty(0, np.float32),
    )


def channel(control: Control) -> Channel:
    return Channel(control, (A, B, C), 7, Deadlines(9.0), Costs())


def broadcast() -> None:
    """Rank 0's part, which works."""


def test_a_phase_that_all_finish_dismisses_nobody() -> None:
    control = Control()
    channel(control).run(WeightsPhase.UPDATE, collective=broadcast)
    assert control.dismissed == {}


def test_an_error_of_the_collective_is_nobodys_guilt() -> None:
    control = Control(a=SHARED, b=SHARED)
    with pytest.raises(PublishError, match=r"update of version 7 failed \(a: connection closed by peer; b: connection"):
        channel(control).run(WeightsPhase.UPDATE, collective=broadcast)
    assert control.dismissed == {}


def test_who_is_absent_while_others_answer_leaves_and_the_others_stay() -> None:
    control = Control(a=SHARED, b=SILENT, c=SHARED)
    with pytest.raises(PublishError):
        channel(control).run(WeightsPhase.INIT, collective=broadcast)
    assert control.dismissed == {"b": "it did not answer within 9 s in phase init of version 7"}


def test_who_is_lost_leaves_the_attempt_and_not_the_run() -> None:
    control = Control(a=SHARED, b=LOST, c=SHARED)
    attempt = channel(control)
    with pytest.raises(PublishError, match="b: its connection was lost"):
        attempt.run(WeightsPhase.UPDATE, collective=broadcast)
    assert control.dismissed == {} and attempt.lost == {B}
    control.answers = {"b": LOST}
    again = channel(control)
    again.pause()
    assert again.members == (A, C) and again.lost == {B} and control.dismissed == {}


def test_who_fails_by_itself_in_a_collective_phase_leaves_alone() -> None:
    control = Control(a=SHARED, b=OWN)
    with pytest.raises(PublishError):
        channel(control).run(WeightsPhase.INIT, collective=broadcast)
    assert control.dismissed == {"b": "it failed in phase init of version 7: out of memory"}


def test_when_nobody_answers_a_collective_it_may_be_anybodys_fault() -> None:
    """The next attempt begins with a command that is none, and whose answer decides."""
    control = Control(a=SILENT, b=SILENT, c=SILENT)
    with pytest.raises(PublishError):
        channel(control).run(WeightsPhase.UPDATE, collective=broadcast)
    assert control.dismissed == {}
    with pytest.raises(PublishError, match=r"no actor paused for version 7 \(asked: a, b, c"):
        channel(control).pause()
    assert sorted(control.dismissed) == ["a", "b", "c"]


def test_the_learners_own_broken_collective_fails_the_phase_and_blames_nobody() -> None:
    def collective() -> None:
        raise BrokenTransfer("timed out")

    control = Control()
    with pytest.raises(PublishError, match="learner: timed out"):
        channel(control).run(WeightsPhase.UPDATE, collective=collective)
    assert control.dismissed == {}


def test_those_who_pause_go_on_without_the_others() -> None:
    control = Control(a=SILENT, b=OWN)
    attempt = channel(control)
    attempt.pause()
    assert attempt.members == (C,)
    assert sorted(control.dismissed) == ["a", "b"]


def test_a_phase_reaches_all_members_with_their_payloads() -> None:
    seen: dict[MemberId, dict[str, Any]] = {}

    class Recorder(Control):
        def command(self, phase: WeightsPhase, version: int, payloads: Any, *rest: Any) -> Any:
            seen.update(payloads)
            return super().command(phase, version, payloads, *rest)

    channel(Recorder()).run(WeightsPhase.INIT, {B: {"rank": 2}})
    assert seen == {A: {}, B: {"rank": 2}, C: {}}


@pytest.mark.parametrize("timeout_s", [0.1, 60.0, 3600.0])
def test_whoever_waits_twice_in_a_collective_still_answers_in_time(timeout_s: float) -> None:
    deadlines = Deadlines(timeout_s)
    assert 2 * deadlines.collective_s < deadlines.answer_s < deadlines.thread_s


def test_time_is_booked_once_as_sending_or_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(Control):
        def command(self, *arguments: Any) -> Any:
            answer = super().command(*arguments)
            spend(4.0)  # the actors load it
            return answer

    monkeypatch.setattr("learner.publication.control.time.monotonic", lambda: now)
    attempt = channel(Slow())
    attempt.run(WeightsPhase.UPDATE, collective=lambda: spend(1.0))
    attempt.run(WeightsPhase.FINISH)
    assert attempt.costs == Costs(gather_s=0.0, send_s=1.0, wait_s=8.0)
