"""The learner's step with plain fake networks: what it computes, and that no split of the work changes it.

The fakes are tables: the policy's logits and the critic's value of a token depend on that token alone. A
step with them is therefore computable by hand. The same checks with real, sharded networks are in
test_trainer_split.py.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.config import (
    AdvantageEstimator,
    Aggregation,
    AlgorithmConfig,
    Config,
    Correction,
    LearnerConfig,
    OptimizerConfig,
    OverAge,
    RolloutConfig,
    Schedule,
    StalenessConfig,
    ValueTarget,
)
from learner.algorithm.packing import Batch, boundaries, prediction_positions
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer

VOCAB = 11


class TablePolicy(nn.Module):
    """logits of the next token = table[token]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)))

    def forward(
        self,
        token_ids_S: Tensor,
        cu_seqlens_B1: Tensor,
        prompt_lengths_B: Tensor,
        temperature: float,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        positions_T = prediction_positions(cu_seqlens_B1, prompt_lengths_B)
        logp_TV = (self.table[token_ids_S[positions_T]] / temperature).log_softmax(-1)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        logprobs_T = logp_TV.gather(1, token_ids_S[positions_T + 1, None]).squeeze(1)
        return logprobs_T, entropy_T if with_entropy else None


class TableCritic(nn.Module):
    """The value of a state = table[its last token]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(VOCAB))

    def forward(self, token_ids_S: Tensor, cu_seqlens_B1: Tensor, prompt_lengths_B: Tensor) -> Tensor:
        return self.table[token_ids_S[prediction_positions(cu_seqlens_B1, prompt_lengths_B)]]


def make_batch(lengths: list[int], *, group_size: int = 2, seed: int = 0, version: int = 0) -> Batch:
    """Random tokens under prompts of 1 or 2 tokens; responses 0, 3, 6, ... are correct; nothing is truncated."""
    generator = torch.Generator().manual_seed(seed)
    response_lengths_B = torch.tensor(lengths)
    prompt_lengths_B = torch.arange(len(lengths)) % 2 + 1
    num_tokens = int(response_lengths_B.sum())
    cu_seqlens_B1 = boundaries(prompt_lengths_B + response_lengths_B)
    is_correct_B = torch.arange(len(lengths)) % 3 == 0
    return Batch(
        token_ids_S=torch.randint(VOCAB, (int(cu_seqlens_B1[-1]),), generator=generator),
        cu_seqlens_B1=cu_seqlens_B1,
        prompt_lengths_B=prompt_lengths_B,
        response_lengths_B=response_lengths_B,
        behavior_logprobs_T=-torch.rand(num_tokens, generator=generator) * 3,
        versions_T=torch.full((num_tokens,), version),
        rewards_B=torch.where(is_correct_B, 1.0, -1.0),
        is_correct_B=is_correct_B,
        is_truncated_B=torch.zeros(len(lengths), dtype=torch.bool),
        group_index_B=torch.arange(len(lengths)) // group_size,
        loss_mask_T=torch.ones(num_tokens, dtype=torch.bool),
    )


def on_policy(batch: Batch, policy: nn.Module) -> Batch:
    """The batch as if `policy` had sampled it."""
    logprobs_T, _ = policy(batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B, 1.0)
    return replace(batch, behavior_logprobs_T=logprobs_T.detach())


def uneven_rewards(batch: Batch) -> Batch:
    """With rewards of +-1 a table's gradients can cancel exactly, and Adam turns the rounding into full steps."""
    noise_B = torch.rand(batch.num_sequences, generator=torch.Generator().manual_seed(7))
    return replace(batch, rewards_B=batch.rewards_B + noise_B)


def config(
    *,
    max_staleness: int = 2,
    over_age: OverAge = OverAge.drop,
    mini_batches: int = 2,
    tokens_per_micro_batch: int = 10_000,
    learning_rate: float = 1e-2,
    **algorithm: object,
) -> Config:
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_steps=1, max_grad_norm=1e9)
    return Config(
        rollout=RolloutConfig(temperature=1.0),
        staleness=StalenessConfig(max_staleness=max_staleness, over_age=over_age),
        algorithm=AlgorithmConfig(**{"length_adaptive_alpha": 0.4, **algorithm}),  # type: ignore[arg-type]
        learner=LearnerConfig(
            mini_batches=mini_batches,
            tokens_per_micro_batch=tokens_per_micro_batch,
            policy=optimizer,
            critic=optimizer,
        ),
    )


