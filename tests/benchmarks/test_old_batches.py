"""The benchmarks that start runs: what is begun, gone on with and left alone, and which runs make one row."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import accuracy, old_batches
from benchmarks.old_batches import Job
from common.config import Config, Correction, ModelConfig
from common.loading import load_config, save_config


def write_run(folder: Path, config: Config, versions: list[int]) -> Path:
    """A run directory that was evaluated at these versions."""
    run = replace(config, runs_dir=str(folder.parent), name=folder.name)
    folder.mkdir(parents=True)
    save_config(run, folder / "config.yaml")
    rows = [{"step": v, "time": v, "accuracy/heldout": 0.5 + v / 1000, "accuracy/version": v} for v in versions]
    lines = [json.dumps(row | {"version": row["step"]}) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def config() -> Config:
    return load_config(["number_walk"], [])


def job(runs_dir: Path, correction: Correction = Correction.behavior) -> Job:
    return Job(runs_dir=runs_dir, correction=correction, seed=0, settings=("learner.steps=100",))


def test_a_job_is_finished_when_its_last_version_was_evaluated(tmp_path: Path, config: Config) -> None:
    assert not job(tmp_path).is_finished()
    write_run(tmp_path / "behavior-0", config, [0, 25])
    assert not job(tmp_path).is_finished()
    write_run(tmp_path / "none-0", config, [0, 25, 100])
    assert job(tmp_path, Correction.none).is_finished()


def test_a_job_begins_with_its_own_settings_and_goes_on_with_what_is_there(tmp_path: Path, config: Config) -> None:
    command = job(tmp_path).command(core=1)
    resolved = load_config(command[command.index("-c") + 1 :], [part for part in command if "=" in part])
    assert resolved.run_dir == tmp_path / "behavior-0" and resolved.cores == [1]
    assert resolved.staleness.max_staleness == 8 and resolved.staleness.exact
    assert resolved.algorithm.correction is Correction.behavior
    write_run(tmp_path / "behavior-0", config, [0, 25])
    assert job(tmp_path).command(core=0)[-2:] == ["--resume", str(tmp_path / "behavior-0")]


def test_jobs_share_the_cores_and_those_that_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four jobs on two cores, each of which writes down its core; one fails, and the others run all the same."""
    (tmp_path / "log").touch()
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n'); sys.exit(int(sys.argv[3]))"

    def command(self: Job, core: int) -> list[str]:
        fails = self.correction is Correction.dis
        return ["python3", "-c", script, str(tmp_path / "log"), f"{self.correction} {core}", str(int(fails))]

    monkeypatch.setattr(Job, "command", command)
    monkeypatch.setattr(old_batches, "POLL_S", 0.02)
    corrections = [Correction.none, Correction.dis, Correction.tis, Correction.behavior]
    failed = old_batches.run_all([job(tmp_path, correction) for correction in corrections], cores=[0, 1])
    assert [one.correction for one in failed] == [Correction.dis]
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(name for name, _ in lines) == sorted(corrections)
    assert {core for _, core in lines} == {"0", "1"}


def test_runs_that_differ_in_name_seed_and_cores_are_one_row(tmp_path: Path, config: Config) -> None:
    runs = [
        write_run(tmp_path / name, replace(config, seed=int(name[-1]), cores=[int(name[-1])]), [0, 100])
        for name in ("walk-0", "walk-1")
    ]
    other = replace(config, model=ModelConfig(path=config.model.path, max_model_len=200))
    rows = accuracy.collect([*runs, write_run(tmp_path / "long-0", other, [0, 100])])
    assert [(row.label, row.seeds) for row in rows] == [("walk", [0, 1]), ("long", [0])]
    assert rows[0].after == pytest.approx([0.6, 0.6])
    assert accuracy.draw(rows).count("<polyline") == 3
