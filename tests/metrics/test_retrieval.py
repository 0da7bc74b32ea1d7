"""Retrieval metrics against a literal twin that sorts, and what must not change them."""

import math

import pytest
import torch
import torch.nn.functional as F

from glsd.errors import UserError
from glsd.metrics import ranks as ranking
from glsd.metrics import retrieval
from glsd.metrics.ranks import QueryRanks
from glsd.metrics.retrieval import rank_queries, retrieval_scores, scores
from glsd.metrics.search import check_labeled


@pytest.fixture
def tile(monkeypatch):
    """A function that sets how many queries and references make a tile."""
    return lambda size: monkeypatch.setitem(ranking._TILE, "cpu", size)


def sorted_by_hand(query, query_labels, gallery=None, gallery_labels=None, *, distance):
    """Every metric of every query from a sorted list of its references."""
    alone = gallery is None
    gallery, gallery_labels = (query, query_labels) if alone else (gallery, gallery_labels)
    if distance == "euclidean":
        similarity = -(query.double()[:, None] - gallery.double()).square().sum(dim=2)
    else:
        unit = [F.normalize(x.float(), dim=1).double() for x in (query, gallery)]
        similarity = (unit[0] @ unit[1].T * 1e9).round()
    rows = []
    for i, label in enumerate(query_labels.tolist()):
        references = [j for j in range(len(gallery)) if not (alone and j == i)]
        row = []
        for negatives_first in (False, True):

            def place(j, i=i, label=label, negatives_first=negatives_first):
                return -float(similarity[i, j]), negatives_first and gallery_labels[j] == label, j

            same = [int(gallery_labels[j]) == label for j in sorted(references, key=place)]
            r = sum(same)
            if r == 0:
                row += [-1, math.nan, math.nan]
                continue
            precisions = [sum(same[: k + 1]) / (k + 1) for k in range(r) if same[k]]
            row += [same.index(True) + 1, sum(precisions) / r, sum(same[:r]) / r]
        rows.append([sum(same), *row])
    return QueryRanks(*torch.tensor(rows, dtype=torch.float64).T)


def assert_same_ranks(got, want):
    for name in QueryRanks._fields:
        ours, theirs = getattr(got, name).double(), getattr(want, name).double()
        same = (ours - theirs).abs() <= 1e-12
        same |= ours.isnan() & theirs.isnan()
        wrong = (~same).nonzero()[:, 0]
        assert not len(wrong), f"{name} of {wrong.tolist()}: {ours[wrong]}, expected {theirs[wrong]}"


