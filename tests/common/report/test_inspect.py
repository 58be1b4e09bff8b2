"""`run.py inspect`: what it prints and writes, and what it says of calls and files that are wrong."""

import json
from pathlib import Path

import pytest

from common.loading import save_config
from common.report.command import closing, inspect
from common.report.reading import read_run
from common.report.text import render
from run import main
from tests.support.made_up_run import MadeUp, config, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "made")


def test_the_text_has_intervals_members_waste_and_advice(tmp_path: Path) -> None:
    event = {"step": 40, "time": 1.7e9, "kind": "alarm", "name": "offpolicy/ess", "value": 0.2, "limit": 0.3}
    folder = write_run(
        tmp_path, MadeUp(events=[event | {"text": "ALARM after step 40: low"}], change={"learner/idle_fraction": 0.5})
    )
    text = inspect([str(folder)], None, False)
    assert "accuracy   0.210 [0.170, 0.250] -> 0.900 [0.860, 0.940] (held out, avg@8, 96 prompts, 95% interval)" in text
    assert "members    2 sampled what was trained, in groups: actor-0 576, actor-1 576" in text
    assert "dropped    9 groups: actor_lost 2, stale 7; 0.7% of the generated tokens" in text
    assert "alarm      After step 40: low" in text
    assert "advice     The learner waited 50% of the time" in text


def test_json_has_the_summary_the_advice_and_what_was_measured(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_steps"], found["num_planned_steps"], found["num_versions"]) == (72, 72, 60)
    assert found["evaluations"][-1]["accuracy"] == 0.9 and found["evaluations"][-1]["low"] == pytest.approx(0.86)
    assert found["staleness_hist"].keys() == {"0", "1", "2"}
    assert found["config"]["staleness"]["max_staleness"] == 2
    assert [advice["rule"] for advice in found["advice"]] == ["accuracy", "balance", "cheap_age", "useful_critic"]
    assert {view["number"] for view in found["views"]} == set(range(1, 16))
    assert all(view["is_measured"] for view in found["views"])


def test_html_is_written_and_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(made), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_train_ends_with_the_summary_and_the_place_of_the_page(made: Path) -> None:
    said = closing(made, with_page=True)
    assert said == f"{render(read_run(made))}\nreport     {made / 'report.html'}"
    assert "<h1>made-up</h1>" in (made / "report.html").read_text()


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{not json\n", "line 73 is not JSON: Expecting property name"),
        (b"[1]\n", "line 73 is not a JSON object"),
        (b'{"time": 1}\n', "line 73 has no step: it is damaged, or not of a run; remove the line"),
        (b'{"step": 1, "time": null}\n', "line 73 has no time: it is damaged"),
        (b'{"step": 1, "time": 1e18}\n', "line 73 has no time: it is damaged"),
        (b'{"step": 1e18, "time": 1}\n', "line 73 has no step: it is damaged"),
        (b'{"step": ' + 5000 * b"1" + b"}\n", "line 73 is not JSON: "),
        (100_000 * b"[" + b"\n", "line 73 is not JSON: "),
        (b'{"step": 1, "time": 1, "staleness/hist": {"99999999999": 1}}\n', "line 73 has a staleness/hist that is not"),
        (
            b'{"step": 1, "time": 1, "staleness/hist": {"old": 1}}\n',
            "line 73 has a staleness/hist that is not tokens by",
        ),
        (
            b'{"step": 1, "time": 1, "staleness/hist": {"0": NaN}}\n',
            "line 73 has a staleness/hist that is not tokens by",
        ),
        (b'{"step": 1, "time": 1, "staleness/hist": 7}\n', "line 73 has a staleness/hist that is not tokens by"),
        (b'{"step": 1, "x": "\xff"}\n', "line 73 is not JSON: 'utf-8' codec"),
    ],
)
def test_damaged_metrics_are_one_sentence(
    line: bytes, sentence: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(config(), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_bytes((made / "metrics.jsonl").read_bytes() + line)
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and str(tmp_path / "metrics.jsonl") in error and error.count("\n") == 1


@pytest.mark.parametrize("number", ["1e300", "NaN", "1" + 400 * "0", '"many"'])
def test_what_can_be_no_number_of_a_run_is_left_out(number: str, made: Path, tmp_path: Path) -> None:
    save_config(config(), tmp_path / "config.yaml")
    last = json.loads(rows(made)[-1])
    names = [name for name in last if name not in ("step", "time", "time/step_s", "staleness/hist")]
    spoilt = last | dict.fromkeys([*names, "offpolicy/gap_99999999999/ess"], "?")
    group = {"step": 72, "actor": "actor-9", "rewards": ["?"], "lengths": ["?"]}
    for name, lines in (("metrics", [*map(json.loads, rows(made)[:-1]), spoilt]), ("ledger", [group])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text.replace('"?"', number))
    found = json.loads(inspect([str(tmp_path)], None, True))
    assert found["num_steps"] == 72 and found["evaluations"][-1]["accuracy"] == 0.88
    (member,) = found["members"]
    assert (member["num_groups"], member["num_tokens"], member["reward_mean"]) == (1, 0, 0.0)
    assert inspect([str(tmp_path)], None, False) and inspect([str(tmp_path)], str(tmp_path / "page.html"), False)


def test_a_metric_that_was_never_a_number_was_not_measured(made: Path, tmp_path: Path) -> None:
    save_config(config(), tmp_path / "config.yaml")
    lines = [json.loads(row) | {"staleness/lr_gauge": "?"} for row in rows(made)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines).replace('"?"', "1e300"))
    found = json.loads(inspect([str(tmp_path)], None, True))
    assert [view["number"] for view in found["views"] if not view["is_measured"]] == [10]


def test_a_line_that_a_crash_has_cut_off_is_left_out(made: Path, tmp_path: Path) -> None:
    save_config(config(), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text("".join(rows(made))[:-10])
    assert len(read_run(tmp_path).steps) == 71


def test_other_folders_and_runs_without_a_step_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothing'} is not a run directory: it has no config.yaml\n"
    save_config(config(), tmp_path / "config.yaml")
    for prepare in (lambda: None, (tmp_path / "metrics.jsonl").touch):
        prepare()
        assert main(["inspect", str(tmp_path)]) == 2
        assert "has no metrics.jsonl yet: no step has ended; its logs are in" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_one_sentence(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for page, sentence in ((tmp_path, "is a folder"), (tmp_path / "no" / "page.html", "has no folder")):
        assert main(["inspect", str(made), "--html", str(page)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {page} {sentence}") and error.count("\n") == 1


def test_one_run_twice_and_too_many_runs_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    again.symlink_to(made)
    assert main(["inspect", str(made), str(again)]) == 2
    assert capsys.readouterr().err == f"error: {again} and {made} are the same run: give each once\n"
    many = [str(tmp_path / f"run-{number}") for number in range(15)]
    assert main(["inspect", *many]) == 2
    assert capsys.readouterr().err == "error: 15 runs cannot be told apart in one plot: give at most 14\n"


def test_a_setting_is_taken_for_a_run_that_is_not_there(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made), "seed=1"]) == 2
    assert capsys.readouterr().err == "error: seed=1 is not a run directory: it has no config.yaml\n"
