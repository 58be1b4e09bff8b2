"""The transport's benchmark in small: simulated actors are served, and ratios are those of one round."""

from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.load import Load, Pace
from common.keys import make_keys


def test_simulated_actors_are_served_by_the_service_itself(tmp_path: Path) -> None:
    make_keys(tmp_path)
    row = load.in_thread(str(tmp_path), num_actors=3, rate=30.0, seconds=0.5, loop=None)
    assert row.groups_per_s > 0.0 and row.loop is None
    assert 0.0 < row.lease_p50_ms <= row.lease_p99_ms <= row.lease_max_ms


def test_what_the_loop_keeps_is_relative_to_its_own_round() -> None:
    def row(service: str, per_s: float, queued: float) -> Load:
        return Load(service=service, loop=Pace(per_s=per_s, cores=1.0 - queued, queued=queued))

    rows = [row("none", 100.0, 0.0), row("thread", 80.0, 0.0), row("none", 50.0, 0.5), row("thread", 45.0, 0.5)]
    assert load.kept(rows, "thread", lambda pace: pace.per_s) == pytest.approx([0.8, 0.9])
    assert load.kept(rows, "thread", lambda pace: pace.per_free_s) == pytest.approx([0.8, 0.9])
    assert rows[2].loop is not None and rows[2].loop.per_free_s == 100.0
