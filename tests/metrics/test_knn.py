"""k-NN against a literal twin, scikit-learn and faiss; ties, small sets, chunks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from glsd.errors import UserError
from glsd.metrics import knn, search
from glsd.metrics.knn import knn_accuracy, nearest_neighbors


def twin(train, train_labels, val, val_labels, k, temperature):
    """Straight from the definition, one image and one vote at a time."""
    train, val = F.normalize(train, dim=1).double().numpy(), F.normalize(val, dim=1).double().numpy()
    first = five = 0
    for x, label in zip(val, val_labels.tolist(), strict=True):
        cosines = [round(math.fsum(a * b for a, b in zip(x, y, strict=True)), 9) for y in train]
        order = sorted(range(len(train)), key=lambda i: (-cosines[i], i))[:k]
        votes: dict[int, float] = {}
        for i in order:
            own = int(train_labels[i])
            votes[own] = votes.get(own, 0.0) + math.exp(cosines[i] / temperature)
        # Sums of the same votes may differ in the last digit when a common factor is taken out.
        ranking = sorted(votes, key=lambda c: (-float(f"{votes[c]:.12g}"), c))
        first += ranking[0] == label
        five += label in ranking[:5]
    return {"top1": first / len(val), "top5": five / len(val)}


def clusters(n, *, dim=16, num_classes=12, spread=1.5, seed=0, centers_seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(centers_seed))
    labels = torch.randint(num_classes, (n,), generator=generator)
    return centers[labels] + spread * torch.randn(n, dim, generator=generator), labels


def coarse(n, *, dim=3, seed=0):
    """Vectors with entries -1, 0, 1: hundreds of exact ties, zero vectors among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (n, dim), generator=generator).float(), torch.randint(
        7, (n,), generator=generator
    )


@pytest.mark.parametrize("make", [clusters, coarse])
@pytest.mark.parametrize("num_val", [1, 7, 99, 130])
def test_equals_literal_twin(make, num_val, monkeypatch):
    train, train_labels = make(210, seed=1)
    val, val_labels = make(num_val, seed=2)
    monkeypatch.setattr(knn, "_QUERIES", 50)
    got = knn_accuracy(train, train_labels, val, val_labels, k_list=(1, 10, 20, 200))
    assert list(got) == [1, 10, 20, 200]
    for k, shares in got.items():
        assert shares == twin(train, train_labels, val, val_labels, k, 0.07), k


def test_equals_scikit_learn():
    train, train_labels = clusters(500, seed=1)
    val, val_labels = clusters(300, seed=2)
    for k, temperature in ((1, 0.07), (20, 0.07), (20, 1.0), (200, 0.2)):
        reference = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        )
        expected = reference.fit(train.numpy(), train_labels.numpy()).score(val.numpy(), val_labels.numpy())
        got = knn_accuracy(train, train_labels, val, val_labels, k_list=[k], temperature=temperature)
        assert got[k]["top1"] == pytest.approx(expected, abs=1e-12)
        assert 0.3 < expected < 0.95  # neither trivial nor hopeless, so a wrong weight would show


def test_neighbors_equal_those_of_faiss():
    import faiss

    train, val = clusters(2000, dim=32, seed=1)[0], clusters(200, dim=32, seed=2)[0]
    index = faiss.IndexFlatIP(32)
    index.add(F.normalize(train, dim=1).numpy())
    cosines, rows = index.search(F.normalize(val, dim=1).numpy(), 20)
    got_cosines, got_rows = nearest_neighbors(val, train, k=20)
    torch.testing.assert_close(got_cosines.float(), torch.from_numpy(cosines), rtol=0, atol=1e-6)
    assert (got_rows.numpy() == rows).mean() > 0.999  # float32 may swap two that are closer than its rounding


@pytest.mark.parametrize("make", ["clusters", "coarse", "collapsed", "nearly collapsed"])
def test_candidates_and_chunks_give_the_same_bits(make, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train, val = {
        "clusters": lambda: (clusters(3000, seed=1)[0], clusters(64, seed=2)[0]),
        "coarse": lambda: (coarse(3000, seed=1)[0], coarse(64, seed=2)[0]),
        "collapsed": lambda: (torch.ones(3000, 16), torch.ones(64, 16)),
        "nearly collapsed": lambda: tuple(
            torch.ones(n, 16) + 1e-4 * torch.randn(n, 16, generator=generator) for n in (3000, 64)
        ),
    }[make]()
    query, gallery = search.comparable(val, train, euclidean=False)
    wanted = search.Search(query=query, gallery=gallery, euclidean=False)
    keys = search._of_all(wanted, torch.arange(len(val)), 50)
    for chunk in (1, 13, 64, 1000):
        for held in (2**24, 5000):
            monkeypatch.setattr(search, "_QUERIES", chunk)
            monkeypatch.setattr(search, "_NUMBERS_HELD", held)
            got = nearest_neighbors(val, train, k=50)
            assert torch.equal(got[0], wanted.similarity(keys))
            assert torch.equal(got[1], search.rows_of(keys))


def test_of_equal_cosines_the_lower_row_comes_first():
    train = torch.ones(5000, 8)
    train[[7, 4000]] = torch.eye(8)[:2]
    query = torch.ones(3, 8)
    _, rows = nearest_neighbors(query, train, k=10)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5, 6, 8, 9, 10]] * 3


