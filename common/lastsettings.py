"""RUN/config.yaml.before: the settings that the run last went on with, while a resume tries others.

`train` sets them aside before it writes config.yaml, which all roles read; the learner drops them when it has begun,
that is when every check and the first transfer of weights have gone well. What is still there when the resume was
refused takes its place again. A resume that was killed or interrupted leaves both: its settings may yet be tried again.
"""

from pathlib import Path

CONFIG = "config.yaml"
BEFORE = "config.yaml.before"


def set_aside(run_dir: Path) -> None:
    """Before a resume writes its settings. Those that are aside already are the ones that the run went on with."""
    if not (run_dir / BEFORE).exists():
        temporary = run_dir / f"{BEFORE}.tmp"
        temporary.write_bytes((run_dir / CONFIG).read_bytes())
        temporary.replace(run_dir / BEFORE)


def drop(run_dir: Path) -> None:
    """The run goes on with the settings of config.yaml."""
    (run_dir / BEFORE).unlink(missing_ok=True)


def put_back(run_dir: Path) -> None:
    """The settings that are set aside, if any are, after a resume that has not begun."""
    if (run_dir / BEFORE).is_file():
        (run_dir / BEFORE).replace(run_dir / CONFIG)