def make_trainer(cfg: Config) -> Trainer:
    has_critic = cfg.algorithm.advantage is AdvantageEstimator.gae
    reference = TablePolicy(seed=9) if cfg.algorithm.kl_weight > 0 else None
    critic = TableCritic() if has_critic else None
    return Trainer(cfg, TablePolicy(), critic, rank=0, world=1, reference=reference)


def parameters(trainer: Trainer) -> list[Tensor]:
    networks = [trainer.policy.network, *([trainer.critic.network] if trainer.critic else [])]
    return [p.detach().clone() for network in networks for p in network.parameters()]


LENGTHS = [1, 20, 21, 5, 9, 3, 30, 2]
EVERYTHING = {
    "whiten_advantages": True,
    "dual_clip": 3.0,
    "entropy_weight": 0.01,
    "kl_weight": 0.05,
    "value_clip": 0.2,
    "critic_updates_per_step": 2,
    "ess_scaled_step": True,
}


def test_the_metrics_that_others_rely_on_are_there() -> None:
    metrics = make_trainer(config(**EVERYTHING)).step(make_batch(LENGTHS), version=1, is_warmup=False)
    expected = {
        "reward/mean", "length/mean", "length/p95", "staleness/token_mean", "staleness/token_max",
        "critic/explained_variance", "critic/value_loss", "critic/grad_norm", "policy/clip_fraction_high",
        "policy/clip_fraction_low", "policy/entropy", "policy/kl_k1", "policy/pg_loss", "policy/lm_loss",
        "policy/grad_norm", "offpolicy/ratio_mean", "offpolicy/ess", "offpolicy/gap_1/ess",
        "offpolicy/gap_1/clip_fraction", "gae/lambda_mean", "gae/lambda_clamped_fraction",
        "throughput/trained_tokens_per_s", "time/score_s", "time/train_s",
    }  # fmt: skip
    assert expected <= metrics.keys()
    assert "offpolicy/mismatch_abs_mean" not in metrics  # no token of version gap 0
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["length/mean"] == pytest.approx(sum(LENGTHS) / len(LENGTHS))
    assert metrics["staleness/token_mean"] == 1.0
    assert metrics["reward/mean"] == pytest.approx((3 - 5) / 8)


def test_warm_up_trains_the_critic_for_its_epochs_and_leaves_the_policy_bit_equal() -> None:
    trainer = make_trainer(config(critic_warmup_epochs=3, mini_batches=2))
    policy, critic = parameters(trainer)
    metrics = trainer.step(make_batch(LENGTHS), version=0, is_warmup=True)
    assert metrics["critic/updates"] == 6.0
    assert metrics["policy/updates"] == 0.0 and "policy/pg_loss" not in metrics
    after_policy, after_critic = parameters(trainer)
    assert torch.equal(after_policy, policy) and not torch.equal(after_critic, critic)


def count_calls(network: nn.Module) -> list[bool]:
    """Grows by one entry at each forward pass of a policy: whether the entropy was asked for."""
    calls: list[bool] = []
    network.register_forward_pre_hook(lambda _, __, k: calls.append(k["with_entropy"]), with_kwargs=True)
    return calls


