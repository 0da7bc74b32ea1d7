"""A picture of query images and their nearest neighbors, with right and wrong ones marked."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from glsd.show.matches import save_figure

MOST_TITLE = 22  # characters above a picture
_RIGHT, _WRONG = "#1a9850", "#d73027"
_LONGEST_NAME = 16  # characters


def draw_neighbors(
    path: Path,
    query_images: UInt8[Tensor, "q 3 h w"],
    neighbor_images: UInt8[Tensor, "q k 3 h w"],
    *,
    query_labels: Int64[Tensor, " q"],
    neighbor_labels: Int64[Tensor, "q k"],
    cosines: Float[Tensor, "q k"],
    class_names: Sequence[str] = (),
) -> None:
    """Write a picture, one row per query: the query, then its k neighbors with their cosines.

    A neighbor with the label of its query has a green frame and a tick, another one a red frame and a cross.
    class_names: in label order; a label without one is shown as its number. Raises UserError if the file cannot be written.
    """
    num_queries, k = neighbor_labels.shape
    figure = Figure(figsize=(1.5 * (k + 1), 1.75 * num_queries), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_queries, k + 1, squeeze=False)
    for row in range(num_queries):
        label = int(query_labels[row])
        _show(axes[row, 0], query_images[row], f"query: {_name(label, class_names)}", "black")
        for column in range(k):
            other = int(neighbor_labels[row, column])
            mark, color = ("\u2713", _RIGHT) if other == label else ("\u2717", _WRONG)
            title = f"{mark} {_name(other, class_names)} {float(cosines[row, column]):.2f}"
            _show(axes[row, column + 1], neighbor_images[row, column], title, color)
    save_figure(figure, path)


def _name(label: int, class_names: Sequence[str]) -> str:
    """Return the name of a class as it fits above a picture; what matplotlib would read as a formula is shown as it is."""
    name = class_names[label] if 0 <= label < len(class_names) else str(label)
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\u2026"
    return "".join(c if c.isprintable() else "?" for c in short).replace("$", r"\$")


def draw_found(
    path: Path,
    query_images: Sequence[UInt8[Tensor, "3 s s"]],
    images: Sequence[Sequence[UInt8[Tensor, "3 s s"] | None]],
    *,
    query_titles: Sequence[str],
    titles: Sequence[Sequence[str]],
) -> None:
    """Write a picture, one row per query: the query, then what was found, each with its title.

    An image that is None is drawn as an empty square that says so. Raises UserError if the file cannot be written.
    """
    columns = max(map(len, images)) + 1
    lines = max((title.count("\n") + 1 for of_query in titles for title in of_query), default=1)
    size = (1.5 * columns, (1.7 + 0.15 * lines) * len(images))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, found in enumerate(images):
        _show(axes[row, 0], query_images[row], _shortened(query_titles[row]), "black")
        for column, image in enumerate(found):
            axis = axes[row, column + 1]
            if image is None:
                image = torch.full_like(query_images[row], 238)
                place = {"ha": "center", "va": "center", "transform": axis.transAxes}
                axis.text(0.5, 0.5, "not there\nany more", fontsize=8, **place)
            _show(axis, image, _shortened(titles[row][column]), "dimgray")
        for axis in axes[row, len(found) + 1 :]:
            axis.set_axis_off()
    save_figure(figure, path)


def _shortened(title: str) -> str:
    """Return the end of each line of a title, which says more than the folders before it, as matplotlib can draw it."""
    lines = []
    for line in title.splitlines():
        text = line.encode("utf-8", "backslashreplace").decode()
        text = text if len(text) <= MOST_TITLE else "\u2026" + text[-MOST_TITLE + 1 :]
        lines.append(text.replace("$", r"\$"))
    return "\n".join(lines)


def _show(axis, image: Tensor, title: str, color: str) -> None:
    axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=8, color=color)
    axis.set_xticks([])
    axis.set_yticks([])
    for edge in axis.spines.values():
        edge.set_color(color)
        edge.set_linewidth(2.5)
