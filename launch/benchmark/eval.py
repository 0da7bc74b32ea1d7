"""Retrieval metrics against pytorch-metric-learning's AccuracyCalculator: seconds, memory beyond the inputs, values.

With --knn: the votes of k-NN against a table with a score for every class.
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
VOTES = ("ours", "every class")
NUM_QUERIES, K_LIST, TEMPERATURE = 1024, (10, 20, 100, 200), 0.07  # of --knn
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
    parser.add_argument(
        "--knn", action="store_true", help="measure k-NN of 1,024 queries instead of retrieval"
    )
    add_json(parser)


def benchmark(args: argparse.Namespace) -> None:
    if not args.images >= 2 * args.classes > 0:
        raise UserError(f"--images is {args.images}: expected two or more for each of {args.classes} classes")
    if args.knn and args.images < NUM_QUERIES + max(K_LIST):
        raise UserError(f"--images is {args.images}: --knn needs {NUM_QUERIES + max(K_LIST)} or more")
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
            who_votes = [f"knn, {who}" for who in VOTES] if args.knn else LIBRARIES
            rounds = [{who: measured(who, folder) for who in who_votes} for _ in range(args.rounds)]
        (report_knn if args.knn else report)(name, rounds)
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


def report_knn(name: str, rounds: list[dict[str, dict]]) -> None:
    for results in rounds:
        for who, result in results.items():
            seconds = f"{result['seconds']:6.2f} s, the search {result['search_seconds']:.2f} s of them"
            print(f"{name:12}  {who:16}  {seconds}  {result['mib']:6.0f} MiB extra  {result['values']}")
        apart = len({json.dumps(result["values"]) for result in results.values()}) > 1
        print(f"{name:12}  values {'DIFFER' if apart else 'identical'}", flush=True)


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
    if who.startswith("knn, "):
        return by_neighbors if who == "knn, ours" else by_every_class
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


def by_neighbors(vectors: Tensor, labels: Tensor) -> dict:
    """Return the shares of k-NN of the first vectors among the others, and what the search alone takes."""
    from glsd.metrics.knn import knn_accuracy, nearest_neighbors

    sets = vectors[NUM_QUERIES:], labels[NUM_QUERIES:], vectors[:NUM_QUERIES], labels[:NUM_QUERIES]
    start = time.perf_counter()
    found = knn_accuracy(*sets, k_list=K_LIST, temperature=TEMPERATURE)
    seconds = time.perf_counter() - start
    nearest_neighbors(sets[2], sets[0], k=max(K_LIST))
    search_seconds = time.perf_counter() - start - seconds
    return {"values": found, "search_seconds": search_seconds, "seconds": seconds}


def by_every_class(vectors: Tensor, labels: Tensor) -> dict:
    """Return the same with a score for every class and query, as k-NN is usually written."""
    from glsd.metrics.knn import nearest_neighbors

    start = time.perf_counter()
    cosines, rows = nearest_neighbors(vectors[:NUM_QUERIES], vectors[NUM_QUERIES:], k=max(K_LIST))
    search_seconds = time.perf_counter() - start
    truth, voted = labels[:NUM_QUERIES, None], labels[NUM_QUERIES:][rows]
    weights = ((cosines - cosines[:, :1]) / TEMPERATURE).exp()
    found = {}
    for k in K_LIST:
        score = torch.zeros(len(rows), int(labels.max()) + 1, dtype=torch.float64)
        score.scatter_add_(1, voted[:, :k], weights[:, :k])
        own = score.gather(1, truth)
        rank = ((score > own) | ((score == own) & (torch.arange(score.shape[1]) < truth))).sum(dim=1)
        hits = [((rank < n) & (own[:, 0] > 0)).double().mean().item() for n in (1, 5)]
        found[k] = dict(zip(("top1", "top5"), hits, strict=True))
    return {"values": found, "search_seconds": search_seconds, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    print(json.dumps(measure(calculator(sys.argv[1]), sys.argv[2])))
