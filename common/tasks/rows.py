"""Rows that cannot be used: why, and what becomes of them (task.on_bad_row)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from common.config import ConfigError, OnBadRow

ADVICE = "mend or remove the row, or leave such rows out with task.on_bad_row=drop"


class BadRow(StrEnum):
    """Why a row cannot be used."""

    UNREADABLE = "unreadable"  # no JSON object in UTF-8
    NO_PROMPT = "no_prompt"  # its prompt is missing, blank, or neither text nor messages
    NO_ANSWER = "no_answer"  # its reference is missing, blank, not a number, or neither text nor number
    ANSWERED = "answered"  # its conversation ends with the assistant's turn
    UNSENDABLE = "unsendable"  # a column holds what a message cannot carry
    UNRENDERABLE = "unrenderable"  # the chat template or the tokenizer refuses it
    NO_TOKENS = "no_tokens"  # the tokenizer knows nothing of it
    TOO_LONG = "too_long"  # with rollout.max_tokens it exceeds model.max_model_len
    HELD_OUT = "held_out"  # a training row whose prompt is in the held-out file as well


class RowError(ValueError):
    """One row cannot be used; the message is the end of a sentence that begins with file and line."""

    def __init__(self, reason: BadRow, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A row that cannot be used. `place` is "FILE, line N"."""

    place: str
    reason: BadRow
    text: str


def settle(problems: Sequence[Problem], policy: OnBadRow, advice: str = ADVICE) -> None:
    """Returns where the rows may be dropped. Raises ConfigError for the first one where they may not."""
    if not problems or policy is OnBadRow.drop:
        return
    first, others = problems[0], len(problems) - 1
    more = f" ({others} more such row{'s' if others > 1 else ''})" if others else ""
    raise ConfigError(f"{first.place}: {first.text}{more}; {advice}.")


def counts(problems: Sequence[Problem]) -> str:
    """ "3 rows (too_long 2, no_answer 1)"."""
    by_reason = Counter(str(problem.reason) for problem in problems)
    listed = ", ".join(f"{reason} {count}" for reason, count in by_reason.most_common())
    return f"{len(problems):,} row{'s' if len(problems) > 1 else ''} ({listed})"
