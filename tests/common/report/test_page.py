"""The page of a run: all views of a made-up run, sentences for what was not measured, nothing that could be obeyed."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import AdvantageEstimator, AlgorithmConfig, Correction, LearnerConfig, StalenessConfig
from common.report.command import inspect
from common.report.html import page
from common.report.reading import Run, read_run
from common.report.svg import draw
from common.report.views.all import questions
from common.report.views.view import View
from tests.common.report.test_svg import misplaced
from tests.support.made_up_run import MadeUp, Row, config, write_run

NEW = (  # what earlier releases did not measure
    "staleness/flight", "staleness/queue", "staleness/updates", "staleness/nats", "staleness/lr_gauge",
    "policy/kl_version", "offpolicy/sequence_ess", "offpolicy/m2", "offpolicy/tv", "critic/gap_", "queue/window_fill",
    "accuracy/heldout_",
)  # fmt: skip
VOID = {"meta", "wbr"}


def views(run: Run) -> dict[int, View]:
    return {view.number: view for question in questions(run) for view in question.views}


def problems(run: Run) -> list[str]:
    """Of the geometry of all plots."""
    drawn = [
        (view.number, draw(panel.plot, ""))
        for view in views(run).values()
        for panel in view.panels
        if panel.plot is not None
    ]
    found = [f"view {number}: {problem}" for number, drawing in drawn for problem in misplaced(drawing)]
    return found + [f"view {number}: not a number" for number, drawing in drawn if re.search("nan|inf", drawing.svg)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "made"))


@pytest.fixture(scope="module")
def made_once(made: Run) -> Callable[[], Run]:
    """In place of the run itself, which Hypothesis would print."""
    return lambda: made


class Tags(HTMLParser):
    """Whether every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_with_all_metrics_has_fifteen_views_without_a_missing_plot(made: Run) -> None:
    found = views(made)
    assert sorted(found) == list(range(1, 16))
    assert [(view.number, panel.missing) for view in found.values() for panel in view.panels if panel.missing] == []
    for view in found.values():
        assert len(view.decision) < 110
        for panel in view.panels:
            assert panel.plot is not None and panel.plot.x.label and panel.plot.y.label and panel.plot.marks
    assert problems(made) == []


@pytest.mark.parametrize("number", [1, 2, 3, 8, 11])
def test_the_bound_is_drawn_in(number: int, made: Run) -> None:
    plots = [panel.plot for panel in views(made)[number].panels if panel.plot is not None]
    assert any(mark.name == "bound: max_staleness=2" for plot in plots for mark in plot.marks)


def test_the_page_is_one_small_well_formed_file_that_loads_and_runs_nothing(made: Run) -> None:
    text = page(made)
    assert len(text.encode()) < 300_000
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and not {"script", "link", "img", "iframe", "object"} & set(tags.seen)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "src=" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert "`" not in text.split("</style>")[1]
    assert [f'id="view-{number}"' in text for number in range(1, 16)] == [True] * 15


def test_a_long_run_makes_no_larger_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path, MadeUp(steps=1000, actors=[f"host-{number}" for number in range(40)]))
    run = read_run(folder)
    assert len(page(run).encode()) < 300_000
    assert problems(run) == []


def without(run: Run, is_absent: Callable[[str], bool]) -> Run:
    rows = tuple({name: value for name, value in row.items() if not is_absent(name)} for row in run.rows)
    return replace(run, rows=rows)


def test_what_an_earlier_release_did_not_measure_is_a_sentence(made: Run) -> None:
    old = without(made, lambda name: name.startswith(NEW) or "/ratio_p" in name or "/lost_" in name or "/m2" in name)
    found = views(old)
    assert [number for number in sorted(found) if not found[number].is_measured] == [2, 3, 8, 9, 10]
    missing = found[9].panels[0].missing
    assert missing.startswith("Not measured because no line of metrics.jsonl has staleness/nats_mean")
    assert problems(old) == [] and missing in re.sub("</?code>", "", page(old))


