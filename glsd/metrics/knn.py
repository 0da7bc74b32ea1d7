"""Weighted k-nearest-neighbor classification: exact, in bounded memory, the same with faiss and torch."""

import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from glsd.errors import UserError, pick

_STEPS = (
    1e9  # cosines are compared in steps of 1e-9: closer ones count as equal, and the lower row comes first
)
_ROW_BITS = 31
_NUMBERS_HELD = 2**24  # similarities or gathered coordinates held at a time: 128 MiB in float64
_NOT_FOUND = 2**31


def knn_accuracy(
    train_features: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    val_features: Float[Tensor, "q d"],
    val_labels: Int64[Tensor, " q"],
    *,
    k_list: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    backend: str = "auto",
    chunk: int = 1024,
) -> dict[int, dict[str, float]]:
    """Return ``{k: {"top1": share, "top5": share}}`` of val images whose label is (among) the first.

    The k train images of the largest cosine vote for their label with weight exp(cosine / temperature).
    Labels with equal votes rank in ascending order; a label without a vote never counts as found. backend,
    chunk: as in nearest_neighbors.
    Raises UserError for a k outside 1..n, features that are not finite, a missing label, an unknown backend.
    Source: Wu et al. (arXiv 1805.01978, section 3.4); temperature and k list of DINO (arXiv 2104.14294).
    """
    _check(train_features, train_labels, "train")
    _check(val_features, val_labels, "val")
    check_k(k_list, len(train_features))
    if temperature <= 0:
        raise UserError(f"k-NN temperature is {temperature}: expected a number above 0")
    cosines, index = nearest_neighbors(
        val_features, train_features, k=max(k_list), backend=backend, chunk=chunk
    )
    classes, train_classes = train_labels.cpu().unique(return_inverse=True)
    hits = {k: torch.zeros(2, dtype=torch.int64) for k in sorted(k_list)}
    for rows in torch.arange(len(val_features)).split(chunk):
        votes_for = train_classes[index[rows]]
        truth = torch.searchsorted(classes, val_labels.cpu()[rows]).clamp(max=len(classes) - 1)
        known = classes[truth] == val_labels.cpu()[rows]
        ranks = _label_ranks(cosines[rows], votes_for, truth, len(classes), list(hits), temperature)
        for k, rank in ranks.items():
            hits[k] += torch.stack([(known & (rank < 1)).sum(), (known & (rank < 5)).sum()])
    shares = {k: (hits[k].double() / len(val_features)).tolist() for k in hits}
    return {k: {"top1": shares[k][0], "top5": shares[k][1]} for k in k_list}


def check_k(k_list: Sequence[int], num_train: int) -> None:
    """Raise UserError if ``k_list`` is empty or holds a number that is not 1 to ``num_train``."""
    if not k_list:
        raise UserError("k_list is empty: give at least one number of neighbors")
    for k in k_list:
        if not 1 <= k <= num_train:
            raise UserError(f"k_list holds {k}: expected 1 to {num_train}, the number of train images")


