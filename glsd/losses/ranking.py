"""The ranking losses by name: which tuples of a labeled batch of embeddings are pulled together and which apart.

Every rank computes the same loss on the same gathered batch; what is drawn depends on the seed passed in alone.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor, nn

from glsd.errors import UserError, nearest, pick
from glsd.losses.mining import triplet_per_anchor, triplet_per_pair
from glsd.losses.tuple_losses import (
    margin_loss,
    multi_similarity,
    smooth_ap,
    triplet_loss,
)

# (z, labels, seed) -> loss: a plain function, or a module where the loss has parameters of its own.
Compute = Callable[[Tensor, Tensor, int], Tensor]


class Setting(NamedTuple):
    """A documented default of a loss, and what may replace it: a number between low and high, or one of choices."""

    default: float | str
    low: float = 0.0
    high: float = math.inf
    above_low: bool = False  # low itself is not allowed
    choices: tuple[str, ...] = ()


class RankingEntry(NamedTuple):
    """One ranking loss.

    geometry: "unit" where the loss means cosines or distances on the unit sphere; "scaled" where only differences of
    distances count, so that mean-normalized vectors (losses.mdr) serve as well.
    """

    build: Callable[..., Compute]  # (num_classes, embed_dim, generator, **settings)
    settings: dict[str, Setting]
    geometry: Literal["unit", "scaled"]
    learning_rate: float | None  # of the loss's own parameters; None: it has none
    about: str


class RankingLoss(nn.Module):
    """A ranking loss with its settings and its own parameters, if any (``build_ranking`` makes it)."""

    def __init__(self, compute: Compute, geometry: str):
        super().__init__()
        self.compute = compute
        self.geometry = geometry

    def forward(self, z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, seed: int) -> Float[Tensor, ""]:
        """Return the loss in float32 or better, whatever the autocast.

        z: unit vectors, or mean-normalized ones if geometry is "scaled"; labels: 0 .. num_classes - 1. seed decides what
        is drawn, if anything is. A batch without a pair or triplet to learn from gives a 0 that can be differentiated.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self.compute(z.to(torch.promote_types(z.dtype, torch.float32)), labels, seed)


class _DirectDistance(distances.LpDistance):
    """Euclidean distances from differences: those from products lose the digits of near rows."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(query_emb, ref_emb, compute_mode="donot_use_mm_for_euclid_dist")


class _Library(nn.Module):
    """A loss of pytorch-metric-learning, on the tuples of a miner of it if given. Both wait for the device to count tuples."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None):
        super().__init__()
        self.loss = loss
        self.miner = miner

    def forward(self, z: Tensor, labels: Tensor, seed: int) -> Tensor:
        return self.loss(z, labels, self.miner(z, labels) if self.miner else None)


class _Margin(nn.Module):
    """The margin loss with one learned boundary per class, on one distance-weighted triplet per row."""

    def __init__(self, num_classes: int, beta: float, **settings):
        super().__init__()
        self.beta = nn.Parameter(torch.full((num_classes,), float(beta)))
        self.settings = settings

    def forward(self, z: Tensor, labels: Tensor, seed: int) -> Tensor:
        triplets = triplet_per_anchor(z, labels, seed=seed)
        return margin_loss(z, labels, triplets, self.beta, **self.settings)


class _ArcFace(losses.ArcFaceLoss):
    """Angles a little away from 0 and pi, where the arc cosine has no finite gradient."""

    def get_angles(self, cosine_of_target_classes: Tensor) -> Tensor:
        return cosine_of_target_classes.clamp(-1 + 1e-6, 1 - 1e-6).acos()


def _triplet(num_classes: int, embed_dim: int, generator: torch.Generator, *, margin: float) -> Compute:
    def compute(z: Tensor, labels: Tensor, seed: int) -> Tensor:
        return triplet_loss(z, triplet_per_pair(z, labels, seed=seed), margin=margin)

    return compute


def _triplet_semihard(
    num_classes: int, embed_dim: int, generator: torch.Generator, *, margin: float
) -> Compute:
    distance = _DirectDistance(normalize_embeddings=False)
    return _Library(
        losses.TripletMarginLoss(margin=margin, distance=distance),
        miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard", distance=distance),
    )


def _contrastive(num_classes: int, embed_dim: int, generator: torch.Generator, **settings: float) -> Compute:
    distance = _DirectDistance(normalize_embeddings=False)
    return _Library(losses.ContrastiveLoss(distance=distance, **settings))


def _margin(num_classes: int, embed_dim: int, generator: torch.Generator, **settings: Any) -> Compute:
    return _Margin(num_classes, **settings)


def _multi_similarity(
    num_classes: int, embed_dim: int, generator: torch.Generator, **settings: float
) -> Compute:
    return lambda z, labels, seed: multi_similarity(z, labels, **settings)


def _smooth_ap(
    num_classes: int, embed_dim: int, generator: torch.Generator, *, temperature: float
) -> Compute:
    return lambda z, labels, seed: smooth_ap(z, labels, temperature=temperature)


