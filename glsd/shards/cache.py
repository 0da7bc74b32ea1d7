"""Copies of remote shards on this machine: as many as fit, the least recently used one goes first.

Any number of processes share one folder. A copy is there only when it is whole and is the shard that its index was made
for; what a crash leaves half-way is taken over or swept away by the next one. Every lock is the kernel's (flock), so none
outlives its process: the folder belongs on a local disk.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from glsd.errors import UserError, one_line
from glsd.files import flush
from glsd.shards.addresses import identity, shown
from glsd.shards.file_locks import (
    FAILED,
    POLL,
    exclusive,
    locked,
    noted,
    removed_if_abandoned,
)
from glsd.shards.index import IndexHeader, marks_digest
from glsd.shards.remote import (
    copy_to,
    from_environment,
    look_up,
    patience,
)

FOLDER_VARIABLE, SIZE_VARIABLE = "GLSD_CACHE", "GLSD_CACHE_GB"
DEFAULT_GIGABYTES = 100.0
WHOLE, PART = ".shard", ".part"
OURS = re.compile(rf"[0-9a-f]{{32}}({WHOLE}|{PART})".replace(".", r"\."))
TOUCH_EVERY = 10.0  # seconds between two notes that a copy is in use


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cached files below ``$GLSD_CACHE``, by default ``~/.cache/glsd``; UserError for none."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named) / kind
    try:
        return Path.home() / ".cache" / "glsd" / kind
    except RuntimeError as problem:
        raise UserError(
            f"this user has no home folder for indices and copies of shards: set {FOLDER_VARIABLE} to a folder"
        ) from problem


def cache_bytes() -> int:
    """Return how much all copies may take: ``$GLSD_CACHE_GB`` (10^9 bytes), by default 100."""
    return int(from_environment(SIZE_VARIABLE, DEFAULT_GIGABYTES, "gigabytes") * 1e9)


class ShardCache:
    """The copies in one folder, never more than ``max_bytes`` of them together with what is being downloaded."""

    def __init__(self, folder: Path, *, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self._touched: dict[Path, float] = {}

    def read(self, address: str, header: IndexHeader, offset: int, size: int) -> bytes:
        """Return bytes of a shard, downloaded first if need be, and anew if its copy ends too early; UserError as fetch."""
        path = self._path(address, header)
        damaged = False
        while True:
            try:
                # Opened for each read: a file that was removed meanwhile would go on taking its room otherwise.
                with open(path, "rb", buffering=0) as file:
                    raw = os.pread(file.fileno(), size, offset)
            except FileNotFoundError:
                self.fetch(address, header)
                continue
            except OSError as error:
                raise _cannot_use(path, error) from error
            if len(raw) == size:
                self._touch(path, every=TOUCH_EVERY)
                return raw
            if damaged:
                raise UserError(f"shard {shown(address)} ends before byte {offset + size}: restore it")
            damaged = True
            path.unlink(missing_ok=True)

    def fetch(self, address: str, header: IndexHeader, *, wait: bool = True) -> None:
        """Make sure that a shard is here, as one just used; without ``wait`` only if nobody and nothing is in the way.

        Raises UserError when the server cannot be read, has another file than the index says, the shard is larger than
        the cache, the disk is full, or others have downloaded nothing for some time (``patience()``).
        """
        path = self._path(address, header)
        part = path.with_suffix(PART)
        if path.exists():
            self._touch(path)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(part, shown(address), wait=wait, unless=path) as file:
                if file is not None and path.exists():
                    part.unlink()  # made by us while another process finished
                elif file is not None and self._download(address, header, file, part, wait=wait):
                    os.replace(part, path)
                    part.with_suffix(FAILED).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_use(part, error) from error

    def check_room(self, needed: int, what: str) -> None:
        """Raise UserError if ``needed`` bytes at a time do not fit; ``what``: what needs them."""
        if needed > self.max_bytes:
            raise UserError(
                f"{SIZE_VARIABLE} allows {self.max_bytes / 1e9:.3g} GB of copies of remote shards but {what} take "
                f"{needed / 1e9:.3g} GB: every one would be downloaded again and again; raise {SIZE_VARIABLE}"
            )

    def _download(self, address: str, header: IndexHeader, file: BinaryIO, part: Path, *, wait: bool) -> bool:
        """Fill a file and return True, or False where there is no room for it now and ``wait`` is False."""
        done = False
        try:
            with noted(part):
                (found,) = look_up([address])
                if found is None:
                    raise UserError(
                        f"cannot read {shown(address)}: HTTP status 404, it is no longer there: restore it"
                    )
                check_size(address, found.size, header)
            if self._make_room(file, header.shard_bytes, wait=wait):
                with noted(part):
                    copy_to(file, address, header.shard_bytes)
                    flush(file)
                    check_digest(address, part, header)
                done = True
        finally:
            if not done:
                part.unlink(missing_ok=True)  # it holds room; bytes that were refused are of no use
        return done

    def _make_room(self, file: BinaryIO, size: int, *, wait: bool) -> bool:
        """Give ``file`` its full size, so that others count it, after removing what was not used for longest."""
        if size > self.max_bytes:
            raise UserError(
                f"a shard of {size / 1e9:.3g} GB does not fit into {self.folder}: raise {SIZE_VARIABLE} "
                f"({self.max_bytes / 1e9:.3g})"
            )
        seen, last_change = None, time.monotonic()
        while True:
            with exclusive(self.folder / ".lock"):
                os.ftruncate(file.fileno(), 0)
                if self._free(size) >= size:
                    os.ftruncate(file.fileno(), size)
                    return True
                downloads = [(e.path, e.stat.st_blocks) for e in self._entries() if e.path.suffix == PART]
            if not wait:
                return False
            if downloads != seen:
                seen, last_change = downloads, time.monotonic()
            if time.monotonic() - last_change > patience():
                raise UserError(
                    f"no room in {self.folder} for a shard of {size / 1e9:.3g} GB beside what is being downloaded, which does "
                    f"not come on: raise {SIZE_VARIABLE} ({self.max_bytes / 1e9:.3g})"
                )
            time.sleep(POLL)

    def _free(self, wanted: int) -> int:
        """Return the bytes that are free, after removing what was not used for longest while they are too few."""
        entries = sorted(self._entries(), key=lambda entry: entry.stat.st_mtime)
        free = self.max_bytes - sum(entry.stat.st_size for entry in entries)
        for entry in entries:
            if free >= wanted:
                break
            if entry.path.suffix == WHOLE:
                entry.path.unlink(missing_ok=True)
                free += entry.stat.st_size
            elif removed_if_abandoned(entry.path):
                free += entry.stat.st_size
        return free

    def _entries(self) -> Iterator["_Entry"]:
        """Return our own files, and no others that a user may keep in the same folder."""
        for entry in os.scandir(self.folder):
            if OURS.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    yield _Entry(Path(entry.path), os.stat(entry.path))

    def _path(self, address: str, header: IndexHeader) -> Path:
        # The content is part of the name: what was replaced on the server is another file here.
        content = f"{identity(address)}\0{header.shard_bytes}\0{header.digest}"
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}{WHOLE}"

    def _touch(self, path: Path, *, every: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._touched.get(path, -every) >= every:
            self._touched[path] = now
            with contextlib.suppress(OSError):  # removed meanwhile, or another user's
                os.utime(path)


class _Entry(NamedTuple):
    path: Path
    stat: os.stat_result


def check_size(address: str, size: int, header: IndexHeader) -> None:
    """Raise UserError unless a shard has the size that its index says."""
    if size != header.shard_bytes:
        raise UserError(
            f"shard {shown(address)} has {size} bytes but {header.shard_bytes} by its index {header.path}: it is truncated "
            "or was replaced; restore it, or write its index again with: python launch/pack.py index"
        )


def check_digest(address: str, path: str | Path, header: IndexHeader) -> None:
    """Raise UserError unless the file at ``path`` is the shard that the index was made for."""
    if marks_digest(path, header.marks) != header.digest:
        raise UserError(
            f"shard {shown(address)} is not the one that its index {header.path} was made for: restore it, or write its "
            "index again with: python launch/pack.py index"
        )


def _cannot_use(path: Path, error: OSError) -> UserError:
    hint = f"lower {SIZE_VARIABLE}, or " if error.errno == errno.ENOSPC else ""
    return UserError(
        f"cannot use the shard cache: {path}: {one_line(error)}: {hint}name another folder in {FOLDER_VARIABLE}"
    )
