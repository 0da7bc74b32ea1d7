"""Time and memory of the local loss over ranges of prototypes, batch and local crops, as a table and a picture."""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glsd.errors import UserError
from glsd.geometry import patch_grid
from glsd.runtime.memory import total_memory
from launch.benchmark.growth import Curve, draw_growth

RANGES = {
    "prototypes": (2048, 4096, 8192, 16384, 32768, 65536),
    "batch": (1, 2, 4, 8, 16),
    "local_crops": (0, 1, 2, 4, 8),
}
STRIDE, GIB, FLOAT = 16, 2**30, 4  # pixels, bytes, bytes
NAMES = ("ours", "plain")

MeasureOne = Callable[..., tuple[list[float], float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the ranges."""
    parser.add_argument("--sweep", nargs="+", default=[], choices=list(RANGES), help="vary these, one by one")
    for name, values in RANGES.items():
        parser.add_argument(
            f"--sweep_{name}",
            nargs="+",
            type=int,
            default=list(values),
            help=f"{name} of the sweep (%(default)s)",
        )
    parser.add_argument("--sweep_rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument(
        "--plain_gib",
        type=float,
        help="leave the textbook out of the sweep where it would take more (half of the memory)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the sweeps")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a range that cannot be measured or drawn, before anything is measured."""
    if args.plot and not args.sweep:
        raise UserError("--plot draws sweeps: name some with --sweep prototypes batch local_crops")
    if args.plot and args.plot.suffix != ".png":
        raise UserError(f"--plot is {args.plot}: expected a name that ends in .png")
    for name in args.sweep:
        low = 0 if name == "local_crops" else 1
        if min(getattr(args, f"sweep_{name}")) < low:
            raise UserError(
                f"--sweep_{name} is {getattr(args, f'sweep_{name}')}: expected numbers of {low} or more"
            )
    if args.sweep_rounds < 1:
        raise UserError(f"--sweep_rounds is {args.sweep_rounds}: expected 1 or more")


def sweep(
    args: argparse.Namespace, sizes: dict[str, Any], measure_one: MeasureOne, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """Measure every range at the other sizes given, print a row a size, draw the picture, return the rows."""
    limit = args.plain_gib * GIB if args.plain_gib is not None else total_memory(device) / 2
    found: dict[str, list[dict[str, Any]]] = {}
    for varied in args.sweep:
        found[varied] = []
        print(f"\n{varied:>12}  {'ours':>26}  {'plain':>26}")
        for value in sorted(set(getattr(args, f"sweep_{varied}"))):
            row = measure_size({**sizes, varied: value}, measure_one, args.sweep_rounds, limit, device)
            found[varied].append({varied: value, **row})
            print(f"{value:12}  {'  '.join(f'{cell(row.get(name)):>26}' for name in NAMES)}", flush=True)
    for varied, rows in found.items():
        print(f"{varied}: {sentence(varied, rows)}")
    if args.plot:
        draw_growth(args.plot, {varied: curves(varied, rows) for varied, rows in found.items()})
        print(f"picture: {args.plot}")
    return found


def measure_size(
    sizes: dict[str, Any], measure_one: MeasureOne, rounds: int, limit: float, device: torch.device
) -> dict[str, Any]:
    """Return {implementation: seconds and MiB} of one size; what would not fit is left out, with a note."""
    row: dict[str, Any] = {}
    for name in NAMES:
        if name == "plain" and plain_bytes(sizes) > limit:
            row["note"] = f"plain left out: about {plain_bytes(sizes) / GIB:.1f} GiB"
            continue
        seconds, mib = measure_one(name, sizes, rounds=rounds, device=device)
        row[name] = {"seconds": statistics.median(seconds), "mib": mib}
    return row


def plain_bytes(sizes: dict[str, Any]) -> float:
    """Return about how much the textbook holds at its peak.

    Logits and their gradients of all student rows, logits and targets of all teacher rows, and for every pair of views the
    log-softmax and the gathered targets.
    """
    whole, local = (math.prod(patch_grid(sizes[name], STRIDE)) for name in ("global_size", "local_size"))
    teacher, student = 2 * whole, 2 * whole + sizes["local_crops"] * local
    pairs = 2 * whole + 2 * sizes["local_crops"] * local
    return float(FLOAT * sizes["prototypes"] * sizes["batch"] * (2 * student + 2 * teacher + 2 * pairs))


def cell(figures: dict[str, float] | None) -> str:
    if figures is None:
        return "would not fit"
    return f"{1000 * figures['seconds']:.1f} ms  {figures['mib']:.1f} MiB"


def sentence(varied: str, rows: list[dict[str, Any]]) -> str:
    """Say how much time and memory grew from the first to the last size that was measured."""
    parts = []
    for name in NAMES:
        measured = [row for row in rows if name in row]
        if len(measured) > 1:
            first, last = measured[0], measured[-1]
            time, memory = (last[name][what] / max(first[name][what], 1e-9) for what in ("seconds", "mib"))
            parts.append(
                f"{name} takes {time:.1f} times the time and {memory:.1f} times the extra memory at {last[varied]} "
                f"as at {first[varied]}"
            )
    return "; ".join(parts) or "one size only"


def curves(varied: str, rows: list[dict[str, Any]]) -> list[Curve]:
    """Return one curve an implementation for the picture."""
    return [
        Curve(
            name,
            [row[varied] for row in rows if name in row],
            [row[name]["seconds"] for row in rows if name in row],
            [row[name]["mib"] for row in rows if name in row],
        )
        for name in NAMES
    ]
