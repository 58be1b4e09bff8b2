"""Minutes of chaos: tests/support/chaos.py, which the test of a minute shares, for longer and over several seeds.

    python benchmarks/chaos.py [--minutes 10] [--seeds 1 2 3] [--folder DIR] [--json OUT.json]

The run has as many steps as it would take that long on two free cores, and the learner is killed twice every minute.
Prints a table, and of a run with faults what happened and what its processes said. Exit code 1 when there was one.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.aftermath import Found, Kind
from tests.support.chaos import Chaos


def run(seed: int, minutes: float, folder: Path) -> Found:
    """One run, in `folder`/seed-N."""
    place = folder / f"seed-{seed}"
    place.mkdir(parents=True)
    chaos = Chaos(
        place,
        seed,
        minutes,
        learner_kills=max(2, round(minutes)),
        limit_s=60.0 * (3.0 * minutes + 2.0),
    )
    found = chaos.run()
    if found.faults:
        print(chaos.report(found))
    return found


def table(runs: Sequence[Found]) -> str:
    """A column for each run."""
    rows: list[tuple[str, list[str]]] = [
        ("seed", [str(found.seed) for found in runs]),
        ("---", ["---"] * len(runs)),
        ("settings", [" ".join(found.settings[1:4]) for found in runs]),
        ("seconds", [f"{found.seconds:.0f}" for found in runs]),
        *((str(kind), [str(found.events.get(kind, 0)) for found in runs]) for kind in Kind),
        ("starts of actors", [str(found.actor_starts) for found in runs]),
        ("steps", [f"{found.steps} ({found.steps_again} again)" for found in runs]),
        ("prompts trained", [str(found.prompts) for found in runs]),
        ("oldest token", [f"{found.max_age} of {found.bound}" for found in runs]),
        ("tokens", [f"{found.tokens} ({found.prefix_tokens} handed on)" for found in runs]),
        ("dropped", [", ".join(f"{n} {reason}" for reason, n in found.dropped.items()) or "-" for found in runs]),
        ("a dismissal would be excused", [f"{found.excused:.0%} of the time" for found in runs]),
        ("dismissed", [str(found.dismissed) for found in runs]),
        ("faults", [str(len(found.faults)) for found in runs]),
    ]
    return "\n".join("| " + " | ".join([name, *cells]) + " |" for name, cells in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[time.time_ns() % 100_000])
    parser.add_argument("--folder", type=Path, help="where the runs stay; default: a new one in the temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(mkdtemp(prefix="chaos-"))
    print(f"seeds {arguments.seeds} in {folder}", flush=True)
    runs = [run(seed, arguments.minutes, folder) for seed in arguments.seeds]
    print(table(runs))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(found) for found in runs], indent=2) + "\n")
    return int(any(found.faults for found in runs))


if __name__ == "__main__":
    sys.exit(main())
