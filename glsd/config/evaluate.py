"""The typed configuration of the evaluation of a frozen backbone."""

from dataclasses import dataclass, field
from typing import Literal

from glsd.config.values import PathText


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig:
    """The labeled images that measure a backbone.

    Args:
        train_shards: Labeled shards that vote (knn) or train the classifier (linear): brace pattern, glob, or a list.
        val_shards: Labeled shards that are classified.
        test_shards: Labeled shards, each image searched among all others (retrieval, leave-one-out).
        query_shards: Labeled shards whose images are searched among those of gallery_shards, instead of test_shards.
        gallery_shards: Labeled shards that the queries are searched among.
        resize: Short side in pixels before the center crop; unset = 256/224 of the crop. Set it equal to crop for images whose
            border matters.
        crop: Side of the center crop in pixels; unset = the run's crop size, 224 for other models.
        batch_size: Images per forward pass and rank. Lower it if a rank runs out of memory.
        num_workers: Loader processes per rank. The result does not depend on it.
        limit: Most images of each set, evenly spread, for a quick look; 0 = all.
    """

    train_shards: list[str] | str = ""
    val_shards: list[str] | str = ""
    test_shards: list[str] | str = ""
    query_shards: list[str] | str = ""
    gallery_shards: list[str] | str = ""
    resize: int | None = None
    crop: int | None = None
    batch_size: int = 64
    num_workers: int = 2
    limit: int = 0


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a frozen backbone on labeled images.

    Args:
        model: Run folder, checkpoint folder, 'timm:NAME' (timm's pretrained weights), a weights file, or 'pixels': the image at
            16 x 16 pixels, which every network should beat ('pixels:SIDE' for another size).
        backbone: timm name of the network, for a weights file only. A run folder knows its own.
        features: Network of a run: 'teacher', 'student', or 'initial' (before the first step); unset = the teacher of
            pretraining, the student of metric learning.
        which: Checkpoint of a run: the 'last' one, or the 'best' one by the run's own probes.
        pool: Feature: 'cls' (class token), 'mean' of the patch tokens, or 'mean+max'; unset = as the run was trained, class token
            otherwise. Try 'mean' for networks without a trained class token.
        protocol: 'knn' (weighted nearest neighbors), 'linear' (classifier trained on the cached features) or 'retrieval'
            (Recall@K, MAP@R, R-precision, NMI).
        k: Numbers of neighbors that vote.
        temperature: A neighbor votes with weight exp(cosine / temperature). Raise it for more even votes; 0.07 is published.
        recall_at: The K of Recall@K. Take those of the benchmark, e.g. [1, 10, 100, 1000].
        distance: Compare embeddings by 'cosine' or 'euclidean' distance (retrieval); unset = as the run was trained, cosine
            otherwise.
        nmi_seeds: Runs of k-means behind the NMI (retrieval). Set 0 to skip it, which saves much time with many classes.
        linear_epochs: Epochs of the linear classifier. Raise it for few images.
        linear_lr: Learning rates at batch size 256. Of several, the best on a held-out tenth of the training set is taken.
        linear_batch_size: Images per step of the linear classifier. Lower it for few images, to take more steps.
        precision: Forward passes in float32 ('no') or bfloat16 autocast ('bf16', faster on GPUs); float32 on a CPU without
            bfloat16 instructions.
        seed: Seed of the linear classifier, at least 0.
        out: Folder of evals.json; unset = the run folder, or only printed when the model is not a run.
    """

    model: PathText = ""
    backbone: str = ""
    features: Literal["teacher", "student", "initial"] | None = None
    which: Literal["last", "best"] = "last"
    pool: Literal["cls", "mean", "mean+max"] | None = None
    protocol: Literal["knn", "linear", "retrieval"] = "knn"
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07
    recall_at: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    distance: Literal["cosine", "euclidean"] | None = None
    nmi_seeds: int = 3
    linear_epochs: int = 100
    linear_lr: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0, 10.0])
    linear_batch_size: int = 256
    precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    out: PathText = ""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
