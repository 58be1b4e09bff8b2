"""Checkpoints: what is restored, on how many ranks, and what a killed save leaves behind."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from common.causes import CannotWrite, disk_problem
from common.config import Config, ConfigError, Device
from common.stopping import Interrupted, is_crash
from learner import checksums
from learner.algorithm.optimised import load_network_state, network_state
from learner.checkpoint import (
    Checkpointer,
    complete_steps,
    damage,
    load_parameters,
    set_damaged_aside,
    step_folder,
    torn,
)
from learner.files import write_synced
from learner.networks.model import load_policy
from learner.networks.parallel import make_mesh, process_group
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import packed, tiny_run, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CPU = torch.device("cpu")
INPUTS = packed([7, 12, 5])


def let_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


class Run:
    """A stand-in for the trainer: a policy, AdamW and a learning-rate schedule."""

    def __init__(self, config: Config) -> None:
        self.policy = load_policy(config, CPU, make_mesh(config))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 5))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            (-self.policy(*INPUTS, 1.0)[0].mean()).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        scheduler = {"last_epoch": self.scheduler.last_epoch}
        return {"policy": network_state(self.policy, self.optimizer), "scheduler": scheduler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_network_state(self.policy, self.optimizer, state["policy"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]

    def weights(self) -> list[torch.Tensor]:
        full = (p.full_tensor() if isinstance(p, DTensor) else p for p in self.policy.parameters())
        return [tensor.detach().clone() for tensor in full]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_run(write_tiny_model(tmp_path / "base", is_tied=True))


@pytest.mark.parametrize("in_background", [False, True])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, config: Config, in_background: bool) -> None:
    run = Run(config)
    run.train(3)
    with Checkpointer(tmp_path / "c", keep=2, in_background=in_background) as checkpointer:
        checkpointer.save(3, 2, run, lambda folder: write_synced(folder / "leases", b"leases"))
        run.train(4)  # a save in the background must hold the weights of its step, not these
    undisturbed, draw = run.weights(), torch.rand(1)

    torch.manual_seed(99)
    again = Run(config)
    resumed = Checkpointer(tmp_path / "c", keep=2).load(3, again)
    assert (resumed.step, resumed.version) == (3, 2)
    assert (step_folder(tmp_path / "c", 3) / "leases").read_bytes() == b"leases"
    assert again.scheduler.last_epoch == 3
    again.train(4)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, again.weights(), strict=True))
    assert torch.equal(torch.rand(1), draw)


def test_a_checkpoint_from_before_the_first_step_restores_an_untouched_optimizer(
    tmp_path: Path, config: Config
) -> None:
    run, other = Run(config), Run(config)
    checkpointer = Checkpointer(tmp_path / "c", keep=1)
    checkpointer.save(0, 0, run)
    other.train(2)
    checkpointer.load(0, other)
    run.train(2)
    other.train(2)
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), other.weights(), strict=True))


def test_only_the_newest_are_kept(tmp_path: Path, config: Config) -> None:
    run, checkpointer = Run(config), Checkpointer(tmp_path / "c", keep=2)
    for step in (1, 2, 10, 10):
        checkpointer.save(step, step, run)
    assert checkpointer.steps() == [2, 10]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step_00000002", "step_00000010.1"]
    assert checkpointer.load(10, run).step == 10


def test_parameters_alone_can_be_read_for_an_export(tmp_path: Path, config: Config) -> None:
    run = Run(config)
    run.train(2)
    Checkpointer(tmp_path / "c", keep=1).save(2, 1, run)
    policy = load_policy(config, CPU, None)
    load_parameters(step_folder(tmp_path / "c", 2), "policy", policy)
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), policy.parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, config: Config) -> None:
    checkpointer = Checkpointer(tmp_path / "c", keep=1)
    checkpointer.save(1, 1, Run(config))
    other = Run(tiny_run(write_tiny_model(tmp_path / "other", "qwen3")))
    with pytest.raises(ValueError, match=r"is of another model: tensor policy/parameters/"):
        checkpointer.load(1, other)


def test_a_missing_checkpoint_is_named(tmp_path: Path, config: Config) -> None:
    with pytest.raises(ValueError, match=r"there is no checkpoint of step 7 in .* it has \[\]"):
        Checkpointer(tmp_path / "c", keep=1).load(7, Run(config))


class Counter:
    """What KILLED_SAVE saves, without its import of a model library."""

    def __init__(self) -> None:
        self.weight, self.numbers = torch.full((3,), -1.0), []

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "nested": {"numbers": self.numbers}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.numbers = state["weight"], state["nested"]["numbers"]


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
import torch
import learner.checkpoint as checkpoint

class Counter:
    weight = torch.zeros(3)

    def state_dict(self):
        return {"weight": self.weight, "nested": {"numbers": [1, 2.5, None]}}

run, folder, where = Counter(), Path(sys.argv[1]), sys.argv[2]
checkpointer = checkpoint.Checkpointer(folder, keep=1)
checkpointer.save(1, 1, run)
run.weight += 1

def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "tensors":
    checkpoint.dcp.save = die
elif where == "json":
    checkpoint.write_synced = die
elif where == "rename":
    Path.rename = die
else:
    checkpoint.shutil.rmtree = die
checkpointer.save(2, 2, run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["tensors", "json", "rename", "prune"])
def test_a_killed_save_leaves_the_previous_one_usable(tmp_path: Path, where: str) -> None:
    root = Path(__file__).resolve().parents[2]
    arguments = [sys.executable, "-c", KILLED_SAVE, str(tmp_path / "c"), where]
    ended = subprocess.run(arguments, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    newest = 2 if where == "prune" else 1
    assert complete_steps(tmp_path / "c")[-1] == newest
    run, checkpointer = Counter(), Checkpointer(tmp_path / "c", keep=2)
    assert checkpointer.load(newest, run).version == newest
    assert run.weight.tolist() == [newest - 1.0] * 3
    assert run.numbers == [1, 2.5, None]
    checkpointer.save(3, 3, run)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == [f"step_0000000{newest}", "step_00000003"]


def _two_ranks(rank: int, config: Config, folder: Path, expected: list[torch.Tensor]) -> None:
    """Resumes from one rank's checkpoint, goes on to `expected`, and saves in the background."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with process_group(Device.cpu, timeout_s=60):
        run = Run(config)
        with Checkpointer(folder, keep=5, in_background=True) as checkpointer:
            assert checkpointer.load(2, run).step == 2
            run.train(1)
            # both ranks saw the same sequences and gradients are summed: AdamW is invariant to the scale
            for found, tensor in zip(run.weights(), expected, strict=True):
                assert torch.allclose(found, tensor, rtol=1e-3, atol=1e-5)
            checkpointer.save(3, 3, run)


