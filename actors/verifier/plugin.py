"""What a verifier's module offers to the pool: the function and its optional companions."""

import importlib
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from common.types import AnswerForm

VerifyFunction = Callable[[str, str, dict[str, Any]], Any]  # what it may return: judgement.CONTRACT


@dataclass(frozen=True)
class Verifier:
    """A function of (response, reference, row), with other names of its module."""

    verify: VerifyFunction
    is_async: bool  # its answers are awaited, many at once in one worker
    correct_from: float  # a number that it returns is the reward, and CORRECT from here on
    warm_up: Callable[[str], None]  # called in the template with a heavy module that it has just loaded
    interruptible: tuple[str, ...]  # INTERRUPTIBLE: packages whose code may be interrupted anywhere and used again

    def survives(self, trace: TracebackType | None) -> bool:
        """Whether an exception that came up through `trace` passed only through code that may be interrupted."""
        packages = (__package__, *self.interruptible)
        while trace is not None:
            module = str(trace.tb_frame.f_globals.get("__name__", ""))
            if not any(module == package or module.startswith(f"{package}.") for package in packages):
                return False
            trace = trace.tb_next
        return True


def load_verifier(function: str, correct_from: float, answer_form: AnswerForm = AnswerForm.EXACT) -> Verifier:
    """Returns the function named by "module:function", with the module's `warm_up` and INTERRUPTIBLE if it has them.

    A function with a keyword `answer_form` is called with that setting. Raises ValueError with one sentence when there
    is no such function, or when the setting has no use with it.
    """
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
        verify: VerifyFunction = getattr(module, name)
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        raise ValueError(
            f'verifier.function "{function}" cannot be loaded ({_reason(error)}); write "module:function" of a '
            "module on the Python path"
        ) from error
    if not callable(verify):
        raise ValueError(f'verifier.function "{function}" is a {type(verify).__name__}, not a function')
    _check_signature(verify, function)
    is_async = inspect.iscoroutinefunction(verify) or inspect.iscoroutinefunction(type(verify).__call__)
    if "answer_form" in _parameters(verify):
        verify = partial(verify, answer_form=answer_form)
    elif answer_form is not AnswerForm.EXACT:
        raise ValueError(
            f'verifier.answer_form is "{answer_form}", but {function} has no keyword answer_form; leave the setting out'
        )
    interruptible = getattr(module, "INTERRUPTIBLE", ())
    if not isinstance(interruptible, tuple) or not all(isinstance(package, str) for package in interruptible):
        raise ValueError(f"{module_name}.INTERRUPTIBLE is {interruptible!r}; it must be a tuple of package names")
    if is_async and interruptible:
        raise ValueError(f"{module_name}.INTERRUPTIBLE has no use: {name} is async, and nothing interrupts it")
    warm_up = getattr(module, "warm_up", lambda module: None)
    return Verifier(verify, is_async, correct_from, warm_up, interruptible)


def _check_signature(verify: VerifyFunction, function: str) -> None:
    try:
        signature = inspect.signature(verify)
    except (TypeError, ValueError):  # written in C: the first call will tell
        return
    try:
        form = {"answer_form": AnswerForm.EXACT} if "answer_form" in signature.parameters else {}
        signature.bind("response", "reference", {}, **form)
    except TypeError as error:
        name = function.partition(":")[2]
        raise ValueError(
            f'verifier.function "{function}" is {name}{signature}, but it is called as {name}(response, reference, '
            f"row): {error}"
        ) from error


def _parameters(function: VerifyFunction) -> tuple[str, ...]:
    """The names of a function's parameters; none of a built-in that does not tell."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _reason(error: BaseException) -> str:
    """The exception on one line, with the file and line that it is about."""
    if isinstance(error, SyntaxError):
        text, path, line = error.msg, error.filename, error.lineno
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text, path, line = " ".join(str(error).split()), frame.filename, frame.lineno
    # A module or name that is not there says so itself; the line where that was noticed is ours.
    is_ours = path is None or path == __file__ or path.startswith("<frozen importlib") or "/importlib/" in path
    where = "" if is_ours else f" in {str(path).rpartition('/')[2]} line {line}"
    return f"{type(error).__name__}: {text}{where}"
