"""Who may watch, how often, and what they are told; through the reception, without sockets."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.config import AlgorithmConfig, Config, LearnerConfig, RolloutConfig
from common.fields import MAX_COUNT, MAX_SECONDS
from common.metrics import RunLog
from common.types import Heartbeat, LearnerMessage, Prompt, Ready, Refused, RunStatus, Stop, Watch
from common.wire import decode, encode
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.history import MAX_ALARMS, MAX_STEPS, History
from learner.rollouts.members import state_of
from learner.rollouts.observers import ANSWER_S, FORGET_S, MAX_BEATS, MAX_OBSERVERS
from learner.rollouts.prompts import PromptStream
from learner.rollouts.reception import Reception
from tests.support.fake_actors import FINGERPRINTS, NO_PROBE, heartbeat, hello

CONFIG = Config(
    name="watched",
    rollout=RolloutConfig(prompts_per_step=2, group_size=2),
    algorithm=AlgorithmConfig(critic_warmup_steps=1),
    learner=LearnerConfig(steps=4),
)


def make() -> tuple[Reception, Coordinator]:
    prompts = [Prompt(uid=f"p{i}", text="", reference="") for i in range(5)]
    coordinator = Coordinator(CONFIG, PromptStream(prompts, 0), lambda prompt: [1])
    return Reception(CONFIG, coordinator, FINGERPRINTS, [1, 2], incarnation=3, now=100.0), coordinator


def ask(reception: Reception, identity: bytes, now: float) -> LearnerMessage | None:
    reception.handle(identity, Watch(), now)
    answers = [message for to, message in reception.outgoing() if to == identity]
    assert len(answers) <= 1
    return answers[0] if answers else None


def join(reception: Reception, name: str, now: float) -> None:
    reception.handle(name.encode(), hello(name), now)
    reception.handle(name.encode(), Ready(version=0, probe_logprobs=NO_PROBE), now)
    reception.outgoing()


def test_an_observer_is_told_who_takes_part_and_is_no_member_itself() -> None:
    reception, coordinator = make()
    join(reception, "a", 100.0)
    status = ask(reception, b"observer", 104.0)
    assert isinstance(status, RunStatus)
    assert (status.run, status.incarnation, status.step, status.warmup_steps, status.num_steps) == (
        "watched",
        3,
        0,
        1,
        5,
    )
    assert (status.uptime_s, status.step_age_s, status.remaining_s) == (4.0, 4.0, None)
    assert (status.member_names, status.member_states, status.member_versions) == (("a",), ("idle",), (0,))
    assert status.counters["actors_connected"] == 1
    coordinator.dispatch(104.0)
    assert reception.names == ("a",)
    assert all(to == b"a" for to, _ in reception.outgoing()), "an observer gets no lease"
    assert decode(encode(status), 1 << 20).member_names == ("a",)  # type: ignore[union-attr]


def test_who_asks_too_often_is_counted_and_not_answered() -> None:
    reception, _ = make()
    assert isinstance(ask(reception, b"1", 100.0), RunStatus)
    assert [ask(reception, b"1", 100.0 + i / 100) for i in range(80)] == [None] * 80
    assert reception.observers.num_ignored == 80
    assert isinstance(ask(reception, b"1", 100.0 + ANSWER_S), RunStatus)


def test_a_status_is_made_once_for_all_observers() -> None:
    reception, _ = make()
    first = ask(reception, b"1", 100.0)
    assert ask(reception, b"2", 100.5) is first
    assert ask(reception, b"3", 101.0) is not first


def test_there_are_so_many_observers_until_one_goes_or_is_silent() -> None:
    reception, _ = make()
    for i in range(MAX_OBSERVERS):
        assert isinstance(ask(reception, str(i).encode(), 100.0), RunStatus)
    refused = ask(reception, b"more", 100.0)
    assert isinstance(refused, Refused) and "16 observers watch this run already" in refused.reason
    reception.undeliverable(b"0")
    assert isinstance(ask(reception, b"more", 100.1), RunStatus)
    assert isinstance(ask(reception, b"another", 100.2), Refused)
    assert isinstance(ask(reception, b"another", 100.1 + FORGET_S), RunStatus)


def test_observers_hear_that_the_run_is_over() -> None:
    reception, _ = make()
    ask(reception, b"1", 100.0)
    reception.begin_stop("done")
    assert reception.outgoing() == [(b"1", Stop(reason="done"))]
    assert ask(reception, b"late", 100.0) == Stop(reason="done")


def test_an_actors_rate_is_that_of_its_last_seconds() -> None:
    reception, _ = make()
    join(reception, "a", 100.0)

    def rate(now: float, beat: Heartbeat) -> float:
        reception.handle(b"a", beat, now)
        status = ask(reception, b"1", now)
        assert isinstance(status, RunStatus)
        return float(status.member_tokens_per_s[0])

    assert rate(110.0, heartbeat({}, generated_tokens=1000, uptime_s=10.0)) == 100.0, "since it has started"
    assert rate(112.0, heartbeat({}, generated_tokens=1020, uptime_s=12.0)) == 10.0
    for second in range(13, 30):
        last = rate(100.0 + second, heartbeat({}, generated_tokens=1020 + 50 * (second - 12), uptime_s=float(second)))
    assert last == 50.0


def test_each_state_of_a_member_has_a_word() -> None:
    reception, coordinator = make()
    join(reception, "a", 100.0)
    member = coordinator.member("a")
    states = [state_of(member, 0, 100.0), state_of(member, 1, 100.0)]
    member.held[7] = None
    states.append(state_of(member, 0, 100.0))
    for name, value in (("is_slow", True), ("capacity", 0), ("is_hung", True)):
        setattr(member, name, value)
        states.append(state_of(member, 0, 100.0))
    coordinator.lose("a", "gone")
    states.append(state_of(member, 0, 100.0))
    assert states == ["idle", "updating", "sampling", "too slow", "leaving", "hung", "lost"]


def test_the_course_of_a_run_is_that_of_its_files_and_goes_on(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(1, {"reward/mean": -1.0, "length/mean": 8.0, "time/step_s": 2.0})
        log.log(2, {"reward/mean": 0.0, "length/mean": 9.0, "time/step_s": 4.0, "accuracy/heldout": 0.25})
        log.log(2, {"accuracy/heldout": 0.5})
    history = History(tmp_path)
    course = history.course()
    assert course.step_s == 3.0 and course.done_s is None
    assert course.evaluated_steps.tolist() == [2, 2] and course.accuracies.tolist() == [0.25, 0.5]
    assert course.rewards.tolist() == [-1.0, 0.0] and course.metrics["accuracy/heldout"] == 0.5
    for step in range(3, 3 + MAX_STEPS):
        values = {"reward/mean": 1.0, "length/mean": 9.0, "time/step_s": 6.0, "loss": math.nan, "hist": {1: 2.0}}
        history.add(step, values, float(step))
    course = history.course()
    assert course.step_s == 6.0 and course.done_s == 2.0 + MAX_STEPS
    assert course.rewards.tolist() == [1.0] * MAX_STEPS
    assert set(course.metrics) == {"reward/mean", "length/mean", "time/step_s"}, "what cannot travel is left out"


def test_the_newest_alarms_are_told(tmp_path: Path) -> None:
    lines = [f'{{"step": {i}, "kind": "{"alarm" if i % 2 else "note"}", "text": "text {i}"}}\n' for i in range(20)]
    (tmp_path / "events.jsonl").write_text("".join(lines))
    assert History(tmp_path).course().alarms == tuple(f"text {i}" for i in range(1, 20, 2))[-MAX_ALARMS:]


def test_whatever_actors_count_the_status_is_finite_and_takes_little_memory() -> None:
    reception, _ = make()
    for name in "ab":
        join(reception, name, 100.0)
    most = heartbeat({}, MAX_COUNT, MAX_SECONDS, MAX_SECONDS)
    for turn, beat in enumerate((heartbeat({}, MAX_COUNT, 5e-324, 5e-324), *[most] * 2 * MAX_BEATS)):
        now = 101.0 + turn
        for name in "ab":
            reception.handle(name.encode(), replace(beat), now)
        status = decode(encode(ask(reception, b"1", now)), 1 << 20)
        assert isinstance(status, RunStatus) and np.isfinite(status.member_tokens_per_s).all()
    assert status.counters["uptime_s"] == 2 * MAX_SECONDS
    assert max(map(len, reception.observers._rates.values())) == MAX_BEATS


def test_what_is_told_of_training_can_always_be_sent(tmp_path: Path) -> None:
    reception, _ = make()
    history = History(tmp_path)
    history.add(1, {"reward/mean": math.inf, "length/mean": math.nan, "time/step_s": 1.0}, 101.0)
    reception.observers.course = history.course()
    status = ask(reception, b"1", 103.0)
    assert isinstance(status, RunStatus) and status.step_age_s == 2.0 and status.remaining_s == 5.0
    assert isinstance(decode(encode(status), 1 << 20), RunStatus)
    assert np.isfinite(status.rewards).all()
