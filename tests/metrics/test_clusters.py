"""NMI against its formula, and k-means that depends on its seed alone."""

import math
from collections import Counter

import pytest
import torch

from glsd.errors import UserError
from glsd.metrics.clusters import kmeans_nmi, nmi


def by_formula(labels, assignment):
    """2 I / (H + H) from counted pairs."""
    n = len(labels)

    def entropy(counts):
        return -sum(c / n * math.log(c / n) for c in counts.values())

    h = [entropy(Counter(x)) for x in (labels, assignment)]
    joint = entropy(Counter(zip(labels, assignment, strict=True)))
    return 2 * (h[0] + h[1] - joint) / (h[0] + h[1])


@pytest.mark.parametrize("seed", range(3))
def test_nmi_is_its_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(7, (200,), generator=generator)
    assignment = torch.where(torch.rand(200, generator=generator) < 0.5, labels * 3, seed + labels // 2)
    assert nmi(labels, assignment) == pytest.approx(
        by_formula(labels.tolist(), assignment.tolist()), abs=1e-12
    )
    assert nmi(labels, labels + 5) == pytest.approx(1.0)
    assert nmi(labels, torch.zeros_like(labels)) == pytest.approx(0.0)


def blobs(noise):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 6
    return torch.eye(6)[labels] * 5 + noise * torch.randn(120, 6, generator=generator), labels * 11


def test_k_is_the_number_of_labels_present():
    features, labels = blobs(0.05)
    got = kmeans_nmi(features, labels, seeds=(0, 1, 2, 3))
    assert got.num_clusters == 6
    assert list(got.per_seed) == [0, 1, 2, 3]
    assert got.nmi == pytest.approx(sum(got.per_seed.values()) / 4)
    assert max(got.per_seed.values()) == pytest.approx(1.0)


def test_depends_on_the_seed_alone():
    features, labels = blobs(3.0)
    state = torch.random.get_rng_state()
    first = kmeans_nmi(features, labels, seeds=(5, 6))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    assert kmeans_nmi(features, labels, seeds=(6, 5)).per_seed == first.per_seed
    assert first.per_seed[5] != first.per_seed[6]


def test_cosine_ignores_length_euclidean_does_not():
    features, labels = blobs(3.0)
    longer = features * torch.linspace(0.1, 10, len(features))[:, None]
    assert kmeans_nmi(longer, labels, seeds=(0,)).nmi == pytest.approx(
        kmeans_nmi(features, labels, seeds=(0,)).nmi
    )
    values = [kmeans_nmi(x, labels, seeds=(0,), distance="euclidean").nmi for x in (features, longer)]
    assert abs(values[0] - values[1]) > 0.01


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"features": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.int64)},
            "the clustered set is empty",
        ),
        ({"labels": torch.tensor([0, 1, -1])}, "1 of 3 clustered images have no label"),
        ({"features": torch.full((3, 2), torch.nan)}, "not finite"),
        ({"seeds": ()}, "seeds is empty"),
        ({"distance": "l2"}, "unknown distance"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(UserError, match=says):
        kmeans_nmi(**{"features": torch.eye(3)[:, :2], "labels": torch.arange(3), "seeds": (0,), **change})