def nearest_neighbors(
    query: Float[Tensor, "q d"],
    train: Float[Tensor, "n d"],
    *,
    k: int,
    backend: str = "auto",
    chunk: int = 1024,
) -> tuple[Float64[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Return (on the CPU) the k largest cosines of each query, descending, and their rows in ``train``.

    Vectors are normalized in float32 and multiplied in float64; cosines are rounded to 1e-9, of equal ones
    the lower row comes first. backend: a key of BACKENDS, or "auto" = faiss if it is installed and the
    features are on the CPU, else torch; chunk: queries at a time. Neither changes the result.
    """
    installed = importlib.util.find_spec("faiss") is not None
    if backend == "faiss" and not installed:
        raise UserError("k-NN backend 'faiss' is not installed: pip install faiss-cpu, or use backend torch")
    if backend == "auto":
        backend = "faiss" if installed and query.device.type == "cpu" else "torch"
    search = pick(BACKENDS, backend, "k-NN backend")
    query, train = F.normalize(query.float(), dim=1), F.normalize(train.float(), dim=1)
    ranked = torch.cat([search(rows, train, k).cpu() for rows in query.split(chunk)])
    return (ranked >> _ROW_BITS).double() / _STEPS, 2**_ROW_BITS - 1 - (ranked & (2**_ROW_BITS - 1))


def _rank_key(cosines: Float64[Tensor, "q n"], row: Int64[Tensor, "..."]) -> Int64[Tensor, "q n"]:
    """Return one integer per pair that sorts by cosine, then by lower row, so that top-k has one answer."""
    return ((cosines * _STEPS).round().long() << _ROW_BITS) + (2**_ROW_BITS - 1 - row)


def _search_torch(
    query: Float32[Tensor, "q d"], train: Float32[Tensor, "n d"], k: int
) -> Int64[Tensor, "q k"]:
    """Every product in float64, tile by tile of the train set."""
    best = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
    tile = max(k, _NUMBERS_HELD // max(len(query), 1))
    for start in range(0, len(train), tile):
        part = train[start : start + tile]
        row = torch.arange(start, start + len(part), device=query.device)
        best = torch.cat([best, _rank_key(query.double() @ part.double().T, row)], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return best


def _search_faiss(
    query: Float32[Tensor, "q d"], train: Float32[Tensor, "n d"], k: int
) -> Int64[Tensor, "q k"]:
    """Spare candidates by faiss in float32, ranked in float64; where they may not suffice, every product."""
    import faiss

    num_candidates = min(len(train), k + max(32, k // 4))
    pairs = faiss.knn(
        query.cpu().numpy(), train.cpu().numpy(), num_candidates, metric=faiss.METRIC_INNER_PRODUCT
    )
    found, rows = (torch.from_numpy(array).to(query.device) for array in pairs)
    piece = max(1, _NUMBERS_HELD // (num_candidates * query.shape[1]))
    keys = torch.cat(
        [
            _rank_key(torch.bmm(train[r].double(), q.double()[:, :, None])[:, :, 0], r)
            for r, q in zip(rows.split(piece), query.split(piece), strict=True)
        ]
    )
    best = keys.topk(k, dim=1).values
    if num_candidates == len(train):
        return best
    # Rounding d products of unit vectors in float32 errs by about sqrt(d) * 2^-25; take eight times that.
    slack = query.shape[1] ** 0.5 * 2**-22
    kth = (best[:, -1] >> _ROW_BITS).double() / _STEPS
    doubtful = kth <= found[:, -1].double() + slack
    if doubtful.any():
        best[doubtful] = _search_torch(query[doubtful], train, k)
    return best


BACKENDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "faiss": _search_faiss,
    "torch": _search_torch,
}


def _label_ranks(
    cosines: Float64[Tensor, "q k"],
    votes_for: Int64[Tensor, "q k"],
    truth: Int64[Tensor, " q"],
    num_classes: int,
    k_list: list[int],
    temperature: float,
) -> dict[int, Int64[Tensor, " q"]]:
    """Return for every k (ascending) the place of the true class, _NOT_FOUND if it got no vote."""
    # A common factor per query changes no rank, and keeps exp in range at any temperature.
    weights = ((cosines - cosines[:, :1]) / temperature).exp()
    score = torch.zeros(len(cosines), num_classes, dtype=torch.float64)
    lower_class = torch.arange(num_classes) < truth[:, None]
    ranks, done = {}, 0
    for k in k_list:
        score.scatter_add_(1, votes_for[:, done:k], weights[:, done:k])
        own = score.gather(1, truth[:, None])
        ahead = (score > own) | ((score == own) & lower_class)
        ranks[k] = torch.where(own[:, 0] > 0, ahead.sum(dim=1), _NOT_FOUND)
        done = k
    return ranks


def _check(features: Tensor, labels: Tensor, name: str) -> None:
    if len(features) == 0:
        raise UserError(f"k-NN: the {name} set is empty")
    if not features.isfinite().all():
        raise UserError(
            f"k-NN: {name} features are not finite: the network diverged, take an earlier checkpoint"
        )
    if (labels < 0).any():
        raise UserError(
            f"k-NN: {int((labels < 0).sum())} of {len(labels)} {name} lack a label: pack folders of classes"
        )
