"""The losses of a metric-learning step: a ranking loss, self-distillation (PSD, OBD-SD) and the distance regularizer (MDR)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from glsd.config.finetune import FinetuneConfig
from glsd.finetune.networks import State
from glsd.finetune.plan import diffusion_share
from glsd.losses.mdr import (
    MdrStatistics,
    level_penalty,
    mdr_loss,
    mean_normalize,
    observe,
    pairwise_distances,
)
from glsd.losses.obd_sd import (
    diffusion_target,
    distillation_kl,
    similarity_target,
    target_statistics,
)
from glsd.precision import widened


class Losses(NamedTuple):
    """The total loss, its parts for the meters, and MDR's statistics after this batch."""

    loss: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    mdr_statistics: MdrStatistics


def batch_losses(
    cfg: FinetuneConfig,
    state: State,
    embeddings: Float[Tensor, "b e"],
    labels: Int64[Tensor, " b"],
    teacher_embeddings: Float[Tensor, "b e"] | None,
    *,
    sd_weight: float,
    seed: int,
) -> Losses:
    """Return the losses of the global batch, in float32 or better.

    embeddings: raw, of all ranks in rank order. teacher_embeddings: of the same images by the network of the previous
    epoch, None if sd_weight is 0. total = ranking + sd_weight * KL + mdr.weight * MDR + mdr.level_weight * sum of squared
    levels. The ranking loss takes unit vectors. With MDR a triplet loss takes mean-normalized vectors, for which MDR is made
    ("learning without L2 norm"). Source: OBD-SD (arXiv 2211.07566), MDR (arXiv 2102.04223).
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = widened(embeddings)
        unit = F.normalize(embeddings, dim=1)
        scaled = mean_normalize(embeddings) if cfg.uses_mdr else unit
        seen = scaled if state.ranking.geometry == "scaled" else unit
        ranking = state.ranking(seen, labels, seed=seed)
        loss, parts, statistics = ranking, {"ranking": ranking}, state.mdr_statistics
        if teacher_embeddings is not None:
            kl, about_target = self_distillation(cfg, unit, F.normalize(teacher_embeddings.to(unit), dim=1))
            loss = loss + sd_weight * kl
            parts |= {
                "sd": kl,
                "sd_share": sd_weight * kl / (ranking + sd_weight * kl).clamp_min(1e-12),
                **about_target,
            }
        if cfg.uses_mdr:
            distances = pairwise_distances(scaled)
            # As published, the statistics move before the loss uses them.
            statistics = observe(
                statistics,
                distances,
                momentum=cfg.mdr.momentum,
                include_diagonal=cfg.mdr.include_diagonal,
            )
            mdr = mdr_loss(distances, state.levels, statistics)
            loss = loss + cfg.mdr.weight * mdr + cfg.mdr.level_weight * level_penalty(state.levels)
            parts |= {"mdr": mdr, "mdr_std": statistics.std}
    return Losses(loss, parts, statistics)


def self_distillation(
    cfg: FinetuneConfig, unit: Float[Tensor, "b e"], teacher_unit: Float[Tensor, "b e"]
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return KL(target || student's similarities) and statistics of the target."""
    tau, mask_self = cfg.sd.tau, cfg.sd.mask_self
    undiffused = similarity_target(teacher_unit, tau=tau, mask_self=mask_self)
    target = undiffused
    if w := diffusion_share(cfg):
        target = diffusion_target(
            teacher_unit, tau=tau, w=w, tau_d=cfg.sd.tau_d, form=cfg.sd.form, mask_self=mask_self
        )
    about = target_statistics(target, undiffused)
    kl = distillation_kl(unit, target, tau=tau, mask_self=mask_self)
    return kl, {f"sd_{name}": value for name, value in about.items()}
