"""Find the shards that patterns name, local or remote, and the index of each."""

import glob
import hashlib
import itertools
import os
import shlex
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand
from tqdm import tqdm

from glsd.errors import UserError, one_line
from glsd.files import expand, replacing, try_lock
from glsd.shards.cache import (
    FOLDER_VARIABLE,
    PART,
    ShardCache,
    cache_bytes,
    cache_folder,
    check_size,
)
from glsd.shards.index import (
    IMAGE_EXTENSIONS,
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

MOST_SEEN = 1000  # names in a folder that are looked at, to give advice
HIDDEN = frozenset((403, 404))  # a store that forbids listing answers 403 for a missing file
SOURCES_SUFFIX = "-files.tsv"  # beside packed shards: the source file of each key


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the local paths and addresses that brace patterns and globs name (globs sorted).

    Raises UserError for a pattern without match, a folder, a pipe, and a shard that is named twice.
    """
    return [path for paths in find_sources(patterns) for path in paths]


def find_sources(patterns: str | Sequence[str]) -> list[list[str]]:
    """Return ``find_shards`` of each pattern separately."""
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
        raise UserError(
            f"shards {pattern!r}: pipes are not supported: write the program's output to a file first"
        )
    if is_remote(pattern):
        check_scheme(pattern)
    else:
        pattern = expand(pattern)
    if os.path.isdir(pattern):
        pack = _pack_first(pattern)
        raise UserError(
            f"shards {pattern!r} is a folder{pack or f': name its files, e.g. {os.path.join(pattern, chr(42))}.tar'}"
        )
    if os.path.isfile(pattern) and not _is_image(pattern):
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
            pack = "" if is_remote(name) else _pack_first(os.path.dirname(name) or ".")
            raise UserError(
                f"no shard matches {shown(name)!r}{part}{pack or ': check the path and the range'}"
            )
        paths += [path for path in found if not path.endswith((SUFFIX, SOURCES_SUFFIX))]
    if images := [path for path in paths if _is_image(path)]:
        folder = os.path.dirname(images[0]) or "."
        raise UserError(f"{shown(images[0])} is an image, not a shard{_pack_first(folder)}")
    return paths


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower().removeprefix(".") in IMAGE_EXTENSIONS


def _pack_first(folder: str) -> str:
    """Return the advice for a local folder of images that was named instead of shards, nothing for any other."""
    if not os.path.isdir(folder):
        return ""
    inside = glob.escape(folder.rstrip("/") or "/")
    names = [
        name
        for depth in ("*", "*/*")
        for name in itertools.islice(glob.iglob(f"{inside}/{depth}"), MOST_SEEN)
    ]
    if not any(map(_is_image, names)) or any(name.endswith(".tar") for name in names):
        return ""
    command = shlex.join(["glsd", "pack", folder, "shards/"])
    return f": pack its images first ({command}), then give 'shards/*.tar'"


def _matches(name: str) -> list[str]:
    if is_remote(name):
        # An address without wildcard is looked up later, together with all others.
        return glob_remote(name) if any(sign in name.split("?")[0] for sign in "*[") else [name]
    return [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))


def shard_headers(paths: Sequence[str]) -> list[IndexHeader]:
    """Return the header of each shard's index, made in ``$GLSD_CACHE/index`` for a local shard without one.

    Raises UserError for a shard that is missing, damaged, or of another size than in its index, and for a remote one
    without index.
    """
    folder = cache_folder("index")
    addresses = [path for path in paths if is_remote(path)]
    headers = dict(zip(addresses, _remote_headers(addresses, folder), strict=True))
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
    check_size(path, status.st_size, header)
    return header


def _cached(folder: Path, where: str, size: int, version: str) -> Path:
    """Return where the index of one version of a shard is kept if it is not beside the shard."""
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
    """Return the header of a remote shard's index: of a copy of the file beside it, or of one made on this machine."""
    if index is None:
        made = _cached(folder, identity(address), shard.size, shard.version)
        if not made.exists():
            raise UserError(
                f"shard {shown(address)} has no readable index beside it ({shown(sidecar)}): make it once with "
                f"'python launch/pack.py index {shown(address)}' and upload it"
            )
        return read_header(made)
    local = _cached(folder, identity(sidecar), index.size, index.version)
    if (
        local.exists() and index.version
    ):  # without a version, a replaced index of the same size looks the same
        try:
            return read_header(local)
        except UserError:
            local.unlink(missing_ok=True)  # the copy is damaged, not necessarily the file on the server
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
    """Download a remote shard, make its index and return its number of samples.

    The index is kept in ``$GLSD_CACHE/index``, where runs on this machine find it. ``upload`` also writes it beside the
    shard.
    """
    (shard,) = look_up([address])
    if shard is None:
        raise UserError(f"no shard at {shown(address)} (HTTP status 404): check the address and the range")
    scratch = cache_folder("shards")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        # A locked part file of the cache: the next download removes it after a kill.
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
