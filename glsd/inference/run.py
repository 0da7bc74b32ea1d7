"""The story of ``glsd embed``: images -> parts, on all ranks -> one file of vectors, and an index beside it."""

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from glsd import __version__
from glsd.cluster import dist, shutdown
from glsd.cluster.launch import check_world, choose_interface
from glsd.errors import UserError, one_line
from glsd.files import replacing
from glsd.inference.embed import Unreadable, Vectors, batches_of, embedded
from glsd.inference.images import Images, as_images, digest_of
from glsd.inference.index import INDEX_SUFFIX, Built, build_index, check_kind
from glsd.inference.model import WORKERS_FROM, Model, load
from glsd.inference.parts import Part, Parts, difference
from glsd.inference.vectors import (
    NAMES_SUFFIX,
    RECORD_SUFFIX,
    Rows,
    beside,
    check_format,
    read_record,
    write_vectors,
)

PARTS_SUFFIX, UNREADABLE_SUFFIX = ".parts", ".unreadable.txt"
LOST_AFTER = 60.0  # seconds without a heartbeat after which a rank counts as lost
MOST_WORKERS = 8  # loader processes of a rank; each holds two batches
LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal
# What must agree between two calls that make one file, and the key that says it to a person. The rest only tells how it was done.
COMPARED = {
    "network": "model",
    **{key: key for key in ("transform", "precision", "width")},
    "images_digest": "images_title",
    "images": "images",
    "labeled": "labeled",
    "glsd": "glsd",
}


class Summary(NamedTuple):
    """What an embedding run came to."""

    out: Path
    model: str
    num_vectors: int  # in the file
    seconds: float
    images_done: int  # by this call; 0 = the file was there already
    resumed: int  # images that an earlier call had embedded
    unreadable: list[tuple[str, str]]  # name, reason
    built: Built | None  # the index
    no_index: str  # why there is none; empty = there is one


def embed_files(
    model: str,
    images: Sequence[str],
    out: str | Path,
    *,
    role: str | None = None,
    backbone: str = "",
    pool: str | None = None,
    image_size: int | None = None,
    which: str = "last",
    precision: str = "no",
    batch_size: int = 64,
    num_workers: int | None = None,
    index: str = "auto",
    path_column: str = "path",
    label_column: str | None = None,
    root: str | None = None,
) -> Summary | None:
    """Write one vector per readable image, with its name, to a file; see glsd.inference.vectors for the four formats.

    model, role, backbone, pool, image_size, which: as ``glsd.load``. images, path_column, label_column, root: as ``as_images``.
    precision: "no" or "bf16". num_workers: loader processes of a rank; None = the cores of its share, at most 8. index: "auto",
    "none", "flat", "ivf" or "hnsw", see glsd.inference.index. Every rank calls; rank 0 returns the summary, the others None.
    A call that was killed is repeated to go on where it stopped: parts of a fixed number of images stand in ``<out>.parts``
    until all are there. Unreadable images are listed in ``<out>.unreadable.txt``.
    Raises UserError, before the first forward pass where possible: for what the arguments name, for parts or a file of another
    model, other images or other settings, for 0 readable images, and for what cannot be written.
    """
    out = Path(out)
    check_format(out)
    check_kind(index)
    device = _join_ranks()
    chosen = dist.together(
        lambda: as_images(list(images), path_column=path_column, label_column=label_column, root=root)
    )
    loading: dict[str, Any] = {"role": role, "backbone": backbone, "pool": pool, "image_size": image_size}
    # The plan holds the checkpoint itself, not which one it was.
    network = dist.together(lambda: load(model, which=which, **loading))
    plan = dist.together(lambda: make_plan(model, network, chosen, loading, precision))
    parts = Parts(beside(out, PARTS_SUFFIX), plan, compared=COMPARED)
    _introduce(out, network, plan)
    workers = _own_workers(plan["images"]) if num_workers is None else num_workers
    stream = _stream(network.to(device), chosen, batch_size, workers, precision)
    started = time.monotonic()
    with contextlib.ExitStack() as held:
        missing = _shared(lambda: _missing(out, plan, parts, held))
        if missing:
            _embed_parts(parts, missing[dist.rank() :: dist.world_size()], stream)
        main = dist.is_main()
        # What follows is of rank 0 alone and may take long: no other rank waits for it.
        shutdown.finish()
        if not main:
            return None
        unreadable = _join(out, parts, chosen) if missing is not None else []
    seconds = time.monotonic() - started
    done = sum(len(parts.numbers(part)) for part in missing or [])
    resumed = parts.total - done if missing is not None else 0
    built, no_index = build_index(out, index, device)
    counts = read_record(out)["count"], seconds, done, resumed
    return Summary(out, network.name, *counts, unreadable, built, no_index)


