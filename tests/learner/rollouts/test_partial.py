"""What is known of a group before it is complete: what is taken in, what is handed on, what a group must agree with."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import Config, OverAge, RolloutConfig
from common.types import Cancel, DropReason, FinishReason, Lease, LeaseFailed, Prompt, Purpose, Refused, SayHello
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.evaluation import Evaluation
from learner.rollouts.leases import train_lease
from learner.rollouts.partial import Partial
from tests.learner.rollouts.test_coordinator import HELDOUT, finish, granted, ids, make, make_config
from tests.support.fake_actors import NO_PROBE, group, progress

CONFIG = Config(rollout=RolloutConfig(group_size=2, max_tokens=8))


def lease(partial: Partial | None = None) -> Lease:
    return train_lease(CONFIG, 7, Prompt(uid="p", text="", reference=""), [1], partial)


def known(*completions: list[int]) -> Partial:
    partial = Partial(len(completions))
    assert partial.add(progress(7, [0] * len(completions), list(completions)), lease(), "a") is None
    return partial


@settings(deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=2, max_size=2), max_size=6))
def test_what_came_in_pieces_is_handed_on_whole(pieces: list[list[list[int]]]) -> None:
    partial, whole = Partial(2), [[], []]  # type: ignore[var-annotated]
    asked = replace(lease(), max_tokens=100)
    for new in pieces:
        assert partial.add(progress(7, [len(tokens) for tokens in whole], new), asked, "a") is None
        whole = [tokens + more for tokens, more in zip(whole, new, strict=True)]
    prefix = partial.prefix()
    assert prefix["prefix_lengths"].tolist() == [len(tokens) for tokens in whole]
    assert prefix["prefix_token_ids"].tolist() == whole[0] + whole[1]
    assert prefix["prefix_versions"].tolist() == whole[0] + whole[1]
    again = Partial.of_prefix(lease(partial))
    for name, value in prefix.items():
        np.testing.assert_array_equal(again.prefix()[name], value)
        assert getattr(again.prefix()[name], "dtype", None) == getattr(value, "dtype", None)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_what_is_reported_again_is_no_news(tokens: list[int], first: int, again: int) -> None:
    partial = known(tokens[:first], [])
    start = min(again, first, len(tokens))
    assert partial.add(progress(7, [start, 0], [tokens[start:], []]), lease(), "a") is None
    assert partial.prefix()["prefix_token_ids"].tolist() == tokens


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (progress(7, [0], [[1]]), "1 completions instead of 2"),
        (progress(7, [3, 0], [[1], []]), "completion 0 goes on at token 3, but only 2 have come"),
        (progress(7, [2, 0], [[1] * 7, []]), "completion 0 has 9 tokens, the limit is 8"),
        (progress(7, [1, 0], [[5, 1], []]), "completion 0 differs from what was reported of it before"),
        (progress(7, [2, 1], [[], [1]]), "completion 1 goes on after its end"),
        (progress(7, [2, 0], [[], []], ended=(2,)), None),
    ],
)
def test_a_report_that_does_not_fit_is_not_taken(report: Any, words: str | None) -> None:
    partial = known([0, 1], [0])
    assert partial.add(progress(7, [2, 1], [[], []], ended=(1,)), lease(), "a") is None
    problem = partial.add(report, lease(), "a")
    assert problem == words
    assert partial.prefix()["prefix_token_ids"].tolist() == [0, 1, 0]


def test_a_completion_cannot_end_without_a_token() -> None:
    assert Partial(1).add(progress(7, [0], [[]], ended=(0,)), lease(), "a") == "completion 0 has ended without a token"


def test_a_group_must_begin_with_what_was_known_of_it() -> None:
    partial = known([0, 1], [])
    assert partial.problem_with(group(7, [0, 1, 1])) is None
    for other in (
        group(7, [0, 2, 1]),
        replace(group(7, [0, 1, 1]), behavior_logprobs=np.full(6, -1.0, np.float32)),
        replace(group(7, [0, 1, 1]), versions=np.full(6, 1, np.int32)),
        replace(group(7, [0]), finish_reasons=(FinishReason.LENGTH,) * 2),
    ):
        assert partial.problem_with(other) == "completion 0 differs from the 2 tokens that were known of it"
    assert partial.problem_with(group(7, [0])) is None, "a stop string across the end of a prefix is found late"


# ---- in the coordinator


def with_another(coordinator: Coordinator, capacity: int = 100) -> Coordinator:
    coordinator.join("b", capacity, 0.0)
    coordinator.ready("b", 0, NO_PROBE)
    return coordinator


def test_the_next_holder_goes_on_from_what_the_last_one_reported() -> None:
    coordinator = make(make_config(max_staleness=9), "a", capacity=2)
    first, second = granted(coordinator)
    coordinator.progress("a", progress(first[1].lease_id, [0, 0], [[0, 0, 0], [0]], ended=(1,)))
    coordinator.remove("a", "test")
    again = granted(with_another(coordinator, capacity=2))
    assert [lease.prompt_uid for _, lease in again[:2]] == [first[1].prompt_uid, second[1].prompt_uid]
    assert again[0][1].prefix_lengths.tolist() == [3, 1] and again[1][1].prefix_lengths.tolist() == [0, 0]
    assert again[0][1].prefix_finish_reasons == (None, FinishReason.STOP)
    assert coordinator.stats()["prefix_tokens"] == 4
    assert coordinator.stats()["dropped_tokens/actor_lost"] == 0
    coordinator.receive("b", replace(group(again[0][1].lease_id, [0, 0, 0]), token_ids=np.ones(6, np.int32)), 0.0)
    assert coordinator.drops[DropReason.MALFORMED] == 1, "it does not begin with what was handed on"
    coordinator.join("c", 3, 0.0)
    coordinator.ready("c", 0, NO_PROBE)
    ((_, third),) = [item for item in granted(coordinator) if item[1].prompt_uid == first[1].prompt_uid]
    assert third.prefix_lengths.tolist() == [0, 0] and coordinator.stats()["dropped_tokens/malformed"] == 4


def test_a_prompt_that_came_back_keeps_its_turn() -> None:
    """Nothing that happens to actors changes which prompts a batch has."""
    coordinator = make(make_config(max_staleness=3), "a", capacity=3)
    first = granted(coordinator)
    rest = granted(with_another(coordinator))
    finish(coordinator, rest)
    assert coordinator.ledger.take_batch() is None
    coordinator.remove("a", "test")
    again = granted(coordinator)
    assert [lease.lease_id for _, lease in again] == [8, 9, 10]
    finish(coordinator, again)
    batches = [coordinator.ledger.take_batch() for _ in range(4)]
    assert [ids(batch) for batch in batches] == [[8, 9], [10, 3], [4, 5], [6, 7]]
    order = [item.lease.prompt_uid for batch in batches for item in batch or ()]
    assert order == [lease.prompt_uid for _, lease in first + rest]


def test_a_prompt_that_came_back_is_not_overtaken_while_nobody_has_room_for_it() -> None:
    coordinator = make(make_config(max_staleness=3), "a", capacity=1)
    ((_, first),) = granted(coordinator)
    second, third, *rest = granted(with_another(coordinator, capacity=3))
    finish(coordinator, [second, third])
    assert [name for name, _ in granted(coordinator)] == ["b", "b"] and coordinator.ledger.take_batch() is None
    coordinator.remove("a", "test")
    assert granted(coordinator) == [] and coordinator.ledger.take_batch() is None, "it waits for the first prompt"
    finish(coordinator, rest)
    (again,) = granted(coordinator)
    assert again[1].prompt_uid == first.prompt_uid
    finish(coordinator, [again])
    assert ids(coordinator.ledger.take_batch()) == [again[1].lease_id, second[1].lease_id]


@pytest.mark.parametrize(("over_age", "num_kept"), [(OverAge.drop, 0), (OverAge.mask, 2)])
def test_a_prefix_that_would_be_too_old_is_not_handed_on(over_age: OverAge, num_kept: int) -> None:
    """The second prompt is trained in the next step, the fourth in the one after it, one version later."""
    coordinator = make(make_config(max_staleness=1, over_age=over_age), "a", capacity=4)
    leases = granted(coordinator)
    for index in (1, 3):
        coordinator.progress("a", progress(leases[index][1].lease_id, [0, 0], [[0], [0]]))
    coordinator.set_version(1, 0)  # a version without a step: not what the trainer does
    coordinator.remove("a", "test")
    again = granted(with_another(coordinator))
    assert again == []
    coordinator.loaded("b", 1)
    again = granted(coordinator)
    assert again[1][1].prefix_lengths.tolist() == [1, 1]
    assert int(again[3][1].prefix_lengths.sum()) == num_kept
    assert coordinator.stats()["dropped_tokens/stale"] == 2 - num_kept


def test_a_prefix_of_the_version_before_is_young_enough_in_its_old_place() -> None:
    """Behind all others it would be trained one version later, too late."""
    coordinator = make(make_config(max_staleness=1), "a", "b", capacity=2)
    leases = sorted(granted(coordinator), key=lambda item: item[1].lease_id)
    finish(coordinator, leases[:2])
    (name, moved), (other, done) = leases[2:]
    coordinator.progress(name, progress(moved.lease_id, [0, 0], [[0, 0], [0]]))
    assert coordinator.ledger.take_batch() is not None
    for actor in "ab":
        coordinator.loaded(actor, 1)
    coordinator.set_version(1, 1)
    rest = granted(coordinator)
    coordinator.join("c", 100, 0.0)
    coordinator.ready("c", 0, NO_PROBE)
    coordinator.loaded("c", 1)
    coordinator.remove(name, "test")
    again = next(lease for _, lease in granted(coordinator) if lease.prompt_uid == moved.prompt_uid)
    assert again.prefix_lengths.tolist() == [2, 1]
    finish(coordinator, [(other, done), *(item for item in rest if item[0] != name)], versions=(1,))
    versions = [0, 0, 1]
    coordinator.receive("c", group(again.lease_id, versions), 0.0)
    assert again.lease_id in ids(coordinator.ledger.take_batch())
    assert coordinator.drops[DropReason.STALE] == 0


def test_what_a_distrusted_actor_sampled_last_is_not_handed_on() -> None:
    coordinator = make(make_config(), "a", capacity=1)
    coordinator.loaded("a", 1)
    coordinator.set_version(1, 0)
    ((_, lease),) = granted(coordinator)
    coordinator.progress("a", progress(lease.lease_id, [0, 0], [[0, 1], [0]]))
    coordinator.distrust("a", 1)
    coordinator.remove("a", "wrong weights")
    with_another(coordinator)
    coordinator.loaded("b", 1)
    assert granted(coordinator)[0][1].prefix_lengths.tolist() == [0, 0]
    assert coordinator.stats()["dropped_tokens/actor_lost"] == 3


@pytest.mark.parametrize("purpose", [Purpose.TRAIN, Purpose.EVAL])
@pytest.mark.parametrize("where", ["waits", "is out", "has come"])
def test_what_a_distrusted_actor_reported_is_given_up_wherever_it_is_by_then(where: str, purpose: Purpose) -> None:
    """`a` left long ago; `b` may have gone on from its tokens, in good faith, and is told to stop."""
    coordinator = make(make_config(), "a", capacity=1)
    if purpose is Purpose.EVAL:
        coordinator.ledger.evaluate(Evaluation(HELDOUT[:1], 2, 1.0, version=0))
    ((_, first),) = granted(coordinator)
    assert first.purpose is purpose
    coordinator.progress("a", progress(first.lease_id, [0, 0], [[0, 0, 0], [0]]))
    coordinator.remove("a", "as asked")
    num_drawn = 4
    if where != "waits":
        (second,) = [one for _, one in granted(with_another(coordinator)) if one.prompt_uid == first.prompt_uid]
        coordinator.progress("b", progress(second.lease_id, [3, 1], [[0], [0]]))
        num_drawn += 2
    if where == "has come":
        coordinator.receive("b", group(second.lease_id, [0, 0, 0, 0]), 0.0)
        coordinator.outbox.clear()
        num_drawn += 2
    coordinator.distrust("other", 0)
    coordinator.distrust("a", 1)
    assert coordinator.stats()["dropped_tokens/actor_lost"] == 0, "what others drew, and at other versions, is good"
    coordinator.distrust("a", 0)
    told = [message for _, message in coordinator.outbox]
    assert told == ([Cancel(lease_id=second.lease_id)] if where == "is out" else [])
    assert coordinator.stats()["dropped_tokens/actor_lost"] == num_drawn
    coordinator.join("c", 1, 0.0)
    coordinator.ready("c", 0, NO_PROBE)
    again = [one for _, one in granted(coordinator) if one.prompt_uid == first.prompt_uid]
    assert [one.prefix_lengths.tolist() for one in again] == [[0, 0]]


def test_tokens_of_a_lease_that_failed_are_not_handed_on() -> None:
    coordinator = make(make_config(), "a", capacity=1)
    ((_, lease),) = granted(coordinator)
    coordinator.progress("a", progress(lease.lease_id, [0, 0], [[0], [0]]))
    coordinator.fail("a", LeaseFailed(lease_id=lease.lease_id, reason="no"), 0.0)
    assert granted(coordinator, now=5.0)[0][1].prefix_lengths.tolist() == [0, 0]
    assert coordinator.stats()["dropped_tokens/failed"] == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: replace(p, token_ids=np.full_like(p.token_ids, -1)),
        lambda p: replace(p, versions=np.full_like(p.versions, 9)),
        lambda p: replace(p, behavior_logprobs=np.full_like(p.behavior_logprobs, np.nan)),
        lambda p: progress(p.lease_id, [3], [[0, 0]]),
    ],
)
def test_progress_that_cannot_be_is_refused_and_the_lease_goes_on(spoil: Any) -> None:
    coordinator = make(make_config(), "a", capacity=1)
    ((_, lease),) = leases = granted(coordinator)
    coordinator.progress("a", spoil(progress(lease.lease_id, [0, 0], [[0], [0]])))
    assert [type(message) for _, message in coordinator.outbox] == [Refused]
    assert coordinator.stats()["dropped_tokens/malformed"] == 2
    finish(coordinator, leases)
    assert coordinator.stats()["buffered_groups"] == 1


def test_progress_before_which_some_got_lost_asks_for_a_greeting_and_is_no_malformed_message() -> None:
    """The greeting's answer lets the actor report from the beginning."""
    coordinator = make(make_config(), "a", capacity=1)
    ((_, lease),) = granted(coordinator)
    coordinator.progress("a", progress(lease.lease_id, [0, 1], [[0], [0]]))
    assert [type(message) for _, message in coordinator.outbox] == [SayHello]
    assert coordinator.stats()["dropped_tokens/malformed"] == 0
    coordinator.progress("a", progress(lease.lease_id, [0, 0], [[0], [0, 0]]))
    coordinator.remove("a", "test")
    assert granted(with_another(coordinator))[0][1].prefix_lengths.tolist() == [1, 2]


