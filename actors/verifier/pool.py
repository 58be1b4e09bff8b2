"""The verifier as the actor sees it: awaited on the event loop, run in processes that may hang or die.

The workers live under one child process (actors/verifier/template.py) that holds their time and memory
limits and replaces them. That process starts from a module that imports neither torch nor vllm, whatever the
actor has loaded.
"""

import asyncio
import itertools
import json
import logging
import os
import sys
from types import TracebackType
from typing import Any, Self

from actors.verifier.judgement import DIED, Judgement, decode, failure
from common.config import Config, ConfigError
from common.tasks import verifier_function
from common.types import AnswerForm, Verdict

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_SILENCE_S = 60.0  # beyond timeout_s: loading heavy modules on a busy machine


class VerifierError(RuntimeError):
    """The verifier's processes cannot be started; not the fault of any response."""


class VerifierPool:
    """An async context manager around `num_workers` worker processes that run `function` ("module:function").

    Every call of `judge` ends: with the function's verdict; with ERROR when it raised, returned what is none or ended
    its process; or with TIMED_OUT when a worker ran over `timeout_s` seconds (wall clock, counted from when the worker
    takes the answer up) or exceeded `memory_mb` of address space. A number that the function returns is the reward, and
    CORRECT from `correct_from` on. States: closed -> running (`async with`) -> closed. When the template process itself
    dies, the answers that it held are an ERROR and the next call starts another. One event loop only; any number of
    tasks.
    """

    def __init__(
        self,
        function: str,
        num_workers: int,
        timeout_s: float,
        memory_mb: int,
        correct_from: float = 1.0,
        answer_form: AnswerForm = AnswerForm.EXACT,
        *,
        is_quiet: bool = False,  # what the function prints, and tracebacks of what it raises, are left out
    ) -> None:
        if num_workers < 1 or timeout_s <= 0 or memory_mb < 1:
            raise ValueError(
                f"verifier.num_workers = {num_workers}, timeout_s = {timeout_s} and memory_mb = {memory_mb} "
                "must all be positive"
            )
        self.function = function
        self._timeout_s = timeout_s
        self._stderr = asyncio.subprocess.DEVNULL if is_quiet else None
        self._arguments = [
            *(function, "--num-workers", str(num_workers)),
            *("--timeout-s", str(timeout_s), "--memory-mb", str(memory_mb), "--correct-from", str(correct_from)),
            *("--answer-form", answer_form),
        ]
        self._ids = itertools.count()
        self._pending: dict[int, asyncio.Future[Judgement]] = {}
        self._unsent: list[bytes] = []  # requests of this turn of the event loop
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._start_lock = asyncio.Lock()
        self._is_stopping = False
        self._active_s = 0.0  # loop time of the last reply, or of the request that ended idleness

    async def __aenter__(self) -> Self:
        self._is_stopping = False
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the processes; answers still waited for are TIMED_OUT."""
        if self._process is None or self._process.stdin is None or self._reader is None:
            return
        self._is_stopping = True
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            logger.error("verifier template %d did not stop in %g s: killed", self._process.pid, _STOP_TIMEOUT_S)
            self._process.kill()
            await self._process.wait()
        await self._reader
        self._process = None

    async def verify(self, response: str, reference: str, row: dict[str, Any]) -> Verdict:
        """Returns the verdict of `judge`, without reward or reason."""
        return (await self.judge(response, reference, row)).verdict

    async def judge(self, response: str, reference: str, row: dict[str, Any]) -> Judgement:
        """Returns the judgement of one response; never raises because of what it contains.

        Raises VerifierError when the processes cannot be started again after a crash.
        """
        process = await self._start()
        assert process.stdin is not None
        request_id = next(self._ids)
        request = json.dumps({"response": response, "reference": reference, "row": row})
        loop = asyncio.get_running_loop()
        if not self._pending:
            self._active_s = loop.time()
        future: asyncio.Future[Judgement] = loop.create_future()
        self._pending[request_id] = future
        try:
            if not self._unsent:
                loop.call_soon(self._send, process.stdin)
            self._unsent.append(f"{request_id} {request}\n".encode())
            return await future
        finally:
            self._pending.pop(request_id, None)

    def _send(self, pipe: asyncio.StreamWriter) -> None:
        """One write for all answers of a group: each of them wakes another process up."""
        requests, self._unsent = self._unsent, []
        pipe.write(b"".join(requests))

    async def _start(self) -> asyncio.subprocess.Process:
        """Returns the running template process, starting one when there is none. Raises VerifierError,
        ConfigError."""
        if self._process is not None and self._reader is not None and not self._reader.done():
            return self._process
        async with self._start_lock:
            if self._process is not None and self._reader is not None and not self._reader.done():
                return self._process
            self._process = await self._spawn()
            self._reader = asyncio.create_task(self._read(self._process), name="verifier replies")
            return self._process

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "actors.verifier.template", *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._stderr,
            env=child_environment(),
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                greeting = (await process.stdout.readline()).decode().strip()
                if greeting == "ready":
                    return process
                if greeting.startswith("error "):
                    process.kill()  # a thread that the refused module has started may keep it
                code = await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise VerifierError(f"verifier {self.function} was not loaded within {_START_TIMEOUT_S:g} s") from None
        if greeting.startswith("error "):
            raise ConfigError(greeting.removeprefix("error "))
        raise VerifierError(f"verifier {self.function}: its process left with exit code {code} while starting")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Resolves futures from the template's replies until it closes its side, then ends what is still
        pending."""
        assert process.stdout is not None
        partial = b""
        while True:
            try:
                async with asyncio.timeout(self._timeout_s + _SILENCE_S):
                    data = await process.stdout.read(1 << 16)
            except TimeoutError:
                if self._is_stuck():
                    logger.error("verifier template %d has gone silent: killed", process.pid)
                    process.kill()
                continue
            if not data:
                break
            self._active_s = asyncio.get_running_loop().time()
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                request_id, judgement = line.split(b" ", 1)
                self._resolve(int(request_id), decode(judgement))
        judgement = Judgement(Verdict.TIMED_OUT)
        if self._pending and not self._is_stopping:
            logger.error("verifier template %d died with %d answers", process.pid, len(self._pending))
            judgement = failure(DIED)
        for unanswered in list(self._pending):
            self._resolve(unanswered, judgement)

    def _is_stuck(self) -> bool:
        silent_s = asyncio.get_running_loop().time() - self._active_s
        return bool(self._pending) and silent_s > self._timeout_s + _SILENCE_S

    def _resolve(self, request_id: int, judgement: Judgement) -> None:
        future = self._pending.pop(request_id, None)
        if future is not None and not future.done():  # done: the caller was cancelled
            future.set_result(judgement)


def pool_of(config: Config, num_workers: int | None = None, *, is_quiet: bool = False) -> VerifierPool:
    """The pool that a run's configuration asks for, not started."""
    settings = config.verifier
    return VerifierPool(
        verifier_function(config),
        num_workers or settings.num_workers,
        settings.timeout_s,
        settings.memory_mb,
        config.reward.correct,
        settings.answer_form,
        is_quiet=is_quiet,
    )


def child_environment() -> dict[str, str]:
    """For a Python child that finds the same modules as this process; a user's verifier may sit in the working
    directory."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
