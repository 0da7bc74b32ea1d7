"""Local loss, forward and backward: ours, the textbook's, and the matrix products alone that nobody can leave out."""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glsd.batches import NUM_GLOBAL, Match
from glsd.config.pretrain import DataConfig
from glsd.errors import UserError
from glsd.geometry import geometric_match
from glsd.losses.distill import LocalLoss, local_loss
from glsd.pretrain.plan import crop_spec
from glsd.runtime.memory import grown_since, mark_memory
from launch.benchmark import sweep as benchmark_sweep
from launch.benchmark.floor import layouts, product_flops
from launch.benchmark.plain import plain_local_loss
from launch.benchmark.tools import (
    MIB,
    Result,
    Work,
    add_common,
    check_positive,
    device_name,
    drawn_boxes,
    figures,
    finish,
    in_own_process,
    in_turns,
    paired_ratio,
    print_table,
    start,
)

STRIDE = 16
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
LOSSES: dict[str, Callable[..., LocalLoss]] = {"plain": plain_local_loss, "ours": local_loss}
SIZES = ("batch", "global_size", "local_size", "local_crops", "prototypes", "bottleneck")


class Inputs(NamedTuple):
    """What a local loss is computed from."""

    student: list[Tensor]  # (views, b, patches, e) per resolution, unit vectors that want a gradient
    teacher: Tensor  # (2, b, patches, e)
    student_prototypes: Tensor  # (k, e), unit vectors that want a gradient
    teacher_prototypes: Tensor
    center: Tensor  # (k)
    boxes: list[Tensor]  # (views * b, 4) per resolution
    crop_sizes: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied."""
    parser.add_argument("--batch", type=int, default=8, help="images (%(default)s)")
    parser.add_argument("--global_size", type=int, default=224, help="side in pixels (%(default)s)")
    parser.add_argument("--local_size", type=int, default=96, help="side in pixels (%(default)s)")
    parser.add_argument("--local_crops", type=int, default=8, help="per image (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--bottleneck", type=int, default=256, help="numbers per vector (%(default)s)")
    parser.add_argument(
        "--precision", default="no", choices=["no", "bf16"], help="bf16: autocast (%(default)s)"
    )
    parser.add_argument(
        "--fuse", action="store_true", help="ours: compile what is done to logits, as on GPUs in training"
    )
    add_common(parser, rounds=10)
    benchmark_sweep.add_arguments(parser)


def benchmark(args: argparse.Namespace) -> None:
    """Measure one size, then the ranges that --sweep asks for."""
    device = start(args)
    check_positive(args, *(name for name in SIZES if name != "local_crops"))
    for name in ("global_size", "local_size"):
        if getattr(args, name) < STRIDE:
            raise UserError(f"--{name} is {getattr(args, name)}: expected a patch of {STRIDE} pixels or more")
    benchmark_sweep.check(args)
    print(
        f"local loss forward and backward: {args.batch} images, 2 x {args.global_size} + {args.local_crops} x "
        f"{args.local_size} pixels, {args.prototypes} prototypes, bottleneck {args.bottleneck}, "
        f"{device_name(device)}, {torch.get_num_threads()} threads, {args.rounds} runs of each, in turns"
    )
    sizes = {name: getattr(args, name) for name in (*SIZES, "precision", "fuse", "threads")}
    values = measure(sizes, rounds=args.rounds, device=device)
    if args.sweep:
        values["sweep"] = benchmark_sweep.sweep(args, sizes, measure_one, device)
    finish(args, "loss", device, **values)


def measure(sizes: dict[str, Any], *, rounds: int, device: torch.device) -> dict[str, Any]:
    """Print table and ratios of one size and return all figures."""
    inputs = make_inputs(sizes, device)
    apart = largest_difference(*(gradients_of(name, inputs, sizes) for name in ("ours", "plain")))
    ((found, _),) = match(inputs)
    assert found.needed is not None
    floors = layouts(
        *inputs[:4],
        needed=found.needed,
        dtype=torch.bfloat16 if sizes["precision"] == "bf16" else torch.float32,
    )
    runs: dict[str, Callable[[], object]] = {
        **{name: functools.partial(gradients_of, name, inputs, sizes) for name in LOSSES},
        **floors,
        "matching": functools.partial(match, inputs),
    }
    seconds = in_turns(runs, rounds=rounds, device=device)
    floor = min(floors, key=lambda name: statistics.median(seconds[name]))
    del runs, floors
    least = product_flops(sizes, len(found.needed.columns), len(found.needed.rows))
    all_rows = inputs.teacher.shape[:3].numel(), sum(group.shape[:3].numel() for group in inputs.student)
    flops = {"plain": product_flops(sizes, *all_rows), "ours": least}
    work = Work(sizes["batch"], least)
    mib = {name: extra_memory(name, sizes, device) for name in LOSSES}
    results = {name: Result(seconds[name], mib[name], flops[name]) for name in LOSSES}
    print_table({**results, f"floor ({floor})": Result(seconds[floor], None, least)}, work, device)
    values = {
        "time_ratio": paired_ratio(seconds["plain"], seconds["ours"]),
        "floor_ratio": paired_ratio(seconds["ours"], seconds[floor]),
        "extra_memory_ratio": mib["plain"] / max(mib["ours"], 1e-3),
        "largest_relative_difference": apart,
        "matching_share": paired_ratio(seconds["matching"], seconds["ours"]),
    }
    print(
        f"ours: {values['time_ratio']:.2f} times as fast as the textbook, {values['floor_ratio']:.2f} times the time of its "
        f"matrix products alone, {values['extra_memory_ratio']:.1f} times less extra memory\n"
        f"matching: {1000 * statistics.median(seconds['matching']):.1f} ms, {values['matching_share']:.1%} of ours; "
        f"{len(found.needed.rows)} of {all_rows[1]} student rows have a match, "
        f"{len(found.needed.columns)} of {all_rows[0]} teacher rows are one\n"
        f"loss and gradients of both agree to {apart:.1e} (relative to the largest value)",
        flush=True,
    )
    results["floor"] = Result(seconds[floor], None, least)
    results["matching"] = Result(seconds["matching"])
    return {**values, "floor_kind": floor, **figures(results, work, device)}


def make_inputs(sizes: dict[str, Any], device: torch.device, *, seed: int = 0) -> Inputs:
    """Return random unit vectors, and boxes drawn by our own cropper."""
    generator = torch.Generator().manual_seed(seed)

    def vectors(*shape: int) -> Tensor:
        rows = torch.randn(*shape, sizes["bottleneck"], generator=generator)
        return F.normalize(rows, dim=-1).to(device)

    data = DataConfig(
        global_size=sizes["global_size"], local_size=sizes["local_size"], num_local=sizes["local_crops"]
    )
    boxes, _ = drawn_boxes(crop_spec(data), sizes["batch"])
    views, crop_sizes = [NUM_GLOBAL, sizes["local_crops"]], [sizes["global_size"], sizes["local_size"]]
    used = [number for number in range(2) if views[number]]
    patches = [(size // STRIDE) ** 2 for size in crop_sizes]
    return Inputs(
        student=[vectors(views[i], sizes["batch"], patches[i]).requires_grad_() for i in used],
        teacher=vectors(NUM_GLOBAL, sizes["batch"], patches[0]),
        student_prototypes=vectors(sizes["prototypes"]).requires_grad_(),
        teacher_prototypes=vectors(sizes["prototypes"]),
        center=torch.randn(sizes["prototypes"], generator=generator).mul_(0.01).to(device),
        boxes=[boxes[i] for i in used],
        crop_sizes=[crop_sizes[i] for i in used],
    )


def match(inputs: Inputs) -> list[tuple[Match, float]]:
    """Match as the loader of a run does: by place, with hinge."""
    found = geometric_match(inputs.boxes, inputs.crop_sizes, stride=STRIDE, hinge=True, hinge_factor=1.0)
    return [(found.map(lambda tensor: tensor.to(inputs.center.device)), 1.0)]


def gradients_of(name: str, inputs: Inputs, sizes: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the loss, its gradients for the student's vectors of each resolution, and that for the prototypes."""
    enabled = sizes["precision"] == "bf16"
    with torch.autocast(inputs.center.device.type, dtype=torch.bfloat16, enabled=enabled):
        result = LOSSES[name](
            inputs.student,
            inputs.teacher,
            inputs.student_prototypes,
            inputs.teacher_prototypes,
            matches=match(inputs),
            center=inputs.center,
            student_temp=STUDENT_TEMP,
            teacher_temp=TEACHER_TEMP,
            **({"fuse": True} if sizes["fuse"] else {}),
        )
    return (
        result.loss.detach(),
        *torch.autograd.grad(result.loss, [*inputs.student, inputs.student_prototypes]),
    )


