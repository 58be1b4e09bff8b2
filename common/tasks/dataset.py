"""A task's prompts with their token ids, less what the model cannot be asked; known before any engine starts.

    RUN/data/tokens.npz      token ids of all prompts and what is wrong with the others, of one key
    RUN/data/dropped.jsonl   the rows that were left out: place, reason, text

`run.py train` makes them in a short process of its own (`run.py check`), the learner reads them. The key covers all
that the ids follow from: prompts, tokenizer files, template keywords, limits, the version of transformers.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from common.config import Config
from common.processtree import child_setup
from common.progress import Progress
from common.tasks import Task, load_task
from common.tasks.rows import ADVICE, BadRow, Problem, RowError, counts, settle
from common.tasks.tokenizing import check_template, fingerprint, tokenizing
from common.types import Int32Array, Lease, Prompt, Purpose
from common.wire import WireError, encode

FORMAT = 1  # part of the key
CHUNK = 256  # prompts that a process takes at once
MIN_PARALLEL = 2000  # prompts; fewer are done before other processes have started


class Refusal(NamedTuple):
    """Why a prompt cannot be asked."""

    reason: BadRow
    text: str


Result = Int32Array | Refusal


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """`task` holds the prompts that can be asked; each has at least one token and room for rollout.max_tokens."""

    task: Task
    ids_by_uid: dict[str, Int32Array]

    def token_ids(self, prompt: Prompt) -> Int32Array:
        """int32 [prompt tokens]."""
        return self.ids_by_uid[prompt.uid]


def load_dataset(config: Config, folder: Path | None, num_processes: int = 1) -> Dataset:
    """The run's data. `folder` (RUN/data) is where results are kept, None: nowhere.

    Raises ConfigError for data that cannot be used, by file and line; which rows are left out: task.on_bad_row.
    """
    return tokenized(config, load_task(config.task), folder, num_processes)


def tokenized(config: Config, task: Task, folder: Path | None, num_processes: int = 1) -> Dataset:
    """As `load_dataset`, of prompts at hand."""
    prompts = (*task.train, *task.heldout)
    key = _key(config, prompts)
    results = _read(folder / "tokens.npz", key) if folder is not None else None
    if results is None:
        check_template(config, prompts, task.place)
        results = _tokenized(config, prompts, num_processes)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "tokens.npz", key, results)
    bad = {p.uid: result for p, result in zip(prompts, results, strict=True) if isinstance(result, Refusal)}
    problems = [
        Problem(place=task.place(p), reason=bad[p.uid].reason, text=bad[p.uid].text) for p in prompts if p.uid in bad
    ]
    settle(problems, config.task.on_bad_row, ADVICE if task.files else "give the task's model and limits that fit it")
    task = task.without(problems, lambda prompt: prompt.uid in bad)
    if folder is not None:
        _list_dropped(folder / "dropped.jsonl", task.problems)
    ids = {p.uid: result for p, result in zip(prompts, results, strict=True) if not isinstance(result, Refusal)}
    return Dataset(task=task, ids_by_uid=ids)


def describe(data: Dataset) -> list[str]:
    """For the console: which columns are used, how many prompts of which length, and what was left out."""
    task = data.task
    lines = [f"{file.path}: {file.columns}" for file in task.files]
    if task.files or task.problems:
        lengths = [len(data.token_ids(prompt)) for prompt in (*task.train, *task.heldout)]
        sets = f"{len(task.train):,} prompts to train on and {len(task.heldout):,} held out"
        lines.append(f"data: {sets}, {min(lengths)} to {max(lengths)} tokens long")
    if task.problems:
        first = task.problems[0]
        lines.append(f"data: left out {counts(task.problems)}, first {first.place}: {first.text}")
    return lines


def _tokenized(config: Config, prompts: Sequence[Prompt], num_processes: int) -> list[Result]:
    """Token ids, or what is wrong, of each prompt, in order."""
    work = _Work(config, prompts)
    with Progress("tokenizing", len(prompts), "rows") as progress:
        results: list[Result] = []
        for part in work.parts(num_processes if len(prompts) >= MIN_PARALLEL else 1):
            results += part
            progress.update(len(results))
    return results


class _Work:
    """Tokenizing and checking chunk by chunk, here or in forked processes, which inherit prompts and tokenizer.

    Processes and not the tokenizer's own threads: they also share out templates and tokenizers written in Python.
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt]) -> None:
        self._config = config
        self._prompts = prompts
        self._tokenize = tokenizing(config)

    def parts(self, num_processes: int) -> Iterator[list[Result]]:
        starts = range(0, len(self._prompts), CHUNK)
        if num_processes == 1:
            yield from map(self.chunk, starts)
            return
        context = get_context("fork")
        with ProcessPoolExecutor(num_processes, context, _inherit, (self, child_setup(()))) as pool:
            yield from pool.map(_inherited_chunk, starts)

    def chunk(self, start: int) -> list[Result]:
        return [self._result(prompt) for prompt in self._prompts[start : start + CHUNK]]

    def _result(self, prompt: Prompt) -> Result:
        try:
            ids = np.asarray(self._tokenize(prompt), dtype=np.int32)
            self._check_length(len(ids))
            self._check_size(prompt, ids)
        except RowError as error:
            return Refusal(error.reason, str(error))
        return ids

    def _check_length(self, num_tokens: int) -> None:
        """Every response may have rollout.max_tokens: one that the engine cuts off earlier is no fair sample."""
        limit, response = self._config.model.max_model_len, self._config.rollout.max_tokens
        if num_tokens + response > limit:
            raise RowError(
                BadRow.TOO_LONG,
                f"its prompt has {num_tokens} tokens, and with rollout.max_tokens={response} it needs "
                f"model.max_model_len={num_tokens + response}, which is {limit}",
            )

    def _check_size(self, prompt: Prompt, ids: Int32Array) -> None:
        """Whether a lease of it can be sent."""
        max_bytes = self._config.transport.max_message_mb << 20
        lease = Lease(
            lease_id=0,
            purpose=Purpose.TRAIN,
            prompt_uid=prompt.uid,
            prompt_token_ids=ids,
            reference=prompt.reference,
            row=prompt.row,
            num_samples=1,
            seed=0,
            temperature=1.0,
            max_tokens=1,
            stop=tuple(self._config.rollout.stop),
        )
        try:
            size = sum(len(frame) for frame in encode(lease))
        except WireError as error:
            raise RowError(BadRow.UNSENDABLE, f"it cannot be sent to an actor ({error})") from error
        if size > max_bytes:
            raise RowError(BadRow.UNSENDABLE, f"its {size} bytes exceed transport.max_message_mb={max_bytes >> 20}")


