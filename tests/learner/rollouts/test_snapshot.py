"""What a resume finds of the data side: everything that was sampled, once, in its place; and what it samples again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import wire
from common.config import Config, ConfigError, RewardConfig
from common.types import (
    CompletedGroup,
    DropReason,
    FinishReason,
    Lease,
    LeaseFailed,
    Progress,
    Prompt,
    Purpose,
    TrajectoryGroup,
)
from learner.rollouts.archive import ArchiveError, as_groups, as_messages, read_archive, write_archive
from learner.rollouts.coordinator import Coordinator
from learner.rollouts.evaluation import Evaluation
from learner.rollouts.prompts import PromptStream
from learner.rollouts.snapshot import Snapshot, read_snapshot, restore, take, write_snapshot
from tests.learner.rollouts.test_coordinator import (
    HELDOUT,
    PROMPTS,
    finish,
    granted,
    ids,
    logprobs_of,
    make,
    make_config,
)
from tests.support.fake_actors import NO_PROBE, group, progress


def through_a_file(coordinator: Coordinator, path: Path, now: float = 0.0) -> Snapshot:
    write_snapshot(path, take(coordinator, now), {"the caller's": 1})
    kept, about = read_snapshot(path, now)
    assert about == {"the caller's": 1}
    return kept


def resumed(kept: Snapshot, config: Config, prompts: list[Prompt] = PROMPTS) -> Coordinator:
    coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
    restore(coordinator, kept)
    coordinator.join("b", 100, 0.0)
    coordinator.ready("b", 0, NO_PROBE)
    return coordinator


def uids(leases: list[tuple[str, Lease]]) -> list[str]:
    return [lease.prompt_uid for _, lease in leases]


def test_finished_groups_keep_their_place_and_only_the_others_are_sampled_again(tmp_path: Path) -> None:
    config = make_config(max_staleness=1, publish_every=2)
    coordinator = make(config, "a", capacity=7)
    leases = granted(coordinator)
    finish(coordinator, [leases[i] for i in (0, 1, 3, 4, 6)], versions=(0, 0, 0))
    assert ids(coordinator.ledger.take_batch()) == [0, 1]
    coordinator.set_version(0, 1)
    received = coordinator.stats()["received_groups"]

    restarted = resumed(through_a_file(coordinator, tmp_path / "kept"), config)
    restarted.loaded("b", 0)
    assert restarted.ledger.take_batch() is None, "its first prompt was in flight"
    again = granted(restarted)
    assert uids(again)[:2] == uids([leases[2], leases[5]])
    assert restarted.stats()["buffered_groups"] == 3 and restarted.ledger.admitted == 8
    assert min(lease.lease_id for _, lease in again) == 1 << 20, "late groups of the old run are known"
    finish(restarted, again)
    batches = [restarted.ledger.take_batch() for _ in range(3)]
    assert [g.lease.prompt_uid for batch in batches for g in batch or ()] == uids(leases[2:]) + uids(again[2:])
    order = [g.lease.lease_id for batch in batches for g in batch or ()]
    assert order == sorted(order)
    kept = (batches[0] or [])[1]
    assert (kept.actor, kept.completed.lengths.tolist()) == ("a", [3, 3])
    assert restarted.stats()["received_groups"] == received + 3, "each is counted once"


def test_a_resume_without_an_actor_trains_what_was_finished(tmp_path: Path) -> None:
    coordinator = make(make_config(), "a")
    finish(coordinator, granted(coordinator))
    restarted = Coordinator(make_config(), PromptStream(PROMPTS, seed=0), lambda prompt: [1])
    restore(restarted, through_a_file(coordinator, tmp_path / "kept"))
    restarted.dispatch(0.0)
    batch = restarted.ledger.take_batch()
    assert batch is not None and [g.lease.prompt_uid for g in batch] == [g.prompt_uid for g in _drawn(2)]


def sample_steps(coordinator: Coordinator, steps: int, failing: str | None = None) -> list[list[str]]:
    """Prompts of so many steps; `failing` cannot be sampled at its first lease."""
    trained, version = [], coordinator.ledger.version
    for _ in range(steps):
        while (batch := coordinator.ledger.take_batch()) is None:
            for name, lease in granted(coordinator, now=1e6 * (version + 1)):
                if lease.prompt_uid == failing:
                    coordinator.fail(name, LeaseFailed(lease_id=lease.lease_id, reason="once"), 0.0)
                    failing = None
                else:
                    coordinator.receive(name, group(lease.lease_id, [version], 2), 0.0)
        trained.append([one.lease.prompt_uid for one in batch])
        version += 1
        coordinator.set_version(version, version)
        for name in coordinator.members():
            coordinator.loaded(name, version)
    return trained


@pytest.mark.parametrize("place", [4, 7])
def test_a_prompt_that_failed_is_trained_in_the_same_step_after_a_resume(tmp_path: Path, place: int) -> None:
    config = make_config(prompts_per_step=4, max_staleness=1)
    prompts = [Prompt(uid=f"q{i}", text="", reference="") for i in range(100)]
    stream = PromptStream(prompts, seed=0)
    failing = [stream.next().uid for _ in range(8)][place]

    def begin() -> Coordinator:
        coordinator = Coordinator(config, PromptStream(prompts, seed=0), lambda prompt: [1])
        coordinator.join("a", 8, 0.0)
        coordinator.ready("a", 0, NO_PROBE)
        return coordinator

    undisturbed = sample_steps(begin(), 4, failing)
    before = begin()
    first = sample_steps(before, 1, failing)
    after = resumed(through_a_file(before, tmp_path / "kept"), config, prompts)
    after.loaded("b", 1)
    assert first + sample_steps(after, 3) == undisturbed
    assert failing in {uid for step in undisturbed[1:] for uid in step}


def test_groups_of_a_checkpoint_are_not_those_of_a_process_that_has_their_actors_name_now(tmp_path: Path) -> None:
    """Its weights are wrong; theirs were judged before they were kept."""
    coordinator = make(make_config(), "b")
    finish(coordinator, granted(coordinator)[:2], versions=(0, 0))
    after = resumed(through_a_file(coordinator, tmp_path / "kept"), make_config())
    after.ledger.buffer_finished(0.0)
    (third, _), *_ = [(lease, name) for name, lease in granted(after) if lease.purpose is Purpose.TRAIN]
    after.receive("b", group(third.lease_id, [0, 0]), 1.0)
    assert after.ledger.num_buffered == 3
    after.distrust("b", 0)
    assert after.ledger.num_buffered == 2 and after.drops[DropReason.ACTOR_LOST] == 1


def half_sampled() -> tuple[Coordinator, list[tuple[str, Lease]]]:
    """Four leases: one finished, one with tokens of two versions, one with none, one whose first response has ended."""
    coordinator = make(make_config(max_staleness=3), "a", capacity=4)
    leases = granted(coordinator)
    finish(coordinator, leases[:1])
    coordinator.progress("a", reported(leases[1], [0, 0], [[11, 12], [13]], versions=[0, 0, 0]))
    coordinator.loaded("a", 1)
    coordinator.set_version(1, 0)
    coordinator.progress("a", reported(leases[1], [2, 1], [[14], [15, 16]], versions=[1, 1, 1]))
    coordinator.progress("a", reported(leases[3], [0, 0], [[17], []], versions=[1], ended=(0,)))
    return coordinator, leases


def reported(
    item: tuple[str, Lease], starts: list[int], new: list[list[int]], versions: list[int], ended: tuple[int, ...] = ()
) -> Progress:
    """Tokens and versions that tell where they have to be, and log-probs that follow from the tokens."""
    told = progress(item[1].lease_id, starts, new, ended)
    return replace(told, versions=np.array(versions, np.int32), behavior_logprobs=logprobs_of(told.token_ids))


def test_leases_start_from_the_tokens_that_were_reported_before_the_checkpoint(tmp_path: Path) -> None:
    coordinator, leases = half_sampled()
    restarted = resumed(through_a_file(coordinator, tmp_path / "kept"), coordinator.ledger.config)
    restarted.loaded("b", 1)
    again = granted(restarted)
    assert uids(again)[:3] == uids(leases[1:]) and restarted.stats()["buffered_groups"] == 1
    begun, untouched, ended = (lease for _, lease in again[:3])
    assert begun.prefix_lengths.tolist() == [3, 3]
    assert begun.prefix_token_ids.tolist() == [11, 12, 14, 13, 15, 16]
    assert begun.prefix_behavior_logprobs.tolist() == logprobs_of(begun.prefix_token_ids).tolist()
    assert begun.prefix_versions.tolist() == [0, 0, 1, 0, 1, 1]
    assert begun.prefix_finish_reasons == (None, None)
    assert untouched.prefix_token_ids.tolist() == []
    assert (ended.prefix_token_ids.tolist(), ended.prefix_versions.tolist()) == ([17], [1])
    assert ended.prefix_finish_reasons == (FinishReason.STOP, None)
    assert restarted.stats()["prefix_tokens"] == 7
    once_more = resumed(through_a_file(restarted, tmp_path / "kept"), coordinator.ledger.config)
    once_more.loaded("b", 1)
    assert granted(once_more)[0][1].prefix_token_ids.tolist() == begun.prefix_token_ids.tolist()


def test_tokens_of_what_is_asked_for_otherwise_now_are_counted_and_not_handed_on(tmp_path: Path) -> None:
    coordinator, leases = half_sampled()
    kept = through_a_file(coordinator, tmp_path / "kept")
    restarted = resumed(kept, _longer(coordinator.ledger.config))
    restarted.loaded("b", 1)
    again = granted(restarted)
    assert uids(again)[:4] == uids(leases)
    assert [len(lease.prefix_token_ids) for _, lease in again[:4]] == [0] * 4
    assert restarted.stats()["dropped_tokens/changed"] == 2 + 7, "of the finished group too"


def _drawn(count: int) -> list[Lease]:
    return [lease for _, lease in granted(make(make_config(), "a"))][:count]


def test_a_finished_group_that_is_too_old_after_all_is_sampled_again(tmp_path: Path) -> None:
    coordinator = make(make_config(max_staleness=1), "a")
    leases = granted(coordinator)
    finish(coordinator, leases)
    coordinator.ledger.take_batch()
    coordinator.set_version(1, 1)
    restarted = resumed(through_a_file(coordinator, tmp_path / "kept"), make_config(max_staleness=0))
    restarted.loaded("b", 1)
    granted(restarted)
    assert restarted.ledger.take_batch() is None
    assert restarted.drops[DropReason.STALE] == 2
    assert uids(granted(restarted)) == uids(leases[2:4])


def _longer(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, max_tokens=9))


def _larger_groups(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, group_size=3))


def _other_rewards(config: Config) -> Config:
    return replace(config, reward=RewardConfig(wrong=0.0))


def _other_verifier(config: Config) -> Config:
    return replace(config, verifier=replace(config.verifier, function="mine:verify"))


@pytest.mark.parametrize("change", [_longer, _larger_groups, _other_rewards, _other_verifier])
def test_groups_that_are_not_what_is_asked_for_now_are_counted_and_sampled_again(
    tmp_path: Path, change: Callable[[Config], Config]
) -> None:
    coordinator = make(make_config(), "a")
    leases = granted(coordinator)
    finish(coordinator, leases[:3])
    restarted = resumed(through_a_file(coordinator, tmp_path / "kept"), change(make_config()))
    assert restarted.drops[DropReason.CHANGED] == 3
    assert uids(granted(restarted)) == uids(leases)


def test_only_the_group_whose_reference_was_corrected_is_sampled_again(tmp_path: Path) -> None:
    coordinator = make(make_config(), "a")
    leases = granted(coordinator)
    finish(coordinator, leases)
    prompts = [replace(p, reference="2") if p.uid == leases[1][1].prompt_uid else p for p in PROMPTS]
    restarted = resumed(through_a_file(coordinator, tmp_path / "kept"), make_config(), prompts)
    assert uids(granted(restarted)) == [leases[1][1].prompt_uid]
    assert restarted.drops[DropReason.CHANGED] == 1


def test_groups_of_another_version_of_the_program_are_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = make(make_config(), "a")
    leases = granted(coordinator)
    finish(coordinator, leases)
    write_snapshot(tmp_path / "kept", take(coordinator, 0.0), None)
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", wire.PROTOCOL_VERSION + 1)
    restarted = resumed(read_snapshot(tmp_path / "kept", 0.0)[0], make_config())
    assert "holds groups of another version of the program: protocol version" in caplog.text
    assert restarted.drops[DropReason.CHANGED] == len(leases)
    assert uids(granted(restarted)) == uids(leases)


def test_a_checkpoint_of_other_data_is_refused() -> None:
    coordinator = make(make_config(), "a")
    granted(coordinator)
    kept = take(coordinator, 0.0)

    def into(prompts: list[Prompt]) -> None:
        restore(Coordinator(make_config(), PromptStream(prompts, seed=0), lambda prompt: [1]), kept)

    with pytest.raises(ConfigError, match="7 training prompts, now there are 3"):
        into(PROMPTS[:3])
    with pytest.raises(ConfigError, match=r"other training prompts, although as many \(7\)"):
        into([replace(prompt, text=f"{prompt.text}?") for prompt in PROMPTS])
    with pytest.raises(ConfigError, match="before the first actor"):
        restore(make(make_config(), "a"), kept)


# ---- an evaluation under way


def evaluated(temperature: float = 1.0, version: int = 0, now: float = 0.0) -> Evaluation:
    return Evaluation(HELDOUT, 2, temperature, version, started_s=now)


def test_an_evaluation_goes_on_with_what_it_had_and_the_same_seeds(tmp_path: Path) -> None:
    coordinator = make(make_config(), "a", capacity=2)
    coordinator.ledger.evaluate(evaluated(now=100.0))
    first, second = granted(coordinator)
    finish(coordinator, [first], num_correct=2)
    kept = through_a_file(coordinator, tmp_path / "kept", now=130.0)

    restarted = resumed(kept, make_config())
    restarted.ledger.evaluate(evaluated(now=5.0), kept.evaluation)
    leases = [item for item in granted(restarted) if item[1].purpose is Purpose.EVAL]
    assert uids(leases) == [second[1].prompt_uid, HELDOUT[2].uid]
    assert leases[0][1].seed == second[1].seed
    for name, lease in leases:
        restarted.receive(name, group(lease.lease_id, [0], num_correct=0), 7.0)
    result = restarted.ledger.poll_evaluation()
    assert result is not None
    assert (result.num_samples, result.accuracy, result.num_prompts) == (6, pytest.approx(1 / 3), 3)
    assert result.seconds == pytest.approx(32.0), "the time in between does not count"


def test_an_evaluation_that_was_done_but_not_asked_for_is_answered_after_the_resume(tmp_path: Path) -> None:
    coordinator = make(make_config(), "a")
    coordinator.ledger.evaluate(evaluated())
    finish(coordinator, granted(coordinator))
    kept = through_a_file(coordinator, tmp_path / "kept")
    restarted = resumed(kept, make_config())
    restarted.ledger.evaluate(evaluated(), kept.evaluation)
    result = restarted.ledger.poll_evaluation()
    assert result is not None and result.num_samples == 6


def test_an_evaluation_with_other_settings_starts_again_of_the_present_version(tmp_path: Path) -> None:
    coordinator = make(make_config(), "a", capacity=2)
    coordinator.ledger.evaluate(evaluated())
    finish(coordinator, granted(coordinator))
    coordinator.set_version(3, 3)
    kept = through_a_file(coordinator, tmp_path / "kept")
    restarted = resumed(kept, make_config())
    restarted.loaded("b", 3)
    evaluation = evaluated(temperature=0.5)
    restarted.ledger.evaluate(evaluation, kept.evaluation)
    leases = [item for item in granted(restarted) if item[1].purpose is Purpose.EVAL]
    assert uids(leases) == [prompt.uid for prompt in HELDOUT]
    assert evaluation.version == 3


# ---- the file

TEXT = st.text(max_size=5).filter(lambda text: text.isascii())


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=4),
    reference=TEXT,
    data=st.data(),
)
def test_groups_come_back_as_they_were_and_any_damage_is_found(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], reference: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "archive"
    groups = [sampled(i, lengths, reference) for i, lengths in enumerate(sizes)]
    write_archive(path, {"n": len(groups)}, as_messages(groups))
    about, messages = read_archive(path)
    found = as_groups(messages, ["a"] * len(groups), arrived_s=0.0)
    assert about == {"n": len(groups)} and len(found) == len(groups)
    for before, after in zip(groups, found, strict=True):
        assert (before.lease.reference, before.lease.row) == (after.lease.reference, after.lease.row)
        for name in ("lengths", "token_ids", "behavior_logprobs", "versions", "rewards"):
            np.testing.assert_array_equal(getattr(before.completed, name), getattr(after.completed, name))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ArchiveError):
        read_archive(path)


def sampled(lease_id: int, lengths: list[int], reference: str) -> TrajectoryGroup:
    draw, total = np.random.default_rng(lease_id), sum(lengths)
    one = group(lease_id, [0], num_samples=len(lengths))
    completed = replace(
        one,
        lengths=np.array(lengths, np.int32),
        token_ids=draw.integers(0, 100, total).astype(np.int32),
        behavior_logprobs=-draw.random(total).astype(np.float32),
        versions=draw.integers(0, 9, total).astype(np.int32),
    )
    assert isinstance(completed, CompletedGroup)
    prompt = Prompt(uid="p", text="", reference=reference, row={"of": [1, None, "x"]})
    lease = Lease(
        lease_id=lease_id,
        purpose=Purpose.TRAIN,
        prompt_uid=prompt.uid,
        prompt_token_ids=np.arange(3, dtype=np.int32),
        reference=prompt.reference,
        row=prompt.row,
        num_samples=len(lengths),
        seed=1,
        temperature=1.0,
        max_tokens=8,
    )
    return TrajectoryGroup(lease=lease, actor="a", completed=completed, arrived_s=0.0)
