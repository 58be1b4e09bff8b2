"""What `run.py train` refuses before anything is started: one sentence on stderr, exit code 2, nothing touched."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT


def refused(tmp_path: Path, *settings: str, source: str | None = None) -> str:
    """The sentence; `source` is that of a module `mine` in the working directory."""
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
        settings = (*settings, "verifier.function=mine:verify")
    small = ("task.num_train=50", "task.num_heldout=8", "eval.num_prompts=8", f"runs_dir={tmp_path}/runs")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "train", "-c", "demo", *small, *settings],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240.0,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "runs" / "demo").exists(), "nothing has begun"
    return line


def test_a_verifier_with_a_syntax_error(tmp_path: Path) -> None:
    source = "def verify(response, reference, row)\n    return True\n"
    assert "SyntaxError: expected ':' in mine.py line 1" in refused(tmp_path, source=source)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "verifier.function=mine:verify returned None (NoneType), which is not a Verdict"),
        (
            "return row['answer'] == response",
            "verifier.function=mine:verify raised KeyError: 'answer' (mine.py line 2)",
        ),
    ],
)
def test_a_verifier_that_fails_on_the_first_row(tmp_path: Path, body: str, words: str) -> None:
    line = refused(tmp_path, source=f"def verify(response, reference, row):\n    {body}\n")
    assert words in line and "train/0" in line


def test_a_form_of_answers_that_the_task_s_own_verifier_does_not_know(tmp_path: Path) -> None:
    assert 'verifier.answer_form is "any", but common.tasks.number_walk:verify has no keyword' in refused(
        tmp_path, "verifier.answer_form=any"
    )


def test_an_earlier_run_is_not_deleted_for_a_run_that_cannot_start(tmp_path: Path) -> None:
    kept = tmp_path / "earlier" / "demo" / "metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}\n")
    (kept.parent / "config.yaml").write_text("{}\n")
    refused(tmp_path, f"runs_dir={tmp_path}/earlier", "--overwrite", source="def verify(response): ...\n")
    assert kept.read_text() == "{}\n"
