"""Which collective call this process is in: who hangs there does so whatever the call was for (a step, a save, a probe)."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_begun = 0
_now = ""


def collective(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Mark a function that returns when other ranks have called it too; it may not call another such function."""

    @functools.wraps(call)
    def marked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        global _begun, _now
        _begun += 1
        _now = str(_begun)
        try:
            return call(*args, **kwargs)
        finally:
            _now = ""

    return marked


def now() -> str:
    """Return which of its collective calls this process waits in, a number, or "" for none; of the main thread, for others."""
    return _now
