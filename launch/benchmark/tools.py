"""Tools of the benchmarks: runs in turns, medians, memory in an own process, the table, the JSON line, drawn boxes."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import glsd
from glsd.batches import NUM_GLOBAL
from glsd.data.crops import CropSpec, draw
from glsd.errors import UserError

MIB = 2**20
SOURCE_HEIGHT, SOURCE_WIDTH = 375, 500  # of the photographs the boxes are drawn on, in pixels

# Dense bfloat16 peak in FLOP/s by a part of the device's name, from the makers' data sheets; the longest part counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}


class Result(NamedTuple):
    """Cost of one implementation."""

    seconds: list[float]
    extra_mib: float | None = None
    flops: float | None = None  # of one run, as it is carried out


@dataclass(frozen=True)
class Work:
    """What one run achieves, whoever does it: images, and the FLOPs it takes at least (for the MFU)."""

    images: int
    flops: float | None = None


def add_common(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Declare what every benchmark takes."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="runs of each implementation, in turns (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)"
    )
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="end with all figures in one line of JSON")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for the first of these flags that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: expected 1 or more")


def start(args: argparse.Namespace) -> torch.device:
    """Set the threads and return the device: a GPU where there is one."""
    check_positive(args, "rounds", "threads")
    torch.set_num_threads(args.threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def peak_flops(name: str) -> float | None:
    """Return the dense bfloat16 peak of a device in FLOP/s, None for an unknown one."""
    known = [part for part in PEAK_FLOPS if part in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call; what it returns is gone before the clock stops."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each function: one warm-up each, then turns, so that a disturbance hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            took = timed(function, device)
            if turn:
                seconds[name].append(took)
    return seconds


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over the turns of one implementation's seconds over the other's of the same turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def in_own_process(module: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``module`` by its dotted name with ``payload`` as JSON and return the JSON of its last line: a fresh memory peak."""
    command = [sys.executable, "-m", module, json.dumps(payload)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_table(results: Mapping[str, Result], work: Work, device: torch.device) -> None:
    """Print one row an implementation; the MFU counts the FLOPs the task takes at least, not those carried out."""
    peak = peak_flops(device_name(device))
    width = max(len(name) for name in results)
    print(
        f"{'':{width}}  {'median':>10}  {'quartiles':>21}  {'images/s':>9}  {'extra memory':>12}  {'GFLOP':>8}  {'MFU':>6}"
    )
    for name, result in results.items():
        median = statistics.median(result.seconds)
        low, high = quartiles(result.seconds)
        cells = [
            f"{1000 * median:7.1f} ms",
            f"{1000 * low:7.1f} .. {1000 * high:7.1f}",
            f"{work.images / median:9.1f}",
            "-" if result.extra_mib is None else f"{result.extra_mib:.1f} MiB",
            "-" if result.flops is None else f"{result.flops / 1e9:.1f}",
            f"{work.flops / median / peak:.1%}" if peak and work.flops else "-",
        ]
        widths = (10, 21, 9, 12, 8, 6)
        print(
            f"{name:{width}}  {'  '.join(f'{cell:>{size}}' for cell, size in zip(cells, widths, strict=True))}"
        )
    sys.stdout.flush()


def figures(results: Mapping[str, Result], work: Work, device: torch.device) -> dict[str, Any]:
    """Return what the table shows, for the JSON line."""
    peak = peak_flops(device_name(device))
    medians = {name: statistics.median(result.seconds) for name, result in results.items()}
    return {
        "seconds": medians,
        "seconds_quartiles": {name: quartiles(result.seconds) for name, result in results.items()},
        "images_per_s": {name: work.images / median for name, median in medians.items()},
        "extra_mib": {name: r.extra_mib for name, r in results.items() if r.extra_mib is not None},
        "flops": {name: r.flops for name, r in results.items() if r.flops is not None},
        "least_flops": work.flops,
        "mfu": {name: work.flops / median / peak for name, median in medians.items()}
        if peak and work.flops
        else {},
    }


def finish(args: argparse.Namespace, what: str, device: torch.device, **values: Any) -> None:
    """Print the JSON line where it is asked for: flags as sizes, versions, machine, figures."""
    if not args.json:
        return
    sizes = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    versions = {"torch": torch.__version__, "glsd": glsd.__version__, "python": platform.python_version()}
    line = {
        "benchmark": what,
        **values,
        "sizes": sizes,
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }
    sys.stdout.flush()
    print(json.dumps(line, default=str), flush=True)


def drawn_boxes(spec: CropSpec, num_images: int, *, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return boxes and photometric parameters as our own cropper draws them, of the global and of the local crops.

    They are (views, images, ...), as in CropBatch.
    """
    plans = [
        draw(spec, height=SOURCE_HEIGHT, width=SOURCE_WIDTH, seed=seed, epoch=0, position=number)
        for number in range(num_images)
    ]
    parts = (slice(None, NUM_GLOBAL), slice(NUM_GLOBAL, None))
    boxes, parameters = (
        [torch.stack([getattr(plan, name)[part] for plan in plans], dim=1) for part in parts]
        for name in ("boxes", "photometric")
    )
    return boxes, parameters
