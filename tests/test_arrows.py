"""Which file may import which: run -> actors | learner -> common, and common stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("actors", "learner", "common")
MAY_IMPORT = {"common": {"common"}, "actors": {"actors", "common"}, "learner": {"learner", "common"}}
# Inside the learner: main -> loop -> publication -> networks -> algorithm, leader -> rollouts, planning -> rollouts,
# never back. Modules that are not named here (main, loop, the commands export and prepare) may import anything in it.
IN_LEARNER = {
    "algorithm": {"algorithm"},
    "networks": {"networks", "algorithm"},
    "publication": {"publication", "networks", "algorithm"},
    "rollouts": {"rollouts"},
    "planning": {"planning", "rollouts"},
    "signal": {"signal", "algorithm", "networks", "rollouts", "checkpoint", "export"},
    "checkpoint": {"algorithm", "agreement", "checksums", "files"},
    "leader": {"rollouts"},
}
HEAVY = {"torch", "vllm", "transformers", "tensorboard", "sympy"}
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
COMMON_MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "common").rglob("*.py")
)


def imported_modules(file: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import statement in `file`, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} line {node.lineno}: imports are absolute here"
            yield node.module or "", node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_arrows(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    ours = {*PACKAGES, "run", "tests", "benchmarks"}
    wrong = [
        f"line {line} imports {module}"
        for module, line in imported_modules(file)
        if module.split(".")[0] in ours - MAY_IMPORT[package]
    ]
    assert not wrong


@pytest.mark.parametrize("room", IN_LEARNER)
def test_imports_inside_the_learner_follow_the_arrows(room: str) -> None:
    path = ROOT / "learner" / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} line {line} imports {module}"
        for file in files
        for module, line in imported_modules(file)
        if module.split(".")[0] == "learner" and [*module.split("."), ""][1] not in IN_LEARNER[room]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not inside functions, where a circle would only be hidden."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    sorter = TopologicalSorter({name: _our_modules(file, names) - {name} for name, file in names.items()})
    sorter.prepare()  # raises CycleError, which names the circle


def _our_modules(file: Path, names: dict[str, Path]) -> set[str]:
    """The modules among `names` that `file` imports, `from package import module` included."""
    found = {module for module, _ in imported_modules(file)}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & names.keys()


def test_common_loads_nothing_heavy() -> None:
    code = f"import sys, {', '.join(COMMON_MODULES)}; print(*sorted({HEAVY} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys, run
try:
    run.main(["--help"])
except SystemExit:
    print(*sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "train" in result.stdout
    assert (result.returncode, result.stderr.strip()) == (0, "")


def test_help_answers_in_under_a_second_of_processor_time() -> None:
    """Processor time, because another test may keep the core busy."""
    code = "import resource, subprocess, sys; subprocess.run([sys.executable, 'run.py', '--help'], check=True); "
    code += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert float(result.stdout.splitlines()[-1]) < 1.0
