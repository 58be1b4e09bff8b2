"""What rank 0 asks of the service and writes of its answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.config import ActorsConfig, Config, EvalConfig, ModelConfig
from common.control import Status
from common.metrics import RunLog, read_jsonl
from common.types import Prompt
from learner import leader as leader_module
from learner.leader import Leader, NobodyLeft
from learner.rollouts.evaluation import Begun, EvalResult
from learner.rollouts.history import Course
from learner.rollouts.service import BatchTimeout, StillWaiting

HELDOUT = [Prompt(uid=f"h{i}", text=str(i), reference="") for i in range(9)]
RESULT = EvalResult(
    version=3,
    oldest_version=3,
    newest_version=4,
    accuracy=0.25,
    accuracy_low=0.1,
    accuracy_high=0.5,
    length_mean=7.0,
    truncated_fraction=0.0,
    num_prompts=8,
    num_samples=30,
    num_failed=1,
    num_errors=2,
    seconds=1.0,
)


class AskedService:
    """Stands for the service; remembers how it was asked to evaluate."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, float]] = []

    def evaluate(
        self, prompts: list[Prompt], samples_per_prompt: int, temperature: float, version: int, begun: Begun | None
    ) -> None:
        self.asked.append((len(prompts), samples_per_prompt, temperature))

    def wait_evaluation(self, timeout_s: float) -> EvalResult:
        return RESULT

    def show(self, course: Course) -> None:
        self.shown = course


def make(folder: Path, service: Any, **settings: Any) -> Leader:
    config = Config(model=ModelConfig(path="none"), eval=EvalConfig(num_prompts=8, **settings))
    return Leader(config, service, RunLog(folder), HELDOUT)


@pytest.mark.parametrize(("temperature", "num_samples"), [(1.0, 4), (0.01, 4), (0.0, 1)])
def test_a_greedy_evaluation_takes_one_response_a_prompt(tmp_path: Path, temperature: float, num_samples: int) -> None:
    service = AskedService()
    make(tmp_path, service, temperature=temperature, samples_per_prompt=4).evaluate(version=3)
    assert service.asked == [(8, num_samples, temperature)]


def test_an_evaluation_is_logged_with_what_is_missing_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leader = make(tmp_path, AskedService())
    leader.evaluate(version=3)
    leader.finish_evaluation(step=5, version=3)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    logged = {
        name: row[name] for name in ("accuracy/heldout", "eval/num_prompts", "eval/num_failed", "eval/num_errors")
    }
    assert logged == {
        "accuracy/heldout": 0.25,
        "eval/num_prompts": 8,
        "eval/num_failed": 1,
        "eval/num_errors": 2,
    }
    assert leader.service.shown.accuracies.tolist() == [0.25]  # type: ignore[attr-defined]
    line = capsys.readouterr().out
    assert (row["accuracy/heldout_low"], row["accuracy/heldout_high"]) == (0.1, 0.5)
    assert (row["accuracy/version_newest"], row["accuracy/publications"]) == (4, 1)
    assert line.startswith("done ") and "accuracy 0.250  of version 3  from 0.100  to 0.500  of 8" in line
    assert "publications during the evaluation 1" in line
    assert "PROMPTS FAILED 1" in line and "ERRORS IN EVALUATION 2" in line


def resumed(folder: Path, service: AskedService, version: int, step: int) -> Leader:
    """With the checkpoint of `step`, in which the evaluation of `version` is under way."""
    snapshot: Any = SimpleNamespace(evaluation=Begun(asked={}, sampled=(), groups=(), failed=(), seconds=0.0))
    eval_config, model = EvalConfig(num_prompts=8), ModelConfig(path="none")
    config = Config(runs_dir=str(folder.parent), name=folder.name, model=model, eval=eval_config)
    leader = Leader(config, cast(Any, service), RunLog(folder, step), HELDOUT)
    leader.resume(snapshot, {"trained_tokens": 0, "evaluated_version": version})
    return leader


