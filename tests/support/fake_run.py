"""Runs a Supervisor over children made of a line of Python each; the tests start it as a process of its own.

    python tests/fake_run.py LOG_DIR SPECS_JSON [STOP_S]

SPECS_JSON is a list of {"name", "code", "leader", ...}. The outcome is the last line of standard output, as JSON.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from common import processes
from common.processes import ChildSpec, Supervisor


def to_spec(row: dict[str, object], log_dir: str) -> ChildSpec:
    # LOG_DIR on each command line lets the tests find what is left of the family, whoever its parent is now.
    command = (sys.executable, "-c", str(row["code"]), log_dir)
    options = {name: value for name, value in row.items() if name != "code"}
    return ChildSpec(command=command, environment={}, **options)  # type: ignore[arg-type]


def main() -> None:
    log_dir, rows = sys.argv[1], json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        processes.STOP_S = processes.FAREWELL_S = float(sys.argv[3])
    outcome = Supervisor([to_spec(row, log_dir) for row in rows], Path(log_dir)).run()
    print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
