"""Images per second of our loader with its colours on the device, beside a plain PIL and torchvision pipeline, per worker count."""

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_plain_data import plain_batches
from benchmark_tools import (
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
    synchronise,
)
from PIL import Image
from torch import Tensor

from glsd.contracts import UserError
from glsd.data.crops import CropSpec
from glsd.data.pack import pack_samples
from glsd.data.pretrain_loader import pretrain_loader
from glsd.data.shards import ShardSet, open_shards
from glsd.pretrain import augment
from glsd.runtime.memory import grown_since, mark_memory

KINDS = ("plain", "ours")
WINDOW_SHARDS = 16
SPEC_FLAGS = ("global_size", "local_size", "local_crops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied."""
    parser.add_argument(
        "--shards", nargs="+", default=[], help="tar shards of photographs (made on the fly when left out)"
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
    add_common(parser, rounds=3)


def benchmark(args: argparse.Namespace) -> None:
    """Run both pipelines in turns for every number of workers."""
    device = start(args)
    check_positive(args, "images", "batch_size", "batches")
    if min(args.workers) < 0:
        raise UserError(f"--workers is {args.workers}: expected numbers of 0 or more")
    work, found = Work(args.batch_size * args.batches), {}
    with photographs(args) as patterns:
        shards = open_shards(patterns)
        if len(shards) < args.batch_size:
            raise UserError(
                f"--shards hold {len(shards)} images, less than one --batch_size of {args.batch_size}: lower it"
            )
        print(
            f"{len(shards)} images, batches of {args.batch_size}, 2 x {args.global_size} + {args.local_crops} x "
            f"{args.local_size} pixels, {device_name(device)}, {torch.get_num_threads()} threads, "
            f"{args.rounds} x {args.batches} batches of each, in turns"
        )
        sizes = {name: getattr(args, name) for name in (*SPEC_FLAGS, "batch_size", "threads")}
        mib = {
            kind: in_own_process(__file__, {"kind": kind, "shards": patterns, **sizes})["mib"]
            for kind in KINDS
        }
        for workers in sorted(set(args.workers)):
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(args.rounds):
                for kind in KINDS:
                    seconds[kind].append(run(kind, shards, sizes, workers, args.batches, device))
            # What a process holds is known without workers only: theirs is apart.
            results = {kind: Result(seconds[kind], None if workers else mib[kind]) for kind in KINDS}
            ratio = paired_ratio(seconds["plain"], seconds["ours"])
            print(f"\n{workers} workers: ours is {ratio:.2f} times as fast")
            print_table(results, work, device)
            found[str(workers)] = {"time_ratio": ratio, **figures(results, work, device)}
    finish(args, "data", device, extra_mib=mib, workers=found)


@contextlib.contextmanager
def photographs(args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the shards that were given, or those of made photographs in a folder that goes away afterwards."""
    if args.shards:
        yield args.shards
        return
    with tempfile.TemporaryDirectory() as folder:
        pack_samples(((jpeg(number), "jpg", None) for number in range(args.images)), folder, prefix="made")
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


def crops_on_device(
    kind: str, shards: ShardSet, sizes: dict[str, Any], workers: int, device: torch.device
) -> Generator[list[Tensor], None, None]:
    """Yield batch after batch of normalised crops on the device."""
    spec = CropSpec(
        global_size=sizes["global_size"], local_size=sizes["local_size"], num_local=sizes["local_crops"]
    )
    batch_size = sizes["batch_size"]
    if kind == "plain":
        for crops in plain_batches(shards, spec, batch_size=batch_size, num_workers=workers):
            yield [crop.to(device, non_blocking=True) for crop in crops]
        return
    for batch in pretrain_loader(
        shards,
        crop_spec=spec,
        seed=0,
        window_shards=WINDOW_SHARDS,
        consumed=0,
        batch_size=batch_size,
        micro_batch=batch_size,
        rank=0,
        world_size=1,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    ):
        pixels = augment(batch.to(device))
        yield [pixels.global_crops, pixels.local_crops]


def run(
    kind: str, shards: ShardSet, sizes: dict[str, Any], workers: int, batches: int, device: torch.device
) -> float:
    """Return the seconds of some batches, after those that the workers had ready when the clock was not running yet."""
    stream = crops_on_device(kind, shards, sizes, workers, device)
    with contextlib.closing(stream):
        for _ in itertools.islice(stream, 2 * workers + 1):
            pass
        synchronise(device)
        started = time.perf_counter()
        for _ in itertools.islice(stream, batches):
            pass
        synchronise(device)
        return time.perf_counter() - started


if __name__ == "__main__":
    payload = json.loads(sys.argv[1])
    torch.set_num_threads(payload["threads"])
    own_shards, cpu = open_shards(payload["shards"]), torch.device("cpu")
    run(payload["kind"], own_shards, {**payload, "batch_size": 1}, 0, 1, cpu)
    mark = mark_memory(cpu)
    run(payload["kind"], own_shards, payload, 0, 1, cpu)
    print(json.dumps({"mib": grown_since(mark, cpu) / MIB}))
