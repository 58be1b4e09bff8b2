"""Every call that can wait has a row in docs/waits.md, and every row has such a call.

A call is known by how it is written: by WAITS, less NO_WAITS. Its key is its function and its words, never a line.
"""

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
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
    r"fcntl\.\w+|.*\.acquire|with .*": "a lock, a semaphore, a condition, whatever its name",
    r"dist\.\w+|.*\.(full_tensor|barrier)|distribute_tensor|init_device_mesh|TCPStore": "other ranks",
    r"dcp\.(save|async_save|load)": "other ranks, and the disk",
    r".*\.synchronize": "the device",
    r"socket\.getaddrinfo|snapshot_download": "a name server, the Hub",
    r".*\.(term|shutdown)|.*authenticator\.(start|stop)|\w+PoolExecutor": "the end of what is closed, a thread",
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
    r"connection\.shutdown|logging\.shutdown": "tells the kernel; writes what there is",
    r"with (file|connection|end)": "closes it",
    # Ours; where they wait is found in themselves.
    r"with (pool|observer|service|self\._family|nullcontext\(\) if .*)": "ours",
    r".*(_coordinator|_receiver|_control|ledger|counts)\.\w+|self\._session\.accept": "ours",
    r"socket\.send|(worker|socket)\.receive": "ours",
    r"observer\.wait|feed\.join|self\.(checkpointer\.)?wait|(self|publisher)\.shutdown": "ours",
}
SETTING = r"[a-z]+\.[a-z_]+"
CONSTANT = r"_?[A-Z][A-Z_]+"
NO_LIMITS = ("--timeout", "to_thread", "wait", "wait_for")  # in the last column, besides
Assigns = ast.Assign | ast.AnnAssign
AT_ONCE = ("NOBLOCK", "WNOHANG", "LOCK_NB")  # in the arguments: it does not wait


@dataclass(frozen=True, kw_only=True)
class Row:
    """Of the table."""

    functions: list[str]  # path:qualified name
    calls: list[str]
    limit: str  # the last column


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
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
        (f"{file.relative_to(ROOT)}:{function}", words) for file in FILES for function, words in found(tree_of(file))
    }


def test_every_wait_is_a_row_and_every_row_is_a_wait() -> None:
    written = [(function, call) for row in rows() for function in row.functions for call in row.calls]
    assert len(written) == len(set(written)), "a wait has two rows"
    found_waits = waits()
    assert sorted(found_waits - set(written)) == [], "waits without a row in docs/waits.md"
    assert sorted(set(written) - found_waits) == [], "rows of docs/waits.md without a wait in the code"


@cache
def settings() -> set[str]:
    sections = get_type_hints(Config)
    return {
        f"{section}.{field.name}" for section, kind in sections.items() if is_dataclass(kind) for field in fields(kind)
    }


def module_with(stem: str, constant: str) -> Path | None:
    """The one file of that name that holds the constant."""
    files = [file for file in FILES if file.stem == stem and constant in names_in(file).own]
    return files[0] if len(files) == 1 else None


@dataclass(frozen=True)
class Names:
    """Of constants, in one file."""

    own: frozenset[str]  # given a value at its top
    imported: frozenset[tuple[str, str]]  # module, name
    used: frozenset[str]

    @property
    def known(self) -> set[str]:
        return {*self.own, *(name for _, name in self.imported)}


@cache
def names_in(file: Path) -> Names:
    tree = tree_of(file)
    top = [node for statement in tree.body for node in ast.walk(statement) if isinstance(statement, Assigns)]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return Names(
        own=frozenset(n.id for n in top if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)),
        imported=frozenset((node.module or "", alias.name) for node in imports for alias in node.names),
        used=frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)),
    )


def is_used(name: str, file: Path) -> bool:
    """Whether anything in `file`, or in one that has `name` from there, depends on it."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    users = [names_in(user) for user in FILES if user == file or (module, name) in names_in(user).imported]
    return any(name in user.used for user in users)


def refusal(name: str, files: Collection[Path], functions: Collection[str]) -> str | None:
    """Why a reader of a row about functions in `files` could not tell what `name` is; None if it is plain.

    A constant stands alone where those files hold it, else behind the name of the one file that does. `functions` are
    those that have rows.
    """
    if re.fullmatch(SETTING, name):
        return None if name in settings() else f"{name} is no setting"
    if re.fullmatch(CONSTANT, name):
        lacking = [file.stem for file in files if name not in names_in(file).known or not is_used(name, file)]
        return f"{', '.join(lacking) or 'prose'} knows no {name}" if lacking or not files else None
    if re.fullmatch(rf"\w+\.{CONSTANT}", name):
        stem, _, constant = name.partition(".")
        file = module_with(stem, constant)
        is_there = file is not None and is_used(constant, file)
        return None if is_there else f"{stem} does not say what {constant} is"
    if name in functions or name in NO_LIMITS:
        return None
    return f"{name} is nothing that a limit can name"


def test_what_a_limit_names_is_known_where_its_row_waits() -> None:
    """A constant of the same name in another file is another one."""
    functions = {function.partition(":")[2] for row in rows() for function in row.functions}
    refused = [
        f"{row.functions[0]}: {problem}"
        for row in rows()
        for name in code_in(row.limit)
        if (problem := refusal(name, {ROOT / f.partition(":")[0] for f in row.functions}, functions)) is not None
    ]
    assert refused == []


def test_every_limit_says_something() -> None:
    """A name in the code, a number, whose limit it is; or that there is none, and what ends it then."""
    words = r"`|\d+ s|^at once$|group's limit|group that is given|what the caller says"
    without = r"^None( here| as a whole| before the first)?: "
    assert [row.limit for row in rows() if not re.search(f"{words}|{without}", row.limit)] == []


def test_prose_names_settings_and_constants_that_exist() -> None:
    prose = [line for line in PAGE.read_text().splitlines() if not line.startswith("| ")]
    names = [name for line in prose for name in code_in(line) if re.fullmatch(rf"{SETTING}|(\w+\.)?{CONSTANT}", name)]
    assert [problem for name in names if (problem := refusal(name, (), ())) is not None] == []


@pytest.mark.parametrize(
    ("name", "file", "problem"),
    [
        ("STOP_S", "common/processes.py", None),
        ("STOP_S", "common/family.py", "family knows no STOP_S"),
        ("processes.STOP_S", "common/family.py", None),
        ("service.STOP_S", "common/family.py", None),
        ("family.STOP_S", "common/family.py", "family does not say what STOP_S is"),
        ("LINGER_MS", "learner/rollouts/service.py", None),  # imported
        ("weights.timeout_s", "common/family.py", None),
        ("weights.time_out_s", "common/family.py", "weights.time_out_s is no setting"),
        ("SOON", "common/family.py", "family knows no SOON"),
        ("soon", "common/family.py", "soon is nothing that a limit can name"),
    ],
)
def test_whether_a_limit_is_known(name: str, file: str, problem: str | None) -> None:
    assert refusal(name, {ROOT / file}, ()) == problem


def test_each_exclusion_is_needed() -> None:
    nodes = [node for file in FILES for node in ast.walk(tree_of(file))]
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
        ("async with self._places: pass", ["with self._places"]),
        ("with gate, door: pass", ["with gate", "with door"]),
        ("with connection: pass", []),
        ("authenticator.start()", ["authenticator.start"]),
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
