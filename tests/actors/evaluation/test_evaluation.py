"""`run.py eval` with a scripted engine in the place of vLLM: scores, going on, what ends it early, what it refuses.

tests/test_eval.py has the real engine.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.evaluation import main as command
from actors.evaluation import runner
from actors.evaluation.plan import Request, planned
from actors.sampling import EngineError, RequestRefused
from common.commandline import parse
from common.config import ConfigError, Placement, TransferBackend
from common.scores import estimate
from common.types import Lease
from tests.support.runs import ROOT, rows
from tests.support.scripted_engine import Script, ScriptedEngine, scripted

MODEL = str(ROOT / "configs/models/chain_sum")
NUM_PROMPTS, K = 6, 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prompts of two levels whose answers are 0 to 5."""
    problems = [{"prompt": f"1{i}a-9=", "answer": str(i), "level": i % 2, "id": i} for i in range(NUM_PROMPTS)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


Evaluate = Callable[..., int]


@pytest.fixture
def evaluate(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """The exit code of an evaluation whose engine answers by a script; settings come after `key=value`s of the task."""

    def call(script: Script | type[ScriptedEngine], *overrides: str, **changes: Any) -> int:
        engine = script if isinstance(script, type) else scripted(script)
        monkeypatch.setattr(command, "Engine", engine)
        own = (
            "verifier.function=common.tasks.chain_sum:verify",
            f"eval.samples_per_prompt={K}",
            "model.max_model_len=160",
        )
        values: dict[str, Any] = {
            "model": MODEL,
            "step": None,
            "data": str(data),
            "by": (),
            "num_prompts": None,
            "out": str(tmp_path / "out"),
            "is_json": True,
            "files": (),
        }
        return command.main(Request(**values | changes, overrides=(*own, *overrides)))

    return call


def right_by_index(lease: Lease, index: int) -> str:
    """Of prompt i the first i responses are right, but four at most; the wrong ones agree with each other."""
    number = int(lease.reference)
    return f"#{number}" if index < number else "long way #77"


def test_scores_of_everything_and_by_column(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(right_by_index, by=("level",)) == 0
    found = json.loads(capsys.readouterr().out)
    right = [0, 1, 2, 3, 4, 4]
    assert found["avg"]["value"] == pytest.approx(14 / 24)
    assert found["avg"] == vars_of(estimate(right, [K] * 6))
    assert [found["pass"][k]["value"] for k in ("1", "2", "4")] == [
        pytest.approx(14 / 24),
        pytest.approx((0 + 1 / 2 + 5 / 6 + 1 + 1 + 1) / 6),
        pytest.approx(5 / 6),
    ]
    assert found["pass"]["1"] == pytest.approx(found["avg"]), "with its interval"
    assert found["maj"]["value"] == pytest.approx((0 + 0 + 0.5 + 1 + 1 + 1) / 6), "a tie is an expectation"
    assert found["by_column"]["level"]["0"]["avg"]["value"] == pytest.approx((0 + 2 + 4) / 12)
    assert found["by_column"]["level"]["1"]["num_prompts"] == 3
    assert [(one["longest"], one["num_responses"]) for one in found["by_length"]] == [(2, 14), (12, 10)]
    assert [one["accuracy"]["value"] for one in found["by_length"]] == [1.0, 0.0]
    assert found["verdicts"] == {"correct": 14, "wrong": 10}
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written == found


def vars_of(value: Any) -> dict[str, float]:
    return {"value": value.value, "low": value.low, "high": value.high}


def test_the_table_has_every_score_with_its_interval(evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(right_by_index, by=("level",), is_json=False) == 0
    text = capsys.readouterr().out
    assert "sums.jsonl: 6 prompts x 4 responses" in text
    assert "temperature 1, at most 128 tokens, seed 0" in text
    for line in ("avg@4       0.583 [", "pass@2      0.722 [", "maj@4       0.583 [", "by level", "2 to 2 tokens"):
        assert line in text, text


def test_a_prompt_that_the_data_has_twice_is_one_observation_and_values_of_columns_are_only_shown(
    evaluate: Evaluate, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) | {"note": "\x1b[2J\n" + 99 * "x"} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(line) + "\n" for line in 2 * lines))
    assert evaluate(right_by_index, by=("note",), is_json=False) == 0
    table = capsys.readouterr().out
    assert "12 prompts (6 different ones) x 4 responses" in table
    assert f"  \\x1b[2J\\n{28 * 'x'}...     12 prompts" in table and "\x1b" not in table
    assert evaluate(right_by_index) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_prompts"] == 12
    assert found["avg"] == vars_of(estimate([0, 2, 4, 6, 8, 8], [2 * K] * 6))


def test_transcripts_have_what_was_sampled(evaluate: Evaluate, tmp_path: Path) -> None:
    assert evaluate(right_by_index, "eval.temperature=0.5", num_prompts=2) == 0
    first, *others = rows(tmp_path / "out" / "transcripts.jsonl")
    assert len(others) == 2 * K - 1
    assert first | {"prompt": ""} == {
        "prompt_uid": "heldout/sums.jsonl:1",
        "index": 0,
        "prompt": "",
        "response": "long way #77",
        "reference": "0",
        "verdict": "wrong",
        "reason": "stop",
        "reward": -1.0,
        "length": 12,
        "answer": "77",
        "vote": 1,
    }


def test_greedy_responses_are_one_a_prompt(evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(right_by_index, "eval.temperature=0") == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 1


# ---- going on


def until(number: int, script: Script, ending: Callable[[], Exception | None]) -> type[ScriptedEngine]:
    """Answers by `script`, and from prompt `number` on by `ending`, which is raised."""

    def answer(lease: Lease, index: int) -> str:
        if lease.lease_id >= number and (error := ending()) is not None:
            raise error
        return script(lease, index)

    return scripted(answer)


def test_a_second_call_samples_what_the_first_had_not_and_comes_to_the_same(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(right_by_index, out=str(tmp_path / "whole")) == 0
    whole = capsys.readouterr().out
    dies = until(3, right_by_index, lambda: EngineError("the engine died: it is gone"))
    assert evaluate(dies, "actors.groups_in_flight=1", "rollout.group_size=4") == 1
    log = tmp_path / "out" / "engine.log"
    assert capsys.readouterr().err == f"error: the engine died: it is gone (log: {log})\n"
    path = tmp_path / "out" / "transcripts.jsonl"
    done = {row["prompt_uid"] for row in rows(path)}
    assert 0 < len(done) < NUM_PROMPTS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0].replace(":1", ":6", 1), lines[0][:40]]))  # a part, and a cut line
    engine = scripted(right_by_index)
    assert evaluate(engine) == 0
    assert {lease.prompt_uid for lease in engine.leases}.isdisjoint(done)
    assert len(engine.leases) == NUM_PROMPTS - len(done)
    assert json.loads(capsys.readouterr().out) == json.loads(whole)
    assert len(rows(path)) == NUM_PROMPTS * K
    nothing = scripted(right_by_index)
    assert evaluate(nothing) == 0 and nothing.leases == [], "what is done is only shown"
    assert json.loads(capsys.readouterr().out) == json.loads(whole)


