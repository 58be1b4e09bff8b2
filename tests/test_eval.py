"""`run.py eval` with the real engine: killed in the middle, and called again."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.tasks.number_walk import verify
from common.types import Verdict
from tests.support.runs import ROOT, rows

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

LIMIT_S = 120.0
NUM_PROMPTS, K = 24, 4
ONE_AT_A_TIME = ("actors.groups_in_flight=1", "rollout.group_size=1")  # slow enough to be killed in the middle


def command(out: Path, *settings: str) -> list[str]:
    options = ("--samples", str(K), "--prompts", str(NUM_PROMPTS), "--top-p", "0.9", "--out", str(out), "--json")
    return [
        sys.executable,
        str(ROOT / "run.py"),
        "eval",
        "configs/models/contrary_walk",
        "-c",
        "demo",
        *options,
        *settings,
    ]


def killed(out: Path) -> list[str]:
    """The lines that an evaluation had written when it was killed; none of its processes is left."""
    path = out / "transcripts.jsonl"
    with subprocess.Popen(command(out, *ONE_AT_A_TIME), cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + LIMIT_S
        while not path.is_file() or not path.stat().st_size:
            assert first.poll() is None and time.monotonic() < deadline, (out / "engine.log").read_text()[-3000:]
            time.sleep(0.02)
        family = psutil.Process(first.pid).children(recursive=True)
        first.kill()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert alive == []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_an_evaluation_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = killed(out)
    assert K <= len(before) < NUM_PROMPTS * K
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    whole = len(before) // K * K
    text = (out / "transcripts.jsonl").read_text()
    assert text.startswith("".join(before[:whole])), "what was done is not sampled again"
    responses = rows(out / "transcripts.jsonl")
    assert len({(row["prompt_uid"], row["index"]) for row in responses}) == len(responses) == NUM_PROMPTS * K
    right = [row["verdict"] == "correct" for row in responses]
    assert found["avg"]["value"] == pytest.approx(sum(right) / len(right))
    assert 0.02 < found["avg"]["value"] < 0.6, "the demo's model prefers the wrong way"
    assert found["pass"]["1"] == pytest.approx(found["avg"])
    assert found["num_prompts"] == NUM_PROMPTS and found["settings"]["top_p"] == 0.9
    for row in responses:
        start, _, target = row["prompt"].removesuffix("=").partition(">")
        verdict = verify(row["response"], target, {"start": int(start), "target": int(target)})
        assert (verdict is Verdict.CORRECT) == (row["verdict"] == "correct")
