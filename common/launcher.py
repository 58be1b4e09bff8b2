"""`run.py train`: which processes a configuration asks for on this machine, and how they find each other.

    RUN/config.yaml      the resolved configuration, which every child reads
    RUN/data             what `run.py check` made of the data, before anything else starts
    RUN/endpoint         address of the learner's socket, written by rank 0; actors wait for it
    RUN/control          socket of the supervisor (common/control.py), while it lives
    RUN/keys             the run's own keys, made by rank 0 (without transport.keys)
    RUN/logs/ROLE.log    output of each child

Learner and actors start at the same time, because either needs half a minute.
"""

import itertools
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

from common import lastsettings, placement
from common.causes import last_error, naming, signal_name
from common.child import ChildSpec
from common.config import Config, ConfigError, Device
from common.console import console_for
from common.keys import check_keys
from common.loading import save_config
from common.placement import visible_gpus
from common.processes import Outcome, Supervisor, deal_cores
from common.processtree import child_setup
from common.runlock import ENDING_S, LEARNER_LOCK, held
from common.stopping import Interrupted, postponed_signals, stopped_by_signals
from common.trackers import check_trackers

RUN_PY = Path(__file__).resolve().parent.parent / "run.py"
# But for config.yaml, which makes a folder a run directory: it is replaced, so that it is there at any time.
RUN_CONTENT = (
    lastsettings.BEFORE,
    "data",
    "metrics.jsonl",
    "ledger.jsonl",
    "events.jsonl",
    "endpoint",
    "control",
    "keys",
    "model",
    "tensorboard",
    "trackers.json",
    "wandb",
    "logs",
    "checkpoints",
    "incarnation.json",
    "record",
    "samples",
    "report.html",
    "eval",
    "signal",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# Models are folders on disk, so nothing has to be fetched or reported.
QUIET_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENDPOINT_POLL_S = 0.05
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP, 128 + signal.SIGPIPE)
_TCP = re.compile(r"tcp://.+:\d{1,5}")
STAGING = "check-"  # a folder .NAME.check-xxxxxxxx in runs_dir, while the data are checked
LEAVE_MARGIN_S = 10.0  # beyond actors.drain_s, for an engine to shut down


class EarlierRun(StrEnum):
    """What becomes of a run that RUN already holds."""

    REFUSE = "refuse"
    OVERWRITE = "overwrite"
    RESUME = "resume"  # the learner continues from its newest complete checkpoint, or begins if no step was done


def train(config: Config, earlier: EarlierRun, settle: Callable[[Config], Config]) -> Outcome:
    """Run learner and actors to the end. Raises ConfigError when the run cannot start here.

    `settle` is called when RUN is there and before anything reads the configuration; its result is what all roles use.
    """
    try:
        with naming(config.run_dir), stopped_by_signals(), lock_run(config), reserve_port() as port:
            return _train(config, earlier, settle, port)
    except Interrupted as interrupt:  # before there was anybody who could finish something
        return Outcome(exit_code=128 + interrupt.number, message=str(interrupt))


def _train(config: Config, earlier: EarlierRun, settle: Callable[[Config], Config], port: int) -> Outcome:
    """`train`, with the run locked and a port for the ranks."""
    cores = _allowed_cores(config)
    refuse_earlier(config, earlier)
    check_keys(config)
    check_trackers(config)
    gpus = visible_gpus() if config.device is Device.cuda else []
    config = placement.settle(config, gpus)  # refuses what has no room, before anything is deleted
    specs = role_specs(config, port, [gpu.name for gpu in gpus])
    sweep_staging(config)
    with ExitStack() as lock:
        with TemporaryDirectory(prefix=f".{config.name}.{STAGING}", dir=config.runs_dir) as staging:
            is_resumed = earlier is EarlierRun.RESUME
            needs_data = config.learner.replay is None
            data = config.run_dir / "data" if is_resumed else Path(staging) / "data"
            if needs_data and (refusal := check(config, Path(staging), data, cores)) is not None:
                return refusal  # and nothing has been made or deleted
            lock.enter_context(lock_out_learners(config))  # one may have been started since, as that took its time
            prepare_run_dir(config, earlier)
            if needs_data and not is_resumed:
                data.replace(config.run_dir / "data")
        is_interrupted = False
        try:
            config = settle(config)
            save_config(config, config.run_dir / "config.yaml")
            lock.close()  # rank 0 takes it
            outcome = _supervise(config, specs, Room(config, tuple(cores), tuple(gpu.name for gpu in gpus)))
            is_interrupted = outcome.exit_code in INTERRUPTED
            return outcome
        except (Interrupted, KeyboardInterrupt):
            is_interrupted = True
            raise
        finally:
            if not is_interrupted:
                lastsettings.put_back(config.run_dir)


