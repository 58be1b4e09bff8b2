"""file: prompts with reference answers from a JSONL or Parquet file of the user's own.

One row is one prompt: a column with its text or a list of chat messages, and one with the reference answer
(common/tasks/columns.py). The other columns travel with the prompt as its `row`. A row that cannot be used is
a Problem; what cannot be used as a whole is a ConfigError.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError
from common.tasks.columns import Columns, Row, choose_columns, kind_of, reference_of, value_at
from common.tasks.rows import BadRow, Problem, RowError
from common.types import JSON, Prompt
from common.wire import MAX_JSON_DEPTH

VERIFIER = "actors.verifier.math:verify"
_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """What a file holds, in order. The uid of a prompt is `uid_prefix:line`."""

    path: Path
    uid_prefix: str
    columns: Columns
    num_rows: int
    prompts: tuple[Prompt, ...]
    problems: tuple[Problem, ...]


def read_file(path: Path, uid_prefix: str, prompt_field: str | None, answer_field: str | None) -> DataFile:
    """All rows of `path`. Raises ConfigError for a file that cannot be read or whose columns are not clear."""
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a task file must end in .jsonl or .parquet, not '{path.suffix}'.")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; correct task.train_file or task.heldout_file.")
    rows = list(_jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path))
    if not rows:
        raise ConfigError(f"{path}: the file is empty; it needs at least one prompt with its answer.")
    readable = [row for _, row in rows if not isinstance(row, RowError)]
    if not readable:
        raise ConfigError(f"{path}, line {rows[0][0]}: {rows[0][1]}.")
    columns = choose_columns(readable, path, prompt_field, answer_field)
    prompts, problems = [], []
    for line, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            prompts.append(_prompt_from_row(row, f"{uid_prefix}:{line}", columns))
        except RowError as error:
            problems.append(Problem(place=place(path, line), reason=error.reason, text=str(error)))
    return DataFile(
        path=path,
        uid_prefix=uid_prefix,
        columns=columns,
        num_rows=len(rows),
        prompts=tuple(prompts),
        problems=tuple(problems),
    )


def place(path: Path, line: int | str) -> str:
    return f"{path}, line {line}"


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield line, _parsed(raw)


def _parsed(raw: bytes) -> Row | RowError:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, thousands of digits
        return RowError(BadRow.UNREADABLE, f"not valid JSON in UTF-8 ({error})")
    if not isinstance(row, dict):
        return RowError(BadRow.UNREADABLE, f"a row must be a JSON object, not {kind_of(row)}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{path}: not a readable Parquet file ({reason}).") from error
    yield from enumerate(rows, start=1)


def _prompt_from_row(row: Row, uid: str, columns: Columns) -> Prompt:
    """Raises RowError."""
    prompt = _cell(row, columns.prompt, BadRow.NO_PROMPT)
    answer = _cell(row, columns.answer, BadRow.NO_ANSWER)
    reference = reference_of(answer, columns)
    others = {name: value for name, value in row.items() if name != columns.prompt}
    if isinstance(answer, int) and not _has_64_bits(answer):
        others = _replaced(others, columns.answer, str(answer))  # the reference is a text anyway
    is_text = isinstance(prompt, str) and bool(prompt.strip())
    messages = None if is_text else _messages(prompt, columns.prompt)
    _check_sendable(prompt if messages is None else list(messages), f"column '{columns.prompt}'", MAX_JSON_DEPTH)
    for name, value in others.items():
        _check_sendable(name, "the name of a column", 0)
        _check_sendable(value, f"column '{name}'", MAX_JSON_DEPTH)
    return Prompt(uid=uid, text=prompt if is_text else "", reference=reference, messages=messages, row=others)


def _cell(row: Row, name: str, reason: BadRow) -> JSON:
    try:
        return value_at(row, name)
    except KeyError:
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise RowError(reason, f"column '{name}' is missing (there is: {columns})") from None


def _messages(value: JSON, name: str) -> tuple[dict[str, str], ...]:
    is_chat = isinstance(value, list) and len(value) > 0
    if not is_chat or not all(_is_message(message) for message in value):
        raise RowError(
            BadRow.NO_PROMPT,
            f"column '{name}' must be a text that is not blank or a list of messages with the strings role and "
            f"content, not {kind_of(value)}",
        )
    if not any(message["content"].strip() for message in value):
        raise RowError(BadRow.NO_PROMPT, f"the conversation in column '{name}' is blank")
    if value[-1]["role"] == "assistant":
        raise RowError(
            BadRow.ANSWERED,
            f"the conversation in column '{name}' ends with the assistant's turn, but a prompt must end before it",
        )
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _is_message(value: JSON) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _replaced(row: Row, name: str, text: str) -> Row:
    """A copy of `row` with `text` in column `name`, which may be a dotted path."""
    if name in row or "." not in name:
        return row | {name: text}
    first, _, rest = name.partition(".")
    return row | {first: _replaced(row[first], rest, text)}


def _check_sendable(value: JSON, where: str, depth: int) -> None:
    """Raises RowError when `value` could not travel with the prompt, as common/wire.py has it: JSON, nothing else."""
    if isinstance(value, dict | list) and depth == 0:
        raise RowError(BadRow.UNSENDABLE, f"{where} is nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RowError(BadRow.UNSENDABLE, f"{where} has the key {key!r}, which is no text")
            _check_sendable(key, f"a name in {where}", 0)
            _check_sendable(item, where, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_sendable(item, where, depth - 1)
    elif (problem := _unsendable(value)) is not None:
        raise RowError(BadRow.UNSENDABLE, f"{where} holds {problem}")


def _unsendable(value: JSON) -> str | None:
    """What is wrong with a plain value, and what to do."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        digits = len(str(abs(value)))
        return None if _has_64_bits(value) else f"an integer of {digits} digits, over 64 bits; write it as text"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value}, which is not JSON; write null"
    if isinstance(value, str):
        return None if _is_unicode(value) else "half a surrogate pair, which is no Unicode text"
    return f"{kind_of(value)}; drop it or turn it into text"


def _has_64_bits(value: int) -> bool:
    return -(1 << 63) <= value < 1 << 63


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
