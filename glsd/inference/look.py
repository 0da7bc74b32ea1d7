"""Pictures of what a network makes of images: attention, patch colors, a map."""

from pathlib import Path

import numpy as np
import torch.nn.functional as F

from glsd.data.photometric import normalize
from glsd.inference.model import Model, Squares
from glsd.show.attention import draw_attention
from glsd.show.map import draw_map, places
from glsd.show.pca import draw_pca, patch_colors

BATCH = 64
THUMBNAIL = 48  # pixels


def evenly(total: int, count: int) -> list[int]:
    """Return the numbers of ``count`` of ``total`` images, spread evenly; all if there are no more."""
    return [i * total // count for i in range(count)] if count < total else list(range(total))


def draw_attention_of(model: Model, squares: Squares, path: Path) -> None:
    """Write where the class token of a model looks. Raises UserError for a network without one."""
    names = [Path(name).name for name in squares.names]
    draw_attention(path, squares.pixels, model.attention(normalize(squares.pixels).to(model.device)), names)


def draw_pca_of(model: Model, squares: Squares, path: Path) -> None:
    """Write the patches of the squares as colors, one principal component analysis for all."""
    names = [Path(name).name for name in squares.names]
    patches = model.patches(normalize(squares.pixels).to(model.device))
    draw_pca(path, squares.pixels, patch_colors(patches), names)


def draw_map_of(model: Model, squares: Squares, path: Path, *, seed: int = 0) -> None:
    """Write the squares as a map, placed by their vectors. Raises UserError for fewer than five."""
    parts = squares.pixels.split(BATCH)
    vectors = [model.features(normalize(part).to(model.device)).float().cpu().numpy() for part in parts]
    at, method = places(np.concatenate(vectors), seed=seed)
    thumbnails = F.interpolate(squares.pixels.float(), size=(THUMBNAIL, THUMBNAIL), mode="area")
    draw_map(path, at, thumbnails.round().byte(), title=f"{len(at)} images by {model.name} ({method})")
