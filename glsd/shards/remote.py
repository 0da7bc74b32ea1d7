"""Files on web servers and in object stores: their names, their sizes, their bytes, with retries and one clear last error.

fsspec's backends do the transport; how long to try, and what the user reads in the end, is decided here.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import fsspec

from glsd.errors import UserError
from glsd.shards.addresses import check_scheme, shown
from glsd.shards.remote_errors import (
    CLIENTS,
    error_types,
    is_wrong,
    reason_of,
    status_of,
)

Result = TypeVar("Result")

PIECE = 4 << 20  # bytes of one request: what is lost when a connection breaks
MAX_CONNECTIONS = 16  # for many small questions at the start
WARN_AFTER = 5.0  # seconds of trying
FIRST_PAUSE, MAX_PAUSE = 0.2, 10.0  # seconds between attempts; each pause is twice the one before
TIMEOUT_VARIABLE = "GLSD_REMOTE_TIMEOUT"
DEFAULT_TIMEOUT = 120.0
FEW = 8  # files of a folder: asking for each costs less than a list of the whole folder
MISSING = frozenset((404,))
TRY_LATER = frozenset((408, 425, 429))  # of the 4xx answers, those that may be others next time


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file."""

    size: int  # bytes
    version: str  # changes when the content does, as far as the server tells (its ETag or time stamp)


class ShortAnswer(OSError):
    """Fewer bytes came than were asked for."""


def patience() -> float:
    """Return the seconds without success after which a server is given up: ``$GLSD_REMOTE_TIMEOUT``, by default 120."""
    return from_environment(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT, "seconds")


def from_environment(variable: str, default: float, unit: str) -> float:
    """Return the number above 0 that an environment variable holds; UserError for anything else."""
    raw = os.environ.get(variable) or default
    try:
        number = float(raw)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"{variable} is {raw!r}: expected {unit} above 0")
    return number


def glob_remote(pattern: str) -> list[str]:
    """Return the addresses that a pattern with ``*`` matches, sorted; UserError if the server cannot list them."""
    fs, path = _locate(pattern)
    found = _attempt(pattern, "list", lambda: fs.glob(path))
    return sorted(str(fs.unstrip_protocol(name)) for name in found)


def look_up(addresses: Sequence[str], missing: frozenset[int] = MISSING) -> list[RemoteFile | None]:
    """Return what the servers say of each file, None where there is none; many are asked at a time.

    Object stores are asked for whole folders where there are more than FEW. missing: the statuses that mean that there is
    none: stores that may not be listed say 403 of what they do not have. Raises UserError for a server that does not answer.
    """
    listings: dict[str, dict[str, Any]] = {}

    def folder_of(address: str) -> str:
        return address.partition("?")[0].rsplit("/", 1)[0]

    def list_folder(folder: str) -> None:
        fs, path = _locate(folder)
        rows = _attempt(folder, "list", lambda: fs.ls(path, detail=True), instead=[])
        listings[folder] = {str(fs.unstrip_protocol(row["name"])): row for row in rows}

    def one(address: str) -> RemoteFile | None:
        fs, path = _locate(address)
        if folder_of(address) in listings:
            info = listings[folder_of(address)].get(str(fs.unstrip_protocol(path)))
        else:
            info = _attempt(address, "find", lambda: fs.info(path), instead=None, missing=missing)
        if info is None or info.get("type") == "directory":
            return None
        if info.get("size") is None:
            raise UserError(f"{shown(address)}: the server does not tell its size: use one that does")
        marks = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "mtime", "updated")
        return RemoteFile(int(info["size"]), next((str(info[m]) for m in marks if info.get(m)), ""))

    if len(addresses) == 1:
        return [one(addresses[0])]
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        folders = Counter(folder_of(a) for a in addresses if not a.startswith("http"))
        list(pool.map(list_folder, [folder for folder, count in folders.items() if count > FEW]))
        return list(pool.map(one, addresses))


