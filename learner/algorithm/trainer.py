"""The learner's step: from a batch of scored responses to updated networks and a record of what happened.

    plan      split the batch into mini-batches, ranks and micro-batches, once per pass
    score     values and old_logprobs (and reference_logprobs) of the networks as they are, no gradient;
              in warm-up only values, after the first step of the run
    estimate  advantages, value targets and correction weights, once (learner/algorithm/experience.py)
    update    per mini-batch: the critic, then, outside warm-up, the policy
    describe  metrics (learner/algorithm/diagnostics.py and views.py)

Every rank is given the same batch and works on its own share. Denominators are counts over the whole
mini-batch, which every rank knows from the batch; gradients are SUMMED over ranks (FSDP2 averages them by
default: the factor is set to 1 where learner/networks/model.py shards). So neither losses nor gradients depend on
how a mini-batch is split.

Axes: B responses, T response tokens of the batch, laid end to end.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.config import AdvantageEstimator, Config, Correction, Device, Offload, OverAge
from learner.algorithm import diagnostics, disagreement, losses, views
from learner.algorithm.diagnostics import Metrics, Totals
from learner.algorithm.experience import Experience, Scores, estimate, policy_lambda, segment_starts
from learner.algorithm.objective import (
    Counts,
    count,
    ess_factor,
    lost_advantage,
    policy_terms,
    proximal_logprobs,
    trust_region,
)
from learner.algorithm.optimised import Optimised, StateDict
from learner.algorithm.packing import Batch, MicroBatches, partition, shard
from learner.algorithm.work import Stopwatch, Work

Plan = list[list[MicroBatches]]  # indices as [mini_batch][rank][micro_batch]


class Trainer:
    """Owns both optimizers and takes steps. `step` is a collective: every rank calls it with equal arguments.

    `critic`, or an nn.ModuleList of several, is given exactly when the advantage estimator is GAE; `reference`, a
    policy that is never updated, exactly when algorithm.kl_weight > 0. Raises ValueError otherwise.
    """

    def __init__(
        self,
        config: Config,
        policy: nn.Module,
        critic: nn.Module | None,
        rank: int,
        world: int,
        *,
        reference: nn.Module | None = None,
    ) -> None:
        algorithm = config.algorithm
        if (algorithm.advantage is AdvantageEstimator.gae) != (critic is not None):
            raise ValueError(f"algorithm.advantage={algorithm.advantage}: a critic goes with gae, and only with it")
        if (algorithm.kl_weight > 0.0) != (reference is not None):
            raise ValueError(f"algorithm.kl_weight={algorithm.kl_weight}: a reference policy goes with a positive one")
        self.config, self.rank, self.world = config, rank, world
        on_host = config.learner.offload is Offload.optimizer
        self.policy = Optimised("policy", policy, config.learner.policy, has_state_on_host=on_host)
        self.critic = None
        if critic is not None:
            self.critic = Optimised("critic", critic, config.learner.critic, has_state_on_host=on_host)
        self.reference = reference
        self.num_steps = 0  # taken so far, warm-up included; seeds the shuffling
        self.num_policy_steps = 0  # those after the warm-up
        self.distances = views.VersionDistances(config.staleness.max_staleness)
        self.group = dist.group.WORLD if world > 1 else None
        on_cuda = config.device is Device.cuda
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def step(
        self,
        batch: Batch,
        version: int,
        is_warmup: bool,
        *,
        is_published: bool = True,
        observe: Callable[[Experience], None] | None = None,
    ) -> Metrics:
        """Trains on `batch`, consumed at policy `version`. Warm-up leaves the policy alone, and after the first step
        of the run, which shows how far engine and learner differ, does not ask it either. `is_published` says that
        the policy is still what was published as `version`: no step was taken since. `observe` is shown the experience
        before the updates; it is no collective.

        Returns the metrics, the same on every rank. Raises FloatingPointError when gradients
        are not finite again and again, ValueError when there are fewer responses than mini-batches.
        """
        clock = Stopwatch(self.device)
        self._count_updates(is_warmup)
        batch = self._mask_over_age(batch, version)
        plans = self._plans(batch, is_warmup)
        with clock.stage("score"):
            mine, scores = self._score(batch, plans[0], is_warmup)
        with clock.stage("estimate"):
            experience = estimate(self.config, batch, mine, scores, version, is_warmup, self.group)
        if observe is not None:
            observe(experience)
        totals, num_updates = Totals(self.device), self.policy.num_updates
        work = Work(batch, experience, version, is_warmup, is_published, num_updates, totals, clock)
        for plan in plans:
            for mini in plan:
                self._update(work, mini, updates_policy=plan is plans[-1] and not is_warmup)
        self.num_steps += 1
        self.num_policy_steps += not is_warmup
        with clock.stage("describe"):
            metrics = self._describe(work)
        return metrics | clock.metrics(batch.num_response_tokens)

    def state_dict(self) -> StateDict:
        """Networks, optimizers and counters, for learner/checkpoint.py."""
        state: StateDict = {
            "policy": self.policy.state_dict(),
            "num_steps": self.num_steps,
            "num_policy_steps": self.num_policy_steps,
            "version_distances": self.distances.state_dict(),
        }
        return state if self.critic is None else state | {"critic": self.critic.state_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        self.policy.load_state_dict(state_dict["policy"])
        if self.critic is not None:
            self.critic.load_state_dict(state_dict["critic"])
        self.num_steps = state_dict["num_steps"]
        self.num_policy_steps = state_dict["num_policy_steps"]
        self.distances.load_state_dict(state_dict["version_distances"])

    def _count_updates(self, is_warmup: bool) -> None:
        """Tells the schedules how many updates the run makes: those that were made, and those of all steps to come.

        Counted anew at every step: a warm-up that its gate ends makes fewer, and so do skipped ones; a resume may
        change how many a step makes.
        """
        algorithm, learner = self.config.algorithm, self.config.learner
        policy_steps = max(0, learner.steps - self.num_policy_steps)
        warmup_steps = max(0, algorithm.critic_warmup_steps - self.num_steps) if is_warmup else 0
        self.policy.total_updates = self.policy.num_updates + policy_steps * learner.mini_batches
        if self.critic is not None:
            passes = warmup_steps * algorithm.critic_warmup_epochs + policy_steps * algorithm.critic_updates_per_step
            self.critic.total_updates = self.critic.num_updates + passes * learner.mini_batches

    def _mask_over_age(self, batch: Batch, version: int) -> Batch:
        """With over_age=mask, the tokens that are too old leave the loss mask; with drop there are none."""
        max_staleness = self.config.staleness.max_staleness
        gap_T = version - batch.versions_T
        assert not (gap_T < 0).any(), f"a token of version {int(batch.versions_T.max())} was consumed at {version}"
        if self.config.staleness.over_age is OverAge.mask:
            return replace(batch, loss_mask_T=batch.loss_mask_T & (gap_T <= max_staleness))
        assert not (gap_T > max_staleness).any(), f"a token {int(gap_T.max())} versions old passed the gate"
        return batch

    def _plans(self, batch: Batch, is_warmup: bool) -> list[Plan]:
        """One plan per pass over the batch, each shuffled anew; the policy is updated in the last one."""
        algorithm, learner = self.config.algorithm, self.config.learner
        passes = algorithm.critic_warmup_epochs if is_warmup else algorithm.critic_updates_per_step
        passes = 1 if self.critic is None else passes
        seed = (self.config.seed * 1_000_003 + self.num_steps) * 1_009
        sizes = (learner.mini_batches, self.world, learner.tokens_per_micro_batch)
        return [partition(batch, *sizes, seed + k, learner.share_prefixes) for k in range(passes)]

    @torch.no_grad()
    def _score(self, batch: Batch, plan: Plan, is_warmup: bool) -> tuple[Tensor, Scores]:
        """(indices of this rank's share, their scores in that order)."""
        micros = [indices for mini in plan for indices in mini[self.rank]]
        shares = [batch.select(indices) for indices in micros]
        logprobs, entropies, values, reference = [], [], [], []
        for micro in shares:
            if not is_warmup or self.num_steps == 0:
                logprobs_T, entropy_T = self._run_policy(self.policy.network, micro, with_entropy=True)
                logprobs.append(logprobs_T)
                entropies.append(entropy_T)
            if self.critic is not None:
                critics = disagreement.members(self.critic.network)
                values.append(torch.stack([self._run_critic(critic, micro) for critic in critics], dim=1))
            if self.reference is not None and not is_warmup:
                reference.append(self._run_policy(self.reference, micro)[0])
        values_T, disagreement_T = disagreement.aggregate(torch.cat(values)) if values else (None, None)
        scores = Scores(
            old_logprobs_T=torch.cat(logprobs) if logprobs else None,
            entropy_T=torch.cat(entropies) if entropies else None,
            values_T=values_T,
            disagreement_T=disagreement_T,
            reference_logprobs_T=torch.cat(reference) if reference else None,
        )
        return torch.cat(micros), scores

    def _run_policy(self, network: nn.Module, micro: Batch, with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(log-probs, entropy) of the response tokens."""
        logprobs_T, entropy_T = network(
            micro.token_ids_S,
            micro.cu_seqlens_B1,
            micro.prompt_lengths_B,
            self.config.rollout.temperature,
            with_entropy=with_entropy,
        )
        return logprobs_T, entropy_T

    def _run_critic(self, network: nn.Module, micro: Batch) -> Tensor:
        values_T: Tensor = network(micro.token_ids_S, micro.cu_seqlens_B1, micro.prompt_lengths_B)
        return values_T

    def _update(self, work: Work, mini: list[MicroBatches], updates_policy: bool) -> None:
        """The optimizer steps of one mini-batch; none when all its tokens are masked."""
        counts = count(work.batch, work.experience, mini)
        if counts.tokens == 0:
            return
        if self.critic is not None:
            with work.clock.stage("critic"):
                self._update_critic(self.critic, work, mini)
        if updates_policy:
            with work.clock.stage("policy"):
                self._update_policy(work, mini, counts)

    def _update_critic(self, critic: Optimised, work: Work, mini: list[MicroBatches]) -> None:
        """One optimizer step of the critic. No clipping in warm-up: it would hold on to wrong values.

        Of several critics each sees its shard of the mini-batch only: SUM_m mean over D_m of (V_m - G)^2 / 2 (AsyPPO,
        arXiv 2510.01656). The metric is the mean over m.
        """
        value_clip = None if work.is_warmup else self.config.algorithm.value_clip
        totals, critics = Totals(self.device), disagreement.members(critic.network)
        for m, network in enumerate(critics):
            part = shard(mini, m, len(critics))
            num_tokens = count(work.batch, work.experience, part).tokens
            for micro, e in work.share(part[self.rank]):
                assert e.values_T is not None and e.value_targets_T is not None
                values_T = self._run_critic(network, micro)
                scale_T = losses.token_scale(e.mask_T, num_tokens)
                loss = losses.value_loss(values_T, e.values_T, e.value_targets_T, scale_T, value_clip)
                loss.backward()
                totals.add("critic/value_loss", loss / len(critics))
                if value_clip is not None:
                    is_clipped_T = (values_T - e.values_T).abs() > value_clip
                    totals.add("critic/clip_fraction", (scale_T * is_clipped_T).sum())
        self._apply(critic, work, totals)

    def _update_policy(self, work: Work, mini: list[MicroBatches], counts: Counts) -> None:
        """One optimizer step of the policy."""
        algorithm, num_gaps = self.config.algorithm, work.num_gaps
        totals = Totals(self.device)
        updates_before = self.policy.num_updates - work.num_updates
        totals.add_shared("updates_before", torch.tensor(float(counts.tokens * updates_before)))
        region = self._trust_region(work, mini, totals)
        for micro, e in work.share(mini[self.rank]):
            with_entropy = algorithm.entropy_weight != 0.0
            logprobs_T, entropy_T = self._run_policy(self.policy.network, micro, with_entropy)
            terms = policy_terms(algorithm, micro, e, logprobs_T, entropy_T, counts, region)
            torch.stack(list(terms.values())).sum().backward()
            for name, term in terms.items():
                totals.add(f"policy/{name}", term)
            diagnostics.add_policy_totals(
                totals,
                logprobs_T,
                proximal_logprobs(algorithm, e),
                e.advantages_T,
                e.gap_T,
                e.mask_T,
                num_gaps=num_gaps,
                region=region,
            )
            assert e.advantages_T is not None
            lost = lost_advantage(algorithm, e, logprobs_T, region)
            views.add_lost_totals(totals, e.advantages_T, e.gap_T, e.mask_T, lost, num_gaps)
        factor = 1.0
        if algorithm.ess_scaled_step:
            factor = ess_factor(work.batch, work.experience, mini)
            totals.add_shared("policy/ess_factor", torch.tensor(factor))
        self._apply(self.policy, work, totals, factor)

    def _trust_region(self, work: Work, mini: list[MicroBatches], totals: Totals) -> losses.TrustRegion:
        """Of one mini-batch. With correction=m2 it follows from all its tokens and the policy now: a collective."""
        algorithm, e = self.config.algorithm, work.experience
        if algorithm.correction is not Correction.m2:
            return trust_region(algorithm)
        assert e.advantages_T is not None
        mask_T = torch.zeros_like(e.mask_T)
        for indices in (indices for micros in mini for indices in micros):
            mask_T[work.batch.select_tokens(indices).to(self.device)] = True
        log_ratio_T = self._logprobs_now(work, mini) - e.behavior_logprobs_T
        moment = losses.second_moment(log_ratio_T, e.advantages_T, mask_T & e.mask_T, algorithm.m2_threshold)
        totals.add_shared("policy/m2", torch.tensor(moment.before))
        totals.add_shared("policy/m2_kept", torch.tensor(moment.after))
        return trust_region(algorithm, moment.edge)

    @torch.no_grad()
    def _logprobs_now(self, work: Work, mini: list[MicroBatches]) -> Tensor:
        """The policy's log-probs at the tokens of a mini-batch, (T,); elsewhere they mean nothing. A collective.

        Before the first update of a step they are old_logprobs; after it they cost a forward pass.
        """
        old_logprobs_T = work.experience.old_logprobs_T
        assert old_logprobs_T is not None
        if self.policy.num_updates == work.num_updates:
            return old_logprobs_T
        logprobs_T = torch.zeros_like(old_logprobs_T)
        for indices in mini[self.rank]:
            tokens = work.batch.select_tokens(indices).to(self.device)
            logprobs_T[tokens] = self._run_policy(self.policy.network, work.batch.select(indices))[0]
        if self.group is not None:
            dist.all_reduce(logprobs_T, group=self.group)
        return logprobs_T

    def _apply(self, network: Optimised, work: Work, totals: Totals, rate_factor: float = 1.0) -> None:
        """The optimizer step. `totals` of the mini-batch count when there was one."""
        norm = network.apply(rate_factor)
        work.totals.add_shared(f"{network.name}/skipped_updates", torch.tensor(float(norm is None)))
        if norm is None:
            return
        work.totals.merge(totals)
        work.totals.add_shared(f"{network.name}/grad_norm", norm)
        work.totals.add_shared(f"{network.name}/updates", torch.ones(()))

    def _describe(self, work: Work) -> Metrics:
        """Everything that the step reports but its times. A collective."""
        batch, e = work.batch, work.experience
        sums, maxima = work.totals.reduce(self.group)
        metrics = diagnostics.batch_metrics(batch) | self._age_metrics(work)
        if e.advantages_T is not None:
            metrics |= diagnostics.token_metrics("gae/advantage", e.advantages_T, e.mask_T)
        if e.mask_T.any():
            metrics["policy/lm_token_fraction"] = (e.lm_mask_T.sum() / e.mask_T.sum()).item()
            if e.entropy_T is not None:
                metrics["policy/entropy"] = e.entropy_T[e.mask_T].mean().item()
        if e.values_T is not None:
            metrics |= self._critic_metrics(batch, e, e.values_T)
        if e.uses_values is not None:
            metrics["critic/gate_open"] = float(e.uses_values)
        metrics |= diagnostics.update_metrics(sums, maxima) | views.update_views(sums) | self._learning_rates()
        if metrics.get("policy/updates"):
            metrics["staleness/lr_gauge"] = metrics["staleness/token_max"] * self.policy.last_learning_rate
        return metrics

    def _age_metrics(self, work: Work) -> Metrics:
        """How old the tokens are, and how far the policy has moved away from what sampled them."""
        e, cu_seqlens_B1 = work.experience, work.batch.response_cu_seqlens_B1.to(self.device)
        metrics = views.staleness_metrics(e.gap_T, e.mask_T, cu_seqlens_B1)
        if e.old_logprobs_T is not None and e.weights_T is not None:
            metrics |= views.offpolicy_metrics(
                e.old_logprobs_T,
                e.behavior_logprobs_T,
                e.weights_T,
                e.gap_T,
                e.mask_T,
                cu_seqlens_B1,
                self.config.algorithm.truncation,
                work.is_published,
            )
        if not work.is_warmup:
            metrics |= self.distances.observe(work.version, metrics, e.gap_T, e.mask_T, work.is_published)
        return metrics

    def _critic_metrics(self, batch: Batch, e: Experience, values_T: Tensor) -> Metrics:
        cu_seqlens_B1, rewards_B = batch.response_cu_seqlens_B1.to(self.device), batch.rewards_B.to(self.device)
        is_correct_B, reward = batch.is_correct_B.to(self.device), self.config.reward
        lambda_B = policy_lambda(self.config.algorithm, batch.response_lengths_B, e.uses_values is not False)
        starts_T = segment_starts(self.config.algorithm, e.behavior_logprobs_T)
        return (
            diagnostics.gae_metrics(lambda_B)
            | ({} if starts_T is None else diagnostics.segment_metrics(starts_T, cu_seqlens_B1))
            | diagnostics.critic_metrics(
                values_T, rewards_B, is_correct_B, e.mask_T, cu_seqlens_B1, (reward.wrong, reward.correct)
            )
            | views.critic_views(values_T, rewards_B, e.gap_T, e.mask_T, cu_seqlens_B1)
            | disagreement.metrics(self.config.algorithm, e.disagreement_T, e.mask_T)
        )

    def _learning_rates(self) -> Metrics:
        """Of the next optimizer steps."""
        networks = [self.policy] if self.critic is None else [self.policy, self.critic]
        return {f"{network.name}/learning_rate": network.learning_rate for network in networks}