def _introduce(out: Path, model: Model, plan: Mapping[str, Any]) -> None:
    """Print what is embedded. Raises UserError if another rank would embed something else."""
    if len(set(dist.gather_objects(json.dumps([plan[key] for key in COMPARED])))) > 1:
        raise UserError(
            f"{plan['images_title']}: the ranks see other images or another model: give them the same files"
        )
    if dist.is_main() and not out.exists():
        step = "" if plan["step"] is None else f", step {plan['step']}"
        print(f"model     {model.name}{step}: vectors of width {model.width}")
        print(f"images    {plan['images']:,} of {plan['images_title']}", flush=True)


def _join_ranks() -> torch.device:
    choose_interface()
    processes = PartialState(cpu=not torch.cuda.is_available())
    check_world(processes.num_processes, "-m glsd embed")
    shutdown.watch_others(LOST_AFTER)
    return processes.device


def _own_workers(images: int) -> int:
    """Return a number of loader processes: this rank's share of the host's cores; none for few images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if images < WORKERS_FROM else max(1, min(MOST_WORKERS, share))


def _shared(find: Callable[[], Any]) -> Any:
    """Return what ``find`` returns on rank 0, on every rank; its UserError is raised on all of them."""
    found = dist.together(lambda: find() if dist.is_main() else None)
    return dist.broadcast_object(found)


def _missing(
    out: Path, plan: Mapping[str, Any], parts: Parts, held: contextlib.ExitStack
) -> list[int] | None:
    """Return the parts to make, and hold their folder; None if the file is there already, whole and of this plan."""
    if out.exists() or out.is_symlink():
        before = read_record(out)
        if what := difference(before, plan, COMPARED):
            raise UserError(f"{out} is of another call: {what}; choose another --out, or delete the file")
        parts.remove()
        return None
    return held.enter_context(parts.opened())


def make_plan(
    path: str, model: Model, images: Images, loading: Mapping[str, Any], precision: str
) -> dict[str, Any]:
    """Return all that decides the vectors: the model and its weights, the transform, the images. It can be written as JSON."""
    if precision not in ("no", "bf16"):
        raise UserError(f"precision is {precision!r}: expected 'no' (float32) or 'bf16'")
    loaded = model.loaded
    where = loaded.checkpoint or loaded.run
    if where is None and not path.startswith("timm:") and path != "random":
        where = Path(path)
    return {
        "glsd": __version__,
        # A run goes on: its latest checkpoint may be another one tomorrow.
        "model": str(where.absolute()) if where else path,
        "model_name": model.name,
        "step": loaded.step,
        "loading": dict(loading),
        "network": network_digest(model),
        "transform": repr(model.transform),
        "precision": precision,
        "width": model.width,
        "images": len(images.names),
        "images_title": images.title,
        "images_digest": digest_of(images),
        "place": dict(images.place or {}),
        "labeled": images.labels is not None,
    }


def network_digest(model: Model) -> str:
    """Return a hash of what a network computes: its architecture, its pooling, its weights and buffers."""
    config = model.loaded.config
    architecture = getattr(model.backbone.net, "pretrained_cfg", {}).get("architecture", "")
    told = [type(model.network).__name__, model.backbone.pool, architecture]
    told += [] if config is None else [config.model.backbone, sorted(config.model.timm_args.items())]
    digest = hashlib.sha256(repr(told).encode())
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stream(
    model: Model, images: Images, batch_size: int, num_workers: int, precision: str
) -> Callable[[Iterable[range]], Iterator[Vectors]]:
    """Return a function: numbers of the images of some parts -> their vectors, in batches that end with the part."""

    def vectors(numbers: Iterable[range]) -> Iterator[Vectors]:
        return embedded(
            images,
            model.features,
            model.transform,
            batches=[batch for part in numbers for batch in batches_of(part, batch_size)],
            num_workers=num_workers,
            device=model.device,
            precision=precision,
        )

    return vectors


def _embed_parts(
    parts: Parts, mine: list[int], stream: Callable[[Iterable[range]], Iterator[Vectors]]
) -> None:
    """Make and write the parts of this rank."""
    width = parts.plan["width"]
    numbers: list[np.ndarray] = []
    vectors: list[np.ndarray] = [np.zeros((0, width), np.float32)]
    unreadable: list[Unreadable] = []
    waiting = iter(mine)
    part = next(waiting, None)
    with _progress(sum(len(parts.numbers(each)) for each in mine)) as advance:
        for found in stream(map(parts.numbers, mine)):
            numbers.append(found.numbers)
            unreadable += found.unreadable
            if len(found.numbers):
                vectors.append(found.vectors)
            advance(len(found.numbers) + len(found.unreadable))
            assert part is not None
            if sum(map(len, numbers)) + len(unreadable) == len(parts.numbers(part)):
                parts.write(part, Part(np.concatenate(numbers), np.concatenate(vectors), unreadable))
                numbers, vectors, unreadable = [], vectors[:1], []
                part = next(waiting, None)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show how far this rank is: a bar on a terminal, a line now and then elsewhere. Only rank 0 shows anything."""
    ranks = dist.world_size()
    what = "" if ranks == 1 else f" of rank 0 of {ranks}"
    started = said = time.monotonic()
    done = 0
    shows = dist.is_main()
    with tqdm(
        total=total, unit="image", desc=f"images{what}", leave=False, disable=None if shows else True
    ) as bar:

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            bar.update(count)
            now = time.monotonic()
            if shows and bar.disable and now - said > LINE_EVERY:
                said = now
                rate = done / (now - started)
                print(f"{done:,} of {total:,} images{what}, {rate:,.0f} images/s", flush=True)

        yield advance


