"""What a run folder is, seen from outside: found, told apart, its checkpoint read."""

from pathlib import Path

import yaml

from glsd.errors import UserError, one_line
from glsd.runtime import checkpoint
from glsd.runtime.checkpoint import Checkpoint


def find_run(path: Path) -> Path | None:
    """Return the run folder that ``path`` is, or that it is a checkpoint of; None if it is neither."""
    if (path / "config.yaml").is_file():
        return path
    if path.is_dir() and (path.parent.parent / "config.yaml").is_file():
        return path.parent.parent
    return None


def is_finetuned(run: Path) -> bool:
    """Tell whether a run folder is one of metric learning, by a key that only those have."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        raise UserError(f"cannot read {run / 'config.yaml'}: {one_line(error)}") from error
    return isinstance(config, dict) and "reg" in config


def has_checkpoint(run: Path) -> bool:
    """Tell whether a run folder holds a checkpoint, intact or not."""
    return any((run / "checkpoints").glob("step_????????"))


def read_checkpoint(run: Path, chosen: Path | None, hint: str = "") -> Checkpoint:
    """Return the chosen checkpoint of a run, or its latest intact one; UserError if there is none."""
    saved = checkpoint.load(chosen) if chosen else checkpoint.load_latest(run / "checkpoints")
    if saved is None:
        raise UserError(f"run {str(run)!r} has no checkpoint yet{hint}")
    return saved
