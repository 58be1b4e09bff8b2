"""Lazy import of sympy, once per pool: it costs half a second and 60 MB, which plain integers never pay.

In a worker that was forked before sympy was loaded, the import is not done there: HeavyImportNeeded goes up
to the worker's loop, the template process imports sympy once, and the answer is put again to a worker forked
after that. So the import never counts against an answer's time limit, and all workers share its memory.
"""

import sys
from types import ModuleType

_is_deferred = False


class HeavyImportNeeded(Exception):
    """A verifier needs modules that this worker does not hold; the template should call the verifier's
    `warm`."""


def defer() -> None:
    """From now on this process raises HeavyImportNeeded instead of importing sympy itself."""
    global _is_deferred
    _is_deferred = True


def load_sympy() -> ModuleType:
    """Returns sympy. Raises HeavyImportNeeded in a worker whose template has not loaded it."""
    if _is_deferred and "sympy" not in sys.modules:
        raise HeavyImportNeeded
    import sympy

    return sympy
