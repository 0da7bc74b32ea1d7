"""What is learned for a number of processor seconds: k-NN and RankMe of several recipes over several seeds, beside raw pixels.

Every run is an ordinary ``glsd pretrain`` in a folder of its own and goes on after a kill, and so does this benchmark. The steps
of a recipe follow from the seconds that its step takes, which are measured once.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from glsd.config.evaluate import EvalConfig, EvalDataConfig
from glsd.errors import UserError, pick
from glsd.evaluate.run import evaluate
from glsd.shards.store import open_shards
from glsd.show.matches import save_figure
from launch.benchmark.tools import add_json, check_positive, finish

K = 20
PROBES = 8  # of a run
FEW, MORE = 3, 13  # steps of the two short runs whose difference is the cost of a step
# Small crops, a small network, and batch normalization in the head: what two CPU cores can train.
BASE = """
--data.global_size 64 --data.local_size 32 --data.num_local 4 --data.global_scale 0.3 1.0 --data.local_scale 0.05 0.3
--model.backbone vit_tiny_patch16_224 --model.timm_args.patch_size 8 --model.timm_args.depth 4 --model.timm_args.embed_dim 192
--model.drop_path 0 --head.num_prototypes 1024 --head.hidden_dim 512 --head.bottleneck_dim 128 --head.batch_norm true
--optim.batch_size 64 --optim.weight_decay_end 0.1 --optim.freeze_prototypes_epochs 0 --data.num_workers 0 --watch.pictures false
"""
PUBLISHED = "--matching none --optim.lr 2e-3 --optim.teacher_momentum 0.99"
SHARP = """--matching none --model.pool mean --loss.centering sinkhorn --loss.teacher_temp 0.02 --loss.warmup_teacher_temp 0.02
--optim.lr 4e-3 --optim.teacher_momentum 0.98"""
# timm's ViT behind a convolutional stem.
HYBRID = f"{SHARP} --model.backbone vit_tiny_r_s16_p8_224 --model.timm_args.patch_size 4"
# Recipe -> flags beyond BASE; of a flag that stands twice the last one counts.
ARMS = {
    "published": PUBLISHED,
    "geometric": f"{PUBLISHED} --matching geometric",
    "similarity": f"{PUBLISHED} --matching similarity",
    "both": f"{PUBLISHED} --matching both",
    "sharp": SHARP,
    "sharp geometric": f"{SHARP} --matching geometric",
    "sharp koleo": f"{SHARP} --loss.koleo_weight 0.1",
    "hybrid": HYBRID,
    "hybrid geometric": f"{HYBRID} --matching geometric",
    "hybrid similarity": f"{HYBRID} --matching similarity",
    "hybrid koleo": f"{HYBRID} --loss.koleo_weight 0.1",
    "hybrid blur": f"{HYBRID} --data.blur_sigma 0.1 0.57",
    "hybrid following": f"{HYBRID} --optim.teacher_momentum_end 0.98",
}


class Point(NamedTuple):
    """One probe of a run."""

    seconds: float  # of the processor, in steps
    teacher: float  # k-NN, a share
    student: float
    rankme: float  # of the teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", required=True, help="labeled training shards; only the probe uses labels")
    parser.add_argument("--val", required=True, help="labeled shards that the probe classifies")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; the same one goes on")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="recipes (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="processor minutes of a run (%(default)s)")
    parser.add_argument("--extra", default="", help="further flags of every run, in one text")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw k-NN against processor seconds")
    parser.add_argument("--threads", type=int, default=1, help="of each run (%(default)s)")
    add_json(parser)


def benchmark(args: argparse.Namespace) -> None:
    check_positive(args, "threads")
    for arm in args.arms:
        pick(ARMS, arm, "entry of --arms")
    if args.minutes <= 0:
        raise UserError(f"--minutes is {args.minutes}: expected more than 0")
    torch.set_num_threads(args.threads)
    per_epoch = len(open_shards(args.shards)) // batch_size(args)
    pixels = pixels_of(args)
    print(", ".join(f"{name} {100 * share:.2f} %" for name, share in pixels.items()), flush=True)
    curves: dict[str, list[list[Point]]] = {}
    print(
        f"{'recipe':18} {'steps':>6} {'processor s':>11}  teacher          student          RankMe",
        flush=True,
    )
    for arm in args.arms:
        cost = cost_of(args, arm)
        epochs = max(1, round(60 * args.minutes / cost / per_epoch))
        curves[arm] = [trained(args, arm, seed, cost, epochs, per_epoch) for seed in args.seeds]
        ends = [curve[-1] for curve in curves[arm]]
        print(
            f"{arm:18} {epochs * per_epoch:6} {ends[0].seconds:11.0f}  {told([100 * end.teacher for end in ends])} "
            f"{told([100 * end.student for end in ends])} {statistics.mean(end.rankme for end in ends):6.1f}",
            flush=True,
        )
    if args.plot:
        draw(args.plot, curves, pixels)
    points = {
        arm: [[point._asdict() for point in curve] for curve in of_seeds] for arm, of_seeds in curves.items()
    }
    finish(args, "learn", torch.device("cpu"), pixels=pixels, curves=points)


def told(values: list[float]) -> str:
    """Return mean and deviation over the seeds."""
    deviation = f"{statistics.stdev(values):5.2f}" if len(values) > 1 else "    -"
    return f"{statistics.mean(values):6.2f} ± {deviation} %"


def pixels_of(args: argparse.Namespace) -> dict[str, float]:
    """Return the k-NN accuracy of the pixels, plain and mean-centered."""
    data = EvalDataConfig(train_shards=args.shards, val_shards=args.val, num_workers=0)
    result = evaluate(EvalConfig(model="pixels", k=[K], data=data))["result"]
    return {f"pixels{name.removeprefix(f'k={K}')}": shares["top1"] for name, shares in result.items()}


def flags_of(args: argparse.Namespace, arm: str) -> list[str]:
    return f"{BASE} {ARMS[arm]} {args.extra}".split()


def batch_size(args: argparse.Namespace) -> int:
    words = f"{BASE} {args.extra}".split()
    return int(words[len(words) - 1 - words[::-1].index("--optim.batch_size") + 1])


def cost_of(args: argparse.Namespace, arm: str) -> float:
    """Return the processor seconds of a step: of two short runs, what the further steps of the longer one took."""
    file = args.out / slug(arm) / "cost.json"
    if file.is_file():
        return float(json.loads(file.read_text())["seconds"])
    took = []
    for steps in (FEW, MORE):
        folder = args.out / slug(arm) / "cost"
        shutil.rmtree(folder, ignore_errors=True)
        limits = f"--optim.epochs 100 --optim.max_steps {steps} --watch.probe_every 0"
        took.append(pretrained(args, [*flags_of(args, arm), *limits.split()], folder, seed=0))
    shutil.rmtree(folder)
    file.write_text(json.dumps({"seconds": (took[1] - took[0]) / (MORE - FEW)}))
    return cost_of(args, arm)


def trained(
    args: argparse.Namespace, arm: str, seed: int, cost: float, epochs: int, per_epoch: int
) -> list[Point]:
    """Train one recipe with one seed, unless that is done, and return its probes."""
    folder = args.out / slug(arm) / f"seed{seed}"
    total = epochs * per_epoch
    schedule = f"--optim.epochs {epochs} --optim.warmup_epochs {min(epochs, max(1, epochs // 10))}"
    probe = f"--watch.probe_every {max(1, total // PROBES)} --watch.probe_k {K}"
    sets = ["--watch.probe_train_shards", args.shards, "--watch.probe_val_shards", args.val]
    flags = [*flags_of(args, arm), *schedule.split(), *probe.split(), *sets]
    points = probes_of(folder, cost)
    if not points or round(points[-1].seconds / cost) < total:
        pretrained(args, flags, folder, seed=seed)
        points = probes_of(folder, cost)
    return points


def pretrained(args: argparse.Namespace, flags: list[str], folder: Path, *, seed: int) -> float:
    """Run ``glsd pretrain`` in a process of its own, and return its processor seconds."""
    command = [sys.executable, "-m", "glsd", "pretrain", "--data.shards", args.shards, *flags]
    command += ["--out", str(folder), "--seed", str(seed), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{folder}: the run failed: {ended.stderr.strip().splitlines()[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def probes_of(folder: Path, cost: float) -> list[Point]:
    """Return the probes in a run's metrics, none if it has not begun."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    points = []
    for row in rows:
        if "probe" in row:
            scores: dict[str, Any] = row["probe"]
            key = f"knn{K}_top1"
            # The headline is the teacher pooled as the run is; the student's score is that of the same pooling.
            own = (
                name
                for name in scores
                if name.startswith("teacher_") and scores[name]["rankme"] == scores["rankme"]
            )
            student = scores[next(own).replace("teacher_", "student_")]
            points.append(Point(row["step"] * cost, scores[key], student[key], scores["rankme"]))
    return points


def slug(arm: str) -> str:
    return arm.replace(" ", "-")


def draw(path: Path, curves: dict[str, list[list[Point]]], pixels: dict[str, float]) -> None:
    """Write the mean k-NN of each recipe against processor seconds, with a band of one deviation, and the pixels' lines."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for arm, of_seeds in curves.items():
        seconds = [point.seconds for point in of_seeds[0]]
        scores = [[100 * point.teacher for point in at] for at in zip(*of_seeds, strict=False)]
        means = [statistics.mean(at) for at in scores]
        spread = [statistics.stdev(at) if len(at) > 1 else 0.0 for at in scores]
        (line,) = axis.plot(seconds[: len(means)], means, marker="o", markersize=3, label=arm)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(seconds[: len(means)], low, high, alpha=0.15, color=line.get_color())
    for style, (name, share) in zip(("--", ":"), pixels.items(), strict=False):
        axis.axhline(100 * share, color="gray", linestyle=style, label=name)
    axis.set_xlabel("processor seconds of training steps")
    axis.set_ylabel(f"k-NN (k={K}) of the teacher, %")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.2)
    save_figure(figure, path)
