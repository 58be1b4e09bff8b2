"""`run.py eval`, killed in the middle, and called again with the real engine."""

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
NUM_PROMPTS, K, NUM_DONE = 24, 4, 5
# The first call, with an engine that answers NUM_DONE prompts and then nothing any more.
STALLED = f"""
import asyncio, sys
import run
from actors.evaluation import main as command
from tests.support.scripted_engine import ScriptedEngine

class Stalled(ScriptedEngine):
    leases = []
    script = staticmethod(lambda lease, index: "+100#")
    async def sample(self, lease):
        if lease.lease_id >= {NUM_DONE}:
            await asyncio.Event().wait()
        return await super().sample(lease)

command.Engine = Stalled
sys.exit(run.main(sys.argv[1:]))
"""


def words(out: Path) -> list[str]:
    options = ("--samples", str(K), "--prompts", str(NUM_PROMPTS), "--top-p", "0.9", "--out", str(out), "--json")
    return ["eval", "configs/models/contrary_walk", "-c", "demo", *options]


def killed(out: Path) -> str:
    """What an evaluation had written when it was killed; none of its processes is left."""
    path = out / "transcripts.jsonl"
    with subprocess.Popen([sys.executable, "-c", STALLED, *words(out)], cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + LIMIT_S
        while not path.is_file() or path.read_bytes().count(b"\n") < NUM_DONE * K:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        family = psutil.Process(first.pid).children(recursive=True)
        first.kill()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert alive == []
    return path.read_text()


def test_an_evaluation_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = killed(out)
    again = [sys.executable, str(ROOT / "run.py"), *words(out)]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert (out / "transcripts.jsonl").read_text().startswith(before), "what was done is not sampled again"
    responses = rows(out / "transcripts.jsonl")
    assert len({(row["prompt_uid"], row["index"]) for row in responses}) == len(responses) == NUM_PROMPTS * K
    right = [row["verdict"] == "correct" for row in responses]
    assert found["avg"]["value"] == pytest.approx(sum(right) / len(right))
    assert 0.02 < found["avg"]["value"] < 0.6, "the demo's model prefers the wrong way"
    assert found["pass"]["1"] == pytest.approx(found["avg"])
    assert found["num_prompts"] == NUM_PROMPTS and found["settings"]["top_p"] == 0.9
    for row in responses[NUM_DONE * K :]:
        start, _, target = row["prompt"].removesuffix("=").partition(">")
        verdict = verify(row["response"], target, {"start": int(start), "target": int(target)})
        assert (verdict is Verdict.CORRECT) == (row["verdict"] == "correct")