_work: _Work | None = None  # in a forked process: what it inherited


def _inherit(work: _Work, die_with_parent: Callable[[], None]) -> None:
    global _work
    die_with_parent()
    _work = work


def _inherited_chunk(start: int) -> list[Result]:
    assert _work is not None
    return _work.chunk(start)


def _key(config: Config, prompts: Sequence[Prompt]) -> str:
    limits = (config.model.max_model_len, config.rollout.max_tokens, config.transport.max_message_mb)
    parts = (FORMAT, importlib.metadata.version("transformers"), fingerprint(config.model), limits)
    digest = hashlib.sha256(repr((*parts, config.task.chat_template_kwargs, config.rollout.stop)).encode())
    for prompt in prompts:
        digest.update(repr(prompt).encode())
    return digest.hexdigest()


def _write(path: Path, key: str, results: Sequence[Result]) -> None:
    good = [result for result in results if not isinstance(result, Refusal)]
    refused = {i: result for i, result in enumerate(results) if isinstance(result, Refusal)}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            key=np.array(key),
            lengths=np.array([0 if isinstance(r, Refusal) else len(r) for r in results], dtype=np.int64),
            token_ids=np.concatenate(good) if good else np.empty(0, dtype=np.int32),
            refused=np.array(json.dumps(refused)),
        )
    temporary.replace(path)


def _read(path: Path, key: str) -> list[Result] | None:
    """None when there is nothing, or of another key, or damaged: it can be made again."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            lengths, refused = stored["lengths"], json.loads(str(stored["refused"]))
            results: list[Result] = list(np.split(stored["token_ids"], np.cumsum(lengths)[:-1]))
    except (BadZipFile, ValueError, LookupError, EOFError):  # cut off when the machine went down
        return None
    for index, (reason, text) in refused.items():
        results[int(index)] = Refusal(BadRow(reason), text)
    return results


def _list_dropped(path: Path, problems: Sequence[Problem]) -> None:
    lines = [json.dumps({"place": p.place, "reason": p.reason, "text": p.text}) + "\n" for p in problems]
    path.write_text("".join(lines))