def vectors(kind, count, dim, generator):
    if kind == "integers":  # ties by the dozen
        return torch.randint(-2, 3, (count, dim), generator=generator).float()
    if kind == "equal":
        return torch.full((count, dim), 0.7)
    x = torch.randn(count, dim, generator=generator)
    if kind == "duplicates" and count > 20:
        x[5:15] = x[3]
        x[-4:] = x[0]
    return x


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["random", "duplicates", "integers", "equal"])
@pytest.mark.parametrize(("seed", "count", "dim", "classes"), [(0, 131, 5, 30), (1, 75, 3, 4), (2, 2, 2, 1)])
def test_equals_sorting(distance, kind, seed, count, dim, classes, tile):
    generator = torch.Generator().manual_seed(seed)
    x = vectors(kind, count, dim, generator)
    labels = torch.randint(classes, (count,), generator=generator)
    gallery = vectors(kind, count // 2 + 3, dim, generator)
    gallery[:1] = x[:1]
    gallery_labels = torch.randint(classes + 1, (len(gallery),), generator=generator)
    gallery_labels[0] = labels[0]
    for sets in ((x, labels), (x, labels, gallery, gallery_labels)):
        want = sorted_by_hand(*sets, distance=distance)
        for size in (64, 100, 2048):
            tile(size)
            assert_same_ranks(rank_queries(*sets, distance=distance), want)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_many_tiles_equal_every_pair_in_float64(distance, tile, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(250, (1500,), generator=generator)
    x = torch.randn(250, 24, generator=generator)[labels] + torch.randn(1500, 24, generator=generator)
    x[100:180] = x[700:780]  # equally similar references in other tiles
    by_tiles = []
    for size in (128, 448, 4096):
        tile(size)
        by_tiles.append(rank_queries(x, labels, distance=distance))
    monkeypatch.setattr(retrieval, "_MOST_RELEVANT", 0)
    want = rank_queries(x, labels, distance=distance)
    assert 0.1 < (want.first_rank == 1).double().mean() < 0.9
    for got in by_tiles:
        assert_same_ranks(got, want)


def test_groups_of_pairs_do_not_change_the_ranks(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(40, (600,), generator=generator)
    x = torch.randn(40, 8, generator=generator)[labels] + 0.5 * torch.randn(600, 8, generator=generator)
    want = rank_queries(x, labels)
    monkeypatch.setattr(ranking, "_PAIRS_HELD", 50)
    monkeypatch.setattr(ranking, "_ROWS", 33)
    monkeypatch.setattr(ranking, "_NUMBERS_HELD", 100)
    assert_same_ranks(rank_queries(x, labels), want)


def test_few_huge_classes():
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (1000,), generator=generator)
    labels[:20] = 3 + torch.arange(20) // 4  # beside a few small ones
    x = torch.randn(8, 6, generator=generator)[labels] + torch.randn(1000, 6, generator=generator)
    got = rank_queries(x, labels)
    assert int(got.num_relevant.max()) > retrieval._MOST_RELEVANT > 3 == int(got.num_relevant.min())
    some = torch.arange(0, 1000, 50)
    unit = F.normalize(x, dim=1).double()
    for i in some.tolist():
        order = (unit[i] @ unit.T).masked_fill(torch.arange(1000) == i, -2).argsort(descending=True)[:-1]
        same, r = (labels[order] == labels[i]).double(), int(got.num_relevant[i])
        precision = same.cumsum(0) / torch.arange(1, 1000)
        torch.testing.assert_close(got.map_at_r[i], (precision * same)[:r].sum() / r, rtol=1e-12, atol=0)
        assert got.r_precision[i] == same[:r].sum() / r
        assert got.first_rank[i] == int(same.argmax()) + 1


def test_the_query_is_removed_by_index_not_by_place():
    # Image 1 is the double of image 0 and of another class; dropping the nearest would drop the wrong one.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    ranks = rank_queries(x, torch.tensor([0, 1, 0, 1]))
    assert ranks.first_rank.tolist() == [2, 3, 1, 3]


def test_both_orders_of_ties():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    got = retrieval_scores(x, torch.tensor([0, 0, 1, 1]), recall_at=(1, 3))
    # 0: all others tie, the positive has the lowest index. 1: its positive is last. 2, 3: each other's double, after 1.
    assert got.recall == {1: 1 / 4, 3: 1.0}
    assert got.pessimistic_recall == {1: 0.0, 3: 1.0}
    assert (got.map_at_r, got.pessimistic_map_at_r) == (0.25, 0.0)
    assert got.tie_gap() == 0.25
    collapsed = retrieval_scores(torch.ones(200, 3), torch.arange(200) // 20, recall_at=(1,))
    assert collapsed.pessimistic_recall[1] == 0.0
    assert collapsed.recall[1] == 20 / 200  # every query meets image 0 first, image 0 meets image 1


def test_lone_queries_miss_in_recall_and_are_left_out_of_the_means():
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]]), dim=1)
    got = retrieval_scores(x, torch.tensor([4, 4, 7, 7, 9]), recall_at=(1, 2, 1000))
    assert got.recall == {1: 0.8, 2: 0.8, 1000: 0.8}
    assert got.recall_excluding_lone == {1: 1.0, 2: 1.0, 1000: 1.0}
    assert (got.map_at_r, got.r_precision, got.num_queries, got.num_lone) == (1.0, 1.0, 5, 1)


def test_the_order_of_images_changes_nothing_without_ties():
    generator = torch.Generator().manual_seed(6)
    x, labels = torch.randn(300, 16, generator=generator), torch.arange(300) % 60
    ranks, shuffle = rank_queries(x, labels), torch.randperm(300, generator=generator)
    assert_same_ranks(rank_queries(x[shuffle], labels[shuffle]), QueryRanks(*(t[shuffle] for t in ranks)))
    other_names = (labels * 7919 + 3) % 100003
    assert_same_ranks(rank_queries(x, other_names), ranks)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 3e15])
def test_distances_do_not_depend_on_the_unit(scale):
    generator = torch.Generator().manual_seed(7)
    x, labels = torch.randn(200, 5, generator=generator), torch.arange(200) % 50
    assert_same_ranks(
        rank_queries(x * scale, labels, distance="euclidean"), rank_queries(x, labels, distance="euclidean")
    )


def test_neighboring_integers_far_from_the_origin_are_told_apart():
    # Squared distances of 10^8 + 1 and 10^8: float32 products of such vectors are multiples of 8.
    x, labels = torch.tensor([[0.0, 0.0], [10000.0, 1.0], [10000.0, 0.0]]), torch.tensor([0, 1, 0])
    got = rank_queries(x[:1], labels[:1], x[1:], labels[1:], distance="euclidean")
    assert got.first_rank.item() == got.pessimistic_first_rank.item() == 1


def test_reduced_precision_of_products_is_switched_off_and_back_on():
    generator = torch.Generator().manual_seed(8)
    x, labels = torch.randn(400, 32, generator=generator), torch.arange(400) % 80
    want = rank_queries(x, labels)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = rank_queries(x, labels)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_ranks(got, want)


