"""Patch features as colors: parts that look alike to the network get the same color, in all images."""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from glsd.errors import UserError
from glsd.show.matches import save_figure

SHARE_CUT = 0.02  # of the values at either end, so that a few patches do not take all the contrast


def patch_colors(patches: Float[Tensor, "b r c d"]) -> Float[Tensor, "b r c 3"]:
    """Return red, green and blue in 0..1: the first three principal components of all patches together.

    Each component is scaled between its quantiles SHARE_CUT and 1 - SHARE_CUT. Its sign is chosen so that its largest
    loading is positive; so equal features give equal colors in every run. Raises UserError for features of fewer than three
    numbers or that are not finite.
    """
    rows = patches.flatten(0, 2).double()
    if rows.shape[1] < 3 or not rows.isfinite().all():
        raise UserError(
            f"patch features of width {rows.shape[1]}: expected three or more finite numbers each"
        )
    centered = rows - rows.mean(0)
    # Of the covariance, whose size does not grow with the number of patches. Values ascend.
    directions = torch.linalg.eigh(centered.T @ centered)[1].flip(1)[:, :3]
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, range(3)].sign()
    values = centered @ directions
    ordered = values.sort(0).values
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (SHARE_CUT, 1 - SHARE_CUT))
    colors = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.float().unflatten(0, patches.shape[:3])


def draw_pca(
    path: Path, images: UInt8[Tensor, "b 3 h w"], colors: Float[Tensor, "b r c 3"], names: list[str]
) -> None:
    """Write a picture: each image, and below it the colors of its patches. UserError if the file cannot be written."""
    figure = Figure(figsize=(1.8 * len(images), 3.9), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, image in enumerate(images):
        axes[0, column].imshow(image.permute(1, 2, 0).cpu().numpy())
        axes[0, column].set_title(names[column], fontsize=7)
        axes[1, column].imshow(colors[column].cpu().numpy(), interpolation="nearest")
        for axis in axes[:, column]:
            axis.set_axis_off()
    save_figure(figure, path)
