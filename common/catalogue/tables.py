"""The rows of the catalogue, by section, in the order of the page."""

from dataclasses import dataclass

from common.config import TrackerName
from common.connections import Refusal
from common.types import DropReason, Verdict


@dataclass(frozen=True, kw_only=True)
class Part:
    """What may stand in the place of a variable part of a name."""

    expression: str  # regular
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row: a name, or many that differ in variable parts."""

    name: str
    unit: str
    definition: str
    view: int | None = None  # of staleness, see VIEWS in common/catalogue/views.py


PARTS: dict[str, Part] = {
    "gap": Part(expression=r"\d+", meaning="version gap g of a token: version of the learner that trains it - its own"),
    "reason": Part(expression="|".join(DropReason), meaning=", ".join(f"`{reason}`" for reason in DropReason)),
    "verdict": Part(expression="|".join(Verdict), meaning=", ".join(f"`{verdict}`" for verdict in Verdict)),
    "refusal": Part(expression="|".join(Refusal), meaning=", ".join(f"`{refusal}`" for refusal in Refusal)),
    "tracker": Part(expression="|".join(TrackerName), meaning=", ".join(f"`{name}`" for name in TrackerName)),
    "position": Part(
        expression="first|p25|p50|p75|last", meaning="one token of each response: `first`, `p25`, `p50`, `p75`, `last`"
    ),
    "sign": Part(expression="positive|negative", meaning="of the advantage A: `positive`, `negative`"),
    "fate": Part(expression="sampled|trained|dropped", meaning="of a group: `sampled` (arrived), `trained`, `dropped`"),
    "network": Part(expression="policy|critic", meaning="`policy`, `critic`"),
    "stage": Part(
        expression="score|estimate|critic|policy|describe", meaning="of the step, see learner/algorithm/trainer.py"
    ),
    "quantile": Part(expression="p50|p90|p95|p99", meaning="`p50`, `p90`, `p95`, `p99`"),
}


def _rows(*rows: tuple[str, str, str] | tuple[str, str, str, int]) -> tuple[Metric, ...]:
    return tuple(
        Metric(name=row[0], unit=row[1], definition=row[2], view=row[3] if len(row) == 4 else None) for row in rows
    )


RUN = _rows(
    ("version", "versions", "published when the line was written; an evaluation's own line: the last one"),
    ("time/step_s", "s", "from the end of the last step's line to this one's", 14),
    ("time/wait_for_batch_s", "s", "of it, until the batch was there", 14),
    ("time/train_s", "s", "of it, the learner's step"),
    ("time/{stage}_s", "s", "of that, one stage"),
    ("time/publish_s", "s", "of it, until the new version was in every actor", 14),
    ("time/evaluation_s", "s", "from the start of an evaluation to its last response"),
    ("throughput/generated_tokens_per_s", "tokens/s",
     "response tokens that the actors drew since the last step, held-out ones too"),
    ("throughput/trained_tokens_per_s", "tokens/s", "response tokens of the batch over `time/train_s`"),
    ("tokens/generated", "tokens", "response tokens that the actors drew since the run began, held-out ones too", 13),
    ("tokens/trained", "tokens", "response tokens that were trained on since the run began", 13),
    ("tokens/prefix", "tokens",
     "that were handed on with a lease instead of being drawn again, since the run began", 13),
    ("memory/peak_gib", "GiB", "largest so far: of the device, on CPUs of the learner's process"),
    ("actors/idle_fraction", "fraction", "of the actors' time in which their engine had nothing to do", 14),
    ("learner/idle_fraction", "fraction", "of the step's wall time in which the learner waited for its batch", 14),
    ("actors/connected", "count", "actors that take part now"),
    ("actors/too_slow", "count", "of them, those that get a lease only now and then: batches would wait for them"),
    ("actors/dismissed", "count", "that had to leave since the run began"),
    ("actors/forgotten", "count", "that were lost and did not come back in time, since the run began"),
    ("queue/buffered_groups", "count", "groups that wait to be trained on"),
    ("queue/in_flight_groups", "count", "groups that actors sample"),
    ("queue/window_fill", "fraction",
     "groups leased or buffered when the step ended, of those that staleness admits beyond its batch", 14),
    ("alarm/active", "count", "limits of health that are crossed now, see above"),
)  # fmt: skip

DATA = _rows(
    ("reward/mean", "reward", "mean over the responses of the batch"),
    ("reward/correct_fraction", "fraction", "of the responses that the verifier found right"),
    ("reward/solved_group_fraction", "fraction",
     "of the groups that are all right: no signal for group-relative advantages"),
    ("reward/unsolved_group_fraction", "fraction", "of the groups without a right response"),
    ("length/mean", "tokens", "of the responses of the batch"),
    ("length/max", "tokens", "of the longest of them"),
    ("length/{quantile}", "tokens", "quantile over responses"),
    ("length/mean_correct", "tokens", "of the right ones"),
    ("length/mean_wrong", "tokens", "of the wrong ones"),
    ("length/truncated_fraction", "fraction", "of the responses that ended at the length limit"),
    ("selection/length_{fate}", "tokens", "mean length of the training responses that were so since the last step", 12),
    ("selection/pass_rate_{fate}", "fraction", "of them that were right", 12),
    ("selection/length_trained_over_sampled", "ratio",
     "scatters: look at it smoothed; below 1 for long means that long ones are lost", 12),
    ("selection/pass_rate_trained_over_sampled", "ratio", "the same of the pass rate", 12),
    ("drops/{reason}", "count", "leases and groups that did not get into a batch, since the run began", 13),
    ("dropped_tokens/{reason}", "tokens", "that went down with them", 13),
    ("staleness/dropped_groups", "count", "`drops/stale`", 13),
    ("verdicts/{verdict}", "count", "training responses since the run began"),
    ("verifier/num_errors", "count", "responses since the last step on which the verifier itself failed"),
    ("verifier/num_timed_out", "count", "responses since the last step that it did not judge in time"),
    ("transport/{refusal}", "count", "connections refused or cut off since the run began"),
    ("transport/ignored_watches", "count", "questions of `run.py top` that came too often, since the learner began"),
    ("transport/refused_greetings", "count", "of actors that do not fit or are too many, since the learner began"),
    ("trackers/{tracker}_lost", "count", "steps that this tracker will not have, since the learner began"),
)  # fmt: skip

STALENESS = _rows(
    ("staleness/hist", "tokens", "by version gap, of what the policy was trained on; a mapping", 1),
    ("staleness/token_mean", "versions", "mean gap over response tokens, masked or not", 1),
    ("staleness/token_max", "versions", "largest gap", 1),
    ("staleness/masked_fraction", "fraction",
     "of the response tokens that are not in the losses because they are too old", 13),
    ("staleness/versions_per_response", "versions",
     "that drew tokens of it, from its oldest to its newest, mean over responses", 2),
    ("staleness/flight_mean", "versions", "newest - oldest version of a response, mean over responses", 2),
    ("staleness/queue_mean", "versions",
     "version that trains it - newest version of a response, mean over responses", 2),
    ("staleness/updates_mean", "updates",
     "of the policy that the step had made before a token's own, mean over tokens", 2),
    ("staleness/nats_mean", "nats",
     "a token's age as the sum of `policy/kl_version` over the versions that went by, mean over the tokens in the "
     "loss", 9),
    ("staleness/nats_max", "nats", "the largest of these ages", 9),
    ("staleness/lr_gauge", "versions", "`staleness/token_max` x the learning rate of the policy's last update", 10),
    ("policy/kl_version", "nats",
     "KL(pi_v, pi_{v+1}) a token of the two latest versions: mean k3 of the tokens that v drew and v + 1 trains "
     "on, in the first step after its publication, when there are 64 of them; what two engines round differently "
     "is in it", 9),
)  # fmt: skip

OFFPOLICY = _rows(
    ("offpolicy/tokens", "tokens", "in the loss"),
    ("offpolicy/ratio_mean", "ratio", "mean rho; 1 but for chance while both policies have the same support"),
    ("offpolicy/ratio_std", "ratio", "standard deviation of rho"),
    ("offpolicy/ratio_min", "ratio", "smallest rho"),
    ("offpolicy/ratio_max", "ratio", "largest rho"),
    ("offpolicy/ratio_above_fraction", "fraction", "of tokens with rho > algorithm.truncation"),
    ("offpolicy/ratio_below_fraction", "fraction", "of tokens with rho < 1 / algorithm.truncation"),
    ("offpolicy/weight_mean", "ratio", "mean of what the correction makes of rho"),
    ("offpolicy/rejected_fraction", "fraction", "of tokens whose weight is 0"),
    ("offpolicy/chi2_token", "1", "mean rho^2 - 1"),
    ("offpolicy/chi2_sequence", "1", "the same with the product of rho over each response"),
    ("offpolicy/kl_k1", "nats", "-mean log rho: estimate of KL(pi_behavior, pi_old) a token"),
    ("offpolicy/kl_k3", "nats", "mean (rho - 1 - log rho): the same, never negative"),
    ("offpolicy/ess", "fraction", "(SUM rho)^2 / (n SUM rho^2) over tokens", 4),
    ("offpolicy/sequence_ess", "fraction", "the same over responses, with the product of rho over each one", 5),
    ("offpolicy/m2", "nats^2", "mean (log rho)^2", 6),
    ("offpolicy/tv", "probability", "mean of abs(pi_old - pi_behavior) of the tokens that were drawn", 6),
    ("offpolicy/gap_{gap}/tokens", "tokens", "in the loss"),
    ("offpolicy/gap_{gap}/ratio_mean", "ratio", "mean rho"),
    ("offpolicy/gap_{gap}/kl_k1", "nats", "as above"),
    ("offpolicy/gap_{gap}/kl_k3", "nats", "as above; the distance over g versions"),
    ("offpolicy/gap_{gap}/ratio_p01", "ratio", "1% quantile of rho", 3),
    ("offpolicy/gap_{gap}/ratio_p50", "ratio", "median of rho", 3),
    ("offpolicy/gap_{gap}/ratio_p99", "ratio", "99% quantile of rho", 3),
    ("offpolicy/gap_{gap}/ess", "fraction", "as above, over the tokens of the gap", 4),
    ("offpolicy/gap_{gap}/sequence_ess", "fraction",
     "as above; a response belongs to the gap of its oldest token in the loss", 5),
    ("offpolicy/gap_{gap}/sequences", "count", "responses of that gap", 5),
    ("offpolicy/gap_{gap}/m2", "nats^2", "as above", 6),
    ("offpolicy/gap_{gap}/tv", "probability", "as above", 6),
    ("offpolicy/gap_{gap}/clip_fraction", "fraction",
     "of the tokens of the gap that were beyond an edge of the trust region in their update"),
    ("offpolicy/gap_{gap}/lost_clipped_{sign}", "fraction",
     "of SUM abs(A) of that sign and gap: tokens beyond the edge of the clip that stops their sign", 8),
    ("offpolicy/gap_{gap}/lost_truncated_{sign}", "fraction",
     "the same: tokens with rho > algorithm.truncation (`decoupled`, `tis`), which keep truncation / rho of their "
     "pull", 8),
    ("offpolicy/gap_{gap}/lost_masked_{sign}", "fraction",
     "the same: tokens that are rejected whatever their sign (`icepop`, `dis`)", 8),
    ("offpolicy/mismatch_abs_mean", "nats",
     "mean abs(log rho) over the responses that the current version drew whole: only the two engines differ there. "
     "In the first step after a publication", 7),
    ("offpolicy/mismatch_prob_error", "ratio", "mean e^abs(log rho) over the same", 7),
    ("offpolicy/mismatch_floor", "nats", "the largest mismatch before the policy's first update", 7),
    ("offpolicy/mismatch_alarm", "0 or 1",
     "whether the mismatch is above weights.drift_factor times its floor, or what arithmetic explains", 7),
)  # fmt: skip

POLICY = _rows(
    ("policy/pg_loss", "loss", "the policy's clipped loss, mean over updates"),
    ("policy/lm_loss", "loss", "language-model loss of right responses, with its weight"),
    ("policy/entropy_loss", "loss", "entropy bonus, with its weight"),
    ("policy/kl_loss", "loss", "distance to the initial policy, with its weight"),
    ("policy/lm_token_fraction", "fraction", "of the tokens that are in the language-model loss"),
    ("policy/entropy", "nats", "of the policy at the start of the step, mean over tokens, exact"),
    ("policy/clip_fraction_high", "fraction", "of tokens with A > 0 (dis: any) above the upper edge"),
    ("policy/clip_fraction_low", "fraction", "of tokens with A < 0 (dis: any) below the lower edge"),
    ("policy/clip_fraction_dual", "fraction", "of tokens with A < 0 beyond algorithm.dual_clip"),
    ("policy/clipped_high_prob", "probability", "mean probability of the tokens above the upper edge"),
    ("policy/m2", "nats^2",
     "with algorithm.correction=m2: mean (log u)^2 of the tokens that a clip can stop, those with A > 0 and u > 1 or "
     "A < 0 and u < 1, mean over updates"),
    ("policy/m2_kept", "nats^2", "the same of those that stayed, at most algorithm.m2_threshold"),
    ("policy/ess_factor", "fraction",
     "with algorithm.ess_scaled_step: sqrt(ESS / n) over the responses of a mini-batch, which multiplied the learning "
     "rate; mean over updates"),
    ("policy/ratio_mean", "ratio",
     "mean of u = pi / pi_proximal, the ratio that is clipped, over the tokens of all updates"),
    ("policy/ratio_min", "ratio", "smallest u"),
    ("policy/ratio_max", "ratio", "largest u"),
    ("policy/kl_k1", "nats", "estimate of KL(pi_proximal, pi): -mean log u"),
    ("policy/kl_k2", "nats", "the same: mean (log u)^2 / 2"),
    ("policy/kl_k3", "nats", "the same: mean (u - 1 - log u)"),
    ("{network}/grad_norm", "1", "before clipping, mean over updates"),
    ("{network}/updates", "count", "optimizer steps of this step"),
    ("{network}/skipped_updates", "count", "that were left out because their gradients were not finite"),
    ("{network}/learning_rate", "1", "of the next update"),
)  # fmt: skip

CRITIC = _rows(
    ("critic/value_loss", "loss", "mean over updates"),
    ("critic/clip_fraction", "fraction", "of tokens whose value moved by more than algorithm.value_clip"),
    ("critic/value_mean", "reward", "of the values at the start of the step, over the tokens in the loss"),
    ("critic/value_min", "reward", "smallest of them"),
    ("critic/value_max", "reward", "largest of them"),
    ("critic/brier", "1", "mean squared difference of the verdict and the value as a probability of it"),
    ("critic/explained_variance", "1",
     "1 - Var(R - V) / Var(R), R the outcome; not there where all outcomes are alike", 11),
    ("critic/explained_variance_{position}", "1", "the same at one token of each response", 11),
    ("critic/value_correct_{position}", "reward", "mean value there in right responses"),
    ("critic/value_wrong_{position}", "reward", "mean value there in wrong responses"),
    ("critic/auc_{position}", "probability", "that a right response has the larger value there than a wrong one"),
    ("critic/gap_{gap}/explained_variance", "1", "the same over the tokens of that gap", 11),
    ("critic/gap_{gap}/bias", "reward", "mean V - R over the tokens of that gap", 11),
    ("critic/disagreement_mean", "reward",
     "standard deviation of the values of model.num_critics, mean over the tokens in the loss"),
    ("critic/agreement_fraction", "fraction",
     "of tokens without an advantage because of algorithm.agreement_mask; 0 while the critics are all alike"),
    ("critic/gate_open", "0 or 1", "whether algorithm.value_gate let the values into the advantages"),
    ("gae/lambda_mean", "1", "of the policy's GAE, over responses; with segments, at their starts"),
    ("gae/lambda_min", "1", "smallest"),
    ("gae/lambda_clamped_fraction", "fraction", "of responses too short for the formula: lambda 0"),
    ("gae/segment_length", "tokens",
     "of a segment on average, with algorithm.segment_probability; 1 is GAE at every token"),
    ("gae/advantage_mean", "1", "over the tokens in the loss, whitened if that is on"),
    ("gae/advantage_std", "1", "standard deviation"),
    ("gae/advantage_abs_max", "1", "largest magnitude"),
)  # fmt: skip

EVALUATION = _rows(
    ("accuracy/heldout", "fraction",
     "avg@k: of the held-out responses that are right; prompts that were not sampled count as wrong", 15),
    ("accuracy/heldout_low", "fraction", "lower end of its 95% interval over prompts", 15),
    ("accuracy/heldout_high", "fraction", "upper end", 15),
    ("accuracy/version", "versions", "that it was asked of"),
    ("accuracy/version_newest", "versions",
     "of the newest token in it: another one when a version was published meanwhile"),
    ("accuracy/publications", "count", "of weights that came in while it was sampled"),
    ("accuracy/length_mean", "tokens", "of the held-out responses"),
    ("accuracy/truncated_fraction", "fraction", "of them that ended at the length limit"),
    ("eval/num_prompts", "count", "held-out prompts"),
    ("eval/num_failed", "count", "of them that no actor could sample"),
    ("eval/num_errors", "count", "held-out responses on which the verifier failed"),
)  # fmt: skip

WEIGHTS = _rows(
    ("weights/probe_difference", "nats",
     "mean difference of log-probs of a fixed text, of the actor where it is largest"),
    ("weights/probe_max", "nats", "the largest difference of a single token"),
    ("weights/probe_floor", "nats", "the mean that was seen at version 0"),
    ("weights/gather_s", "s", "of the publication: gathering shards, beside sending"),
    ("weights/send_s", "s", "of the publication: sending"),
    ("weights/wait_s", "s", "of the publication: waiting for actors beyond that"),
)  # fmt: skip

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "The run": RUN,
    "The data": DATA,
    "Age": STALENESS,
    "The policy against what sampled": OFFPOLICY,
    "The policy's updates": POLICY,
    "The critic and the advantages": CRITIC,
    "Evaluation": EVALUATION,
    "Publication": WEIGHTS,
}