def test_resuming_on_two_ranks_and_back_on_one(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run, checkpointer = Run(config), Checkpointer(tmp_path / "c", keep=5)
    run.train(2)
    checkpointer.save(2, 2, run)
    expected = Run(config)
    checkpointer.load(2, expected)
    let_ranks_meet(monkeypatch)
    gradients_doubled(expected)
    run_two_ranks(_two_ranks, config, tmp_path / "c", expected.weights())

    back = Run(config)
    resumed = checkpointer.load(3, back)
    assert (resumed.step, resumed.version) == (3, 3)
    for found, tensor in zip(back.weights(), expected.weights(), strict=True):
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-6)
    pairs = zip(back.policy.parameters(), expected.policy.parameters(), strict=True)
    for p, q in pairs:
        for key, value in expected.optimizer.state[q].items():
            torch.testing.assert_close(back.optimizer.state[p][key], value, rtol=1e-4, atol=1e-6)
    assert back.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]


def gradients_doubled(run: Run) -> None:
    """One step as two ranks with the same sequences take it: their gradients are summed."""
    (-2 * run.policy(*INPUTS, 1.0)[0].mean()).backward()
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()


# ---- damage


def saved(folder: Path, *steps: int) -> Counter:
    run = Counter()
    for step in steps:
        Checkpointer(folder, keep=9).save(
            step, step, run, lambda where: write_synced(where / "rollouts.bin", b"groups")
        )
    return run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "rollouts.bin", "checksums.json"])
@pytest.mark.parametrize("harm", ["flipped", "cut off", "gone"])
def test_damage_of_any_file_is_found_and_the_run_goes_on_from_the_checkpoint_before(
    tmp_path: Path, name: str, harm: str
) -> None:
    saved(tmp_path, 3, 5, 9)
    file = tmp_path / "step_00000009" / name
    if harm == "flipped":
        flip(file)
    elif harm == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    assert damage(tmp_path / "step_00000005") == []
    found = damage(tmp_path / "step_00000009")
    assert found == [name] or (found and (name, harm) == ("checksums.json", "flipped")), "that one speaks of others"
    sentence = set_damaged_aside(tmp_path)
    assert sentence is not None and sentence.count("\n") == 0
    assert f"step_00000009 lacks or has other bytes in {', '.join(found)}" in sentence
    assert "the run goes on from step 5, 4 step(s) are done again" in sentence
    assert complete_steps(tmp_path) == [3, 5] and (tmp_path / "damaged_step_00000009").is_dir()
    assert set_damaged_aside(tmp_path) is None, "it is said once"


