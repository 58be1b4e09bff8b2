"""Lazy imports (the parser, mpmath, sympy), once per pool: half a second and 60 MB that plain integers never pay.

In a worker that was forked before sympy was loaded, the import is not done there: HeavyImportNeeded goes up
to the worker's loop, the template process imports them once, and the answer is put again to a worker forked
after that. So the import never counts against an answer's time limit, and all workers share its memory.
"""

import importlib
import sys
from types import ModuleType

_is_deferred = False


class HeavyImportNeeded(Exception):
    """A verifier needs a module that this worker does not hold; the message is its name."""


def defer() -> None:
    """From now on this process raises HeavyImportNeeded instead of importing them itself."""
    global _is_deferred
    _is_deferred = True


def load(name: str) -> ModuleType:
    """Returns the module, imported now if need be. Raises HeavyImportNeeded in a worker that was forked without it."""
    if (module := sys.modules.get(name)) is not None:
        return module
    if _is_deferred:
        raise HeavyImportNeeded(name)
    return importlib.import_module(name)
