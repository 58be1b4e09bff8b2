"""`run.py plan`: the table of memory, the number of actors, text and JSON, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import run as cli
from common.loading import load_config
from common.memory import GIB
from common.placement import Gpu
from learner.planning import command
from learner.planning.fleet import alternatives, plan_fleet
from learner.planning.memory import report, table
from learner.planning.speeds import Speeds, assumed
from tests.support.measured_runs import groups, rows, write_run

ROOT = Path(cli.__file__).parent
SMALL = ["-c", "demo", "rollout.prompts_per_step=4", "rollout.group_size=2", "actors.groups_in_flight=4"]
SMALL.append("eval.every=0")
FAST = ["--steps", "8", "--publish-s", "0.1", "--length-mean", "20"]
CUDA = ["device=cuda", "model.dtype=bfloat16"]


def speeds(actor: float, learner: float) -> Speeds:
    return assumed(
        actor_tokens_per_s=actor,
        learner_tokens_per_s=learner,
        publish_s=0.0,
        length_mean=20.0,
        length_sigma=0.0,
        sequences=8,
        overhead=1.0,
    )


def test_three_slow_actors_feed_one_learner() -> None:
    """All groups of a step fit on one actor, so that s actors sample s batches at once if the bound lets them."""
    config = load_config(["demo"], [*SMALL[2:], "staleness.max_staleness=4"])
    fleet = plan_fleet(config, speeds(actor=100.0, learner=300.0), idle=0.05, steps=10)
    assert fleet.smallest is not None and fleet.smallest.actors == 3
    assert [outcome.actors for outcome in fleet.outcomes] == [1, 2, 3, 4, 6]
    assert fleet.planned.actors == 1
    assert fleet.planned.learner_idle == pytest.approx(2 / 3, abs=0.05)
    assert fleet.best.trained_tokens_per_s == pytest.approx(300.0, rel=0.02)


def test_a_bound_that_no_number_of_actors_meets_is_found_out() -> None:
    config = load_config(["demo"], [*SMALL[2:], "staleness.max_staleness=0"])
    fleet = plan_fleet(config, speeds(actor=100.0, learner=300.0), idle=0.05, steps=10)
    assert fleet.smallest is None and fleet.best.actors == 1
    others = dict(alternatives(config, speeds(actor=100.0, learner=300.0), actors=1, steps=10))
    gain = others["staleness.max_staleness=1"].trained_tokens_per_s / fleet.planned.trained_tokens_per_s
    assert gain == pytest.approx(4 / 3, rel=0.02)
    assert "staleness.max_staleness=-1" not in others


def test_leases_ahead_are_told_where_places_wait_for_long_responses() -> None:
    config = load_config(["demo"], [*SMALL[2:], "staleness.max_staleness=4"])
    spread = replace(speeds(actor=100.0, learner=1e6), length_sigma=1.0)
    planned = plan_fleet(config, spread, idle=0.05, steps=60).planned
    others = dict(alternatives(config, spread, actors=1, steps=60))
    ahead = others["actors.groups_in_flight=6 actors.max_num_seqs=8"]
    assert planned.running < ahead.running <= 8
    assert ahead.trained_tokens_per_s > 1.1 * planned.trained_tokens_per_s
    already = replace(config, actors=replace(config.actors, max_num_seqs=8))
    assert not any("max_num_seqs" in name for name, _ in alternatives(already, spread, actors=1, steps=10))


def test_the_table_has_what_each_gpu_holds(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(["demo"], [*CUDA, "learner.ranks=2", "actors.count=3"])
    memory = report(config, [Gpu(name=str(i), memory=80 * GIB) for i in range(5)])
    assert memory.problem is None and memory.max_sequences_tokens is not None
    assert [(role.role, role.processes) for role in memory.roles] == [("learner rank", 2), ("engine", 3)]
    assert memory.roles[1].total == int(80 * GIB * 0.9) + 3 * GIB // 4
    assert "each GPU has 80.0 GiB, of which 76.0 GiB are planned with" in table(memory)[0]
    assert table(memory)[2].startswith("engine                     3 x  72.8 GiB   key-value cache ")


def test_what_does_not_fit_is_the_sentence_of_train_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "-c", "demo", *CUDA, "learner.tokens_per_micro_batch=4000000", "--gpus", "2", "--gpu-gib", "8"]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "too little memory on a GPU of 8.0 GiB" in captured.err
    assert "; set learner." in captured.err and captured.err.count("\n") == 1
    assert captured.out.startswith("memory    each GPU has 8.0 GiB") and "actors  " not in captured.out


def test_the_text_says_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SMALL, *FAST, "--actor-tokens-per-s", "100", "--learner-tokens-per-s", "250"]) == 0
    captured = capsys.readouterr()
    labels = [line[:10].strip() for line in captured.out.splitlines() if line[:10].strip()]
    assert labels == ["memory", "speeds", "planned", "actors", "instead"]
    assert "100 with 8; the learner 250; a publication 0.10 s; responses of 20 tokens" in captured.out
    assert "--length-sigma are not given: what follows is no better than these guesses" in captured.out
    assert captured.err == ""


def test_the_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SMALL, *FAST, "--json", "actors.count=2"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["memory"]["fits"] and made["memory"]["problem"] is None
    assert made["planned"]["actors"] == 2 and made["planned"]["steps"] == 8
    assert made["planned"] in made["actors"]["outcomes"]
    assert "staleness.max_staleness=3" in made["instead"]
    assert made["speeds"]["source"] == "assumed"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--idle", "1"], "--idle 1 is no share of the time"),
        (["--publish-s", "-1"], "--publish-s -1 must be from 0 to 1e+06"),
        (["--publish-s", "1e300"], "--publish-s 1e+300 must be from 0 to 1e+06"),
        (["--learner-tokens-per-s", "nan"], "--learner-tokens-per-s nan must be from 0.001 to 1e+09"),
        (["--length-mean", "0"], "--length-mean 0 must be from 1 to 1e+12"),
        (["--length-mean", "1e9"], "--length-mean 1e+09 is more than rollout.max_tokens="),
        (["--uninformative", "1"], "--uninformative 1 must be from 0 to 0.999"),
        (["--steps", "0"], "--steps 0 must be from 1 to 10000"),
        (["staleness.max_staleness=1000"], "let sampling run 1,001 steps ahead, too many to simulate: lower one"),
        (["actors.count=20000"], "actors.count=20000 is too many to simulate: lower it to 10,000"),
        (["rollout.prompts_per_step=1000000"], "too many to simulate: lower --steps, rollout."),
        (["--from", "nowhere"], "nowhere has no config.yaml"),
        (["--from", "nowhere", "--publish-s", "1"], "--publish-s with --from: the run tells it"),
        ([*CUDA, "--gpus", "1"], "give both or none"),
        ([*CUDA, "--gpus", "0", "--gpu-gib", "8"], "--gpus 0 must be from 1 to 100000"),
        ([*CUDA, "--gpus", "100000000", "--gpu-gib", "8"], "--gpus 1e+08 must be from 1 to 100000"),
        ([*CUDA, "--gpus", "2", "--gpu-gib", "inf"], "--gpu-gib inf must be from 0.001 to 1e+06"),
        ([*CUDA, "--gpus", "1", "--gpu-gib", "8", "learner.ranks=2"], "need 3 GPUs, but 1 are visible"),
        (["staleness.max_staleness=-1"], "staleness.max_staleness"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "-c", "demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and sentence in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_simulations_that_do_not_end_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MOST_S", -1.0)
    assert cli.main(["plan", *SMALL, *FAST]) == 2
    captured = capsys.readouterr()
    assert "error: the simulations have not ended within -1 s, the last is at step 0 of " in captured.err
    assert "with 1 actors: lower --steps, " in captured.err and captured.err.count("\n") == 1


def test_exact_staleness_counts_what_the_learner_waits_before_a_publication(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is not busy then, whatever batches it has; more actors do not shorten a response."""
    config = load_config(["demo"], [*SMALL[2:], "staleness.max_staleness=2", "staleness.exact=true"])
    fleet = plan_fleet(config, speeds(actor=100.0, learner=300.0), idle=0.05, steps=10)
    assert fleet.smallest is None and fleet.planned.staleness_hist == {2: 1.0}
    assert fleet.planned.learner_idle == pytest.approx(2 / 3, abs=0.02)
    assert fleet.planned.trained_tokens_per_s == pytest.approx(300 * (1 - fleet.planned.learner_idle), rel=0.02)
    assert cli.main(["plan", *SMALL, *FAST, "staleness.exact=true"]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("actors ")]
    assert "no number keeps the learner busy" in said and "staleness.exact makes each publication wait" in said


def test_a_plan_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, learner.planning.command; print(*sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_settings_on_which_speed_depends_are_compared_with_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", rows(12), groups(12))
    assert cli.main(["plan", *SMALL, "--from", str(run), "--steps", "8", "learner.mini_batches=2"]) == 0
    out = capsys.readouterr().out
    assert f"{run} had learner.mini_batches=4, not 2: its speeds may not hold" in out
    assert f"{run} had learner.ranks" not in out
