"""Retrieval metrics against pytorch-metric-learning's AccuracyCalculator: seconds, memory beyond the inputs, values.

Each measurement is a process of its own that loads the same vectors and labels; the two libraries take turns.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glsd.errors import UserError
from launch.benchmark.tools import MIB, add_json, finish

LIBRARIES = ("ours", "pml", "ours, deep")  # the last: with Recall@1000 as well, which pml does not offer
METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
RECALL_AT = {"ours": (1,), "ours, deep": (1, 10, 100, 1000)}
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=int, default=60502, help="number of vectors (%(default)s: SOP's test set)"
    )
    parser.add_argument("--dim", type=int, default=512, help="numbers per vector (%(default)s)")
    parser.add_argument("--classes", type=int, default=11316, help="number of classes (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often each library is measured (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the vectors (%(default)s)")
    parser.add_argument(
        "--noise", type=float, default=2.2, help="of the classes' images around their centers (%(default)s)"
    )
    add_json(parser)


def benchmark(args: argparse.Namespace) -> None:
    if not args.images >= 2 * args.classes > 0:
        raise UserError(f"--images is {args.images}: expected two or more for each of {args.classes} classes")
    print(f"{args.images} x {args.dim}, {args.classes} classes, {torch.get_num_threads()} threads")
    results: dict[str, list[dict[str, dict]]] = {}
    for name in ("random", "trained-like"):
        generator = torch.Generator().manual_seed(args.seed)
        labels = class_labels(args.images, args.classes, generator)
        vectors = torch.randn(args.images, args.dim, generator=generator)
        if name == "trained-like":
            centers = torch.randn(args.classes, args.dim, generator=generator)
            vectors = vectors.mul_(args.noise).add_(centers[labels])
        with tempfile.TemporaryDirectory() as folder:
            torch.save((F.normalize(vectors, dim=1), labels), Path(folder) / "inputs.pt")
            del vectors
            rounds = [{who: measured(who, folder) for who in LIBRARIES} for _ in range(args.rounds)]
        report(name, rounds)
        results[name] = rounds
    finish(args, "eval", torch.device("cpu"), results=results)


def class_labels(images: int, classes: int, generator: torch.Generator) -> Tensor:
    """Return labels in random order: two images of every class, the others dealt at random (as many as in SOP)."""
    dealt = torch.randint(classes, (images - 2 * classes,), generator=generator)
    labels = torch.cat([torch.arange(classes).repeat(2), dealt])
    return labels[torch.randperm(images, generator=generator)]


def report(name: str, rounds: list[dict[str, dict]]) -> None:
    for results in rounds:
        ours, theirs = results["ours"], results["pml"]
        apart = max(abs(ours["values"][m] - theirs["values"][m]) for m in METRICS)
        for who, result in results.items():
            seconds = f"{result['seconds']:6.1f} s ({result['cpu_seconds']:.0f} s of all cores)"
            values = "  ".join(f"{metric} {result['values'][metric]:.9f}" for metric in METRICS)
            print(f"{name:12}  {who:10}  {seconds}  {result['mib']:6.0f} MiB extra  {values}")
        same = "identical" if apart == 0 else f"at most {apart:.1e} apart"
        ratios = [theirs["seconds"] / results[who]["seconds"] for who in RECALL_AT]
        print(
            f"{name:12}  ours is {ratios[0]:.1f} times as fast, {ratios[1]:.1f} with deep recall; values {same}",
            flush=True,
        )
    print(f"{name:12}  recall {rounds[-1]['ours, deep']['recall']}", flush=True)


def measured(who: str, folder: str) -> dict:
    command = [sys.executable, "-m", "launch.benchmark.eval", who, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(calculate: Callable[[Tensor, Tensor], dict], folder: str) -> dict:
    """Return seconds, and by how much the process grew beyond its largest size with the inputs loaded."""
    vectors, labels = torch.load(Path(folder) / "inputs.pt", weights_only=True)
    torch.mm(vectors[:64], vectors[:64].T)  # start the threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    result = calculate(vectors, labels)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "mib": grown * PEAK_UNIT / MIB, **result}


def calculator(who: str) -> Callable[[Tensor, Tensor], dict]:
    """Import a library and return the function to measure."""
    if who == "pml":
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

        theirs = AccuracyCalculator(include=METRICS, k="max_bin_count", device=torch.device("cpu"))
        return lambda vectors, labels: {"values": theirs.get_accuracy(vectors, labels)}
    from glsd.metrics.retrieval import retrieval_scores

    def ours(vectors: Tensor, labels: Tensor) -> dict:
        scores = retrieval_scores(vectors, labels, recall_at=RECALL_AT[who])
        values = (scores.recall_excluding_lone[1], scores.r_precision, scores.map_at_r)
        return {"values": dict(zip(METRICS, values, strict=True)), "recall": scores.recall}

    return ours


if __name__ == "__main__":
    print(json.dumps(measure(calculator(sys.argv[1]), sys.argv[2])))
