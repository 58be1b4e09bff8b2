"""What a learner may answer an observer."""

from typing import Any

import numpy as np

from common.types import RunStatus


def make_status(**changed: Any) -> RunStatus:
    """Of a run of 4 warm-up and 20 policy steps, of which 14 are done, with three actors."""
    values: dict[str, Any] = {
        "run": "demo",
        "incarnation": 1,
        "step": 14,
        "warmup_steps": 4,
        "num_steps": 24,
        "remaining_s": 100.0,
        "uptime_s": 3700.0,
        "step_age_s": 10.0,
        "version": 10,
        "max_staleness": 2,
        "group_target": 16,
        "metrics": {
            "staleness/token_mean": 1.25,
            "staleness/token_max": 2.0,
            "offpolicy/ess": 0.93,
            "throughput/generated_tokens_per_s": 3400.0,
            "throughput/trained_tokens_per_s": 2900.0,
            "actors/idle_fraction": 0.04,
            "learner/idle_fraction": 0.31,
            "time/step_s": 8.1,
        },
        "counters": {"buffered_groups": 12.0, "in_flight_groups": 14.0, "dropped/stale": 3.0},
        "evaluated_steps": np.array([4, 14], np.int32),
        "accuracies": np.array([0.2, 0.4], np.float32),
        "rewards": np.linspace(-0.5, 0.25, 14, dtype=np.float32),
        "response_lengths": np.full(14, 61.0, np.float32),
        "alarms": (),
        "member_names": ("actor-0", "actor-1", "far-away"),
        "member_states": ("sampling", "idle", "lost"),
        "member_versions": (10, 10, None),
        "member_tokens_per_s": np.array([2000.0, 1400.0, 0.0], np.float32),
        "member_leases": np.array([16, 0, 3], np.int32),
        "member_silences_s": np.array([0.2, 0.3, 12.0], np.float32),
        "num_members": 3,
    }
    return RunStatus(**(values | changed))
