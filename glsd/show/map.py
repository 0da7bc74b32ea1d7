"""A map of embeddings: images that are alike to the network lie close to each other."""

import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from glsd.errors import UserError
from glsd.show.matches import save_figure

FEWEST = 5
PERPLEXITY = 30.0  # scikit-learn's default; it must stay below the number of images
SPACING = 28  # pixels between thumbnails that are drawn


def places(vectors: Float32[np.ndarray, "n d"], *, seed: int = 0) -> tuple[Float[np.ndarray, "n 2"], str]:
    """Return a place in the plane for each vector, compared by cosine, and the name of the method.

    UMAP if umap-learn is installed (``pip install 'glsd[map]'``), t-SNE of scikit-learn otherwise. Distances between
    groups mean little in both. Raises UserError for fewer than five vectors.
    """
    if len(vectors) < FEWEST:
        raise UserError(f"a map of {len(vectors)} images: expected at least {FEWEST}")
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if importlib.util.find_spec("umap"):
        import umap  # type: ignore[import-not-found]

        neighbors = min(15, len(unit) - 1)
        found = umap.UMAP(metric="cosine", n_neighbors=neighbors, random_state=seed).fit_transform(unit)
        return np.asarray(found, dtype=np.float64), "UMAP"
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(unit) - 1) / 3)
    # Euclidean between unit vectors has the order of cosine, and a fast neighbor search.
    found = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    return np.asarray(found, dtype=np.float64), "t-SNE"


def draw_map(
    path: Path,
    at: Float[np.ndarray, "n 2"],
    thumbnails: UInt8[Tensor, "n 3 h w"],
    *,
    title: str,
    labels: np.ndarray | None = None,
) -> None:
    """Write the map: a dot for each image, colored by label, and thumbnails where there is room for them.

    Raises UserError if the file cannot be written.
    """
    figure = Figure(figsize=(10, 10), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.scatter(at[:, 0], at[:, 1], s=9, c=labels, cmap="tab20" if labels is not None else None, alpha=0.8)
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_aspect("equal", adjustable="datalim")
    figure.draw_without_rendering()  # so that pixels are known
    pixels = axis.transData.transform(at)
    for number in chosen(pixels, SPACING):
        picture = thumbnails[number].permute(1, 2, 0).cpu().numpy()
        box = OffsetImage(picture, zoom=SPACING / max(picture.shape[:2]), resample=True)
        axis.add_artist(AnnotationBbox(box, tuple(at[number]), frameon=False, pad=0))
    save_figure(figure, path)


def chosen(pixels: Float[np.ndarray, "n 2"], spacing: int | float) -> list[int]:
    """Return the images, in order, that are at least ``spacing`` pixels from all that were chosen before."""
    kept: list[int] = []
    for number, place in enumerate(pixels):
        if not kept or np.abs(pixels[kept] - place).max(1).min() >= spacing:
            kept.append(number)
    return kept