def test_a_prefix_with_tokens_of_a_version_on_its_way_makes_no_group_of_another_actor_malformed() -> None:
    """The one who drew them was resumed while the learner still waited for others."""
    coordinator = make(make_config(), "a", capacity=1)
    ((_, lease),) = granted(coordinator)
    coordinator.updating("a", 1)
    coordinator.progress("a", progress(lease.lease_id, [0, 0], [[0, 1], [0]]))
    coordinator.remove("a", "test")
    again = granted(with_another(coordinator))[0][1]
    assert again.prefix_versions.tolist() == [0, 1, 0]
    coordinator.receive("b", group(again.lease_id, [0, 1]), 0.0)
    assert coordinator.drops == {DropReason.ACTOR_LOST: 1} and coordinator.stats()["buffered_groups"] == 1


def test_progress_of_a_lease_that_was_taken_away_is_not_wanted() -> None:
    coordinator = make(make_config(), "a", capacity=1)
    coordinator.progress("a", progress(5, [0], [[0]]))
    assert not coordinator.outbox


def test_evaluation_goes_on_from_what_was_sampled_too() -> None:
    coordinator = make(make_config(), "a", capacity=3)
    coordinator.ledger.evaluate(Evaluation(HELDOUT, 2, 1.0, version=0))
    leases = granted(coordinator)
    coordinator.progress("a", progress(leases[1][1].lease_id, [0, 0], [[0, 0], [0]]))
    coordinator.remove("a", "test")
    again = granted(with_another(coordinator))
    assert [lease.prompt_uid for _, lease in again[:3]] == ["h0", "h1", "h2"]
    assert again[1][1].prefix_lengths.tolist() == [2, 1]
    finish(coordinator, again[:3], versions=(0, 0, 0))
    assert coordinator.ledger.poll_evaluation() is not None