def test_a_state_that_is_not_what_was_written_makes_a_checkpoint_incomplete_before_all_is_read(tmp_path: Path) -> None:
    """It says what the checkpoint is of, and is read before the rest."""
    saved(tmp_path, 5, 9)
    flip(tmp_path / "step_00000009" / "state.json")
    assert complete_steps(tmp_path) == [5]
    assert torn(tmp_path) == {"step_00000009": "step_00000009 lacks or has other bytes in state.json"}
    (tmp_path / "step_00000005" / "checksums.json").write_text("{}")
    assert complete_steps(tmp_path) == [] and damage(tmp_path / "step_00000005") == ["checksums.json"]
    (tmp_path / "step_00000005" / "checksums.json").write_text(60_000 * "[")
    assert complete_steps(tmp_path) == [] and damage(tmp_path / "step_00000005") == ["checksums.json"]


def test_what_is_called_almost_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    for name in ("step_00000005.bak", "step_00000005.0", "step_7", "step_0000000007", "step_"):
        (tmp_path / name).mkdir()
    assert complete_steps(tmp_path) == [5] and torn(tmp_path) == {}
    assert set_damaged_aside(tmp_path) is None


def test_a_damaged_checkpoint_of_a_later_step_does_not_outlive_those_that_are_saved_after_it(tmp_path: Path) -> None:
    run = saved(tmp_path, 5, 9)
    flip(tmp_path / "step_00000009" / "__0_0.distcp")
    set_damaged_aside(tmp_path)
    Checkpointer(tmp_path, keep=1).save(6, 6, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000006"]


def test_when_every_checkpoint_is_damaged_nothing_is_renamed_and_one_sentence_names_them(tmp_path: Path) -> None:
    saved(tmp_path, 5, 9)
    flip(tmp_path / "step_00000005" / "state.json")
    (tmp_path / "step_00000009" / ".metadata").unlink()
    with pytest.raises(ConfigError) as refused:
        set_damaged_aside(tmp_path)
    assert "step_00000005 lacks or has other bytes in state.json" in str(refused.value)
    assert "step_00000009 lacks or has other bytes in .metadata" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000009"]


def answered(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """From now on who reads a file of this name, or looks for it, gets this error."""

    def refuse(file: Path) -> None:
        if file.name == name:
            raise OSError(number, os.strerror(number), str(file))

    for owner, function in ((Path, "open"), (Path, "stat"), (checksums, "_crc32")):
        real = getattr(owner, function)

        def asked(file: Path, *arguments: Any, _real: Any = real, **more: Any) -> Any:
            refuse(file)
            return _real(file, *arguments, **more)

        monkeypatch.setattr(owner, function, asked)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "rollouts.bin", "checksums.json"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_a_file_that_cannot_be_read_now_is_no_damage(
    tmp_path: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole once its server is there again, so nothing is renamed, which the next save would delete."""
    saved(tmp_path, 5, 9)
    with monkeypatch.context() as patch:
        answered(patch, name, number)
        with pytest.raises(OSError) as failed:
            set_damaged_aside(tmp_path)
        said = disk_problem(failed.value)
        assert said is not None and "step_00000009 cannot be read on " in said and os.strerror(number) in said
        with pytest.raises(OSError):
            complete_steps(tmp_path)
    assert complete_steps(tmp_path) == [5, 9] and set_damaged_aside(tmp_path) is None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "rollouts.bin", "checksums.json"])
def test_a_file_that_the_disk_does_not_give_back_is_damage(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 9)
    answered(monkeypatch, name, errno.EIO)
    assert damage(tmp_path / "step_00000009") == [name] and complete_steps(tmp_path) == []


# ---- what becomes of the older ones


def test_what_was_set_aside_and_is_whole_again_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A soft mount answers EIO while its server restarts."""
    run = saved(tmp_path, 5, 9)
    with monkeypatch.context() as patch:
        real = checksums._crc32

        def refused(file: Path) -> int:
            if file.parent.name == "step_00000009" and file.suffix == ".distcp":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
            return real(file)

        patch.setattr(checksums, "_crc32", refused)
        assert "the run goes on from step 5" in (set_damaged_aside(tmp_path) or "")
    Checkpointer(tmp_path, keep=9).save(6, 6, run)
    assert damage(tmp_path / "kept_step_00000009") == [] and complete_steps(tmp_path) == [5, 6]
    assert "it stays as" in caplog.text
    Checkpointer(tmp_path, keep=9).save(7, 7, run)
    assert (tmp_path / "kept_step_00000009").is_dir()


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run_and_goes_with_a_later_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As over NFS while somebody reads it. The others go at once."""
    run, checkpointer = saved(tmp_path, 3, 5), Checkpointer(tmp_path, keep=1)
    (tmp_path / "damaged_step_00000004").mkdir()
    real = shutil.rmtree

    def busy(path: Path) -> None:
        if path.name.endswith(("step_00000003", "step_00000004")):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for step in (6, 7):
            checkpointer.save(step, step, run)
            assert complete_steps(tmp_path) == [step] and torn(tmp_path) == {}
            assert f"{tmp_path}/damaged_step_00000004 cannot be deleted" in caplog.text
            assert "incomplete_step_00000003 cannot be deleted" in caplog.text
            caplog.clear()
    checkpointer.save(8, 8, run)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000008"]
    assert "cannot be deleted" not in caplog.text


def test_a_checkpoint_whose_deletion_was_cut_short_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def half(path: Path) -> None:
        (path / "__0_0.distcp").unlink()
        raise Killed

    run = saved(tmp_path, 3, 5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", half)
        Checkpointer(tmp_path, keep=1).save(6, 6, run)
    assert complete_steps(tmp_path)[-1] == 6 and torn(tmp_path) == {} and set_damaged_aside(tmp_path) is None
    Checkpointer(tmp_path, keep=1).save(7, 7, run)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_an_older_checkpoint_that_cannot_be_read_now_does_not_fail_the_save_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays until it can be read."""
    run = saved(tmp_path, 3, 5)
    real = checksums.absent

    def stale(folder: Path) -> list[str]:
        if folder.name == "step_00000005":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))
        return real(folder)

    with monkeypatch.context() as patch:
        patch.setattr("learner.checkpoint.absent", stale)
        Checkpointer(tmp_path, keep=1).save(6, 6, run)
        assert complete_steps(tmp_path) == [6] and step_folder(tmp_path, 6).name == "step_00000006"
        assert torn(tmp_path, step_folder(tmp_path, 6)) == {}
        assert Checkpointer(tmp_path, keep=9).load(6, Counter()).version == 6
    assert "Stale file handle" in caplog.text and complete_steps(tmp_path) == [5, 6]
    Checkpointer(tmp_path, keep=1).save(7, 7, run)
    assert complete_steps(tmp_path) == [7]


def test_only_what_is_newer_than_the_chosen_one_is_named_as_torn(tmp_path: Path) -> None:
    saved(tmp_path, 3, 5, 9)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000005.1")
    for name in ("step_00000003", "step_00000005", "step_00000009"):
        (tmp_path / name / "__0_0.distcp").unlink()
    assert step_folder(tmp_path, 5).name == "step_00000005.1"
    assert list(torn(tmp_path, step_folder(tmp_path, 5))) == ["step_00000009"]
    assert list(torn(tmp_path)) == ["step_00000003", "step_00000005", "step_00000009"]


# ---- saves that fail


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    run = saved(tmp_path, 5)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "rollouts.bin"))

    with pytest.raises(CannotWrite) as refused, Checkpointer(tmp_path, keep=1, in_background=True) as checkpointer:
        checkpointer.save(6, 6, run, full)
    assert "the checkpoint of step 6 cannot be written on " in str(refused.value)
    assert "No space left on device" in str(refused.value)
    assert complete_steps(tmp_path) == [5]


