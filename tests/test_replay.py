"""A run that was recorded is trained again without actors: the same numbers, bit for bit."""

import json
import zlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import run
from common.launcher import rank_environment, reserve_port
from common.loading import read_config, save_config
from common.samples import read_samples, sampled_steps
from common.types import Lease
from tests.support import learner_without_transfer
from tests.support.runs import rows
from tests.test_kill_and_resume import START_S, learner, steps

EXACT = ("policy/", "critic/", "reward/", "offpolicy/", "gae/", "length/", "staleness/token", "version")


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """All that follows from networks and batches, of every step."""
    return [{name: row[name] for name in row if name.startswith(EXACT)} for row in steps(run_dir)]


def replayed(recorded: Path, name: str, **changes: Any) -> Path:
    """A learner process that trains on the record; what `train --replay` would start."""
    config = run._replayed(recorded, [f"name={name}"])
    config = replace(config, learner=replace(config.learner, **changes))
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.yaml")
    with ExitStack() as stack:
        environment = rank_environment(0, 1, stack.enter_context(reserve_port()))
        log = config.run_dir / "learner.log"
        process = learner_without_transfer.start(config.run_dir / "config.yaml", environment, log)
        stack.callback(process.kill)
        process.join(START_S)
        assert process.exitcode == 0, log.read_text()[-3000:]
    return config.run_dir


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_killed_and_resumed_is_replayed_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = ("learner.record=true", "learner.steps=6", "staleness.max_staleness=2", "checkpoint.every=3")
    with learner(tmp_path, "recorded", 1, *recording) as processes:
        processes.wait_for_step(5)
        processes.kill(0)
    with learner(tmp_path, "recorded", 1, *recording) as processes:
        assert processes.wait(START_S) == [0], processes.log()
    recorded = tmp_path / "recorded"
    assert [path.name for path in sorted((recorded / "record").iterdir())] == [f"step_{n:08d}" for n in range(1, 9)]

    again = replayed(recorded, "again")
    assert len(numbers(again)) == 8 and {"policy/pg_loss", "critic/value_loss"} <= set(numbers(again)[-1])
    assert numbers(again) == numbers(recorded)
    ledgers = [[json.dumps(row) for row in rows(folder / "ledger.jsonl")] for folder in (recorded, again)]
    assert ledgers[0] == ledgers[1]
    assert sampled_steps(recorded) == list(range(1, 9)) and read_samples(again) == read_samples(recorded)
    log = (again / "learner.log").read_text()
    assert "recorded has recorded the steps 1 to 8: 1 to 8 are trained again, and nothing is sampled" in log
    assert "the numbers are other ones" not in log
    assert not any("accuracy/heldout" in row or "actors/connected" in row for row in rows(again / "metrics.jsonl"))
    assert run.main(["inspect", str(again)]) == 0
    assert "not evaluated: it trains on the record of" in capsys.readouterr().out

    policy = replace(read_config(recorded / "config.yaml").learner.policy, learning_rate=5e-4)
    (recorded / "record" / "step_00000007").unlink()
    other = replayed(recorded, "other", policy=policy)
    assert len(numbers(other)) == 6, "the record has a gap"
    before, after = numbers(recorded), numbers(other)
    assert [row["critic/value_loss"] for row in before[:2]] == [row["critic/value_loss"] for row in after[:2]]
    assert before[4]["policy/pg_loss"] != after[4]["policy/pg_loss"]
    log = (other / "learner.log").read_text()
    assert "recorded the steps 1 to 6, 8 to 8: 1 to 6 are trained again" in log
    assert log.count("step 1 was trained with learner.policy.learning_rate=0.0001, now it is 0.0005: from here on") == 1


def some_are_slow(lease: Lease) -> float:
    """Every third prompt or so."""
    return 0.6 if zlib.crc32(lease.prompt_uid.encode()) % 3 == 0 else 0.0


@pytest.mark.slow
def test_a_run_that_took_what_finished_first_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    recording = ("learner.record=true", "learner.steps=6", "checkpoint.every=0")
    order = ("staleness.batching=first_finished", "staleness.max_staleness=2")
    with learner(tmp_path, "recorded", 1, *recording, *order, delay_s=some_are_slow) as processes:
        assert processes.wait(START_S) == [0], processes.log()
    recorded = tmp_path / "recorded"
    again = replayed(recorded, "again")
    lease_ids = [row["lease_id"] for row in rows(recorded / "ledger.jsonl")]
    assert len(lease_ids) == 8 * 4 and lease_ids != sorted(lease_ids), "another order than that of admission"
    assert [row["lease_id"] for row in rows(again / "ledger.jsonl")] == lease_ids
    assert len(numbers(again)) == 8 and {"policy/pg_loss", "critic/value_loss"} <= set(numbers(again)[-1])
    assert numbers(again) == numbers(recorded)
    weights = [folder / "checkpoints" / "final" / "model.safetensors" for folder in (recorded, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_cannot_be_replayed_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.path=configs/models/chain_sum", f"runs_dir={tmp_path}", "name=run", "actors.count=0"]
    config = run.load_config([], settings)
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.yaml")

    def refusal(*arguments: str) -> str:
        assert run.main(["train", "--replay", str(config.run_dir), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert f"{config.run_dir} has no record of what it trained on: train it with learner.record=true" in refusal()
    (config.run_dir / "record").mkdir()
    for step in (4, 5, 7):
        (config.run_dir / "record" / f"step_{step:08d}").touch()
    assert "has recorded the steps 4 to 5, 7 to 7, but a replay begins with step 1" in refusal()
    assert "name=run is the run that is replayed: choose another name" in refusal("name=run", "--overwrite")
    assert "--replay takes the configuration of its run: leave out -c" in refusal("-c", "demo")
    assert "set actors.count=0" in refusal("actors.count=1")
    assert "learner.record=true would only copy the record" in refusal("learner.record=true")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
