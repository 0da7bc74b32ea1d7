"""Builds the networks of a pretraining run: student, teacher, the losses around the student, the optimizer."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from glsd.cluster import dist, fsdp
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError, config_keys
from glsd.models.backbone import build_backbone, check_crop
from glsd.models.blocks import blocks_of, compile_blocks, compile_obstacle
from glsd.models.heads import ProjectionHead
from glsd.models.multicrop import MultiCrop
from glsd.optim import param_groups
from glsd.pretrain.objective import Distillation
from glsd.runtime.loop import BadGradient

# Arguments of the networks -> configuration keys.
KEYS = {
    "image_size": "data.global_size",
    **{name: f"model.{name}" for name in ("backbone", "drop_path", "pool", "init", "timm_args")},
    **{name: f"head.{name}" for name in ("num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers")},
}
LOCAL_HEAD_SEED = 1  # added to the run's seed: the two heads must start differently


@dataclass(kw_only=True)
class State:
    """Everything that changes while training."""

    student: MultiCrop
    teacher: MultiCrop
    model: nn.Module  # the student with its losses, as accelerate wrapped it (DDP, autocast)
    optimizer: torch.optim.Optimizer
    centers: dict[str, Tensor]  # 'global', 'local': (k) float32
    bad_gradient: BadGradient
    step: int = 0  # optimizer steps done
    num_broken: int = 0  # samples replaced so far, over all ranks
    advised: set[str] = field(default_factory=set)  # health warnings already given


def build_networks(cfg: PretrainConfig) -> tuple[MultiCrop, MultiCrop]:
    """Return student and teacher with equal weights; the teacher has no stochastic depth and needs no gradients."""

    def network(*, drop_path: float = 0.0, checkpointing: bool = False) -> MultiCrop:
        backbone = build_backbone(
            cfg.model.backbone,
            image_size=cfg.data.global_size,
            drop_path=drop_path,
            checkpointing=checkpointing,
            pool=cfg.model.pool,
            init=cfg.model.init,
            timm_args=dict(cfg.model.timm_args),
            seed=cfg.seed,
        )
        if any(isinstance(module, _BatchNorm) for module in backbone.modules()):
            raise UserError(
                f"model.backbone {cfg.model.backbone!r} has batch normalization, whose statistics a momentum teacher would "
                "not follow: pretraining takes ViT, Eva and Swin (fine-tuning and evaluation take CNNs too)"
            )
        if cfg.data.num_local:
            with config_keys({"image_size": "data.local_size"}):
                check_crop(backbone, cfg.data.local_size)

        def head(seed: int) -> ProjectionHead:
            h = cfg.head
            return ProjectionHead(
                backbone.embed_dim,
                num_prototypes=h.num_prototypes,
                hidden_dim=h.hidden_dim,
                bottleneck_dim=h.bottleneck_dim,
                num_layers=h.num_layers,
                batch_norm=h.batch_norm,
                trainable_gain=h.trainable_gain,
                seed=seed,
            )

        global_head = head(cfg.seed)
        local_head = None
        if cfg.matching != "none":
            local_head = global_head if cfg.head.shared else head(cfg.seed + LOCAL_HEAD_SEED)
        return MultiCrop(backbone, global_head, local_head)

    m = cfg.model
    with config_keys(KEYS):
        student = network(drop_path=m.drop_path, checkpointing=m.activation_checkpointing)
        teacher = network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    teacher.backbone.eval()  # no dropout in targets; its heads stay in training mode for the batch norm, as published
    return student, teacher


def should_compile(wish: bool | None, device: torch.device) -> bool:
    """Return model.compile, by default on for GPUs that can; UserError if it is asked for and cannot be."""
    obstacle = compile_obstacle(device)
    if wish and obstacle:
        raise UserError(f"model.compile true: {obstacle}: install it, or set model.compile to false")
    return wish if wish is not None else device.type == "cuda" and obstacle is None


def build(cfg: PretrainConfig, accelerator: Accelerator) -> State:
    """Make the networks, the losses around the student, and the optimizer, on this rank's device."""
    on_gpu = accelerator.device.type == "cuda"
    student, teacher = (network.to(accelerator.device) for network in build_networks(cfg))
    if cfg.head.batch_norm and dist.world_size() > 1 and on_gpu:
        student, teacher = (
            nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in (student, teacher)
        )
    compiling = should_compile(cfg.model.compile, accelerator.device)
    if compiling:
        for part in (student, teacher):
            compile_blocks(part.backbone.net)
    objective = Distillation(student, cfg.loss, matching=cfg.matching, fuse=compiling and on_gpu)
    sharded = cfg.cluster.parallel == "fsdp" and dist.world_size() > 1
    if sharded:
        for root, network in ((objective, student), (teacher, teacher)):
            fsdp.shard(
                root,
                blocks_of(network.backbone.net),
                grad_compression=cfg.optim.grad_compression,
                copied=[network.backbone],
            )
    zero = torch.zeros(cfg.head.num_prototypes, device=accelerator.device)
    # Not prepared: without a gradient scaler accelerate's wrapper adds nothing. lr and decay are set at every step.
    groups = param_groups(fsdp.local_parameters(student).items())
    return State(
        student=student,
        teacher=teacher,
        model=accelerator.prepare_model(
            objective, evaluation_mode=sharded
        ),  # DDP only where nothing is sharded
        optimizer=torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True),
        centers={"global": zero, "local": zero.clone()},
        bad_gradient=BadGradient(accelerator.device),
    )
