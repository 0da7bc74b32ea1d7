"""Weighted k-nearest-neighbor classification: exact, and in bounded memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from glsd.errors import UserError
from glsd.metrics.search import Search, check_labeled, comparable, known_labels, nearest, rows_of

_NOT_FOUND = 2**31
_QUERIES = 1024  # queries at a time
# A table of so many times k columns is faster than sorting the votes of each query.
_SPARE_COLUMNS = 4


def knn_accuracy(
    train_features: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    val_features: Float[Tensor, "q d"],
    val_labels: Int64[Tensor, " q"],
    *,
    k_list: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, dict[str, float]]:
    """Return ``{k: {"top1": share, "top5": share}}``: the val images whose label ranks first, or among the first five.

    The k train images of the largest cosine vote for their label with weight exp(cosine / temperature).
    Labels with equal votes rank in ascending order; a label without a vote never counts as found.
    Raises UserError for a k outside 1..n, features that are not finite, a missing label, and if no val label is a train label.
    Source: Wu et al. (arXiv 1805.01978, section 3.4); temperature and k list of DINO (arXiv 2104.14294).
    """
    check_labeled(train=(train_features, train_labels), val=(val_features, val_labels))
    check_k(k_list, len(train_features))
    if temperature <= 0:
        raise UserError(f"temperature is {temperature}: expected a number above 0")
    known = known_labels(train_labels.cpu(), val_labels.cpu())
    cosines, index = nearest_neighbors(val_features, train_features, k=max(k_list))
    classes, train_classes = train_labels.cpu().unique(return_inverse=True)
    hits = {k: torch.zeros(2, dtype=torch.int64) for k in sorted(k_list)}
    for rows in torch.arange(len(val_features)).split(_QUERIES):
        votes_for = train_classes[index[rows]]
        truth = torch.searchsorted(classes, val_labels.cpu()[rows]).clamp(max=len(classes) - 1)
        ranks = _label_ranks(cosines[rows], votes_for, truth, len(classes), list(hits), temperature)
        for k, rank in ranks.items():
            hits[k] += torch.stack([(known[rows] & (rank < 1)).sum(), (known[rows] & (rank < 5)).sum()])
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
) -> tuple[Float64[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Return (on the CPU) the k largest cosines of each query, descending, and their rows in ``train``.

    Vectors are normalized in float32 and multiplied in float64; cosines are rounded to 1e-9, and of equal ones
    the lower row comes first.
    """
    query, gallery = comparable(query, train, euclidean=False)
    search = Search(query=query, gallery=gallery, euclidean=False)
    keys = nearest(search, k).cpu()
    return search.similarity(keys), rows_of(keys)


def nearest_others(
    features: Float[Tensor, "n d"], rows: Int64[Tensor, " q"], *, k: int
) -> tuple[Float64[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Return the k largest cosines of some rows with the other rows, descending, and which rows these are."""
    cosines, found = nearest_neighbors(features[rows], features, k=k + 1)
    others = found != rows[:, None]
    others[others.all(dim=1), -1] = False  # more than k equal images stand before the row itself
    return cosines[others].reshape(len(rows), k), found[others].reshape(len(rows), k)


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
    place, voted = _voted_classes(votes_for, num_classes)
    is_true = voted == truth[:, None]
    score = torch.zeros(voted.shape, dtype=torch.float64)
    ranks, done = {}, 0
    for k in k_list:
        score.scatter_add_(1, place[:, done:k], weights[:, done:k])
        own = score.where(is_true, 0.0).sum(dim=1, keepdim=True)
        ahead = (score > own) | ((score == own) & (voted < truth[:, None]))
        ranks[k] = torch.where(own[:, 0] > 0, ahead.sum(dim=1), _NOT_FOUND)
        done = k
    return ranks


def _voted_classes(
    votes_for: Int64[Tensor, "q k"], num_classes: int
) -> tuple[Int64[Tensor, "q k"], Int64[Tensor, "q c"]]:
    """Return the column of each vote in a table of scores, and the class of each column, which ascends.

    With many classes only those that got a vote of the query have a column: k at most.
    """
    if num_classes <= _SPARE_COLUMNS * votes_for.shape[1]:
        return votes_for, torch.arange(num_classes).expand(len(votes_for), -1)
    ordered, origin = votes_for.sort(dim=1)
    column = torch.zeros_like(ordered)
    column[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1)
    voted = torch.full_like(ordered, -1).scatter_(1, column, ordered)  # -1 = a column without a class
    return torch.empty_like(column).scatter_(1, origin, column), voted
