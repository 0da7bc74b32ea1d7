"""Re-ranking of ``glsd search``: Recall@1, MAP@R and time with and without, on query and gallery images with labels."""

import argparse
import statistics
import time

import numpy as np
import torch
from jaxtyping import Bool

from glsd.errors import UserError
from glsd.inference.images import as_images
from glsd.inference.index import normalized
from glsd.inference.model import load
from glsd.inference.rerank import CANDIDATES, RERANKERS, reranked
from glsd.metrics.knn import nearest_neighbors
from launch.benchmark.tools import add_common, finish
from launch.benchmark.tools import start as start_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run, checkpoint, timm:NAME or weights file")
    parser.add_argument("--backbone", default="", help="timm name of the network, for a weights file")
    parser.add_argument("--query", required=True, help="images with labels: a folder or shards")
    parser.add_argument("--gallery", required=True, help="images with labels, in which the queries search")
    add_common(parser, rounds=3)


def benchmark(args: argparse.Namespace) -> None:
    device = start_device(args)
    model = load(args.model, backbone=args.backbone, device=device)
    vectors, labels = {}, {}
    for side in ("query", "gallery"):
        images = as_images(getattr(args, side))
        if images.labels is None:
            raise UserError(f"--{side} {getattr(args, side)}: its images have no labels")
        labels[side] = np.array([str(label) for label in images.labels])
        vectors[side] = normalized(model.embed(images, progress=True))
    query, gallery = vectors["query"], vectors["gallery"]
    k = min(CANDIDATES, len(gallery))
    rows = nearest_neighbors(torch.from_numpy(query), torch.from_numpy(gallery), k=k)[1].numpy()
    relevant = (labels["query"][:, None] == labels["gallery"]).sum(1)
    answerable = relevant > 0
    print(
        f"{model.name}: {answerable.sum():,} of {len(query):,} queries have their class among {len(gallery):,} images; "
        f"the {k} nearest are ordered anew"
    )
    orders = {"none": rows}
    milliseconds = {"none": 0.0}
    for kind in RERANKERS:
        seconds = []
        for _ in range(args.rounds):
            started = time.perf_counter()
            orders[kind] = reranked(kind, query, gallery, rows, k)
            seconds.append(time.perf_counter() - started)
        milliseconds[kind] = 1000 * statistics.median(seconds) / len(query)
    results = {}
    for kind, order in orders.items():
        hits = (labels["gallery"][order] == labels["query"][:, None])[answerable]
        scores = {
            "recall@1": hits[:, 0].astype(float),
            "map_at_r": map_at_r(hits, relevant[answerable]),
        }
        if kind == "none":  # comes first
            before = scores
        told = []
        results[kind] = {"ms": milliseconds[kind]}
        for name, score in scores.items():
            gain = 100 * (score - before[name])
            error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
            results[kind] |= {name: float(score.mean()), f"{name} gain": float(gain.mean() / 100)}
            told.append(f"{name} {100 * score.mean():.2f} % ({gain.mean():+.2f} ± {error:.2f})")
        print(f"{kind:10} {', '.join(told)}  {milliseconds[kind]:.2f} ms a query")
    finish(args, "rerank", device, results=results, queries=int(answerable.sum()))


def map_at_r(hits: Bool[np.ndarray, "q k"], relevant: np.ndarray) -> np.ndarray:
    """Return MAP@R of each query: the mean of the precisions at its hits among the first R, over R.

    relevant: R, the images of the query's class in the gallery; at most k of them count.
    """
    wanted = np.minimum(relevant, hits.shape[1])
    place = np.arange(1, hits.shape[1] + 1)
    counted = hits & (place <= wanted[:, None])
    precision = np.cumsum(hits, axis=1) / place
    return (precision * counted).sum(1) / wanted
