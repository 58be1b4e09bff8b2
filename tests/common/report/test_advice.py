"""Every rule of advice on a made-up run that it is about, and the table of rules in docs/inspect.md."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import ActorsConfig, AlgorithmConfig, Correction, StalenessConfig
from common.report.advice import GOOD_NEWS, RULES, SHOWN, advise
from common.report.compare import compare
from common.report.conditions import AFFORDABLE_ESS, WAITS, affordable_bound, more_actors
from common.report.html import page
from common.report.reading import read_run
from tests.support.made_up_run import MadeUp, config, write_run

DOCS = Path(__file__).parents[3] / "docs" / "inspect.md"
ALARM = {"step": 70, "time": 1.7e9, "kind": "alarm", "name": "offpolicy/ess", "value": 0.2, "limit": 0.3}


def changed(**metrics: float | Callable[[int], float | None] | None) -> MadeUp:
    return MadeUp(change={name.replace("__", "/"): value for name, value in metrics.items()})


CASES: dict[str, tuple[MadeUp, str]] = {
    "alarm": (
        replace(changed(alarm__active=2.0), events=[ALARM]),
        "2 alarms are active, the last since step 70: offpolicy/ess is 0.2, the limit 0.3; its alarm says what helps.",
    ),
    "incomplete": (changed(eval__num_failed=3.0), "3 prompts were not sampled and the verifier failed on 0 responses"),
    "mismatch": (
        changed(offpolicy__mismatch_alarm=1.0, offpolicy__mismatch_abs_mean=4.6e-5),
        "differ by 4.6e-5 nats a token on fresh responses, 100 times the floor: that is no staleness",
    ),
    "verifier": (changed(verdicts__error=300.0), "The verifier failed on 3.2% of the responses"),
    "falling": (
        MadeUp(accuracies=(0.2, 0.5, 0.9, 0.8, 0.7, 0.6, 0.5)),
        "Accuracy fell from 90% at version 20 to 50%: lower learner.policy.learning_rate",
    ),
    "useless_critic": (
        changed(critic__explained_variance=-0.1),
        "The critic explains nothing (EV -0.1): pretrain longer (algorithm.critic_warmup_steps is 50) or set "
        "algorithm.value_gate=true.",
    ),
    "too_old": (
        changed(offpolicy__gap_2__ess=0.31),
        "Tokens 2 versions old keep less than half of their weight in 100% of the steps: lower staleness.max_staleness "
        "to 1.",
    ),
    "learner_waits": (
        replace(changed(learner__idle_fraction=0.41, actors__idle_fraction=0.0)),
        "The learner waited 41% of the time: 1 more actor would bring it to about 12%, with cores or a GPU of its own.",
    ),
    "both_wait": (
        changed(learner__idle_fraction=0.3, actors__idle_fraction=0.2, queue__window_fill=1.0),
        "wait for each other (they waited 30% and 20% of the time): staleness.max_staleness=3 lets them overlap more.",
    ),
    "actors_wait": (
        changed(actors__idle_fraction=0.6),
        "Actors were idle 60% of the time: 1 of 2 would do, or give the learner more ranks or cores.",
    ),
    "waste": (
        changed(dropped_tokens__stale=60_000.0),
        "13% of the generated tokens were dropped, most as stale: raise staleness.max_staleness",
    ),
    "lost_advantage": (
        changed(offpolicy__gap_2__lost_truncated_negative=0.34),
        "34% of the negative advantage of tokens 2 versions old is truncated: raise algorithm.truncation",
    ),
    "sequences": (
        changed(offpolicy__sequence_ess=0.12),
        "Whole responses keep 0.12 of their weight though single tokens keep 0.98: a mask (algorithm.correction=icepop",
    ),
    "truncated": (
        changed(length__truncated_fraction=0.31),
        "31% of the responses are cut off at rollout.max_tokens=128: raise it",
    ),
    "stall": (
        changed(time__publish_s=1.5),
        "Publishing takes 25% of the time: weights.publish_every=2 would halve it.",
    ),
    "starved": (
        changed(selection__length_trained=40.0, selection__length_sampled=50.0),
        "Trained responses are 20% shorter than sampled ones, so long ones are lost",
    ),
    "affordable": (
        changed(offpolicy__gap_2__ess=0.97, learner__idle_fraction=0.3, queue__window_fill=1.0),
        "Tokens 2 versions old keep 0.97 of their weight: max_staleness=4 is affordable (about 0.89 there).",
    ),
    "noise": (
        MadeUp(accuracies=(0.44, 0.46, 0.45, 0.46, 0.47, 0.46, 0.47)),
        "Accuracy went from 44% to 47%, within its 95% intervals: raise eval.num_prompts",
    ),
    "slack": (
        changed(staleness__token_max=1.0),
        "No token was more than 1 of 2 allowed versions old: a lower staleness.max_staleness would cost nothing.",
    ),
    "accuracy": (MadeUp(), "Accuracy went from 21% to 90% (95%: 86% to 94%) in 7 min 12 s and 484k generated tokens."),
    "balance": (MadeUp(), "Learner and actors are in balance: they waited 6% and 5% of the time."),
    "cheap_age": (MadeUp(), "Age is cheap here: tokens 2 versions old keep 0.98 of their weight."),
    "useful_critic": (MadeUp(), "The critic explains 0.57 of the variance of the outcomes."),
}


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_a_rule_says_its_sentence_of_the_run_that_it_is_about(name: str, tmp_path: Path) -> None:
    made, sentence = CASES[name]
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert sentence in said.get(name, f"nothing, but {said}")


@pytest.mark.parametrize("name", [rule.name for rule in RULES if rule.priority >= GOOD_NEWS])
def test_a_rule_that_asks_for_something_is_silent_of_a_healthy_run(name: str, healthy: list[str]) -> None:
    assert name not in healthy


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [advice.rule for advice in advise(read_run(write_run(tmp_path_factory.mktemp("healthy"))))]


def test_a_healthy_run_has_three_sentences_all_the_same(healthy: list[str]) -> None:
    assert len(healthy) >= SHOWN


def test_the_most_urgent_comes_first_and_every_rule_has_its_own_priority() -> None:
    priorities = [rule.priority for rule in RULES]
    assert priorities == sorted(set(priorities), reverse=True)


def test_every_rule_is_in_the_docs_with_its_priority_and_condition() -> None:
    section = DOCS.read_text().partition("\n## Advice\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    documented = {cells[0].strip("`"): cells[1:3] for cells in rows if len(cells) == 4}
    assert {rule.name: [str(rule.priority), rule.when] for rule in RULES} == {
        name: cells for name, cells in documented.items() if name != "rule"
    }


def test_nothing_is_advised_of_a_warm_up_or_of_four_steps(tmp_path: Path) -> None:
    assert advise(read_run(write_run(tmp_path / "warmup", MadeUp(steps=0)))) == []
    assert advise(read_run(write_run(tmp_path / "four", MadeUp(steps=4)))) == []


def test_turns_at_bound_0_are_what_was_asked_for(tmp_path: Path) -> None:
    made = replace(
        changed(learner__idle_fraction=0.4, actors__idle_fraction=0.5),
        config=config(staleness=StalenessConfig(max_staleness=0)),
    )
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert "With max_staleness=0 learner and actors take turns" in said["both_wait"]


@pytest.mark.parametrize(("idle", "enough"), [(1.0, 1), (0.5, 2)])
def test_actors_that_only_wait_are_not_advised_to_be_none(tmp_path: Path, idle: float, enough: int) -> None:
    made = changed(learner__idle_fraction=0.0, actors__idle_fraction=idle, actors__connected=3.0)
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert f": {enough} of 3 would do" in said["actors_wait"]


def test_a_window_that_is_not_full_is_not_widened(tmp_path: Path) -> None:
    made = changed(learner__idle_fraction=0.3, actors__idle_fraction=0.3, queue__window_fill=0.6)
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert "the window is 60% full, so slow leases and not the bound" in said["both_wait"]
    assert "affordable" not in said


def test_a_single_evaluation_is_no_change(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "once", MadeUp(accuracies=(0.21,))))
    said = {advice.rule: advice.text for advice in advise(run)}
    assert said["accuracy"] == "Accuracy is 21% (95%: 17% to 25%) for version 0, the only one evaluated."
    content, comparison = page(run), compare([tmp_path / "once", write_run(tmp_path / "more")])
    assert "the only one, 95%: 17% to 25%" in content and "21% for version 0." in content
    assert comparison.facts["accuracy, first -> last (95%)"] == ("21% (17% to 25%)", "21% -> 90% (86% to 94%)")


def test_a_wider_bound_is_not_advised_where_the_learner_is_the_slow_one_or_nobody_knows(tmp_path: Path) -> None:
    made = changed(actors__idle_fraction=0.6, offpolicy__gap_2__ess=0.97, queue__window_fill=1.0)
    assert "affordable" not in {advice.rule for advice in advise(read_run(write_run(tmp_path / "slow", made)))}
    unknown = changed(learner__idle_fraction=0.3, offpolicy__gap_2__ess=0.97, queue__window_fill=None)
    assert "affordable" not in {advice.rule for advice in advise(read_run(write_run(tmp_path / "unknown", unknown)))}


def test_ages_that_are_too_old_now_and_then_are_found_behind_their_mean(tmp_path: Path) -> None:
    made = changed(offpolicy__gap_2__ess=lambda step: 0.1 if step % 3 == 0 else 0.95)
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert "less than half of their weight in 32% of the steps" in said["too_old"]


def test_the_end_of_a_complete_run_in_which_actors_are_done_is_left_out(tmp_path: Path) -> None:
    made = changed(actors__idle_fraction=lambda step: 1.0 if step > 58 else 0.01)
    assert "balance" in {advice.rule for advice in advise(read_run(write_run(tmp_path, made)))}
    assert read_run(tmp_path).recent[-1]["step"] == 70


def test_waits_that_an_exact_age_asks_for_are_not_advised_against(tmp_path: Path) -> None:
    made = replace(
        changed(time__publish_s=3.0, actors__idle_fraction=0.6, learner__idle_fraction=0.4),
        config=config(staleness=StalenessConfig(exact=True)),
    )
    rules = {advice.rule for advice in advise(read_run(write_run(tmp_path, made)))}
    assert rules.isdisjoint({"stall", "actors_wait", "both_wait"})


def test_without_a_recorded_interval_the_widest_is_taken(tmp_path: Path) -> None:
    """Of 96 prompts: 6 points to both sides at an accuracy of 90%, 8 at 80%."""
    for last, rule in ((0.62, "falling"), (0.8, "accuracy")):
        made = MadeUp(accuracies=(0.2, 0.5, 0.9, 0.8, 0.7, 0.7, last), half_interval=None)
        rules = [advice.rule for advice in advise(read_run(write_run(tmp_path / rule, made)))]
        assert ("falling" in rules) == (rule == "falling")


def test_who_corrects_nothing_is_told_to_before_the_bound_is_lowered(tmp_path: Path) -> None:
    made = replace(
        changed(offpolicy__gap_2__ess=0.3), config=config(algorithm=AlgorithmConfig(correction=Correction.none))
    )
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert said["too_old"].endswith("set algorithm.correction=decoupled, or lower staleness.max_staleness to 1.")


def test_who_masks_already_is_told_to_narrow_the_band(tmp_path: Path) -> None:
    made = replace(
        changed(offpolicy__sequence_ess=0.1), config=config(algorithm=AlgorithmConfig(correction=Correction.icepop))
    )
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert "narrow its band" in said["sequences"]


def test_who_bounds_the_second_moment_is_told_of_its_threshold(tmp_path: Path) -> None:
    made = replace(
        changed(offpolicy__sequence_ess=0.1, offpolicy__gap_2__lost_clipped_positive=0.6),
        config=config(algorithm=AlgorithmConfig(correction=Correction.m2)),
    )
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert "a lower algorithm.m2_threshold or a lower learner.policy.learning_rate" in said["sequences"]
    assert "is clipped: raise algorithm.m2_threshold, or take smaller steps" in said["lost_advantage"]


def test_a_run_of_an_earlier_release_counts_the_actors_that_it_was_told_to_start(tmp_path: Path) -> None:
    made = replace(
        changed(learner__idle_fraction=0.5, actors__idle_fraction=0.0, actors__connected=None),
        config=config(actors=ActorsConfig(count=4)),
    )
    said = {advice.rule: advice.text for advice in advise(read_run(write_run(tmp_path, made)))}
    assert "3 more actors would bring it to about 12%" in said["learner_waits"]


@given(st.floats(WAITS, 0.99), st.floats(0.0, 0.14), st.integers(1, 64))
def test_the_fewest_actors_that_help_are_asked_for(waited: float, idle: float, count: int) -> None:
    """Against the definition: a step lasts as long as the slower side takes."""
    more, left = more_actors(waited, idle, count)

    def share(actors: int) -> float:
        return 1 - (1 - waited) / max(1 - waited, (1 - idle) * count / actors)

    assert left == pytest.approx(share(count + more)) and 1 <= more <= 3 * count
    assert left < WAITS or more == 3 * count
    assert more == 1 or share(count + more - 1) >= WAITS


@given(st.integers(1, 30), st.floats(0.01, 1.0))
def test_an_affordable_bound_keeps_enough_and_the_next_does_not(gap: int, ess: float) -> None:
    wider, kept = affordable_bound(gap, ess)
    assert 0 <= wider <= 2 * gap and kept >= AFFORDABLE_ESS
    assert math.isclose(kept, ess ** ((wider / gap) ** 2))
    assert wider == 2 * gap or ess ** (((wider + 1) / gap) ** 2) < AFFORDABLE_ESS
    assert affordable_bound(gap, 1e300) == (2 * gap, 1.0)
