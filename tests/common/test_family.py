"""Who of a supervisor's descendants is an orphan."""

import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import common.family
from common.console import Console
from common.family import Family

# Starts a process when it reads a line, and says who it is.
PARENT = ["bash", "-c", "read && { sleep 1000 & echo $!; wait; }"]


@pytest.fixture
def parent() -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(PARENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    for child in psutil.Process(process.pid).children():
        child.kill()
    process.kill()
    process.communicate()


def test_what_a_living_child_starts_while_orphans_are_looked_for_is_none(
    parent: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier's template, an engine's process: an actor that starts must not lose it because another one died."""
    child: Any = SimpleNamespace(popen=parent, was_started=True, is_running=True)
    family = Family(lambda: [child], lambda request: None, None, Console())
    family._foreign.discard(parent.pid)
    born = list[int]()

    def and_then_one_is_born(look: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*arguments: Any) -> Any:
            found = look(*arguments)
            if not born:
                assert parent.stdin is not None and parent.stdout is not None
                print(file=parent.stdin, flush=True)
                born.append(int(parent.stdout.readline()))
            return found

        return looked

    for name in ("family", "descendants"):
        monkeypatch.setattr(common.family, name, and_then_one_is_born(getattr(common.family, name)))
    family.kill_orphans()
    assert psutil.Process(born[0]).status() != psutil.STATUS_ZOMBIE
