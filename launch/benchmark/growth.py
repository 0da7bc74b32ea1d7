"""A picture of time and memory against a size, with one row of two panels for each size that was varied."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from glsd.show.matches import save_figure


class Curve(NamedTuple):
    """What one implementation took at each size; sizes ascend."""

    name: str
    sizes: Sequence[int]
    seconds: Sequence[float]
    mib: Sequence[float]


def draw_growth(path: Path, panels: Mapping[str, Sequence[Curve]]) -> None:
    """Write a picture with seconds on the left and MiB on the right of each row, by the name of what was varied.

    Both axes are logarithmic, so that proportional growth is a straight line; a size of 0 gets a linear stretch at the left.
    Raises UserError if the file cannot be written.
    """
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for row, (varied, curves) in zip(axes, panels.items(), strict=True):
        sizes = sorted({size for curve in curves for size in curve.sizes})
        for axis, what in zip(row, ("seconds", "mib"), strict=True):
            for curve in curves:
                axis.plot(curve.sizes, getattr(curve, what), marker="o", markersize=4, label=curve.name)
            if sizes and sizes[0] > 0:
                axis.set_xscale("log", base=2)
            else:
                axis.set_xscale("symlog", base=2, linthresh=1)
            axis.set_yscale("log")
            axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
            axis.xaxis.set_minor_locator(
                NullLocator()
            )  # the y axis keeps its own: a curve may lie within one decade
            axis.set_xlabel(varied.replace("_", " "))
            axis.set_ylabel({"seconds": "seconds", "mib": "extra memory in MiB"}[what])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    save_figure(figure, path)
