"""Time of a metric-learning step with each regularizer as a ratio to the one without, all in the same run."""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
import typing
from pathlib import Path

import torch
from accelerate import Accelerator

from glsd.batches import LabeledCrops
from glsd.config.finetune import FinetuneConfig, Reg
from glsd.config.parse import load
from glsd.finetune.networks import State, build, resolve
from glsd.finetune.plan import Plan, Rates, make_plan
from glsd.finetune.step import train_step
from glsd.runtime.loop import Training
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run
from launch.benchmark.tools import (
    add_json,
    finish,
    paired_ratio,
    synchronize,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied."""
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--loss", default="multi_similarity", help="ranking loss (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=112, help="images (%(default)s)")
    parser.add_argument("--embed_dim", type=int, default=512, help="width of the embedding (%(default)s)")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each kind (%(default)s)")
    add_json(parser)


def benchmark(args: argparse.Namespace) -> None:
    """Take the steps in turns, so that a disturbance hits every kind alike, and print medians and ratios."""
    flags = {
        "init": "random",
        "loss": args.loss,
        "data.crop": args.size,
        "model.backbone": args.backbone,
        "model.embed_dim": args.embed_dim,
        "optim.batch_size": args.batch_size,
        "optim.precision": args.precision,
    }
    base, source = resolve(load(FinetuneConfig, [f"--{key}={value}" for key, value in flags.items()]))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.precision)
    kinds: dict[str, Training[FinetuneConfig, Plan, State]] = {}
    batch = LabeledCrops(
        images=torch.randint(0, 256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8),
        labels=torch.arange(args.batch_size) // 2,
        indices=torch.arange(args.batch_size),
        keys=("",) * args.batch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        meters = Meters(Path(folder), total_steps=args.rounds, start_step=0, device=accelerator.device)
        for reg in typing.get_args(Reg):
            cfg = dataclasses.replace(base, reg=reg)
            kinds[reg] = Training(
                cfg=cfg,
                plan=make_plan(cfg, args.batch_size, args.batch_size // 2),
                state=build(cfg, source, args.batch_size // 2, accelerator),
                run=Run(Path(folder)),
                accelerator=accelerator,
                meters=meters,
            )
        seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "teacher forward")}
        for turn in range(args.rounds + 1):  # the first one warms up
            for name in seconds:
                took = timed(name, kinds, batch)
                if turn:
                    seconds[name].append(took)
        meters.close()
    report(args, seconds, accelerator.device)


def timed(name: str, kinds: dict[str, Training[FinetuneConfig, Plan, State]], batch: LabeledCrops) -> float:
    """Return the seconds of one step, or of the teacher's forward pass alone."""
    t = kinds["psd" if name == "teacher forward" else name]
    device = t.accelerator.device
    synchronize(device)
    start = time.perf_counter()
    if name == "teacher forward":
        images = batch.to(device).images.float() / 255
        with torch.no_grad(), t.accelerator.autocast():
            assert t.state.teacher is not None
            t.state.teacher(images)
    else:
        rates = Rates(epoch=1, scale=1.0, sd_weight=1.0 if t.state.teacher is not None else 0.0)
        train_step(t, rates, itertools.repeat(batch))
    synchronize(device)
    return time.perf_counter() - start


def report(args: argparse.Namespace, seconds: dict[str, list[float]], device: torch.device) -> None:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{args.backbone}, {args.loss}, {args.batch_size} images of {args.size} pixels, width {args.embed_dim}, {device}, "
        f"{torch.get_num_threads()} threads, {args.rounds} steps of each, in turns"
    )
    # Each turn compares its own steps, so that slow minutes cancel.
    ratios, beyond = {}, {}
    for name, values in seconds.items():
        ratios[name] = paired_ratio(values, seconds["none"])
        print(f"{name:<16} {1000 * median[name]:9.1f} ms   {ratios[name]:6.3f} x none")
    for name in ("psd", "obdsd"):
        parts = zip(seconds[name], seconds["none"], seconds["teacher forward"], strict=True)
        beyond[name] = statistics.median((reg - none - teacher) / none for reg, none, teacher in parts)
        print(f"{name} beyond the teacher's forward pass: {beyond[name]:+.3f} of a step")
    finish(args, "dml", device, seconds=median, ratio_to_none=ratios, beyond_teacher_forward=beyond)
