"""The two sides of benchmarks/actor.py, each a tree of processes on one core."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import psutil

from common.child import Child, ChildSpec
from common.config import Config
from common.keys import LearnerKeys, make_keys
from common.launcher import QUIET_ENVIRONMENT, RUN_PY, with_cores
from common.loading import save_config
from common.memory import num_sequences
from common.processtree import kill
from common.transport import model_fingerprints
from common.types import Int32Array, Prompt
from learner.publication.probe import probe_token_ids
from learner.rollouts.service import LearnerService

TIMEOUT_S = 300.0  # of a start, or of a round
PARTS = ("front end", "engine core", "worker", "verifier")  # kinds of processes of a side
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class Round:
    seconds: float
    tokens: int  # of responses
    cpu_s: dict[str, float]  # of each of PARTS

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Of plain generation, beside temperature and length."""

    seeds: bool = False
    logprobs: bool = False


class Tree:
    """The processes of one side: the front end, which has started the others."""

    def __init__(self, front_end: int, cores: tuple[int, int]) -> None:
        self._front_end = psutil.Process(front_end)
        self._cores = cores

    def timed(self, generate: Callable[[], tuple[float, int]], is_free: bool) -> Round:
        """One round; `is_free`: the front end may use both cores. `generate` returns seconds and tokens."""
        self._pin(self._cores if is_free else self._cores[:1])
        before = self._cpu_s()
        seconds, tokens = generate()
        after = self._cpu_s()
        return Round(seconds=seconds, tokens=tokens, cpu_s={part: after[part] - before[part] for part in after})

    def spent_s(self) -> float:
        """CPU seconds since their start."""
        return sum(self._cpu_s().values())

    def processes(self) -> list[psutil.Process]:
        return [self._front_end, *self._front_end.children(recursive=True)]

    def _pin(self, cores: Sequence[int]) -> None:
        for thread in self._front_end.threads():
            os.sched_setaffinity(thread.id, cores)

    def _cpu_s(self) -> dict[str, float]:
        spent = dict.fromkeys(PARTS, 0.0)
        spent["front end"] = _cpu_s(self._front_end)
        for process in self._front_end.children(recursive=True):
            spent[_part(" ".join(process.cmdline()))] += _cpu_s(process)
        return spent


def _part(command: str) -> str:
    """By what vLLM calls its processes; the verifier's are ours."""
    if "verifier" in command:
        return "verifier"
    return "worker" if "VLLM::Worker" in command else "engine core"


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


# ---- vLLM alone


class Plain:
    """`LLM.generate` in a process of its own. A context manager, after whose end `spent_s` is its CPU time."""

    def __init__(self, config: Config, token_ids: Sequence[Sequence[int]], cores: tuple[int, int]) -> None:
        self._cores = cores
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_generate, args=(config, token_ids, cores[0], theirs))

    def __enter__(self) -> Self:
        self._process.start()
        assert self._pipe.poll(TIMEOUT_S) and self._pipe.recv() == "ready", "plain vLLM did not start"
        assert self._process.pid is not None
        self._tree = Tree(self._process.pid, self._cores)
        return self

    def round(self, asked: Asked, is_free: bool = False) -> Round:
        return self._tree.timed(lambda: self._generated(asked), is_free)

    def _generated(self, asked: Asked) -> tuple[float, int]:
        self._pipe.send(asked)
        assert self._pipe.poll(TIMEOUT_S), f"no answer in {TIMEOUT_S:g} s"
        seconds, tokens = self._pipe.recv()
        return seconds, tokens

    def __exit__(self, *_: object) -> None:
        """Leaves nobody behind: vLLM's processes outlive the one that has started them."""
        self.spent_s, started = self._tree.spent_s(), self._tree.processes()
        self._pipe.send(None)
        self._process.join(30.0)
        kill(started)


def _generate(config: Config, token_ids: Sequence[Sequence[int]], core: int, pipe: Connection) -> None:
    """What an actor asks of its engine for speed is asked here too; what it needs for versions and weights is not."""
    os.sched_setaffinity(0, {core})
    from actors.engine import _set_environment

    _set_environment(config)
    from vllm import LLM, SamplingParams

    group = config.rollout.group_size
    llm = LLM(
        model=config.model.path,
        dtype=config.model.dtype.value,
        max_model_len=config.model.max_model_len,
        max_num_seqs=num_sequences(config),
        gpu_memory_utilization=0.3,
        enforce_eager=config.actors.enforce_eager,
        enable_chunked_prefill=False,
        generation_config="vllm",
        disable_log_stats=True,
    )
    prompts: Any = [{"prompt_token_ids": list(ids)} for ids in token_ids for _ in range(group)]
    pipe.send("ready")
    number = 0
    while (asked := pipe.recv()) is not None:
        number += 1
        parameters = [
            SamplingParams(
                temperature=config.rollout.temperature,
                max_tokens=config.rollout.max_tokens,
                seed=1000 * number + index if asked.seeds else None,
                logprobs=0 if asked.logprobs else None,
            )
            for index in range(len(prompts))
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        pipe.send((seconds, sum(len(output.outputs[0].token_ids) for output in outputs)))
    llm.llm_engine.engine_core.shutdown()


# ---- an actor


class Leased:
    """An actor, and a learner's service in this process that leases to it. A context manager as Plain is.

    The learner is one that may not sample ahead: a round begins when the step before it is said to be done.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        tokenize: Callable[[Prompt], Int32Array],
        cores: tuple[int, int],
    ) -> None:
        folder = Path(config.runs_dir)
        self._cores, self._steps = cores, 0
        make_keys(folder / "keys")
        save_config(config, folder / "config.yaml")
        self._service = LearnerService(
            config,
            prompts,
            tokenize,
            model_fingerprints(config.model.path),
            probe_token_ids(config).tolist(),
            keys=LearnerKeys(folder / "keys"),
        )
        self._folder = folder

    def __enter__(self) -> Self:
        self._own_cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._cores[1]})
        self._service.__enter__()
        where = ("--connect", self._service.endpoint, "--keys", str(self._folder / "keys"))
        command = (sys.executable, str(RUN_PY), "actor", "-c", str(self._folder / "config.yaml"), "--name", "actor-0")
        spec = ChildSpec(name="actor-0", command=(*command, *where), environment=QUIET_ENVIRONMENT)
        self._child = Child(with_cores(spec, self._cores[:1]), self._folder)
        self._child.start({})
        try:
            self._service.wait_for_members(1, TIMEOUT_S)
            self._service.take_batch(TIMEOUT_S)
        except TimeoutError:
            print(self._child.log_path.read_text(), file=sys.stderr)
            raise
        self._tree = Tree(self._child.popen.pid, self._cores)
        return self

    def round(self, is_free: bool = False) -> Round:
        return self._tree.timed(self._sampled, is_free)

    def _sampled(self) -> tuple[float, int]:
        started = time.perf_counter()
        self._steps += 1
        self._service.set_version(0, self._steps)
        batch = self._service.take_batch(TIMEOUT_S)
        return time.perf_counter() - started, sum(len(group.completed.token_ids) for group in batch)

    def __exit__(self, *_: object) -> None:
        self.spent_s = self._tree.spent_s()
        self._service.stop("measured")
        self._child.popen.wait(60.0)
        os.sched_setaffinity(0, self._own_cores)