def _join(out: Path, parts: Parts, images: Images) -> list[tuple[str, str]]:
    """Write the file of vectors from all parts, list the unreadable images, and delete the parts."""
    count = crc32 = 0
    unreadable: list[tuple[str, str]] = []
    for part in range(parts.count):
        found = parts.read(part)
        count += len(found.numbers)
        crc32 = zlib.crc32(np.ascontiguousarray(found.vectors).data, crc32)
        unreadable += [(images.names[entry.number], entry.reason) for entry in found.unreadable]
    if not count:
        parts.remove()  # they hold nothing
        name, reason = unreadable[0]
        raise UserError(
            f"{images.title}: none of the {parts.total} images can be read, the first is {name!a}: {reason}"
        )
    _write_list(beside(out, UNREADABLE_SUFFIX), unreadable)
    for suffix in (INDEX_SUFFIX, INDEX_SUFFIX + RECORD_SUFFIX, RECORD_SUFFIX, NAMES_SUFFIX):
        beside(out, suffix).unlink(missing_ok=True)  # of a file that was deleted
    for leftover in out.parent.iterdir():
        if leftover.name.startswith(f".{out.name}.") and leftover.suffix == ".tmp":
            leftover.unlink(missing_ok=True)

    def rows() -> Iterator[Rows]:
        for part in range(parts.count):
            found = parts.read(part)
            numbers = found.numbers.tolist()
            labels = None if images.labels is None else [images.labels[number] for number in numbers]
            if numbers:
                yield Rows(found.vectors, [images.names[number] for number in numbers], found.numbers, labels)

    write_vectors(out, {**parts.plan, "count": count, "crc32": crc32}, rows)
    parts.remove()
    return unreadable


def _write_list(file: Path, unreadable: Sequence[tuple[str, str]]) -> None:
    """Write one line per unreadable image, name and reason; no file if there is none."""
    if not unreadable:
        file.unlink(missing_ok=True)
        return
    lines = "".join(f"{_one_row(name)}\t{_one_row(reason)}\n" for name, reason in unreadable)
    try:
        with replacing(file) as opened:
            opened.write(lines.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"cannot write {file}: {one_line(error)}") from error


def _one_row(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