def test_the_page_of_a_warm_up_says_what_it_waits_for(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, MadeUp(steps=0)))
    for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10):
        missing = views(run)[number].panels[0].missing
        assert missing.startswith("Not measured because the policy has not been trained yet"), number
    assert views(run)[14].is_measured and views(run)[11].panels[0].plot is not None
    assert "Nothing is advised before five steps of the policy." in page(run) and problems(run) == []


def test_a_replayed_run_and_one_without_a_critic_say_so(made: Run) -> None:
    replayed = replace(made, config=config(learner=LearnerConfig(replay="runs/other")))
    replayed = without(
        replayed, lambda name: name.startswith(("actors/", "learner/", "queue/", "accuracy/", "time/pub"))
    )
    assert "the run replays a record" in views(replayed)[14].panels[0].missing
    assert "record of runs/other" in views(replayed)[15].panels[0].missing
    grpo = replace(made, config=config(algorithm=AlgorithmConfig(advantage=AdvantageEstimator.grpo)))
    grpo = without(grpo, lambda name: name.startswith("critic/"))
    assert views(grpo)[11].panels[0].missing == "Not measured because algorithm.advantage=grpo has no critic."


@pytest.mark.parametrize("correction", list(Correction))
def test_the_limits_of_every_correction_are_drawn_at_the_ratio(correction: Correction, made: Run) -> None:
    run = replace(made, config=config(algorithm=AlgorithmConfig(correction=correction)))
    plot = views(run)[3].panels[0].plot
    assert plot is not None
    num_limits = {"none": 0, "m2": 0, "decoupled": 1, "tis": 1}.get(correction, 2)
    assert sum(mark.name.startswith(("truncation", "mask", "1 ")) for mark in plot.marks) == num_limits
    assert problems(run) == []


def test_a_wide_bound_and_many_ages_stay_readable(tmp_path: Path) -> None:
    bound = 40
    made = MadeUp(config=config(staleness=StalenessConfig(max_staleness=bound)))
    folder = write_run(tmp_path, made)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "staleness/hist" in row:
            row["staleness/hist"] = {str(gap): 100.0 for gap in range(bound + 1)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    assert problems(run) == []
    plot = views(run)[4].panels[0].plot
    assert plot is not None and sum(mark.name.isdecimal() for mark in plot.marks) == 6, "of many ages some are drawn"


HOSTILE = '</title><script>alert("1")</script>&amp;\u202e'


def test_whatever_names_and_texts_hold_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    event: Row = {"step": 3, "time": 1.0, "kind": "alarm", "text": HOSTILE}
    made = MadeUp(config=config(name=HOSTILE.replace("/", "")), actors=[HOSTILE], events=[event])
    run = read_run(write_run(tmp_path / "run", made))
    text = page(replace(run, folder=tmp_path / "<script>"))
    assert "<script" not in text and "&lt;script&gt;" in text
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and "script" not in tags.seen


def drop_some(rows: list[Row], names: set[str], nulls: set[str]) -> list[Row]:
    return [
        {name: None if name in nulls else value for name, value in row.items() if name not in names} for row in rows
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_metrics_are_absent_the_page_and_the_text_are_written(
    made_once: Callable[[], Run], data: st.DataObject
) -> None:
    made = made_once()
    names = sorted(made.names - {"step", "time"})
    absent = data.draw(st.sets(st.sampled_from(names), max_size=len(names)))
    nulls = data.draw(st.sets(st.sampled_from(names), max_size=20))
    start = data.draw(st.integers(0, len(made.rows) - 1))
    rows = drop_some(list(made.rows[start:]), absent, nulls)
    run = replace(made, rows=tuple(rows))
    tags = Tags()
    text = page(run)
    tags.feed(text)
    assert tags.open == [] and problems(run) == []
    assert text.count('class="missing"') + text.count("<svg") == 23 and '<p class="missing"></p>' not in text


@pytest.mark.parametrize("is_json", [False, True])
def test_null_in_place_of_every_number_is_no_measurement(tmp_path: Path, is_json: bool) -> None:
    folder = write_run(tmp_path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    nothing = [{name: value if name in ("step", "time") else None for name, value in row.items()} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nothing))
    assert "not evaluated yet" in inspect([str(folder)], None, is_json) or is_json
    assert not any(view.is_measured for view in views(read_run(folder)).values())
