"""What is mined and drawn, against loops written from the definitions, and against how often it should be drawn."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glsd.losses.mining import (
    Triplets,
    distance_weights,
    mined_pairs,
    triplet_per_anchor,
    triplet_per_pair,
)

LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 0, 3])  # class 3 has no second image


def unit(b: int = 8, e: int = 6, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(b, e, generator=generator, dtype=dtype), dim=1)


def test_mined_pairs_are_those_of_the_definition():
    z = F.normalize(unit() + 0.6 * unit(seed=1)[LABELS], dim=1)  # rows of a class near one another
    s = (z @ z.T).tolist()
    labels = LABELS.tolist()
    positive, negative = mined_pairs(z @ z.T, LABELS, epsilon=0.1)
    for i in range(8):
        positives = [j for j in range(8) if j != i and labels[j] == labels[i]]
        negatives = [j for j in range(8) if labels[j] != labels[i]]
        hardest_negative = max(s[i][j] for j in negatives)
        kept = [j for j in positives if s[i][j] - 0.1 < hardest_negative]
        assert positive[i].nonzero().flatten().tolist() == kept
        hardest_positive = min((s[i][j] for j in positives), default=math.inf)
        kept = [j for j in negatives if s[i][j] + 0.1 > hardest_positive]
        assert negative[i].nonzero().flatten().tolist() == kept
    assert 0 < positive.sum() < 8  # some are mined away, not all
    assert 0 < negative.sum() < 46


def slow_weights(z: Tensor, labels: Tensor, lower: float, upper: float | None) -> Tensor:
    """The probabilities, one pair at a time."""
    b, e = z.shape
    rows = torch.zeros(b, b, dtype=torch.float64)
    for i in range(b):
        negatives = [j for j in range(b) if labels[j] != labels[i]]
        weights = {}
        for j in negatives:
            distance = math.dist((z[i] / z[i].norm()).tolist(), (z[j] / z[j].norm()).tolist())
            if upper is None or distance < upper:
                distance = max(distance, lower)
                density = distance ** (e - 2) * (1 - distance**2 / 4) ** ((e - 3) / 2)
                weights[j] = 1 / density
        weights = weights or dict.fromkeys(negatives, 1.0)
        for j, weight in weights.items():
            rows[i, j] = weight / sum(weights.values())
    return rows


@pytest.mark.parametrize("upper", [None, 1.4, 0.6])
@pytest.mark.parametrize("e", [2, 3, 6, 64])
def test_distance_weights_are_inverse_to_the_density_of_distances(e, upper):
    z = unit(e=e) * torch.linspace(0.5, 3, 8)[:, None]  # any length: the copies are of length 1
    got = distance_weights(z, LABELS, upper=upper)
    torch.testing.assert_close(got, slow_weights(z, LABELS, 0.5, upper), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.sum(1), torch.ones(8, dtype=torch.float64))


def test_distance_weights_count_near_negatives_as_the_lower_cut_off():
    z = torch.tensor([[1.0, 0.0, 0.0], [0.999, 0.02, 0.0], [0.95, 0.0, 0.3], [0.0, 1.0, 0.0]])
    weights = distance_weights(z, torch.tensor([0, 1, 1, 1]), upper=None)
    assert weights[0, 1] == weights[0, 2] > weights[0, 3]


@pytest.mark.parametrize("upper", [None, 1.4])
def test_distance_weights_stay_finite_where_the_density_is_0(upper):
    z = torch.zeros(4, 512)
    z[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])  # equal and opposite rows
    weights = distance_weights(z, torch.tensor([0, 0, 1, 1]), upper=upper)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights[0], torch.tensor([0.0, 0.0, 0.5, 0.5]))


def test_distance_weights_of_an_only_class_are_0():
    assert torch.equal(
        distance_weights(unit(), torch.zeros(8, dtype=torch.int64), upper=None), torch.zeros(8, 8).double()
    )


@pytest.mark.parametrize("draw", [triplet_per_pair, triplet_per_anchor])
def test_triplets_cover_what_they_should(draw):
    anchor, positive, negative = draw(unit(), LABELS, seed=5)
    labels = LABELS.tolist()
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j and labels[i] == labels[j]]
    if draw is triplet_per_pair:
        assert list(zip(anchor.tolist(), positive.tolist(), strict=True)) == pairs
    else:
        assert anchor.tolist() == [0, 1, 2, 3, 4, 5, 6]  # 7 is alone in its class
        assert set(zip(anchor.tolist(), positive.tolist(), strict=True)) <= set(pairs)
    assert (LABELS[negative] != LABELS[anchor]).all()


@pytest.mark.parametrize(("draw", "upper"), [(triplet_per_pair, 1.4), (triplet_per_anchor, None)])
def test_negatives_are_drawn_as_often_as_their_weights_say(draw, upper):
    z, draws = unit(), 1500
    counts, partners = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    for seed in range(draws):
        anchor, positive, negative = draw(z, LABELS, seed=seed)
        counts.index_put_((anchor, negative), torch.ones(len(anchor), dtype=torch.float64), accumulate=True)
        partners.index_put_((anchor, positive), torch.ones(len(anchor), dtype=torch.float64), accumulate=True)
    want = distance_weights(z, LABELS, upper=upper)
    for i in range(7):
        total = counts[i].sum()
        deviation = (want[i] * (1 - want[i]) / total).sqrt()
        assert ((counts[i] / total - want[i]).abs() <= 4.5 * deviation).all()  # weight 0: never drawn
    assert abs(partners[0, 2] / partners[0].sum() - 0.5) < 4.5 * math.sqrt(0.25 / draws)


@pytest.mark.parametrize("draw", [triplet_per_pair, triplet_per_anchor])
def test_draws_are_a_function_of_the_seed_alone(draw):
    z = unit(24)
    labels = torch.arange(24) % 6
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(z, labels, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(one, two) for one, two in zip(first, draw(z, labels, seed=7), strict=True))
    assert not torch.equal(first.negative, draw(z, labels, seed=8).negative)


@pytest.mark.parametrize("draw", [triplet_per_pair, triplet_per_anchor])
@pytest.mark.parametrize("labels", [torch.zeros(8, dtype=torch.int64), torch.arange(8)])
def test_batches_without_triplets_give_none(draw, labels):
    triplets = draw(unit(), labels, seed=0)
    assert isinstance(triplets, Triplets)
    assert [len(part) for part in triplets] == [0, 0, 0]


@pytest.mark.parametrize("draw", [triplet_per_pair, triplet_per_anchor])
def test_a_nan_does_not_stop_the_draw(draw):
    z = unit()
    z[2] = torch.nan
    anchor, _, negative = draw(z, LABELS, seed=0)
    assert len(anchor) == (10 if draw is triplet_per_pair else 7)
    assert ((negative >= 0) & (negative < 8)).all()
