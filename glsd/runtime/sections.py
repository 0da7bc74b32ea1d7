"""The metrics of a run that people watch, in the order in which they read them. metrics.jsonl has all others, too."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Section -> its metrics by dotted name; * is any part of a name.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss", "global_loss", "local_loss", "koleo_loss", "ranking", "sd", "mdr"),
    "Health": (
        *("global_teacher_entropy", "local_teacher_entropy", "matched_share", "grad_norm", "sd_share"),
        *("sd_target_entropy", "sd_target_self", "sd_target_shift", "num_broken"),
    ),
    "Probe": (
        "probe.knn*_top1",
        "probe.rankme",
        "probe.*.recall@1",
        "probe.*.map_at_r",
        "probe.teacher_*",
        "probe.student_*",
    ),
    "Rates": ("lr", "weight_decay", "teacher_momentum", "teacher_temp", "sd_weight"),
    "Timing": ("timing.images_per_s", "timing.data_wait", "timing.step_s"),
}


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, int | float]:
    """Return the numbers of a row of metrics by dotted name."""
    found: dict[str, int | float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def place_of(name: str) -> tuple[int, int] | None:
    """Return the section of a metric and its place there, both from 0; None for one that nobody watches."""
    for section, patterns in enumerate(SECTIONS.values()):
        for place, pattern in enumerate(patterns):
            if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name):
                return section, place
    return None


def board_name(name: str) -> str | None:
    """Return the name of a metric in TensorBoard, which sorts sections by name; None for one that nobody watches."""
    place = place_of(name)
    if place is None:
        return None
    title = list(SECTIONS)[place[0]].lower()
    return f"{place[0] + 1}_{title}/{name.removeprefix(f'{title}.').replace('.', '/')}"


def watched(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, int | float]]]]:
    """Return the (step, value) of the rows of metrics.jsonl, by section and dotted name, in the order of SECTIONS."""
    series: dict[str, list[tuple[int, int | float]]] = {}
    for row in rows:
        for name, value in numbers(row).items():
            series.setdefault(name, []).append((int(row["step"]), value))
    places = sorted((place, name) for name in series if (place := place_of(name)) is not None)
    found: dict[str, dict[str, list[tuple[int, int | float]]]] = {}
    for (section, _), name in places:
        found.setdefault(list(SECTIONS)[section], {})[name] = series[name]
    return found
