"""The `eval` command: samples a file of prompts from a model or a run, and prints how good the responses are.

    python run.py eval MODEL_OR_RUN --data FILE --samples K

What has been sampled is in OUT/transcripts.jsonl, and the same call again goes on from there. OUT/engine.log is what
the engine says, OUT/scores.json what the table says.
"""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine import Engine
from actors.evaluation.plan import Plan, Request, planned
from actors.evaluation.report import LABEL, Report, as_json, render, report
from actors.evaluation.runner import Runner
from actors.evaluation.transcripts import Transcripts, transcripts
from actors.evaluation.votes import equality
from actors.sampling import EngineError
from actors.verifier.pool import VerifierError, pool_of
from actors.verifier.trial import needs_trial, try_verifier
from common.lines import for_terminal
from common.progress import Progress
from common.stopping import stop_numbers

LOG, SCORES = "engine.log", "scores.json"


@dataclass
class Interruption:
    """How SIGINT, SIGTERM and SIGHUP end an evaluation, on its event loop.

    Nothing can break off an engine that starts. Then a signal, or the end of its time, ends this process on the spot,
    and its guardian sees to what it has started (common/processtree.py).
    """

    task: "asyncio.Task[Any]"
    console: int  # file descriptor
    number: int | None = None  # of the first signal
    is_starting: bool = False

    def handle(self, number: int) -> None:
        if self.is_starting or self.number is not None:
            os._exit(128 + number)
        self.number = number
        self.task.cancel()

    @contextmanager
    def starting(self, timeout_s: float) -> Iterator[None]:
        self.is_starting = True
        timer = asyncio.get_running_loop().call_later(timeout_s, self._give_up, timeout_s)
        try:
            yield
        finally:
            timer.cancel()
            self.is_starting = False

    def _give_up(self, timeout_s: float) -> None:
        os.write(
            self.console, f"error: the engine has not started within actors.start_timeout_s={timeout_s:g}\n".encode()
        )
        os._exit(1)


def main(request: Request) -> int:
    """Returns the exit code: 0 done; 1 the engine or the verifier's processes ended, or a prompt could not be sampled;
    128 + n ended by signal n. Raises ConfigError for a mistake in the call, the data or the verifier. In every case,
    what is done stays."""
    try:
        with planned(request) as plan:
            uids = [prompt.uid for prompt in plan.prompts]
            with transcripts(plan.out, plan.settings, uids, plan.num_samples) as found:
                return _evaluate(request, plan, found)
    except (EngineError, VerifierError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1


def _evaluate(request: Request, plan: Plan, found: Transcripts) -> int:
    refused: dict[str, str] = {}
    missing = len(plan.prompts) - len(found.done)
    if missing:
        if not request.is_json:
            had = f", {len(found.done)} of them done before" if found.done else ""
            print(f"{plan.source}: {len(plan.prompts)} prompts{had}; the engine starts ({plan.out / LOG})", flush=True)
        number, refused = _sample(plan, found, is_quiet=request.is_json)
        if number is not None:
            sentence = f"interrupted with {len(found.done)} of {len(plan.prompts)} prompts done: the same call goes on"
            print(sentence, file=sys.stderr, flush=True)
            return 128 + number
    result = report(plan, found.done, refused, request.by)
    _write(plan.out / SCORES, result)
    if request.is_json:
        print(json.dumps(as_json(result)))
    else:
        print(for_terminal(f"\n{render(result)}\n{'transcripts':<{LABEL}}{found.path}", LABEL))
    if refused:
        uid, reason = next(iter(refused.items()))
        print(
            f"error: {len(refused)} prompts could not be sampled and count as wrong, first {uid} ({reason})",
            file=sys.stderr,
            flush=True,
        )
    return 1 if refused else 0


def _sample(plan: Plan, found: Transcripts, *, is_quiet: bool) -> tuple[int | None, dict[str, str]]:
    """(number of the signal that has ended it, if one has, prompts that were refused)."""

    async def run() -> tuple[int | None, dict[str, str]]:
        task = asyncio.current_task()
        assert task is not None
        interruption = Interruption(task, console)
        for number in stop_numbers():
            asyncio.get_running_loop().add_signal_handler(number, interruption.handle, number)
        try:
            return None, await _run(plan, found, interruption, is_quiet=is_quiet)
        except (asyncio.CancelledError, EngineError):  # Ctrl-C goes to the engine's processes too
            if interruption.number is None:
                raise
            return interruption.number, {}

    with _logged(plan.out / LOG) as console:
        try:
            return asyncio.run(run())
        except EngineError as error:
            raise EngineError(f"{error} (log: {plan.out / LOG})") from error


async def _run(plan: Plan, found: Transcripts, interruption: Interruption, *, is_quiet: bool) -> dict[str, str]:
    """Samples what is missing. What can fail fast comes first."""
    if needs_trial(plan.config):
        await try_verifier(plan.config, plan.prompts[0])
    async with pool_of(plan.config) as verifier, equality(plan.config) as is_equal:
        engine = Engine(plan.config)
        try:
            with interruption.starting(plan.config.actors.start_timeout_s):
                await engine.start()
            runner = Runner(plan, engine, verifier, is_equal, found)
            with nullcontext() if is_quiet else Progress("sampling", len(plan.prompts), "prompts") as progress:
                await runner.run(progress)
            return runner.refused
        finally:
            await engine.shutdown()


@contextmanager
def _logged(path: Path) -> Iterator[int]:
    """What this process and those that it starts write to stderr is appended to a file: the engine says much. The file
    descriptor of what stderr was."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    sys.stderr.flush()
    console = os.dup(2)
    try:
        with path.open("ab") as log:
            os.dup2(log.fileno(), 2)
        yield console
    finally:
        sys.stderr.flush()
        os.dup2(console, 2)
        os.close(console)


def _write(path: Path, result: Report) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(as_json(result), indent=2) + "\n")
    temporary.replace(path)
