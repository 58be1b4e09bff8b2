"""RUN/samples: what is written is read again, and nothing of a model's text is obeyed."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.samples import Sample, read_samples, sample_file, sampled_steps, samples_folder, to_parquet, visible
from common.types import FinishReason, Verdict

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOATS = st.floats(width=32, allow_nan=False)
# What a terminal must not be told, a browser must not be shown turned round, and a reader must not overlook.
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\x00\x7f\u202egnorw\u2069\u2028\u00a0\ufeff[bold red]x[/]"


def make_sample(
    tokens: tuple[str, ...] = ("a", "b"), step: int = 1, values: tuple[float, ...] | None = None, **fields: object
) -> Sample:
    """A right response; `values` are the advantages too."""
    length = len(tokens)
    numbers = tuple(float(i) for i in range(length)) if values is None else values
    defaults: dict[str, object] = {
        "prompt_uid": "train/3",
        "lease_id": 7,
        "actor": "actor-0",
        "index": 0,
        "prompt": "1 + 1 =",
        "reference": "2",
        "response": "".join(tokens),
        "verdict": Verdict.CORRECT,
        "reason": FinishReason.STOP,
        "reward": 1.0,
        "version": 5,
        "token_ids": tuple(range(length)),
        "versions": (4,) * length,
        "behavior_logprobs": (-0.5,) * length,
        "old_logprobs": (-0.25,) * length,
        "advantages": numbers,
        "values": numbers,
    }
    return Sample(step=step, tokens=tokens, **defaults | fields)  # type: ignore[arg-type]


def keep(run_dir: Path, *samples: Sample) -> None:
    """All of one step."""
    samples_folder(run_dir).mkdir(exist_ok=True)
    sample_file(run_dir, samples[0].step).write_bytes(to_parquet(samples))


@st.composite
def any_samples(draw: st.DrawFn) -> Sample:
    tokens = tuple(draw(st.lists(TEXTS, min_size=1, max_size=5)))
    per_token = st.tuples(*[FLOATS] * len(tokens))
    return make_sample(
        tokens,
        prompt=draw(TEXTS),
        verdict=draw(st.sampled_from(Verdict)),
        reason=draw(st.sampled_from(FinishReason)),
        reward=draw(FLOATS),
        lease_id=draw(st.integers(0, 2**62)),
        versions=draw(st.tuples(*[st.integers(0, 2**31 - 1)] * len(tokens))),
        advantages=draw(per_token | st.just(())),
        values=draw(per_token | st.just(())),
        old_logprobs=draw(per_token | st.just(())),
    )


@given(samples=st.lists(any_samples(), min_size=1, max_size=3))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    keep(run_dir, *samples)
    assert read_samples(run_dir, samples[0].step) == samples


def test_a_file_has_the_documented_columns_for_other_programs(tmp_path: Path) -> None:
    keep(tmp_path, make_sample())
    schema = pq.read_schema(sample_file(tmp_path, 1))
    lists = {"token_ids": "int32", "tokens": "string", "versions": "int32"}
    lists |= dict.fromkeys(("behavior_logprobs", "old_logprobs", "advantages", "values"), "float")
    assert {name: str(schema.field(name).type.value_type) for name in lists} == lists
    assert [str(schema.field(name).type) for name in ("step", "reward", "verdict")] == ["int64", "float", "string"]
    assert pq.ParquetFile(sample_file(tmp_path, 1)).metadata.row_group(0).column(0).compression == "ZSTD"


def test_steps_are_read_in_their_order_however_many_digits_they_have(tmp_path: Path) -> None:
    for step in (1_000_000, 20, 3):
        keep(tmp_path, make_sample(step=step))
    (samples_folder(tmp_path) / "step-000004.parquet.tmp").write_bytes(b"half")
    assert sampled_steps(tmp_path) == [3, 20, 1_000_000]
    assert [sample.step for sample in read_samples(tmp_path)] == [3, 20, 1_000_000]


def test_a_step_without_samples_is_one_sentence_that_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has those of no step"):
        read_samples(tmp_path, 4)
    for step in (2, 9):
        keep(tmp_path, make_sample(step=step))
    with pytest.raises(ValueError, match=r"no samples of step 4: .* has those of 2 steps, 2 to 9"):
        read_samples(tmp_path, 4)


@pytest.mark.parametrize("damage", [b"", b"no Parquet at all", b"PAR1" * 20])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    keep(tmp_path, make_sample())
    sample_file(tmp_path, 1).write_bytes(damage)
    with pytest.raises(ValueError, match=r"step-000001\.parquet is damaged"):
        read_samples(tmp_path)


@given(st.text())
def test_nothing_is_left_that_a_terminal_would_obey(text: str) -> None:
    assert all(c == "\n" or c.isprintable() for c in visible(text))
    assert visible(text).count("\n") == text.count("\n")
    visible(text).encode()


def test_what_is_written_out_can_be_recognised_and_the_rest_stays() -> None:
    assert visible("a \x1b[31mé漢🙂\n") == "a \\x1b[31mé漢🙂\n"
    assert not {"\x1b", "\x9b", "\u202e", "\u2069", "\ufeff", "\r"} & set(visible(HOSTILE))
