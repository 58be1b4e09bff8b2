"""What the numbers of a run say should be done: a table of rules, each a condition and a sentence.

A rule looks at the last third of the policy's steps. Those that apply are said in the order of their priority; the ones
below GOOD_NEWS ask for nothing and are said when there is not enough else. docs/inspect.md lists all rules.
"""

from collections.abc import Callable
from dataclasses import dataclass

from common.report import conditions
from common.report.conditions import Facts
from common.report.reading import Run, time_mean
from common.report.summary import summarise
from common.report.views.view import now_by_gap

SHOWN = 3  # sentences at the head of a report
FEWEST_STEPS = 5  # of the policy, before which nothing is advised
GOOD_NEWS = 20  # priorities below it


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One sentence. `rule` is the name of its row in docs/inspect.md."""

    rule: str
    priority: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`when` is the condition in words, as docs/inspect.md has it; `say` returns the sentence, or None."""

    name: str
    priority: int
    when: str
    say: Callable[[Facts], str | None]


def advise(run: Run) -> list[Advice]:
    """All that applies, the most urgent first. Empty while the policy has done fewer than FEWEST_STEPS."""
    if len(run.policy_steps) < FEWEST_STEPS:
        return []
    facts = Facts(
        run=run,
        summary=summarise(run),
        learner_idle=time_mean(run.recent, "learner/idle_fraction"),
        actors_idle=time_mean(run.recent, "actors/idle_fraction"),
        ess=now_by_gap(run, "offpolicy/gap_{}/ess"),
    )
    said = ((rule, rule.say(facts)) for rule in RULES)
    return [Advice(rule=rule.name, priority=rule.priority, text=text) for rule, text in said if text is not None]


RULES = (
    Rule(
        name="alarm", priority=100, when="`alarm/active` is above 0 in the last line that has it", say=conditions.alarm
    ),
    Rule(
        name="incomplete",
        priority=95,
        when="prompts or responses of the last evaluation failed",
        say=conditions.incomplete,
    ),
    Rule(
        name="mismatch",
        priority=90,
        when="`offpolicy/mismatch_alarm` is 1 in more than half of the steps",
        say=conditions.mismatch,
    ),
    Rule(name="verifier", priority=85, when="more than 1% of all verdicts are `error`", say=conditions.verifier),
    Rule(
        name="falling",
        priority=82,
        when="the last interval of accuracy lies below that of the best",
        say=conditions.falling,
    ),
    Rule(
        name="useless_critic",
        priority=80,
        when="`critic/explained_variance` is 0 or less",
        say=conditions.useless_critic,
    ),
    Rule(
        name="too_old",
        priority=75,
        when="the token ESS of an age is below 0.5 in a quarter of the steps",
        say=conditions.too_old,
    ),
    Rule(
        name="learner_waits",
        priority=70,
        when="the learner waits 15% or more, actors less",
        say=conditions.learner_waits,
    ),
    Rule(name="both_wait", priority=68, when="learner and actors both wait 15% or more", say=conditions.both_wait),
    Rule(name="actors_wait", priority=66, when="actors wait 15% or more, the learner less", say=conditions.actors_wait),
    Rule(name="waste", priority=64, when="5% or more of the generated tokens were dropped", say=conditions.waste),
    Rule(
        name="lost_advantage",
        priority=60,
        when="20% or more of the advantage of one sign and age is lost in one way",
        say=conditions.lost_advantage,
    ),
    Rule(
        name="sequences",
        priority=58,
        when="the sequence ESS is below 0.3, the token ESS 0.8 or more",
        say=conditions.sequences,
    ),
    Rule(
        name="truncated",
        priority=56,
        when="20% or more of the responses reach `rollout.max_tokens`",
        say=conditions.truncated,
    ),
    Rule(name="stall", priority=54, when="publication takes 15% or more of the time", say=conditions.stall),
    Rule(
        name="starved",
        priority=52,
        when="trained responses are 10% or more shorter than sampled ones",
        say=conditions.starved,
    ),
    Rule(
        name="affordable",
        priority=40,
        when="the learner waits 15% or more, the window is full, and its oldest tokens have a token ESS of 0.9 or more",
        say=conditions.affordable,
    ),
    Rule(
        name="noise", priority=35, when="the intervals of the first and the last accuracy overlap", say=conditions.noise
    ),
    Rule(name="slack", priority=30, when="no token was as old as `staleness.max_staleness`", say=conditions.slack),
    Rule(name="accuracy", priority=10, when="an evaluation has ended", say=conditions.accuracy),
    Rule(name="balance", priority=8, when="learner and actors both wait less than 15%", say=conditions.balance),
    Rule(name="cheap_age", priority=6, when="the token ESS of the oldest age is 0.9 or more", say=conditions.cheap_age),
    Rule(name="useful_critic", priority=4, when="`critic/explained_variance` is above 0", say=conditions.useful_critic),
)
