"""Which GPUs whom: separate, shared and decided by how many are visible. GPUs are stand-ins."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import placement
from common.config import Config, ConfigError, Placement, TransferBackend
from common.loading import load_config
from common.memory import GIB
from common.placement import Devices, Gpu, assign, plan_here, settle, settle_memory, visible_gpus

CUDA = ["device=cuda", "model.dtype=bfloat16"]
LISTING = "0, GPU-aaaa-1, 24576\n1, GPU-bbbb-2, [N/A]\n"


def config(*overrides: str) -> Config:
    return load_config(["demo"], [*CUDA, *overrides])


def gpus(count: int, memory: int | None = 80 * GIB) -> list[Gpu]:
    return [Gpu(name=str(i), memory=memory) for i in range(count)]


@pytest.mark.parametrize(("count", "chosen"), [(1, Placement.shared), (2, Placement.shared), (3, Placement.separate)])
def test_auto_shares_where_fewer_gpus_are_visible_than_the_roles_need(count: int, chosen: Placement) -> None:
    assert settle(config("actors.count=2"), gpus(count)).actors.placement is chosen


def test_what_was_asked_for_stays(tmp_path: Path) -> None:
    assert settle(config("actors.placement=shared"), gpus(8)).actors.placement is Placement.shared
    with pytest.raises(ConfigError, match=r"ranks=1 and actors\.count=1 with .* need 2 GPUs, but 1 are .*=shared\)$"):
        settle(config("actors.placement=separate"), gpus(1))


def test_the_backend_follows_from_the_placement() -> None:
    assert config().transfer_backend is TransferBackend.nccl
    assert config("actors.placement=shared").transfer_backend is TransferBackend.ipc
    assert load_config(["demo"], []).transfer_backend is TransferBackend.gloo


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        (["actors.placement=shared", "actors.count=3"], Devices(learner="a", actors=("a", "a", "a"))),
        (["actors.placement=shared", "actors.count=0"], Devices(learner="a", actors=())),
        (["learner.ranks=2", "actors.count=2"], Devices(learner="a,b", actors=("c", "d"))),
        (["learner.ranks=2", "actors.tensor_parallel_size=2"], Devices(learner="a,b", actors=("c,d",))),
    ],
)
def test_who_gets_which_gpu(overrides: Sequence[str], devices: Devices) -> None:
    assert assign(config(*overrides), "abcd") == devices


@pytest.mark.parametrize("setting", ["learner.ranks=2", "actors.tensor_parallel_size=2"])
def test_more_than_one_gpu_is_not_shared(setting: str) -> None:
    with pytest.raises(
        ConfigError, match=r"actors\.placement=shared is for one GPU, .* set actors\.placement=separate"
    ):
        config("actors.placement=shared", setting)
    with pytest.raises(ConfigError, match=r"need 3 GPUs, but 2 are visible, and one for both is not possible: actors"):
        settle(config(setting), gpus(2))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["weights.backend=ipc"], r"weights\.backend=ipc does not work with .*actors\.placement=auto: use nccl"),
        (
            ["weights.backend=nccl", "actors.placement=shared"],
            r"weights\.backend=nccl does not work with .*=shared: use ipc",
        ),
        (["weights.backend=gloo"], r"weights\.backend=gloo does not work with device=cuda"),
        (["actors.sleep_while_training=true"], r"needs staleness\.max_staleness=0, not 2"),
        (
            ["actors.sleep_while_training=true", "staleness.max_staleness=0", "actors.placement=separate"],
            r"has no effect with actors\.placement=separate",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: Sequence[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["actors.placement=shared"], r"actors\.placement=shared has no effect with device=cpu"),
        (
            ["actors.sleep_while_training=true", "staleness.max_staleness=0"],
            r"actors\.sleep_while_training=true needs device=cuda",
        ),
        (["weights.backend=ipc"], r"weights\.backend=ipc does not work with device=cpu: use gloo"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(overrides: Sequence[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(["demo"], overrides)


def test_a_backend_that_was_set_for_other_gpus_is_refused_when_they_are_shared() -> None:
    with pytest.raises(ConfigError, match=r"need 2 GPUs, but 1 are visible, and one for .*backend=nccl does not"):
        settle(config("weights.backend=nccl"), gpus(1))


def test_sleep_on_gpus_of_ones_own_is_refused_when_it_is_known() -> None:
    sleepy = config("actors.sleep_while_training=true", "staleness.max_staleness=0")
    assert settle(sleepy, gpus(1)).is_shared
    with pytest.raises(ConfigError, match=r"has no effect with actors\.placement=separate"):
        settle(sleepy, gpus(2))


def test_the_engines_fraction_is_what_the_learner_leaves() -> None:
    utilization = settle(config(), gpus(1, 8 * GIB)).actors.gpu_memory_utilization
    assert utilization is not None and 0 < utilization < 0.5
    assert settle(config(), gpus(2)).actors.gpu_memory_utilization is None  # its own GPU: the engine's default
    assert settle(config("actors.gpu_memory_utilization=0.4"), gpus(1)).actors.gpu_memory_utilization == 0.4


def test_what_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"too little memory on one shared GPU of 2\.0 GiB"):
        settle(config(), gpus(1, 2 * GIB))


@pytest.mark.parametrize("memory", [3 * GIB, 80 * GIB])
def test_what_was_decided_is_accepted_when_the_run_is_resumed(memory: int) -> None:
    decided = settle(config(), gpus(1, memory))
    assert settle(decided, gpus(1, memory)) == decided


def test_gpus_of_unknown_memory_need_a_fraction_only_when_shared() -> None:
    with pytest.raises(ConfigError, match=r"the memory of GPU 0 is not known .* set actors\.gpu_memory_util"):
        settle(config(), gpus(1, None))
    settle(config("actors.gpu_memory_utilization=0.3"), gpus(1, None))
    assert settle_memory(config("actors.placement=separate"), gpus(2, None)).actors.gpu_memory_utilization is None


def test_a_model_of_unknown_sizes_needs_a_fraction_only_when_shared(tmp_path: Path) -> None:
    run = config()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    run = replace(run, model=replace(run.model, path=str(tmp_path)))
    shared = replace(run, actors=replace(run.actors, placement=Placement.shared))
    with pytest.raises(ConfigError, match=r"does not give hidden_size in .* set actors\.gpu_memory_utilization"):
        settle_memory(shared, gpus(1))
    assert settle_memory(run, gpus(2)) == run
    told = replace(shared, actors=replace(shared.actors, gpu_memory_utilization=0.3))
    assert settle_memory(told, gpus(1)) == told


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(placement, "NVIDIA_SMI_S", 0.2)
    with pytest.raises(ConfigError, match=r"nvidia-smi did not answer within 0\.2 s"):
        visible_gpus()


def test_a_driver_that_fails_is_quoted(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(stdout="Failed to initialize NVML: Driver/library version mismatch\n", returncode=18)
    monkeypatch.setattr(placement.subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(ConfigError, match=r"nvidia-smi fails \(Failed to initialize NVML: Driver/library version"):
        visible_gpus()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(placement.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(placement.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=LISTING, returncode=0))


@pytest.mark.usefixtures("driver")
def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Gpu(name="0", memory=24 * GIB), Gpu(name="1", memory=None)]
    assert visible_gpus() == both
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert visible_gpus() == both[::-1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aaaa,MIG-1")
    assert visible_gpus() == [Gpu(name="GPU-aaaa", memory=24 * GIB), Gpu(name="MIG-1", memory=None)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


@pytest.mark.usefixtures("driver")
def test_a_process_on_a_shared_gpu_knows_its_plan() -> None:
    shared = settle(config(), visible_gpus()[:1])
    plan = plan_here(shared)
    assert plan is not None and plan.shortage == 0
    assert plan.kv_cache >= plan.kv_least
    assert plan.gpu_memory_utilization == pytest.approx(shared.actors.gpu_memory_utilization, abs=1e-4)
    assert plan_here(config("actors.placement=separate")) is None


def test_without_a_driver_the_names_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.shutil, "which", lambda _: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert visible_gpus() == [Gpu(name="3", memory=None), Gpu(name="4", memory=None)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match="needs an NVIDIA driver, but nvidia-smi was not found: use device=cpu"):
        visible_gpus()
