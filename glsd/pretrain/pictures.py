"""Pictures of a pretraining run: the crops of its first batch, and at each probe what the teacher sees."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor

from glsd.batches import NUM_GLOBAL, CropBatch
from glsd.cluster import dist, fsdp
from glsd.config.pretrain import PretrainConfig
from glsd.data.decode import decode
from glsd.data.photometric import normalize
from glsd.data.transform import center_square, choose_sizes
from glsd.evaluate.sets import Embedded
from glsd.geometry import geometric_match, patch_grid
from glsd.losses.distill import similarity_match
from glsd.metrics.knn import nearest_neighbors, nearest_others
from glsd.models.backbone import Backbone
from glsd.models.blocks import run_uncompiled
from glsd.models.tokens import attention_of
from glsd.pretrain.networks import State
from glsd.pretrain.plan import Plan
from glsd.pretrain.probe import Measured, ProbeSets
from glsd.pretrain.step import augment
from glsd.runtime.loop import Training
from glsd.shards.store import CLASSES_FILE, ShardSet, read_classes

NUM_DRAWN = 4  # images of the first batch
FEW, MANY = 6, 400  # images in pictures of single images, and on the map
NUM_NEIGHBORS = 6
THUMBNAIL = 32  # pixels


@torch.no_grad()
def draw_first_batch(t: Training[PretrainConfig, Plan, State], batch: CropBatch, shards: ShardSet) -> None:
    """Write first_batch.png (a global crop against the other one) and first_batch_local.png, with the matches in use.

    The source image stands beside, with the places of both crops. Without a local loss the geometric matches are drawn all the
    same: they show that boxes and crops agree. Only rank 0 draws, so nothing else here is a collective call: backbones, no
    heads (whose batch norm may be synchronized).
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
    drawn = {
        "first_batch.png": (batch.global_crops[1], batch.global_boxes[1], slice(patches[0], 2 * patches[0]))
    }
    if len(batch.local_crops):
        first = NUM_GLOBAL * patches[0]
        rows = slice(first, first + patches[1])
        drawn["first_batch_local.png"] = (batch.local_crops[0], batch.local_boxes[0], rows)
    sources = [decode(shards.read(int(index))) for index in batch.indices[:NUM_DRAWN]]
    for name, (student_crops, student_boxes, rows) in drawn.items():
        path = t.run.folder / name
        draw_matches(
            path,
            student_crops[:NUM_DRAWN],
            batch.global_crops[0, :NUM_DRAWN],
            index=match.index[:NUM_DRAWN, rows, 0],
            weight=match.weight[:NUM_DRAWN, rows, 0],
            stride=student.stride,
            sources=sources,
            boxes=torch.stack([student_boxes[:NUM_DRAWN], batch.global_boxes[0, :NUM_DRAWN]]),
        )
        t.meters.picture(path.stem, path)


@torch.no_grad()
def draw_probe(
    t: Training[PretrainConfig, Plan, State], sets: ProbeSets, measured: Measured, *, last: bool
) -> None:
    """Write into pictures/ what the teacher sees: attention, patches as colors, neighbors; after the last step a map, too.

    They replace those of the probe before; TensorBoard keeps all of them. Only rank 0 draws.
    """
    teacher = fsdp.whole_copy(t.state.teacher.backbone)
    if not dist.is_main():
        return
    name = f"teacher_{teacher.pool}"
    val, train = measured.val[name], measured.train.get(name)
    sizes = choose_sizes(t.cfg.data.global_size)

    def squares(shards: ShardSet, indices: Int64[Tensor, " n"]) -> UInt8[Tensor, "n 3 s s"]:
        read = (decode(shards.read(int(index))) for index in indices)
        return torch.stack([center_square(image, resize_to=sizes.resize, crop=sizes.crop) for image in read])

    rows = _evenly(len(val.indices), FEW)
    few = squares(sets.val.shards, val.indices[rows])
    names = [sets.val.shards.key(int(index)) for index in val.indices[rows]]
    drawn: dict[str, Callable[[Path], None]] = {
        **_seen(teacher, few, names, t.accelerator.device),
        "neighbors": lambda path: _draw_neighbors(path, few, rows, sets, val, train, squares),
    }
    if last and len(val.indices) >= 5:
        many = _evenly(len(val.indices), MANY)
        shown = F.interpolate(squares(sets.val.shards, val.indices[many]).float(), THUMBNAIL, mode="area")
        thumbnails = shown.round().byte()
        drawn["map"] = lambda path: _draw_map(path, val.features[many], thumbnails, val.labels[many])
        t.meters.projector(val.features[many], thumbnails, _titles(sets, val, many))
    for kind, draw in drawn.items():
        path = t.run.pictures / f"{kind}.png"
        draw(path)
        t.meters.picture(kind, path)


