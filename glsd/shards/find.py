"""From patterns to shards and their indices: what is there, here or on a server, and that its size is the one expected."""

import glob
import hashlib
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand
from tqdm import tqdm

from glsd.errors import UserError, one_line
from glsd.files import replacing, try_lock
from glsd.shards.cache import (
    FOLDER_VARIABLE,
    PART,
    ShardCache,
    cache_bytes,
    cache_folder,
    check_size,
)
from glsd.shards.index import (
    REBUILD,
    SUFFIX,
    VERSION,
    IndexHeader,
    build_index,
    index_path,
    map_index,
    read_header,
    write_index,
)
from glsd.shards.remote import (
    MAX_CONNECTIONS,
    RemoteFile,
    beside,
    check_scheme,
    copy_to,
    glob_remote,
    identity,
    is_remote,
    look_up,
    shown,
    write_all,
)

HIDDEN = frozenset((403, 404))  # what a store that may not be listed says of a file that is not there
SOURCES_SUFFIX = "-files.tsv"  # beside packed shards: which file a key comes from


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the files that brace patterns and globs name, of local paths and of addresses (globs sorted).

    Raises UserError for a pattern without match, a folder, a pipe, and a shard named twice.
    """
    return [path for paths in find_sources(patterns) for path in paths]


def find_sources(patterns: str | Sequence[str]) -> list[list[str]]:
    """Return find_shards of each pattern apart."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not any(given):
        raise UserError("no shards given: expected a pattern such as 'shards/train-{000000..000146}.tar'")
    sources = [_expand(pattern) for pattern in given]
    seen: dict[object, str] = {}
    for path in (path for paths in sources for path in paths):
        identity = _identity(path)
        if identity in seen:
            also = shown(seen[identity])
            raise UserError(f"shard {shown(path)} is named twice (also as {also}): remove one pattern")
        seen[identity] = path
    return sources


def _identity(path: str) -> object:
    if is_remote(path):
        return identity(path)
    status = _stat(path)
    return status.st_dev, status.st_ino


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {one_line(error)}") from error


def _expand(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        raise UserError(f"shards {pattern!r}: programs are not run: write their output to a file first")
    if is_remote(pattern):
        check_scheme(pattern)
    else:
        pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise UserError(f"shards {pattern!r} is a folder: name its files, e.g. '{pattern.rstrip('/')}/*.tar'")
    if os.path.isfile(pattern):
        return [pattern]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"shards {shown(pattern)!r}: unbalanced braces") from error
    paths = []
    for name in names:
        found = _matches(name)
        if not found:
            part = "" if name == pattern else f" (of the pattern {shown(pattern)!r})"
            raise UserError(f"no shard matches {shown(name)!r}{part}: check the path and the range")
        paths += [path for path in found if not path.endswith((SUFFIX, SOURCES_SUFFIX))]
    return paths


def _matches(name: str) -> list[str]:
    if is_remote(name):  # whether an address without wildcard exists is seen when all are looked up together
        return glob_remote(name) if any(sign in name.split("?")[0] for sign in "*[") else [name]
    return [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))


def shard_headers(paths: Sequence[str], cache_dir: Path | None = None) -> list[IndexHeader]:
    """Return the header of each shard's index, made if there is none beside a local one.

    ``cache_dir``: where indices lie that are not beside their shards (default ``$GLSD_CACHE/index``). Raises UserError for
    a shard that is missing, damaged, or of another size than its index says, and for a remote one without index.
    """
    folder = cache_dir if cache_dir is not None else cache_folder("index")
    far = [path for path in paths if is_remote(path)]
    headers = dict(zip(far, _remote_headers(far, folder), strict=True))
    for path in tqdm(paths, "indexing shards", delay=2, disable=None):
        if path not in headers:
            headers[path] = _local_header(path, folder)
    return [headers[path] for path in paths]


