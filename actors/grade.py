"""The `grade` command: runs the mathematical verifier over a file of cases and prints its verdicts.

    python run.py grade CASES.jsonl [--answer-form exact]

Each input line is {"gold": ..., "pred": ..., "input": "answer" | "response"}; further keys stay as they are. With
"answer" (the default) `pred` is the answer itself; with "response" it is a text that contains the answer somewhere.
Each output line is the row's id, if it has one, with `equal`, `verdict` and `seconds`. When rows carry the expected
"equal", the last line is a confusion table; rows marked "contested" are left out of it.

Any spelling of the right value is equal here, unless --answer-form says otherwise: the question is whether two answers
are the same, not whether one may be copied from the task.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from actors.verifier.math import answers_equal, verify_anywhere
from actors.verifier.pool import VerifierPool
from common.config import Config, ConfigError
from common.types import AnswerForm, Verdict


def grade_row(response: str, reference: str, row: dict[str, Any], answer_form: AnswerForm = AnswerForm.ANY) -> Verdict:
    """The verifier function of this command: `row["input"]` says what the response is."""
    if row["input"] == "response":
        return verify_anywhere(response, reference, row, answer_form)
    return Verdict.CORRECT if answers_equal(response, reference, answer_form) else Verdict.WRONG


def main(path: str, config: Config) -> int:
    """Grades the cases of one file; returns the exit code. Raises ConfigError for a file or row it cannot read."""
    rows = read_cases(Path(path))
    asyncio.run(_grade(rows, config))
    return 0


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The rows of a case file. Raises ConfigError with the line number."""
    if not path.is_file():
        raise ConfigError(f"grade: {path} is not a file; give a .jsonl file of cases.")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # texts may hold other ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # or no UTF-8
            raise ConfigError(
                f"grade: line {number} of {path} is not JSON ({error}); write one object a line."
            ) from None
        _check_row(row, f"line {number} of {path}")
        rows.append(row)
    return rows


def _check_row(row: object, where: str) -> None:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("gold", "pred")):
        raise ConfigError(f'grade: {where} needs the texts "gold" and "pred".')
    if row.setdefault("input", "answer") not in ("answer", "response"):
        raise ConfigError(f'grade: {where} has "input": {row["input"]!r}; it must be "answer" or "response".')


async def _grade(rows: list[dict[str, Any]], config: Config) -> None:
    settings = config.verifier
    table: Counter[tuple[bool, bool]] = Counter()
    limit = asyncio.Semaphore(settings.num_workers)  # so that `seconds` holds no queueing
    async with VerifierPool(
        "actors.grade:grade_row",
        settings.num_workers,
        settings.timeout_s,
        settings.memory_mb,
        answer_form=settings.answer_form,
    ) as pool:

        async def one(row: dict[str, Any]) -> tuple[Verdict, float]:
            async with limit:
                started_s = time.perf_counter()
                verdict = await pool.verify(row["pred"], row["gold"], {"input": row["input"]})
                return verdict, time.perf_counter() - started_s

        tasks = [asyncio.create_task(one(row)) for row in rows]
        for row, task in zip(rows, tasks, strict=True):
            verdict, seconds = await task
            is_equal = verdict is Verdict.CORRECT
            identity = {"id": row["id"]} if "id" in row else {}
            print(json.dumps({**identity, "equal": is_equal, "verdict": verdict, "seconds": round(seconds, 6)}))
            if isinstance(row.get("equal"), bool) and not row.get("contested"):
                table[row["equal"], is_equal] += 1
    if table:
        print(confusion_table(table))
    sys.stdout.flush()


def confusion_table(table: Counter[tuple[bool, bool]]) -> str:
    """Counts by (expected, judged) with their meaning."""
    return "\n".join(
        [
            "                judged equal   judged different",
            f"equal           {table[True, True]:>12}   {table[True, False]:>16}",
            f"different       {table[False, True]:>12}   {table[False, False]:>16}",
        ]
    )
