"""Whole runs through the command line: where the repository is, what a run wrote, which processes it left."""

import json
import os
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes_of(run_dir: Path) -> list[str]:
    """Processes whose command line names this run, and engine processes that they left behind."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        text = " ".join(process.info["cmdline"] or ())
        if str(run_dir) in text and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(text)
    return found
