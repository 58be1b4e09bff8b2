"""The documentation against the code: links, commands, settings, and the sentences that it quotes."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from common.config import Config
from common.loading import RECIPES, load_config
from run import _parse

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
    arguments = _parse(words)
    recipes = arguments.config if isinstance(getattr(arguments, "config", None), list) else []
    if not recipes or any(not (RECIPES / f"{name}.yaml").is_file() for name in recipes):
        return  # files that the reader has to bring
    places = [w for w in arguments.overrides if re.match(r"(model\.(critic_)?path|transport\.keys)=", w)]
    settings = [word for word in arguments.overrides if word not in places]
    base = f"model.path={RECIPES / 'models' / 'number_walk'}"
    sizes = ["device=cpu", "model.dtype=float32"]
    if any("qwen" in name or name in ("vapo", "ppo", "grpo", "dapo", "eval_aime24") for name in recipes):
        sizes += ["rollout.max_tokens=64", "model.max_model_len=128", "reward.overlong_penalty=false"]
    load_config(recipes, [base, *settings, *sizes])


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
