"""Pictures of what a network makes of images: matched patches, attention, patch colors, neighbors, a map."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from glsd.batches import NUM_GLOBAL
from glsd.config.finetune import FinetuneConfig
from glsd.config.pretrain import PretrainConfig
from glsd.data.crops import CropSpec, cut, draw
from glsd.data.photometric import normalize
from glsd.errors import BrokenImage, UserError
from glsd.geometry import geometric_match, patch_grid
from glsd.inference.images import Images, from_shards
from glsd.inference.model import Model, Squares
from glsd.losses.distill import similarity_match
from glsd.metrics.knn import nearest_others
from glsd.show.attention import draw_attention
from glsd.show.map import draw_map, places
from glsd.show.matches import draw_matches
from glsd.show.neighbors import draw_found, draw_neighbors
from glsd.show.pca import draw_pca, patch_colors

BATCH = 64
THUMBNAIL = 48  # pixels
NUM_NEIGHBORS = 6


def evenly(total: int, count: int) -> list[int]:
    """Return the numbers of ``count`` of ``total`` images, spread evenly; all if there are no more."""
    return [i * total // count for i in range(count)] if count < total else list(range(total))


def training_images(model: Model) -> Images:
    """Return the images that a run was trained on. Raises UserError if they cannot be read, and for a model of no run."""
    config = model.loaded.config
    if config is None:
        raise UserError(f"{model.name} is no run with training images of its own: name the images to show")
    shards = config.data.train_shards if isinstance(config, FinetuneConfig) else config.data.shards
    try:
        return from_shards([shards] if isinstance(shards, str) else list(shards))
    except UserError as problem:
        raise UserError(f"the run's training images: {problem}; or name the images to show") from problem


@torch.no_grad()
def draw_matches_of(
    model: Model,
    images: Images,
    numbers: Sequence[int],
    path: Path,
    *,
    matching: str | None = None,
    seed: int = 0,
) -> None:
    """Write two global crops of each image, cut as the run cuts them, with lines between matched patches.

    matching: "geometric" or "similarity"; None = the run's, geometric for a run with both or none. Similar patches are found by
    the model's own features, on both sides. Raises UserError for a model that is no pretraining run's, and for an image that
    cannot be read.
    """
    config = model.loaded.config
    if not isinstance(config, PretrainConfig):
        raise UserError(
            f"matches need a run of pretraining, whose crops they show, and {model.name} is none: name the folder of a run"
        )
    if matching is None:
        matching = "similarity" if config.matching == "similarity" else "geometric"
    spec, stride = CropSpec.of(config.data), model.backbone.stride
    sources = [_pixels(images, number) for number in numbers]
    boxes, crops = [], []
    for number, source in zip(numbers, sources, strict=True):
        height, width = source.shape[1:]
        drawn = draw(spec, height=height, width=width, seed=seed, epoch=0, position=number)
        boxes.append(drawn.boxes[:NUM_GLOBAL])
        crops.append(cut(source, boxes[-1], spec.global_size))
    views, places_of = torch.stack(crops, dim=1), torch.stack(boxes, dim=1)  # (views, images, …)
    if matching == "similarity":
        flat = normalize(views.flatten(0, 1)).to(model.device)
        features = model.backbone(flat)[1].cpu().unflatten(0, views.shape[:2])
        match = similarity_match([features], features)
    else:
        rule = {"hinge": config.loss.hinge, "hinge_factor": config.loss.hinge_factor}
        match = geometric_match([places_of], [spec.global_size], stride=stride, **rule)  # type: ignore[arg-type]
    down, across = patch_grid(spec.global_size, stride)
    second = slice(down * across, 2 * down * across)  # the patches of view 1, against the teacher's view 0
    draw_matches(
        path,
        views[1],
        views[0],
        index=match.index[:, second, 0],
        weight=match.weight[:, second, 0],
        stride=stride,
        sources=sources,
        boxes=places_of.flip(0),
    )


def _pixels(images: Images, number: int) -> torch.Tensor:
    try:
        return images.pixels(number)
    except BrokenImage as problem:
        raise UserError(f"image {images.names[number]} cannot be read: {problem}") from problem


def draw_attention_of(model: Model, squares: Squares, path: Path) -> None:
    """Write where the class token of a model looks. Raises UserError for a network without one."""
    names = [Path(name).name for name in squares.names]
    draw_attention(path, squares.pixels, model.attention(normalize(squares.pixels).to(model.device)), names)


def draw_pca_of(model: Model, squares: Squares, path: Path) -> None:
    """Write the patches of the squares as colors, one principal component analysis for all."""
    names = [Path(name).name for name in squares.names]
    patches = model.patches(normalize(squares.pixels).to(model.device))
    draw_pca(path, squares.pixels, patch_colors(patches), names)


def draw_neighbors_of(model: Model, images: Images, queries: Sequence[int], path: Path) -> None:
    """Write some of the images, each with its nearest neighbors among all others. Every image is embedded.

    Where all images have labels, a frame says whether a neighbor has the label of its query. Raises UserError for fewer than
    two images, and for one that cannot be read.
    """
    k = min(NUM_NEIGHBORS, len(images.names) - 1)
    if k < 1:
        raise UserError(f"{images.title}: neighbors need two images or more")
    features = torch.from_numpy(model.embed(images, progress=True))
    rows = torch.tensor(queries)
    cosines, found = nearest_others(features, rows, k=k)
    shown = model.squares(images, queries).pixels
    others = [model.squares(images, of_query).pixels for of_query in found.tolist()]
    labels = [label for label in images.labels or [] if label is not None]
    if len(labels) == len(images.names):
        classes = sorted(set(labels))
        numbers = torch.tensor([classes.index(label) for label in labels])
        draw_neighbors(
            path,
            shown,
            torch.stack(others),
            query_labels=numbers[rows],
            neighbor_labels=numbers[found],
            cosines=cosines,
            class_names=classes,
        )
        return
    titles = [
        [f"{cosine:.3f}\n{images.names[row]}" for cosine, row in zip(of_query, into, strict=True)]
        for of_query, into in zip(cosines.tolist(), found.tolist(), strict=True)
    ]
    draw_found(
        path,
        list(shown),
        [list(pictures) for pictures in others],
        query_titles=[images.names[row] for row in queries],
        titles=titles,
    )


def draw_map_of(model: Model, squares: Squares, path: Path, *, seed: int = 0) -> None:
    """Write the squares as a map, placed by their vectors. Raises UserError for fewer than five."""
    parts = squares.pixels.split(BATCH)
    vectors = [model.features(normalize(part).to(model.device)).float().cpu().numpy() for part in parts]
    at, method = places(np.concatenate(vectors), seed=seed)
    thumbnails = F.interpolate(squares.pixels.float(), size=(THUMBNAIL, THUMBNAIL), mode="area")
    draw_map(path, at, thumbnails.round().byte(), title=f"{len(at)} images by {model.name} ({method})")
