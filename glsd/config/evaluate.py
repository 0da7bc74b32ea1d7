"""The typed configuration of measuring a frozen backbone."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig:
    """The labeled images that measure a backbone.

    Args:
        train_shards: Labeled shards that vote (k-NN) or train the classifier (linear): brace pattern, glob, or a list.
        val_shards: Labeled shards that are classified.
        test_shards: Labeled shards, each image searched among all others (retrieval, leave-one-out).
        query_shards: Instead of test_shards: the images that are searched for ...
        gallery_shards: ... among these.
        resize: Short side in pixels before the center crop; unset = 256/224 of the crop.
        crop: Side of the center crop in pixels; unset = the run's data.global_size, 224 for other models.
        batch_size: Images per forward pass and rank.
        num_workers: Loader processes per rank.
        limit: At most this many images of each set, evenly spread; 0 = all.
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
        model: Run folder, checkpoint folder, 'timm:NAME' (timm's pretrained weights) or a weights file.
        backbone: timm name of the network that a weights file belongs to; a run folder knows its own.
        features: Which network of a run: its teacher, its student, or the initial one before the first step; unset = the teacher
            of pretraining, the student of metric learning.
        pool: Class token or mean of the patch tokens; unset = as the run was trained, class token otherwise.
        protocol: 'knn' (weighted nearest neighbors), 'linear' (classifier trained on the cached features) or 'retrieval'
            (Recall@K, MAP@R, R-precision, NMI).
        k: Numbers of neighbors that vote.
        temperature: A neighbor votes with weight exp(cosine / temperature).
        backend: Neighbor search by faiss or torch, the same numbers; auto = faiss on the CPU when it is installed.
        recall_at: The K of Recall@K.
        distance: How embeddings are compared (retrieval); unset = as the run was trained, cosine otherwise.
        nmi_seeds: Runs of k-means behind the NMI (retrieval); 0 = none, it is slow for very many classes.
        linear_epochs: Epochs of the linear classifier.
        linear_lr: Learning rates at batch size 256; with several, the best on a held-out tenth of the training set.
        linear_batch_size: Images per step of the linear classifier.
        precision: Forward passes in float32 ('no') or bfloat16 autocast ('bf16').
        seed: Seed of the linear classifier, at least 0.
        out: Folder of evals.json; unset = the run folder, or only printed when the model is not a run.
    """

    model: str = ""
    backbone: str = ""
    features: Literal["teacher", "student", "initial"] | None = None
    pool: Literal["cls", "mean", "mean+max"] | None = None
    protocol: Literal["knn", "linear", "retrieval"] = "knn"
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07
    backend: Literal["auto", "faiss", "torch"] = "auto"
    recall_at: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    distance: Literal["cosine", "euclidean"] | None = None
    nmi_seeds: int = 3
    linear_epochs: int = 100
    linear_lr: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0, 10.0])
    linear_batch_size: int = 256
    precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    out: str = ""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
