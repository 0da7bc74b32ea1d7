"""Find the shards that patterns name, local or remote, and the index of each."""

import glob
import hashlib
import itertools
import os
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
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
    REBUILD,
    SUFFIX,
    VERSION,
    IndexHeader,
    build_index,
    index_path,
    map_index,
    read_header,
    read_notes,
    write_index,
)
from glsd.shards.labels import CLASSES_FILE, classes_digest, read_classes
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
UNUSED_SHOWN = 5
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
        raise UserError(f"shards {pattern!r} is a folder{_pack_first(pattern) or _name_its_files(pattern)}")
    if os.path.isfile(pattern) and not _is_image(pattern):
        return [pattern]
    folder, rest = _literal_folder(pattern)
    try:
        names = list(braceexpand(rest))
    except ValueError:
        names = []
    found = [_matches(folder, name) for name in names]
    # Brackets and braces may belong to the names of the files: 'train [v2]-*.tar'.
    if not any(found) and (literal := _matches(folder, rest.replace("[", "[[]"))):
        return _shards_only(literal)
    if not names:
        raise UserError(f"shards {shown(pattern)!r}: unbalanced braces")
    for name, paths in zip(names, found, strict=True):
        if not paths:
            part = "" if folder + name == pattern else f" (of the pattern {shown(pattern)!r})"
            pack = "" if is_remote(name) else _pack_first(os.path.dirname(folder + name) or ".")
            advice = pack or ": check the path and the range"
            raise UserError(f"no shard matches {shown(folder + name)!r}{part}{advice}")
    return _shards_only([path for paths in found for path in paths])


def _shards_only(paths: Sequence[str]) -> list[str]:
    """Return the paths without indices and tables beside shards. Raises UserError for an image."""
    if images := [path for path in paths if _is_image(path)]:
        folder = os.path.dirname(images[0]) or "."
        raise UserError(f"{shown(images[0])} is an image, not a shard{_pack_first(folder)}")
    return [path for path in paths if not path.endswith((SUFFIX, SOURCES_SUFFIX))]


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower().removeprefix(".") in IMAGE_EXTENSIONS


def _name_its_files(folder: str) -> str:
    return f": name its files, e.g. '{folder.rstrip('/')}/*.tar'"


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


def _literal_folder(pattern: str) -> tuple[str, str]:
    """Return the longest folder that exists by the letters of a local pattern, and the rest of the pattern.

    A folder called 'shards [v2]' or 'a{b,c}' is that folder, not a pattern.
    """
    parts = [] if is_remote(pattern) else pattern.split("/")
    for count in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:count])
        if os.path.isdir(folder):
            return f"{folder}/", "/".join(parts[count:])
    return "", pattern


def _matches(folder: str, name: str) -> list[str]:
    if is_remote(name):
        # An address without wildcard is looked up later, together with all others.
        return glob_remote(name) if any(sign in name.split("?")[0] for sign in "*[") else [name]
    path = folder + name
    if os.path.isfile(path):
        return [path]
    return sorted(filter(os.path.isfile, glob.glob(glob.escape(folder) + name)))


def shard_headers(paths: Sequence[str]) -> list[IndexHeader]:
    """Return the header of each shard's index, made in ``$GLSD_CACHE/index`` for a local shard without one.

    Raises UserError for a shard that is missing, damaged, or of another size than in its index, and for a remote one
    without index.
    """
    folder = cache_folder("index")
    addresses = [path for path in paths if is_remote(path)]
    headers = dict(zip(addresses, _remote_headers(addresses, folder), strict=True))
    made: list[IndexHeader] = []
    for path in tqdm(paths, "indexing shards", delay=2, disable=None):
        if path not in headers:
            headers[path] = _local_header(path, folder, made)
    for line in unused_members(made):
        print(f"note: {line}", file=sys.stderr)
    return [headers[path] for path in paths]


def _local_header(path: str, folder: Path, made: list[IndexHeader]) -> IndexHeader:
    """Return the header of a local shard's index, which is added to ``made`` if there was none."""
    status = _stat(path)
    sidecar = index_path(path)
    is_new = False
    if not os.path.exists(sidecar):
        sidecar = _cached(folder, os.path.abspath(path), status.st_size, str(status.st_mtime_ns))
        is_new = not sidecar.exists()
        if is_new:
            write_index(build_index(path), sidecar, shard_name=os.path.basename(path))
    header = read_header(sidecar)
    check_size(path, status.st_size, header)
    _check_class_names(path, header)
    if is_new:
        made.append(header)
    return header


def _check_class_names(path: str, header: IndexHeader) -> None:
    """Raise UserError if labels that are names were numbered by another classes.json than the one beside the shard."""
    numbered_by = read_notes(header.notes).classes
    file = os.path.join(os.path.dirname(path), CLASSES_FILE)
    if numbered_by and (not os.path.isfile(file) or classes_digest(read_classes(file)) != numbered_by):
        raise UserError(
            f"{file} is not the one by which the index of {path} numbers the class names of its labels: {REBUILD}"
        )


def unused_members(headers: Iterable[IndexHeader]) -> list[str]:
    """Return a sentence about the images of samples that are not used, and one about images that are links, if any."""
    unused: Counter[str] = Counter()
    num_links = 0
    for header in headers:
        notes = read_notes(header.notes)
        unused.update(notes.unused)
        num_links += notes.num_links
    lines = []
    if unused:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in unused.most_common(UNUSED_SHOWN))
        more = len(unused) - UNUSED_SHOWN
        lines.append(
            f"{sum(unused.values()):,} further images of samples are not used: {kinds}"
            f"{f' and {more} more kinds' if more > 0 else ''}; a sample has one image, by default the first member of a known "
            "kind: choose another with glsd pack index --image KIND SHARDS, or give each its own name before the first dot"
        )
    if num_links:
        lines.append(
            f"{num_links:,} images are links, which are not followed: write the tar again with the files themselves "
            "(tar --dereference --hard-dereference)"
        )
    return lines


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


def index_remote(address: str, *, upload: bool, image: str = "") -> int:
    """Download a remote shard, make its index and return its number of samples.

    The index is kept in ``$GLSD_CACHE/index``, where runs on this machine find it. ``upload`` also writes it beside the
    shard. image: as in build_index.
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
                index = build_index(file.name, image=image)
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
