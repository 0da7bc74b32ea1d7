"""A whole pretraining step with our losses and with the textbook's in their place, and what each part of it takes."""

import argparse
import contextlib
import functools
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from glsd.batches import CropBatch
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.geometry import geometric_match
from glsd.pretrain import objective
from glsd.pretrain import step as story
from glsd.pretrain.networks import State, build
from glsd.pretrain.plan import Plan, Rates, crop_spec, make_plan
from glsd.runtime.loop import Training
from glsd.runtime.memory import grown_since, mark_memory
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run
from launch.benchmark.plain import plain_global_loss, plain_local_loss
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
    synchronize,
)

KINDS = ("plain", "ours")
PLAIN = {"local_loss": plain_local_loss, "global_loss": plain_global_loss}
RATES = Rates(lr=1e-4, weight_decay=0.04, momentum=0.996, teacher_temp=0.04, freeze_prototypes=False, epoch=1)
FLAGS = {  # of this benchmark -> key of the configuration
    "backbone": "model.backbone",
    "timm_args": "model.timm_args",
    "batch_size": "optim.batch_size",
    "prototypes": "head.num_prototypes",
    "global_size": "data.global_size",
    "local_size": "data.local_size",
    "local_crops": "data.num_local",
    "matching": "matching",
    "precision": "optim.precision",
}


class Setup(NamedTuple):
    """All that a step needs."""

    training: Training[PretrainConfig, Plan, State]
    batch: CropBatch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied."""
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--timm_args", default="{}", help="of timm's create_model, as YAML (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="images (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=8192, help="of each head (%(default)s)")
    parser.add_argument("--global_size", type=int, default=224, help="side in pixels (%(default)s)")
    parser.add_argument("--local_size", type=int, default=96, help="side in pixels (%(default)s)")
    parser.add_argument("--local_crops", type=int, default=8, help="per image (%(default)s)")
    parser.add_argument("--matching", default="geometric", help="(%(default)s)")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"], help="(%(default)s)")
    add_common(parser, rounds=5)


def benchmark(args: argparse.Namespace) -> None:
    """Take the steps in turns, then once more in sections, and print table and shares."""
    device = start(args)
    check_positive(args, "batch_size", "prototypes")
    flags = {"threads": args.threads, **{name: getattr(args, name) for name in FLAGS}}
    print(
        f"pretraining step of {args.backbone}: {args.batch_size} images, 2 x {args.global_size} + {args.local_crops} x "
        f"{args.local_size} pixels, {args.prototypes} prototypes, matching {args.matching}, {device_name(device)}, "
        f"{torch.get_num_threads()} threads, {args.rounds} steps of each, in turns"
    )
    with prepared(flags) as setup:
        runs = {kind: functools.partial(step, kind, setup) for kind in KINDS}
        seconds = in_turns(runs, rounds=args.rounds, device=device)
        flops = {kind: flops_of(kind, setup) for kind in KINDS}
        shares = {kind: shares_of(kind, setup, rounds=min(3, args.rounds)) for kind in KINDS}
        mib = {kind: peak_beyond_state(kind, setup) for kind in KINDS if device.type == "cuda"}
    if device.type == "cpu":
        mib = {
            kind: in_own_process("launch.benchmark.step", {"kind": kind, **flags})["mib"] for kind in KINDS
        }
    results = {kind: Result(seconds[kind], mib[kind], flops[kind]) for kind in KINDS}
    work = Work(args.batch_size, flops["ours"])
    print_table(results, work, device)
    ratios = {
        "time_ratio": paired_ratio(seconds["plain"], seconds["ours"]),
        "extra_memory_ratio": mib["plain"] / mib["ours"],
    }
    print(
        f"ours: {ratios['time_ratio']:.2f} times as fast as the textbook step, {ratios['extra_memory_ratio']:.2f} times less "
        "memory beyond weights and optimizer state; FLOPs counted by torch in one step of each, the MFU by ours"
    )
    print_shares(shares)
    largest = {kind: max(parts, key=lambda name: parts[name]) for kind, parts in shares.items()}
    verdict = "is still the largest part" if largest["ours"] == "loss" else "is no longer the largest part"
    print(f"our loss {verdict}: that is {largest['ours']}; of the textbook step it is {largest['plain']}")
    finish(
        args, "step", device, **ratios, shares=shares, largest_part=largest, **figures(results, work, device)
    )


@contextlib.contextmanager
def prepared(flags: dict[str, Any]) -> Iterator[Setup]:
    """Build networks, optimizer and one batch of random pixels with boxes from our own cropper."""
    argv = [f"--{key}={flags[name]}" for name, key in FLAGS.items()]
    cfg = load(PretrainConfig, [*argv, "--data.shards=none"])
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=cfg.optim.precision)
    state = build(cfg, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        meters = Meters(Path(folder), total_steps=1, start_step=0, device=accelerator.device)
        with contextlib.closing(meters):
            training = Training(
                cfg=cfg,
                plan=make_plan(cfg, cfg.optim.batch_size),
                state=state,
                run=Run(Path(folder)),
                accelerator=accelerator,
                meters=meters,
            )
            yield Setup(training, random_batch(cfg, state, cfg.optim.batch_size))


def random_batch(cfg: PretrainConfig, state: State, num_images: int) -> CropBatch:
    """Return random pixels with boxes from our own cropper, matched as the loader does."""
    d = cfg.data
    boxes, parameters = drawn_boxes(crop_spec(d), num_images)
    generator = torch.Generator().manual_seed(0)
    sizes = [d.global_size, d.local_size]
    crops = [
        torch.randint(0, 256, (*part.shape[:2], 3, size, size), dtype=torch.uint8, generator=generator)
        for part, size in zip(boxes, sizes, strict=True)
    ]
    match = None
    if cfg.matching in ("geometric", "both"):
        stride = state.student.backbone.stride
        match = geometric_match(boxes, sizes, stride=stride, hinge=True, hinge_factor=1.0)
    return CropBatch(
        global_crops=crops[0],
        local_crops=crops[1],
        global_boxes=boxes[0],
        local_boxes=boxes[1],
        global_photometric=parameters[0],
        local_photometric=parameters[1],
        match=match,
        indices=torch.arange(num_images),
        keys=("",) * num_images,
    )


@contextlib.contextmanager
def losses_of(kind: str) -> Iterator[None]:
    """Let the step find the textbook's losses where ours are."""
    with contextlib.ExitStack() as stack:
        if kind == "plain":
            for name, function in PLAIN.items():
                stack.enter_context(mock.patch.object(objective, name, function))
        yield


