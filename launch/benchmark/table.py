"""A table of metric-learning runs: scores of each loss and regularizer, mean and deviation over the seeds."""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from glsd.errors import UserError

METRICS = {"recall@1": "Recall@1", "map_at_r": "MAP@R"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run folders."""
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with evals.json")


def benchmark(args: argparse.Namespace) -> None:
    """Print the table."""
    rows: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    for folder in args.runs:
        for row, scores in results_of(folder):
            rows[row].append(scores)
    print(f"| loss | reg | measured | distance | runs | {' | '.join(METRICS.values())} |")
    print("|---" * (5 + len(METRICS)) + "|")
    for row in sorted(rows):
        cells = [spread([scores[key] for scores in rows[row]]) for key in METRICS]
        print(f"| {' | '.join(row)} | {len(rows[row])} | {' | '.join(cells)} |")


def results_of(folder: Path) -> list[tuple[tuple[str, ...], dict[str, float]]]:
    """Return ((loss, reg, what was measured, distance), scores) of all that a run's evals.json holds."""
    try:
        records = json.loads((folder / "evals.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {folder / 'evals.json'} ({error}): give finished run folders"
        ) from error
    trained = [record for record in records if "reg" in record]
    if not trained:
        raise UserError(f"{folder / 'evals.json'} is not of a metric-learning run")
    who = (trained[-1]["loss"], trained[-1]["reg"])
    found: list[tuple[tuple[str, ...], dict[str, float]]] = []
    for name, parts in trained[-1].items():
        if name.startswith("epoch "):
            when = "epoch 0" if name == "epoch 0" else "end" if "chosen" not in name else "chosen by val"
            for part, by_distance in parts.items():
                found += [((*who, f"{part}, {when}", kind), by_distance[kind]) for kind in by_distance]
    for record in records:
        if "map_at_r" in str(record.get("result")):
            found += [
                (
                    (*who, f"evaluate.py {'leave-one-out' if 'test' in record else 'query/gallery'}", kind),
                    scores,
                )
                for kind, scores in record["result"].items()
            ]
    return found


def spread(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation} %"
