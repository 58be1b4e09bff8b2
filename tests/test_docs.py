"""The documentation against the code: links, commands and who runs them, settings, and the sentences that it quotes."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from common.catalogue.views import VIEWS
from common.commandline import parse
from common.config import Config
from common.loading import RECIPES, load_config

ROOT = RECIPES.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
OPTION = re.compile(r"\[[^\]]*\]")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = outside_code(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def outside_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", outside_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Our own commands in blocks of code, with their page: what stands after run.py, placeholders included."""
    for page in PAGES:
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), flags=re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:python run\.py|^async-vapo|torchrun.* run\.py) (.*)", OPTION.sub("", line))
                if found and "..." not in line and "$" not in found[1]:
                    yield page.name, shlex.split(found[1], comments=True)


COMMANDS = list(commands())


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[f"{n}-{w[0]}" for n, w in COMMANDS])
def test_a_command_is_one_that_the_program_takes(words: list[str]) -> None:
    """Its options are parsed and its settings merged and validated; nothing is started."""
    arguments = parse(words)
    recipes = arguments.config if isinstance(getattr(arguments, "config", None), list) else []
    if not recipes or any(not (RECIPES / f"{name}.yaml").is_file() for name in recipes):
        return  # files that the reader has to bring
    places = [w for w in arguments.overrides if re.match(r"(model\.(critic_)?path|transport\.keys)=", w)]
    settings = [word for word in arguments.overrides if word not in places]
    base = f"model.path={RECIPES / 'models' / 'number_walk'}"
    sizes = ["device=cpu", "model.dtype=float32", "weights.backend=auto", "actors.placement=auto"]
    if any("qwen" in name or name in ("vapo", "ppo", "grpo", "dapo", "eval_aime24", "one_gpu") for name in recipes):
        sizes += ["rollout.max_tokens=64", "model.max_model_len=128", "reward.overlong_penalty=false"]
    load_config(recipes, [base, *settings, *sizes])


# Who runs a command that stands in a block of code: a test, at whatever size, or why none does. Programs of ours are
# written without `python run.py` and `async-vapo`. The first pattern that begins the command counts.
RUN_BY = {
    r"make (install-gpu|clean && make install-gpu|gpu-check)": "GPU",
    r"make demo": "takes 7 minutes",
    r"make test": "takes 25 minutes",
    r"\.|tensorboard": "not ours",
    r"git|pip install": "network",
    r"sbatch|scancel|docker|kubectl": "cluster",
    r"sky jobs launch more\.yaml": (
        "tests/deploy/test_skypilot.py::test_more_actors_are_a_job_of_their_own_as_the_page_says"
    ),
    r"torchrun": "tests/test_multinode.py::test_two_ranks_and_two_actors_on_four_hosts",
    r"train .*device=cuda|train -c (one_gpu|vapo_qwen)|eval .* -c eval_aime24": "GPU",
    r"train --resume": (
        "tests/test_end_to_end.py::test_ctrl_c_saves_and_stops_everything_and_the_run_goes_on_on_two_ranks"
    ),
    r"train --replay|train .*learner\.record": (
        "tests/test_elastic.py::test_what_that_run_has_trained_is_replayed_by_command_bit_for_bit"
    ),
    r"train .*(name=critic|critic_path)|export .*--critic": (
        "tests/test_kill_and_resume.py::test_a_critic_is_trained_alone_exported_and_started_from"
    ),
    r"train .*task\.name=file": "tests/test_end_to_end.py::test_tied_embeddings_and_a_data_file",
    r"train .*transport\.keys=KEYS": "tests/test_elastic.py::test_actors_outlive_the_death_of_one_of_two_ranks_too",
    r"train -c (demo|number_walk)": "takes 4 minutes",
    r"check": "tests/common/test_launcher.py::test_check_says_what_a_run_would_use_and_keeps_it_where_it_is_told",
    r"plan": "tests/learner/planning/test_command.py::test_the_text_says_it_all",
    r"actors": (
        "tests/test_elastic.py::test_actors_are_added_and_removed_by_command_and_without_any_a_run_waits_for_the_next"
    ),
    r"actor .*--keys": "tests/test_elastic.py::test_actors_outlive_the_death_of_one_of_two_ranks_too",
    r"actor ": "tests/test_multinode.py::test_two_ranks_and_two_actors_on_four_hosts",
    r"keygen": "tests/test_command_line.py::test_keys_are_made_once",
    r"signal": "tests/test_signal.py::test_the_table_of_a_run_and_again_without_sampling",
    r"show": "tests/common/test_show.py::test_in_a_terminal_keys_turn_pages_and_the_terminal_is_left_as_it_was",
    r"top": "tests/test_stop.py::test_a_learner_that_is_asked_to_stop_finishes_its_step_saves_and_sends_actors_home",
    r"inspect .*--html": "tests/common/report/test_inspect.py::test_html_is_written_and_named",
    r"inspect .*--json": (
        "tests/common/report/test_inspect.py::test_json_has_the_summary_the_advice_and_what_was_measured"
    ),
    r"inspect \S+ \S+": "tests/common/report/test_compare.py::test_text_json_and_page_have_all_runs_and_what_differs",
    r"inspect": "tests/common/report/test_inspect.py::test_the_text_has_intervals_members_waste_and_advice",
    r"eval": "tests/actors/evaluation/test_documentation.py::test_a_command_of_the_page",
    r"export .*--adapter": "tests/learner/test_export.py::test_an_adapter_alone_is_exported_as_peft_loads_it",
    r"export": "tests/learner/test_export.py::test_the_step_that_is_asked_for_is_exported_or_else_the_newest",
    r"grade .*--answer-form": (
        "tests/common/test_launcher.py::test_grade_wants_the_form_of_training_where_it_is_told_so"
    ),
    r"grade": "tests/common/test_launcher.py::test_grade_prints_a_verdict_per_case",
    r"python benchmarks/picture\.py": (
        "tests/benchmarks/test_picture.py::test_a_view_is_written_as_a_file_that_needs_nothing_else"
    ),
    r"python benchmarks/fuzz\.py": (
        "tests/common/test_fuzz.py::test_mutated_messages_are_refused_and_take_little_memory"
    ),
    r"python benchmarks/transport\.py": (
        "tests/benchmarks/test_transport.py::test_simulated_actors_are_served_by_the_service_itself"
    ),
    r"python benchmarks/weights\.py": (
        "tests/benchmarks/test_weights.py::test_a_publication_and_a_join_are_measured_and_the_join_costs_the_others_nothing"
    ),
    r"python benchmarks/learner\.py": "takes 10 minutes",
    r"python benchmarks/gradient_signal\.py": "takes 5 minutes",
    r"python benchmarks/actor\.py": "takes 6 minutes",
    r"python benchmarks/scaling\.py": "takes 6 minutes",
    r"python benchmarks/(overlap|trl_side_by_side|long_task)\.py": "takes 25 minutes",
    r"python benchmarks/(demo|old_batches|smollm2)\.py": "takes 60 minutes",
    r"python benchmarks/(age|ablations)\.py": "takes 120 minutes",
}
REASON = re.compile(r"GPU|cluster|network|not ours|takes \d+ minutes")
PROGRAM = re.compile(
    r"(\.|async-vapo|docker|git|hf|kubectl|make|pip|python3?|sbatch|scancel|sky|sudo|tensorboard|torchrun) "
)


