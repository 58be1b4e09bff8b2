"""The run in one process that the tables of benchmarks/ are made of."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.miniature import jobs
from benchmarks.miniature.run import Job, Miniature, Outcome, Point, train

JOB = Job(
    table="test",
    row="vapo",
    seed=3,
    recipes=("number_walk",),
    settings=(
        "model.path=configs/models/contrary_walk",
        "rollout.prompts_per_step=3",
        "rollout.group_size=4",
        "learner.mini_batches=2",
        "algorithm.critic_warmup_steps=2",
    ),
    age=2,
    steps=3,
    evaluate_every=2,
    prompts=4,
    samples=2,
)


def test_tokens_have_the_log_probs_that_the_learner_finds() -> None:
    """At another temperature than 1, with prompts of several lengths and responses that leave the cache early."""
    settings = ("model.path=configs/models/chain_sum", "rollout.temperature=0.8", "rollout.max_tokens=100")
    job = replace(
        JOB, recipes=("number_walk",), settings=("task.name=chain_sum", *settings, "rollout.prompts_per_step=6")
    )
    run = Miniature(job.config(), 0)
    batch = run.batch()
    assert len(set(batch.prompt_lengths_B.tolist())) > 1 and len(set(batch.response_lengths_B.tolist())) > 3
    with torch.no_grad():
        logprobs_T, _ = run.policy(batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B, 0.8)
    torch.testing.assert_close(logprobs_T, batch.behavior_logprobs_T, atol=1e-4, rtol=0)
    ends_T = batch.response_ids_T == run.sampler.tokenizer.eos_token_id
    last = batch.response_cu_seqlens_B1[1:] - 1
    assert ends_T[last].equal(~batch.is_truncated_B) and ends_T.sum() == ends_T[last].sum()


def test_batches_are_as_old_as_asked() -> None:
    run = Miniature(JOB.config(), JOB.age)
    run.pretrain()
    ages = []
    for _ in range(5):
        ages.append(run.version - int(run.batch().versions_T.max()))
        run.policy_step()
    assert ages == [0, 1, 2, 2, 2]


def test_a_run_repeats_itself_and_shares_a_critic(tmp_path: Path) -> None:
    job = replace(JOB, reuses_critic=True)
    first, second = train(job, tmp_path), train(job, tmp_path)
    assert [point.accuracy for point in first.points] == [point.accuracy for point in second.points]
    assert [point.step for point in first.points] == [0, 2, 3]
    assert first.pretraining_tokens == second.pretraining_tokens > 0 and first.points[-1].tokens > 0
    assert len(list(tmp_path.glob("*.pt"))) == 1
    other = train(replace(job, settings=(*job.settings, "algorithm.critic_warmup_steps=1")), tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 2 and other.pretraining_tokens < first.pretraining_tokens


def test_a_critic_can_be_that_of_other_settings_and_of_another_seed(tmp_path: Path) -> None:
    """A run with groups of one trains the critic that was pretrained on groups of four."""
    alone = ("rollout.prompts_per_step=12", "rollout.group_size=1")
    job = replace(JOB, reuses_critic=True, critic_recipes=JOB.recipes, critic_settings=JOB.settings)
    tokens = [train(job, tmp_path).pretraining_tokens]
    tokens.append(train(replace(job, settings=(*job.settings, *alone)), tmp_path).pretraining_tokens)
    assert tokens[0] == tokens[1] and len(list(tmp_path.glob("*.pt"))) == 1
    tokens.append(train(replace(job, critic_seed=job.critic_seed + 1), tmp_path).pretraining_tokens)
    assert tokens[2] != tokens[0] and len(list(tmp_path.glob("*.pt"))) == 2


def test_dynamic_sampling_leaves_groups_out_that_are_all_right_or_all_wrong() -> None:
    settings = tuple(setting for setting in JOB.settings if "critic" not in setting)
    run = Miniature(replace(JOB, recipes=("number_walk", "dapo"), settings=settings, age=0).config(), 0)
    run.config = replace(run.config, rollout=replace(run.config.rollout, group_size=2, prompts_per_step=4))
    batch = run.batch()
    assert batch.rewards_B.view(4, 2).std(1).min() > 0
    assert run.tokens > batch.num_response_tokens


def test_jobs_are_made_once_and_outlive_a_line_that_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs.jsonl"
    outcome = Outcome(
        points=[Point(step=0, accuracy=0.25, tokens=0, cpu_s=0.0, metrics={"policy/entropy": 0.5})],
        alarms=[(1, "ess")],
        pretraining_tokens=10,
        pretraining_cpu_s=1.0,
        failure=None,
    )
    jobs.append(out, JOB, outcome, "abc1234", 12.5)
    with out.open("a") as file:
        file.write('{"job": {"table": "te')
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", None)  # nothing is left to run
    assert jobs.run_jobs([JOB], out, [0], tmp_path) == {JOB: outcome}
    assert jobs.read(out).keys() == {JOB}
