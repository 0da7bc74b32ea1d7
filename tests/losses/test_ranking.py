"""Every ranking loss against loops written from its equation, on values and gradients, and what all of them must keep."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses, miners, reducers
from torch import Tensor

from glsd.errors import UserError
from glsd.losses.mining import triplet_per_anchor, triplet_per_pair
from glsd.losses.ranking import RANKING, build_ranking
from glsd.losses.tuple_losses import multi_similarity, smooth_ap

CLASSES, WIDTH = 5, 6
LABELS = torch.tensor([0, 2, 0, 1, 1, 2, 0, 4, 2, 1, 3])  # uneven, mixed; classes 3 and 4 have one image each
DRAWN = ("triplet", "margin")
OWN_PARAMETERS = ("margin", "proxy_anchor", "proxy_nca", "arcface")
FROM_PAIRS = ("triplet", "triplet_semihard", "margin", "multi_similarity", "smooth_ap")  # nothing to learn: 0


def unit(b: int = len(LABELS), e: int = WIDTH, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(b, e, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def built(name: str, seed: int = 3, **args):
    return build_ranking(name, num_classes=CLASSES, embed_dim=WIDTH, seed=seed, args=args)


def distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum().sqrt()


def total(terms: list[Tensor]) -> Tensor:
    return sum(terms, torch.zeros((), dtype=torch.float64))


def mean(terms: list[Tensor]) -> Tensor:
    return total(terms) / max(1, len(terms))


def others(y: list[int], i: int) -> tuple[list[int], list[int]]:
    """The positives and the negatives of row i."""
    same = [j for j in range(len(y)) if j != i and y[j] == y[i]]
    return same, [j for j in range(len(y)) if y[j] != y[i]]


def slow_triplet(z, y, seed, own, margin=0.2):
    drawn = zip(
        *(part.tolist() for part in triplet_per_pair(z.detach(), torch.tensor(y), seed=seed)), strict=True
    )
    return mean(
        [(distance(z[a], z[p] - 1e-6) - distance(z[a], z[n] - 1e-6) + margin).relu() for a, p, n in drawn]
    )


def slow_semihard(z, y, seed, own, margin=0.2):
    terms = []
    for a in range(len(y)):
        positives, negatives = others(y, a)
        for p in positives:
            for n in negatives:
                gap = distance(z[a], z[n]) - distance(z[a], z[p])
                if 0 < gap < margin:
                    terms.append(margin - gap)
    return mean(terms)


def slow_contrastive(z, y, seed, own, pos_margin=0.0, neg_margin=1.0):
    pull, push = [], []
    for i in range(len(y)):
        positives, negatives = others(y, i)
        pull += [(distance(z[i], z[j]) - pos_margin).relu() for j in positives]
        push += [(neg_margin - distance(z[i], z[j])).relu() for j in negatives]
    return mean([term for term in pull if term > 0]) + mean([term for term in push if term > 0])


def slow_margin(z, y, seed, own, margin=0.2, nu=0.0, count="triplets"):
    (beta,) = own
    summed, triplets, terms, regularizer = 0, 0, 0, 0
    drawn = triplet_per_anchor(z.detach(), torch.tensor(y), seed=seed)
    for a, p, n in zip(*(part.tolist() for part in drawn), strict=True):
        b = beta[y[a]]
        pull = ((z[a] - z[p]).square().sum() + 1e-8).sqrt() - b + margin
        push = b - ((z[a] - z[n]).square().sum() + 1e-8).sqrt() + margin
        summed = summed + pull.relu() + push.relu()
        triplets += bool(pull > 0 or push > 0)
        terms += int(pull > 0) + int(push > 0)
        regularizer = regularizer + nu * b
    return summed / (triplets if count == "triplets" else terms) + regularizer


def slow_multi_similarity(z, y, seed, own, alpha=2.0, beta=40.0, base=0.5, epsilon=0.1):
    s, rows = z @ z.T, []
    for i in range(len(y)):
        positives, negatives = others(y, i)
        if not positives or not negatives:
            continue
        hardest_negative = max(s[i, j] for j in negatives)
        hardest_positive = min(s[i, j] for j in positives)
        pull = [
            torch.exp(-alpha * (s[i, j] - base)) for j in positives if s[i, j] - epsilon < hardest_negative
        ]
        push = [torch.exp(beta * (s[i, j] - base)) for j in negatives if s[i, j] + epsilon > hardest_positive]
        if pull and push:
            rows.append(torch.log(1 + total(pull)) / alpha + torch.log(1 + total(push)) / beta)
    return mean(rows)


def slow_proxy_anchor(z, y, seed, own, margin=0.1, alpha=32.0):
    s = F.normalize(z, dim=1) @ F.normalize(own[0], dim=1).T
    pull, push = [], []
    for c in range(CLASSES):
        with_class = [torch.exp(-alpha * (s[i, c] - margin)) for i in range(len(y)) if y[i] == c]
        without = [torch.exp(alpha * (s[i, c] + margin)) for i in range(len(y)) if y[i] != c]
        if with_class:
            pull.append(torch.log(1 + total(with_class)))
        push.append(torch.log(1 + total(without)))
    return mean(pull) + mean(push)


def slow_proxy_nca(z, y, seed, own, softmax_scale=9.0):
    z, proxies = F.normalize(z, dim=1), F.normalize(own[0], dim=1)
    rows = []
    for i in range(len(y)):
        nearness = [torch.exp(-softmax_scale * distance(z[i], proxies[c]) ** 2) for c in range(CLASSES)]
        rows.append(-torch.log(nearness[y[i]] / sum(nearness)))
    return mean(rows)


def slow_arcface(z, y, seed, own, margin=28.6, scale=64.0):
    s = F.normalize(z, dim=1) @ F.normalize(own[0], dim=0)
    m, rows = math.radians(margin), []
    for i in range(len(y)):
        angle = torch.acos(s[i, y[i]])
        target = torch.cos(angle + m) if angle <= math.pi - m else torch.cos(angle) - m * math.sin(m)
        rest = sum(torch.exp(scale * s[i, c]) for c in range(CLASSES) if c != y[i])
        rows.append(-torch.log(torch.exp(scale * target) / (torch.exp(scale * target) + rest)))
    return mean(rows)


def slow_smooth_ap(z, y, seed, own, temperature=0.01):
    s, rows = z @ z.T, []
    for q in range(len(y)):
        members = [j for j in range(len(y)) if y[j] == y[q]]
        if len(members) == 1:
            continue
        precision = []
        for i in members:
            ahead = {j: torch.sigmoid((s[q, j] - s[q, i]) / temperature) for j in range(len(y)) if j != i}
            among_positives = 1 + total([step for j, step in ahead.items() if j in members])
            precision.append(among_positives / (1 + total(list(ahead.values()))))
        rows.append(1 - mean(precision))
    return mean(rows)


SLOW = {
    "triplet": slow_triplet,
    "triplet_semihard": slow_semihard,
    "contrastive": slow_contrastive,
    "margin": slow_margin,
    "multi_similarity": slow_multi_similarity,
    "proxy_anchor": slow_proxy_anchor,
    "proxy_nca": slow_proxy_nca,
    "arcface": slow_arcface,
    "smooth_ap": slow_smooth_ap,
}
# One other value for every setting there is.
CHANGES: list[tuple[str, dict[str, float | str]]] = [
    ("triplet", {"margin": 0.5}),
    ("triplet_semihard", {"margin": 0.4}),
    ("contrastive", {"pos_margin": 0.9}),
    ("contrastive", {"neg_margin": 1.3}),
    ("margin", {"margin": 0.05}),
    ("margin", {"beta": 1}),
    ("margin", {"nu": 0.01}),
    ("margin", {"count": "pairs"}),
    ("multi_similarity", {"alpha": 3}),
    ("multi_similarity", {"beta": 10.0}),
    ("multi_similarity", {"base": 0.3}),
    ("multi_similarity", {"epsilon": 0.5}),
    ("proxy_anchor", {"margin": 0.2}),
    ("proxy_anchor", {"alpha": 8.0}),
    ("proxy_nca", {"softmax_scale": 1.0}),
    ("arcface", {"margin": 60.0}),
    ("arcface", {"scale": 10.0}),
    ("smooth_ap", {"temperature": 0.1}),
]


def test_every_loss_and_setting_is_tested_here():
    assert SLOW.keys() == RANKING.keys()
    settings = {(name, key) for name, entry in RANKING.items() for key in entry.settings}
    assert {(name, key) for name, args in CHANGES for key in args} == settings


@pytest.mark.parametrize(("name", "args"), [*((name, {}) for name in RANKING), *CHANGES])
def test_equals_its_equation(name, args):
    ranking = built(name, **args).double()
    z = unit().requires_grad_()
    own = list(ranking.parameters())
    got = ranking(z, LABELS, seed=11)
    assert got.dtype == torch.float64
    slow_args = {key: value for key, value in args.items() if (name, key) != ("margin", "beta")}
    want = SLOW[name](z, LABELS.tolist(), 11, own, **slow_args)
    torch.testing.assert_close(got, want.to(got), rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(got, [z, *own])
    for ours, slow in zip(grads, torch.autograd.grad(want, [z, *own]), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-8, atol=1e-10)
        assert ours.abs().max() > 1e-3
    if args:
        assert abs(float(got.detach()) - float(built(name)(z.detach(), LABELS, seed=11).detach())) > 1e-4


def test_multi_similarity_is_the_librarys_once_told_so():
    z, labels = unit(24, 4), torch.arange(24) % 8
    library = losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5, reducer=reducers.AvgNonZeroReducer())
    want = library(z, labels, miners.MultiSimilarityMiner(epsilon=0.1)(z, labels))
    torch.testing.assert_close(
        multi_similarity(z, labels, alpha=2.0, beta=40.0, base=0.5, epsilon=0.1), want, rtol=1e-12, atol=0
    )


def test_smooth_ap_is_the_librarys_where_there_are_as_many_classes_as_images_of_each():
    z, labels = unit(16), torch.arange(16) // 4
    want = losses.SmoothAPLoss(temperature=0.05)(z, labels).double()
    torch.testing.assert_close(smooth_ap(z, labels, temperature=0.05), want, rtol=1e-6, atol=0)


def test_smooth_ap_of_a_small_temperature_is_the_average_precision():
    z, labels = unit(12), torch.arange(12) % 3
    rows = []
    for q in range(12):
        order = (z @ z[q]).argsort(descending=True)
        hits = (labels[order] == labels[q]).double()  # the query itself is the first
        precision = hits.cumsum(0) / torch.arange(1, 13)
        rows.append((precision * hits).sum() / hits.sum())
    torch.testing.assert_close(smooth_ap(z, labels, temperature=1e-7), 1 - torch.stack(rows).mean())


@pytest.mark.parametrize("name", sorted(RANKING.keys() - set(DRAWN)))
def test_the_order_of_the_batch_changes_nothing(name):
    z, order = unit(), torch.tensor([3, 10, 0, 7, 1, 9, 4, 2, 8, 6, 5])
    ranking = built(name)
    torch.testing.assert_close(ranking(z[order], LABELS[order], seed=0), ranking(z, LABELS, seed=0))


@pytest.mark.parametrize("name", RANKING)
def test_what_is_drawn_is_a_function_of_the_seed_alone(name):
    z = unit()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ranking = built(name)
    values = [ranking(z, LABELS, seed=seed).detach() for seed in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = built(name)
    assert torch.equal(again(z, LABELS, seed=1), values[1])
    for one, two in zip(ranking.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert (len({float(value) for value in values}) > 1) == (name in DRAWN)


@pytest.mark.parametrize("name", RANKING)
def test_own_parameters_come_with_a_learning_rate_and_follow_the_seed(name):
    own = dict(built(name, seed=3).named_parameters())
    assert bool(own) == (name in OWN_PARAMETERS) == (RANKING[name].learning_rate is not None)
    if name in OWN_PARAMETERS and name != "margin":
        (one,), (other,) = own.values(), built(name, seed=4).parameters()
        assert not torch.equal(one, other)


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("labels", [torch.zeros(11, dtype=torch.int64), torch.arange(11)], ids=["one", "all"])
def test_batches_of_one_class_or_of_no_pair(name, labels):
    z = unit(dtype=torch.float32).requires_grad_()
    ranking = build_ranking(name, num_classes=11, embed_dim=WIDTH, seed=0, args={})
    loss = ranking(z, labels, seed=0)
    for grad in torch.autograd.grad(loss, [z, *ranking.parameters()]):
        assert grad.isfinite().all()
        if name in FROM_PAIRS:
            assert not grad.any()
    assert loss == 0 if name in FROM_PAIRS else loss.isfinite()


@pytest.mark.parametrize("name", RANKING)
def test_equal_and_opposite_images_have_finite_gradients(name):
    z = torch.zeros(8, WIDTH)
    z[:, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    z.requires_grad_()
    ranking = built(name)
    if name == "arcface":
        (vectors,) = ranking.parameters()
        with torch.no_grad():
            vectors.zero_()[0] = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])
    loss = ranking(z, torch.arange(8) % 4, seed=0)
    for grad in torch.autograd.grad(loss, [z, *ranking.parameters()]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", RANKING)
def test_autocast_changes_nothing(name):
    z, ranking = unit(dtype=torch.float32), built(name)
    want = ranking(z, LABELS, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ranking(z, LABELS, seed=0)
    assert torch.equal(got, want)
    assert ranking(z.bfloat16(), LABELS, seed=0).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in ranking.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", RANKING)
def test_the_device_gives_what_the_cpu_gives(name):
    z = unit(dtype=torch.float32)
    on_device = built(name).cuda()
    leaf = z.cuda().requires_grad_()
    got = on_device(leaf, LABELS.cuda(), seed=0)
    (grad,) = torch.autograd.grad(got, leaf)
    assert grad.isfinite().all()
    if name in DRAWN:  # other random numbers there, but the same ones every time
        assert torch.equal(on_device(leaf, LABELS.cuda(), seed=0), got)
    else:
        torch.testing.assert_close(got.cpu(), built(name)(z, LABELS, seed=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [name for name, entry in RANKING.items() if entry.geometry == "scaled"])
def test_losses_for_scaled_vectors_know_no_unit(name):
    z, factor = unit(), 2.5
    one = built(name, margin=0.2)(z, LABELS, seed=0)
    torch.testing.assert_close(
        built(name, margin=0.2 * factor)(z * factor, LABELS, seed=0), one * factor, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("triplets", {}, r"unknown ranking loss 'triplets': expected one of triplet.*did you mean 'triplet'"),
        (
            "margin",
            {"marign": 0.1},
            r"^marign: the loss 'margin' has no such setting.*did you mean 'margin'\?",
        ),
        ("triplet", {"margin": "0.2"}, r"^margin is '0.2': expected a number from 0"),
        ("triplet", {"margin": True}, r"^margin is True: expected a number from 0"),
        ("triplet", {"margin": None}, r"^margin is None: expected a number from 0"),
        ("triplet", {"margin": math.nan}, r"^margin is nan: "),
        ("triplet", {"margin": math.inf}, r"^margin is inf: "),
        ("arcface", {"margin": 91}, r"^margin is 91: expected a number from 0 to 90"),
        ("smooth_ap", {"temperature": 0}, r"^temperature is 0: expected a number above 0"),
        (
            "margin",
            {"count": "triplet"},
            r"^count is 'triplet': expected one of triplets, pairs.*did you mean 'triplets'",
        ),
        ("margin", {"count": 3}, r"^count is 3: expected one of triplets, pairs$"),
        (
            "margin",
            {"count": ["pairs"]},
            r"^count is \['pairs'\]: expected one of triplets, pairs",
        ),
    ],
)
def test_mistakes_are_named(name, args, message):
    with pytest.raises(UserError, match=message):
        built(name, **args)
