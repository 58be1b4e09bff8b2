"""The locked environments are what pyproject.toml asks for."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def locked(file: str) -> dict[str, str]:
    """{package: version} of a lock, every line of which must be NAME==VERSION."""
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize(("file", "extra"), [("cpu.lock", "cpu"), ("gpu.lock", "gpu")])
def test_a_lock_holds_what_the_project_asks_for(file: str, extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    versions = locked(file)
    for text in (*project["dependencies"], *extras[extra], *extras["dev"]):
        asked = Requirement(text)
        assert asked.specifier.contains(versions[canonicalize_name(asked.name)]), text


def test_both_locks_agree_where_both_know_a_package() -> None:
    """But for what one build of vLLM pins otherwise than the other."""
    cpu, gpu = locked("cpu.lock"), locked("gpu.lock")
    differ = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differ == {"apache-tvm-ffi"}
