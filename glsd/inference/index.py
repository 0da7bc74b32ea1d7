"""A faiss index beside a file of vectors: approximate search, with the recall that was measured when it was built.

Cosines are compared, so vectors are normalized. ``<file>.faiss`` is the index, ``<file>.faiss.json`` says what it is of.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Float64, Int64

from glsd.errors import UserError, one_line, pick
from glsd.files import replacing
from glsd.inference.vectors import RECORD_SUFFIX, VectorTable, beside, read_record, read_vectors
from glsd.metrics.knn import nearest_neighbors

INDEX_SUFFIX = ".faiss"
EXACT_UNTIL = 100_000  # exact search over so many vectors takes some milliseconds a query
K = 10  # neighbors whose recall is measured
SAMPLE = 256  # vectors of the file that are searched to measure it
WANTED = 0.95  # recall@10 that the search effort is raised for
TIE = 1e-6  # cosines this close are one: a copy of an image is as good as the image
LINKS, BUILD_EFFORT = 32, 80  # of hnsw: neighbors of a vector, and candidates looked at for them
PER_LIST = 39  # of ivf: vectors a list at least, below which faiss warns of poor centers
TRAINED_ON = 128  # of ivf: vectors a list at most that the centers are computed from


class Built(NamedTuple):
    """An index that was built, and what was measured."""

    path: Path
    kind: str
    recall: float  # recall@10 on a sample, against exact search
    seconds: float
    effort: str  # how it is searched


class Index(NamedTuple):
    """An index that was read."""

    index: Any
    told: dict[str, Any]


def check_kind(kind: str) -> None:
    """Raise UserError for an unknown kind of index, and for one that needs faiss where it is not installed."""
    pick({name: name for name in ("auto", "none", *KINDS)}, kind, "index")
    if kind in KINDS:
        _faiss()


def build_index(file: Path, kind: str, device: torch.device) -> tuple[Built | None, str]:
    """Build the index of a file of vectors, and measure it; or return None and why there is none.

    kind: "flat" is exact, "hnsw" a graph, "ivf" lists of vectors around centers. "auto" is no index up to 100,000 vectors and
    ivf beyond, which is built much sooner than hnsw; without faiss it is none. An index that is there already is built again
    only if it is of another kind. device: where the exact neighbors of the sample are computed; ivf uses faiss's GPUs.
    Raises UserError for an index of other vectors, and as read_vectors does.
    """
    count = read_record(file)["count"]
    if kind == "auto":
        kind = "none" if count <= EXACT_UNTIL else "ivf"
        if kind != "none":
            try:
                _faiss()
            except UserError as error:
                return None, f"{count:,} vectors are searched exactly; for an index: {error}"
    if kind == "none":
        return None, f"{count:,} vectors are searched exactly"
    table = read_vectors(file)
    path = beside(file, INDEX_SUFFIX)
    there = read_index(file, table)
    if there is not None and there.told["kind"] == kind:
        told = there.told
        return Built(path, kind, told["recall"], told["seconds"], told["effort"]), ""
    started = time.monotonic()
    vectors = normalized(table.vectors)
    index, recall, effort = tuned_index(kind, vectors, device)
    seconds = time.monotonic() - started
    told = {
        "kind": kind,
        "recall": recall,
        "recall_at": K,
        "sample": min(SAMPLE, len(vectors)),
        "effort": effort,
        "seconds": seconds,
        "count": len(vectors),
        "crc32": table.record["crc32"],
    }
    _write(path, index, told)
    return Built(path, kind, recall, seconds, effort), ""


def read_index(file: Path, table: VectorTable) -> Index | None:
    """Return the index beside a file of vectors; None if there is none, or faiss is not installed.

    Raises UserError if it is damaged, or of other vectors.
    """
    path = beside(file, INDEX_SUFFIX)
    if not path.is_file():
        return None
    try:
        faiss = _faiss()
    except UserError:
        return None
    advice = f"delete {path}, or build it again with glsd embed --index"
    try:
        told = json.loads(beside(path, RECORD_SUFFIX).read_bytes())
        index = faiss.read_index(str(path))
        of = (told["crc32"], told["count"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"cannot read the index {path}: {one_line(error)}; {advice}") from error
    if of != (table.record["crc32"], len(table.names)) or index.ntotal != len(table.names):
        raise UserError(f"the index {path} is not of the vectors in {file}; {advice}")
    return Index(index, told)


def search_index(
    index: Any, query: Float32[np.ndarray, "q d"], vectors: Float32[np.ndarray, "n d"], k: int
) -> tuple[Float64[np.ndarray, "q k"], Int64[np.ndarray, "q k"]] | None:
    """Return the cosines and rows of the k nearest vectors that an index finds, by descending cosine, then by row.

    query, vectors: normalized. The cosines are computed anew in float64. None if it finds fewer than k of a query.
    """
    _, rows = index.search(np.ascontiguousarray(query), k)
    if (rows < 0).any():
        return None
    cosines = cosines_of(query, vectors, rows)
    order = np.lexsort((rows, -cosines.round(9)), axis=1)
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


def cosines_of(
    query: Float32[np.ndarray, "q d"], vectors: Float32[np.ndarray, "n d"], rows: Int64[np.ndarray, "q k"]
) -> Float64[np.ndarray, "q k"]:
    """Return the cosines of each query and some rows of vectors, both of length 1, computed in float64."""
    pairs = zip(query, rows, strict=True)
    return np.stack(
        [vectors[of_query].astype(np.float64) @ one.astype(np.float64) for one, of_query in pairs]
    )


def normalized(vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Return vectors of length 1, as exact search compares them."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(vectors)), dim=1).numpy()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("an index needs faiss: pip install 'glsd[cpu]', or --index none") from error
    return faiss


def _flat(vectors: np.ndarray) -> Any:
    index = _faiss().IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def _hnsw(vectors: np.ndarray) -> Any:
    faiss = _faiss()
    index = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_EFFORT
    index.add(vectors)
    return index


def _ivf(vectors: np.ndarray) -> Any:
    faiss = _faiss()
    lists = max(1, min(int(4 * math.sqrt(len(vectors))), len(vectors) // PER_LIST))
    width = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = TRAINED_ON
    gpus = getattr(faiss, "get_num_gpus", int)()
    worker = faiss.index_cpu_to_all_gpus(index) if gpus else index
    worker.train(vectors)
    worker.add(vectors)
    return faiss.index_gpu_to_cpu(worker) if gpus else index


# Kind -> builder, from normalized vectors.
KINDS: dict[str, Callable[[np.ndarray], Any]] = {"flat": _flat, "ivf": _ivf, "hnsw": _hnsw}


def _set_nprobe(index: Any, effort: int) -> str:
    index.nprobe = min(effort, index.nlist)
    return f"{index.nprobe} of {index.nlist} lists"


def _set_candidates(index: Any, effort: int) -> str:
    index.hnsw.efSearch = effort
    return f"{effort} candidates"


# Kind -> how its effort is set, and the efforts to try.
EFFORTS: dict[str, tuple[Callable[[Any, int], str], tuple[int, ...]]] = {
    "flat": (lambda index, effort: "all vectors", (1,)),
    "ivf": (_set_nprobe, tuple(2**power for power in range(16))),
    "hnsw": (_set_candidates, (16, 32, 64, 128, 256, 512, 1024)),
}


def tuned_index(
    kind: str, vectors: Float32[np.ndarray, "n d"], device: torch.device
) -> tuple[Any, float, str]:
    """Build an index of normalized vectors, and raise its effort until its recall on a sample is as wanted.

    Returns the index, its recall and its effort in words.
    """
    index = KINDS[kind](vectors)
    rows = np.arange(min(SAMPLE, len(vectors))) * len(vectors) // min(SAMPLE, len(vectors))
    k = min(K + 1, len(vectors))  # a vector finds itself, too
    everything = torch.from_numpy(vectors).to(device)
    exact = nearest_neighbors(everything[torch.from_numpy(rows).to(device)], everything, k=k)[0].numpy()
    set_effort, efforts = EFFORTS[kind]
    recall, words = 0.0, ""
    for effort in efforts:
        before, words = words, set_effort(index, effort)
        if words == before:
            break
        recall = recall_of(index, vectors, rows, exact)
        if recall >= WANTED:
            break
    return index, recall, words


def recall_of(
    index: Any,
    vectors: Float32[np.ndarray, "n d"],
    rows: Int64[np.ndarray, " s"],
    exact: Float64[np.ndarray, "s k"],
) -> float:
    """Return the share of the exact neighbors that an index finds, without the first, which is the vector itself.

    vectors: normalized. rows: those that are searched. exact: their k largest cosines, descending. An equal cosine counts as
    found, because copies of an image are as good as the image.
    """
    k = exact.shape[1]
    if k < 2:
        return 1.0
    _, found = index.search(vectors[rows], k)
    cosines = cosines_of(vectors[rows], vectors, np.maximum(found, 0))
    cosines[found < 0] = -np.inf
    hits = (cosines >= exact[:, -1:] - TIE).sum(axis=1) - 1
    return float(hits.clip(0, k - 1).mean() / (k - 1))


def _write(path: Path, index: Any, told: dict[str, Any]) -> None:
    faiss = _faiss()
    try:
        beside(path, RECORD_SUFFIX).unlink(missing_ok=True)  # it is of the index before
        with replacing(path) as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        with replacing(beside(path, RECORD_SUFFIX)) as file:
            file.write(json.dumps(told, indent=1).encode())
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {one_line(error)}") from error