def _supervise(config: Config, specs: Sequence[ChildSpec], room: "Room") -> Outcome:
    shares = deal_cores(room.cores, len(specs))
    specs = [with_cores(spec, share) for spec, share in zip(specs, shares, strict=True)]
    places = ", ".join(f"{spec.name} on {','.join(map(str, spec.cores))}" for spec in specs)
    print(f"{config.run_dir}: starting on cores: {places}; this takes about half a minute", flush=True)
    return Supervisor(
        specs,
        config.run_dir / "logs",
        stop_timeout_s=config.learner.stop_timeout_s,
        recruit=room.one_more,
        run_dir=config.run_dir,
        console=console_for(config),
    ).run()


def check(config: Config, staging: Path, data: Path, cores: Collection[int]) -> Outcome | None:
    """`run.py check` in a process of its own, because it loads torch. None when nothing speaks against the run.

    `staging` is a folder for the configuration, `data` the one for what it makes of the data.
    """
    save_config(config, staging / "config.yaml")
    command = (sys.executable, str(RUN_PY), "check", "-c", str(staging / "config.yaml"), "--data", str(data))
    environment = {**os.environ, **QUIET_ENVIRONMENT, **dict.fromkeys(THREAD_VARIABLES, "1")}
    log = staging / "check.log"  # a user's verifier function may print whatever it likes before it fails
    try:
        code = _exit_code(command, environment, log, cores)
    except KeyboardInterrupt:
        return Outcome(exit_code=128 + signal.SIGINT, message="interrupted by SIGINT")
    if code < 0:
        return Outcome(exit_code=128 - code, message=f"the check of the data ended with {signal_name(-code)}")
    if code == 128 + signal.SIGPIPE:
        return Outcome(exit_code=code, message="interrupted by SIGPIPE")
    return Outcome(exit_code=code, message=last_error(log)) if code else None


def _exit_code(command: Sequence[str], environment: Mapping[str, str], log: Path, cores: Collection[int]) -> int:
    """Of this process, which an exception here ends."""
    process, setup = None, child_setup(cores)
    with log.open("w") as errors:
        try:
            with postponed_signals():
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stderr=errors, preexec_fn=setup
                )
            return process.wait()
        except BaseException:
            if process is not None:
                process.kill()
                process.wait()
            raise


