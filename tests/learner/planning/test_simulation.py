"""Simulated runs against what follows from the settings by hand, and what holds for all of them."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import (
    ActorsConfig,
    AlgorithmConfig,
    Batching,
    Config,
    EvalConfig,
    OverAge,
    RolloutConfig,
    StalenessConfig,
    WeightsConfig,
)
from learner.planning.engine import EngineSpeed
from learner.planning.simulation import Outcome, simulate
from learner.planning.speeds import Speeds

TOKENS = 20  # of every response, 0.1 s each
BATCH = 4 * 2 * TOKENS
SAMPLING_S, PUBLISH_S = 2.0, 0.5


def config(max_staleness: int = 2, *, eval_every: int = 0, places: int = 4, **staleness: object) -> Config:
    return Config(
        rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=100),
        staleness=StalenessConfig(max_staleness=max_staleness, **staleness),  # type: ignore[arg-type]
        actors=ActorsConfig(groups_in_flight=places),
        eval=EvalConfig(every=eval_every, num_prompts=4, samples_per_prompt=2),
    )


def speeds(train_s: float, sigma: float = 0.0, sequence_s: float = 0.0) -> Speeds:
    return Speeds(
        train_token_s=(train_s / BATCH,),
        publish_s=(PUBLISH_S,),
        engine=EngineSpeed(base_s=SAMPLING_S / TOKENS, sequence_s=sequence_s),
        length_mean=float(TOKENS),
        length_sigma=sigma,
    )


def run(of: Config, train_s: float, actors: int = 1, steps: int = 12, sigma: float = 0.0) -> Outcome:
    return simulate(of, speeds(train_s, sigma), actors=actors, steps=steps)


def test_without_run_ahead_a_step_is_the_sum_of_its_parts() -> None:
    outcome = run(config(max_staleness=0), train_s=1.0)
    assert outcome.step_s == pytest.approx(SAMPLING_S + 1.0 + PUBLISH_S)
    assert (outcome.learner_idle, outcome.actors_idle) == pytest.approx((2 / 3.5, 1.5 / 3.5))
    assert outcome.trained_tokens_per_s == pytest.approx(BATCH / 3.5)
    assert outcome.staleness_hist == {0: 1.0}


def test_a_slow_actor_sets_the_pace_and_pauses_for_publications() -> None:
    """Sampling and training overlap, sampling and publishing do not."""
    outcome = run(config(max_staleness=1), train_s=1.0)
    assert outcome.step_s == pytest.approx(SAMPLING_S + PUBLISH_S)
    assert outcome.learner_idle == pytest.approx(1.0 / 2.5)
    assert outcome.actors_idle == pytest.approx(0.5 / 2.5)
    assert outcome.generated_tokens_per_s == pytest.approx(outcome.trained_tokens_per_s)
    assert outcome.staleness_hist == pytest.approx({0: 0.5, 1: 0.5}), "half is drawn before the version comes"


def test_a_slow_learner_never_waits() -> None:
    outcome = run(config(), train_s=6.0)
    assert outcome.learner_idle == 0
    assert outcome.step_s == pytest.approx(6.0 + PUBLISH_S)
    assert outcome.actors_idle == pytest.approx(1 - SAMPLING_S / 6.5)
    assert outcome.token_s == pytest.approx(SAMPLING_S / TOKENS)
    assert outcome.staleness_hist == {2: 1.0}, "sampled as early as the bound allows"


def test_engines_that_sleep_while_the_learner_trains_draw_nothing_meanwhile() -> None:
    sleeping = replace(config(max_staleness=1), actors=ActorsConfig(groups_in_flight=4, sleep_while_training=True))
    assert run(sleeping, train_s=1.0).step_s == pytest.approx(SAMPLING_S + 1.0 + PUBLISH_S)


def test_two_actors_on_half_of_the_groups_each_are_twice_as_fast() -> None:
    slow = replace(config(max_staleness=1), actors=ActorsConfig(groups_in_flight=2))
    assert run(slow, train_s=1.0).step_s == pytest.approx(2 * SAMPLING_S + PUBLISH_S)
    assert run(slow, train_s=1.0, actors=2).step_s == pytest.approx(SAMPLING_S + PUBLISH_S)


def test_a_version_of_two_steps_is_published_once() -> None:
    every_second = replace(config(), weights=WeightsConfig(publish_every=2))
    assert run(every_second, train_s=6.0).step_s == pytest.approx(6.0 + PUBLISH_S / 2)


def test_exact_staleness_waits_for_the_window_before_it_publishes() -> None:
    outcome = run(config(max_staleness=1, exact=True), train_s=1.0)
    assert outcome.staleness_hist == {1: 1.0}


def test_groups_that_teach_nothing_are_sampled_again() -> None:
    filtering = replace(config(), algorithm=AlgorithmConfig(dynamic_sampling=True))
    outcome = simulate(filtering, replace(speeds(6.0), uninformative=0.5), actors=2, steps=20)
    assert outcome.generated_tokens_per_s == pytest.approx(2 * outcome.trained_tokens_per_s, rel=0.3)
    assert outcome.dropped["uninformative"] > 40


def test_evaluation_takes_its_share_of_the_actors() -> None:
    without, beside = (run(config(1, eval_every=every), train_s=1.0) for every in (0, 2))
    assert beside.generated_tokens_per_s > 1.2 * beside.trained_tokens_per_s
    assert beside.step_s > 1.2 * without.step_s


def test_long_responses_are_counted_in_larger_units() -> None:
    """A thousand times as many tokens, each a thousand times as fast, are the same run."""
    long = replace(
        speeds(1.0, sigma=0.5),
        train_token_s=(1e-3 / BATCH,),
        engine=EngineSpeed(base_s=SAMPLING_S / TOKENS / 1e3),
        length_mean=1e3 * TOKENS,
    )
    unlimited = replace(config(), rollout=RolloutConfig(prompts_per_step=4, group_size=2, max_tokens=10**6))
    short, same = (simulate(unlimited, given, actors=1, steps=12) for given in (speeds(1.0, sigma=0.5), long))
    assert same.step_s == pytest.approx(short.step_s, rel=0.05)
    assert same.trained_tokens_per_s == pytest.approx(1e3 * short.trained_tokens_per_s, rel=0.05)


@settings(max_examples=12, deadline=None)
@given(
    bound=st.integers(0, 3),
    batching=st.sampled_from(Batching),
    train_s=st.floats(0.2, 6.0),
    sigma=st.floats(0.0, 1.0),
    actors=st.integers(1, 3),
    places=st.integers(1, 6),
)
def test_no_token_is_older_than_the_bound_and_what_is_trained_was_generated(
    bound: int, batching: Batching, train_s: float, sigma: float, actors: int, places: int
) -> None:
    outcome = simulate(
        config(bound, batching=batching, places=places), speeds(train_s, sigma, 0.01), actors=actors, steps=8
    )
    assert outcome.staleness_max <= bound
    assert sum(outcome.staleness_hist.values()) == pytest.approx(1)
    assert 0 <= outcome.learner_idle < 1 and 0 <= outcome.actors_idle < 1
    assert outcome.step_s >= train_s / 4 and not outcome.dropped


@pytest.mark.parametrize("batching", Batching)
def test_more_actors_never_train_less(batching: Batching) -> None:
    outcomes = [run(config(batching=batching), 1.0, actors=number, steps=30, sigma=0.7) for number in (1, 2, 4, 8)]
    rates = [outcome.trained_tokens_per_s for outcome in outcomes]
    assert all(more >= 0.97 * fewer for fewer, more in itertools.pairwise(rates))


def test_with_masking_older_tokens_are_trained_and_counted() -> None:
    masking = config(1, batching=Batching.first_finished, over_age=OverAge.mask)
    outcome = run(masking, train_s=0.5, actors=2, steps=30, sigma=1.0)
    assert outcome.masked > 0 and outcome.staleness_max > 0


def test_leases_beyond_the_places_keep_them_full() -> None:
    """A group holds its places until its longest response has ended, unless others wait for them."""

    def running(places: int, max_num_seqs: int | None) -> float:
        of = replace(config(), actors=ActorsConfig(groups_in_flight=places, max_num_seqs=max_num_seqs))
        return simulate(of, speeds(train_s=0.1, sigma=1.0), actors=1, steps=60).running

    assert running(8, 8) > 1.2 * running(4, None)
