"""Whole runs of the baselines and of stacked ablations through the command line, two policy steps each.

The actors sample from the learner's own network (tests/support/sampling_engine.py), which is up in a second: what a
recipe does is the learner's part. DAPO, which asks most of the actors, runs with vLLM.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import Aggregation, Config
from common.loading import read_config
from learner.rollouts.leases import LEASES_PER_LIFE
from tests.support.runs import ROOT, processes_of, rows

pytestmark = pytest.mark.slow

SMALL = [
    "learner.steps=2",
    "learner.mini_batches=2",
    "learner.policy.learning_rate=1e-4",
    "learner.policy.warmup_steps=1",
    "eval.every=0",
    "eval.num_prompts=8",
    "eval.samples_per_prompt=1",
    "task.num_train=400",
    "task.num_heldout=16",
]


def train(
    tmp_path: Path, recipes: list[str], *overrides: str, with_vllm: bool = False
) -> tuple[Config, list[dict[str, Any]]]:
    """A run of `recipes` on number_walk that must end well: its resolved configuration and the rows of its steps."""
    files = [argument for name in ("number_walk", *recipes) for argument in ("-c", name)]
    program = [str(ROOT / "run.py")] if with_vllm else ["-m", "tests.support.forked_train"]
    command = [sys.executable, *program, "train", *files, f"runs_dir={tmp_path}", "name=run", *SMALL, *overrides]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"SAMPLE": "1"},
        capture_output=True,
        text=True,
        timeout=240.0,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert processes_of(tmp_path) == []
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["accuracy/heldout"] is not None
    steps = [row for row in metrics if "time/step_s" in row]
    assert all(row["policy/grad_norm"] > 0 for row in steps if row["policy/updates"])
    return read_config(tmp_path / "run" / "config.yaml"), steps


def groups_of(tmp_path: Path, num_steps: int, prompts_per_step: int, group_size: int) -> list[dict[str, Any]]:
    """The ledger of a run, which must have whole steps of whole groups, taken in the order of their leases."""
    ledger = rows(tmp_path / "run" / "ledger.jsonl")
    assert [row["step"] for row in ledger] == [s for s in range(1, num_steps + 1) for _ in range(prompts_per_step)]
    assert {len(row["rewards"]) for row in ledger} == {group_size}
    lease_ids = [row["lease_id"] for row in ledger]
    assert lease_ids == sorted(set(lease_ids))  # no lease is passed over because another one finished early
    return ledger


def names_of(steps: list[dict[str, Any]], prefix: str) -> set[str]:
    return {name for row in steps for name in row if name.startswith(prefix)}


def test_ppo_has_a_critic_one_lambda_single_responses_and_no_warmup(tmp_path: Path) -> None:
    config, steps = train(tmp_path, ["ppo"], "rollout.prompts_per_step=24")
    assert config.algorithm.aggregation is Aggregation.sequence
    assert config.algorithm.clip_high == config.algorithm.clip_low == 0.2
    groups_of(tmp_path, num_steps=2, prompts_per_step=24, group_size=1)
    assert [row["version"] for row in steps] == [1, 2]  # the first step publishes: no value pretraining
    for row in steps:
        assert row["critic/updates"] == row["policy/updates"] == 2
        assert row["gae/lambda_min"] == row["gae/lambda_mean"] == pytest.approx(0.95)
        assert "policy/lm_loss" not in row
    assert steps[0]["critic/value_max"] == steps[0]["critic/value_min"] == 0  # an untrained critic ...
    assert steps[1]["critic/value_max"] > steps[1]["critic/value_min"]  # ... that has begun to learn


def test_grpo_has_no_critic_and_normalises_within_groups(tmp_path: Path) -> None:
    config, steps = train(tmp_path, ["grpo"], "rollout.prompts_per_step=8", "rollout.group_size=3")
    assert config.algorithm.aggregation is Aggregation.sequence
    groups = groups_of(tmp_path, num_steps=2, prompts_per_step=8, group_size=3)
    assert_no_critic(tmp_path, steps)
    for row in steps:
        assert row["drops/uninformative"] == 0  # groups without a signal are kept
        assert row["policy/updates"] == 2
        # of three rewards of two kinds, the odd one is 2 / sqrt(3) standard deviations (n - 1) from their mean
        assert row["gae/advantage_abs_max"] == pytest.approx(2 / 3**0.5, abs=1e-3)
    assert any(len(set(row["rewards"])) == 1 for row in groups)


@pytest.mark.vllm
def test_dapo_replaces_groups_without_a_signal(tmp_path: Path) -> None:
    config, steps = train(tmp_path, ["dapo"], "rollout.prompts_per_step=6", "rollout.group_size=2", with_vllm=True)
    assert config.algorithm.aggregation is Aggregation.token
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == (0.2, 0.28)
    groups = groups_of(tmp_path, num_steps=2, prompts_per_step=6, group_size=2)
    assert all(sorted(row["rewards"]) == [-1.0, 1.0] for row in groups)  # one right, one wrong
    assert len({row["prompt_uid"] for row in groups}) == 12  # a prompt that was replaced does not come back
    assert_no_critic(tmp_path, steps)
    replaced = [row["drops/uninformative"] for row in steps]
    assert replaced == sorted(replaced)
    assert replaced[-1] > 0
    for row in steps:
        assert row["reward/solved_group_fraction"] == row["reward/unsolved_group_fraction"] == 0
        assert row["reward/mean"] == 0
    # Every lease is trained, replaced or one of the evaluations before training and (after all the others) at the end.
    assert groups[-1]["lease_id"] % LEASES_PER_LIFE < 8 + replaced[-1] + len(groups)
    assert sum(row[name] for row in steps[-1:] for name in names_of(steps, "drops/")) == replaced[-1]


def assert_no_critic(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    """Neither in the metrics nor in the checkpoint, and no step is spent on its warm-up."""
    assert [row["version"] for row in steps] == [1, 2]
    assert names_of(steps, "critic/") == {"critic/updates", "critic/skipped_updates"}
    assert not any(row["critic/updates"] or row["critic/skipped_updates"] for row in steps)
    assert names_of(steps, "gae/lambda") == set()
    state = (tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json").read_text()
    assert '"policy/' in state and '"critic/' not in state


def test_ablations_stack(tmp_path: Path) -> None:
    """All but value pretraining and group sampling, which tells the run from VAPO and from PPO alike."""
    names = (
        "no_clip_higher",
        "no_decoupled_gae",
        "no_length_adaptive_gae",
        "no_positive_lm_loss",
        "no_token_level_loss",
    )
    config, steps = train(
        tmp_path,
        ["vapo", *(f"ablations/{name}" for name in names)],
        "rollout.prompts_per_step=6",
        "rollout.group_size=4",
        "algorithm.critic_warmup_steps=1",
    )
    algorithm = config.algorithm
    assert (algorithm.clip_high, algorithm.critic_lambda, algorithm.length_adaptive_alpha) == (0.2, 0.95, None)
    assert algorithm.aggregation is Aggregation.sequence
    groups_of(tmp_path, num_steps=3, prompts_per_step=6, group_size=4)
    assert [row["version"] for row in steps] == [0, 1, 2]
    assert [row["policy/updates"] for row in steps] == [0, 2, 2]
    assert [row["critic/updates"] for row in steps] == [2 * config.algorithm.critic_warmup_epochs, 2, 2]
    assert names_of(steps, "policy/lm_loss") == set()
    assert all(row["gae/lambda_min"] == row["gae/lambda_mean"] == pytest.approx(0.95) for row in steps)