def test_a_save_in_the_background_that_fails_says_so_before_the_next(tmp_path: Path) -> None:
    gate = threading.Event()

    def full(folder: Path) -> None:
        assert gate.wait(60)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "rollouts.bin"))

    checkpointer = Checkpointer(tmp_path, keep=1, in_background=True)
    assert not checkpointer.has_failed(), "there is none"
    checkpointer.save(5, 5, Counter(), full)
    assert not checkpointer.has_failed(), "it is under way"
    pending = checkpointer._pending
    gate.set()
    assert pending is not None and isinstance(pending.exception(60), CannotWrite)
    assert checkpointer.has_failed()
    with pytest.raises(CannotWrite, match="the checkpoint of step 5 cannot be written on "):
        checkpointer.wait()
    with checkpointer:
        checkpointer.save(6, 6, Counter())
        checkpointer.wait()
        assert not checkpointer.has_failed()


def _where_one_rank_cannot_write(rank: int, folder: Path, out: Path) -> None:
    """Rank 1 has a limit on the size of its files, which stands for a disk that is full; then rank 0 has it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    said = []
    with process_group(Device.cpu, timeout_s=60):
        for unlucky, in_background in ((1, True), (0, True), (0, False)):
            limit = 1000 if rank == unlucky else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            checkpointer = Checkpointer(folder, keep=1, in_background=in_background)
            with pytest.raises(CannotWrite) as refused, checkpointer:
                checkpointer.save(6, 6, Shares(rank))
            said.append(str(disk_problem(refused.value)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with Checkpointer(folder, keep=1) as checkpointer:
            checkpointer.save(7, 7, Shares(rank))
    (out / f"said {rank}").write_text("\n".join(said))


class Shares:
    """Something of which each rank has a piece."""

    def __init__(self, rank: int) -> None:
        self.tensors = {f"of rank {rank}": torch.ones(5000)}

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing is loaded here")


def test_when_one_rank_cannot_write_all_leave_together_with_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_ranks_meet(monkeypatch)
    run_two_ranks(_where_one_rank_cannot_write, tmp_path / "c", tmp_path)
    said = [(tmp_path / f"said {rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1] and len(said[0]) == 3
    assert all("the checkpoint of step 6 cannot be written on" in line for line in said[0]), said[0]
    assert all("File too large" in line or "when the disk is full" in line for line in said[0]), said[0]
    assert complete_steps(tmp_path / "c") == [7]


# ---- loads that fail


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """From now on what torch reads of a checkpoint's tensors is this error."""

    def read(*_: object) -> None:
        raise error

    monkeypatch.setattr(dcp.FileSystemReader, "read_data", read)


