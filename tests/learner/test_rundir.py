"""RUN at the start of a learner: seen by all ranks, resumed where rank 0 says, with the configuration in it."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import run
from common import launcher
from common.config import Config, ConfigError, Device
from common.launcher import rank_environment
from common.loading import load_config, read_config
from learner import rundir
from learner.checkpoint import Checkpointer
from learner.networks.parallel import World, process_group, refusals_of_any_rank
from learner.resume import Standing, standing
from learner.rundir import agreed_standing, next_incarnation, only_learner, settle
from tests.learner.test_resume import State, begun, configured
from tests.support.ranks import run_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Tensors:
    """Something that each rank has a piece of."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"of rank {dist.get_rank()}": torch.ones(3)}

    def load_state_dict(self, state: dict[str, torch.Tensor], /) -> None:
        raise AssertionError("nothing is loaded here")


def test_a_run_keeps_its_id_and_counts_the_starts_of_its_learner(tmp_path: Path) -> None:
    (one, other) = (tmp_path / "one", tmp_path / "other")
    for folder in (one, other):
        folder.mkdir()
    run_id, incarnation = next_incarnation(one)
    assert incarnation == 1 and next_incarnation(one) == (run_id, 2)
    assert next_incarnation(other)[0] != run_id


def refusal(config: Config, world: World) -> str:
    with pytest.raises(ConfigError) as refused:
        agreed_standing(config, world)
    return str(refused.value)


def _ranks_that_see_different_folders(rank: int, mine: Config, shared: Config, out: Path) -> None:
    rundir.SHARED_S = 0.2
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with process_group(Device.cpu, timeout_s=60) as world:
        config = replace(mine, runs_dir=f"{mine.runs_dir}/{rank}")
        said = [refusal(config, world)]
        assert agreed_standing(shared, world) == Standing(step=7, policy_steps=3, is_complete=False)
        said.append(refusal(replace(shared, seed=5), world))
        with pytest.raises(ConfigError) as refused, refusals_of_any_rank(False):
            if rank == 1:
                raise ConfigError("rank 1 has no such model")
        said.append(str(refused.value))
        with pytest.raises(ConfigError) as failed:
            Checkpointer(config.run_dir / "checkpoints", keep=1).save(8, 1, Tensors())
        said.append(str(failed.value))
    (out / f"said {rank}").write_text("\n".join(said))


