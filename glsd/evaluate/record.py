"""evals.json: a list of all evaluations of a model, each with its protocol."""

import json
import tempfile
from pathlib import Path
from typing import Any

from glsd.errors import UserError, one_line
from glsd.files import locked, replacing

FILE = "evals.json"
# A file of its own: evals.json is replaced each time. It stays, as another process may be waiting for it.
LOCK_FILE = f".{FILE}.lock"


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to the folder's evals.json, atomically.

    Evaluations that end at the same time wait for one another (``.evals.json.lock``), so that none is lost.
    Raises UserError if the file cannot be written or is no list of records.
    """
    path = folder / FILE
    try:
        with locked(folder / LOCK_FILE):
            text = json.dumps([*_read(path), record], indent=1) + "\n"
            with replacing(path) as file:
                file.write(text.encode())
    except OSError as problem:
        raise UserError(f"cannot write {path}: {one_line(problem)}; choose another folder") from problem


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the folder, oldest first. Raises UserError for a file that is no list of records."""
    return _read(folder / FILE)


def cannot_write(folder: Path) -> UserError | None:
    """Create the folder; return the error that writing evals.json there would raise, None if it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_FILE), tempfile.TemporaryFile(dir=folder):
            _read(folder / FILE)
    except UserError as problem:
        return problem
    except OSError as problem:
        return UserError(
            f"cannot write {FILE} to {folder}: {one_line(problem)}; choose another folder with --out"
        )
    return None


def _read(path: Path) -> list:
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
    except ValueError as problem:
        raise UserError(f"{path} is not JSON ({problem}): move it away") from problem
    if not isinstance(records, list):
        raise UserError(f"{path} holds no list of evaluations: move it away")
    return records
