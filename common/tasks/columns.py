"""Which columns of a data file are the prompt and its reference answer, and how a cell becomes a reference.

task.prompt_field and task.answer_field name them. Where one of them is not set, it is recognised by name:

    prompt      prompt (text or chat messages), question (GSM8K), problem (MATH) or messages
    reference   answer, reward_model.ground_truth (DAPO-Math-17k and others of that layout), ground_truth or
                final_answer; without these, solution (MATH)

An `answer` that shows its work and then "#### 42" (GSM8K) stands for 42, a `solution` for what its last \\boxed{}
holds. A named column is taken as it stands. Two candidates are refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from common.config import ConfigError
from common.tasks.rows import BadRow, RowError
from common.types import JSON

Row = dict[str, JSON]

PROMPTS = ("prompt", "question", "problem", "messages")
ANSWERS = ("answer", "reward_model.ground_truth", "ground_truth", "final_answer")
WORKED_ANSWER = "solution"
HASHES = "####"
LOOKED_AT = 1000  # rows that decide


class Part(StrEnum):
    """The part of an answer's text that is the reference; the value ends the sentence on the console."""

    ALL = ""
    AFTER_HASHES = f" after its last {HASHES}"
    BOXED = " in its last \\boxed{}"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names may be dotted paths into nested columns."""

    prompt: str
    answer: str
    part: Part

    def __str__(self) -> str:
        return f"prompt = column '{self.prompt}', reference = column '{self.answer}'{self.part}"


def choose_columns(rows: Sequence[Row], path: Path, prompt_field: str | None, answer_field: str | None) -> Columns:
    """The columns of a file from its first rows. Raises ConfigError when none or several can be meant."""
    seen = rows[:LOOKED_AT]
    prompt = _only(PROMPTS if prompt_field is None else (prompt_field,), seen, path, "prompt")
    if answer_field is not None:
        return Columns(prompt=prompt, answer=_only((answer_field,), seen, path, "answer"), part=Part.ALL)
    if not any(_has(row, name) for row in seen for name in ANSWERS) and any(_has(row, WORKED_ANSWER) for row in seen):
        is_boxed = _is_usual(seen, WORKED_ANSWER, "\\boxed")
        return Columns(prompt=prompt, answer=WORKED_ANSWER, part=Part.BOXED if is_boxed else Part.ALL)
    answer = _only(ANSWERS, seen, path, "answer")
    shows_work = answer == "answer" and _is_usual(seen, answer, HASHES)
    return Columns(prompt=prompt, answer=answer, part=Part.AFTER_HASHES if shows_work else Part.ALL)


def value_at(row: Row, name: str) -> JSON:
    """The cell of column `name`, or of a dotted path into nested columns. Raises KeyError."""
    if name in row:
        return row[name]
    value: JSON = row
    for part in name.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[part]
    return value


def reference_of(value: JSON, columns: Columns) -> str:
    """The reference answer in a cell: its text, or the part of it that `columns` names. Raises RowError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (isinstance(value, str) or is_number):
        raise RowError(BadRow.NO_ANSWER, f"column '{columns.answer}' must be a text or a number, not {kind_of(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(BadRow.NO_ANSWER, f"column '{columns.answer}' is {value}, which is no answer")
    text = _part_of(str(value), columns.part)
    if text is None:
        raise RowError(BadRow.NO_ANSWER, f"column '{columns.answer}' has no answer{columns.part}")
    if not text.strip():
        raise RowError(BadRow.NO_ANSWER, f"column '{columns.answer}' is blank{columns.part}")
    return text


def kind_of(value: JSON) -> str:
    """A few words for what stands in the place of a text."""
    if value is None:
        return "nothing"
    if value == "":
        return "an empty string"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _only(candidates: Sequence[str], rows: Sequence[Row], path: Path, what: str) -> str:
    found = [name for name in candidates if any(_has(row, name) for row in rows)]
    found = found or [name for name in candidates if any(name in row for row in rows)]  # but nothing in it
    if len(found) == 1:
        return found[0]
    columns = ", ".join(sorted({str(name) for row in rows for name in row})) or "none"
    if found:
        names = " and ".join(f"'{name}'" for name in found)
        raise ConfigError(f"{path}: the columns {names} can each be the {what}; say which with task.{what}_field.")
    raise ConfigError(
        f"{path}: column '{candidates[0]}' is missing (there is: {columns}); name the column of the {what} with "
        f"task.{what}_field."
    )


def _is_usual(rows: Sequence[Row], name: str, mark: str) -> bool:
    """Whether half of the cells that hold anything have `mark`: a single one that has it says nothing of the others."""
    cells = [str(row[name]) for row in rows if _has(row, name)]
    return 2 * sum(mark in cell for cell in cells) >= len(cells)


def _has(row: Row, name: str) -> bool:
    try:
        return value_at(row, name) is not None
    except KeyError:
        return False


def _part_of(text: str, part: Part) -> str | None:
    """None when the text has no such part."""
    match part:
        case Part.ALL:
            return text
        case Part.AFTER_HASHES:
            _, hashes, answer = text.rpartition(HASHES)
            return answer.strip() if hashes else None
        case Part.BOXED:
            return _boxed(text)


def _boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces balanced; None when it has none or is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        is_escaped = text[end - 1] == "\\"
        if text[end] in "{}" and not is_escaped:
            depth += 1 if text[end] == "{" else -1
        if depth == 0:
            return text[start:end].strip()
    return None
