"""Losses as functions of tensors: global and local self-distillation, OBD-SD, MDR, ranking losses.

``from glsd.losses import local_loss`` imports what it needs, and gives a function that takes numpy arrays as well.
"""

from typing import Any

from glsd.arrays import public

_NAMES = {
    "patch_loss": "distill",
    "global_loss": "distill",
    "local_loss": "distill",
    "similarity_match": "distill",
    "ema_center": "center",
    "sinkhorn_center": "center",
    "koleo_loss": "koleo",
    "similarity_target": "obd_sd",
    "diffusion_target": "obd_sd",
    "distillation_kl": "obd_sd",
    "mdr_loss": "mdr",
    "observe": "mdr",
    "initial_statistics": "mdr",
    "pairwise_distances": "mdr",
    "build_ranking": "ranking",
    "contrastive": "tuple_losses",
    "triplet_semihard": "tuple_losses",
    "multi_similarity": "tuple_losses",
    "smooth_ap": "tuple_losses",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    return public(__name__, _NAMES, name)


def __dir__() -> list[str]:
    return __all__