def lines_of_commands() -> Iterator[tuple[str, str]]:
    """What stands in blocks of code and begins with a program, with its page."""
    for page in PAGES:
        for language, block in re.findall(r"^```([a-z]*)\n(.*?)^```", page.read_text(), flags=re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines() if not language else ():
                words = " ".join(re.sub(r"\s#.*|^host\d\$ |[A-Z_]+=\S+ (?=python)", "", line).split())
                if PROGRAM.match(words):
                    yield page.name, re.sub(r"^(async-vapo|python run\.py) ", "", words)


def run_by(command: str) -> str | None:
    """The pattern of RUN_BY that counts."""
    return next((pattern for pattern in RUN_BY if re.match(pattern, command)), None)


def test_every_command_is_run_by_a_test_or_it_is_known_why_not() -> None:
    found = {(page, command): run_by(command) for page, command in lines_of_commands()}
    assert [f"{page}: {command}" for (page, command), pattern in found.items() if pattern is None] == []
    assert set(RUN_BY) - set(found.values()) == set(), "patterns of commands that no page has"


@pytest.mark.parametrize("by", sorted(set(RUN_BY.values())))
def test_the_test_that_runs_a_command_exists(by: str) -> None:
    file, _, name = by.partition("::")
    assert REASON.fullmatch(by) or f"def {name}(" in (ROOT / file).read_text()


def settings_of(kind: Any, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        yield prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from settings_of(hints[field.name], f"{prefix}{field.name}.")


SETTINGS = set(settings_of(Config))
SECTIONS = {name for name in SETTINGS if any(other.startswith(f"{name}.") for other in SETTINGS)}
REFUSED = {"rollout.top_p", "rollout.top_k", "lora.dropout"}  # named to say that they do not exist


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_setting_that_is_named_exists(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", outside_code(page)):
        name = code.partition("=")[0].strip()
        section, _, rest = name.partition(".")
        is_setting = section in SECTIONS and re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)*", rest)
        if is_setting and not rest.endswith(("py", "md", "yaml", "key", "key_secret", "lock")):
            is_free = name.startswith("task.chat_template_kwargs.")
            assert is_free or name in SETTINGS | REFUSED, f"{page.name}: {code}"


def test_the_sentences_that_troubleshooting_quotes_are_said() -> None:
    """What stands between quotation marks, piece by piece: N, M and ... stand for anything."""
    said = "\n".join(
        file.read_text() for part in ("actors", "common", "learner") for file in (ROOT / part).rglob("*.py")
    )
    said = re.sub(r'"\s*\n\s*f?r?"', "", said + (ROOT / "run.py").read_text())
    quoted = re.findall(r'"([^"\n]+)"', (ROOT / "docs" / "troubleshooting.md").read_text())
    pieces = [piece.strip() for quote in quoted for piece in re.split(r"\.\.\.|\bN\b|\bM\b|\d+", quote)]
    assert len(quoted) > 8
    assert [piece for piece in pieces if piece.strip(" :,.") and piece.strip(" :,.") not in said] == []


def test_the_page_about_staleness_reads_every_view_under_its_name() -> None:
    headings = re.findall(r"^### View (\d+): (.+)$", (ROOT / "docs" / "staleness.md").read_text(), flags=re.M)
    assert headings == [(str(number), view.name) for number, view in VIEWS.items()]