def test_ctrl_c_keeps_what_is_done(evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signals = iter([signal.SIGINT])  # one: a second would not wait for anything

    def interrupt() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    stops = until(3, right_by_index, interrupt)
    assert evaluate(stops, "actors.groups_in_flight=1", "rollout.group_size=4") == 130
    said = capsys.readouterr()
    assert said.out == "" and "prompts done: the same call goes on" in said.err
    assert len(rows(tmp_path / "out" / "transcripts.jsonl")) in range(K, NUM_PROMPTS * K, K)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.temperature=0.5", "temperature=1.0, not 0.5"),
        ("rollout.max_tokens=100", "max_tokens=128, not 100"),
        ("seed=1", "seed=0, not 1"),
    ],
)
def test_a_folder_goes_on_with_its_own_settings_only(evaluate: Evaluate, override: str, words: str) -> None:
    assert evaluate(right_by_index, num_prompts=1) == 0
    with pytest.raises(ConfigError, match=f"holds an evaluation with {words}: choose another --out"):
        evaluate(right_by_index, override, num_prompts=1)


def test_a_folder_of_something_else_is_left_alone(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no evaluation"):
        evaluate(right_by_index)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# ---- what goes wrong


def test_a_prompt_that_is_refused_counts_as_wrong_and_is_tried_again(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = until(5, right_by_index, lambda: RequestRefused("too odd"))
    assert evaluate(refuses) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["avg"]["value"] == pytest.approx(10 / 24) and list(found["refused"].values()) == ["too odd"]
    assert "1 prompts could not be sampled and count as wrong, first heldout/sums.jsonl:6 (too odd)" in said.err
    engine = scripted(right_by_index)
    assert evaluate(engine) == 0 and len(engine.leases) == 1


def test_an_engine_that_stands_still_ends_the_call(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Still(ScriptedEngine):
        leases: list[Lease] = []  # noqa: RUF012
        looks = 0

        @property
        def busy_s(self) -> float:  # type: ignore[override]
            Still.looks += 1
            return 50.0 * Still.looks

        async def sample(self, lease: Lease) -> Any:
            await asyncio.Event().wait()

    monkeypatch.setattr(runner, "LOOK_S", 0.001)
    assert evaluate(Still) == 1
    assert (
        "error: the engine has drawn no token for 120 s (transport.lease_timeout_s) (log: " in capsys.readouterr().err
    )


FAILING = """
def verify(response, reference, row):
    if row["id"] in BAD and response != reference:
        raise KeyError("x")
    return response.endswith("#" + reference)
"""


def test_a_verifier_that_fails_is_a_mistake_and_on_a_few_responses_a_mark(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "failing_eval.py").write_text(f"BAD = range(1, 9)\n{FAILING}")
    with pytest.raises(ConfigError, match=r"failing_eval:verify failed on 4 responses \(it raised KeyError: 'x'"):
        evaluate(right_by_index, "verifier.function=failing_eval:verify", "verifier.max_error_share=0.15")
    (tmp_path / "failing_eval.py").write_text(f"BAD = [5]\n{FAILING}")
    settings = ("verifier.function=failing_eval:verify", "verifier.max_error_share=0.5")
    assert evaluate(right_by_index, *settings) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdicts"]["error"] == 4 and found["maj"] is None
    engine = scripted(right_by_index)
    assert evaluate(engine, *settings) == 0
    assert [lease.prompt_uid for lease in engine.leases] == ["heldout/sums.jsonl:6"], "what failed is judged again"


def test_data_that_lacks_what_the_verifier_reads_is_a_mistake_before_the_engine_starts(evaluate: Evaluate) -> None:
    engine = scripted(right_by_index)
    lacks = r"number_walk:verify raised .*no integers in a column 'start' \(there is: .*level.*sums\.jsonl"
    with pytest.raises(ConfigError, match=lacks):
        evaluate(engine, "verifier.function=common.tasks.number_walk:verify")
    assert not engine.leases


def test_a_prompt_that_does_not_fit_is_named_by_its_line(evaluate: Evaluate) -> None:
    with pytest.raises(ConfigError, match=r"sums.jsonl, line 1: its prompt has \d+ tokens, and with rollout"):
        evaluate(right_by_index, "model.max_model_len=130")


def test_a_column_that_is_not_there(evaluate: Evaluate) -> None:
    with pytest.raises(ConfigError, match=r"--by topic: .* has no such column \(there is: answer, id, level\)"):
        evaluate(right_by_index, by=("topic",))


def test_what_is_no_run_has_no_steps_and_a_run_without_export_says_so(evaluate: Evaluate, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--step 3 is of a run, but .* is no run directory"):
        evaluate(right_by_index, step=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {MODEL}}}\n")
    with pytest.raises(ConfigError, match="has no final export yet: name a checkpoint with --step"):
        evaluate(right_by_index, model=str(tmp_path / "run"))


def test_an_engine_has_the_gpu_for_itself_that_a_run_has_shared() -> None:
    shared = ("device=cuda", "actors.placement=shared", "weights.backend=ipc", "actors.gpu_memory_utilization=0.2")
    synchronous = ("staleness.max_staleness=0", "actors.sleep_while_training=true")
    request = Request(
        model=MODEL,
        step=None,
        data=None,
        by=(),
        num_prompts=1,
        out=None,
        is_json=True,
        files=(),
        overrides=(
            "task.num_train=1",
            "task.num_heldout=1",
            "eval.num_prompts=1",
            *shared,
            *synchronous,
            "model.max_model_len=256",
        ),
    )
    with planned(request) as plan:
        actors = plan.config.actors
        assert (actors.placement, actors.sleep_while_training) == (Placement.separate, False)
        assert actors.gpu_memory_utilization is None and plan.config.transfer_backend is TransferBackend.nccl


def test_the_options_are_settings_that_come_last() -> None:
    assert parse(["eval", MODEL, "--samples", "8", "seed=3", "--top-p", "0.7"]).options == [
        "eval.samples_per_prompt=8",
        "eval.top_p=0.7",
    ]