def _with_class_vectors(loss: type[nn.Module], draw: Callable[..., Any]) -> Callable[..., Compute]:
    """Return the builder of a library loss that learns one vector per class.

    The loss sees the directions of the vectors alone; their length, draw's choice, sets how fast a step turns them.
    """

    def build(num_classes: int, embed_dim: int, generator: torch.Generator, **settings: float) -> Compute:
        seeded = partial(draw, generator=generator)
        return _Library(loss(num_classes, embed_dim, weight_init_func=seeded, **settings))

    return build


RANKING: dict[str, RankingEntry] = {
    "triplet": RankingEntry(
        _triplet,
        {"margin": Setting(0.2)},
        "scaled",
        None,
        "triplets, one distance-weighted negative per positive pair, mean over all (RKD, MDR: arXiv 2102.04223)",
    ),
    "triplet_semihard": RankingEntry(
        _triplet_semihard,
        {"margin": Setting(0.2, above_low=True)},
        "scaled",
        None,
        "all triplets whose negative is farther than the positive by less than the margin (FaceNet: arXiv 1503.03832)",
    ),
    "contrastive": RankingEntry(
        _contrastive,
        {"pos_margin": Setting(0.0, high=2.0), "neg_margin": Setting(1.0, high=2.0)},
        "unit",
        None,
        "distances of positives above pos_margin plus of negatives below neg_margin, not squared, mean of the non-zero ones",
    ),
    "margin": RankingEntry(
        _margin,
        {
            "margin": Setting(0.2),
            "beta": Setting(1.2, high=2.0),
            "nu": Setting(0.0),
            "count": Setting("triplets", choices=("triplets", "pairs")),
        },
        "unit",
        5e-4,
        "distance to a learned boundary per class, beta at first, one distance-weighted triplet per row (arXiv 1706.07567)",
    ),
    "multi_similarity": RankingEntry(
        _multi_similarity,
        {
            "alpha": Setting(2.0, above_low=True),
            "beta": Setting(40.0, above_low=True),
            "base": Setting(0.5, low=-1.0, high=1.0),
            "epsilon": Setting(0.1),
        },
        "unit",
        None,
        "mined pairs weighted by self and relative similarity, mean over active rows (arXiv 1904.06627, OBD-SD's settings)",
    ),
    "proxy_anchor": RankingEntry(
        _with_class_vectors(losses.ProxyAnchorLoss, partial(nn.init.kaiming_normal_, mode="fan_out")),
        {"margin": Setting(0.1, high=2.0), "alpha": Setting(32.0, above_low=True)},
        "unit",
        1e-2,
        "one learned proxy per class as the anchor (arXiv 2003.13911; its rate: 100 times that of the network, 1e-4)",
    ),
    "proxy_nca": RankingEntry(
        _with_class_vectors(losses.ProxyNCALoss, nn.init.normal_),
        # exp(-scale * squared distance), the distance up to 2, must not fall out of float32: such rows would be left out.
        {"softmax_scale": Setting(9.0, high=20.0, above_low=True)},
        "unit",
        1e-2,
        "softmax over squared distances to one proxy per class, its own included (ProxyNCA++: arXiv 2004.01113, scale 9)",
    ),
    "arcface": RankingEntry(
        _with_class_vectors(_ArcFace, nn.init.normal_),
        {"margin": Setting(28.6, high=90.0), "scale": Setting(64.0, above_low=True)},
        "unit",
        1e-2,
        "softmax over cosines with an angular margin, in degrees (arXiv 1801.07698: 0.5 rad, scale 64)",
    ),
    "smooth_ap": RankingEntry(
        _smooth_ap,
        {"temperature": Setting(0.01, above_low=True)},
        "unit",
        None,
        "average precision with ranks smoothed by sigmoids (arXiv 2007.12163)",
    ),
}


def build_ranking(
    name: str, *, num_classes: int, embed_dim: int, seed: int, args: dict[str, Any] | None = None
) -> RankingLoss:
    """Return the loss ``RANKING[name]`` with its defaults, replaced by args where given.

    Its parameters are drawn from seed alone; the global random state stays as it was. Raises UserError for an unknown
    name, an unknown key of args, or a value of another type or out of range.
    """
    entry = pick(RANKING, name, "ranking loss")
    given = args or {}
    for key in given:
        if key not in entry.settings:
            known = ", ".join(entry.settings)
            raise UserError(
                f"loss_args.{key}: {name} has no such setting, only {known}{nearest(str(key), entry.settings)}"
            )
    settings = {
        key: _checked(key, given[key], setting) if key in given else setting.default
        for key, setting in entry.settings.items()
    }
    generator = torch.Generator().manual_seed(seed)
    return RankingLoss(entry.build(num_classes, embed_dim, generator, **settings), entry.geometry)


def _checked(key: str, value: Any, setting: Setting) -> float | str:
    """Return value, a number as a float; UserError if it is not one of the choices, or not a number in the range."""
    if setting.choices:
        if value in setting.choices:
            return value
        hint = nearest(str(value), setting.choices)
        raise UserError(f"loss_args.{key}: expected one of {', '.join(setting.choices)}, got {value!r}{hint}")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and setting.low <= value <= setting.high and not (setting.above_low and value == setting.low):
        return float(value)
    start = f"above {setting.low:g}" if setting.above_low else f"from {setting.low:g}"
    end = f" to {setting.high:g}" if math.isfinite(setting.high) else ""
    raise UserError(f"loss_args.{key}: expected a number {start}{end}, got {value!r}")