def largest_difference(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> float:
    """Return the largest difference of a value, relative to the largest value of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, plain, strict=True))


def extra_memory(name: str, sizes: dict[str, Any], device: torch.device) -> float:
    """Return the MiB that one run needs beyond its inputs: on the CPU in a process of its own."""
    if device.type == "cuda":
        return peak_beyond_inputs(name, sizes, device)
    return in_own_process("launch.benchmark.loss", {"name": name, **sizes})["mib"]


def peak_beyond_inputs(name: str, sizes: dict[str, Any], device: torch.device) -> float:
    """Return the MiB of a run's peak beyond the loaded inputs, after a small run that loads code and starts threads."""
    small = {**sizes, "batch": 1, "local_crops": min(1, sizes["local_crops"]), "prototypes": 64}
    gradients_of(name, make_inputs(small, device), small)
    inputs = make_inputs(sizes, device)
    mark = mark_memory(device)
    gradients_of(name, inputs, sizes)
    return grown_since(mark, device) / MIB


def measure_one(
    name: str, sizes: dict[str, Any], *, rounds: int, device: torch.device
) -> tuple[list[float], float]:
    """Return seconds and extra MiB of one implementation at one size."""
    run = functools.partial(gradients_of, name, make_inputs(sizes, device), sizes)
    seconds = in_turns({name: run}, rounds=rounds, device=device)[name]
    del run
    return seconds, extra_memory(name, sizes, device)


if __name__ == "__main__":
    payload = json.loads(sys.argv[1])
    torch.set_num_threads(payload["threads"])
    print(json.dumps({"mib": peak_beyond_inputs(payload.pop("name"), payload, torch.device("cpu"))}))
