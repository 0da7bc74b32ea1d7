"""Files on web servers and in object stores: addresses, sizes and bytes, with retries and one clear error at the end.

fsspec's backends transport the bytes. This file decides how long to try and what the user reads in the end.
"""

import importlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import fsspec

from glsd.errors import UserError

Result = TypeVar("Result")

PIECE = 4 << 20  # bytes of one request; a broken connection loses at most so many
MAX_CONNECTIONS = 16  # for the many small requests at the start
WARN_AFTER = 5.0  # seconds of trying
FIRST_PAUSE, MAX_PAUSE = 0.2, 10.0  # seconds between attempts; each pause is twice the one before
TIMEOUT_VARIABLE = "GLSD_REMOTE_TIMEOUT"
DEFAULT_TIMEOUT = 120.0
FEW = 8  # files of a folder: one request for each is cheaper than listing the folder
MISSING = frozenset((404,))
RETRY = frozenset((408, 425, 429))  # the 4xx statuses that may change

# Scheme -> the package to install, and the error types of its client that are not OSErrors.
CLIENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "http": ("fsspec[http]", ("aiohttp:ClientError",)),
    "https": ("fsspec[http]", ("aiohttp:ClientError",)),
    "s3": (
        "glsd[s3]",
        ("botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError", "aiohttp:ClientError"),
    ),
    "gs": (
        "glsd[gs]",
        ("gcsfs.retry:HttpError", "google.auth.exceptions:GoogleAuthError", "aiohttp:ClientError"),
    ),
    "hf": (
        "huggingface_hub",
        ("huggingface_hub.errors:HfHubHTTPError", "httpx:HTTPError", "httpx2:HTTPError"),
    ),
}
PERMANENT = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")
# Query parameters that say who may read a file, not which file: of Amazon, Google, Microsoft, CloudFront.
SIGNATURE = re.compile(
    "x-(amz|goog|ms)-.*|.*signature|.*token|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid"
    "|s[vsprtieg]|sig|srt|spr|sk(oid|tid|t|e|s|v)|sdd",
    re.IGNORECASE,
)


def is_remote(address: str) -> bool:
    """Tell whether an address names a file on a server (``scheme://...``)."""
    return "://" in address


def check_scheme(address: str) -> str:
    """Return the scheme of an address; UserError if it is unknown."""
    scheme = address.split("://")[0]
    if scheme not in CLIENTS:
        known = ", ".join(f"{name}://" for name in CLIENTS)
        raise UserError(f"{shown(address)}: expected a local path or an address that begins with {known}")
    return scheme


def shown(address: str) -> str:
    """Return an address for a log or a message: without its password and its query, which may hold a signature."""
    return re.sub(r"(?<=://)[^/@]*@", "", address.partition("?")[0]) if is_remote(address) else address


def identity(address: str) -> str:
    """Return an address without password and signature: the part that stays when it is signed again."""
    query = address.partition("?")[2].split("&") if is_remote(address) else []
    kept = [part for part in query if part and not SIGNATURE.fullmatch(part.partition("=")[0])]
    return "?".join([shown(address), "&".join(kept)]) if kept else shown(address)


def beside(address: str, suffix: str) -> str:
    """Return the address of the file whose name is this one's plus ``suffix``."""
    path, mark, query = address.partition("?") if is_remote(address) else (address, "", "")
    return f"{path}{suffix}{mark}{query}"


@dataclass(frozen=True)
class RemoteFile:
    """Size and version of a file on a server."""

    size: int  # bytes
    version: str  # its ETag or time stamp, "" where the server sends neither


class ShortResponse(OSError):
    """A response with fewer bytes than requested."""


def patience() -> float:
    """Return the seconds without progress after which a download fails: ``$GLSD_REMOTE_TIMEOUT``, 120 by default."""
    return from_environment(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT, "seconds")


def from_environment(variable: str, default: float, unit: str) -> float:
    """Return the positive number in an environment variable; UserError for anything else."""
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
    """Return size and version of each file, None for a missing one; requests run in parallel.

    Folders of object stores with more than FEW of the files are listed as a whole. missing: HTTP statuses that mean "no
    such file"; a store that forbids listing says 403. Raises UserError for a server that does not respond.
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
            raise UserError(f"{shown(address)}: the server does not send its size: use another server")
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
    """Download the first ``size`` bytes of a remote file to the beginning of ``file``, piece by piece.

    A piece that fails is requested again. A server without range requests sends the whole file at once. Raises UserError
    after ``patience()`` seconds without progress, and at once for permanent errors (404, 403).
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
                        "start again if the change was intended"
                    )
                raise ShortResponse(f"{len(raw)} bytes instead of {end - start} from byte {start}")
            return raw

        raw = _attempt(address, "read", piece)
        if len(raw) == size:  # the whole file
            file.seek(0)
            end = size
        file.write(raw)
        place = end


