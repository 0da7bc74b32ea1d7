"""A picture of two crops with lines between matched patches, to check a new run by."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from glsd.errors import UserError, one_line
from glsd.files import replacing
from glsd.geometry import Stride, patch_grid, patch_sides

_COLORS = colormaps["hsv"]
BOX_COLORS = {"student": "#ff7f0e", "teacher": "#00b4d8"}
BOX_NAMES = {"#ff7f0e": "orange", "#00b4d8": "blue"}


def draw_matches(
    path: Path,
    student_crops: UInt8[Tensor, "m 3 hs ws"],
    teacher_crops: UInt8[Tensor, "m 3 ht wt"],
    *,
    index: Int64[Tensor, "m n"],
    weight: Float[Tensor, "m n"],
    stride: Stride,
    sources: Sequence[UInt8[Tensor, "3 _ _"]] = (),
    boxes: Float64[Tensor, "2 m 4"] | None = None,
    lines: int = 16,
) -> None:
    """Write a picture, one row per image: student crop, teacher crop, matched patches joined by a line.

    index, weight: as in Match, of the student crop's patches into the teacher crop's; stride: side of a patch
    in pixels, or height and width. Rejected patches (weight 0) are darkened, the title counts the accepted ones; of these,
    ``lines`` spread evenly are joined. sources, boxes: the whole images, and the boxes of student and teacher crop in them,
    which are drawn to the left.
    Raises UserError if the file cannot be written.
    """
    rows = len(student_crops)
    columns = 2 + (boxes is not None)
    figure = Figure(figsize=(3.5 * columns, 3.4 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        left, right = axes[row, -2:]
        if boxes is not None:
            _place(axes[row, 0], sources[row], boxes[:, row])
        for axis, crop in ((left, student_crops[row]), (right, teacher_crops[row])):
            axis.imshow(crop.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_axis_off()
        accepted = weight[row].cpu() > 0
        left.set_title(f"student: {int(accepted.sum())} of {len(accepted)} patches matched", fontsize=9)
        right.set_title("teacher", fontsize=9)
        _shade(left, student_crops.shape[-1], stride, accepted)
        _join(
            figure,
            left,
            right,
            student_crops.shape[-1],
            teacher_crops.shape[-1],
            stride,
            index[row].cpu(),
            accepted,
            lines,
        )
    save_figure(figure, path)


def _place(axis, source: Tensor, boxes: Float64[Tensor, "2 4"]) -> None:
    """Draw the whole image with the boxes of its two crops."""
    axis.imshow(source.permute(1, 2, 0).cpu().numpy())
    axis.set_axis_off()
    title = []
    for (name, color), (x0, y0, x1, y1) in zip(BOX_COLORS.items(), boxes.tolist(), strict=True):
        corner = (min(x0, x1) - 0.5, min(y0, y1) - 0.5)
        box = Rectangle(corner, abs(x1 - x0), abs(y1 - y0), fill=False, edgecolor=color, linewidth=2)
        axis.add_patch(box)
        title.append(f"{name}: {BOX_NAMES[color]}{', mirrored' if x0 > x1 else ''}")
    axis.set_title("; ".join(title), fontsize=8)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically. Raises UserError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            figure.savefig(file, format="png")
    except OSError as problem:
        raise UserError(
            f"cannot write the picture {path}: {one_line(problem)}; choose another folder"
        ) from problem


def _corner(patch: int, columns: int, stride: Stride) -> tuple[float, float]:
    """Return x and y of a patch's upper left corner, in pixels of its crop."""
    height, width = patch_sides(stride)
    return patch % columns * width - 0.5, patch // columns * height - 0.5


def _shade(axis, size: int, stride: Stride, accepted: Tensor) -> None:
    (_, columns), (height, width) = patch_grid(size, stride), patch_sides(stride)
    for patch in (~accepted).nonzero()[:, 0].tolist():
        corner = _corner(patch, columns, stride)
        axis.add_patch(Rectangle(corner, width, height, facecolor="black", alpha=0.6, linewidth=0))


def _join(
    figure: Figure,
    left,
    right,
    student_size: int,
    teacher_size: int,
    stride: Stride,
    index: Tensor,
    accepted: Tensor,
    lines: int,
) -> None:
    height, width = patch_sides(stride)
    columns = [patch_grid(size, stride)[1] for size in (student_size, teacher_size)]
    candidates = accepted.nonzero()[:, 0]
    if len(candidates) > lines:
        # The middles of equal stretches; every i-th patch of a square grid would sit in the same columns.
        candidates = candidates[((torch.arange(lines) + 0.5) * len(candidates) / lines).long()]
    for number, patch in enumerate(candidates.tolist()):
        color = _COLORS(number / max(len(candidates), 1))
        ends = []
        for axis, of_axis, cell in ((left, columns[0], patch), (right, columns[1], int(index[patch]))):
            x, y = _corner(cell, of_axis, stride)
            axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.4))
            ends.append((x + width / 2, y + height / 2))
        figure.add_artist(
            ConnectionPatch(
                ends[0],
                ends[1],
                "data",
                "data",
                axesA=left,
                axesB=right,
                color=color,
                linewidth=0.9,
                alpha=0.8,
            )
        )
