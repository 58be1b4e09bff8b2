"""Runs a Supervisor over children made of a line of Python each; the tests start it as a process of its own.

    python tests/support/fake_run.py LOG_DIR SPECS_JSON [STOP_S]

SPECS_JSON is a list of {"name", "code", "leader", ...}. One more follower is made like the last of them. The outcome is
the last line of standard output, as JSON.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from common import processes
from common.child import ChildSpec
from common.config import ConfigError
from common.processes import Supervisor


def to_spec(row: dict[str, object], log_dir: str) -> ChildSpec:
    # LOG_DIR on each command line lets the tests find what is left of the family, whoever its parent is now.
    command = (sys.executable, "-c", str(row["code"]), log_dir)
    options = {name: value for name, value in row.items() if name != "code"}
    return ChildSpec(command=command, environment={}, **options)  # type: ignore[arg-type]


def main() -> None:
    log_dir, rows = sys.argv[1], json.loads(sys.argv[2])
    stop_s = float(sys.argv[3]) if len(sys.argv) > 3 else None
    if stop_s is not None:
        processes.STOP_S = processes.FAREWELL_S = stop_s
    specs = [to_spec(row, log_dir) for row in rows]

    def recruit(others: Sequence[ChildSpec]) -> ChildSpec:
        if len(others) >= 3:
            raise ConfigError("there is room for three")
        return replace(specs[-1], name=next(name for i in range(9) if (name := f"actor-{i}") not in names(others)))

    supervisor = Supervisor(
        specs, Path(log_dir), stop_timeout_s=10.0 if stop_s is None else stop_s, recruit=recruit, run_dir=Path(log_dir)
    )
    print(json.dumps(asdict(supervisor.run())), flush=True)


def names(specs: Sequence[ChildSpec]) -> set[str]:
    return {spec.name for spec in specs}


if __name__ == "__main__":
    main()