def test_a_file_that_cannot_be_read_while_tensors_are_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own exception is none that anybody would catch."""
    run = saved(tmp_path, 5)
    for number in (errno.ESTALE, errno.ENOENT):
        fails(monkeypatch, OSError(number, os.strerror(number), "of/a/piece"))
        with pytest.raises(CannotWrite) as failed:
            Checkpointer(tmp_path, keep=1).load(5, run)
        said = str(failed.value)
        assert f"{tmp_path}/step_00000005 cannot be read on {socket.gethostname()}: " in said and "of/a/piece" in said
        assert not is_crash(failed.value)


def test_what_torch_cannot_make_of_a_checkpoint_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it met, so that no text of a library is told as the user's mistake."""
    run = saved(tmp_path, 5)
    for error in (ValueError("no such storage"), MemoryError("4 GiB")):
        fails(monkeypatch, error)
        with pytest.raises(RuntimeError) as failed:
            Checkpointer(tmp_path, keep=1).load(5, run)
        assert str(failed.value) == f"checkpoint {tmp_path}/step_00000005 cannot be loaded: {error!r}"
        assert is_crash(failed.value) and type(failed.value) is RuntimeError


def test_a_load_that_a_signal_has_ended_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path, 5)
    for error in (Interrupted(signal.SIGTERM), KeyboardInterrupt()):
        fails(monkeypatch, error)
        with pytest.raises(type(error)):
            Checkpointer(tmp_path, keep=1).load(5, run)


def test_a_state_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path, 5)
    answered(monkeypatch, "state.json", errno.ESTALE)
    with pytest.raises(CannotWrite, match=r"cannot be read on .*Stale file handle: .*state\.json"):
        Checkpointer(tmp_path, keep=1).load(5, run)


def _where_one_rank_cannot_read(rank: int, folder: Path, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    said = []
    with process_group(Device.cpu, timeout_s=60), Checkpointer(folder, keep=1) as checkpointer:
        shares = Shares(rank)
        checkpointer.save(7, 7, shares)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                fails(patch, OSError(errno.ESTALE, os.strerror(errno.ESTALE), "of/a/piece"))
            with pytest.raises(CannotWrite) as refused:
                checkpointer.load(7, shares)
            said.append(str(refused.value))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                fails(patch, ValueError("no such storage"))
            with pytest.raises(RuntimeError) as crashed:
                checkpointer.load(7, shares)
            said.append(str(crashed.value))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                answered(patch, ".metadata", errno.ESTALE)
            for ask in (lambda: checkpointer.load(7, shares), lambda: set_damaged_aside(folder, dist.group.WORLD)):
                with pytest.raises(CannotWrite) as refused:
                    ask()
                said.append(str(refused.value))
    (out / f"said {rank}").write_text("\n".join(said))


def test_when_one_rank_cannot_read_all_leave_together_with_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_ranks_meet(monkeypatch)
    run_two_ranks(_where_one_rank_cannot_read, tmp_path / "c", tmp_path)
    said = [(tmp_path / f"said {rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1] and len(said[0]) == 4
    assert all("Stale file handle" in said[0][i] for i in (0, 2, 3)), said[0]
    assert "cannot be loaded: ValueError('no such storage')" in said[0][1]
