"""The ranking losses by name: which images of a labeled batch are pulled together and which are pushed apart.

Every rank computes the same loss on the same gathered batch. Random draws depend on the given seed alone.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from glsd.errors import UserError, nearest, pick
from glsd.losses import tuple_losses
from glsd.losses.mining import triplet_per_anchor, triplet_per_pair
from glsd.precision import widened

# (z, labels, seed) -> loss: a plain function, or a module if the loss has parameters of its own.
Compute = Callable[[Tensor, Tensor, int], Tensor]


class Setting(NamedTuple):
    """The default of a loss's setting and its valid values: a number from low to high, or one of choices."""

    default: float | str
    low: float = 0.0
    high: float = math.inf
    above_low: bool = False  # low itself is not allowed
    choices: tuple[str, ...] = ()


class RankingEntry(NamedTuple):
    """One ranking loss.

    geometry: "unit" if the loss is defined by cosines or distances on the unit sphere. "scaled" if only differences of
    distances count: it then works on mean-normalized vectors (losses.mdr), too.
    """

    build: Callable[..., Compute]  # (num_classes, embed_dim, generator, **settings)
    settings: dict[str, Setting]
    geometry: Literal["unit", "scaled"] = "unit"
    learning_rate: float | None = None  # of the loss's own parameters; None: it has none