def test_warm_up_asks_the_policy_in_the_first_step_of_the_run_only() -> None:
    """Once: for the difference of engine and learner, from which the sentinel takes its floor."""
    trainer = make_trainer(config(kl_weight=0.1, whiten_advantages=True, value_target=ValueTarget.vtrace))
    assert trainer.reference is not None
    policy, reference = count_calls(trainer.policy.network), count_calls(trainer.reference)
    first, second = (trainer.step(make_batch(LENGTHS), 0, is_warmup=True) for _ in range(2))
    assert len(policy) == 2 and not reference  # two mini-batches, scored once
    measured = {"offpolicy/mismatch_abs_mean", "offpolicy/ess", "policy/entropy"}
    assert measured <= first.keys() and measured.isdisjoint(second)
    assert not any(name.startswith("gae/advantage") for name in first | second)
    assert {"critic/explained_variance", "critic/value_loss", "reward/mean", "gae/lambda_mean"} <= second.keys()
    assert measured <= trainer.step(make_batch(LENGTHS), 0, is_warmup=False).keys()


@pytest.mark.parametrize("entropy_weight", [0.0, 0.01])
def test_updates_compute_the_entropy_only_where_it_is_in_the_loss(entropy_weight: float) -> None:
    trainer = make_trainer(config(mini_batches=1, entropy_weight=entropy_weight))
    calls = count_calls(trainer.policy.network)
    metrics = trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
    assert calls == [True, entropy_weight > 0.0]  # scored, updated
    assert metrics["policy/entropy"] > 0.0


def test_the_critic_is_updated_in_every_pass_and_the_policy_in_the_last() -> None:
    trainer = make_trainer(config(critic_updates_per_step=3, critic_warmup_epochs=2, mini_batches=2))
    metrics = trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
    assert (metrics["critic/updates"], metrics["policy/updates"]) == (6.0, 2.0)


def test_values_are_not_clipped_in_warm_up() -> None:
    """The second pass of warm-up starts far from the old values, and the loss goes on falling."""
    clipped, free = (
        make_trainer(config(value_clip=clip, critic_warmup_epochs=8, learning_rate=0.1)) for clip in (1e-3, None)
    )
    batch = make_batch(LENGTHS)
    for trainer in (clipped, free):
        assert "critic/clip_fraction" not in trainer.step(batch, 0, is_warmup=True)
    assert torch.equal(parameters(clipped)[1], parameters(free)[1])
    assert "critic/clip_fraction" in clipped.step(batch, 0, is_warmup=False)


def test_warm_up_brings_the_value_towards_the_outcome() -> None:
    trainer = make_trainer(config(learning_rate=0.1))
    batch = replace(make_batch(LENGTHS), rewards_B=torch.ones(len(LENGTHS)))
    first = trainer.step(batch, 0, is_warmup=True)
    for _ in range(20):
        last = trainer.step(batch, 0, is_warmup=True)
    assert first["critic/value_loss"] > 0.3 and last["critic/value_loss"] < 0.01


def test_with_learning_rate_zero_nothing_changes() -> None:
    trainer = make_trainer(config(learning_rate=0.0, **EVERYTHING))
    before = parameters(trainer)
    for is_warmup in (True, False):
        trainer.step(make_batch(LENGTHS), 0, is_warmup)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))


def test_the_first_update_is_the_policy_gradient_computed_by_hand() -> None:
    """One mini-batch, on-policy, no LM loss: d loss / d table = -(1/N) SUM_t A_t d logprob_t / d table."""
    cfg = config(mini_batches=1, positive_lm_weight=0.0, max_staleness=0, policy_lambda=1.0)
    cfg = replace(cfg, algorithm=replace(cfg.algorithm, length_adaptive_alpha=None))
    trainer, batch = make_trainer(cfg), on_policy(make_batch(LENGTHS), TablePolicy())
    table = TablePolicy().table
    logprobs_T, _ = TablePolicy()(batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B, 1.0)
    policy = TablePolicy()
    logprobs_T, _ = policy(batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B, 1.0)
    outcome_T = torch.repeat_interleave(batch.rewards_B, batch.response_lengths_B)  # zero critic, lambda 1
    (-(outcome_T * logprobs_T).mean()).backward()
    metrics = trainer.step(batch, 0, is_warmup=False)
    assert policy.table.grad is not None
    assert metrics["policy/grad_norm"] == pytest.approx(policy.table.grad.norm().item(), rel=1e-5)
    moved = trainer.policy.network.get_parameter("table") - table  # Adam's first step is lr * sign
    strong = policy.table.grad.abs() > 1e-4
    assert torch.equal(moved[strong].sign(), -policy.table.grad[strong].sign())


