"""Functions of tensors that take numpy arrays, too: how the public rooms hand out their functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any


def public(module: str, names: Mapping[str, str], name: str) -> Any:
    """Return the public ``name`` of a room, which is a function or a class of the file that ``names`` says.

    A function takes numpy arrays wherever it takes tensors. Raises AttributeError for another name, as Python expects.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"{module}.{names[name]}"), name)
    return found if isinstance(found, type) else taking_arrays(found)


def taking_arrays(function: Callable) -> Callable:
    """Return the function with every numpy array among its arguments turned into a tensor that shares its memory."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(
            *map(_as_tensors, args), **{name: _as_tensors(value) for name, value in kwargs.items()}
        )

    return wrapper


def _as_tensors(value: Any) -> Any:
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if type(value) in (list, tuple):  # views of several resolutions
        return type(value)(map(_as_tensors, value))
    return value
