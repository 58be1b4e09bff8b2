"""file: prompts with reference answers from a JSONL or Parquet file of the user's own.

One row is one prompt: `prompt_field` holds its text or a list of chat messages, `answer_field` the
reference answer (a string or a number; `reward_model.ground_truth` reaches into a nested column). The other
columns travel with the prompt as its `row`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from common.config import ConfigError
from common.types import JSON, Prompt

VERIFIER = "actors.verifier.math:verify"
_SUFFIXES = (".jsonl", ".parquet")


def read_prompts(path: Path, uid_prefix: str, prompt_field: str, answer_field: str) -> tuple[Prompt, ...]:
    """All rows of `path` in order. Raises ConfigError naming file and line for a row that cannot be used.

    A row's uid is `uid_prefix/file name:line`.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a task file must end in .jsonl or .parquet, not '{path.suffix}'.")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; correct task.train_file or task.heldout_file.")
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    prompts = []
    for line, row in rows:
        uid = f"{uid_prefix}/{path.name}:{line}"
        prompts.append(_prompt_from_row(row, uid, f"{path}, line {line}", prompt_field, answer_field))
    if not prompts:
        raise ConfigError(f"{path}: the file is empty; it needs at least one prompt with its answer.")
    return tuple(prompts)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, JSON]]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig"))
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise ConfigError(f"{path}, line {line}: not valid JSON in UTF-8 ({error}).") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {line}: a row must be a JSON object, not {_kind(row)}.")
            yield line, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, JSON]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{path}: not a readable Parquet file ({reason}).") from error
    yield from enumerate(rows, start=1)


def _prompt_from_row(row: dict[str, JSON], uid: str, where: str, prompt_field: str, answer_field: str) -> Prompt:
    prompt = _column(row, prompt_field, "task.prompt_field", where)
    reference = _reference(_column(row, answer_field, "task.answer_field", where), answer_field, where)
    others = {name: value for name, value in row.items() if name != prompt_field}
    for name, value in others.items():
        _check_json(value, name, where)
    if isinstance(prompt, str) and prompt:
        return Prompt(uid=uid, text=prompt, reference=reference, row=others)
    messages = _messages(prompt, prompt_field, where)
    return Prompt(uid=uid, text="", reference=reference, messages=messages, row=others)


def _column(row: dict[str, JSON], name: str, setting: str, where: str) -> JSON:
    """The value of column `name`, which may be a dotted path into nested columns."""
    if name in row:
        return row[name]
    value: JSON = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            columns = ", ".join(sorted(map(str, row))) or "none"
            raise ConfigError(f"{where}: column '{name}' is missing (there is: {columns}); set {setting}.")
        value = value[part]
    return value


def _reference(value: JSON, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise ConfigError(f"{where}: column '{name}' must be a non-empty string or a number, not {_kind(value)}.")
    return str(value)


def _messages(value: JSON, name: str, where: str) -> tuple[dict[str, str], ...]:
    is_chat = isinstance(value, list) and len(value) > 0
    if not is_chat or not all(_is_message(message) for message in value):
        raise ConfigError(
            f"{where}: column '{name}' must be a non-empty string or a list of messages with the strings "
            f"role and content, not {_kind(value)}."
        )
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _is_message(value: JSON) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _check_json(value: JSON, name: str, where: str) -> None:
    """Raises ConfigError when `value` could not travel with the prompt (Parquet has dates and bytes)."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(item, f"{name}.{key}", where)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, name, where)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ConfigError(f"{where}: column '{name}' holds {_kind(value)}; drop it or turn it into text.")


def _kind(value: JSON) -> str:
    if value is None:
        return "nothing"
    if value == "":
        return "an empty string"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