def test_scale_of_features_does_not_matter():
    train, train_labels = clusters(300, seed=1)
    val, val_labels = clusters(80, seed=2)
    plain = knn_accuracy(train, train_labels, val, val_labels, k_list=[20])
    assert knn_accuracy(1024 * train, train_labels, val / 64, val_labels, k_list=[20]) == plain
    assert knn_accuracy(train, train_labels, val, val_labels, k_list=[20], temperature=1e-5)[20]["top1"] > 0


def test_votes_and_their_weights():
    # Two far neighbors of label 5 against one near neighbor of label 3.
    angle = torch.tensor([0.2, 0.6, 0.6])
    train = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels, val = torch.tensor([3, 5, 5]), torch.tensor([[1.0, 0.0]])
    near = knn_accuracy(train, labels, val, torch.tensor([3]), k_list=[1, 3], temperature=0.07)
    flat = knn_accuracy(train, labels, val, torch.tensor([3]), k_list=[1, 3], temperature=10.0)
    assert near[3]["top1"] == near[1]["top1"] == 1.0
    assert (flat[1]["top1"], flat[3]["top1"], flat[3]["top5"]) == (1.0, 0.0, 1.0)


def test_a_label_without_a_vote_is_not_found():
    train, labels = torch.eye(3), torch.tensor([10, 20, 10**12])
    val_labels = torch.tensor([20, 15, 10**12 + 1])
    got = knn_accuracy(train, labels, torch.eye(3)[:1].repeat(3, 1), val_labels, k_list=[1, 3])
    assert got[1] == {
        "top1": 0.0,
        "top5": 0.0,
    }  # label 20 has no vote at k = 1, though there are fewer than 5 labels
    assert got[3]["top5"] == pytest.approx(1 / 3)


def test_equal_votes_rank_by_label():
    train, val = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    for labels in ([2, 1], [1, 2]):
        got = knn_accuracy(train, torch.tensor(labels), val, torch.tensor([1]), k_list=[2])
        assert got[2]["top1"] == 1.0


def ranks_by_every_class(cosines, votes_for, truth, num_classes, k_list, temperature):
    """Straight from the definition: a score for every class, however many there are."""
    found = {}
    for k in k_list:
        score = torch.zeros(len(cosines), num_classes, dtype=torch.float64)
        for row in range(len(cosines)):
            for column in range(k):  # in the order of the neighbors, as sums of floats depend on it
                weight = ((cosines[row, column] - cosines[row, 0]) / temperature).exp()
                score[row, votes_for[row, column]] += weight
        own = score.gather(1, truth[:, None])
        lower = torch.arange(num_classes) < truth[:, None]
        ahead = ((score > own) | ((score == own) & lower)).sum(dim=1)
        found[k] = torch.where(own[:, 0] > 0, ahead, knn._NOT_FOUND)
    return found


@pytest.mark.parametrize("num_classes", [1, 3, 24, 25, 5000])
@pytest.mark.parametrize("temperature", [0.07, 1e-4])
def test_ranks_are_those_of_a_score_for_every_class(num_classes, temperature):
    generator = torch.Generator().manual_seed(num_classes)
    queries, k_list = 60, [1, 2, 5, 6]
    # Steps of 0.1 make equal votes; few of the classes are voted for, and some true ones are not.
    cosines = torch.rand(queries, 6, generator=generator, dtype=torch.float64).round(decimals=1)
    cosines = cosines.sort(dim=1, descending=True).values
    near = torch.randint(num_classes, (queries, 3), generator=generator)
    votes_for = near.gather(1, torch.randint(3, (queries, 6), generator=generator))
    truth = torch.where(torch.arange(queries) % 5 == 0, num_classes // 2, near[:, 0])
    got = knn._label_ranks(cosines, votes_for, truth, num_classes, k_list, temperature)
    expected = ranks_by_every_class(cosines, votes_for, truth, num_classes, k_list, temperature)
    for k in k_list:
        assert torch.equal(got[k], expected[k]), k


def test_memory_of_votes_does_not_grow_with_the_classes():
    num_classes = 10**12  # a score for each would take 8 TB a query
    votes_for = torch.tensor([[num_classes - 1, 7, 7, 12], [3, 3, 3, 3]])
    cosines = torch.tensor([[0.9, 0.9, 0.9, 0.1], [0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)
    truth = torch.tensor([num_classes - 1, 8])
    got = knn._label_ranks(cosines, votes_for, truth, num_classes, [1, 2, 3], 0.07)
    # One vote against none; equal votes, of which the lower label ranks first; one against two.
    assert [got[k].tolist() for k in (1, 2, 3)] == [
        [0, knn._NOT_FOUND],
        [1, knn._NOT_FOUND],
        [1, knn._NOT_FOUND],
    ]


def test_bad_input_is_one_clear_line():
    train, labels = clusters(50)
    good: dict[str, Any] = {"k_list": [10]}
    for changes, word in (
        ({"k_list": [10, 200]}, "k_list holds 200: expected 1 to 50"),
        ({"k_list": [0]}, "k_list holds 0"),
        ({"k_list": []}, "k_list is empty"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(UserError, match=word):
            knn_accuracy(train, labels, train, labels, **{**good, **changes})
    with pytest.raises(UserError, match="not finite"):
        knn_accuracy(train * math.inf, labels, train, labels, k_list=[10])
    with pytest.raises(UserError, match="1 of 50 val"):
        knn_accuracy(train, labels, train, torch.where(torch.arange(50) == 3, -1, labels), k_list=[10])
    with pytest.raises(UserError, match="val set is empty"):
        knn_accuracy(train, labels, train[:0], labels[:0], k_list=[10])
