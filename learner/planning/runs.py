"""What the files of a run say about the speed of its learner and its actors.

What a run shows of its engines is one point: with n sequences running on average, a token of one of them takes t
seconds. For the groups of the ledger t = (generation_s - pauses in between) / longest response, and by Little's
law n = t x tokens drawn per second in which an engine was busy. Runs of different concurrency give a line through
their points; where they do not tell, learner/planning/speeds.py has what is assumed.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from common.config import ConfigError
from common.loading import read_config
from common.metrics import read_jsonl
from common.types import JSON
from learner.planning.simulation import Outcome, simulate
from learner.planning.speeds import OVERHEAD, Speeds, through, token_s

FEWEST_STEPS = 3  # policy steps of a run that is measured
CORRECTIONS = 3  # each takes a simulation; the last one changes next to nothing
NEEDED = (  # metrics of a step; one that is replayed has not all of them
    "time/step_s",
    "time/wait_for_batch_s",
    "time/publish_s",
    "tokens/generated",
    "actors/connected",
)

Row = dict[str, JSON]


class MeasuredRun:
    """The policy steps of one run in its steady state: not the first, which still has the actors' start, and not the
    last (1 + max_staleness) publish_every, for which nothing more is sampled ahead. Of these only those in `within`,
    if it is given: numbers, counted from 1 with the warm-up.

    Raises ConfigError when its files do not tell.
    """

    def __init__(self, folder: Path, within: range | None = None) -> None:
        for name in ("config.yaml", "metrics.jsonl", "ledger.jsonl"):
            if not (folder / name).is_file():
                raise ConfigError(f"{folder} has no {name}: --from needs the folder of a run that has trained")
        self.folder, self.config = folder, read_config(folder / "config.yaml")
        if (replayed := self.config.learner.replay) is not None:
            raise ConfigError(f"{folder} has had no actors, it trains on the record of {replayed}: give --from that")
        rows = [
            row for row in read_jsonl(folder / "metrics.jsonl") if all(row.get(name) is not None for name in NEEDED)
        ]
        policy = [i for i, row in enumerate(rows) if "staleness/hist" in row and i > 0][1:]
        ahead = (1 + self.config.staleness.max_staleness) * self.config.weights.publish_every
        policy = policy[: max(0, len(policy) - ahead)]
        if within is not None:
            policy = [i for i in policy if rows[i]["step"] in within]
        if len(policy) < FEWEST_STEPS:
            raise ConfigError(
                f"{folder} has {len(policy)} policy steps between its beginning and its end, and --from needs "
                f"{FEWEST_STEPS} to take the speed from: let it train {FEWEST_STEPS + ahead + 2} or more"
            )
        self.rows: list[Row] = [rows[i] for i in policy]
        self._before = [rows[i - 1] for i in policy]
        steps = {row["step"] for row in self.rows}
        self.groups = [group for group in read_jsonl(folder / "ledger.jsonl") if group["step"] in steps]
        self.groups.sort(key=lambda group: group["lease_id"])
        if not self.groups or any("generation_s" not in group for group in self.groups):
            raise ConfigError(f"{folder} was made by a release whose ledger does not tell how long groups took")

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Response tokens of each step."""
        tokens = dict.fromkeys((row["step"] for row in self.rows), 0)
        for group in self.groups:
            tokens[group["step"]] += sum(group["lengths"])
        return tuple(tokens.values())

    @property
    def seconds(self) -> float:
        return float(sum(row["time/step_s"] for row in self.rows))

    @cached_property
    def publish_s(self) -> tuple[float, ...]:
        pairs = zip(self.rows, self._before, strict=True)
        times = [float(row["time/publish_s"]) for row, before in pairs if row["version"] > before["version"]]
        return tuple(times) or (0.0,)

    @property
    def pause_share(self) -> float:
        """Of a publication: engines go on while the learner waits for their probes. They idle for no less than they
        pause; where they also idle for want of leases this is too much, but then a pause costs little."""
        publishing_s = sum(self.publish_s) * self.actor_s / self.seconds
        return min(1.0, (self.actor_s - self.busy_s) / publishing_s) if publishing_s else 1.0

    @property
    def train_token_s(self) -> tuple[float, ...]:
        """Of each step: all but waiting and publishing."""
        return tuple(
            (row["time/step_s"] - row["time/wait_for_batch_s"] - row["time/publish_s"]) / max(tokens, 1)
            for row, tokens in zip(self.rows, self.tokens, strict=True)
        )

    @property
    def trained_tokens_per_s(self) -> float:
        return sum(self.tokens) / self.seconds

    @property
    def generated_tokens_per_s(self) -> float:
        return float(self._change("tokens/generated")) / self.seconds

    @property
    def learner_idle(self) -> float:
        return float(sum(row["time/wait_for_batch_s"] for row in self.rows)) / self.seconds

    @property
    def actor_s(self) -> float:
        """Seconds of all actors together."""
        return float(sum(row["time/step_s"] * row["actors/connected"] for row in self.rows))

    @property
    def busy_s(self) -> float:
        """Those in which they sampled and were not paused."""
        idle = (row.get("actors/idle_fraction") or 0.0 for row in self.rows)
        return self.actor_s - float(
            sum(
                row["time/step_s"] * row["actors/connected"] * share for row, share in zip(self.rows, idle, strict=True)
            )
        )

    @property
    def staleness_mean(self) -> float:
        """Versions, per trained token."""
        gaps = [(int(gap), count) for row in self.rows for gap, count in row["staleness/hist"].items()]
        return float(sum(gap * count for gap, count in gaps) / sum(count for _, count in gaps))

    def point(self) -> tuple[float, float]:
        """(sequences that run on average, seconds for a token of one of them)."""
        drawn, busy_s, seconds = self._change("tokens/generated"), self.busy_s, self.token_s
        if seconds <= 0 or drawn <= 0 or busy_s <= 0:
            raise ConfigError(f"{self.folder} does not tell how fast its actors are: no token was drawn in its steps")
        return seconds * drawn / busy_s, seconds

    @cached_property
    def token_s(self) -> float:
        pause_s = self.pause_share * float(np.mean(self.publish_s))
        versions = [group["versions"][1] - group["versions"][0] for group in self.groups]
        sampled_s = [float(group["generation_s"]) for group in self.groups]
        longest = [max(group["lengths"]) for group in self.groups]
        return token_s(list(zip(sampled_s, versions, longest, strict=True)), pause_s)

    @property
    def verification_s(self) -> float:
        return float(np.mean([group["verification_s"] for group in self.groups]))

    @property
    def uninformative(self) -> float:
        """Share of the groups that arrived in these steps."""
        dropped = self._change("drops/uninformative")
        return dropped / (dropped + len(self.groups))

    def simulated(self, speeds: Speeds) -> Outcome:
        """The same steps with other speeds, its beginning included: only then is so short a run the same thing."""
        return simulate(self.config, speeds, actors=max(1, self.num_actors), steps=len(self.rows), filling=1)

    @property
    def num_actors(self) -> int:
        """On average."""
        return round(self.actor_s / self.seconds)

    def _change(self, name: str) -> float:
        return float(self.rows[-1].get(name) or 0) - float(self._before[0].get(name) or 0)


def measured(runs: Sequence[MeasuredRun]) -> Speeds:
    """The speeds of the first run, with engines as all of them show.

    The line of engines is through means, while the number of sequences goes up and down in a run. So it is corrected
    until a simulation of the first run takes as long for a token as the run did.
    """
    first = runs[0]
    speeds = Speeds(
        train_token_s=first.train_token_s,
        publish_s=first.publish_s,
        pause_share=first.pause_share,
        engine=through([run.point() for run in runs], OVERHEAD[first.config.device], first.verification_s),
        groups=tuple(tuple(group["lengths"]) for group in first.groups),
        uninformative=first.uninformative,
    )
    for _ in range(CORRECTIONS):
        times = first.token_s / first.simulated(speeds).token_s
        speeds = replace(speeds, engine=speeds.engine.slowed(times))
    return speeds
