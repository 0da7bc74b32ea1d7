"""Looking over a run's shoulder: what it is, whether it is healthy, its first batch drawn, the k-NN probe of its teacher."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from glsd.batches import CropBatch
from glsd.cluster import dist
from glsd.config.parse import differences
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError, config_keys
from glsd.evaluate.sets import choose_sizes, embed_set
from glsd.metrics.knn import knn_accuracy
from glsd.models.blocks import run_uncompiled
from glsd.pretrain.networks import State
from glsd.pretrain.objective import NUM_GLOBAL, Pixels
from glsd.pretrain.plan import Plan
from glsd.runtime import health
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run
from glsd.shards.store import (
    ShardSet,
    check_disjoint,
    check_same_classes,
    open_shards,
)

NUM_DRAWN = 4  # images in a picture


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


def advise(cfg: PretrainConfig, plan: Plan, state: State, values: dict[str, Any], meters: Meters) -> None:
    """Say once what looks unhealthy in values of a flush or a probe, and which knob to turn."""
    findings = health.check(
        values,
        num_prototypes=cfg.head.num_prototypes,
        embed_dim=state.student.backbone.embed_dim,
        early=state.step
        < max(cfg.optim.warmup_epochs, cfg.optim.freeze_prototypes_epochs) * plan.steps_per_epoch,
    )
    for finding in findings:
        if finding.kind not in state.advised:
            state.advised.add(finding.kind)
            meters.say(f"warning at step {state.step}: {finding.line}")


@torch.no_grad()
def draw_first_batch(run: Run, state: State, pixels: Pixels, batch: CropBatch) -> None:
    """Write first_batch.png (a global crop against the other one) and first_batch_local.png, with the matches in use.

    Without a local loss the geometric matches are drawn all the same: they show that boxes and crops agree. Only rank 0
    works here, so nothing may be a collective: backbones, no heads (whose batch norm may be synchronized).
    """
    student, teacher = state.backbone("student"), state.backbone("teacher")
    if not dist.is_main():
        return
    from glsd.show.matches import draw_matches

    b = len(batch.keys)
    with run_uncompiled():
        features = [
            student(crops)[1] if len(crops) else None for crops in (pixels.global_crops, pixels.local_crops)
        ]
        teacher_features = teacher(pixels.global_crops)[1]
    matches = state.losses.match(pixels, features, teacher_features)
    n = min(b, NUM_DRAWN)
    drawn = {"first_batch.png": (1, batch.global_crops[b : b + n])}
    if len(batch.local_crops):
        drawn["first_batch_local.png"] = (NUM_GLOBAL, batch.local_crops[:n])
    for name, (view, crops) in drawn.items():
        match = matches[0, view][0]
        draw_matches(
            run.folder / name,
            crops,
            batch.global_crops[:n],
            index=match.index[:n],
            weight=match.weight[:n],
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
    check_disjoint(train, val, names=("watch.probe_train_shards", "watch.probe_val_shards"))
    check_same_classes(train, val)
    if w.probe_k > min(len(train), w.probe_images):
        raise UserError(
            f"watch.probe_k {w.probe_k} is more than the {min(len(train), w.probe_images)} images that vote"
        )
    return train, val


def probe(
    cfg: PretrainConfig,
    sets: tuple[ShardSet, ShardSet],
    meters: Meters,
    state: State,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Classify the val images by their nearest train images in the teacher's features; every rank embeds its share."""

    teacher = state.backbone("teacher")

    def features(images: Tensor) -> Tensor:
        with run_uncompiled():
            return teacher(images)[0]

    train, val = (
        embed_set(
            shards,
            features,
            name=name,
            sizes=choose_sizes(cfg.data.global_size),
            batch_size=64,
            num_workers=cfg.data.num_workers,
            device=accelerator.device,
            precision=cfg.optim.precision,
            limit=cfg.watch.probe_images,
        )
        for name, shards in zip(("probe_train", "probe_val"), sets, strict=True)
    )
    k = cfg.watch.probe_k
    scores: dict[str, Any] = {}
    if dist.is_main():
        found = knn_accuracy(train.features, train.labels, val.features, val.labels, k_list=(k,))
        scores = {f"knn{k}_top1": found[k]["top1"], "rankme": health.rankme(val.features)}
        meters.write({"step": state.step, "probe": scores})
        meters.say(
            f"probe at step {state.step}: k-NN (k={k}) {found[k]['top1']:.2%}, RankMe {scores['rankme']:.1f}"
        )
    return dist.broadcast_object(scores)
