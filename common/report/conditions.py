"""The conditions of advice: functions of what a run measured that return a sentence, or None where they do not hold.

What each asks for in words, and how urgent it is, is in advice.py.
"""

import math
from dataclasses import dataclass

from common.config import Correction
from common.report.reading import Run, number, values
from common.report.scales import percent, short
from common.report.summary import Evaluation, Summary, duration
from common.report.views.correction import LOSSES, SIGNS
from common.report.views.flow import publish_share
from common.report.views.view import now_by_gap

ABSENT = "not a number"

WAITS = 0.15  # share of time: who waits less is not waiting
FULL = 0.9  # of the window: with less the bound holds nobody up
MOST_MORE_ACTORS = 3  # times as many as there are
LOW_ESS = 0.5  # of a batch's weight
OFTEN = 0.25  # of the steps
LOW_SEQUENCE_ESS = 0.3
HIGH_ESS = 0.9
AFFORDABLE_ESS = 0.8
LARGE_WASTE = 0.05  # of generated tokens
LARGE_LOSS = 0.2  # of the advantage of one sign and age
LARGE_STALL = 0.15  # of a step's time
MANY_TRUNCATED = 0.2  # of responses
MANY_ERRORS = 0.01  # of verdicts
STARVED = 0.9  # trained over sampled length


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rules look at. Shares of time are of the recent steps; None: not measured."""

    run: Run
    summary: Summary
    learner_idle: float | None
    actors_idle: float | None
    ess: dict[int, float]  # version gap -> token ESS

    @property
    def bound(self) -> int:
        return self.run.config.staleness.max_staleness


def alarm(facts: Facts) -> str | None:
    active = facts.run.last("alarm/active")
    alarms = facts.run.alarms
    if not active or not alarms:
        return None
    last = alarms[-1]
    value, limit = number(last, "value"), number(last, "limit")
    said = f"{last.get('name')} is {ABSENT if value is None else short(value)}"
    beyond = "" if limit is None else f", the limit {short(limit)}"
    which = "An alarm is active" if active <= 1 else f"{active:.0f} alarms are active, the last"
    return f"{which} since step {last['step']}: {said}{beyond}; its alarm says what helps."


def incomplete(facts: Facts) -> str | None:
    last = facts.summary.evaluations[-1:]
    if not last or last[0].is_complete:
        return None
    failed, errors = last[0].num_failed, last[0].num_errors
    return (
        f"The last accuracy is too low by an unknown amount: {failed} prompts were not sampled and the verifier failed "
        f"on {errors} responses, which count as wrong; the logs say why."
    )


def mismatch(facts: Facts) -> str | None:
    alarms = facts.run.now("offpolicy/mismatch_alarm")
    now, floor = facts.run.now("offpolicy/mismatch_abs_mean"), facts.run.last("offpolicy/mismatch_floor")
    if not alarms or alarms <= 0.5 or now is None or not floor:
        return None
    return (
        f"Engine and learner differ by {short(now)} nats a token on fresh responses, {now / floor:.0f} times the "
        "floor: that is no staleness, one of the two computes another policy (the learner's log names the tensors)."
    )


def verifier(facts: Facts) -> str | None:
    verdicts = facts.summary.verdicts
    total, errors = sum(verdicts.values()), verdicts.get("error", 0)
    if not total or errors / total <= MANY_ERRORS:
        return None
    share = percent(errors / total, 0.001)
    return f"The verifier failed on {share} of the responses, whose groups are lost: mend verifier.function."


def falling(facts: Facts) -> str | None:
    if len(facts.summary.evaluations) < 2:
        return None
    best = max(facts.summary.evaluations, key=lambda point: point.accuracy)
    last = facts.summary.evaluations[-1]
    if interval(last)[1] >= interval(best)[0]:
        return None
    return (
        f"Accuracy fell from {percent(best.accuracy)} at version {best.version} to {percent(last.accuracy)}: lower "
        "learner.policy.learning_rate, or let it fall (learner.policy.schedule=linear)."
    )


def useless_critic(facts: Facts) -> str | None:
    explained = facts.run.now("critic/explained_variance")
    if explained is None or explained > 0:
        return None
    settings = facts.run.config.algorithm
    gate = "" if settings.value_gate else " or set algorithm.value_gate=true"
    fix = f"pretrain longer (algorithm.critic_warmup_steps is {settings.critic_warmup_steps}){gate}"
    return f"The critic explains nothing (EV {explained:.1f}): {fix}."


def too_old(facts: Facts) -> str | None:
    """Means hide it: the effective sample size of old tokens swings from step to step."""
    for gap in sorted(facts.ess.keys() - {0}):
        kept = values(facts.run.recent, f"offpolicy/gap_{gap}/ess")
        share = sum(ess < LOW_ESS for ess in kept) / len(kept)
        if share >= OFTEN:
            wider, _ = affordable_bound(gap, facts.ess[gap])
            lower = f"lower staleness.max_staleness to {min(max(wider, 1), gap - 1)}"
            fix = lower if gap > 1 else "lower learner.policy.learning_rate"
            if facts.run.config.algorithm.correction is Correction.none:
                fix = f"set algorithm.correction=decoupled, or {fix}"
            lost = f"keep less than half of their weight in {percent(share)} of the steps"
            return f"Tokens {_versions(gap)} old {lost}: {fix}."
    return None


def learner_waits(facts: Facts) -> str | None:
    waited, idle = facts.learner_idle, facts.actors_idle or 0.0
    if waited is None or waited < WAITS or idle >= WAITS or facts.run.config.learner.replay is not None:
        return None
    count = max(1, round(facts.run.now("actors/connected") or facts.run.config.actors.count))
    more, left = more_actors(waited, idle, count)
    actors, own = ("actor", "its") if more == 1 else ("actors", "their")
    return (
        f"The learner waited {percent(waited)} of the time: {more} more {actors} would bring it to about "
        f"{percent(left)}, with cores or a GPU of {own} own."
    )


def more_actors(waited: float, idle: float, count: int) -> tuple[int, float]:
    """(how many more, the learner's share of waiting then): the fewest that bring it below WAITS, at most
    MOST_MORE_ACTORS times `count`.

    A step now lasts 1. The learner works 1 - `waited` of it, and its batch costs `count` actors 1 - `idle`. With n
    actors a step lasts max(1 - waited, (1 - idle) count / n).
    """
    work = 1.0 - waited
    for more in range(1, MOST_MORE_ACTORS * count + 1):
        lasts = max(work, (1.0 - idle) * count / (count + more))
        left = 1.0 - work / lasts
        if left < WAITS:
            break
    return more, left


def both_wait(facts: Facts) -> str | None:
    waited, idle = facts.learner_idle, facts.actors_idle
    if waited is None or idle is None or min(waited, idle) < WAITS or facts.run.config.staleness.exact:
        return None
    both = f"they waited {percent(waited)} and {percent(idle)} of the time"
    if facts.bound == 0:
        return f"With max_staleness=0 learner and actors take turns ({both}): max_staleness=1 lets them overlap."
    fill = facts.run.now("queue/window_fill")
    if fill is not None and fill < FULL:
        fix = f"the window is {percent(fill)} full, so slow leases and not the bound hold the batches up"
    else:
        fix = f"staleness.max_staleness={facts.bound + 1} lets them overlap more"
    return f"Learner and actors wait for each other ({both}): {fix}."


def actors_wait(facts: Facts) -> str | None:
    waited, idle = facts.learner_idle or 0.0, facts.actors_idle
    if idle is None or idle < WAITS or waited >= WAITS or facts.run.config.staleness.exact:
        return None
    count = max(1, round(facts.run.now("actors/connected") or facts.run.config.actors.count))
    enough = max(1, math.ceil(count * (1.0 - idle) / (1.0 - WAITS / 2)))
    fix = f"{enough} of {count} would do, or " if enough < count else ""
    return f"Actors were idle {percent(idle)} of the time: {fix}give the learner more ranks or cores."


_REASONS = {
    "stale": "raise staleness.max_staleness or shorten rollout.max_tokens",
    "actor_lost": "look at the logs of the actors that were lost",
    "hung": "raise transport.lease_timeout_s, or look at the engine that hangs",
    "straggler": "give slow actors fewer groups at once (actors.groups_in_flight)",
    "uninformative": "leave out prompts that are always right or always wrong",
    "verifier_error": "mend the verifier",
    "failed": "look at the logs of the actors",
}


def waste(facts: Facts) -> str | None:
    dropped, generated = facts.summary.dropped_tokens, facts.summary.generated_tokens
    total = sum(dropped.values())
    if not generated or total / generated < LARGE_WASTE:
        return None
    reason = max(dropped, key=lambda name: dropped[name])
    fix = _REASONS.get(reason, "the learner's log says which groups")
    return f"{percent(total / generated)} of the generated tokens were dropped, most as {reason}: {fix}."


_LOSS_FIXES = {
    "clipped": "take smaller steps (learner.policy.learning_rate, fewer learner.mini_batches)",
    "truncated": "raise algorithm.truncation or lower the bound",
    "masked": "widen the band of algorithm.correction={correction} or lower the bound",
}


def lost_advantage(facts: Facts) -> str | None:
    losses = {
        (share, loss, sign, gap)
        for loss in LOSSES
        for sign in SIGNS
        for gap, share in now_by_gap(facts.run, f"offpolicy/gap_{{}}/lost_{loss}_{sign}").items()
    }
    if not losses or max(losses)[0] < LARGE_LOSS:
        return None
    share, loss, sign, gap = max(losses)
    correction = facts.run.config.algorithm.correction
    fix = _LOSS_FIXES[loss].format(correction=correction)
    if loss == "clipped" and correction is Correction.m2:
        fix = f"raise algorithm.m2_threshold, or {fix}"
    return f"{percent(share)} of the {sign} advantage of tokens {_versions(gap)} old is {loss}: {fix}."


def sequences(facts: Facts) -> str | None:
    tokens, sequences = facts.run.now("offpolicy/ess"), facts.run.now("offpolicy/sequence_ess")
    if tokens is None or sequences is None or tokens < AFFORDABLE_ESS or sequences >= LOW_SEQUENCE_ESS:
        return None
    match facts.run.config.algorithm.correction:
        case Correction.icepop | Correction.dis:
            fix = "narrow its band"
        case Correction.m2:
            fix = "a lower algorithm.m2_threshold"
        case _:
            fix = "a mask (algorithm.correction=icepop)"
    return (
        f"Whole responses keep {sequences:.2f} of their weight though single tokens keep {tokens:.2f}: {fix} or a "
        "lower learner.policy.learning_rate would help."
    )


def truncated(facts: Facts) -> str | None:
    share = facts.run.now("length/truncated_fraction")
    if share is None or share < MANY_TRUNCATED:
        return None
    limit = facts.run.config.rollout.max_tokens
    return f"{percent(share)} of the responses are cut off at rollout.max_tokens={limit}: raise it, or they stay wrong."


def stall(facts: Facts) -> str | None:
    share = publish_share(facts.run)
    if share is None or share < LARGE_STALL or facts.run.config.staleness.exact:
        return None
    every = facts.run.config.weights.publish_every
    return f"Publishing takes {percent(share)} of the time: weights.publish_every={2 * every} would halve it."


def starved(facts: Facts) -> str | None:
    sampled, trained = facts.run.now("selection/length_sampled"), facts.run.now("selection/length_trained")
    if not sampled or trained is None or trained / sampled >= STARVED:
        return None
    return (
        f"Trained responses are {percent(1 - trained / sampled)} shorter than sampled ones, so long ones are lost: "
        "raise staleness.max_staleness or lower rollout.max_tokens."
    )


def affordable(facts: Facts) -> str | None:
    """Where the learner waits and the window is full; where it is the learner that is slow, tokens would only grow
    older."""
    fill = facts.run.now("queue/window_fill")
    oldest = max(facts.ess, default=0)
    if (facts.learner_idle or 0.0) < WAITS or fill is None or fill < FULL:
        return None
    if oldest < max(facts.bound, 1) or facts.ess[oldest] < HIGH_ESS:
        return None
    wider, kept = affordable_bound(oldest, facts.ess[oldest])
    if wider <= facts.bound:
        return None
    return (
        f"Tokens {_versions(oldest)} old keep {facts.ess[oldest]:.2f} of their weight: max_staleness={wider} is "
        f"affordable (about {kept:.2f} there)."
    )


def affordable_bound(gap: int, ess: float) -> tuple[int, float]:
    """(the largest age up to twice `gap` that keeps AFFORDABLE_ESS, what it keeps), when `gap` keeps `ess`.

    The policy's distance grows with age g at most in proportion, so that -log ESS, its square, grows as g^2.
    """
    ages = [(age, min(max(ess, 0.0), 1.0) ** ((age / gap) ** 2)) for age in range(2 * gap + 1)]
    return max((age, kept) for age, kept in ages if kept >= AFFORDABLE_ESS)


def noise(facts: Facts) -> str | None:
    points = facts.summary.evaluations
    if len(points) < 2 or falling(facts) is not None:
        return None
    first, last = points[0], points[-1]
    if interval(first)[0] > interval(last)[1] or interval(last)[0] > interval(first)[1]:
        return None
    return (
        f"Accuracy went from {percent(first.accuracy)} to {percent(last.accuracy)}, within its 95% intervals: raise "
        "eval.num_prompts before concluding anything."
    )


def interval(point: Evaluation) -> tuple[float, float]:
    """Its 95% interval. Of an earlier release: as if the k responses to a prompt were all alike, which is the widest;
    all there is where not even the number of prompts is known."""
    if point.low is not None and point.high is not None:
        return point.low, point.high
    if not point.num_prompts:
        return 0.0, 1.0
    half = 1.96 * math.sqrt(point.accuracy * (1.0 - point.accuracy) / point.num_prompts)
    return point.accuracy - half, point.accuracy + half


def slack(facts: Facts) -> str | None:
    oldest = max(values(facts.run.recent, "staleness/token_max"), default=None)
    if oldest is None or facts.bound == 0 or oldest >= facts.bound:
        return None
    allowed = f"{oldest:.0f} of {facts.bound} allowed versions"
    return f"No token was more than {allowed} old: a lower staleness.max_staleness would cost nothing."


def accuracy(facts: Facts) -> str | None:
    points = facts.summary.evaluations
    if not points:
        return None
    last = points[-1]
    interval = "" if last.low is None or last.high is None else f" (95%: {percent(last.low)} to {percent(last.high)})"
    took = duration(facts.summary.wall_s)
    tokens = facts.summary.generated_tokens
    spent = took if tokens is None else f"{took} and {short(tokens)} generated tokens"
    if len(points) == 1:
        return f"Accuracy is {percent(last.accuracy)}{interval} for version {last.version}, the only one evaluated."
    return f"Accuracy went from {percent(points[0].accuracy)} to {percent(last.accuracy)}{interval} in {spent}."


def balance(facts: Facts) -> str | None:
    waited, idle = facts.learner_idle, facts.actors_idle
    if waited is None or idle is None or waited >= WAITS or idle >= WAITS:
        return None
    return f"Learner and actors are in balance: they waited {percent(waited)} and {percent(idle)} of the time."


def cheap_age(facts: Facts) -> str | None:
    oldest = max(facts.ess, default=0)
    if oldest == 0 or facts.ess[oldest] < HIGH_ESS or affordable(facts) is not None:
        return None
    return f"Age is cheap here: tokens {_versions(oldest)} old keep {facts.ess[oldest]:.2f} of their weight."


def useful_critic(facts: Facts) -> str | None:
    explained = facts.run.now("critic/explained_variance")
    if explained is None or explained <= 0:
        return None
    return f"The critic explains {explained:.2f} of the variance of the outcomes."


def _versions(gap: int) -> str:
    return f"{gap} version{'' if gap == 1 else 's'}"
