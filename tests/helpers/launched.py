"""Ranks on CPUs as the line in the documents starts them, and the comparison of what they wrote."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "dist"  # bodies of the rank tests


def launch_line(page: Path = ROOT / "docs" / "several-gpus.md") -> tuple[dict[str, str], list[str]]:
    """Environment and command, up to the script, of the line in the documents that starts N ranks on CPUs.

    A port is added, any free one: tests run side by side.
    """
    found = re.search(
        r"^(ACCELERATE_USE_CPU=true accelerate launch .*?) launch/pretrain.py",
        page.read_text(),
        re.MULTILINE,
    )
    assert found, "the page no longer shows how to start ranks on CPUs"
    words = shlex.split(found[1])
    environment = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    command = [word for word in words if "=" not in word or word.startswith("-")]
    command[0] = str(Path(sys.executable).parent / command[0])
    return environment, [*command, "--main_process_port", "0"]


def warm_launch_line() -> tuple[dict[str, str], list[str]]:
    """As above, but the ranks that it starts need no time for their imports."""
    environment, command = launch_line()
    return environment | {"PYTHON_EXEC": warm_python()}, command


def run(command: list[str], extra: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(extra or {})}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def compare(
    one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 1e-9, floor: float = 1e-12
) -> int:
    for name, tensor in one.items():
        assert tensor.dtype == torch.float64, name
        error = (tensor - two[name]).abs().max() / tensor.abs().max().clamp_min(floor)
        assert error < tolerance, f"{name}: {error:.1e}"
    return len(one)
