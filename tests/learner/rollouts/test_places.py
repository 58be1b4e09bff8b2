"""The shortcuts of the coordinator's turn make the decisions of the slow way: a look at every member, every time."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from common.config import Config, TransportConfig
from common.types import Ack, LearnerMessage, Prompt, Pulse
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.places import Outbox, Places
from learner.rollouts.prompts import PromptStream
from tests.support.fake_actors import NO_PROBE

NAMES = st.sampled_from(["ann", "bob", "cyd", "dot"])


@given(st.lists(st.tuples(NAMES, st.integers(-1, 6))))
def test_most_is_a_member_with_the_most_free_places(changes: list[tuple[str, int]]) -> None:
    places, free = Places(), dict[str, int]()
    for name, number in changes:
        places.set(name, number)
        free[name] = number
        most = places.most()
        assert (0 if most is None else free[most]) == max(0, *free.values())


@given(st.lists(st.tuples(st.sampled_from(["append", "popleft", "discard"]), NAMES, st.integers(0, 9))))
def test_an_outbox_keeps_the_order_of_each_members_messages(calls: list[tuple[str, str, int]]) -> None:
    outbox, expected = Outbox(), dict[str, deque[LearnerMessage]]()
    for call, name, number in calls:
        if call == "append":
            outbox.append(name, Ack(lease_id=number))
            expected.setdefault(name, deque()).append(Ack(lease_id=number))
        elif call == "discard":
            outbox.discard(name)
            expected.pop(name, None)
        elif outbox:
            to, message = outbox.popleft()
            assert expected[to].popleft() == message
        for one in {name for name, _ in outbox} | set(expected):
            assert [message for to, message in outbox if to == one] == list(expected.get(one, ()))
        assert bool(outbox) == any(expected.values())


@given(
    st.lists(
        st.tuples(st.floats(0.0, 3.0), st.sampled_from(["tick", "tick", "tick", "heard", "join", "ready"]), NAMES),
        max_size=40,
    )
)
def test_members_are_looked_at_when_it_is_due_with_the_same_result(events: list[tuple[float, str, str]]) -> None:
    """One coordinator is made to look at every tick; the other decides when."""
    config = Config(transport=TransportConfig(heartbeat_s=1.0, heartbeat_timeout_s=5.0))
    always, when_due = (
        Coordinator(config, PromptStream([Prompt(uid="p", text="", reference="")], seed=0), lambda prompt: [1])
        for _ in range(2)
    )
    now, joined = 0.0, set[str]()
    for passed_s, event, name in events:
        now += passed_s
        for coordinator in (always, when_due):
            if event == "tick":
                coordinator.tick(now)
            elif event == "join":
                coordinator.join(name, 1, now)
            elif name in joined:
                coordinator.heard(name, now)
                if event == "ready" and coordinator.is_joining(name):
                    coordinator.ready(name, 0, NO_PROBE)
        joined |= {name} if event == "join" else set()
        always._check_s = float("-inf")
        assert always.members() == when_due.members()
        nudged, also_nudged = (
            [to for to, message in c.outbox if isinstance(message, Pulse)] for c in (always, when_due)
        )
        assert nudged == also_nudged