def _locate(address: str) -> tuple[Any, str]:
    """Return the file system of an address and the path in it; fsspec caches one per process, also after a fork."""
    scheme = check_scheme(address)
    # One request without response must not use up the whole timeout.
    silence = min(30.0, patience() / 2)
    options: dict[str, Any] = {}
    if scheme.startswith("http"):
        import aiohttp  # local shards do not need it

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    elif scheme == "s3":
        retries = {"max_attempts": 1}  # s3fs and this file retry already
        options = {"config_kwargs": {"connect_timeout": silence, "read_timeout": silence, "retries": retries}}
    try:
        # Listings change while people upload.
        return fsspec.url_to_fs(address, use_listings_cache=False, **options)
    except ImportError as error:
        raise UserError(
            f"{shown(address)}: reading {scheme}:// needs another package: pip install '{CLIENTS[scheme][0]}'"
        ) from error
    except ValueError as error:
        raise UserError(f"{shown(address)} is not a valid address: {error}") from error


_REQUIRED = object()
_warned = False  # whether this process has warned of a slow server


def _attempt(
    address: str,
    verb: str,
    work: Callable[[], Result],
    instead: Any = _REQUIRED,
    missing: frozenset[int] = MISSING,
) -> Result:
    """Return the result of ``work``, retried while that may help; ``instead``, where given, for a missing file."""
    global _warned
    started, pause, attempts = time.monotonic(), FIRST_PAUSE, 0
    while True:
        attempts += 1
        try:
            return work()
        except _error_types(address.split("://")[0]) as error:
            status, reason = _status_of(error), _reason_of(error)
            if status in missing and instead is not _REQUIRED:
                return instead
            waited = time.monotonic() - started
            final = _is_permanent(error) or (
                status is not None and 400 <= status < 500 and status not in RETRY
            )
            if final or waited >= patience():
                tries = "" if final else f", {attempts} attempts in {waited:.0f} s ({TIMEOUT_VARIABLE})"
                raise UserError(
                    f"cannot {verb} {shown(address)}: {f'HTTP status {status}, ' if status else ''}{reason}{tries}: "
                    "check the address, the access rights and the server"
                ) from error
        if waited > WARN_AFTER and not _warned:
            _warned = True
            text = f"warning: cannot {verb} {shown(address)} ({reason}): retrying for {patience():.0f} s"
            print(text, file=sys.stderr, flush=True)
        time.sleep(min(pause, patience() - waited))
        pause = min(2 * pause, MAX_PAUSE)


def _error_types(scheme: str) -> tuple[type[Exception], ...]:
    """Return the exceptions that the client of a scheme raises for reasons other than a bug of ours."""
    types: list[type[Exception]] = [OSError, TimeoutError, ValueError, OverflowError]
    for name in CLIENTS[scheme][1]:
        module, _, attribute = name.partition(":")
        try:
            types.append(getattr(importlib.import_module(module), attribute))
        except ImportError:
            continue  # a module that is not installed raises nothing
    return tuple(types)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status_of(error: Exception) -> int | None:
    """Return the HTTP status behind an error; backends hide it in the exception's cause or type."""
    for link in _chain(error):
        answer = getattr(link, "response", None)
        if isinstance(answer, dict):  # botocore
            answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # Only gcsfs's ``code`` is the status: aiohttp's is 400 for a truncated response.
        code = getattr(link, "code", None) if type(link).__module__.startswith("gcsfs") else answer
        status = getattr(link, "status", code)
        number = getattr(status, "status_code", status)
        if isinstance(number, int) and 100 <= number < 600:
            return number
    # Backends raise FileNotFoundError for any failure: trust it only without another cause.
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return 404
    return 403 if any(isinstance(link, PermissionError) for link in _chain(error)) else None


def _is_permanent(error: Exception) -> bool:
    """Tell whether the address itself is wrong or credentials are missing: trying again does not help."""
    names = {type(link).__name__ for link in _chain(error)}
    return isinstance(error, ValueError | OverflowError) or not names.isdisjoint(PERMANENT)


def _reason_of(error: Exception) -> str:
    last = list(_chain(error))[-1]
    text = str(last).strip().splitlines() or [""]
    # Some clients quote the whole address, signature included.
    first = re.sub(r"\S+://\S+", lambda found: shown(found[0]), text[0])[:200]
    return f"{type(last).__name__}: {first}" if first else type(last).__name__
