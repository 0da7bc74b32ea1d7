"""Reports of a pretraining run: its description, health warnings, the first batch as a picture, the k-NN probe, the samples."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from glsd.batches import NUM_GLOBAL, CropBatch
from glsd.cluster import dist, fsdp
from glsd.config.parse import differences
from glsd.config.pretrain import PretrainConfig
from glsd.data.transform import choose_sizes
from glsd.errors import UserError, config_keys, with_config_keys
from glsd.evaluate.sets import check_known_classes, embed_set
from glsd.geometry import geometric_match, patch_grid
from glsd.losses.distill import similarity_match
from glsd.metrics.effective_rank import rankme
from glsd.metrics.knn import knn_accuracy
from glsd.models.backbone import Backbone
from glsd.models.blocks import run_uncompiled
from glsd.pretrain.networks import State
from glsd.pretrain.plan import Plan
from glsd.pretrain.step import augment
from glsd.runtime import health
from glsd.runtime.guard import StepReport
from glsd.runtime.loop import Training
from glsd.runtime.run import append_rows
from glsd.shards.store import (
    ShardSet,
    check_disjoint,
    number_together,
    open_shards,
)

NUM_DRAWN = 4  # images in a picture
# What the health rules call a setting -> its key.
HEALTH_KEYS = {
    key.partition(".")[2]: key
    for key in (
        "data.global_scale",
        "data.local_scale",
        "data.num_workers",
        "head.batch_norm",
        "head.num_prototypes",
        "loss.center_momentum",
        "loss.centering",
        "loss.global_weight",
        "loss.hinge",
        "loss.hinge_factor",
        "loss.local_weight",
        "loss.teacher_temp",
        "loss.warmup_teacher_temp",
        "optim.batch_size",
        "optim.clip_grad",
        "optim.lr",
        "optim.precision",
        "optim.teacher_momentum",
        "optim.warmup_epochs",
    )
}


def describe(cfg: PretrainConfig, plan: Plan, state: State) -> str:
    """Return what a user wants to see before a long run: how this one differs, how large and how long it is."""
    backbone = state.student.backbone
    millions = {
        name: sum(p.numel() for p in net.parameters()) / 1e6
        for name, net in (("backbone", backbone), ("all", state.student))
    }
    lines = [
        f"configuration beside the defaults: {' '.join(f'{key}={value}' for key, value in differences(cfg).items()) or 'none'}",
        f"{cfg.model.backbone}: {millions['backbone']:.2f} M parameters, {millions['all']:.2f} M with heads",
        f"{plan.num_samples} images, {plan.steps_per_epoch} steps an epoch, {plan.last_step} of {plan.total_steps} steps, "
        f"{dist.world_size()} ranks x {len(plan.micro_batches)} x {plan.micro_batches[0]} images",
    ]
    if backbone.load_report is not None:
        lines.append(f"weights from {cfg.model.init}: {backbone.load_report}")
    return "\n".join(lines)


def advise(t: Training[PretrainConfig, Plan, State], values: dict[str, Any]) -> None:
    """Warn once about what looks unhealthy in values of a flush or a probe, and name the key to change."""
    warmup = max(t.cfg.optim.warmup_epochs, t.cfg.optim.freeze_prototypes_epochs)
    findings = health.check(
        values,
        num_prototypes=t.cfg.head.num_prototypes,
        embed_dim=t.state.student.backbone.embed_dim,
        early=t.state.step < warmup * t.plan.steps_per_epoch,
    )
    for finding in findings:
        if finding.kind not in t.state.advised:
            t.state.advised.add(finding.kind)
            t.meters.say(f"warning at step {t.state.step}: {with_config_keys(finding.line, HEALTH_KEYS)}")


@torch.no_grad()
def draw_first_batch(t: Training[PretrainConfig, Plan, State], batch: CropBatch) -> None:
    """Write first_batch.png (a global crop against the other one) and first_batch_local.png, with the matches in use.

    Without a local loss the geometric matches are drawn all the same: they show that boxes and crops agree. Only rank 0
    draws, so nothing else here is a collective call: backbones, no heads (whose batch norm may be synchronized).
    """
    student, teacher = (fsdp.whole_copy(net.backbone) for net in (t.state.student, t.state.teacher))
    if not dist.is_main():
        return
    from glsd.show.matches import draw_matches  # half a second of import, for one process and once

    crops = [part for part in augment(batch.to(t.accelerator.device)) if len(part)]
    match = batch.match
    if t.cfg.matching == "similarity":

        def features(backbone: Backbone, part: Tensor) -> Tensor:
            return backbone(part.flatten(0, 1))[1].unflatten(0, part.shape[:2])

        with run_uncompiled():
            match = similarity_match([features(student, part) for part in crops], features(teacher, crops[0]))
    elif match is None:
        boxes = [batch.global_boxes, batch.local_boxes]
        sizes = [batch.global_crops.shape[-1], batch.local_crops.shape[-1]]
        hinge = {"hinge": t.cfg.loss.hinge, "hinge_factor": t.cfg.loss.hinge_factor}
        match = geometric_match(boxes, sizes, stride=student.stride, **hinge)  # type: ignore[arg-type]
    # Views 1 (the second global crop) and 2 (the first local one) against teacher view 0.
    patches = [math.prod(patch_grid(part.shape[-1], student.stride)) for part in crops]
    drawn = {"first_batch.png": (batch.global_crops[1], slice(patches[0], 2 * patches[0]))}
    if len(batch.local_crops):
        first = NUM_GLOBAL * patches[0]
        drawn["first_batch_local.png"] = (batch.local_crops[0], slice(first, first + patches[1]))
    for name, (student_crops, rows) in drawn.items():
        draw_matches(
            t.run.folder / name,
            student_crops[:NUM_DRAWN],
            batch.global_crops[0, :NUM_DRAWN],
            index=match.index[:NUM_DRAWN, rows, 0],
            weight=match.weight[:NUM_DRAWN, rows, 0],
            stride=student.stride,
        )


def open_probe(cfg: PretrainConfig) -> tuple[ShardSet, ShardSet] | None:
    """Return the labeled sets of the k-NN probe, None if there is none; UserError now rather than hours into the run."""
    w = cfg.watch
    if not w.probe_every:
        return None
    sets = {}
    for key in ("probe_train_shards", "probe_val_shards"):
        patterns = getattr(w, key)
        if not patterns:
            raise UserError(
                f"watch.{key} is not set: name labeled shards, or turn the probe off with --watch.probe_every 0"
            )
        sets[key] = open_shards(patterns)
        with config_keys({"shards": f"watch.{key}"}):
            sets[key].check_labeled()
    train, val = sets["probe_train_shards"], sets["probe_val_shards"]
    names = ("watch.probe_train_shards", "watch.probe_val_shards")
    check_disjoint(train, val, names=names)
    number_together(dict(zip(names, (train, val), strict=True)))
    check_known_classes(train, val, names=names, limit=w.probe_images)
    if w.probe_k > min(len(train), w.probe_images):
        raise UserError(
            f"watch.probe_k {w.probe_k} is more than the {min(len(train), w.probe_images)} images that vote"
        )
    return train, val


def probe(t: Training[PretrainConfig, Plan, State], sets: tuple[ShardSet, ShardSet]) -> dict[str, Any]:
    """Classify the val images by their nearest train images in the teacher's features; every rank embeds its share."""
    teacher = fsdp.whole_copy(t.state.teacher.backbone)

    def features(images: Tensor) -> Tensor:
        with run_uncompiled():
            return teacher(images)[0]

    train, val = (
        embed_set(
            shards,
            features,
            name=name,
            sizes=choose_sizes(t.cfg.data.global_size),
            batch_size=64,
            num_workers=t.cfg.data.num_workers,
            device=t.accelerator.device,
            precision=t.cfg.optim.precision,
            limit=t.cfg.watch.probe_images,
        )
        for name, shards in zip(("probe_train", "probe_val"), sets, strict=True)
    )
    k, step = t.cfg.watch.probe_k, t.state.step
    scores: dict[str, Any] = {}
    if dist.is_main():
        found = knn_accuracy(train.features, train.labels, val.features, val.labels, k_list=(k,))
        scores = {f"knn{k}_top1": found[k]["top1"], "rankme": rankme(val.features)}
        t.meters.write({"step": step, "probe": scores})
        t.meters.say(
            f"probe at step {step}: k-NN (k={k}) {found[k]['top1']:.2%}, RankMe {scores['rankme']:.1f}"
        )
    return dist.broadcast_object(scores)


def log_samples(t: Training[PretrainConfig, Plan, State], reports: list[StepReport]) -> None:
    """Write down epoch and key of every sample of the last steps, step by step, in the order of the epoch."""
    first = t.state.step - len(reports)
    ranks_keys = dist.gather_objects([report.keys for report in reports])
    rows = []
    for number, step_keys in enumerate(zip(*ranks_keys, strict=True)):
        epoch = (first + number) // t.plan.steps_per_epoch
        # Ranks take the positions of a batch in turns.
        keys = [key for turn in itertools.zip_longest(*step_keys) for key in turn if key is not None]
        rows.append({"step": first + number + 1, "samples": [(epoch, key) for key in keys]})
    dist.together(lambda: append_rows(t.run.samples, rows))
