"""How many actors a learner needs, and what other settings would change: simulations side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from common.config import Batching, Config, ConfigError, OverAge
from common.memory import num_sequences
from common.validation import validate
from learner.planning.limits import Patience
from learner.planning.simulation import Outcome, simulate
from learner.planning.speeds import Speeds

MOST_ACTORS = 1024
GROWTH = 1.02  # of the trained tokens, below which twice as many actors are of no use


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """`outcomes` ascend in the number of actors. `smallest` keeps the learner busy; None: no number does."""

    outcomes: tuple[Outcome, ...]
    planned: Outcome
    smallest: Outcome | None

    @property
    def best(self) -> Outcome:
        """The smallest number of those simulated that trains hardly less than any other."""
        most = max(outcome.trained_tokens_per_s for outcome in self.outcomes)
        return next(outcome for outcome in self.outcomes if outcome.trained_tokens_per_s * GROWTH >= most)


def plan_fleet(config: Config, speeds: Speeds, *, idle: float, steps: int, patience: Patience | None = None) -> Fleet:
    """Simulates actors.count, then 1, 2, 4, ... actors until the learner idles no more than `idle`, or twice as many
    bring nothing, and those in between that tell the smallest number; then one and twice as many on top."""
    found: dict[int, Outcome] = {}

    def of(actors: int) -> Outcome:
        if actors not in found:
            found[actors] = simulate(config, speeds, actors=actors, steps=steps, patience=patience)
        return found[actors]

    planned = of(max(1, config.actors.count))
    number = _doubled(of, idle)
    smallest = None
    if of(number).learner_idle <= idle:
        smallest = of(_bisected(of, idle, number // 2, number))
        of(smallest.actors + 1)
        of(2 * smallest.actors)
    return Fleet(outcomes=tuple(found[actors] for actors in sorted(found)), planned=planned, smallest=smallest)


def _doubled(of: Callable[[int], Outcome], idle: float) -> int:
    """A power of two: the first that is enough, or after which more are of no use."""
    number = 1
    while of(number).learner_idle > idle and number < MOST_ACTORS:
        before, number = of(number), 2 * number
        if of(number).trained_tokens_per_s < GROWTH * before.trained_tokens_per_s:
            break
    return number


def _bisected(of: Callable[[int], Outcome], idle: float, too_few: int, enough: int) -> int:
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if of(middle).learner_idle <= idle else (middle, enough)
    return enough


def alternatives(
    config: Config, speeds: Speeds, *, actors: int, steps: int, patience: Patience | None = None
) -> Iterator[tuple[str, Outcome]]:
    """What another order or bound, or leases ahead of the engines' places, would make of the same run with so many
    actors, where they are possible."""
    for setting, candidate in _candidates(config):
        try:
            validate(candidate)
        except ConfigError:
            continue
        yield setting, simulate(candidate, speeds, actors=actors, steps=steps, patience=patience)


def _candidates(config: Config) -> Iterator[tuple[str, Config]]:
    """(settings, the run with them), possible or not."""
    staleness = config.staleness
    bound, order = staleness.max_staleness, staleness.batching
    other = next(batching for batching in Batching if batching is not order)
    changes = {f"staleness.max_staleness={n}": replace(staleness, max_staleness=n) for n in (bound - 1, bound + 1)}
    changes[f"staleness.batching={other}"] = replace(staleness, batching=other)
    if staleness.over_age is OverAge.drop:
        masked = replace(staleness, batching=Batching.first_finished, over_age=OverAge.mask)
        changes["staleness.batching=first_finished staleness.over_age=mask"] = masked
    for setting, changed in changes.items():
        yield setting, replace(config, staleness=changed)
    if config.actors.max_num_seqs is None:
        ahead = with_leases_ahead(config)
        actors = ahead.actors
        yield f"actors.groups_in_flight={actors.groups_in_flight} actors.max_num_seqs={actors.max_num_seqs}", ahead


def with_leases_ahead(config: Config) -> Config:
    """As many places, and half as many leases again."""
    held, places = config.actors.groups_in_flight, num_sequences(config)
    return replace(
        config, actors=replace(config.actors, groups_in_flight=held + max(1, held // 2), max_num_seqs=places)
    )
