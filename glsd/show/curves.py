"""The curves of a run as SVG: one small chart a metric, in the order in which people read them."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Section -> its metrics, in order. A metric that is not named here is left out of the page; metrics.jsonl has it.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss", "global_loss", "local_loss", "ranking", "sd", "mdr"),
    "Health": (
        *("global_teacher_entropy", "local_teacher_entropy", "matched_share", "grad_norm"),
        *("probe.rankme", "rankme", "sd_share"),
    ),
    "Probe": ("probe.knn_top1", "probe.knn_top5", "probe.*.recall@1", "probe.*.map_at_r"),
    "Rates": ("lr", "weight_decay", "teacher_momentum", "teacher_temp", "sd_weight"),
    "Timing": ("timing.images_per_s", "timing.data_wait"),
}
INK = "#010203"  # of text and axes; the page's own color takes its place, light or dark
LINE = "#2f7fc1"


class Chart(NamedTuple):
    """One metric over the steps of a run."""

    name: str
    svg: str  # an <svg> element
    said: str  # what it shows, in a sentence


def charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Chart]]:
    """Return the charts of the rows of metrics.jsonl by section. Metrics without a finite number are left out."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in _numbers(row):
            series.setdefault(name, []).append((float(row["step"]), value))
    found: dict[str, list[Chart]] = {}
    for section, patterns in SECTIONS.items():
        for pattern in patterns:
            wanted = re.compile(re.escape(pattern).replace(r"\*", ".*"))
            for name in (name for name in series if wanted.fullmatch(name)):
                found.setdefault(section, []).append(_chart(name, series[name]))
    return found


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the finite numbers of a row by dotted name."""
    found = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((prefix + key, float(value)))
    return found


def _chart(name: str, points: Sequence[tuple[float, float]]) -> Chart:
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
