"""What a run writes down: metrics.jsonl, ledger.jsonl, TensorBoard events and one console line per step.

    metrics.jsonl   {"step": 12, "time": 1.7e9, "reward/mean": 0.41, ...}, a line per `RunLog.log`, flushed
    ledger.jsonl    one line per trained group: who sampled it, from which versions, what it earned, how long it took
    events.jsonl    {"step": 12, "time": 1.7e9, "kind": "alarm", "text": "...", ...}, what the console was told

Values are floats; a mapping (staleness/hist: version gap -> tokens) is a histogram. What the summary
reads, and how it reduces it over a run:

    version, tokens/generated, tokens/trained,
    drops/REASON, verdicts/VERDICT                              counts since the run began: the last value, as of
    dropped_tokens/REASON, tokens/prefix                        which the summary shows none
    time/step_s                                                 wall time since the last step's line: the sum
    throughput/*_per_s, actors/idle_fraction,
    learner/idle_fraction                                       mean weighted by time/step_s
    staleness/token_mean, staleness/token_max, staleness/hist   mean, maximum, sum
    accuracy/heldout of accuracy/version, with its interval
    (accuracy/heldout_low, _high), accuracy/version_newest
    and eval/num_*                                              one point per line that has both, in order
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeGuard

from common.trackers import Trackers
from common.types import JSON, TrajectoryGroup

Value = float | Mapping[int, float]

# name in metrics, label on the console, format: what one progress line shows, in this order
CONSOLE = (
    ("accuracy/heldout", "accuracy", ".3f"),
    ("accuracy/version", "of version", ".0f"),
    ("accuracy/heldout_low", "from", ".3f"),
    ("accuracy/heldout_high", "to", ".3f"),
    ("eval/num_prompts", "of", ".0f"),
    ("reward/mean", "reward", "+z.2f"),
    ("length/mean", "length", ".0f"),
    ("staleness/token_mean", "stale", ".2f"),
    ("staleness/token_max", "max", ".0f"),
    ("critic/explained_variance", "ev", "+z.2f"),
    ("policy/entropy", "entropy", ".2f"),
    ("offpolicy/ess", "ess", ".2f"),
    ("throughput/generated_tokens_per_s", "gen/s", ",.0f"),
    ("throughput/trained_tokens_per_s", "train/s", ",.0f"),
    ("actors/idle_fraction", "idle actors", "z.0%"),
    ("learner/idle_fraction", "learner", "z.0%"),
    ("time/step_s", "s", ".1f"),
)
# The same for what ought to be 0, and is shown when it is not.
CONSOLE_ALARMS = (
    ("accuracy/publications", "publications during the evaluation", ".0f"),
    ("eval/num_failed", "PROMPTS FAILED", ".0f"),
    ("eval/num_errors", "VERIFIER ERRORS IN EVALUATION", ".0f"),
    ("verifier/num_errors", "VERIFIER ERRORS", ".0f"),
    ("verifier/num_timed_out", "timed out", ".0f"),
    ("offpolicy/mismatch_alarm", "MISMATCH", ".0f"),
)

_PROGRESS = re.compile(r"(critic warm-up|step|done|replayed) +\d+/\d+  ")  # the stages


class RunLog:
    """The metrics and the ledger of one run, open for appending. The one writer is the learner's rank 0.

    Args:
        run_dir: made when absent.
        keep_through: the last step that counts, 0 without a checkpoint; lines of later steps are removed because
            those steps are about to be done again. None: append.
        trackers: who else is told of the metrics.
    """

    def __init__(self, run_dir: str | Path, keep_through: int | None = None, trackers: Trackers | None = None) -> None:
        self._trackers = trackers
        self._dir = Path(run_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        if keep_through is not None:
            for name in ("metrics.jsonl", "ledger.jsonl", "events.jsonl"):
                _drop_after(self._dir / name, keep_through)
        self._metrics = (self._dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._ledger = (self._dir / "ledger.jsonl").open("a", encoding="utf-8")
        self._events = (self._dir / "events.jsonl").open("a", encoding="utf-8")
        self._tensorboard = _TensorBoard(self._dir / "tensorboard", keep_through)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensorboard.close()
        self._events.close()
        self._ledger.close()
        self._metrics.close()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line; what is not finite is written as null. `step` counts from the start of the run."""
        now = time.time()
        if self._trackers is not None:
            values = {**values, **self._trackers.counts()}
            self._trackers.log(step, now, values)
        line = {"step": step, "time": round(now, 3)}
        _write_line(self._metrics, line | {name: _jsonable(value) for name, value in values.items()})
        self._tensorboard.write(step, now, values)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Show a text in TensorBoard alone. Any thread may call it."""
        self._tensorboard.write_text(step, time.time(), name, markdown)

    def ledger(self, group: TrajectoryGroup, step: int) -> None:
        """Append the line of one group that was trained at `step`."""
        completed = group.completed
        line = {
            "step": step,
            "prompt_uid": group.lease.prompt_uid,
            "lease_id": group.lease.lease_id,
            "actor": group.actor,
            "versions": [group.oldest_version, group.newest_version],
            "rewards": completed.rewards.tolist(),
            "lengths": completed.lengths.tolist(),
            "generation_s": round(completed.generation_s, 6),
            "verification_s": round(completed.verification_s, 6),
        }
        _write_line(self._ledger, line)

    def event(self, step: int, kind: str, text: str, **more: str | float) -> None:
        """Append one line, and print `text`, which is one line too. `step` is the one after which it happened."""
        line = {"step": step, "time": round(time.time(), 3), "kind": kind}
        fields = {name: value if isinstance(value, str) else _jsonable(value) for name, value in more.items()}
        _write_line(self._events, line | fields | {"text": text})
        print(text, flush=True)

    def progress(self, step: int, num_steps: int, values: Mapping[str, Value], stage: str = "step") -> None:
        """Print the console line of one step: the names of CONSOLE that `values` has, and alarms."""
        print(format_progress(step, num_steps, values, stage), flush=True)


def format_progress(step: int, num_steps: int, values: Mapping[str, Value], stage: str = "step") -> str:
    """ "step  7/30  reward +0.41  length 61 ...", from the allow-lists CONSOLE and CONSOLE_ALARMS."""
    width = len(str(num_steps))
    parts = [f"{stage} {step:>{width}}/{num_steps}"]
    for name, label, spec in (*CONSOLE, *(alarm for alarm in CONSOLE_ALARMS if values.get(alarm[0]))):
        value = values.get(name)
        if isinstance(value, int | float):
            parts.append(f"{value:{spec}} {label}" if label == "s" else f"{label} {value:{spec}}")
    return "  ".join(parts)


def is_progress(line: str) -> bool:
    """Whether it is one of format_progress."""
    return _PROGRESS.match(line) is not None


def read_jsonl(path: Path) -> Iterator[dict[str, JSON]]:
    """The rows of `path`. A last line without its newline was cut off by a crash and is left out.

    Raises:
        ValueError: any other line that is not a JSON object in UTF-8, named by its number.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:  # and numbers of thousands of digits, and endless nesting
                raise ValueError(f"{path} line {number} is not JSON: {error}; remove the line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is not a JSON object: remove the line")
            yield row


