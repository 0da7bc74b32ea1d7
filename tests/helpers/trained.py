"""Run folders and a weights file with known weights: what a user has after training, without the training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glsd.config.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneModelConfig
from glsd.config.parse import dump
from glsd.config.pretrain import DataConfig, ModelConfig, PretrainConfig, TimmArg
from glsd.loading import build_embedder
from glsd.models.backbone import build_backbone
from glsd.runtime import checkpoint

NAME = "vit_tiny_patch16_224"
TINY: dict[str, TimmArg] = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
TRAINED = PretrainConfig(
    seed=5,
    data=DataConfig(global_size=32, local_size=16),
    model=ModelConfig(backbone=NAME, timm_args=TINY, pool="mean"),
)


def write_run(folder: Path, config: Any, networks: Mapping[str, torch.nn.Module], *, step: int) -> Path:
    """Write a run folder with one checkpoint, and return the checkpoint's folder."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    tensors = {role: network.state_dict() for role, network in networks.items()}
    return checkpoint.save(folder / "checkpoints", step=step, tensors=tensors, state={}, optimizer={}, keep=1)


def trained_networks(root: Path) -> dict[str, Any]:
    """A run of pretraining, one of metric learning that started from it, and a weights file, each with known weights.

    Folders "pretrained" and "tuned" and file "weights.safetensors" below root; returns the networks by role.
    """
    student, teacher = (build_backbone(NAME, image_size=32, timm_args=TINY, seed=seed) for seed in (2, 1))
    save_file(teacher.net.state_dict(), root / "weights.safetensors")
    networks = {
        role: torch.nn.ModuleDict({"backbone": x}) for role, x in (("student", student), ("teacher", teacher))
    }
    start = write_run(root / "pretrained", TRAINED, networks, step=7)
    tuned = FinetuneConfig(
        init=str(start),
        data=FinetuneDataConfig(crop=40, resize=50),
        model=FinetuneModelConfig(backbone=NAME, timm_args=TINY, pool="cls", embed_dim=6),
    )
    embedder = build_embedder(replace(tuned, seed=9), "random")
    write_run(root / "tuned", tuned, {"student": embedder, "losses": torch.nn.Linear(1, 1)}, step=3)
    return {"root": root, "teacher": teacher, "student": student, "embedder": embedder}
