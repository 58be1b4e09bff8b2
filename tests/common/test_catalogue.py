"""Every name that a run logs is in the catalogue, once, and docs/metrics.md is what the catalogue says."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.catalogue import METRICS, PARTS, find
from common.catalogue.__main__ import page
from common.catalogue.views import VIEWS
from common.config import AdvantageEstimator, AlarmConfig, Correction, DType
from common.limits import LIMITS
from common.metrics import CONSOLE, CONSOLE_ALARMS, RunLog, read_jsonl
from common.types import DropReason
from learner.alarm import Alarm
from learner.leader import Leader
from learner.publication.control import Costs
from learner.publication.publisher import Publication
from learner.publication.sentinel import DriftSentinel
from learner.rollouts.selection import Fate, selection_metrics
from tests.learner.algorithm.test_trainer import EVERYTHING, LENGTHS, config, make_batch, make_trainer
from tests.learner.rollouts.test_service import make_config, make_service
from tests.learner.test_leader import AskedService, make

ROOT = Path(__file__).resolve().parents[2]
NOT_METRICS = {"step", "time"}  # of a line


def missing(row: dict[str, Any]) -> set[str]:
    return {name for name in row if find(name) is None} - NOT_METRICS


def test_the_page_is_what_the_catalogue_says() -> None:
    page_is = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page_is == page(), "python -m common.catalogue > docs/metrics.md"


def test_every_name_has_one_row_and_every_view_has_names() -> None:
    assert not [name for name, count in Counter(metric.name for metric in METRICS).items() if count > 1]
    assert {metric.view for metric in METRICS} - {None} == VIEWS.keys() == set(range(1, 16))
    assert {part for metric in METRICS for part in re.findall(r"{(\w+)}", metric.name)} == PARTS.keys()
    assert all(metric.unit and metric.definition for metric in METRICS)


def test_variable_parts_take_what_they_may_be_and_nothing_else() -> None:
    found = find("offpolicy/gap_12/lost_clipped_negative")
    assert found is not None and found.view == 8
    assert all(find(f"drops/{reason}") for reason in DropReason)
    assert find("drops/nothing") is find("offpolicy/gap_x/ess") is find("offpolicy/essx") is None


@pytest.mark.parametrize("correction", list(Correction))
@pytest.mark.parametrize("advantage", [AdvantageEstimator.gae, AdvantageEstimator.rloo])
def test_the_names_of_a_step_are_there(correction: Correction, advantage: AdvantageEstimator) -> None:
    with_critic = {**EVERYTHING, "value_gate": True, "critic_warmup_epochs": 2, "segment_probability": 0.2}
    without = {name: EVERYTHING[name] for name in ("whiten_advantages", "dual_clip", "entropy_weight", "kl_weight")}
    has_critic = advantage is AdvantageEstimator.gae
    options: dict[str, Any] = with_critic if has_critic else without
    trainer = make_trainer(config(correction=correction, advantage=advantage, **options))
    batch = make_batch([10 * length for length in LENGTHS])
    steps = [trainer.step(batch, 0, is_warmup=True)] if has_critic else []
    steps += [trainer.step(batch, version, is_warmup=False) for version in range(3)]
    assert set.union(*map(missing, steps)) == set()
    assert {"policy/kl_version", "staleness/nats_mean"} <= steps[-2].keys()


def test_the_names_of_what_surrounds_a_step_are_there() -> None:
    probed = Publication(
        version=1, members=(), seconds=0.0, costs=Costs(), probe_difference=0.1, probe_max=0.2, probe_floor=0.1
    )
    assert missing(probed.metrics()) == set()
    policy = make_trainer(config()).policy.network
    sentinel = DriftSentinel(10.0, DType.float32).observe(1e-6, is_untrained=True, policy=policy)
    assert missing(sentinel) == missing(Alarm(AlarmConfig()).observe(1, {})[0]) == set()
    change = {f"selection/{fate}_{total}": 1.0 for fate in Fate for total in ("responses", "tokens", "correct")}
    assert missing(selection_metrics(change)) == set()


def test_the_names_that_the_leader_adds_are_there(tmp_path: Path) -> None:
    """To a step, and of an evaluation."""
    service = make_service(make_config())
    service._coordinator.set_version(0, 1)
    Leader(make_config(), service, RunLog(tmp_path / "run"), []).record(1, 0, 1, [], {"time/wait_for_batch_s": 0.0})
    (step,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert {"queue/window_fill", "drops/stale", "verdicts/wrong", "transport/cut_endless"} <= step.keys()
    evaluated = make(tmp_path / "evaluated", AskedService())
    evaluated.evaluate(version=3)
    evaluated.finish_evaluation(step=5, version=3)
    (evaluation,) = read_jsonl(tmp_path / "evaluated" / "metrics.jsonl")
    assert "accuracy/heldout" in evaluation
    assert missing(step) == missing(evaluation) == set()


def test_actors_that_were_busy_all_the_time_are_not_idle_for_less_than_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor reads its two clocks one after the other."""
    service = make_service(make_config())
    counters = service.stats() | {"busy_s": 3.0000002, "uptime_s": 3.0}
    monkeypatch.setattr(service, "stats", lambda: counters)
    Leader(make_config(), service, RunLog(tmp_path), []).record(1, 0, 1, [], {"time/wait_for_batch_s": 0.0})
    (step,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert step["actors/idle_fraction"] == 0


def test_what_is_shown_and_judged_is_in_the_catalogue() -> None:
    shown = {name for name, _, _ in (*CONSOLE, *CONSOLE_ALARMS)} | {limit.metric for limit in LIMITS}
    assert {name for name in shown if find(name) is None} == set()