@pytest.mark.slow
def test_two_ranks_resume_where_rank_0_says_and_refuse_together_what_one_of_them_cannot_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a folder of its own, of which rank 0's has a checkpoint; then with one folder for both."""
    (tmp_path / "own" / "0").mkdir(parents=True)
    begun(tmp_path / "own" / "0", step=7)
    (tmp_path / "shared").mkdir()
    begun(tmp_path / "shared", step=7)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    configs = configured(tmp_path / "own"), configured(tmp_path / "shared")
    run_two_ranks(_ranks_that_see_different_folders, *configs, tmp_path)
    said = [(tmp_path / f"said {rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    unseen, changed, elsewhere, unwritten = said[0].splitlines()
    assert f"runs_dir={tmp_path}/own/1 is not shared between hosts: rank 1 on {socket.gethostname()}" in unseen
    assert "seed=5 cannot change at a resume" in changed
    assert elsewhere == "rank 1 has no such model"
    assert "lacks __1_0.distcp, which other ranks have written: runs_dir is not shared" in unwritten
    assert not list(tmp_path.rglob(".shared-*"))


def test_a_learner_that_is_started_alone_leaves_the_configuration_that_train_would(tmp_path: Path) -> None:
    config = configured(tmp_path)
    assert settle(config, ALONE) == config == read_config(config.run_dir / "config.yaml")
    written = (config.run_dir / "config.yaml").stat().st_mtime_ns
    assert settle(config, ALONE) == config
    assert (config.run_dir / "config.yaml").stat().st_mtime_ns == written


def test_a_model_that_is_to_be_tied_is_written_once_and_named(tmp_path: Path) -> None:
    config = configured(tmp_path, "model.tie_word_embeddings=true")
    settled = settle(config, ALONE)
    assert settled == read_config(config.run_dir / "config.yaml")
    assert (settled.model.path, settled.model.tie_word_embeddings) == (str(config.run_dir / "model"), None)
    written = (config.run_dir / "model" / "model.safetensors").stat().st_mtime_ns
    assert settle(config, ALONE) == settled
    assert (config.run_dir / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_another_configuration_in_the_folder_is_not_replaced(tmp_path: Path) -> None:
    config = configured(tmp_path)
    settle(config, ALONE)
    before = (config.run_dir / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"config\.yaml has learner\.steps=6, not 9: give --config"):
        settle(configured(tmp_path, "learner.steps=9"), ALONE)
    assert (config.run_dir / "config.yaml").read_bytes() == before


def test_how_long_a_learner_may_take_to_stop_is_its_own_and_no_setting_of_the_run(tmp_path: Path) -> None:
    """A job's script says it, and another script of the same run says something else."""
    config = configured(tmp_path)
    settle(config, ALONE)
    before = (config.run_dir / "config.yaml").read_bytes()
    other = configured(tmp_path, "learner.stop_timeout_s=120")
    assert settle(other, ALONE) == other
    assert (config.run_dir / "config.yaml").read_bytes() == before
    with pytest.raises(ConfigError, match=r"config\.yaml has learner\.steps=6, not 9: give --config"):
        settle(configured(tmp_path, "learner.steps=9", "learner.stop_timeout_s=120"), ALONE)


def test_a_folder_that_was_moved_gets_a_configuration_that_says_so(tmp_path: Path) -> None:
    config = configured(tmp_path)
    settle(config, ALONE)
    moved = config.run_dir.rename(tmp_path / "moved")
    config = load_config([str(moved / "config.yaml")], ["name=moved"])
    settle(config, ALONE)
    assert read_config(moved / "config.yaml") == config


def test_a_damaged_checkpoint_is_left_out_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = begun(tmp_path, step=5)
    Checkpointer(run_dir / "checkpoints", keep=2).save(7, 0, State(configured(tmp_path), warmup_steps=4))
    piece = run_dir / "checkpoints" / "step_00000007" / "__0_0.distcp"
    piece.write_bytes(bytes(piece.stat().st_size))
    found = agreed_standing(configured(tmp_path), ALONE)
    assert found is not None and found.step == 5
    assert "has other bytes in __0_0.distcp): the run goes on from step 5, 2 step(s) are" in capsys.readouterr().out
    (run_dir / "checkpoints" / "step_00000005" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match=r"step_00000005 lacks or has other bytes in __0_0\.distcp"):
        agreed_standing(configured(tmp_path), ALONE)


def test_before_the_learner_is_started_a_checkpoint_that_lacks_a_file_is_found_too(tmp_path: Path) -> None:
    run_dir = begun(tmp_path, step=5)
    (run_dir / "checkpoints" / "step_00000005" / "__0_0.distcp").unlink()
    said = r"no checkpoint in .* is complete \(step_00000005 lacks or has other bytes in __0_0\.distcp\): bring"
    with pytest.raises(ConfigError, match=said):
        standing(configured(tmp_path))


# ---- one learner a run


def test_learners_are_counted_and_the_run_keeps_its_id(tmp_path: Path) -> None:
    first = next_incarnation(tmp_path)
    assert [next_incarnation(tmp_path) for _ in range(2)] == [(first[0], 2), (first[0], 3)]
    (tmp_path / "other").mkdir()
    other = next_incarnation(tmp_path / "other")
    assert other[1] == 1 and other[0] != first[0] and len(first[0]) == 16
    for damaged in ('{"run_id": "x"', 60_000 * "[", '{"run_id": "x", "incarnation": Infinity}', "[]", "\0"):
        (tmp_path / "incarnation.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"incarnation\.json is damaged: delete it when"):
            next_incarnation(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
import torch
from common.loading import read_config
from learner.networks.parallel import World
from learner.rundir import only_learner

with only_learner(read_config(Path(sys.argv[1]) / "config.yaml"), World(rank=0, size=1, device=torch.device("cpu"))):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_learner_is_refused_with_the_holder_s_name_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = begun(tmp_path, step=7)
    (run_dir / "metrics.jsonl").write_text('{"step": 9}\n')
    for name in rank_environment(0, 1, 0):  # `run.py learner` sets these for the process, which is the test's
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(rundir, "ENDING_S", 0.3)
    monkeypatch.setattr(launcher, "ENDING_S", 0.3)
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        for command in (["learner", "--config", str(run_dir / "config.yaml")], ["train", "--resume", str(run_dir)]):
            assert run.main(command) == 2
            message = capsys.readouterr().err
            line = f"{run_dir} is being trained now by process {holder.pid} on {socket.gethostname()}: stop that one"
            assert line in message and message.splitlines()[-1].startswith("error: ")
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
        holder.kill()
        monkeypatch.setattr(rundir, "ENDING_S", 30.0)
        with only_learner(configured(tmp_path), ALONE):
            """Right after the crash, the kernel may still be at it."""
