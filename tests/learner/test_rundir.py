"""RUN at the start of a learner: seen by all ranks, resumed where rank 0 says, with the configuration in it."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.config import Config, ConfigError, Device
from common.loading import load_config, read_config, save_config
from learner import rundir
from learner.checkpoint import Checkpointer
from learner.networks.parallel import World, process_group, refusals_of_any_rank
from learner.resume import Standing
from learner.rundir import agreed_standing, settle
from tests.learner.test_resume import begun, configured
from tests.support.ranks import run_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Tensors:
    """Something that each rank has a piece of."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"of rank {dist.get_rank()}": torch.ones(3)}

    def load_state_dict(self, state: dict[str, torch.Tensor], /) -> None:
        raise AssertionError("nothing is loaded here")


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
        with pytest.raises(ConfigError if rank == 0 else RuntimeError) as failed:  # rank 1 waits, until 0 is gone
            Checkpointer(config.run_dir / "checkpoints", keep=1).save(8, 1, Tensors())
    if rank == 0:
        assert "lacks __1_0.distcp, which other ranks have written: runs_dir is not shared" in str(failed.value)
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
    unseen, changed, elsewhere = said[0].splitlines()
    assert f"runs_dir={tmp_path}/own/1 is not shared between hosts: rank 1 on {socket.gethostname()}" in unseen
    assert "seed=5 cannot change at a resume" in changed
    assert elsewhere == "rank 1 has no such model"
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


def test_a_folder_that_was_moved_gets_a_configuration_that_says_so(tmp_path: Path) -> None:
    config = configured(tmp_path)
    settle(config, ALONE)
    moved = config.run_dir.rename(tmp_path / "moved")
    config = load_config([str(moved / "config.yaml")], ["name=moved"])
    settle(config, ALONE)
    assert read_config(moved / "config.yaml") == config


@pytest.mark.parametrize("loss", ["no file", "half a file"])
def test_a_checkpoint_that_lacks_pieces_is_not_complete(
    tmp_path: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = begun(tmp_path, step=7)
    save_config(configured(tmp_path), run_dir / "config.yaml")
    older = run_dir / "checkpoints" / "step_00000005"
    newest = run_dir / "checkpoints" / "step_00000007"
    older.mkdir()
    for file in newest.iterdir():
        content = file.read_bytes()
        (older / file.name).write_bytes(content.replace(b'"step": 7', b'"step": 5'))
    (piece,) = newest.glob("*.distcp")
    if loss == "no file":
        piece.unlink()
    else:
        os.truncate(piece, piece.stat().st_size // 2)
    found = agreed_standing(configured(tmp_path), ALONE)
    assert found is not None and found.step == 5
    assert f"{newest} lacks {piece.name}" in caplog.text
    (older / piece.name).unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is complete, step_00000005 lacks __0_0\.distcp"):
        agreed_standing(configured(tmp_path), ALONE)
