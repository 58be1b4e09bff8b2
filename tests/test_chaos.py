"""A minute of chaos over six actors and the learner: each prompt is trained once, no token is too old, nobody innocent
has to leave, nothing is left over. `benchmarks/chaos.py` does the same for longer."""

import os
import time
from pathlib import Path

import pytest

from tests.support.aftermath import Event, Kind, excused_share, is_excused
from tests.support.chaos import Chaos


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_minute_of_chaos(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=int(os.environ.get("CHAOS_SEED", time.time_ns() % 100_000)))
    print(f"CHAOS_SEED={chaos.seed}")
    found = chaos.run()
    print(found)
    assert not found.faults, chaos.report(found)


HUNG = "its engine has drawn no token in 5 s of sampling"
SILENT = "it did not answer within 6 s in phase pause of version 2"
LOST = "its connection was lost in 3 publications in a row"
EVENTS = [
    Event(100.0, Kind.HANG, "hung", pid=1, until_s=110.0),
    Event(100.0, Kind.WEDGE, "wedged", pid=2),
    Event(100.0, Kind.KILL, "killed", pid=3, until_s=100.1),
    Event(100.0, Kind.STOP, "stopped", pid=4, until_s=102.0),
    *(Event(at_s, Kind.FREEZE, "frozen", pid=5, until_s=at_s + 4.0) for at_s in (100.0, 110.0, 120.0)),
]


@pytest.mark.parametrize(
    ("name", "reason", "at_s", "expected"),
    [
        ("hung", HUNG, 109.0, True),
        ("hung", HUNG, 99.0, False),
        ("hung", HUNG, 111.0, False),  # another process has that name now
        ("hung", SILENT, 109.0, False),  # its engine answers
        ("wedged", HUNG, 500.0, True),
        ("wedged", SILENT, 500.0, True),
        ("wedged", "it sent a malformed message: no header", 101.0, False),
        ("wedged", LOST, 101.0, False),
        ("killed", SILENT, 100.1, False),
        ("stopped", SILENT, 101.0, False),
        ("frozen", SILENT, 109.0, True),
        ("frozen", SILENT, 131.0, False),
        ("frozen", HUNG, 103.0, False),
        ("frozen", LOST, 113.0, False),  # twice so far
        ("frozen", LOST, 123.0, True),
        ("another", SILENT, 101.0, False),
    ],
)
def test_a_dismissal_is_excused_only_by_what_leads_to_its_reason(
    name: str, reason: str, at_s: float, expected: bool
) -> None:
    assert is_excused(EVENTS, name, reason, at_s) == expected


def test_how_much_of_the_time_a_dismissal_would_be_excused() -> None:
    assert excused_share(EVENTS, ["hung", "stopped"], 100.0, 140.0) == 11 / 80
