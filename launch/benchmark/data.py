"""Time of the data path beside plain PIL and torchvision: a worker's share, the pipeline on one core, worker processes."""

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from glsd.batches import CropBatch
from glsd.config.pretrain import DataConfig
from glsd.data.crops import CropSpec, crop_sample
from glsd.data.decode import decode
from glsd.data.pretrain_loader import pretrain_loader
from glsd.errors import UserError
from glsd.packing.write import pack_samples
from glsd.pretrain.plan import crop_spec
from glsd.pretrain.step import augment
from glsd.runtime.memory import grown_since, mark_memory
from glsd.shards.store import ShardSet, open_shards
from launch.benchmark.plain_data import PlainDataset, plain_batches
from launch.benchmark.tools import (
    MIB,
    SOURCE_HEIGHT,
    SOURCE_WIDTH,
    Result,
    Work,
    add_common,
    check_positive,
    device_name,
    figures,
    finish,
    in_own_process,
    paired_ratio,
    print_table,
    start,
)

KINDS = ("plain", "ours")
WINDOW_SHARDS = 16
SPEC_FLAGS = ("global_size", "local_size", "local_crops")
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied."""
    parser.add_argument(
        "--shards", nargs="+", default=[], help="tar shards of photographs, measured beside the made ones"
    )
    parser.add_argument("--images", type=int, default=256, help="photographs to make (%(default)s)")
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[0, 1, 2], help="loader processes to try (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images (%(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="batches in one run (%(default)s)")
    parser.add_argument("--global_size", type=int, default=224, help="side in pixels (%(default)s)")
    parser.add_argument("--local_size", type=int, default=96, help="side in pixels (%(default)s)")
    parser.add_argument("--local_crops", type=int, default=8, help="per image (%(default)s)")
    add_common(parser, rounds=5)
    parser.set_defaults(threads=1)


def benchmark(args: argparse.Namespace) -> None:
    """Measure every data set in turns; times on one core are CPU seconds, those of worker processes wall seconds."""
    start(args)
    check_positive(args, "images", "batch_size", "batches")
    if min(args.workers) < 0:
        raise UserError(f"--workers is {args.workers}: expected numbers of 0 or more")
    sizes = {name: getattr(args, name) for name in (*SPEC_FLAGS, "batch_size", "threads")}
    found = {}
    given = {"given": open_shards(args.shards)} if args.shards else {}
    with made_photographs(args.images) as patterns:
        opened = {"made": open_shards(patterns), **given}
        for name, shards in opened.items():
            if len(shards) < args.batch_size:
                raise UserError(
                    f"the {name} photographs are {len(shards)}, less than one --batch_size of {args.batch_size}: lower it"
                )
        for name, shards in opened.items():
            print(
                f"\n{name}: {len(shards)} images, 2 x {args.global_size} + {args.local_crops} x {args.local_size} pixels, "
                f"{device_name(CPU)}, {torch.get_num_threads()} threads, {args.rounds} x {args.batches} batches of "
                f"{args.batch_size} of each, in turns"
            )
            found[name] = measure(shards, sizes, args)
        memory = {
            kind: in_own_process("launch.benchmark.data", {"kind": kind, "shards": patterns, **sizes})["mib"]
            for kind in KINDS
        }
    # Of several data sets the worst figure stands for all; each has its own under ``sets``.
    worst = {"worker_ratio": min, "pipeline_ratio": min, "decode_only_ratio": max}
    ratios = {key: choose(figure[key] for figure in found.values()) for key, choose in worst.items()}
    print(f"\nmemory of one batch, extra MiB: {', '.join(f'{k} {v:.1f}' for k, v in memory.items())}")
    finish(args, "data", CPU, extra_mib=memory, **ratios, sets=found)


def measure(shards: ShardSet, sizes: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the ratios of one data set, and the figures behind them."""
    work = Work(args.batch_size * args.batches)
    worker = cpu_seconds(worker_tasks(shards, spec_of(sizes), work.images), args.rounds)
    pipeline = cpu_seconds(
        {kind: pipeline_task(kind, shards, sizes, args.batches) for kind in KINDS}, args.rounds
    )
    ratios = {
        "worker_ratio": paired_ratio(worker["plain"], worker["ours"]),
        "pipeline_ratio": paired_ratio(pipeline["plain"], pipeline["ours"]),
        "decode_only_ratio": paired_ratio(worker["ours"], worker["decode only"]),
    }
    parts: dict[str, Any] = {}
    for part, seconds, says in (
        (
            "worker",
            worker,
            f"one worker's work: plain / ours {ratios['worker_ratio']:.2f}, "
            f"ours / decode only {ratios['decode_only_ratio']:.2f}",
        ),
        (
            "pipeline",
            pipeline,
            f"whole pipeline, colors on the CPU too: plain / ours {ratios['pipeline_ratio']:.2f}",
        ),
    ):
        results = {kind: Result(took) for kind, took in seconds.items()}
        print(f"\n{says}")
        print_table(results, work, CPU)
        parts[part] = figures(results, work, CPU)
    return {**ratios, **parts, "workers": scaling(shards, sizes, args, work)}