class RankingLoss(nn.Module):
    """A ranking loss with its settings and its own parameters, if any; ``build_ranking`` makes it."""

    def __init__(self, compute: Compute, geometry: Literal["unit", "scaled"]):
        super().__init__()
        self.compute = compute
        self.geometry = geometry

    def forward(self, z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, seed: int) -> Float[Tensor, ""]:
        """Return the loss in float32 or better, also under autocast.

        z: unit vectors, or mean-normalized ones if geometry is "scaled". labels: 0 .. num_classes - 1. seed: of the random
        draws, if the loss makes any. A batch without a pair or triplet to learn from gives 0, with zero gradients.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self.compute(widened(z), labels, seed)


def _plain(loss: Callable[..., Tensor]) -> Callable[..., Compute]:
    """Return the builder of a loss that has no parameters and draws nothing."""

    def build(num_classes: int, embed_dim: int, generator: torch.Generator, **settings: Any) -> Compute:
        return lambda z, labels, seed: loss(z, labels, **settings)

    return build


def _triplet(num_classes: int, embed_dim: int, generator: torch.Generator, **settings: float) -> Compute:
    return lambda z, labels, seed: tuple_losses.triplet_loss(
        z, triplet_per_pair(z, labels, seed=seed), **settings
    )


class _Margin(nn.Module):
    """The margin loss with one learned boundary per class, on one distance-weighted triplet per row."""

    def __init__(
        self, num_classes: int, embed_dim: int, generator: torch.Generator, *, beta: float, **settings: Any
    ):
        super().__init__()
        self.beta = nn.Parameter(torch.full((num_classes,), beta))
        self.settings = settings

    def forward(self, z: Tensor, labels: Tensor, seed: int) -> Tensor:
        triplets = triplet_per_anchor(z, labels, seed=seed)
        return tuple_losses.margin_loss(z, labels, triplets, self.beta, **self.settings)


class _ClassVectors(nn.Module):
    """A loss of pytorch-metric-learning that learns one vector per class; ``draw`` initializes the vectors.

    The loss uses their directions alone. Their length, which follows from ``draw``, sets how far a step turns them.
    """

    def __init__(
        self,
        loss: str,
        draw: Callable[..., Any],
        num_classes: int,
        embed_dim: int,
        generator: torch.Generator,
        **settings: float,
    ):
        super().__init__()
        from pytorch_metric_learning import losses  # takes seconds, and most losses do without it

        init = partial(draw, generator=generator)
        self.loss = getattr(losses, loss)(num_classes, embed_dim, weight_init_func=init, **settings)

    def forward(self, z: Tensor, labels: Tensor, seed: int) -> Tensor:
        return self.loss(z, labels)


def _arcface(num_classes: int, embed_dim: int, generator: torch.Generator, **settings: float) -> Compute:
    module = _ClassVectors("ArcFaceLoss", nn.init.normal_, num_classes, embed_dim, generator, **settings)
    # At 0 and pi the arc cosine has no finite gradient.
    module.loss.get_angles = lambda cosines: cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return module


RANKING: dict[str, RankingEntry] = {
    # One distance-weighted negative per positive pair. Source: RKD's and MDR's recipe (arXiv 2102.04223).
    "triplet": RankingEntry(_triplet, {"margin": Setting(0.2)}, geometry="scaled"),
    "triplet_semihard": RankingEntry(
        _plain(tuple_losses.triplet_semihard), {"margin": Setting(0.2, above_low=True)}, geometry="scaled"
    ),
    "contrastive": RankingEntry(
        _plain(tuple_losses.contrastive),
        {"pos_margin": Setting(0.0, high=2.0), "neg_margin": Setting(1.0, high=2.0)},
    ),
    # beta: the initial boundary of every class. Source: arXiv 1706.07567, learning rate of OBD-SD's released code.
    "margin": RankingEntry(
        _Margin,
        {
            "margin": Setting(0.2),
            "beta": Setting(1.2, high=2.0),
            "nu": Setting(0.0),
            "count": Setting("triplets", choices=("triplets", "pairs")),
        },
        learning_rate=5e-4,
    ),
    # Source: arXiv 1904.06627, with the settings of OBD-SD.
    "multi_similarity": RankingEntry(
        _plain(tuple_losses.multi_similarity),
        {
            "alpha": Setting(2.0, above_low=True),
            "beta": Setting(40.0, above_low=True),
            "base": Setting(0.5, low=-1.0, high=1.0),
            "epsilon": Setting(0.1),
        },
    ),
    # Source: arXiv 2003.13911; its learning rate is 100 times that of the network, 1e-4.
    "proxy_anchor": RankingEntry(
        partial(_ClassVectors, "ProxyAnchorLoss", partial(nn.init.kaiming_normal_, mode="fan_out")),
        {"margin": Setting(0.1, high=2.0), "alpha": Setting(32.0, above_low=True)},
        learning_rate=1e-2,
    ),
    # A softmax over squared distances to all proxies. Source: ProxyNCA++ (arXiv 2004.01113), scale 9.
    # exp(-scale * squared distance), the distance up to 2, must not underflow in float32: the row would be left out.
    "proxy_nca": RankingEntry(
        partial(_ClassVectors, "ProxyNCALoss", nn.init.normal_),
        {"softmax_scale": Setting(9.0, high=20.0, above_low=True)},
        learning_rate=1e-2,
    ),
    # margin: an angle in degrees. Source: arXiv 1801.07698, 0.5 rad and scale 64.
    "arcface": RankingEntry(
        _arcface,
        {"margin": Setting(28.6, high=90.0), "scale": Setting(64.0, above_low=True)},
        learning_rate=1e-2,
    ),
    "smooth_ap": RankingEntry(_plain(tuple_losses.smooth_ap), {"temperature": Setting(0.01, above_low=True)}),
}


def build_ranking(
    name: str, *, num_classes: int, embed_dim: int, seed: int, args: dict[str, Any]
) -> RankingLoss:
    """Return the loss ``RANKING[name]``; args replace the defaults of its settings.

    Its own parameters are drawn from seed alone; the global random state stays untouched. Raises UserError for an unknown
    name, an unknown setting, or a value of a wrong type or out of range.
    """
    entry = pick(RANKING, name, "ranking loss")
    for key in args:
        if key not in entry.settings:
            known = ", ".join(entry.settings)
            raise UserError(
                f"{key}: the loss {name!r} has no such setting, only {known}{nearest(str(key), entry.settings)}"
            )
    settings = {
        key: _checked(key, args[key], setting) if key in args else setting.default
        for key, setting in entry.settings.items()
    }
    generator = torch.Generator().manual_seed(seed)
    return RankingLoss(entry.build(num_classes, embed_dim, generator, **settings), entry.geometry)


def _checked(key: str, value: Any, setting: Setting) -> float | str:
    """Return a valid value, numbers as floats; UserError for any other."""
    if setting.choices:
        if value in setting.choices:
            return value
        hint = nearest(str(value), setting.choices)
        raise UserError(f"{key} is {value!r}: expected one of {', '.join(setting.choices)}{hint}")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and setting.low <= value <= setting.high and not (setting.above_low and value == setting.low):
        return float(value)
    start = f"above {setting.low:g}" if setting.above_low else f"from {setting.low:g}"
    end = f" to {setting.high:g}" if math.isfinite(setting.high) else ""
    raise UserError(f"{key} is {value!r}: expected a number {start}{end}")