def read_all(address: str) -> bytes:
    """Return the bytes of a small file; UserError if it cannot be read."""
    fs, path = _locate(address)
    return _attempt(address, "read", lambda: fs.cat_file(path))


def write_all(local: str, address: str) -> None:
    """Copy a local file to an address; UserError if that cannot be written."""
    fs, path = _locate(address)
    _attempt(address, "write", lambda: fs.put_file(local, path))


def copy_to(file: IO[bytes], address: str, size: int) -> None:
    """Write the first ``size`` bytes of a remote file to the beginning of ``file``, piece after piece.

    A piece that fails is asked for again; a server without range requests sends everything at once. Raises UserError
    when nothing has come for ``patience()`` seconds, and at once for what will not change (404, 403).
    """
    fs, path = _locate(address)
    place = 0
    while place < size:
        start, end = place, min(place + PIECE, size)

        def piece(start: int = start, end: int = end) -> bytes:
            raw = fs.cat_file(path, start=start, end=end)
            if len(raw) not in (end - start, size):
                (now,) = look_up([address])
                if now is not None and now.size != size:
                    raise UserError(
                        f"{shown(address)} has {now.size} bytes, and had {size} when its download began: restore it, or "
                        "start again where it was meant to change"
                    )
                raise ShortAnswer(f"{len(raw)} bytes instead of {end - start} from byte {start} on")
            return raw

        raw = _attempt(address, "read", piece)
        if len(raw) == size:  # the whole file, whatever was asked for
            file.seek(0)
            end = size
        file.write(raw)
        place = end


def _locate(address: str) -> tuple[Any, str]:
    """Return the file system of an address and the path in it; cheap: fsspec keeps one a process, also after a fork."""
    scheme = check_scheme(address)
    # One silent request must not use up all the time there is.
    silence = min(30.0, patience() / 2)
    options: dict[str, Any] = {}
    if scheme.startswith("http"):
        import aiohttp  # late: nobody needs it for local shards

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    elif scheme == "s3":
        retries = {"max_attempts": 1}  # ours and s3fs's own come on top
        options = {"config_kwargs": {"connect_timeout": silence, "read_timeout": silence, "retries": retries}}
    try:
        # Listings change while people upload: never an old one.
        return fsspec.url_to_fs(address, use_listings_cache=False, **options)
    except ImportError as error:
        raise UserError(
            f"{shown(address)}: reading {scheme}:// needs one more package: pip install '{CLIENTS[scheme][0]}'"
        ) from error
    except ValueError as error:
        raise UserError(f"{shown(address)} is no address that can be read: {error}") from error


_REQUIRED = object()
_warned = False  # that a server makes us wait; once a process


def _attempt(
    address: str,
    verb: str,
    work: Callable[[], Result],
    instead: Any = _REQUIRED,
    missing: frozenset[int] = MISSING,
) -> Result:
    """Return what ``work`` returns, tried again while it may help; ``instead``, where given, if there is no file."""
    global _warned
    started, pause, attempts = time.monotonic(), FIRST_PAUSE, 0
    while True:
        attempts += 1
        try:
            return work()
        except error_types(address.split("://")[0]) as error:
            status, reason = status_of(error), reason_of(error)
            if status in missing and instead is not _REQUIRED:
                return instead
            waited = time.monotonic() - started
            final = is_wrong(error) or (
                status is not None and 400 <= status < 500 and status not in TRY_LATER
            )
            if final or waited >= patience():
                tries = "" if final else f", {attempts} attempts in {waited:.0f} s ({TIMEOUT_VARIABLE})"
                raise UserError(
                    f"cannot {verb} {shown(address)}: {f'HTTP status {status}, ' if status else ''}{reason}{tries}: "
                    "check the address, the access rights and the server"
                ) from error
        if waited > WARN_AFTER and not _warned:
            _warned = True
            text = f"warning: cannot {verb} {shown(address)} ({reason}): trying for {patience():.0f} s"
            print(text, file=sys.stderr, flush=True)
        time.sleep(min(pause, patience() - waited))
        pause = min(2 * pause, MAX_PAUSE)
