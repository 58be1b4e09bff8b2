"""What a verifier's module offers to the pool: the function and its optional companions."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from common.types import Verdict

VerifyFunction = Callable[[str, str, dict[str, Any]], Verdict]


@dataclass(frozen=True)
class Verifier:
    """A function from (response, reference, row) to a verdict, with other names of its module."""

    verify: VerifyFunction
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


def load_verifier(function: str) -> Verifier:
    """Returns the function named by "module:function", with the module's `warm_up` and INTERRUPTIBLE if it has them.

    Raises ValueError with one sentence when there is no such function.
    """
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
        verify: VerifyFunction = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'verifier.function "{function}" cannot be loaded ({error}); write "module:function" of a '
            "module on the Python path"
        ) from error
    if not callable(verify):
        raise ValueError(f'verifier.function "{function}" is a {type(verify).__name__}, not a function')
    interruptible = getattr(module, "INTERRUPTIBLE", ())
    if not isinstance(interruptible, tuple) or not all(isinstance(package, str) for package in interruptible):
        raise ValueError(f"{module_name}.INTERRUPTIBLE is {interruptible!r}; it must be a tuple of package names")
    return Verifier(verify, getattr(module, "warm_up", lambda module: None), interruptible)
