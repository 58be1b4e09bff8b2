"""Samples of a run: responses as text, with what training made of each of their tokens.

    RUN/samples/step-000012.parquet    one row a response of the groups that were chosen at step 12 (learner/samples.py)

The columns are the fields of `Sample`. Texts are a model's and names an actor's: whoever prints them, does it with
`visible`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from common.types import JSON, FinishReason, Verdict

if TYPE_CHECKING:  # imported where it is used: a quarter of a second that commands without samples should not pay
    import pyarrow as pa

_NAME = re.compile(r"step-(\d{6,})\.parquet")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response of a trained batch. L is its number of tokens; what was not computed is empty, not L long."""

    step: int  # counted from 1, warm-up included
    prompt_uid: str
    lease_id: int  # the same for all responses of a group
    actor: str  # who sampled the group
    index: int  # in its group
    prompt: str
    reference: str  # what the verifier compared with
    response: str  # special tokens included
    verdict: Verdict
    reason: FinishReason
    reward: float
    version: int  # the learner's when it trained on it
    token_ids: tuple[int, ...]  # [L]
    tokens: tuple[str, ...]  # [L], texts that make up `response`; a character counts with the last of its tokens
    versions: tuple[int, ...]  # [L], policy version that drew each token
    behavior_logprobs: tuple[float, ...]  # [L], nats, recorded when it was drawn
    old_logprobs: tuple[float, ...]  # [L], nats, the learner's before the step; empty in warm-up after the first step
    advantages: tuple[float, ...]  # [L]; empty in warm-up
    values: tuple[float, ...]  # [L], the critic's before the step; empty without a critic

    @property
    def is_right(self) -> bool:
        return self.verdict is Verdict.CORRECT

    @property
    def staleness(self) -> int:
        """Versions between its oldest token and the training on it."""
        return self.version - min(self.versions)


def samples_folder(run_dir: Path) -> Path:
    return run_dir / "samples"


def sample_file(run_dir: Path, step: int) -> Path:
    return samples_folder(run_dir) / f"step-{step:06d}.parquet"


def sampled_steps(run_dir: Path) -> list[int]:
    """The steps that have samples, in order."""
    names = (path.name for path in samples_folder(run_dir).glob("step-*.parquet"))
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def read_samples(run_dir: Path, step: int | None = None) -> list[Sample]:
    """The samples of `step`, or of all steps in order (of a long run, gigabytes); responses of a group together.

    Raises ValueError when `step` has none, or a file is damaged.
    """
    steps = sampled_steps(run_dir)
    if step is not None and step not in steps:
        there = f"of {len(steps)} steps, {steps[0]} to {steps[-1]}" if steps else "of no step"
        raise ValueError(f"{run_dir} has no samples of step {step}: {samples_folder(run_dir)} has those {there}")
    return [sample for number in (steps if step is None else [step]) for sample in _read(sample_file(run_dir, number))]


def to_parquet(samples: Sequence[Sample]) -> bytes:
    """A file of these samples, compressed with zstd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}
    sink = BytesIO()
    pq.write_table(pa.table(columns, schema=_schema()), sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def visible(text: str) -> str:
    """`text` with everything that a terminal or a browser might obey or hide written out, as \\x1b or \\u202e.

    Line ends stay. That covers control characters, marks that turn the direction of writing, and odd spaces.
    """
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _read(path: Path) -> list[Sample]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, columns=[field.name for field in fields(Sample)]).to_pylist()
        return [_sample(row) for row in rows]
    except FileNotFoundError:  # thinned out meanwhile
        raise
    except (pa.ArrowException, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged, or of another version of the program: delete it") from error


def _sample(row: dict[str, JSON]) -> Sample:
    values: dict[str, JSON] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Sample(**values | {"verdict": Verdict(row["verdict"]), "reason": FinishReason(row["reason"])})


def _schema() -> "pa.Schema":
    import pyarrow as pa

    elements = {int: pa.int32(), float: pa.float32(), str: pa.string()}
    single: dict[object, pa.DataType] = {int: pa.int64(), float: pa.float32()}
    columns = []
    for field in fields(Sample):
        inside = get_args(field.type)
        columns.append((field.name, pa.list_(elements[inside[0]]) if inside else single.get(field.type, pa.string())))
    return pa.schema(columns)
