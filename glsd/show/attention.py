"""A picture of where the class token looks, head by head."""

from pathlib import Path

from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from glsd.errors import UserError
from glsd.show.matches import save_figure

MOST_HEADS = 8  # in a row; more are left out


def draw_attention(
    path: Path, images: UInt8[Tensor, "b 3 h w"], attention: Float[Tensor, "b a r c"], names: list[str]
) -> None:
    """Write a picture, one row per image: the image, the mean over the heads, then each head, on top of the image.

    attention: shares of the class token's attention, as ``Model.attention`` returns them. Each map has its own scale, from 0 to
    its largest share, which its title says. Raises UserError if the sides of maps and images do not fit each other, or the
    file cannot be written.
    """
    rows, columns = attention.shape[2:]
    if images.shape[2] % rows or images.shape[3] % columns:
        raise UserError(
            f"attention of {rows} x {columns} patches does not divide images of {images.shape[2]} x {images.shape[3]} pixels"
        )
    heads = min(attention.shape[1], MOST_HEADS)
    figure = Figure(figsize=(1.6 * (heads + 2), 1.8 * len(images)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), heads + 2, squeeze=False)
    for row, image in enumerate(images):
        pixels = image.permute(1, 2, 0).cpu().numpy()
        maps = [attention[row].mean(0), *attention[row, :heads]]
        titles = ["all heads", *(f"head {number + 1}" for number in range(heads))]
        axes[row, 0].imshow(pixels)
        axes[row, 0].set_title(names[row], fontsize=7)
        for axis, shares, title in zip(axes[row, 1:], maps, titles, strict=True):
            axis.imshow(pixels)
            extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
            axis.imshow(shares.cpu().numpy(), cmap="inferno", alpha=0.7, vmin=0, extent=extent)
            axis.set_title(f"{title}, up to {float(shares.max()):.0%}", fontsize=7)
        for axis in axes[row]:
            axis.set_axis_off()
    save_figure(figure, path)