def _local_header(path: str, folder: Path) -> IndexHeader:
    status = _stat(path)
    sidecar = index_path(path)
    if not os.path.exists(sidecar):
        sidecar = _cached(folder, os.path.abspath(path), status.st_size, str(status.st_mtime_ns))
        if not sidecar.exists():
            write_index(build_index(path), sidecar, shard_name=os.path.basename(path))
    header = read_header(sidecar)
    if header.shard_bytes != status.st_size:
        raise UserError(
            f"shard {path} has {status.st_size} bytes but {header.shard_bytes} by its index {header.path}: it is "
            f"truncated or was replaced; restore it, or {REBUILD}"
        )
    return header


def _cached(folder: Path, where: str, size: int, version: str) -> Path:
    """Return where the index of one state of a shard is kept that does not lie beside it."""
    identity = f"{VERSION}\0{where}\0{size}\0{version}"
    return folder / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}{SUFFIX}"


def _remote_headers(addresses: Sequence[str], folder: Path) -> list[IndexHeader]:
    if not addresses:
        return []
    sidecars = [beside(address, SUFFIX) for address in addresses]
    shards, indices = look_up(addresses), look_up(sidecars, missing=HIDDEN)

    def header(number: int) -> IndexHeader:
        address, shard, index = addresses[number], shards[number], indices[number]
        if shard is None:
            raise UserError(
                f"no shard at {shown(address)} (HTTP status 404): check the address and the range"
            )
        result = _index_here(address, sidecars[number], shard, index, folder)
        check_size(address, shard.size, result)
        return result

    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        numbers = range(len(addresses))
        return list(tqdm(pool.map(header, numbers), "fetching indices", len(numbers), delay=2, disable=None))


def _index_here(
    address: str, sidecar: str, shard: RemoteFile, index: RemoteFile | None, folder: Path
) -> IndexHeader:
    """Return the header of a remote shard's index: of the file beside it, copied first, or of one that was made here."""
    if index is None:
        made = _cached(folder, identity(address), shard.size, shard.version)
        if not made.exists():
            raise UserError(
                f"shard {shown(address)} has no index beside it that can be read ({shown(sidecar)}): make it once with "
                f"'python launch/pack.py index {shown(address)}' and upload it"
            )
        return read_header(made)
    local = _cached(folder, identity(sidecar), index.size, index.version)
    if local.exists() and index.version:  # without a version another one of the same size looks the same
        try:
            return read_header(local)
        except UserError:
            local.unlink(missing_ok=True)  # our copy is damaged, which says nothing of theirs
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(local) as file:
            copy_to(file, sidecar, index.size)
            file.flush()
            try:
                map_index(read_header(Path(file.name)))
            except UserError as error:
                raise UserError(str(error).replace(file.name, shown(sidecar))) from error
    except OSError as error:
        raise UserError(
            f"cannot write {local}: {one_line(error)}: name another folder in {FOLDER_VARIABLE}"
        ) from error
    return read_header(local)


def index_remote(address: str, *, upload: bool) -> int:
    """Make the index of one remote shard, which is downloaded for it, and return its number of samples.

    It is kept in ``$GLSD_CACHE/index``, where runs on this machine find it, or with ``upload`` written beside the shard.
    """
    (shard,) = look_up([address])
    if shard is None:
        raise UserError(f"no shard at {shown(address)} (HTTP status 404): check the address and the range")
    scratch = cache_folder("shards")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        # Of the cache's own names, and locked: what a kill leaves there goes with the next download.
        with open(scratch / f"{uuid.uuid4().hex}{PART}", "w+b") as file:
            try_lock(file)
            try:
                copy_to(file, address, shard.size)
                file.flush()
                index = build_index(file.name)
            except UserError as error:
                raise UserError(str(error).replace(file.name, shown(address))) from error
            finally:
                os.unlink(file.name)
    except OSError as error:
        raise UserError(
            f"cannot download {shown(address)} to {scratch}: {one_line(error)}: name another folder in "
            f"{FOLDER_VARIABLE}"
        ) from error
    made = _cached(cache_folder("index"), identity(address), shard.size, shard.version)
    write_index(index, made, shard_name=shown(address).rpartition("/")[2])
    if upload:
        write_all(str(made), beside(address, SUFFIX))
    return len(index)


def shard_cache() -> ShardCache:
    """Return the cache of remote shards that the environment names."""
    return ShardCache(cache_folder("shards"), max_bytes=cache_bytes())
