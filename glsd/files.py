"""Paths as users write them, atomic writes, durable files and locks: the only file that calls fsync and flock."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from glsd.errors import UserError

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(path: str) -> str:
    """Return a path with ``~``, ``$NAME`` and ``${NAME}`` replaced; an address such as ``s3://...`` stays as it is.

    ``$$`` is a dollar sign. Raises UserError for a variable that is unset or empty, and for a ``~`` without home folder.
    """
    if _ADDRESS.match(path):
        return path

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name and not os.environ.get(name):
            raise UserError(
                f"path {path!r}: the environment variable {name} is not set: set it, or write $$ for a dollar sign"
            )
        return os.environ[name] if name else "$"

    found = _VARIABLE.sub(value, path)
    if not found.startswith("~"):
        return found
    home = os.path.expanduser(found)
    if home == found:
        raise UserError(
            f"path {path!r}: there is no such home folder: write ./{found} for a file of that name"
        )
    return home


def written(path: str) -> str:
    """Return the text from which ``expand`` makes ``path``."""
    if _ADDRESS.match(path):
        return path
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing that takes the place of ``path`` when the block ends without an error.

    A reader sees the old file or the whole new one, also after a power failure: the new one is written beside it under a
    temporary name, flushed to disk and renamed. An error leaves ``path`` as it was.
    """
    # Ranks of several hosts may write the same file: a process id would not be unique.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            flush(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``path`` that becomes ``path`` when the block ends without an error.

    ``path`` must not exist, or be an empty folder. An error removes the hidden folder with all that was written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            sync(written)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def flush(file: IO) -> None:
    """Flush an open file to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a closed file to the disk itself, or a folder: the names in it are a file of their own."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, timeout: float = -1.0) -> Iterator[None]:
    """Hold the lock file ``path`` within the block. A process that is killed releases it.

    timeout: seconds to wait for another process or thread that holds it, then TimeoutError; -1 waits forever. A file
    system without locks gives a warning.
    """
    from filelock import FileLock

    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{path.parent} cannot be locked ({error.strerror}): let only one process write to it",
            stacklevel=3,
        )
    try:
        yield
    finally:
        lock.release()


def try_lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed or unlocked, unless another process holds it; tell whether it is locked now.

    For the shard cache, whose lock must follow a file that is renamed. Everywhere else use ``locked``.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: BinaryIO) -> None:
    """Unlock an open file. Closing it is not enough where a process was forked meanwhile, which has it open, too."""
    fcntl.flock(file, fcntl.LOCK_UN)
