"""Atomic checkpoints: written under a temporary name, flushed to disk, renamed, and verified on load.

folder/latest -> step_00000012            for people; loading reads the folder names
folder/best -> step_00000008              the one that its story's measure prefers, if it measures
folder/step_00000012/<name>.safetensors   one per named state dict (student, teacher, ...)
                     optimizer.pt         torch state dict, read with weights_only=True
                     state.json           plain values: step, samples consumed, ...
                     manifest.json        format version, step, size and sha256 of each file
"""

import hashlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glsd.cluster import dist, fsdp
from glsd.errors import UserError, one_line
from glsd.files import sync
from glsd.precision import check_finite

VERSION = 1
BEST, LATEST = "best", "latest"
_OPTIMIZER, _STATE, _MANIFEST = "optimizer.pt", "state.json", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint in host memory."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    optimizer: dict[str, Any]


class _Damaged(Exception):
    """A file of a checkpoint is missing, truncated or changed."""


def save(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write folder/step_<step> atomically and return it.

    Collective: rank 0 writes, and all ranks return when the checkpoint is on disk. tensors: name -> state dict, on any
    device; tensors that share memory are written separately. state: JSON values. optimizer: a torch optimizer's state dict.
    keep: number of checkpoints that stay, besides the best one and those of a step that ``keep_every`` divides (0 = none).
    Older ones, and those of a later step (from before the run was rewound), are deleted after the new one is on disk. Raises
    UserError on every rank if it cannot be written; earlier ones stay intact.
    """
    final = folder / _name(step)
    error = None
    if dist.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _delete_leftovers(folder)
            _write(final, step=step, tensors=tensors, state=state, optimizer=optimizer)
            _point(folder, LATEST, final.name)
            _delete_old(folder, step=step, keep=keep, keep_every=keep_every)
        except (OSError, SafetensorError) as problem:  # safetensors reports a full disk by its own type
            _delete_leftovers(folder)
            advice = "free space or make it writable; earlier checkpoints are intact"
            error = f"cannot write checkpoint {final}: {problem}; {advice}"
        except KeyboardInterrupt:
            _delete_leftovers(folder)
            raise
    error = dist.broadcast_object(error)
    if error:
        raise UserError(error)
    return final


def point_best(folder: Path, scores: Mapping[int, float]) -> None:
    """Let folder/best be the checkpoint whose step has the largest finite score, of equal ones the earliest.

    Collective: rank 0 decides, by its ``scores``. Steps without a checkpoint do not count; if none has one, there is no link.
    Raises UserError on every rank if the link cannot be made.
    """
    error = None
    if dist.is_main():
        try:
            there = {_step_of(path): path.name for path in _complete(folder)}
            known = [
                (score, -step) for step, score in scores.items() if step in there and math.isfinite(score)
            ]
            if known:
                _point(folder, BEST, there[-max(known)[1]])
            else:
                (folder / BEST).unlink(missing_ok=True)
        except OSError as problem:
            error = UserError(f"cannot write {folder / BEST}: {one_line(problem)}")
    dist.raise_together(error)


def load(path: Path) -> Checkpoint:
    """Verify and read one checkpoint folder (or the ``latest`` link); UserError naming the file if it is damaged."""
    try:
        _verify(path)
        return _read(path)
    except _Damaged as problem:
        raise UserError(
            f"checkpoint {path} is not intact: {problem}; use another one in {path.parent}"
        ) from problem


def load_latest(folder: Path) -> Checkpoint | None:
    """Read the newest intact checkpoint in ``folder``; None if there is no checkpoint at all.

    Collective: rank 0 verifies and chooses, so all ranks read the same one. A damaged checkpoint is skipped with a warning
    on stderr. If all are damaged, every rank raises UserError.
    """
    chosen: str | None = None
    error: str | None = None
    if dist.is_main():
        damaged = []
        for path in reversed(_complete(folder)):
            try:
                _verify(path)
                chosen = path.name
                break
            except _Damaged as problem:
                damaged.append(f"checkpoint {path} is not intact: {problem}")
        if chosen:
            for line in damaged:
                print(f"warning: {line}; going back to {chosen}", file=sys.stderr, flush=True)
        elif damaged:
            error = f"{damaged[0]}; no earlier one is intact: move {folder} away to start again"
    chosen, error = dist.broadcast_object((chosen, error))
    if error:
        raise UserError(error)
    if chosen is None:
        return None
    try:
        return _read(folder / chosen)
    except _Damaged as problem:  # rank 0 has just verified it, so this host sees another folder
        raise UserError(
            f"rank {dist.rank()} cannot read {folder / chosen}: {problem}; is the run folder shared?"
        ) from problem


def restore(module: nn.Module, saved: Mapping[str, Tensor], *, source: str) -> None:
    """Load the state dict ``saved`` into ``module``.

    Raises UserError with source, tensor and both shapes if it belongs to another architecture, and for NaN or infinity in it.
    """
    expected_state = module.state_dict()
    advice = "it belongs to another architecture: use the configuration of its run"
    for name, tensor in expected_state.items():
        if name not in saved:
            raise UserError(f"{source} has no tensor {name}, expected {tuple(tensor.shape)}; {advice}")
        if saved[name].shape != tensor.shape:
            expected, found = tuple(tensor.shape), tuple(saved[name].shape)
            raise UserError(f"{source}: tensor {name} is {found}, expected {expected}; {advice}")
    unknown = sorted(saved.keys() - expected_state.keys())
    if unknown:
        found = tuple(saved[unknown[0]].shape)
        raise UserError(f"{source} has a tensor {unknown[0]} {found} that this model lacks; {advice}")
    check_finite(saved, source)
    fsdp.load_state(module, saved)


def has_checkpoint(folder: Path) -> bool:
    """Tell whether the folder ``checkpoints`` of a run holds a checkpoint, intact or not."""
    return bool(_complete(folder))


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _complete(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first; an unfinished one has a temporary name."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=_step_of)


def _write(final: Path, *, step: int, tensors, state, optimizer) -> None:
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    (temporary / _STATE).write_text(json.dumps(dict(state), indent=1) + "\n")
    for name, named in tensors.items():
        file = temporary / f"{name}.safetensors"
        save_file(_separate(named), file)
        shutil.copymode(temporary / _STATE, file)  # safetensors writes files that only their owner can read
    # In memory first: on a full disk torch.save raises an internal error that hides the reason.
    packed = io.BytesIO()
    torch.save(dict(optimizer), packed)
    (temporary / _OPTIMIZER).write_bytes(packed.getbuffer())
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
    manifest = {"version": VERSION, "step": step, "files": files}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    replaced = final.with_name(f"{final.name}.tmp-{os.getpid()}-replaced")
    if final.exists():  # a folder cannot be renamed over a folder with files
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync(final.parent)
    _delete_leftovers(final.parent)


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the host that share no memory: safetensors rejects one tensor under two names."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != host.numel() * host.element_size():
            host = host.clone()
        storages.add(host.untyped_storage().data_ptr())
        result[name] = host
    return result


def _point(folder: Path, link: str, name: str) -> None:
    temporary = folder / f"{link}.tmp-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, folder / link)
    sync(folder)


def _delete_old(folder: Path, *, step: int, keep: int, keep_every: int) -> None:
    complete = _complete(folder)
    best = os.readlink(folder / BEST) if (folder / BEST).is_symlink() else ""
    old = [path for path in complete if _step_of(path) <= step][:-keep]
    stale = [p for p in old if p.name != best and not (keep_every and _step_of(p) % keep_every == 0)]
    stale += [path for path in complete if _step_of(path) > step]
    for path in stale:
        shutil.rmtree(path)


def _delete_leftovers(folder: Path) -> None:
    """Remove the files of interrupted saves. Errors are ignored, as it also runs while another error is reported."""
    for path in folder.glob("step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in (LATEST, BEST):
        for link in folder.glob(f"{name}.tmp-*"):
            link.unlink(missing_ok=True)


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        version, files = manifest["version"], dict(manifest["files"])
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        if version != VERSION or not {_OPTIMIZER, _STATE} <= expected.keys():
            raise _Damaged(f"{_MANIFEST} has version {version!r}, expected {VERSION}")
        for name, (size, digest) in expected.items():
            actual = (path / name).stat().st_size
            if actual != size:
                raise _Damaged(f"{name} has {actual} bytes, expected {size}")
            if _sha256(path / name) != digest:
                raise _Damaged(f"{name} does not match its checksum")
    except OSError as problem:
        raise _Damaged(f"cannot read {problem.filename or path}: {one_line(problem)}") from problem
    # The errors that a damaged manifest can cause.
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise _Damaged(f"{_MANIFEST} is not readable") from problem


def _read(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        names = [name for name in manifest["files"] if name.endswith(".safetensors")]
        return Checkpoint(
            path=path.resolve(),
            step=int(manifest["step"]),
            tensors={name.removesuffix(".safetensors"): load_file(path / name) for name in names},
            state=json.loads((path / _STATE).read_text()),
            optimizer=torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True),
        )
    except OSError as problem:
        raise _Damaged(str(problem)) from problem


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
