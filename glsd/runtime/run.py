"""The run folder: its files, how it is opened, and how its records are rewound to a checkpoint."""

import contextlib
import difflib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from glsd.cluster import dist
from glsd.errors import UserError, one_line
from glsd.files import replacing
from glsd.runtime import checkpoint

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "pillow",
    "safetensors",
    "faiss-cpu",
)
VARIABLES = ("WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")


@dataclass(frozen=True)
class Run:
    """The paths of one run."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine.jsonl"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"


def earlier_precision(run: Run) -> str:
    """Return the optim.precision of a run that has checkpoints, "" if there is none. Raises UserError for a broken config.yaml."""
    path = run.folder / "config.yaml"
    if not checkpoint.has_checkpoint(run.checkpoints) or not path.is_file():
        return ""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise UserError(f"cannot read {path}: {one_line(problem)}") from problem
    optim = config.get("optim") if isinstance(config, dict) else None
    return str(optim.get("precision")) if isinstance(optim, dict) else ""


def open_run(out: str | Path, *, resolved_config: str, resume: bool) -> Run:
    """Create or reopen the run folder ``out``; rank 0 writes config.yaml and env.txt (a collective call).

    Call it when everything else has been checked: a refused start must leave the folder as it was. A folder with
    checkpoints needs ``resume``. One without starts over, with empty metrics and quarantine. If the configuration differs
    from that of the earlier start, the differing lines are printed and the old file is kept as config.<n>.yaml. env.txt
    gets one block per start. Raises UserError on every rank, also if ``out`` is not writable.
    """
    run = Run(Path(out))
    error = None
    if dist.is_main():
        try:
            if checkpoint.has_checkpoint(run.checkpoints) and not resume:
                raise UserError(
                    f"{run.folder} already has checkpoints: "
                    "go on with --resume auto, or give another folder with --out"
                )
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            _write_config(run.folder / "config.yaml", resolved_config)
            with (run.folder / "env.txt").open("a") as file:
                file.write(environment() + "\n")
            if not checkpoint.has_checkpoint(run.checkpoints):
                rewind(run.folder, -1)
        except OSError as problem:
            error = UserError(
                f"cannot write to the run folder {run.folder}: {one_line(problem)}; give another with --out"
            )
        except UserError as problem:
            error = problem
    dist.raise_together(error)
    return run


def _write_config(path: Path, text: str) -> None:
    if path.exists() and path.read_text() != text:
        before = path.read_text()
        changes = [line for line in difflib.ndiff(before.splitlines(), text.splitlines()) if line[:1] in "+-"]
        # How to resume is part of the command line of one start, not of the run; a run that was moved is the same.
        changes = [line for line in changes if not line[2:].startswith(("resume:", "out:"))]
        if changes:
            number = sum(1 for _ in path.parent.glob("config.*.yaml")) + 1
            path.rename(path.with_name(f"config.{number}.yaml"))
            print(
                f"warning: the configuration is not that of the earlier start, kept as config.{number}.yaml:"
            )
            print("\n".join(f"  {redact(line)}" for line in changes), flush=True)
    with replacing(path) as file:
        file.write(text.encode())


def redact(text: str) -> str:
    """Return the text for a log: without passwords (``user:pw@``) and signatures (``?...``) in its addresses."""
    text = re.sub(r"(?<=://)[^/\s]*@", "", text)
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\",()\[\]{}]*", r"\1", text)


def environment() -> str:
    """Return a block of text: start time, command, commit, host, devices and package versions of this run."""
    lines = [
        f"started: {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"command: {redact(shlex.join(sys.orig_argv))}",
        f"commit: {_commit()}",
        f"host: {platform.node()} ({platform.platform()}, {os.cpu_count()} CPUs)",
        f"processes: {dist.world_size()}, {torch.get_num_threads()} torch threads each",
        f"devices: {_devices()}",
        f"python: {platform.python_version()}",
    ]
    for package in PACKAGES:
        with contextlib.suppress(
            importlib.metadata.PackageNotFoundError
        ):  # optional packages are listed if installed
            lines.append(f"{package}: {importlib.metadata.version(package)}")
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no git)"
    if sha.returncode != 0:
        return "unknown (not a git checkout)"
    return sha.stdout.strip() + (" with local changes" if dirty.stdout.strip() else "")


def _devices() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def rewind(folder: Path, step: int) -> None:
    """Remove the rows of later steps from metrics, quarantine and samples.jsonl, atomically, on rank 0.

    The probe row of ``step`` itself is removed, too: a checkpoint is saved before the probe of its step, which runs again.
    So is an incomplete row, which a crash left, with a warning.
    """
    if not dist.is_main():
        return
    for path in (Run(folder).metrics, Run(folder).quarantine, Run(folder).samples):
        if not path.exists():
            continue
        with path.open(errors="replace") as lines, replacing(path) as file:
            file.writelines(row.encode() for row in _rows_until(step, lines, path))


def _rows_until(step: int, lines: Iterable[str], path: Path) -> Iterator[str]:
    """Yield the rows to keep; a long run's samples.jsonl may not fit into memory."""
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            print(f"warning: {path} line {number} is incomplete: removed", file=sys.stderr, flush=True)
        elif row["step"] < step or (row["step"] == step and "probe" not in row):
            yield line if line.endswith("\n") else f"{line}\n"


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a .jsonl file of the run, on rank 0; each needs a ``step``, so that a resumed run can rewind."""
    lines = [json.dumps(dict(row)) + "\n" for row in rows]
    if not lines or not dist.is_main():
        return
    try:
        with path.open("a") as file:
            file.writelines(lines)
    except OSError as problem:
        raise UserError(
            f"cannot write {path}: {one_line(problem)}; free space or make it writable"
        ) from problem
