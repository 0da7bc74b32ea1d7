"""The curves of a run as SVG: one small chart a metric, in the order in which people read them."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#010203"  # of text and axes; the page's own color takes its place, light or dark
LINE = "#2f7fc1"


class Chart(NamedTuple):
    """One metric over the steps of a run."""

    name: str
    svg: str  # an <svg> element
    said: str  # what it shows, in a sentence


def charts(
    series: Mapping[str, Mapping[str, Sequence[tuple[int | float, int | float]]]],
) -> dict[str, list[Chart]]:
    """Return the charts of metrics, given as (step, value) by section and name. One without a finite number is left out."""
    found: dict[str, list[Chart]] = {}
    for section, metrics in series.items():
        for name, points in metrics.items():
            finite = [point for point in points if math.isfinite(point[1])]
            if finite:
                found.setdefault(section, []).append(_chart(name, finite))
    return found


def _chart(name: str, points: Sequence[tuple[int | float, int | float]]) -> Chart:
    steps, values = zip(*points, strict=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axis = figure.subplots()
        axis.patch.set_alpha(0)
        axis.plot(steps, values, color=LINE, linewidth=1.6, marker="o" if len(points) < 3 else "")
        axis.set_title(name, color=INK, fontsize=10)
        axis.set_xlabel("step", color=INK)
        axis.tick_params(colors=INK)
        axis.spines[:].set_color(INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=INK, alpha=0.15)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    first, last = values[0], values[-1]
    said = f"{name}: {first:.4g} at step {steps[0]:.0f}, {last:.4g} at step {steps[-1]:.0f}"
    said += f", between {min(values):.4g} and {max(values):.4g}"
    return Chart(name, _inline(file.getvalue(), name, said), said)


def _inline(svg: str, name: str, said: str) -> str:
    """Return the <svg> element alone, in the page's color, with ids that no other chart has, and a text for screen readers."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    own = re.sub(r"\W", "-", name)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", svg)
    return svg.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)
