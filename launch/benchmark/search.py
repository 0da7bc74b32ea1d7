"""Search in a file of vectors: exact search against brute force in float64, recall@10 and speed-up of the indices."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from glsd.errors import UserError
from glsd.inference.index import KINDS, cosines_of, normalized, search_index, tuned_index
from glsd.metrics.search import Search, nearest, rows_of
from launch.benchmark.tools import add_common, check_positive, finish
from launch.benchmark.tools import start as start_device

K = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vectors", type=int, default=60_000, help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="numbers per vector (%(default)s)")
    parser.add_argument("--classes", type=int, default=3000, help="clusters of the vectors (%(default)s)")
    parser.add_argument(
        "--noise", type=float, default=1.0, help="of a cluster's vectors around its center (%(default)s)"
    )
    parser.add_argument(
        "--queries", type=int, default=500, help="new vectors of the same clusters (%(default)s)"
    )
    add_common(parser, rounds=5)


def benchmark(args: argparse.Namespace) -> None:
    device = start_device(args)
    check_positive(args, "dim", "classes", "queries")
    if args.vectors <= K:
        raise UserError(f"--vectors is {args.vectors}: expected more than {K}")
    vectors, query = made_vectors(args)
    print(
        f"{args.vectors:,} x {args.dim} in {args.classes:,} clusters, {args.queries} queries one by one, "
        f"{torch.get_num_threads()} threads"
    )
    everything = torch.from_numpy(vectors)

    def exact(one: np.ndarray) -> np.ndarray:
        # As nearest_neighbors, which would normalize all vectors again for every query.
        exactly = Search(query=torch.from_numpy(one), gallery=everything, euclidean=False)
        return rows_of(nearest(exactly, K)).numpy()

    truth = brute_force(query, vectors)
    found = exact(query)
    same = bool((found == truth).all())
    apart = float(np.abs(cosines_of(query, vectors, found) - cosines_of(query, vectors, truth)).max())
    print(
        f"exact: rows {'identical to' if same else 'DIFFERENT from'} brute force in float64, cosines {apart:.1e} apart"
    )
    searches: dict[str, Callable[[np.ndarray], np.ndarray]] = {"exact": exact}
    told = {"exact": "every vector"}
    built = {"exact": 0.0}
    for kind in KINDS:
        started = time.perf_counter()
        index, _, told[kind] = tuned_index(kind, vectors, torch.device("cpu"))
        built[kind] = time.perf_counter() - started
        searches[kind] = partial(by_index, index, vectors)
    results = {}
    seconds = in_turns_by_query(searches, query, args.rounds)
    for kind in searches:
        recall = float(
            np.mean([np.isin(a, b).mean() for a, b in zip(truth, searches[kind](query), strict=True)])
        )
        ratio = statistics.median(a / b for a, b in zip(seconds["exact"], seconds[kind], strict=True))
        milliseconds = 1000 * statistics.median(seconds[kind]) / len(query)
        results[kind] = {"recall": recall, "speed_up": ratio, "ms": milliseconds, "build_s": built[kind]}
        print(
            f"{kind:6} recall@10 {recall:.4f}  {milliseconds:8.3f} ms a query  {ratio:6.1f} times as fast as exact  "
            f"built in {built[kind]:6.1f} s  ({told[kind]})"
        )
    finish(args, "search", device, identical=same, apart=apart, results=results)


def by_index(index: Any, vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    found = search_index(index, query, vectors, K)
    assert found is not None, "the index finds too few"
    return found[1]


def made_vectors(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return normalized vectors and queries of the same clusters."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(args.classes, args.dim)).astype(np.float32)

    def draw(count: int) -> np.ndarray:
        noise = generator.normal(size=(count, args.dim)).astype(np.float32)
        return normalized(centers[generator.integers(0, args.classes, count)] + args.noise * noise)

    return draw(args.vectors), draw(args.queries)


def brute_force(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the rows of the 10 largest cosines, all of them computed and sorted in float64."""
    wide = vectors.astype(np.float64)
    return np.stack([np.argsort(-(wide @ one.astype(np.float64)), kind="stable")[:K] for one in query])


def in_turns_by_query(
    searches: dict[str, Callable[[np.ndarray], np.ndarray]], query: np.ndarray, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each way for all queries, one by one, in turns."""
    seconds: dict[str, list[float]] = {kind: [] for kind in searches}
    for _ in range(rounds):
        for kind, search in searches.items():
            started = time.perf_counter()
            for row in range(len(query)):
                search(query[row : row + 1])
            seconds[kind].append(time.perf_counter() - started)
    return seconds