def test_an_evaluation_that_ended_after_the_last_checkpoint_is_not_logged_again_by_a_resume(tmp_path: Path) -> None:
    """Its row has the step of that checkpoint, which holds it as under way: the run was killed in the last one."""
    leader = make(tmp_path, AskedService())
    leader.evaluate(version=3)
    leader.finish_evaluation(step=5, version=4)
    service = AskedService()
    leader = resumed(tmp_path, service, version=3, step=5)
    leader.finish_evaluation(step=5, version=4)
    assert service.asked == []
    leader.evaluate(version=3)
    assert service.asked == [], "its turn is over"
    leader.evaluate(version=4)
    assert len(service.asked) == 1
    assert [row["accuracy/version"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [3]


@pytest.mark.parametrize("step", [4, 5])
def test_an_evaluation_whose_row_is_of_a_step_that_is_done_again_goes_on_and_so_does_one_without(
    tmp_path: Path, step: int
) -> None:
    leader = make(tmp_path, AskedService())
    leader.evaluate(version=3)
    leader.finish_evaluation(step=5, version=3)
    service = AskedService()
    leader = resumed(tmp_path, service, version=3 if step == 4 else 2, step=step)
    assert len(service.asked) == 1
    leader.finish_evaluation(step=6, version=4)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == ([6] if step == 4 else [5, 6])


# ---- nobody there


class LonelyService:
    """Stands for the service while a batch does not come."""

    endpoint = "tcp://127.0.0.1:1"

    def __init__(self, raised: Exception, has_company: bool) -> None:
        self._raised, self._has_company = raised, has_company
        self.waits_anew = False

    def begin_anew(self) -> None:
        self.waits_anew = True

    def take_batch(self, timeout_s: float) -> None:
        raise self._raised

    def has_company(self) -> bool:
        return self._has_company


def wait(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    raised: Exception,
    *,
    has_company: bool = False,
    local: Status | None = None,
    count: int = 1,
    services: list[LonelyService] | None = None,
) -> None:
    """One turn of waiting for a batch, whose service is added to `services`.

    `local` is what the supervisor says, `count` what is configured.
    """
    monkeypatch.setattr(leader_module, "_local_actors", lambda: local)
    config = Config(model=ModelConfig(path="none"), actors=ActorsConfig(count=count))
    service: Any = LonelyService(raised, has_company)
    if services is not None:
        services.append(service)
    Leader(config, service, RunLog(folder), HELDOUT).next_groups(1)


def test_a_run_whose_actors_are_given_up_ends_with_their_reason_unless_somebody_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Status(wanted=1, active=0, given_up=("actor-0 ended with exit code 1: no such model",))
    with pytest.raises(NobodyLeft, match="none is started again: actor-0 ended with exit code 1: no such model"):
        wait(monkeypatch, tmp_path, StillWaiting("a batch"), local=gone)
    with pytest.raises(StillWaiting):
        wait(monkeypatch, tmp_path, StillWaiting("a batch"), local=gone, has_company=True)
    with pytest.raises(StillWaiting):
        wait(monkeypatch, tmp_path, StillWaiting("a batch"), local=Status(wanted=1, active=1))


@pytest.mark.parametrize(("local", "count"), [(None, 0), (Status(wanted=0, active=0), 2)])
def test_actors_from_elsewhere_are_waited_for_without_end_and_that_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    local: Status | None,
    count: int,
) -> None:
    with pytest.raises(StillWaiting):
        wait(monkeypatch, tmp_path, BatchTimeout("waited 600 s"), local=local, count=count)
    assert "waiting for actors: run.py actor --connect tcp://127.0.0.1:1 -c " in capsys.readouterr().out


def test_the_time_in_which_nobody_from_elsewhere_was_there_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an actor that comes just before it is over would have no time to start its engine."""
    services: list[LonelyService] = []
    for has_company, count in ((False, 0), (True, 0), (False, 1)):
        with pytest.raises(StillWaiting):
            wait(monkeypatch, tmp_path, StillWaiting(""), has_company=has_company, count=count, services=services)
    assert [service.waits_anew for service in services] == [True, False, False]


@pytest.mark.parametrize(("has_company", "local"), [(True, None), (False, None), (False, Status(wanted=1, active=1))])
def test_other_waits_end_with_their_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_company: bool, local: Status | None
) -> None:
    with pytest.raises(BatchTimeout):
        wait(monkeypatch, tmp_path, BatchTimeout("waited 600 s"), has_company=has_company, local=local)
