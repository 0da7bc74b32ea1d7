"""The typed configuration of the second story, metric learning; see glsd.config for how such classes are used."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from glsd.config.pretrain import TimmArg

Pool = Literal["cls", "mean", "mean+max"]
Reg = Literal["none", "psd", "obdsd", "mdr", "obdsd+mdr"]


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig:
    """Labeled images: some classes to learn from, others to be retrieved.

    Args:
        train_shards: Labeled shards to learn from: brace pattern, glob, or a list.
        test_shards: Labeled shards of unseen classes, each image searched among all others (leave-one-out).
        query_shards: Instead of test_shards: the images that are searched for ...
        gallery_shards: ... among these.
        val_share: Share of the training classes (the last ones) that is held out and measured, to choose an epoch by; 0 = none.
        images_per_class: Images per class in a batch (M); a batch holds optim.batch_size / M classes (P).
        drop_lone_classes: Leave out training classes with a single image instead of stopping.
        crop: Side of the crops in pixels; unset = that of the run given with --init, 224 otherwise.
        resize: Short side before the center crop when measuring; unset = 256/224 of the crop.
        scale: Share of the image's area that a training crop covers, smallest and largest.
        flip_prob: Share of training crops mirrored left-right.
        num_workers: Loader processes per rank; the result does not depend on it.
        max_bad_fraction: Stop when more than this share of all samples so far (at least one epoch's) was unreadable.
    """

    train_shards: list[str] | str = ""
    test_shards: list[str] | str = ""
    query_shards: list[str] | str = ""
    gallery_shards: list[str] | str = ""
    val_share: float = 0.0
    images_per_class: int = 2
    drop_lone_classes: bool = False
    crop: int | None = None
    resize: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    flip_prob: float = 0.5
    num_workers: int = 2
    max_bad_fraction: float = 0.01


@dataclass(frozen=True, kw_only=True)
class FinetuneModelConfig:
    """The network that embeds.

    Args:
        backbone: timm name of the network, for --init random or a weights file; a run folder and timm:NAME know their own.
        timm_args: Extra arguments of timm's create_model.
        pool: What the embedding is made of: class token, mean of the patches (CNN: of the last map) or mean plus maximum;
            unset = as the run given with --init, class token where there is one otherwise.
        embed_dim: Width of the embedding, a linear layer on the pooled feature; 0 = the feature itself.
        drop_path: Stochastic depth of the last block.
        freeze_batch_norm: Batch normalization keeps the statistics it came with (CNNs; their scales still learn).
        allow_partial: Go on when the weights given with --init fit only partly.
    """

    backbone: str = ""
    timm_args: dict[str, TimmArg] = field(default_factory=dict)
    pool: Pool | None = None
    embed_dim: int = 128
    drop_path: float = 0.0
    freeze_batch_norm: bool = True
    allow_partial: bool = False


@dataclass(frozen=True, kw_only=True)
class SelfDistillConfig:
    """PSD and OBD-SD: the network of the previous epoch teaches the similarities inside a batch.

    Args:
        weight: Weight lambda; it is multiplied by epoch / epochs and the squared temperature.
        tau: Temperature of both similarity distributions.
        w: Share of each diffusion step that walks on, 0 to 0.999 (obdsd; 0 = psd).
        tau_d: Temperature of the walk between images (form softmax).
        form: Diffusion of probabilities over a softmax walk, as released, or of similarities over the symmetrically
            normalized affinities, as in the paper.
        mask_self: Leave each image's similarity with itself out of both distributions; needed for tau below 0.5.
    """

    weight: float = 75.0
    tau: float = 1.0
    w: float = 0.99
    tau_d: float = 1.0
    form: Literal["softmax", "symmetric"] = "softmax"
    mask_self: bool = False


@dataclass(frozen=True, kw_only=True)
class MdrConfig:
    """The multi-level distance regularizer: standardized distances are drawn to the nearest of a few learned levels.

    Args:
        weight: Weight lambda.
        level_weight: Weight nu of the squared levels.
        levels: The levels at the start, in standard deviations from the mean distance.
        momentum: Momentum of the running mean and deviation.
        include_diagonal: The statistics count the zero distances of images to themselves, as released.
    """

    weight: float = 0.6
    level_weight: float = 0.01
    levels: list[float] = field(default_factory=lambda: [-3.0, 0.0, 3.0])
    momentum: float = 0.9
    include_diagonal: bool = True


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig:
    """Optimizer and schedule; everything is a function of the step.

    Args:
        epochs: Epochs; the ramp of psd and obdsd counts in them.
        steps_per_epoch: Steps of an epoch, 0 = as many as whole batches fit into the training images.
        batch_size: Images per step over all ranks; losses, diffusion and distances see all of them together.
        optimizer: 'adam' (as published: weight decay as L2 on every weight) or 'adamw' (decoupled, not on norms and biases).
        lr: Learning rate of the backbone.
        head_lr: Learning rate of the linear layer; unset = lr.
        loss_lr: Learning rate of the ranking loss's own parameters (proxies, margins); unset = that of the loss's paper.
        level_lr: Learning rate of MDR's levels; unset = lr.
        weight_decay: Weight decay of the network; the losses' own parameters have none.
        milestones: Epochs at whose start all learning rates are multiplied by gamma.
        gamma: See milestones.
        clip_grad: Largest norm of all gradients together, 0 = off.
        precision: 'no' = float32, 'bf16' = bfloat16 autocast of the network (the losses stay float32).
        max_steps: Stop after this many steps (schedules stay those of all epochs), 0 = run all epochs.
    """

    epochs: int = 150
    steps_per_epoch: int = 0
    batch_size: int = 112
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-5
    head_lr: float | None = None
    loss_lr: float | None = None
    level_lr: float | None = None
    weight_decay: float = 4e-4
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.3
    clip_grad: float = 0.0
    precision: Literal["no", "bf16"] = "no"
    max_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class FinetuneWatchConfig:
    """What is measured and written while it trains.

    Args:
        log_every: Steps between lines of metrics.jsonl (the only host synchronization).
        checkpoint_every: Steps between checkpoints; 0 = at the end of each epoch.
        keep_checkpoints: Checkpoints kept on disk, at least 2.
        eval_every: Epochs between measurements; the start and the end are always measured.
        recall_at: The K of Recall@K.
        batch_size: Images per forward pass and rank when measuring.
    """

    log_every: int = 10
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    eval_every: int = 10
    recall_at: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class FinetuneClusterConfig:
    """How ranks work together.

    Args:
        lost_after: Seconds without a sign of life after which a rank counts as lost and all others stop.
    """

    lost_after: float = 60.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a backbone for retrieval with labels, and measure it on classes it has not seen.

    Args:
        init: Where the backbone comes from: a run folder, a checkpoint folder, timm:NAME, a weights file, or 'random'.
        loss: Ranking loss: triplet, triplet_semihard, contrastive, margin, multi_similarity, proxy_anchor, proxy_nca,
            arcface, smooth_ap.
        loss_args: Settings of that loss beside its published ones, e.g. {beta: 50}.
        reg: Regularizer beside it.
        out: Run directory: config, metrics, measurements, checkpoints.
        seed: Every random draw is a function of it and of the step.
        resume: 'auto' goes on from the last checkpoint in out, 'never' refuses a folder that already has one.
    """

    recipes: ClassVar[tuple[str, ...]] = ("dml",)  # folders of configs/

    init: str = ""
    loss: str = "multi_similarity"
    loss_args: dict[str, TimmArg] = field(default_factory=dict)
    reg: Reg = "none"
    out: str = "runs/finetune"
    seed: int = 0
    resume: Literal["auto", "never"] = "never"
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    model: FinetuneModelConfig = field(default_factory=FinetuneModelConfig)
    sd: SelfDistillConfig = field(default_factory=SelfDistillConfig)
    mdr: MdrConfig = field(default_factory=MdrConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    watch: FinetuneWatchConfig = field(default_factory=FinetuneWatchConfig)
    cluster: FinetuneClusterConfig = field(default_factory=FinetuneClusterConfig)

    @property
    def distills(self) -> bool:
        """Whether the network of the previous epoch teaches."""
        return "psd" in self.reg or "obdsd" in self.reg

    @property
    def uses_mdr(self) -> bool:
        """Whether distances are drawn to levels."""
        return "mdr" in self.reg

    @property
    def distances(self) -> tuple[str, ...]:
        """The distances that retrieval is measured in: MDR trains Euclidean ones, cosine is reported beside them."""
        return ("euclidean", "cosine") if self.uses_mdr else ("cosine",)