def scaling(
    shards: ShardSet, sizes: Mapping[str, Any], args: argparse.Namespace, work: Work
) -> dict[str, Any]:
    """Return what the loaders alone deliver by the number of their processes."""
    found = {}
    for workers in sorted(set(args.workers)):
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                seconds[kind].append(loading_seconds(kind, shards, sizes, workers, args.batches))
        results = {kind: Result(seconds[kind]) for kind in KINDS}
        ratio = paired_ratio(seconds["plain"], seconds["ours"])
        print(f"\nloaders with {workers} worker processes: plain / ours {ratio:.2f}")
        print_table(results, work, CPU)
        found[str(workers)] = {"time_ratio": ratio, **figures(results, work, CPU)}
    return found


def worker_tasks(shards: ShardSet, spec: CropSpec, images: int) -> dict[str, Callable[[], object]]:
    """Return what a worker does for some images: all of it in PIL, ours (decode, draw, cut), and decoding alone."""
    rows = [number * len(shards) // images for number in range(images)]
    plain = PlainDataset(shards, spec)

    def each(function: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [None for row in rows if function(row) is None]  # keeps no result

    return {
        "plain": each(plain.__getitem__),
        "ours": each(lambda row: crop_sample(shards.read(row), spec, seed=0, epoch=0, position=row)),
        "decode only": each(lambda row: decode(shards.read(row))),
    }


def pipeline_task(
    kind: str, shards: ShardSet, sizes: Mapping[str, Any], batches: int
) -> Callable[[], object]:
    """Return the making of some batches of normalized crops in this process."""

    def task() -> None:
        with contextlib.closing(loaded(kind, shards, sizes, 0)) as stream:
            for batch in itertools.islice(stream, batches):
                if isinstance(batch, CropBatch):
                    augment(batch)

    return task


def cpu_seconds(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each task: one warm-up each, then turns, so that a disturbance hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            started = time.process_time()
            task()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def loading_seconds(
    kind: str, shards: ShardSet, sizes: Mapping[str, Any], workers: int, batches: int
) -> float:
    """Return the seconds of some batches, after those that the workers had ready when the clock was not running yet."""
    with contextlib.closing(loaded(kind, shards, sizes, workers)) as stream:
        for _ in itertools.islice(stream, 2 * workers + 1):
            pass
        started = time.perf_counter()
        for _ in itertools.islice(stream, batches):
            pass
        return time.perf_counter() - started


def loaded(
    kind: str, shards: ShardSet, sizes: Mapping[str, Any], workers: int
) -> Generator[CropBatch | list[Tensor], None, None]:
    """Yield batch after batch as the loader hands it over: plain ones are finished, ours lack their colors."""
    spec, batch_size = spec_of(sizes), sizes["batch_size"]
    if kind == "plain":
        yield from plain_batches(shards, spec, batch_size=batch_size, num_workers=workers)
        return
    yield from pretrain_loader(
        shards,
        crop_spec=spec,
        match_rule=None,
        seed=0,
        window_shards=WINDOW_SHARDS,
        consumed=0,
        batch_size=batch_size,
        micro_batch=batch_size,
        rank=0,
        world_size=1,
        num_workers=workers,
        pin_memory=False,
    )


def spec_of(sizes: Mapping[str, Any]) -> CropSpec:
    data = DataConfig(
        global_size=sizes["global_size"], local_size=sizes["local_size"], num_local=sizes["local_crops"]
    )
    return crop_spec(data)


@contextlib.contextmanager
def made_photographs(images: int) -> Iterator[list[str]]:
    """Yield the shards of made photographs, in a folder that goes away afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        pack_samples(((jpeg(number), "jpg", None) for number in range(images)), folder, prefix="made")
        yield [f"{folder}/made-*.tar"]


def jpeg(number: int) -> bytes:
    """Return the JPEG file of a made photograph: smooth shapes, finer ones upon them, a little noise."""
    generator = torch.Generator().manual_seed(number)
    size = (SOURCE_HEIGHT, SOURCE_WIDTH)
    image = torch.full((1, 3, *size), 0.5)
    for cells, strength in ((4, 0.3), (16, 0.15), (64, 0.08)):
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        image += strength * F.interpolate(coarse, size, mode="bicubic")
    image += 0.02 * torch.randn(image.shape, generator=generator)
    pixels = image[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    payload = json.loads(sys.argv[1])
    torch.set_num_threads(payload["threads"])
    own_shards = open_shards(payload["shards"])
    pipeline_task(payload["kind"], own_shards, {**payload, "batch_size": 1}, 1)()
    mark = mark_memory(CPU)
    pipeline_task(payload["kind"], own_shards, payload, 1)()
    print(json.dumps({"mib": grown_since(mark, CPU) / MIB}))
