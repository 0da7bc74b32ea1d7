"""The typed configuration of fine-tuning for retrieval."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from glsd.config.pretrain import TimmArg
from glsd.config.values import PathText

Pool = Literal["cls", "mean", "mean+max"]
Reg = Literal["none", "psd", "obdsd", "mdr", "obdsd+mdr"]


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig:
    """Labeled images: some classes to learn from, others to be retrieved.

    Args:
        train_shards: Labeled shards to learn from: brace pattern, glob, or a list.
        test_shards: Labeled shards of unseen classes. Each image is searched among all others (leave-one-out).
        query_shards: Labeled shards whose images are searched among those of gallery_shards, instead of test_shards.
        gallery_shards: Labeled shards that the queries are searched among.
        val_share: Share of the training classes (the last ones) that is held out, to choose an epoch by; 0 = none.
        images_per_class: Images per class in a batch (M). A batch holds batch_size / M classes (P).
        drop_lone_classes: Leave out training classes with a single image. By default they stop the run, as they give no pairs.
        crop: Side of the crops in pixels; unset = that of the run given with --init, 224 otherwise.
        resize: Short side before the center crop of an evaluation; unset = 256/224 of the crop.
        scale: Smallest and largest share of the image's area that a training crop covers.
        flip_prob: Share of training crops mirrored left to right.
        num_workers: Loader processes per rank. The result does not depend on it.
        max_bad_fraction: Stop when more than this share of the samples so far was unreadable. Raise it for data that you
            know to be damaged. It is counted over at least one epoch.
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
        backbone: timm name of the network, for --init random or a weights file. A run folder and timm:NAME know their own.
        timm_args: Extra arguments of timm's create_model, e.g. {patch_size: 4}, for weights of an unusual architecture.
        pool: What is embedded: 'cls' (class token), 'mean' of the patches (CNN: of the last map), or 'mean+max'; unset = as
            the run given with --init, class token where there is one otherwise.
        embed_dim: Width of the embedding, a linear layer on the pooled feature; 0 = the feature itself.
        drop_path: Stochastic depth of the last block.
        freeze_batch_norm: Keep the statistics of batch normalization (CNNs), while its scales learn. Turn it off for large
            batches of images unlike those of the pretraining.
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
        weight: Weight lambda. It is multiplied by epoch / epochs and the squared temperature.
        tau: Temperature of both similarity distributions. Lower it to distill the nearest neighbors only (with mask_self).
        w: Share of each diffusion step that walks on, 0 to 0.999 (obdsd; 0 = psd).
        tau_d: Temperature of the walk between images (form softmax).
        form: 'softmax' diffuses probabilities over a softmax walk, as released. 'symmetric' diffuses similarities over
            symmetrically normalized affinities, as in the paper.
        mask_self: Leave each image's similarity with itself out of both distributions. Needed for tau below 0.5.
    """

    weight: float = 75.0
    tau: float = 1.0
    w: float = 0.99
    tau_d: float = 1.0
    form: Literal["softmax", "symmetric"] = "softmax"
    mask_self: bool = False


@dataclass(frozen=True, kw_only=True)
class MdrConfig:
    """The multi-level distance regularizer: it pulls standardized distances to the nearest of a few learned levels.

    Args:
        weight: Weight lambda.
        level_weight: Weight nu of the squared levels. Raise it if the levels drift apart.
        levels: Initial levels, in standard deviations from the mean distance. Change their number to try other groupings.
        momentum: Momentum of the running mean and deviation. Lower it in runs of few steps.
        include_diagonal: Count the zero distances of images to themselves, as released. Turn it off to count distinct pairs only.
    """

    weight: float = 0.6
    level_weight: float = 0.01
    levels: list[float] = field(default_factory=lambda: [-3.0, 0.0, 3.0])
    momentum: float = 0.9
    include_diagonal: bool = True


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig:
    """Optimizer and schedule. Everything is a function of the step.

    Args:
        epochs: Passes over the data, or multiples of steps_per_epoch. The ramp of psd and obdsd counts in them.
        steps_per_epoch: Steps of an epoch; 0 = as many as whole batches fit into the training images.
        batch_size: Images per step of all ranks together. Losses, diffusion and distances see all of them.
        optimizer: 'adam' (as published: weight decay as L2 on every weight) or 'adamw' (decoupled, not on norms and biases).
        lr: Learning rate of the backbone.
        head_lr: Learning rate of the linear layer; unset = lr.
        loss_lr: Learning rate of the ranking loss's own parameters (proxies, margins); unset = that of the loss's paper.
            Raise it if proxies do not follow the features.
        level_lr: Learning rate of MDR's levels; unset = lr. Raise it where lr is so small that levels stay where they began.
        weight_decay: Weight decay of the network. The losses' own parameters have none.
        milestones: Epochs at whose start all learning rates are multiplied by gamma.
        gamma: Factor of the learning rates at each milestone.
        clip_grad: Largest norm of all gradients together; 0 = off.
        precision: 'no' = float32, 'bf16' = bfloat16 autocast of the network (the losses stay float32); float32 on a CPU
            without bfloat16 instructions.
        max_steps: Stop after this many steps with the schedules of all epochs, to try a run out; 0 = run all epochs.
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
    """What is measured and written during training.

    Args:
        log_every: Steps between lines of metrics.jsonl, where host and device synchronize.
        trackers: Where metrics are shown besides metrics.jsonl: tensorboard,wandb,mlflow, or '' = nowhere.
        checkpoint_every: Steps between checkpoints, for epochs too long to lose; 0 = at the end of each epoch.
        keep_checkpoints: Checkpoints kept on disk, at least 2. Raise it to compare earlier epochs.
        eval_every: Epochs between evaluations. The start and the end are always evaluated.
        recall_at: The K of Recall@K.
        batch_size: Images per forward pass and rank of an evaluation. Lower it if evaluations run out of memory.
    """

    log_every: int = 10
    trackers: list[str] | str = "tensorboard"
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    eval_every: int = 10
    recall_at: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class FinetuneClusterConfig:
    """How ranks work together.

    Args:
        lost_after: Seconds without a heartbeat after which a rank counts as lost and all others stop.
    """

    lost_after: float = 60.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a backbone for retrieval with labels, and measure it on classes that it has not seen.

    Args:
        init: Where the backbone comes from: a run folder, a checkpoint folder, timm:NAME, a weights file, or 'random'.
        loss: Ranking loss: triplet, triplet_semihard, contrastive, margin, multi_similarity, proxy_anchor, proxy_nca,
            arcface, smooth_ap.
        loss_args: Settings of that loss that differ from the published ones, e.g. {beta: 50}.
        reg: Regularizer beside the loss: none, psd, obdsd, mdr, obdsd+mdr.
        out: Run directory: config, metrics, evaluations, checkpoints.
        seed: Seed of every random draw. A draw also depends on the step.
        resume: 'auto' goes on from the last checkpoint in the run directory. 'never' refuses a directory that has one.
    """

    recipes: ClassVar[tuple[str, ...]] = ("dml",)  # folders of configs/

    init: PathText = ""
    loss: str = "multi_similarity"
    loss_args: dict[str, TimmArg] = field(default_factory=dict)
    reg: Reg = "none"
    out: PathText = "runs/finetune"
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
        """Tell whether the network of the previous epoch teaches."""
        return "psd" in self.reg or "obdsd" in self.reg

    @property
    def uses_mdr(self) -> bool:
        """Tell whether the multi-level distance regularizer is on."""
        return "mdr" in self.reg

    @property
    def distances(self) -> tuple[str, ...]:
        """The distances that retrieval is measured in: MDR trains Euclidean ones, cosine is reported beside them."""
        return ("euclidean", "cosine") if self.uses_mdr else ("cosine",)