def step(kind: str, setup: Setup) -> None:
    with losses_of(kind):
        take_step(setup)


def take_step(setup: Setup) -> None:
    """Take a step with whatever stands in for its parts at the moment."""
    batches = itertools.repeat(setup.batch)
    story.train_step(setup.training, RATES, batches)


def flops_of(kind: str, setup: Setup) -> float:
    """Count the FLOPs of the matrix products, convolutions and attention of one step."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        step(kind, setup)
    return float(counter.get_total_flops())


class Clock:
    """Adds up the seconds of named sections, waiting for the device at both ends of each."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started

    def around(self, name: str, function: Callable) -> Callable:
        def measured(*args: Any, **options: Any) -> Any:
            with self.section(name):
                return function(*args, **options)

        return measured


class _Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else upstream[0] * g for g in ctx.gradients)


def cut(loss_function: Callable, clock: Clock) -> Callable:
    """Return the loss with its backward pass done on the spot, so that the clock sees all of the loss and nothing else."""

    def measured(student: Any, teacher: Tensor, prototypes: Tensor, *rest: Any, **options: Any) -> Any:
        inputs = [*([student] if isinstance(student, Tensor) else student), prototypes]
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with clock.section("loss"):
            vectors = leaves[0] if isinstance(student, Tensor) else leaves[:-1]
            result = loss_function(vectors, teacher, leaves[-1], *rest, **options)
            gradients = torch.autograd.grad(result.loss, leaves)
        return result._replace(loss=_Known.apply(result.loss.detach(), gradients, *inputs))

    return measured


def shares_of(kind: str, setup: Setup, *, rounds: int) -> dict[str, float]:
    """Return the share of a step's time that each part takes; sections follow each other, none lies in another."""
    accelerator, state = setup.training.accelerator, setup.training.state
    clock = Clock(accelerator.device)
    total = 0.0
    with losses_of(kind), contextlib.ExitStack() as stack:

        def measure(owner: Any, attribute: str, name: str) -> None:
            around = clock.around(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, around))

        measure(story, "augment", "photometric")
        measure(story, "run_teacher", "teacher forward")
        measure(state.student, "forward", "student forward")
        measure(objective, "similarity_match", "matching")
        measure(accelerator, "backward", "backward of the rest")
        measure(state.optimizer, "step", "optimizer, clipping, EMA")
        measure(story, "ema_update", "optimizer, clipping, EMA")
        clippers = {
            key: clock.around("optimizer, clipping, EMA", clip) for key, clip in story.CLIPPERS.items()
        }
        stack.enter_context(mock.patch.dict(story.CLIPPERS, clippers))
        for name in PLAIN:
            stack.enter_context(mock.patch.object(objective, name, cut(getattr(objective, name), clock)))
        for _ in range(rounds):
            started = time.perf_counter()
            take_step(setup)
            synchronize(clock.device)
            total += time.perf_counter() - started
    parts = {name: seconds / total for name, seconds in clock.seconds.items()}
    return {**parts, "other": 1 - sum(parts.values())}


def print_shares(shares: dict[str, dict[str, float]]) -> None:
    print(f"{'share of the step':26}  {'  '.join(f'{kind:>7}' for kind in KINDS)}")
    names = dict.fromkeys(name for kind in KINDS for name in shares[kind])
    for name in names:
        print(f"{name:26}  {'  '.join(f'{shares[kind].get(name, 0.0):7.1%}' for kind in KINDS)}")


def peak_beyond_state(kind: str, setup: Setup) -> float:
    """Return the MiB of a step's peak beyond weights and optimizer state, after a step of one image."""
    t = setup.training
    small = setup._replace(batch=random_batch(t.cfg, t.state, 1))
    step(kind, small)
    mark = mark_memory(t.accelerator.device)
    step(kind, setup)
    return grown_since(mark, t.accelerator.device) / MIB


if __name__ == "__main__":
    payload = json.loads(sys.argv[1])
    torch.set_num_threads(payload.pop("threads"))
    chosen = payload.pop("kind")
    with prepared(payload) as own:
        print(json.dumps({"mib": peak_beyond_state(chosen, own)}))