def test_half_the_products_suffice_without_a_gallery(tile, monkeypatch):
    multiplied: list[int] = []
    product = ranking._product

    def counted(left, right):
        multiplied.append(len(right))
        return product(left, right)

    monkeypatch.setattr(ranking, "_product", counted)
    x, labels = torch.randn(640, 8, generator=torch.Generator().manual_seed(9)), torch.arange(640) % 100
    tile(64)
    rank_queries(x, labels)
    assert len(multiplied) == 10 * 11 / 2
    multiplied.clear()
    rank_queries(x, labels, x.clone(), labels)
    assert len(multiplied) == 100


@pytest.mark.parametrize("furthest", [1, 20])
def test_ranks_beyond_the_furthest_are_only_known_to_be_beyond(tile, furthest):
    tile(64)
    x, labels = torch.randn(700, 8, generator=torch.Generator().manual_seed(11)), torch.arange(700) % 200
    want, got = (rank_queries(x, labels, furthest=f) for f in (None, furthest))
    near = want.first_rank <= furthest
    assert near.any()
    assert (got.first_rank[~near] > furthest).all()
    assert (got.first_rank != want.first_rank).any()  # some were not counted to the end
    first_rank = torch.where(near, got.first_rank, want.first_rank)
    pessimistic = torch.where(near, got.pessimistic_first_rank, want.pessimistic_first_rank)
    assert_same_ranks(got._replace(first_rank=first_rank, pessimistic_first_rank=pessimistic), want)
    assert retrieval_scores(x, labels, recall_at=(1, furthest)) == scores(want, recall_at=(1, furthest))


def test_means_are_over_queries():
    nan = math.nan
    ranks = QueryRanks(
        num_relevant=torch.tensor([1, 3, 0]),
        first_rank=torch.tensor([1, 11, -1]),
        map_at_r=torch.tensor([1.0, 0.5, nan], dtype=torch.float64),
        r_precision=torch.tensor([1.0, 0.25, nan], dtype=torch.float64),
        pessimistic_first_rank=torch.tensor([2, 11, -1]),
        pessimistic_map_at_r=torch.tensor([0.0, 0.5, nan], dtype=torch.float64),
        pessimistic_r_precision=torch.tensor([0.0, 0.25, nan], dtype=torch.float64),
    )
    got = scores(ranks, recall_at=(10, 1, 11))
    assert got.recall == {10: 1 / 3, 1: 1 / 3, 11: 2 / 3}
    assert got.recall_excluding_lone == {10: 0.5, 1: 0.5, 11: 1.0}
    assert (got.map_at_r, got.r_precision, got.pessimistic_map_at_r) == (0.75, 0.625, 0.25)
    assert got.pessimistic_recall == {10: 1 / 3, 1: 0.0, 11: 2 / 3}
    assert got.plain()["num_lone"] == 1


X, LABELS = torch.eye(4), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": X[:0], "query_labels": LABELS[:0]}, "query set is empty"),
        ({"query_labels": torch.tensor([0, 0, -1, 1])}, "1 of 4 query images have no label"),
        ({"query_labels": torch.arange(4)}, "no query has another image of its class"),
        ({"query": X / 0}, "query features are not finite"),
        ({"gallery": X}, "together with its labels"),
        ({"gallery": X, "gallery_labels": LABELS + 5}, "no query has another image of its class"),
        ({"gallery": X[:0], "gallery_labels": LABELS[:0]}, "gallery set is empty"),
        ({"recall_at": (0, 1)}, r"recall_at is \[0, 1\]"),
        ({"recall_at": ()}, r"recall_at is \[\]"),
        ({"distance": "euclid"}, "did you mean 'euclidean'"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(UserError, match=says):
        retrieval_scores(**{"query": X, "query_labels": LABELS, "recall_at": (1,), **change})


def test_features_must_be_floats_of_one_width():
    with pytest.raises(UserError, match=r"different widths: \{'train': 4, 'val': 3\}"):
        check_labeled(train=(X, LABELS), val=(X[:, :3], LABELS))
    with pytest.raises(UserError, match=r"val features are torch\.int64: expected floating-point"):
        check_labeled(val=(X.long(), LABELS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_ranks():
    generator = torch.Generator().manual_seed(10)
    labels = torch.randint(300, (2000,), generator=generator)
    x = torch.randn(300, 64, generator=generator)[labels] + 2 * torch.randn(2000, 64, generator=generator)
    for distance in ("cosine", "euclidean"):
        got = rank_queries(x.cuda(), labels.cuda(), distance=distance)
        assert_same_ranks(got, rank_queries(x, labels, distance=distance))
