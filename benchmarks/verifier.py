r"""Measures the verifier: right and wrong verdicts beside Math-Verify's, and speed with and without hanging answers.

    python benchmarks/verifier.py --cases CASES.jsonl [--math-verify PYTHON] [--json OUT.json]

`--math-verify` is the Python of an environment with `pip install math-verify==0.8.0`; it grades the same cases in a
process of its own. Without it that column is left out. CASES.jsonl is in the format of the `grade` command.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.grade import grade_row
from actors.verifier import math as mathematical
from actors.verifier.extract import Extraction, extract
from actors.verifier.math import verify, warm_up  # noqa: F401  (the pool warms up the verifier named below)
from actors.verifier.pool import VerifierPool
from common.types import Verdict

MATH_VERIFY = r"""
import json, logging, sys
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
for line in sys.stdin:
    row = json.loads(line)
    try:
        gold = row["gold"] if "\\boxed" in row["gold"] or row.get("gold_input") == "response" else f"${row['gold']}$"
        pred = row["pred"] if row["input"] == "response" or "\\boxed" in row["pred"] else f"${row['pred']}$"
        print(int(bool(verify(parse(gold), parse(pred)))), flush=True)
    except Exception:
        print(0, flush=True)
"""

INTERRUPTIBLE = (*mathematical.INTERRUPTIBLE, __name__)
HANG, SLEEP = "hang", "sleep"
# Undefined for all real x, so sympy tries to prove them equal, for minutes.
SIMPLIFY = (r"\boxed{\arcsin(x^2+2)+(\sin x+\cos x)^{40}}", r"\arcsin(x^2+2)+(\sin x-\cos x)^{40}")
OFFERED_PER_S = {"integers": 2000.0, "mixed, 70% integers": 1000.0, "symbolic": 500.0, "labelled cases": 1000.0}
IN_FLIGHT = 512  # answers that wait for their verdicts; those that hang are among them for the whole limit


def symbolic_pair(generator: random.Random) -> tuple[str, str]:
    """Two spellings of one answer, drawn with its numbers: answers to different questions are seldom the same."""
    a, b, c = generator.sample(range(2, 98), 3)
    return generator.choice(
        [
            (rf"\frac{{{b}\sqrt{{{a}}}}}{{{a}}}", rf"\frac{{{b}}}{{\sqrt{{{a}}}}}"),
            (f"x^2+{2 * a}x+{a * a}", f"(x+{a})^2"),
            (rf"\frac{{{a}\pi}}{{{b}}}", f"{a}pi/{b}"),
            (rf"({a}, \frac{{{b}}}{{8}})", f"({a}, {b / 8})"),
            (rf"[-{a},-\frac{{{b}}}{{2}})\cup({c},\infty)", rf"[-{a},-{b / 2})\cup({c},\infty)"),
            (rf"{a}\tan^2 y + {a}", rf"{a}\sec^2(y)"),
            (f"{a}x+{b}y-{c}=0", rf"y=-\frac{{{a}}}{{{b}}}x+\frac{{{c}}}{{{b}}}"),
            (
                rf"\begin{{pmatrix}}{a}&{b}\\{c}&1\end{{pmatrix}}",
                rf"\begin{{bmatrix}}{a} & {b}\\{c} & 1\end{{bmatrix}}",
            ),
            (rf"{a} \pm \sqrt{{{b}}}", rf"{a}+\sqrt{{{b}}}, {a}-\sqrt{{{b}}}"),
            (rf"\sqrt{{{a}}}+\sqrt{{{b}}}", rf"\sqrt{{{a + b}+2\sqrt{{{a * b}}}}}"),
            (f"{a}x^{{n-{b}}}", rf"\frac{{{a}x^n}}{{x^{{{b}}}}}"),
            (rf"\log_{{{a}}} {b}", rf"\frac{{\ln {b}}}{{\ln {a}}}"),
        ]
    )


def integer_pair(generator: random.Random) -> tuple[str, str]:
    answer = str(generator.randrange(1000))
    return answer, answer


def mixed_pair(generator: random.Random) -> tuple[str, str]:
    return integer_pair(generator) if generator.random() < 0.7 else symbolic_pair(generator)


def hanging_verify(response: str, reference: str, row: dict[str, Any]) -> Verdict:
    """The mathematical verifier, except that HANG computes and SLEEP sleeps for ever; runs in the pool's workers."""
    while response == HANG:
        pass
    while response == SLEEP:
        time.sleep(60)
    return verify(response, reference, row)


