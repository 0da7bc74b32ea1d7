"""The linear probe: a linear classifier trained on frozen, cached features."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from glsd.errors import UserError
from glsd.metrics.search import check_labeled, known_labels
from glsd.rng import Stream, permutation, philox

_MOMENTUM = 0.9
_INIT_STD = 0.01
_FAR_BELOW = 60.0
_LOGITS_HELD = 2**26  # logits of the val set held at a time: 256 MiB
MAX_SEED = 2**63 - 1


class LinearProbe(NamedTuple):
    """Accuracy on the val set, the learning rate, and the held-out top-1 accuracy by rate that chose it (if any)."""

    top1: float
    top5: float
    lr: float
    held_out: dict[float, float]


def linear_probe(
    train_features: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    val_features: Float[Tensor, "q d"],
    val_labels: Int64[Tensor, " q"],
    *,
    lr_list: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> LinearProbe:
    """Train a linear softmax classifier on the train set, and return its accuracy on the val set.

    The settings are those of DINO's linear evaluation (arXiv 2104.14294): SGD with momentum 0.9, no weight decay,
    lr * batch_size / 256 falling to 0 by a cosine over the epochs, weights from N(0, 0.01), features not normalized.
    There are two differences. The features are computed once, so train images are not augmented. The published rate
    0.001 suits 10^5 steps, so several rates may be tried: the best one on a held-out tenth of the train set trains on
    all of it. The val set chooses nothing. Order and initial weights are a function of ``seed``. Computes in float32 on
    the device of the features. Raises UserError for features that are not finite, a missing label, too small a set,
    settings out of range, and if no val label is a train label.
    """
    check_labeled(train=(train_features, train_labels), val=(val_features, val_labels))
    check_settings(lr_list, epochs=epochs, batch_size=batch_size, seed=seed)
    classes, train_classes = train_labels.unique(return_inverse=True)
    # A label that was never trained is never right.
    known = known_labels(train_labels, val_labels)
    val_classes = torch.where(known, torch.searchsorted(classes, val_labels), -1)
    train_features, val_features = train_features.float(), val_features.float()

    lr, held_out = lr_list[0], {}
    if len(lr_list) > 1:
        if len(train_features) < 10:
            raise UserError(
                "lr_list holds several rates, but fewer than 10 train images cannot choose one: give one rate"
            )
        order = torch.from_numpy(permutation(len(train_features), seed=seed, stream=Stream.PROBE_SPLIT)).to(
            train_features.device
        )
        tenth, rest = order[: len(order) // 10], order[len(order) // 10 :]
        weight, bias = _train(
            train_features[rest], train_classes[rest], len(classes), lr_list, epochs, batch_size, seed
        )
        shares = [
            _shares(w, b, train_features[tenth], train_classes[tenth])[0]
            for w, b in zip(weight, bias, strict=True)
        ]
        held_out = dict(zip(lr_list, shares, strict=True))
        lr = max(lr_list, key=lambda rate: held_out[rate])
    weight, bias = _train(train_features, train_classes, len(classes), [lr], epochs, batch_size, seed)
    top1, top5 = _shares(weight[0], bias[0], val_features, val_classes)
    return LinearProbe(top1, top5, lr, held_out)


def check_settings(lr_list: Sequence[float], *, epochs: int, batch_size: int, seed: int) -> None:
    """Raise UserError for settings of the linear probe that are out of range."""
    if not lr_list or min(lr_list) <= 0:
        raise UserError(f"lr_list is {list(lr_list)}: expected one or more numbers above 0")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}: expected 1 or more")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}: expected 0 to {MAX_SEED}")


@torch.enable_grad()
def _train(
    features: Float32[Tensor, "n d"],
    classes: Int64[Tensor, " n"],
    num_classes: int,
    lr_list: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Float32[Tensor, "r d c"], Float32[Tensor, "r c"]]:
    """Train one classifier per learning rate side by side: same batches, same initial weights."""
    device, num_rates = features.device, len(lr_list)
    normal = np.random.Generator(philox(seed=seed, stream=Stream.PROBE_WEIGHTS))
    start = normal.standard_normal((features.shape[1], num_classes)) * _INIT_STD
    # One matrix for all classifiers: a batched product of small matrices takes several times as long.
    weight = torch.tensor(start, dtype=torch.float32, device=device).repeat(1, num_rates).requires_grad_()
    bias = torch.zeros(num_rates * num_classes, device=device, requires_grad=True)
    # Not torch.optim, whose first step imports torch's compiler for seconds.
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rates = torch.tensor(lr_list, device=device).repeat_interleave(num_classes) * batch_size / 256
    num_steps, step = epochs * -(-len(features) // batch_size), 0
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(len(features), seed=seed, stream=epoch + 1)).to(device)
        for rows in order.split(batch_size):
            logits = torch.addmm(bias, features[rows], weight).view(-1, num_classes)
            # Raise probabilities below e^-60, because CPUs crawl on subnormal numbers. The gradient passes as it is.
            floor = logits.detach().amax(dim=1, keepdim=True) - _FAR_BELOW
            logits = logits + (floor - logits.detach()).clamp(min=0)
            targets = classes[rows].repeat_interleave(num_rates)
            losses = F.cross_entropy(logits, targets, reduction="sum") / len(rows)
            gradients = torch.autograd.grad(losses, [weight, bias])
            share = (1 + math.cos(math.pi * step / num_steps)) / 2
            with torch.no_grad():
                for parameter, speed, gradient in zip([weight, bias], speeds, gradients, strict=True):
                    parameter -= share * rates * speed.mul_(_MOMENTUM).add_(gradient)
            step += 1
    weights = weight.detach().view(-1, num_rates, num_classes).transpose(0, 1)
    return weights, bias.detach().view(num_rates, num_classes)


def _shares(
    weight: Float32[Tensor, "d c"],
    bias: Float32[Tensor, " c"],
    features: Float32[Tensor, "q d"],
    classes: Int64[Tensor, " q"],
) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy; a classifier that diverged has none right."""
    right = torch.zeros(2, dtype=torch.int64, device=features.device)
    rows = max(1, _LOGITS_HELD // len(bias))
    for part, truth in zip(features.split(rows), classes.split(rows), strict=True):
        logits = part @ weight + bias
        if not logits.isfinite().all():
            return 0.0, 0.0
        found = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth[:, None]
        right += torch.stack([found[:, 0].sum(), found.sum()])
    top1, top5 = (right.double() / len(features)).tolist()
    return top1, top5