def test_the_lm_loss_reads_only_correct_responses_that_are_not_truncated() -> None:
    cfg = config(mini_batches=1, learning_rate=0.0, positive_lm_weight=0.1, max_staleness=0)
    batch = on_policy(make_batch([4, 3, 2, 5]), TablePolicy())  # responses 0 and 3 are correct
    logprobs_T, _ = TablePolicy()(batch.token_ids_S, batch.cu_seqlens_B1, batch.prompt_lengths_B, 1.0)
    both = make_trainer(cfg).step(batch, 0, is_warmup=False)["policy/lm_loss"]
    mean = torch.cat([logprobs_T[:4], logprobs_T[9:]]).mean().item()
    assert both == pytest.approx(-0.1 * mean, rel=1e-5)
    truncated = replace(batch, is_truncated_B=torch.tensor([True, False, False, False]))
    one = make_trainer(cfg).step(truncated, 0, is_warmup=False)["policy/lm_loss"]
    assert one == pytest.approx(-0.1 * logprobs_T[9:].mean().item(), rel=1e-5)
    wrong = replace(batch, is_correct_B=torch.zeros(4, dtype=torch.bool))
    assert make_trainer(cfg).step(wrong, 0, is_warmup=False)["policy/lm_loss"] == 0.0


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("correction", list(Correction))
def test_the_number_of_micro_batches_changes_nothing(correction: Correction, aggregation: Aggregation) -> None:
    results = []
    for budget in (10_000, 35, 1):
        cfg = config(correction=correction, aggregation=aggregation, tokens_per_micro_batch=budget, **EVERYTHING)
        trainer = make_trainer(cfg)
        metrics = [trainer.step(uneven_rewards(make_batch(LENGTHS, seed=s)), 1, False) for s in (0, 1)]
        results.append((parameters(trainer), metrics))
    for weights, metrics in results[1:]:
        for a, b in zip(results[0][0], weights, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
        for a, b in zip(results[0][1], metrics, strict=True):
            same = [k for k in a if not k.startswith(("time/", "throughput/", "memory/"))]
            assert {k: b[k] for k in same} == pytest.approx({k: a[k] for k in same}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("target", list(ValueTarget))
@pytest.mark.parametrize("correction", list(Correction))
def test_with_an_exact_engine_the_first_update_on_policy_is_plain_ppo(
    correction: Correction, target: ValueTarget
) -> None:
    """pi = pi_old = pi_behavior: nothing is clipped, no token weighs more than another."""
    batch = uneven_rewards(on_policy(make_batch(LENGTHS), TablePolicy()))
    plain = make_trainer(config(max_staleness=0, mini_batches=1, correction=Correction.none))
    other = make_trainer(config(max_staleness=0, mini_batches=1, correction=correction, value_target=target))
    for trainer in (plain, other):
        trainer.step(batch, 0, is_warmup=False)
    for a, b in zip(parameters(plain), parameters(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("correction", [c for c in Correction if c is not Correction.none])
def test_recorded_logprobs_that_differ_change_the_update_under_every_correction(
    correction: Correction, max_staleness: int
) -> None:
    """At max_staleness 0 as well, where only the engine's arithmetic can differ."""
    plain, other = (
        make_trainer(config(max_staleness=max_staleness, correction=c)) for c in (Correction.none, correction)
    )
    for trainer in (plain, other):
        trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
    assert not torch.allclose(parameters(plain)[0], parameters(other)[0], atol=1e-4)


def test_tokens_over_the_age_limit_leave_every_loss_and_the_denominators() -> None:
    """A batch with an old response, masked, trains like the batch without that response."""
    lengths = [4, 6, 5, 7]
    cfg = config(over_age=OverAge.mask, max_staleness=1, mini_batches=1)
    young = make_batch(lengths, version=5)
    versions_T = young.versions_T.clone()
    versions_T[:4] = 3  # response 0, which is correct, is two versions old at version 5
    masked, without = make_trainer(cfg), make_trainer(cfg)
    metrics = masked.step(replace(young, versions_T=versions_T), version=5, is_warmup=False)
    without.step(young.select(torch.tensor([1, 2, 3])), version=5, is_warmup=False)
    for a, b in zip(parameters(masked), parameters(without), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert metrics["staleness/masked_fraction"] == pytest.approx(4 / 22)
    assert metrics["staleness/token_max"] == 2.0


def test_with_drop_a_token_over_the_age_limit_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="3 versions old"):
        make_trainer(config(max_staleness=2)).step(make_batch(LENGTHS), version=3, is_warmup=False)


def test_a_batch_with_every_token_masked_updates_nothing() -> None:
    trainer = make_trainer(config(over_age=OverAge.mask, max_staleness=0))
    before = parameters(trainer)
    metrics = trainer.step(make_batch(LENGTHS), version=4, is_warmup=False)
    assert metrics["policy/updates"] == metrics["critic/updates"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))


def test_while_the_value_gate_is_shut_lambda_is_what_the_advantages_used() -> None:
    batch = replace(make_batch(LENGTHS), rewards_B=torch.ones(8))
    metrics = make_trainer(config(value_gate=True)).step(batch, 0, is_warmup=False)
    assert metrics["critic/gate_open"] == 0.0
    assert metrics["gae/lambda_mean"] == metrics["gae/lambda_min"] == 1.0


@pytest.mark.parametrize("advantage", [AdvantageEstimator.grpo, AdvantageEstimator.rloo])
def test_group_estimators_train_without_a_critic(advantage: AdvantageEstimator) -> None:
    trainer = make_trainer(config(advantage=advantage))
    before = parameters(trainer)
    metrics = trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
    assert not torch.equal(before[0], parameters(trainer)[0])
    assert metrics["policy/updates"] == 2.0
    assert not any(name.startswith(("critic/value", "gae/lambda")) for name in metrics)


def test_group_estimators_give_no_gradient_to_groups_without_contrast() -> None:
    batch = replace(make_batch(LENGTHS), rewards_B=torch.ones(8))
    cfg = config(advantage=AdvantageEstimator.grpo, positive_lm_weight=0.0)
    assert make_trainer(cfg).step(batch, 0, is_warmup=False)["policy/grad_norm"] == 0.0


def test_networks_that_do_not_fit_the_algorithm_are_refused() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.advantage=gae"):
        Trainer(config(), TablePolicy(), None, 0, 1)
    with pytest.raises(ValueError, match=r"algorithm\.advantage=grpo"):
        Trainer(config(advantage=AdvantageEstimator.grpo), TablePolicy(), TableCritic(), 0, 1)
    with pytest.raises(ValueError, match=r"algorithm\.kl_weight=0\.1"):
        Trainer(config(kl_weight=0.1), TablePolicy(), TableCritic(), 0, 1)


def test_mismatch_is_measured_on_tokens_of_the_current_version_only() -> None:
    policy = TablePolicy()
    batch = on_policy(make_batch([3, 5]), policy)
    shift_T = torch.where(torch.arange(8) < 3, 0.25, -4.0)
    batch = replace(
        batch,
        versions_T=torch.where(torch.arange(8) < 3, 1, 0),
        behavior_logprobs_T=batch.behavior_logprobs_T + shift_T,
    )
    metrics = make_trainer(config(mini_batches=1)).step(batch, version=1, is_warmup=False)
    assert metrics["offpolicy/mismatch_abs_mean"] == pytest.approx(0.25, abs=1e-6)
    assert metrics["offpolicy/gap_0/tokens"] == 3.0 and metrics["offpolicy/gap_1/tokens"] == 5.0


def test_a_mini_batch_whose_gradient_is_not_finite_is_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """One group's rewards are infinite: two of eight updates are skipped, and the metrics are of the other six."""
    trainer = make_trainer(config(advantage=AdvantageEstimator.rloo, mini_batches=8))
    rewards_B = make_batch(LENGTHS).rewards_B
    rewards_B[2:4] = torch.inf
    metrics = trainer.step(replace(make_batch(LENGTHS), rewards_B=rewards_B), 0, is_warmup=False)
    assert (metrics["policy/updates"], metrics["policy/skipped_updates"]) == (6.0, 2.0)
    assert (trainer.policy.num_updates, trainer.policy.num_skipped) == (6, 2)
    assert parameters(trainer)[0].isfinite().all()
    updates = {name: value for name, value in metrics.items() if name.startswith("policy/")}
    assert all(math.isfinite(value) for value in updates.values()) and updates["policy/grad_norm"] > 0.0
    assert caplog.text.count("an update of the policy was skipped, its gradient norm is nan") == 2


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_skipped_update_leaves_weights_and_optimizer_as_they_are(value: float) -> None:
    trainer = make_trainer(config())
    trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
    assert trainer.critic is not None
    networks = (trainer.policy, trainer.critic)
    kept = [{n: x.clone() for n, x in state.items()} for o in networks for state in o.optimizer.state.values()]
    before = parameters(trainer)
    metrics = trainer.step(replace(make_batch(LENGTHS), rewards_B=torch.full((8,), value)), 0, is_warmup=False)
    assert metrics["policy/skipped_updates"] == metrics["critic/skipped_updates"] == 2.0
    assert metrics["policy/updates"] == metrics["critic/updates"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    for state, old in zip((s for o in networks for s in o.optimizer.state.values()), kept, strict=True):
        assert all(torch.equal(state[name], x) for name, x in old.items())
    healthy = trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
    assert healthy["policy/updates"] == 2.0 and trainer.policy.skipped_in_a_row == 0


def test_too_many_skipped_in_a_row_end_the_run_also_across_a_checkpoint(tmp_path: Path) -> None:
    trainer, twin = (make_trainer(config(advantage=AdvantageEstimator.rloo)) for _ in range(2))
    spoilt = replace(make_batch(LENGTHS), rewards_B=torch.full((8,), torch.inf))
    for _ in range(2):
        trainer.step(spoilt, 0, is_warmup=False)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(2, 0, trainer)
    checkpointer.load(2, twin)
    assert (twin.policy.num_skipped, twin.policy.skipped_in_a_row) == (4, 4)
    with pytest.raises(FloatingPointError, match=r"policy were not finite 5 times in a row.*policy\.learning_rate"):
        twin.step(spoilt, 0, is_warmup=False)


def test_whitening_is_over_the_whole_batch() -> None:
    plain = make_trainer(config()).step(make_batch(LENGTHS), 0, is_warmup=False)
    white = make_trainer(config(whiten_advantages=True)).step(make_batch(LENGTHS), 0, is_warmup=False)
    assert (white["gae/advantage_mean"], white["gae/advantage_std"]) == pytest.approx((0.0, 1.0), abs=1e-5)
    assert abs(plain["gae/advantage_std"] - 1.0) > 1e-2


def test_vtrace_targets_shrink_with_the_ratio_of_old_to_behavior() -> None:
    """One token a response, zero critic: the target is min(1, rho) R, the loss the mean of its half square."""
    batch = on_policy(make_batch([1, 1]), TablePolicy())
    log_rho_T = torch.tensor([0.4, 1.6]).log()
    batch = replace(batch, behavior_logprobs_T=batch.behavior_logprobs_T - log_rho_T)
    cfg = config(value_target=ValueTarget.vtrace, mini_batches=1)
    loss = make_trainer(cfg).step(batch, 0, is_warmup=False)["critic/value_loss"]
    assert loss == pytest.approx((0.4**2 + 1.0) / 4, rel=1e-5)


@pytest.mark.parametrize("later", [{"critic_lambda": 0.95}, {"value_target": ValueTarget.vtrace}])
def test_in_warm_up_every_token_learns_the_outcome_whatever_the_target_is_later(later: dict[str, object]) -> None:
    """The first token of a response of 101 is told 1.0 then, not 0.95^100; zero critic: the loss is half its square."""
    batch = replace(make_batch([101, 101]), rewards_B=torch.ones(2))
    plain, other = make_trainer(config(mini_batches=1)), make_trainer(config(mini_batches=1, **later))
    assert plain.step(batch, 0, is_warmup=True)["critic/value_loss"] == pytest.approx(0.5)
    assert other.step(batch, 0, is_warmup=True)["critic/value_loss"] == pytest.approx(0.5)
    assert torch.equal(parameters(plain)[1], parameters(other)[1])
    assert other.step(batch, 0, is_warmup=False)["critic/value_loss"] < 0.45


def test_learning_rate_warms_up_linearly() -> None:
    cfg = config(mini_batches=2, learning_rate=1.0)
    slow = replace(cfg.learner.policy, warmup_steps=4)
    trainer = make_trainer(replace(cfg, learner=replace(cfg.learner, policy=slow)))
    rates = [trainer.policy.learning_rate]
    for _ in range(3):
        metrics = trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
        rates.append(metrics["policy/learning_rate"])
    assert rates == [0.25, 0.75, 1.0, 1.0]
    assert trainer.policy.optimizer.param_groups[0]["lr"] == 1.0


def test_a_linear_schedule_ends_at_zero_with_the_run() -> None:
    cfg = config(mini_batches=2, learning_rate=1.0, critic_warmup_steps=1, critic_warmup_epochs=2)
    linear = replace(cfg.learner.policy, schedule=Schedule.linear)
    trainer = make_trainer(replace(cfg, learner=replace(cfg.learner, steps=2, policy=linear, critic=linear)))
    rates = []
    for is_warmup in (True, False, False, False):
        metrics = trainer.step(make_batch(LENGTHS), 0, is_warmup)
        rates.append((metrics["policy/learning_rate"], metrics["critic/learning_rate"]))
    # The policy has 2 x 2 updates, the critic (1 x 2 + 2) x 2; what goes on beyond them learns nothing more.
    assert rates == [(1.0, 0.5), (0.5, 0.25), (0.0, 0.0), (0.0, 0.0)]


def test_a_linear_schedule_ends_with_the_run_when_a_resume_changes_how_many_updates_a_step_makes() -> None:
    """Two steps of warm-up and two of the policy by 2 mini-batches, then two by 1: zero comes at the end."""
    cfg = config(mini_batches=2, learning_rate=1.0, critic_warmup_steps=2, critic_warmup_epochs=2)
    linear = replace(cfg.learner.policy, schedule=Schedule.linear)
    cfg = replace(cfg, learner=replace(cfg.learner, steps=4, policy=linear, critic=linear))
    before = make_trainer(cfg)
    for is_warmup in (True, True, False, False):
        before.step(make_batch(LENGTHS), 0, is_warmup)
    after = make_trainer(
        replace(
            cfg, learner=replace(cfg.learner, mini_batches=1), algorithm=replace(cfg.algorithm, critic_warmup_epochs=1)
        )
    )
    after.load_state_dict(before.state_dict())
    rates = []
    for _ in range(2):
        metrics = after.step(make_batch(LENGTHS), 0, False)
        rates.append((metrics["policy/learning_rate"], metrics["critic/learning_rate"]))
    # The policy has made 4 of then 4 + 2 updates, the critic 2 x 2 x 2 + 4 = 12 of 14.
    assert rates == [(pytest.approx(1 / 6), pytest.approx(1 / 14)), (0.0, 0.0)]


def test_a_restored_trainer_goes_on_exactly_like_the_saved_one(tmp_path: Path) -> None:
    trainer, twin = (make_trainer(config(mini_batches=4, **EVERYTHING)) for _ in range(2))
    trainer.step(make_batch(LENGTHS), 0, is_warmup=False)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, 0, trainer)
    checkpointer.load(1, twin)
    for each in (trainer, twin):
        each.step(make_batch(LENGTHS, seed=3), 1, is_warmup=False)
    assert all(torch.equal(a, b) for a, b in zip(parameters(trainer), parameters(twin), strict=True))
