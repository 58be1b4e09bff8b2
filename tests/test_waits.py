"""Every call that can wait has a row in docs/waits.md, and every row has such a call.

A call is known by how it is written: by WAITS, less NO_WAITS. Its key is its function and its words, never a line.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from common.config import Config

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "waits.md"
FILES = [
    ROOT / "run.py",
    *sorted(file for part in ("actors", "common", "learner") for file in (ROOT / part).rglob("*.py")),
]

# The whole of a call without its arguments -> what it waits for. Without a call there are `await x` and `with x`.
WAITS = {
    r"(time|asyncio)\.sleep": "a time, mostly between two looks at something",
    r"asyncio\.(wait|wait_for|gather|timeout|open_connection|create_subprocess_exec)": "tasks, processes",
    r"asyncio\.(run|to_thread)": "tasks and threads",
    r"await [\w.]+": "a task or future",
    r".*\.(wait|wait_\w+|waitpid|result|take_batch|communicate)|subprocess\.(run|check_\w+)": "who has to act or end",
    r".*\.join": "a thread or process",
    r"await .*\.get|.*queue\w*\.get": "something in a queue",
    r".*\.(poll|select)": "sockets and pipes",
    r".*\.(recv\w*|receive|readline|accept|connect)|recv_monitor_message|os\.read|.*\.stdout\.read": "a peer",
    r".*\.(sendall|send_multipart)|.*(socket|channel|waker)\.send|write_all": "room on the way to a peer",
    r"fcntl\.\w+|.*\.acquire|with .*(lock|changed|limit)": "a lock or semaphore",
    r"dist\.\w+|.*\.(full_tensor|barrier)|distribute_tensor|init_device_mesh|TCPStore": "other ranks",
    r"dcp\.(save|async_save|load)": "other ranks, and the disk",
    r".*\.synchronize": "the device",
    r"socket\.getaddrinfo|snapshot_download": "a name server, the Hub",
    r".*\.(term|shutdown)|.*authenticator\.stop|\w+PoolExecutor": "the end of what is closed",
    r"self\._llm\.[\w.]+": "vLLM's engine core",
}
NO_WAITS = {
    r"b?['\"].*|os\.pathsep\.join": "joins strings",
    r"dist\.(get_\w+|is_\w+)|self\._llm\.get_tokenizer": "tells what it knows",
    r"select\.poll|.*popen\.poll": "makes a poller; looks",
    r".*\b(batch|experience)\.select|OmegaConf\.select": "chooses from data at hand",
    r"self\.(accept|term)": "of a parser",
    r"finished\.result|self\.evaluation\.result": "of what is done",
    r"channel\.connect|probe\.connect": "ZeroMQ connects in the background, a datagram socket only notes the address",
    r"connection\.shutdown": "tells the kernel",
    # Ours; where they wait is found in themselves.
    r".*(_coordinator|_receiver|_control|ledger|counts)\.\w+|self\._session\.accept": "ours",
    r"socket\.send|(worker|socket)\.receive": "ours",
    r"observer\.wait|feed\.join|self\.(checkpointer\.)?wait|(self|publisher)\.shutdown": "ours",
}
AT_ONCE = ("NOBLOCK", "WNOHANG", "LOCK_NB")  # in the arguments: it does not wait


@dataclass(frozen=True, kw_only=True)
class Row:
    """Of the table."""

    functions: list[str]  # path:qualified name
    calls: list[str]
    limit: str  # the last column


def rows() -> list[Row]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 5 and row[0] and row[1] and row[2] and row[4] for row in cells)
    return [Row(functions=code_in(row[0]), calls=code_in(row[1]), limit=row[4]) for row in cells]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def matches(patterns: dict[str, str], words: str) -> bool:
    return any(re.fullmatch(pattern, words) for pattern in patterns)


def can_wait(words: str) -> bool:
    return matches(WAITS, words) and not matches(NO_WAITS, words)


def words_of(node: ast.AST) -> list[str]:
    """What `node`, its children left aside, could wait in; `await x.get` stands for that call."""
    match node:
        case ast.Await(value=ast.Call(func=function)):
            return [f"await {ast.unparse(function)}"] if ast.unparse(function).endswith(".get") else []
        case ast.Await(value=value):
            return [f"await {ast.unparse(value)}"]
        case ast.Call(func=function) as call:
            words = ast.unparse(function)
            return [words] if matches(WAITS, words) and not is_at_once(call) else []
        case ast.With(items=items) | ast.AsyncWith(items=items):
            opened = [item.context_expr for item in items]
            return [f"with {ast.unparse(value)}" for value in opened if not isinstance(value, ast.Call)]
    return []


def is_at_once(call: ast.Call) -> bool:
    arguments = [ast.unparse(value) for value in (*call.args, *(keyword.value for keyword in call.keywords))]
    return arguments == ["0"] or any(flag in text for flag in AT_ONCE for text in arguments)


def found(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """(qualified function, words) of everything in `tree` that can wait."""
    for node in ast.iter_child_nodes(tree):
        inner = function
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{function}.{node.name}".removeprefix(".")
        yield from ((function, shown(words)) for words in words_of(node) if can_wait(words))
        yield from found(node, inner)


def shown(words: str) -> str:
    """On one line: arguments left out, and `await` before a call."""
    bare = re.sub(r"\(.*\)", "()", words, flags=re.DOTALL)
    return bare.removeprefix("await ") if bare.endswith(".get") else bare


def waits() -> set[tuple[str, str]]:
    return {
        (f"{file.relative_to(ROOT)}:{function}", words)
        for file in FILES
        for function, words in found(ast.parse(file.read_text()))
    }


def test_every_wait_is_a_row_and_every_row_is_a_wait() -> None:
    written = [(function, call) for row in rows() for function in row.functions for call in row.calls]
    assert len(written) == len(set(written)), "a wait has two rows"
    found_waits = waits()
    assert sorted(found_waits - set(written)) == [], "waits without a row in docs/waits.md"
    assert sorted(set(written) - found_waits) == [], "rows of docs/waits.md without a wait in the code"


def test_a_limit_names_settings_and_constants_that_exist() -> None:
    sections = get_type_hints(Config)
    settings = {
        f"{section}.{field.name}" for section, kind in sections.items() if is_dataclass(kind) for field in fields(kind)
    }
    code = "\n".join(file.read_text() for file in FILES)
    constants = set(re.findall(r"^([A-Z_]+) = ", code, re.MULTILINE))
    named = {name for row in rows() for name in code_in(row.limit)}
    assert {name for name in named if re.fullmatch(r"[a-z]+\.[a-z_]+", name)} <= settings
    assert {
        name for name in named if re.fullmatch(r"_?[A-Z][A-Z_]+", name) and not name.startswith("VLLM_")
    } <= constants


def test_each_exclusion_is_needed() -> None:
    nodes = [node for file in FILES for node in ast.walk(ast.parse(file.read_text()))]
    words = {words for node in nodes for words in words_of(node) if matches(WAITS, words)}
    assert [pattern for pattern in NO_WAITS if not any(re.fullmatch(pattern, each) for each in words)] == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("time.sleep(1)", ["time.sleep"]),
        ("await self._phases.get()", ["self._phases.get"]),
        ("settings.get('key')", []),
        ("await future", ["await future"]),
        ("await self._engine.pause()", []),
        ("async with self._start_lock: pass", ["with self._start_lock"]),
        ("', '.join(names)", []),
        ("thread.join(3)", ["thread.join"]),
        ("os.waitpid(pid, 0)", ["os.waitpid"]),
        ("os.waitpid(pid, os.WNOHANG)", []),
        ("stream(device).synchronize()", ["stream().synchronize"]),
        ("dist.all_reduce(sums, group=group)", ["dist.all_reduce"]),
        ("dist.get_rank()", []),
        ("torch.gather(a, 1, b)", []),
        ("async for output in self._llm.generate(prompt): pass", ["self._llm.generate"]),
    ],
)
def test_what_is_told_to_wait(code: str, expected: list[str]) -> None:
    tree = ast.parse(f"async def function():\n    {code}")
    assert list(found(tree)) == [("function", words) for words in expected]
