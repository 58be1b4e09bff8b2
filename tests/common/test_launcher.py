"""What `train` starts, how the pieces find each other, and what it refuses to touch."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from common import lastsettings, launcher
from common.child import ChildSpec
from common.config import Config, ConfigError, Device, TrainFile, TransferBackend
from common.launcher import (
    EarlierRun,
    Room,
    actor_specs,
    learner_specs,
    lock_run,
    moved_to,
    prepare_run_dir,
    rank_environment,
    refuse_earlier,
    reserve_port,
    role_specs,
    sweep_staging,
    train,
    wait_for_endpoint,
    with_cores,
)
from common.loading import RECIPES, load_config, read_config
from common.memory import GIB
from common.placement import Gpu
from common.processes import Outcome
from common.runlock import LEARNER_LOCK, held


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(["demo"], [f"runs_dir={tmp_path}", "name=trial", "learner.ranks=2", "actors.count=2"])


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "run.py", *arguments], cwd=RECIPES.parent, capture_output=True, text=True, timeout=240
    )


def test_ranks_get_the_environment_of_torchrun_and_the_first_one_the_console(config: Config) -> None:
    first, second = learner_specs(config, port=1234)
    assert second.environment.items() >= rank_environment(1, 2, 1234).items()
    assert (first.is_leader, first.is_echoed, second.is_leader, second.is_echoed) == (True, True, True, False)
    assert rank_environment(1, 2, 1234)["MASTER_PORT"] == "1234"


def test_actors_wait_for_the_learner_of_their_run(config: Config) -> None:
    first, second = actor_specs(config)
    assert f"file:{config.run_dir / 'endpoint'}" in first.command
    assert (first.name, second.name) == ("actor-0", "actor-1")
    assert first.restarts == config.actors.restarts and not first.is_leader


def test_threads_follow_the_cores(config: Config) -> None:
    spec = with_cores(actor_specs(config)[0], (3, 5))
    assert spec.cores == (3, 5)
    assert spec.environment["OMP_NUM_THREADS"] == "2"
    assert spec.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def devices_of(config: Config, *gpus: str) -> list[str | None]:
    """What each child sees, learner ranks first."""
    return [spec.environment.get("CUDA_VISIBLE_DEVICES") for spec in role_specs(config, 1234, gpus)]


def test_without_gpus_nobody_is_confined_to_one(config: Config) -> None:
    assert devices_of(config) == [None] * 4


def test_gpus_go_to_the_ranks_first_and_then_to_the_actors() -> None:
    apart = ["device=cuda", "actors.placement=separate", "actors.count=2", "actors.tensor_parallel_size=2"]
    assert devices_of(load_config(["demo"], apart), "2", "3", "4", "5", "6") == ["2", "3,4", "5,6"]


def test_one_more_actor_has_the_lowest_free_number_and_the_cores_that_the_fewest_use(config: Config) -> None:
    room = Room(config, cores=(0, 1, 2, 3), gpus=())
    first, second = (with_cores(spec, (core,)) for spec, core in zip(actor_specs(config), (2, 3), strict=True))
    added = room.one_more([first, second])
    assert (added.name, added.cores) == ("actor-2", (2,))
    assert added.command[-2:] == ("--name", "actor-2") and added.restarts == config.actors.restarts
    assert room.one_more([second, added]).name == "actor-0"
    assert room.one_more([first, second, added]).cores == (3,)
    alone = Room(replace(config, actors=replace(config.actors, count=0)), cores=(0, 1), gpus=())
    assert alone.one_more([]).cores == (0, 1)


def test_one_more_actor_has_gpus_of_its_own_or_is_refused() -> None:
    settings = ["device=cuda", "actors.placement=separate", "actors.count=1", "actors.tensor_parallel_size=2"]
    config = load_config(["demo"], settings)
    room = Room(config, cores=(0,), gpus=("0", "1", "2", "3", "4"))
    (first,) = [spec for spec in role_specs(config, 1234, room.gpus) if not spec.is_leader]
    added = room.one_more([first])
    assert added.environment["CUDA_VISIBLE_DEVICES"] == "3,4"
    with pytest.raises(ConfigError, match=r"needs 2 GPU.*of the 5 that were visible .* 0 are free"):
        room.one_more([first, added])


def test_one_more_actor_does_not_fit_into_a_gpu_whose_memory_is_planned_for_fewer() -> None:
    config = load_config(["demo"], ["device=cuda", "actors.placement=shared", "actors.count=1"])
    room = Room(config, cores=(0,), gpus=("7",))
    added = room.one_more([])
    assert added.environment["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(ConfigError, match=r"planned for actors\.count=1: to have more, start the run again"):
        room.one_more([added])


def test_one_visible_gpu_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["demo"], ["device=cuda", "model.dtype=bfloat16", f"runs_dir={tmp_path}"])
    monkeypatch.setattr(launcher, "visible_gpus", lambda: [Gpu(name="7", memory=24 * GIB)])
    started: list[ChildSpec] = []

    class Started(Exception):
        pass

    def start(specs: list[ChildSpec], logs: Path, **_: object) -> None:
        started.extend(specs)
        raise Started

    monkeypatch.setattr(launcher, "Supervisor", start)
    monkeypatch.setattr(launcher, "check", lambda config, staging, data, cores: data.mkdir())
    with pytest.raises(Started):
        train(config, EarlierRun.REFUSE, lambda config: config)
    assert [(spec.name, spec.environment["CUDA_VISIBLE_DEVICES"]) for spec in started] == [
        ("learner-0", "7"),
        ("actor-0", "7"),
    ]
    settled = read_config(config.run_dir / "config.yaml")  # what the roles read
    assert settled.is_shared and settled.transfer_backend is TransferBackend.ipc
    assert settled.actors.gpu_memory_utilization is not None and 0.01 < settled.actors.gpu_memory_utilization < 0.1


def test_an_earlier_run_is_not_overwritten_unless_asked(config: Config) -> None:
    prepare_run_dir(config, EarlierRun.REFUSE)
    (config.run_dir / "metrics.jsonl").write_text("{}\n")
    (config.run_dir / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"already holds a run: choose another name=\.\.\., pass --overwrite, or use --resume"
    ):
        prepare_run_dir(config, EarlierRun.REFUSE)
    prepare_run_dir(config, EarlierRun.OVERWRITE)
    assert sorted(path.name for path in config.run_dir.iterdir()) == ["config.yaml", "logs", "notes.txt"]


def test_too_few_gpus_do_not_cost_the_earlier_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_run_dir(config, EarlierRun.REFUSE)
    (config.run_dir / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config = replace(config, device=Device.cuda)
    with pytest.raises(ConfigError, match=r"actors\.tensor_parallel_size=1 need 4 GPUs, but 1 are visible"):
        train(config, EarlierRun.OVERWRITE, lambda config: config)
    assert (config.run_dir / "metrics.jsonl").read_text() == "{}\n"


def test_what_the_new_run_starts_from_is_not_overwritten(config: Config) -> None:
    prepare_run_dir(config, EarlierRun.REFUSE)
    final = config.run_dir / "checkpoints" / "final"
    final.mkdir(parents=True)
    again = replace(config, model=replace(config.model, path=str(final)))
    with pytest.raises(ConfigError, match=r"^model\.path=\S+/final is a part of \S+/trial, which --overwrite deletes"):
        prepare_run_dir(again, EarlierRun.OVERWRITE)
    assert final.is_dir()


def test_no_setting_may_name_what_the_earlier_run_holds(config: Config) -> None:
    prepare_run_dir(config, EarlierRun.REFUSE)
    run_dir = config.run_dir
    (run_dir / "record").mkdir()
    rows, elsewhere = run_dir / "data" / "rows.jsonl", TrainFile(path="elsewhere.jsonl")
    model, task = replace(config.model, critic_path=str(run_dir / "checkpoints" / "c")), config.task
    sources = {
        "model.critic_path": replace(config, model=model),
        "task.train_file": replace(config, task=replace(task, train_file=str(rows))),
        "task.heldout_file": replace(config, task=replace(task, heldout_file=str(rows))),
        "task.train_files[1].path": replace(
            config, task=replace(task, train_files=[elsewhere, TrainFile(path=str(rows))])
        ),
        "transport.keys": replace(config, transport=replace(config.transport, keys=str(run_dir / "keys"))),
        "learner.replay": replace(config, learner=replace(config.learner, replay=str(run_dir))),
    }
    for setting, again in sources.items():
        with pytest.raises(ConfigError, match=rf"^{re.escape(setting)}=\S+ is a part of \S+/trial, which --overwrite"):
            prepare_run_dir(again, EarlierRun.OVERWRITE)
    assert (run_dir / "record").is_dir()


@pytest.mark.parametrize("where", ["common.launcher.shutil.rmtree", "common.launcher.save_config"])
def test_a_run_whose_deletion_was_interrupted_can_be_overwritten_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    prepare_run_dir(config, EarlierRun.REFUSE)
    (config.run_dir / "checkpoints").mkdir()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, interrupted)
        prepare_run_dir(config, EarlierRun.OVERWRITE)
    (config.run_dir / "logs").mkdir(exist_ok=True)  # what makes it no empty folder
    refuse_earlier(config, EarlierRun.RESUME)
    prepare_run_dir(config, EarlierRun.OVERWRITE)


def test_of_a_link_to_a_larger_disk_only_the_link_is_deleted(config: Config, tmp_path: Path) -> None:
    prepare_run_dir(config, EarlierRun.REFUSE)
    (tmp_path / "large" / "step_00000001").mkdir(parents=True)
    (config.run_dir / "checkpoints").symlink_to(tmp_path / "large")
    (config.run_dir / "samples").symlink_to(tmp_path / "nowhere")
    prepare_run_dir(config, EarlierRun.OVERWRITE)
    assert sorted(path.name for path in config.run_dir.iterdir()) == ["config.yaml", "logs"]
    assert (tmp_path / "large" / "step_00000001").is_dir()


def test_what_a_killed_check_has_left_is_swept_and_nothing_else(config: Config, tmp_path: Path) -> None:
    mine = tmp_path / ".trial.check-abcd1234"
    names = (".trial.lock", ".trial.check-of-mine", ".trial.2.check-abcd1234", ".other.check-abcd1234", "trial")
    others = [tmp_path / name for name in names]
    for folder in (mine, *others):
        folder.mkdir()
    sweep_staging(config)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_folder_that_is_no_run_is_left_alone(config: Config) -> None:
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run directory"):
        prepare_run_dir(config, EarlierRun.OVERWRITE)
    assert (config.run_dir / "thesis.tex").exists()


def test_a_run_directory_has_one_train_at_a_time(config: Config) -> None:
    with lock_run(config), pytest.raises(ConfigError, match="is being trained now"), lock_run(config):
        pass
    with lock_run(config):
        pass


@pytest.mark.parametrize("earlier", [EarlierRun.OVERWRITE, EarlierRun.RESUME])
@pytest.mark.parametrize("is_there", [True, False], ids=["an earlier run", "no run yet"])
def test_a_learner_that_is_started_during_the_check_of_the_data_keeps_its_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, earlier: EarlierRun, is_there: bool
) -> None:
    """The check takes as long as reading the data does."""
    monkeypatch.setattr(launcher, "ENDING_S", 0.1)
    run_dir, trained = config.run_dir, ExitStack()
    if is_there:
        prepare_run_dir(config, EarlierRun.REFUSE)

    def start_learner(*_: object) -> None:
        trained.enter_context(held(run_dir / LEARNER_LOCK, run_dir))
        for name in ("config.yaml", "endpoint", "metrics.jsonl"):
            (run_dir / name).write_text("the learner's")

    monkeypatch.setattr(launcher, "check", start_learner)
    with trained:
        with pytest.raises(ConfigError, match=rf"trial is being trained now by process {os.getpid()} on "):
            train(config, earlier, lambda config: config)
        for name in ("config.yaml", "endpoint", "metrics.jsonl"):
            assert (run_dir / name).read_text() == "the learner's"
        assert not (run_dir / lastsettings.BEFORE).exists()


def test_no_learner_can_be_started_while_the_run_is_made_and_its_own_can_be_when_it_is(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle(config: Config) -> Config:
        with pytest.raises(ConfigError, match="is being trained now"), held(lock, config.run_dir):
            pass
        return config

    def supervise(config: Config, specs: object, room: object) -> Outcome:
        with held(lock, config.run_dir):
            return Outcome(exit_code=0, message=None)

    lock = config.run_dir / LEARNER_LOCK
    monkeypatch.setattr(launcher, "check", lambda config, staging, data, cores: data.mkdir())
    monkeypatch.setattr(launcher, "_supervise", supervise)
    for _ in range(2):
        assert train(config, EarlierRun.OVERWRITE, settle).exit_code == 0


def test_a_place_where_no_run_directory_can_be_is_one_sentence(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (replace(config, runs_dir=str(tmp_path / "file")), replace(config, name="n" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be made \([^)]+\): choose another runs_dir"), lock_run(place):
            pass


def test_a_reserved_port_is_free_for_the_store_and_for_nobody_else() -> None:
    with reserve_port() as port:
        with socket.socket() as stranger, pytest.raises(OSError) as caught:
            stranger.bind(("127.0.0.1", port))
        assert caught.value.errno == errno.EADDRINUSE
        with socket.socket() as store:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("0.0.0.0", port))
            store.listen()


def test_the_endpoint_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / "endpoint"
    timer = threading.Timer(0.2, path.write_text, args=["tcp://127.0.0.1:5555\n"])
    timer.start()
    try:
        assert wait_for_endpoint(f"file:{path}", timeout_s=30.0) == "tcp://127.0.0.1:5555"
    finally:
        timer.join()
    assert wait_for_endpoint("tcp://host:1", timeout_s=0.0) == "tcp://host:1"


def test_a_learner_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"no learner wrote its address to .*endpoint within 0.1 s"):
        wait_for_endpoint(f"file:{tmp_path / 'endpoint'}", timeout_s=0.1)
    with pytest.raises(ConfigError, match="must be tcp"):
        wait_for_endpoint("somewhere", timeout_s=0.1)


def test_an_address_that_is_deleted_while_it_is_read_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # a moment ago
    connect = f"file:{tmp_path / 'endpoint'}"
    assert moved_to(connect, "tcp://host:1") == "tcp://host:1"
    with pytest.raises(TimeoutError, match="no learner wrote its address"):
        wait_for_endpoint(connect, timeout_s=0.0)


@pytest.mark.parametrize("damaged", [b"tcp://\xff:1", bytes(20), b""])
def test_an_address_that_is_damaged_is_none(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "endpoint").write_bytes(damaged)
    assert moved_to(f"file:{tmp_path / 'endpoint'}", "tcp://host:1") == "tcp://host:1"


def test_forbidden_cores_are_named(config: Config) -> None:
    missing = max(os.sched_getaffinity(0)) + 1000
    result = run("train", "-c", "demo", f"runs_dir={config.runs_dir}", f"cores=[{missing}]")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cores=[{missing}] holds [{missing}]")
    assert not config.run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "-c", "demo", "learner.step=1"), "error: unknown setting learner.step in the command line: did you"),
        (("train", "-c", "demo", "model.path=nowhere"), "error: model.path=nowhere is not a Hugging Face model folder"),
        (("train", "-c", "nowhere.yaml"), "error: no configuration file nowhere.yaml"),
        (("inspect", "nowhere"), "error: nowhere is not a run directory"),
        (("learner", "--config", "nowhere.yaml"), "error: no configuration file nowhere.yaml"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_code_2(arguments: tuple[str, ...], sentence: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def data_arguments(folder: Path, train: str) -> tuple[str, ...]:
    (folder / "train.jsonl").write_text(train)
    (folder / "heldout.jsonl").write_text('{"question": "12a+9b-3=", "answer": "#### 18"}\n')
    files = {name: f"task.{name}_file={folder / name}.jsonl" for name in ("train", "heldout")}
    model = ("model.path=configs/models/chain_sum", "model.max_model_len=256")
    return ("-c", "demo", *model, f"runs_dir={folder}", "name=trial", "task.name=file", *files.values())


@pytest.mark.slow
def test_a_bad_row_ends_a_run_before_anything_starts(tmp_path: Path) -> None:
    rows = '{"prompt": "47a+3b-8=", "answer": 42}\n' + json.dumps({"prompt": "1a+2b" * 80, "answer": 1}) + "\n"
    result = run("train", *data_arguments(tmp_path, rows))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}/train.jsonl, line 2: its prompt has 400 tokens, and with")
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert not (tmp_path / "trial").exists(), "the same command runs once the row is mended"


@pytest.mark.slow
def test_a_bad_row_does_not_cost_the_earlier_run(tmp_path: Path) -> None:
    arguments = data_arguments(tmp_path, '{"prompt": "", "answer": 42}\n')
    (tmp_path / "trial").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "trial" / name).write_text("seed: 1\n")
    assert run("train", "--overwrite", *arguments).returncode == 2
    assert (tmp_path / "trial" / "metrics.jsonl").read_text() == "seed: 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_check_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "run.py", "train", *data_arguments(tmp_path, "")],
        cwd=RECIPES.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60.0
    while not list(tmp_path.glob(".trial.check-*/check.log")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=60.0) == ("", f"error: interrupted by {number.name}\n")
    assert process.returncode == 128 + number
    assert sorted(path.name for path in tmp_path.iterdir()) == [".trial.lock", "heldout.jsonl", "train.jsonl"]


@pytest.mark.slow
def test_check_says_what_a_run_would_use_and_keeps_it_where_it_is_told(tmp_path: Path) -> None:
    rows = '{"prompt": "47a+3b-8=", "answer": 42}\n{"prompt": "", "answer": 1}\n'
    result = run("check", *data_arguments(tmp_path, rows), "task.on_bad_row=drop", "--data", str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{tmp_path}/train.jsonl: prompt = column 'prompt', reference = column 'answer'",
        f"{tmp_path}/heldout.jsonl: prompt = column 'question', reference = column 'answer' after its last ####",
        "data: 1 prompts to train on and 1 held out, 9 to 9 tokens long",
        f"data: left out 1 row (no_prompt 1), first {tmp_path}/train.jsonl, line 2: column 'prompt' must be a text "
        "that is not blank or a list of messages with the strings role and content, not an empty string",
    ]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["dropped.jsonl", "tokens.npz"]


def test_a_rank_started_alone_says_how_to_start_all(config: Config, tmp_path: Path) -> None:
    prepare_run_dir(config, EarlierRun.REFUSE)
    result = run("learner", "--config", str(config.run_dir / "config.yaml"))
    assert result.returncode == 2
    assert "torchrun --nproc-per-node 2" in result.stderr


def test_grade_prints_a_verdict_per_case(tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"gold": "1/2", "pred": "0.5", "input": "answer"}\n')
    result = run("grade", str(cases))
    assert result.returncode == 0, result.stderr
    assert '"equal": true' in result.stdout


@pytest.mark.parametrize(("options", "is_equal"), [((), "true"), (("--answer-form", "exact"), "false")])
def test_grade_wants_the_form_of_training_where_it_is_told_so(
    tmp_path: Path, options: tuple[str, ...], is_equal: str
) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"gold": "26000", "pred": "513^2-487^2"}\n')
    result = run("grade", str(cases), *options)
    assert result.returncode == 0, result.stderr
    assert f'"equal": {is_equal}' in result.stdout


def test_a_role_on_a_shared_gpu_that_is_too_small_says_so(config: Config) -> None:
    apart = load_config(["demo"], ["device=cuda", "actors.placement=shared", f"runs_dir={config.runs_dir}"])
    prepare_run_dir(apart, EarlierRun.REFUSE)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "run.py", "actor", "--connect", "tcp://127.0.0.1:1", "-c"]
    result = subprocess.run(
        [*command, str(apart.run_dir / "config.yaml"), "--name", "a"],
        cwd=RECIPES.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: the memory of GPU 0 is not known (nvidia-smi does not tell)")
