"""Files that several processes of one machine fill and remove without getting in each other's way: locks of the kernel (flock).

A lock ends with its process; a note says to those who wait why somebody has failed.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from glsd import files
from glsd.errors import UserError
from glsd.files import replacing, try_lock, unlock
from glsd.shards.remote import TIMEOUT_VARIABLE, patience

FAILED = ".failed"  # suffix of the notes
POLL = 0.05  # seconds between two looks at what another process does


def removed_if_abandoned(part: Path) -> bool:
    """Remove a download that nobody is at; tell whether that was so."""
    try:
        with open(part, "r+b") as file:
            # Removed while it is locked: the next process could begin to fill it otherwise.
            if removed := try_lock(file) and _same(file, part):
                part.unlink()
            return removed
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def noted(part: Path) -> Iterator[None]:
    """Leave a note of why a download failed to those who wait for it."""
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError), replacing(part.with_suffix(FAILED)) as note:
            note.write(str(error).encode())
        raise


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep all other processes and threads out; UserError if one of them stays in for longer than ``patience()``."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, timeout=patience()))
        except TimeoutError as error:
            raise UserError(f"{path} is locked by another process: end that one") from error
        yield


@contextlib.contextmanager
def locked(part: Path, address: str, *, wait: bool, unless: Path) -> Iterator[BinaryIO | None]:
    """Give the file ``part``, locked by us, or None: as soon as ``unless`` exists, or it is locked and ``wait`` is False.

    The lock goes with the file, also when it is renamed, and with the process when that dies.
    """
    inode, blocks, last_progress, began = -1, 0, time.monotonic(), time.time()
    failed = part.with_suffix(FAILED)
    while True:
        with contextlib.suppress(FileNotFoundError):
            if wait and failed.stat().st_mtime > began:
                raise UserError(failed.read_text())  # it has failed for us too
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
            if try_lock(file):
                # Renamed or removed by the one that had the lock: then this is no longer the file of that name.
                if _same(file, part):
                    try:
                        yield file
                    finally:
                        unlock(file)
                    return
                continue
            status = os.fstat(file.fileno())
        if unless.exists() or not wait:
            yield None
            return
        # Bytes that arrive are progress; another process that starts from nothing is not.
        if status.st_ino == inode and status.st_blocks > blocks:
            last_progress = time.monotonic()
        inode, blocks = status.st_ino, status.st_blocks
        # Who downloads gives up before, and says why.
        if time.monotonic() - last_progress > 2 * patience():
            raise UserError(
                f"cannot read {address}: another process holds {part}, without progress for {2 * patience():.0f} s "
                f"({TIMEOUT_VARIABLE}): end that process"
            )
        time.sleep(POLL)


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
