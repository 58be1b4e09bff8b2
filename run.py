"""The command line of async-vapo.

    python run.py train -c demo learner.steps=10     train; everything else is started from here
    python run.py inspect runs/demo                  the closing summary of a run, again; several are compared
    python run.py --help                             all commands

Exit codes: 0 done; 2 a mistake in the call, the configuration or the data, explained in one sentence on stderr;
1 somebody was waited for in vain, gradients stayed infinite, or a file could not be read or written; 70 an error that
nobody foresaw, its traceback is in the log; 128 + n stopped by signal n (130 Ctrl-C, 143 SIGTERM, 129 a lost terminal,
141 a reader of the output that went away); else the code of the process that failed first.

Commands import what they need after parsing, so that `--help` needs neither torch nor vLLM.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from common.broadcast import leave
from common.causes import CRASHED, disk_problem, is_raised_by_library
from common.child import READY_FILE
from common.commandline import parse
from common.config import Config, ConfigError, Device, DType, VerifierConfig
from common.control import Status, ask, status
from common.launcher import QUIET_ENVIRONMENT
from common.loading import config_of_run, load_config
from common.processes import Outcome
from common.processtree import Guardian
from common.stopping import has_lost_reader, is_crash
from common.types import AnswerForm

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, run the command, return its exit code."""
    arguments = parse(argv)
    try:
        code = COMMANDS[arguments.command](arguments)
        print(end="", flush=True)
        return code
    except FileNotFoundError as error:
        if error.filename is None:  # not about a path that the user can have meant
            raise
        return _fail(error, f"{error.filename} does not exist", USER_ERROR)
    except (ValueError, TimeoutError, FloatingPointError) as error:
        if is_raised_by_library(error):
            raise
        return _fail(error, str(error), USER_ERROR if isinstance(error, ValueError) else 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and has_lost_reader():
            return 128 + signal.SIGPIPE
        if (problem := disk_problem(error, _place(arguments))) is None:
            raise
        return _fail(error, problem, 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _place(arguments: argparse.Namespace) -> str:
    """Where a command writes, for an error that does not say it; `train` knows better."""
    names = ("html", "out", "folder") if arguments.command != "check" else ("data",)
    return next((path for name in names if (path := getattr(arguments, name, None)) is not None), "a file")


def _train(arguments: argparse.Namespace) -> int:
    from common.launcher import EarlierRun, train

    if arguments.resume is not None:
        if arguments.config or arguments.overwrite:
            raise ConfigError("--resume takes the configuration of its run: leave out -c and --overwrite")
        return _resume(Path(arguments.resume), arguments.overrides)
    earlier = EarlierRun.OVERWRITE if arguments.overwrite else EarlierRun.REFUSE
    if arguments.replay is not None:
        if arguments.config:
            raise ConfigError("--replay takes the configuration of its run: leave out -c")
        config = _replayed(Path(arguments.replay), arguments.overrides)
        return _report(config, train(config, earlier, _settle))
    config = load_config(arguments.config, arguments.overrides)
    return _report(config, train(config, earlier, _settle))


def _replayed(run: Path, overrides: list[str]) -> Config:
    """The configuration of a run that trains on the record of `run`: the same, in another folder, without actors."""
    from learner.rollouts.record import Record

    own = [f"name={run.resolve().name}-replay", "actors.count=0", "learner.record=false", f"learner.replay={run}"]
    config = load_config([str(config_of_run(run))], [*own, *overrides])
    if config.run_dir.resolve() == run.resolve():
        raise ConfigError(f"name={config.name} is the run that is replayed: choose another name=...")
    Record(run)  # refuses a run that has recorded nothing, or not from its start
    return config


def _resume(run: Path, overrides: list[str]) -> int:
    from common.launcher import EarlierRun, train
    from learner.restart import refuse_loss
    from learner.resume import standing

    for override in overrides:
        if override.partition("=")[0] in ("name", "runs_dir"):
            raise ConfigError(f"{override} does not go with --resume {run}, which goes on in that folder: leave it out")
    config = load_config([str(config_of_run(run))], overrides)
    if config.run_dir.resolve() != run.resolve():  # the folder was moved
        config = replace(config, runs_dir=str(run.resolve().parent), name=run.resolve().name)
    stands = standing(config)
    refuse_loss(config, stands)
    if stands is not None and stands.is_complete:
        print(f"{run} is complete, {stands.policy_steps} policy steps are done: raise learner.steps to train on")
        return _report(config, None)
    return _report(config, train(config, EarlierRun.RESUME, _settle))


def _report(config: Config, outcome: Outcome | None) -> int:
    """How the run ended (None: long ago), and its closing summary if it ended well. The exit code."""
    from common.report.command import PAGE, closing
    from common.trackers import attach

    if outcome is not None and outcome.exit_code != 0:
        if outcome.message is not None:
            print(f"error: {outcome.message}", file=sys.stderr)
        return outcome.exit_code
    print(f"\n{closing(config.run_dir, with_page=outcome is not None)}")
    if outcome is None:
        return 0
    attach(config, config.run_dir / PAGE)
    return outcome.exit_code


def _check(arguments: argparse.Namespace) -> int:
    """What a run is given: model folders, data, and one call of the verifier, if it is not as the task brings it.

    With --data it also leaves there what the learner needs of the data.
    """
    from actors.verifier.trial import needs_trial, try_verifier
    from common.tasks.dataset import describe, load_dataset

    config = load_config(arguments.config, arguments.overrides)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to clean up, here and in the processes that help
    folder = Path(arguments.data) if arguments.data else None
    data = load_dataset(config, folder, num_processes=len(os.sched_getaffinity(0)))
    for line in describe(data):
        print(line)
    if needs_trial(config):
        asyncio.run(try_verifier(config, data.task.train[0]))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from learner.planning.command import plan

    return plan(load_config(arguments.config, arguments.overrides), arguments)


def _settle(config: Config) -> Config:
    """The configuration with a model folder that is tied as model.tie_word_embeddings asks."""
    if config.model.tie_word_embeddings is None:
        return config
    from learner.export import with_tying

    return with_tying(config)


def _placed(config: Config) -> Config:
    """The configuration of a role with its share of a GPU that it does not have for itself; `train` has decided it."""
    from common.placement import settle_memory, visible_gpus

    return settle_memory(config, visible_gpus()) if config.is_shared else config


def _learner(arguments: argparse.Namespace) -> int:
    config = _placed(load_config([arguments.config], arguments.overrides))
    with _role(f"learner-{os.environ.get('RANK', '0')}"):
        return _crash_safely(lambda: _learn(arguments.config, config), config)


def _learn(path: str, config: Config) -> int:
    from common.launcher import rank_environment, reserve_port

    if config.device is Device.cuda and not config.is_shared:  # such memory cannot be read in place (common/ipc.py)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    ranks = config.learner.ranks
    with reserve_port() as port:
        if "WORLD_SIZE" not in os.environ and ranks == 1:
            os.environ.update(rank_environment(0, 1, port))
        if os.environ.get("WORLD_SIZE") != str(ranks):
            raise ConfigError(
                f"learner.ranks={ranks} but {os.environ.get('WORLD_SIZE', 1)} were started: "
                f"use torchrun --nproc-per-node {ranks} run.py learner --config {path}"
            )
        from learner.main import main as run_learner

        return run_learner(config)


def _actor(arguments: argparse.Namespace) -> int:
    config = _placed(load_config(arguments.config, arguments.overrides))
    with _role(arguments.name):
        return _act(config, arguments)


def _act(config: Config, arguments: argparse.Namespace) -> int:
    # Imported before the wait: the actor's libraries load while the learner still starts.
    from actors.main import main as run_actor
    from common.keys import NAME_RULE, actor_keys, is_actor_name
    from common.launcher import moved_to, wait_for_endpoint

    if not is_actor_name(arguments.name):
        raise ConfigError(f"--name {arguments.name!r} {NAME_RULE}")
    endpoint = wait_for_endpoint(arguments.connect, config.actors.start_timeout_s)
    keys = actor_keys(config, arguments.name, _keys_beside(arguments))
    return run_actor(config, endpoint, arguments.name, keys, lambda: moved_to(arguments.connect, endpoint))


def _actors(arguments: argparse.Namespace) -> int:
    """Of a live run on this machine: how many there are, or from now on as many as --count says."""
    run = Path(arguments.run)
    if arguments.count is None:
        print(_describe(status(run)))
        return 0
    if arguments.count < 0:
        raise ConfigError(f"--count {arguments.count} must be 0 or more")
    done = ask(run, {"command": "resize", "count": arguments.count})["done"]
    print("\n".join(done) or f"{run} has {arguments.count} local actor(s) already")
    return 0


def _describe(actors: Status) -> str:
    return "\n".join([f"{actors.active} of {actors.wanted} local actor(s) take part", *actors.given_up])


def _keys_beside(arguments: argparse.Namespace) -> Path | None:
    """The folder that --keys names, or RUN/keys of --connect file:RUN/endpoint if they are there; None: neither."""
    if arguments.keys is not None:
        return Path(arguments.keys)
    kind, _, path = arguments.connect.partition(":")
    beside = Path(path).parent / "keys"
    return beside if kind == "file" and beside.is_dir() else None


def _keygen(arguments: argparse.Namespace) -> int:
    from common.keys import SHARED_ACTOR, make_keys

    folder = Path(arguments.folder)
    made = make_keys(folder, arguments.actor or [SHARED_ACTOR])
    for path in made:
        print(path)
    if not made:
        print(f"{folder} has these keys already: nothing is made")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from learner.prepare import prepare

    prepare(arguments.model, arguments.out, arguments.seed)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from common.report.command import inspect

    print(inspect(arguments.runs, arguments.html, arguments.json))
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from common.top import Form, top

    run, keys = (None if path is None else Path(path) for path in (arguments.run, arguments.keys))
    top(run, arguments.connect, keys, Form(arguments.form), arguments.timeout)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from common.show import Choice, Color, show

    show(Path(arguments.run), arguments.step, Choice(arguments.choice), Color(arguments.color))
    return 0


def _grade(arguments: argparse.Namespace) -> int:
    from actors.grade import main as run_grade

    return run_grade(arguments.cases, Config(verifier=VerifierConfig(answer_form=AnswerForm(arguments.answer_form))))


def _eval(arguments: argparse.Namespace) -> int:
    from actors.evaluation.main import main as run_eval
    from actors.evaluation.plan import Request

    with _role("eval"):
        return run_eval(
            Request(
                model=arguments.model,
                step=arguments.step,
                data=arguments.data,
                by=tuple(arguments.by),
                num_prompts=arguments.num_prompts,
                out=arguments.out,
                is_json=arguments.is_json,
                files=tuple(arguments.config),
                overrides=(*arguments.overrides, *arguments.options),
            )
        )


def _signal(arguments: argparse.Namespace) -> int:
    from learner.signal.command import Request
    from learner.signal.command import main as run_signal
    from learner.signal.estimators import GRID

    return run_signal(
        Request(
            model=arguments.model,
            step=arguments.step,
            num_batches=arguments.num_batches,
            pretrain_steps=arguments.pretrain_steps,
            lambdas=tuple(arguments.lambdas or GRID),
            out=arguments.out,
            files=tuple(arguments.config),
            overrides=tuple(arguments.overrides),
        )
    )


def _export(arguments: argparse.Namespace) -> int:
    from learner.export import main as run_export

    dtype = None if arguments.dtype is None else DType(arguments.dtype)
    return run_export(arguments.run, arguments.step, arguments.out, arguments.critic, dtype, arguments.adapter)


@contextmanager
def _role(name: str) -> Iterator[None]:
    """What every long-running process has: log lines that say who speaks, no calls home, and nobody left behind."""
    for key, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s",
    )
    if READY_FILE in os.environ:  # started by `train`, which looks after what this process leaves behind
        yield
        return
    with Guardian() as guardian:
        guardian.protect_descendants()
        yield


def _crash_safely(role: Callable[[], int], config: Config) -> int:
    """The role's exit code, which tells `train` whether to start it again: CRASHED for what nobody foresaw."""
    try:
        return role()
    except Exception as error:
        if is_crash(error):
            logging.getLogger(__name__).error("the role crashes", exc_info=error)
            return CRASHED
        is_for_main = isinstance(error, (ValueError, TimeoutError, FloatingPointError, FileNotFoundError))
        problem = None if is_for_main else disk_problem(error, config.run_dir)
        if problem is None:
            raise  # `main` says it
        return _fail(error, problem, 1)


def _fail(error: Exception, message: str, code: int) -> int:
    """One sentence for the reader; a role's log also gets the traceback, unless the mistake is in the configuration."""
    if logging.getLogger().handlers and not isinstance(error, ConfigError):
        logging.getLogger(__name__).error("the role ends", exc_info=error)
    with suppress(OSError):  # on a full disk its log has no room for it, and the code says as much
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "check": _check,
    "learner": _learner,
    "actor": _actor,
    "actors": _actors,
    "plan": _plan,
    "keygen": _keygen,
    "prepare": _prepare,
    "inspect": _inspect,
    "top": _top,
    "show": _show,
    "export": _export,
    "grade": _grade,
    "eval": _eval,
    "signal": _signal,
}


if __name__ == "__main__":
    leave(main())