def _seen(
    teacher: Backbone, few: UInt8[Tensor, "b 3 s s"], names: list[str], device: torch.device
) -> dict[str, Callable[[Path], None]]:
    from glsd.show.attention import draw_attention
    from glsd.show.pca import draw_pca, patch_colors

    images = normalize(few).to(device)
    grid = patch_grid(images.shape[-1], teacher.stride)
    with run_uncompiled():
        patches = teacher(images)[1].float().unflatten(1, grid)
    drawn: dict[str, Callable[[Path], None]] = {
        "pca": lambda path: draw_pca(path, few, patch_colors(patches), names)
    }
    if getattr(teacher.net, "cls_token", None) is not None:
        with run_uncompiled():
            attention = attention_of(teacher.net, lambda: teacher(images)).unflatten(2, grid)
        drawn["attention"] = lambda path: draw_attention(path, few, attention, names)
    return drawn


def _draw_neighbors(
    path: Path,
    few: UInt8[Tensor, "q 3 s s"],
    rows: Int64[Tensor, " q"],
    sets: ProbeSets,
    val: Embedded,
    train: Embedded | None,
    squares: Callable[[ShardSet, Tensor], Tensor],
) -> None:
    from glsd.show.neighbors import draw_found, draw_neighbors

    among, shards = (
        (val, sets.val.shards) if train is None or sets.train is None else (train, sets.train.shards)
    )
    k = min(NUM_NEIGHBORS, len(among.indices) - (train is None))
    if k < 1:
        return
    cosines, found = (
        nearest_others(val.features, rows, k=k)
        if train is None
        else nearest_neighbors(val.features[rows], among.features, k=k)
    )
    pictures = [squares(shards, among.indices[of_query]) for of_query in found]
    if train is None:
        titles = [[f"{cosine:.3f}" for cosine in of_query] for of_query in cosines.tolist()]
        draw_found(
            path, list(few), [list(p) for p in pictures], query_titles=["query"] * len(few), titles=titles
        )
        return
    draw_neighbors(
        path,
        few,
        torch.stack(pictures),
        query_labels=val.labels[rows],
        neighbor_labels=among.labels[found],
        cosines=cosines,
        class_names=_class_names(shards),
    )


def _draw_map(
    path: Path, features: Tensor, thumbnails: UInt8[Tensor, "n 3 h w"], labels: Int64[Tensor, " n"]
) -> None:
    from glsd.show.map import draw_map, places

    at, method = places(features.float().numpy())
    known = labels.numpy() if bool((labels >= 0).all()) else None
    draw_map(path, at, thumbnails, title=f"{len(at)} images by the teacher ({method})", labels=known)


def _titles(sets: ProbeSets, val: Embedded, rows: Int64[Tensor, " n"]) -> list[str]:
    """Return the class of each image by its name, or its key where it has none."""
    classes = _class_names(sets.train.shards) if sets.train else []
    titles = []
    for index, label in zip(val.indices[rows].tolist(), val.labels[rows].tolist(), strict=True):
        named = 0 <= label < len(classes)
        titles.append(classes[label] if named else str(label) if label >= 0 else sets.val.shards.key(index))
    return titles


def _class_names(shards: ShardSet) -> list[str]:
    file = os.path.join(os.path.dirname(shards.paths[0]), CLASSES_FILE)
    return list(read_classes(file)) if os.path.isfile(file) else []


def _evenly(total: int, count: int) -> Int64[Tensor, " n"]:
    """Return the numbers of ``count`` of ``total`` rows, spread evenly; all if there are no more."""
    return torch.arange(min(total, count)) * total // min(total, count)