def prepare_run_dir(config: Config, earlier: EarlierRun) -> None:
    """Make RUN, with the configuration as it was asked for. An earlier learner's address goes in any case."""
    refuse_earlier(config, earlier)
    run_dir = config.run_dir
    if run_dir.exists() and any(run_dir.iterdir()):
        for name in RUN_CONTENT if earlier is EarlierRun.OVERWRITE else ("endpoint",):
            _remove(run_dir / name)
    if earlier is EarlierRun.RESUME and (run_dir / "config.yaml").is_file():
        lastsettings.set_aside(run_dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")  # from here on it is a run directory, whatever happens next


def _remove(path: Path) -> None:
    """The folder or file if there is one; of a link only the link, as what it points to is not in RUN."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep_staging(config: Config) -> None:
    """Removes what killed checks of this run have left; the run is locked, so that no other one is at work."""
    name = re.compile(rf"\.{re.escape(config.name)}\.{STAGING}[a-z0-9_]{{8}}")  # as tempfile makes it
    for path in Path(config.runs_dir).iterdir():
        if name.fullmatch(path.name):
            shutil.rmtree(path)


def refuse_earlier(config: Config, earlier: EarlierRun) -> None:
    """Raises ConfigError when RUN holds what must stay."""
    run_dir = config.run_dir
    if not run_dir.exists() or not any(path.name != LEARNER_LOCK for path in run_dir.iterdir()):
        return
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} exists but is not a run directory: choose another name=...")
    if earlier is EarlierRun.REFUSE:
        raise ConfigError(
            f"{run_dir} already holds a run: choose another name=..., pass --overwrite, or use --resume {run_dir}"
        )
    if earlier is EarlierRun.OVERWRITE:
        _refuse_own_source(config)


def _refuse_own_source(config: Config) -> None:
    """Raises ConfigError when the new run starts from something that goes with the earlier one."""
    run_dir = config.run_dir.resolve()
    goes = [run_dir / "config.yaml", *((run_dir / name).resolve() for name in RUN_CONTENT)]
    for setting, path in _sources(config):
        if any(path.resolve().is_relative_to(place) for place in goes):
            raise ConfigError(
                f"{setting} is a part of {config.run_dir}, which --overwrite deletes: choose another name=..."
            )


def _sources(config: Config) -> Iterator[tuple[str, Path]]:
    """Every setting that names something on disk which a run reads, as "key=value", and where that is."""
    for key in ("model.path", "model.critic_path", "task.train_file", "task.heldout_file", "transport.keys"):
        path = operator.attrgetter(key)(config)
        if path is not None:
            yield f"{key}={path}", Path(path)
    for number, file in enumerate(config.task.train_files or ()):
        yield f"task.train_files[{number}].path={file.path}", Path(file.path)
    if config.learner.replay is not None:
        yield f"learner.replay={config.learner.replay}", Path(config.learner.replay) / "record"


@contextmanager
def lock_run(config: Config) -> Iterator[None]:
    """One `train` per run directory at a time, and none beside a learner that was started alone."""
    with held(Path(config.runs_dir) / f".{config.name}.lock", config.run_dir):
        if (config.run_dir / LEARNER_LOCK).is_file():
            with lock_out_learners(config):
                """Free; it is taken again before RUN is changed."""
        yield


def lock_out_learners(config: Config) -> AbstractContextManager[None]:
    """While this is held no learner trains in RUN, nor does one that is started alone begin to. Raises ConfigError when
    one is there."""
    return held(config.run_dir / LEARNER_LOCK, config.run_dir, ENDING_S)


@contextmanager
def reserve_port() -> Iterator[int]:
    """A TCP port for the ranks' rendezvous that no other process is given while this is open.

    The socket stays bound but never listens: rank 0's store, which sets SO_REUSEADDR as well, can bind the
    port, while the kernel hands it out to nobody who asks for any free one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def role_specs(config: Config, port: int, gpus: Sequence[str] = ()) -> list[ChildSpec]:
    """Learner ranks and actors, on the GPUs of these names. Raises ConfigError when those are too few."""
    devices = placement.assign(config, gpus)
    specs = learner_specs(config, port)
    specs = [with_gpus(spec, devices.learner) for spec in specs]
    return specs + [with_gpus(spec, own) for spec, own in zip(actor_specs(config), devices.actors, strict=True)]


def learner_specs(config: Config, port: int) -> list[ChildSpec]:
    """One process per rank, with the environment that torchrun would give it."""
    ranks = config.learner.ranks
    return [
        ChildSpec(
            name=f"learner-{rank}",
            command=(sys.executable, str(RUN_PY), "learner", "--config", str(config.run_dir / "config.yaml")),
            environment=QUIET_ENVIRONMENT | rank_environment(rank, ranks, port),
            is_leader=True,
            is_echoed=rank == 0,
            restarts=config.learner.restarts,
            restart_window_s=config.learner.restart_window_s,
        )
        for rank in range(ranks)
    ]


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """torch.distributed's variables for one of `num_ranks` processes on this host."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def actor_specs(config: Config) -> list[ChildSpec]:
    """The actors that `train` starts; they read the learner's address from RUN/endpoint."""
    return [actor_spec(config, i) for i in range(config.actors.count)]


def actor_spec(config: Config, number: int) -> ChildSpec:
    run_dir, actors, name = config.run_dir, config.actors, f"actor-{number}"
    connect = ("--connect", f"file:{run_dir / 'endpoint'}", "-c", str(run_dir / "config.yaml"))
    return ChildSpec(
        name=name,
        command=(sys.executable, str(RUN_PY), "actor", *connect, "--name", name),
        environment=QUIET_ENVIRONMENT,
        restarts=actors.restarts,
        restart_window_s=actors.restart_window_s,
        start_timeout_s=actors.start_timeout_s,
        leave_timeout_s=actors.drain_s + LEAVE_MARGIN_S,
    )


@dataclass(frozen=True)
class Room:
    """Where `run.py actors` finds a place for actors that are added to a live run."""

    config: Config  # settled
    cores: tuple[int, ...]  # of the run
    gpus: tuple[str, ...]  # that were visible when it started

    def one_more(self, actors: Sequence[ChildSpec]) -> ChildSpec:
        """Spec of an actor beside `actors`: the lowest free number, on cores that the fewest of them use, and on GPUs
        of its own. Raises ConfigError when there is no room for it."""
        names = {spec.name for spec in actors}
        number = next(i for i in itertools.count() if f"actor-{i}" not in names)
        spec = with_gpus(actor_spec(self.config, number), self._free_gpus(actors))
        users = Counter(spec.cores for spec in actors)
        return with_cores(spec, min(self._shares(), key=lambda share: users[share]))

    def _shares(self) -> list[tuple[int, ...]]:
        """What `train` dealt to its actors; all cores of the run when it started none."""
        ranks, count = self.config.learner.ranks, self.config.actors.count
        return deal_cores(self.cores, ranks + count)[ranks:] or [self.cores]

    def _free_gpus(self, actors: Sequence[ChildSpec]) -> str:
        """For CUDA_VISIBLE_DEVICES; empty where there are none."""
        config, width = self.config, self.config.actors.tensor_parallel_size
        if config.device is Device.cpu:
            return ""
        if config.is_shared:
            if len(actors) >= config.actors.count:
                raise ConfigError(
                    f"the memory of the shared GPU is planned for actors.count={config.actors.count}: to have more, "
                    "start the run again (train --resume) with a larger one"
                )
            return self.gpus[0]
        taken = {name for spec in actors for name in spec.environment.get("CUDA_VISIBLE_DEVICES", "").split(",")}
        free = [name for name in self.gpus[config.learner.ranks :] if name not in taken]
        if len(free) < width:
            raise ConfigError(
                f"one more actor needs {width} GPU(s) (actors.tensor_parallel_size), but of the {len(self.gpus)} that "
                f"were visible when the run started {len(free)} are free"
            )
        return ",".join(free[:width])


def with_gpus(spec: ChildSpec, names: str) -> ChildSpec:
    """`spec` confined to the GPUs of these names; as it is where there are none."""
    return replace(spec, environment={**spec.environment, "CUDA_VISIBLE_DEVICES": names}) if names else spec


def with_cores(spec: ChildSpec, cores: tuple[int, ...]) -> ChildSpec:
    """`spec` pinned to `cores`, with as many threads."""
    threads = {name: str(len(cores)) for name in THREAD_VARIABLES}
    # The whole process tree is pinned from outside; vLLM's own binding would put every engine on the same
    # core.
    threads["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return replace(spec, cores=cores, environment={**spec.environment, **threads})


def wait_for_endpoint(connect: str, timeout_s: float) -> str:
    """The learner's address: `connect` itself, or for "file:PATH" the content of PATH once it is there.

    Raises:
        ConfigError: neither a ZeroMQ address nor file:PATH.
        TimeoutError: nobody wrote PATH in time.
    """
    kind, _, path = connect.partition(":")
    if _is_address(connect):
        return connect
    if kind != "file" or not path:
        raise ConfigError(f"--connect {connect} must be tcp://HOST:PORT or file:PATH")
    deadline = time.monotonic() + timeout_s
    while (endpoint := _written(path)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no learner wrote its address to {path} within {timeout_s:g} s")
        time.sleep(ENDPOINT_POLL_S)
    return endpoint


def moved_to(connect: str, endpoint: str) -> str:
    """Where the learner is that wait_for_endpoint has found at `endpoint`, by what `connect` says now."""
    kind, _, path = connect.partition(":")
    return (_written(path) if kind == "file" else None) or endpoint


def _written(path: str) -> str | None:
    """A learner's address; None while there is none. `train` deletes it at any time, to begin again."""
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _is_address(text) else None


def _is_address(text: str) -> bool:
    return text.startswith("ipc:") or _TCP.fullmatch(text) is not None


def _allowed_cores(config: Config) -> list[int]:
    allowed = sorted(os.sched_getaffinity(0))
    if config.cores is None:
        return allowed
    forbidden = sorted(set(config.cores) - set(allowed))
    if forbidden:
        raise ConfigError(f"cores={config.cores} holds {forbidden}, but this process may only use {allowed}")
    return list(config.cores)