def reference_of(row: dict[str, Any]) -> str:
    gold: str = row["gold"]
    return (extract(gold, Extraction.ANYWHERE) or gold) if row.get("gold_input") == "response" else gold


def grade_ours(rows: list[dict[str, Any]]) -> list[bool]:
    return [grade_row(row["pred"], reference_of(row), row) is Verdict.CORRECT for row in rows]


def grade_math_verify(rows: list[dict[str, Any]], python: str) -> list[bool]:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    done = subprocess.run([python, "-c", MATH_VERIFY], input=lines, capture_output=True, text=True, timeout=1800)
    judged = [line == "1" for line in done.stdout.split()]
    if len(judged) != len(rows):
        raise RuntimeError(f"Math-Verify graded {len(judged)} of {len(rows)} cases: {done.stderr[-500:]}")
    return judged


def confusion(rows: list[dict[str, Any]], judged: list[bool]) -> dict[str, int]:
    counts = Counter((row["equal"], is_equal) for row, is_equal in zip(rows, judged, strict=True))
    return {
        "right accepted": counts[True, True],
        "wrong refused": counts[False, False],
        "wrong accepted": counts[False, True],
        "right refused": counts[True, False],
    }


def throughput_in_process(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Verdicts a second, and the median and 99th percentile in milliseconds, on one core without the pool."""
    times_ms = []
    started_s = time.perf_counter()
    for response, reference in pairs:
        before_s = time.perf_counter()
        verify(response, reference, {})
        times_ms.append(1e3 * (time.perf_counter() - before_s))
    elapsed_s = time.perf_counter() - started_s
    return {
        "per second": len(pairs) / elapsed_s,
        "median ms": statistics.median(times_ms),
        "p99 ms": statistics.quantiles(times_ms, n=100)[98],
    }


async def throughput_of_pool(
    pairs: list[tuple[str, str]], args: argparse.Namespace, offered_per_s: float = math.inf
) -> dict[str, float]:
    """Judged answers a second through the pool, from the first to the moment when the last is handed over, and the
    median time in milliseconds from handing over to verdict. Answers that hang are not counted."""
    limit = asyncio.Semaphore(IN_FLIGHT)
    times_ms: list[float] = []
    async with VerifierPool(f"{Path(__file__).stem}:hanging_verify", args.workers, args.timeout_s, 1024) as pool:
        await pool.verify(r"\boxed{\sqrt{8}+x}", r"x+2\sqrt{2}", {})  # loads what symbolic answers need
        await pool.verify(r"\boxed{\sqrt{-x^2-1}+y}", r"y+\sqrt{-(1+x^2)}", {})  # and sympy

        async def one(response: str, reference: str) -> None:
            before_s = time.perf_counter()
            if await pool.verify(response, reference, {}) is not Verdict.TIMED_OUT:
                times_ms.append(1e3 * (time.perf_counter() - before_s))
            limit.release()

        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for k, pair in enumerate(pairs):
                await limit.acquire()
                await asyncio.sleep(started_s + k / offered_per_s - time.perf_counter())
                group.create_task(one(*pair))
            elapsed_s, num_in_time = time.perf_counter() - started_s, len(times_ms)
        return {
            "per second": num_in_time / elapsed_s,
            "median ms": statistics.median(times_ms),
            "timed out": float(len(pairs) - num_in_time),
        }


def boxed(draw: Callable[[random.Random], tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` (response, reference) pairs, half of them wrong."""
    generator = random.Random(0)
    chosen = []
    for _ in range(count):
        answer, reference = draw(generator)
        chosen.append(
            (f"Some reasoning. \\boxed{{{answer}}}", reference if generator.random() < 0.5 else reference + "1")
        )
    return chosen


def labelled(rows: list[dict[str, Any]], count: int) -> list[tuple[str, str]]:
    """The labelled cases as (response, reference) pairs in random order, as often as it takes to make `count`."""
    pairs = [
        (row["pred"] if row["input"] == "response" else f"\\boxed{{{row['pred']}}}", reference_of(row)) for row in rows
    ]
    random.Random(0).shuffle(pairs)
    return (pairs * (1 + count // len(pairs)))[:count]


def with_hangs(pairs: list[tuple[str, str]], hanging: tuple[str, str]) -> list[tuple[str, str]]:
    """The same with every hundredth answer replaced by one that hangs."""
    return [hanging if k % 100 == 50 else pair for k, pair in enumerate(pairs)]


def saturated(pairs: list[tuple[str, str]], args: argparse.Namespace) -> dict[str, float]:
    """Medians over rounds in which all kinds take turns, so that a machine that slows down meets all.

    `lost` counts, over all rounds, what was timed out and did not hang.
    """
    num_hanging = len(pairs) // 100
    kinds = {"compute": (HANG, "1"), "simplify": SIMPLIFY, "sleep": (SLEEP, "1")}
    rounds = []
    for _ in range(args.rounds):
        none = asyncio.run(throughput_of_pool(pairs, args))
        one = {"per second": none["per second"], "lost": none["timed out"]}
        for kind, hanging in kinds.items():
            some = asyncio.run(throughput_of_pool(with_hangs(pairs, hanging), args))
            one[f"1% {kind}"] = some["per second"]
            one[f"{kind} ratio"] = some["per second"] / none["per second"]
            one[f"{kind} lost"] = some["timed out"] - num_hanging
        rounds.append(one)
    return {
        column: (sum if column.endswith("lost") else statistics.median)(one[column] for one in rounds)
        for column in rounds[0]
    }


def offered(pairs: list[tuple[str, str]], args: argparse.Namespace, per_s: float) -> dict[str, float]:
    """The same when no more than `per_s` answers a second are there to be judged."""
    pairs = pairs[: int(per_s * args.offered_s)]
    none = asyncio.run(throughput_of_pool(pairs, args, per_s))
    some = asyncio.run(throughput_of_pool(with_hangs(pairs, (HANG, "1")), args, per_s))
    return {
        "offered": per_s,
        "per second": none["per second"],
        "1% compute": some["per second"],
        "ratio": some["per second"] / none["per second"],
        "median ms": none["median ms"],
        "its median ms": some["median ms"],
        "lost": none["timed out"] + some["timed out"] - len(pairs) // 100,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    if args.cases:
        text = Path(args.cases).read_text(encoding="utf-8")
        rows = [row for row in map(json.loads, text.splitlines()) if not row.get("contested")]
        report["verdicts"] = {"async-vapo": confusion(rows, grade_ours(rows))}
        if args.math_verify:
            report["verdicts"]["Math-Verify"] = confusion(rows, grade_math_verify(rows, args.math_verify))
    verify(r"\boxed{\sqrt{8}+x}", r"x+2\sqrt{2}", {})
    kinds = {
        "integers": boxed(integer_pair, 2 * args.pool_answers),
        "mixed, 70% integers": boxed(mixed_pair, args.pool_answers),
        "symbolic": boxed(symbolic_pair, args.pool_answers // 2),
    }
    if args.cases:
        kinds["labelled cases"] = labelled(rows, args.pool_answers)
    report["one core, in process"] = {name: throughput_in_process(pairs) for name, pairs in kinds.items()}
    pool = f"pool of {args.workers}, limit {args.timeout_s:g} s"
    report[f"{pool}, saturated"] = {name: saturated(pairs, args) for name, pairs in kinds.items()}
    report[f"{pool}, at a rate"] = {name: offered(pairs, args, OFFERED_PER_S[name]) for name, pairs in kinds.items()}
    return report


def print_report(report: dict[str, Any]) -> None:
    for title, table in report.items():
        if not isinstance(table, dict):
            print(f"{title}: {table}")
            continue
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        print(f"\n{title:34s}" + "".join(f"{column:>16s}" for column in columns))
        for name, row in table.items():
            print(
                f"  {name:32s}" + "".join(f"{row[column]:16.6g}" if column in row else " " * 16 for column in columns)
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="labelled cases, one JSON object a line")
    parser.add_argument("--math-verify", metavar="PYTHON", help="Python of an environment with math-verify")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=3.0)
    parser.add_argument("--pool-answers", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3, help="of the pool's measurements; medians count")
    parser.add_argument("--offered-s", type=float, default=5.0, help="how long answers are offered at a rate")
    parser.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    args = parser.parse_args()
    if args.pool_answers < 4 * IN_FLIGHT:
        parser.error(f"--pool-answers {args.pool_answers} is too few to fill the pool; give {4 * IN_FLIGHT} or more")
    report = measure(args)
    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