def is_evaluated(run_dir: Path, version: int) -> bool:
    """Whether the held-out accuracy of this version is logged."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.is_file() and any(row.get("accuracy/version") == version for row in read_jsonl(metrics))


def is_step(value: JSON) -> TypeGuard[int]:
    """Whether a row that has it as its step is one that a run has written."""
    return isinstance(value, int) and not isinstance(value, bool)


def _write_line(file: IO[str], row: Mapping[str, JSON]) -> None:
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def _jsonable(value: Value) -> JSON:
    if isinstance(value, Mapping):
        return {str(key): float(count) for key, count in sorted(value.items())}
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _drop_after(path: Path, keep_through: int) -> None:
    """Rewrite `path` without the rows of later steps, and of none, atomically."""
    if not path.exists():
        return
    kept = [row for row in read_jsonl(path) if is_step(row.get("step")) and row["step"] <= keep_through]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in kept:
            _write_line(file, row)
    temporary.replace(path)


class _TensorBoard:
    """Event files written with tensorboard's own writer, which needs neither torch nor TensorFlow."""

    def __init__(self, log_dir: Path, keep_through: int | None) -> None:
        # Imported here: a quarter of a second that only the process with the log should pay.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        self._histogram: Any = summary_pb2.HistogramProto
        log_dir.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(log_dir), flush_secs=5)
        if keep_through is not None:  # makes TensorBoard forget the steps that will be done again
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=keep_through + 1, session_log=start))

    def write(self, step: int, now: float, values: Mapping[str, Value]) -> None:
        entries = [
            self._summary.Value(tag=name, histo=self._to_histogram(value))
            if isinstance(value, Mapping)
            else self._summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
        ]
        self._writer.add_event(self._event(wall_time=now, step=step, summary=self._summary(value=entries)))

    def write_text(self, step: int, now: float, name: str, markdown: str) -> None:
        """What its text plugin shows: a tensor of one string."""
        value = self._summary.Value(
            tag=name,
            metadata={"plugin_data": {"plugin_name": "text"}},
            tensor={
                "dtype": "DT_STRING",
                "tensor_shape": {"dim": [{"size": 1}]},
                "string_val": [markdown.encode(errors="replace")],
            },
        )
        self._writer.add_event(self._event(wall_time=now, step=step, summary=self._summary(value=[value])))

    def close(self) -> None:
        self._writer.close()

    def _to_histogram(self, counts: Mapping[int, float]) -> Any:
        """One bucket of width 1 per key, centred on it."""
        keys = sorted(counts)
        total = sum(counts.values())
        return self._histogram(
            min=keys[0] if keys else 0,
            max=keys[-1] if keys else 0,
            num=total,
            sum=sum(key * counts[key] for key in keys),
            sum_squares=sum(key * key * counts[key] for key in keys),
            bucket_limit=[key + 0.5 for key in keys],
            bucket=[counts[key] for key in keys],
        )
