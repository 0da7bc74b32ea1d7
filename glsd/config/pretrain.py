"""The typed configuration of pretraining. These frozen dataclasses hold the only defaults.

A YAML file and flags override them (glsd.config.parse). Parts of the library take plain keyword arguments instead.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from glsd.config.values import PathText

# Plain values only, from which nothing can be built.
Plain = bool | int | float | str | None
TimmArg = Plain | list[Plain]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cropped.

    Args:
        shards: Brace pattern, glob or list of shards, local or http(s)://, s3://, gs://, hf://, e.g. 'train-{000..146}.tar'.
        weights: How often an epoch reads each entry of that list, e.g. [1, 0.25, 3]; unset = once.
        num_workers: Loader processes per rank. 0 reads in the training process. The result does not depend on it.
        global_size: Side of a global crop in pixels.
        local_size: Side of a local crop in pixels.
        num_local: Local crops per image. There are always 2 global ones.
        global_scale: Smallest and largest share of the image's area that a global crop covers.
        local_scale: Smallest and largest share of the image's area that a local crop covers.
        jitter_prob: Share of crops with jittered brightness, contrast, saturation and hue. Lower it where color carries meaning.
        jitter: Strengths of brightness, contrast, saturation and hue jitter.
        grayscale_prob: Share of crops turned gray.
        blur_prob: Share of blurred crops: first global, second global, local.
        blur_sigma: Smallest and largest blur in pixels of the crop. 2 is published for global crops of 224 pixels: lower it in
            proportion for smaller ones.
        solarize_prob: Share of solarized crops: first global, second global, local.
        flip_prob: Share of crops mirrored left to right. Set 0 where a mirror image means something else, such as text.
        window_shards: Samples are shuffled within this many (shuffled) shards.
        max_bad_fraction: Stop when more than this share of the samples so far was unreadable. Raise it for data that you
            know to be damaged. It is counted over at least one epoch.
    """

    shards: list[str] | str = ""
    weights: list[float] = field(default_factory=list)
    num_workers: int = 2
    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    jitter_prob: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale_prob: float = 0.2
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    flip_prob: float = 0.5
    window_shards: int = 16
    max_bad_fraction: float = 0.01


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone.

    Args:
        backbone: Name of a timm Vision Transformer or Swin model.
        init: 'random', 'timm' (timm's pretrained weights) or a weights file (safetensors, or torch state dict). Start from
            weights to adapt a network to your images in fewer epochs.
        drop_path: Stochastic depth of the student's last block (linear from 0 at the first). The teacher has none.
        pool: Feature of the global loss: 'cls' (class token) or 'mean' (mean of the patch tokens; always for Swin).
        activation_checkpointing: Recompute the student's blocks in the backward pass. Takes less memory and more time.
        compile: Compile the blocks of ViT and Eva, on a GPU the losses too. The first steps take longer. Unset = on GPUs that
            can.
        timm_args: Extra arguments of timm's create_model, e.g. {patch_size: 4, depth: 3}.
    """

    backbone: str = "vit_small_patch16_224"
    init: PathText = "random"
    drop_path: float = 0.1
    pool: Literal["cls", "mean"] = "cls"
    activation_checkpointing: bool = False
    compile: bool | None = None
    timm_args: dict[str, TimmArg] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The projection heads on the global and the patch features.

    Args:
        num_prototypes: Outputs of the head (k). Fewer suit small data sets.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width of the normalized vector before the prototypes.
        num_layers: Linear layers before the prototypes. Change it to match the head of another publication.
        batch_norm: Batch normalization in the hidden layers.
        trainable_gain: Learn the length of each prototype (the papers' norm_last_layer = false).
        shared: Use one head for class token and patches, as iBOT does. Saves the memory of the second head.
    """

    num_prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    batch_norm: bool = False
    trainable_gain: bool = False
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Global and local self-distillation.

    Args:
        global_weight: Weight of the global loss; unset = 0.5 beside a local loss, 1 alone (as published). Lower it where
            dense features matter most, e.g. for segmentation.
        local_weight: Weight of the local loss.
        koleo_weight: Weight of KoLeo, which spreads the image features of a batch; DINOv2 has 0.1. Raise it if RankMe stays low.
        hinge: Geometric matching rejects patches farther apart than half the diagonal of the larger one.
        hinge_factor: Multiplies that distance. Raise it if too few patches match (share of matched patches in the metrics).
        local_mean: Mean over 'all' student patches (as published), or over the 'accepted' ones. Take 'accepted' to keep the
            strength of the local loss where few patches match.
        geometric_weight: Share of the geometric matches with --matching both.
        similarity_weight: Share of the similarity matches with --matching both.
        student_temp: Temperature of the student. Lower it for sharper outputs; the teacher's must stay lower still.
        teacher_temp: Temperature of the teacher after its warm-up.
        warmup_teacher_temp: Temperature of the teacher in the first epoch.
        warmup_teacher_temp_epochs: Epochs over which the teacher's temperature rises; 0 = constant.
        centering: What prevents collapse: 'ema' (center of the teacher's logits, as published) or 'sinkhorn' (Sinkhorn-Knopp).
        center_momentum: Momentum of the EMA center. Lower it in runs of few steps, in which the center lags behind.
        sinkhorn_iterations: Rounds of Sinkhorn-Knopp, which balances each micro-batch of all ranks. More rounds balance better.
    """

    global_weight: float | None = None
    local_weight: float = 0.5
    koleo_weight: float = 0.0
    hinge: bool = True
    hinge_factor: float = 1.0
    local_mean: Literal["all", "accepted"] = "all"
    geometric_weight: float = 0.5
    similarity_weight: float = 0.5
    student_temp: float = 0.1
    teacher_temp: float = 0.04
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    centering: Literal["ema", "sinkhorn"] = "ema"
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedules. Everything is a function of the step.

    Args:
        epochs: Passes over the data.
        batch_size: Images per step of all ranks together. Neither it nor the learning rate depends on the hardware.
        micro_batch: Most images of a rank in one forward pass; more are accumulated. Set it if a rank runs out of memory; 0 =
            its whole share of the batch.
        lr: Learning rate at batch size 256. It is scaled linearly with the batch size.
        min_lr: Learning rate at the end. Raise it if you mean to go on with more epochs.
        warmup_epochs: Epochs of linear learning rate warm-up.
        weight_decay: Weight decay at the start. Lower it for few images or a small network.
        weight_decay_end: Weight decay at the end.
        teacher_momentum: Momentum of the teacher at the start. Lower it for short runs.
        teacher_momentum_end: Momentum of the teacher at the end. Below 1 the teacher follows the student to the last step.
        clip_grad: Largest gradient norm; 0 = off. Lower it if the loss jumps (gradient norm in the metrics).
        clip_mode: Clip the norm of each 'parameter' on its own (as published), or the 'global' norm, as most other code does.
        freeze_prototypes_epochs: Epochs in which the heads' last layer does not move.
        precision: 'no' = float32, 'bf16' = bfloat16 autocast (softmax and statistics stay float32); float32 on a CPU
            without bfloat16 instructions.
        grad_compression: Ranks send gradients as they are ('no'), or in bfloat16 ('bf16'), which halves the bytes.
        max_steps: Stop after this many steps with the schedules of all epochs, to try a run out; 0 = run all epochs.
    """

    epochs: int = 100
    batch_size: int = 256
    micro_batch: int = 0
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    teacher_momentum: float = 0.996
    teacher_momentum_end: float = 1.0
    clip_grad: float = 3.0
    clip_mode: Literal["parameter", "global"] = "parameter"
    freeze_prototypes_epochs: int = 1
    precision: Literal["no", "bf16"] = "no"
    grad_compression: Literal["no", "bf16"] = "no"
    max_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is written during training.

    Args:
        log_every: Steps between lines of metrics.jsonl, where host and device synchronize.
        trackers: Where metrics are shown besides metrics.jsonl: tensorboard,wandb,mlflow, or '' = nowhere.
        sample_log: Write the epoch and key of every sample, step by step, into samples.jsonl.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: Checkpoints kept on disk, at least 2, as a damaged one falls back to the one before. Raise it to
            compare earlier states. The best one of the probes (checkpoints/best) stays besides.
        keep_every: Keep also every checkpoint whose step this number divides, to draw a curve; 0 = none.
        probe_every: Steps between probes of teacher and student; unset = an epoch, but at least 500 steps; 0 = never. Without
            labeled shards a probe is RankMe on 2,048 training images.
        probe_train_shards: Labeled shards that vote in a k-NN probe.
        probe_val_shards: Labeled shards that are classified in a k-NN probe.
        probe_k: Neighbors that vote in the probe. Keep it below the images per class.
        probe_images: Most images of each probe set. Lower it if probes take too long.
        pictures: Draw at each probe what the teacher sees: attention, patches as colors, neighbors, at the end a map.
    """

    log_every: int = 10
    trackers: list[str] | str = "tensorboard"
    sample_log: bool = False
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    probe_every: int | None = None
    probe_train_shards: list[str] | str = ""
    probe_val_shards: list[str] | str = ""
    probe_k: int = 20
    probe_images: int = 10000
    pictures: bool = True


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How ranks work together.

    Args:
        lost_after: Seconds without a heartbeat after which a rank counts as lost and all others stop.
        parallel: 'ddp' keeps all weights on every rank. 'fsdp' shards weights, teacher and optimizer state over the ranks.
    """

    lost_after: float = 60.0
    parallel: Literal["ddp", "fsdp"] = "ddp"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a vision backbone without labels.

    Args:
        out: Run directory: config, metrics, pictures, checkpoints.
        seed: Seed of every random draw. A draw also depends on epoch and sample, or on step and rank.
        matching: How student patches find teacher patches: 'geometric' (same place), 'similarity' (nearest feature), 'both'
            (weighted), or 'none' (no local loss).
        resume: 'auto' goes on from the last checkpoint in the run directory. 'never' refuses a directory that has one.
    """

    recipes: ClassVar[tuple[str, ...]] = ("pretrain", "demo")  # folders of configs/

    out: PathText = "runs/pretrain"
    seed: int = 0
    matching: Literal["geometric", "similarity", "both", "none"] = "geometric"
    resume: Literal["auto", "never"] = "never"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
