"""One golden file: its arrays, its constants, and what our numbers were compared with."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Arrays of smaller numbers are compared as if their largest were this.
FLOOR = 1e-6
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


@dataclass
class Comparison:
    """One number of ours against one of the file; an error above tolerance is a failure."""

    what: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass
class Golden:
    """An opened file: inputs come from ``tensor``, results go to ``close``, ``equal``, ``within``."""

    path: Path
    arrays: dict[str, np.ndarray]
    constants: dict[str, Any]
    comparisons: list[Comparison] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path) -> "Golden":
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return cls(path, arrays, json.loads(path.with_suffix(".json").read_text()))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, constant: str) -> Any:
        return self.constants[constant]

    def tensor(self, name: str) -> Tensor:
        """Return an array as a tensor of its own dtype."""
        self.used.add(name)
        return torch.from_numpy(np.array(self.arrays[name]))

    def with_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays whose names start with prefix, without it."""
        return {
            name.removeprefix(prefix): self.tensor(name) for name in self.arrays if name.startswith(prefix)
        }

    @property
    def tolerance(self) -> float:
        """The relative tolerance of this file: that of its least precise result."""
        kinds = {str(array.dtype) for name, array in self.arrays.items() if name.startswith("out_")}
        return TOLERANCES["float32" if "float32" in kinds else "float64"]

    def close(
        self, name: str, ours: Tensor | float | list[float] | None, want: Any = None, floor: float = FLOOR
    ) -> None:
        """Compare floats: largest difference relative to the largest number of the array (or floor)."""
        want = self.tensor(name) if want is None else torch.as_tensor(want, dtype=torch.float64)
        got = torch.as_tensor(float("nan") if ours is None else ours, dtype=torch.float64).detach()
        if got.shape != want.shape:
            self.comparisons.append(
                Comparison(f"{name} (shape {tuple(got.shape)})", float("inf"), self.tolerance)
            )
            return
        want = want.to(torch.float64)
        scale = max(float(want.abs().max()), floor) if want.numel() else 1.0
        error = float((got - want).abs().max()) / scale if want.numel() else 0.0
        self.comparisons.append(Comparison(name, error, self.tolerance))

    def equal(self, name: str, ours: Any, want: Any = None) -> None:
        """Compare integers, booleans or names: the error is the number of entries that differ."""
        want = self.tensor(name) if want is None else want
        if isinstance(want, Tensor):
            got = torch.as_tensor(ours)
            same_shape = got.shape == want.shape
            error = float((got.to(torch.int64) != want.to(torch.int64)).sum()) if same_shape else float("inf")
        else:
            error = float(ours != want)
        self.comparisons.append(Comparison(name, error, 0.0))

    def within(self, name: str, deviation: Tensor | float, limit: float) -> None:
        """Compare with a limit of its own, in whatever unit."""
        self.used.add(name)
        self.comparisons.append(Comparison(name, float(torch.as_tensor(deviation).max()), limit))

    def unused(self) -> list[str]:
        """Return the names of the arrays that no check has looked at."""
        return sorted(self.arrays.keys() - self.used)

    def worst(self) -> Comparison:
        """Return the comparison that fails, or is nearest to it."""

        def badness(comparison: Comparison) -> tuple[bool, float]:
            return not comparison.ok, comparison.error / comparison.tolerance if comparison.tolerance else 0.0

        return max(self.comparisons, key=badness)
