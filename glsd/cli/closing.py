"""The closing lines of a command: what came out, where it is, and a command to go on with."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import differences
from glsd.config.pretrain import PretrainConfig

CURVES = "tensorboard --logdir {run}"


def of_pretraining(cfg: PretrainConfig, run: Path) -> str:
    """Return the closing lines of a pretraining run; what came out is read from its metrics.jsonl."""
    rows, what = _rows(run), []
    losses = [row for row in rows if "loss" in row]
    if losses:
        what.append(f"loss {float(losses[-1]['loss']):.4f}")
    key = f"knn{cfg.watch.probe_k}_top1"
    what += _last_and_best(
        f"k-NN (k={cfg.watch.probe_k})",
        {row["step"]: row["probe"][key] for row in rows if key in row.get("probe", {})},
    )
    probed = {
        "data.train_shards": cfg.watch.probe_train_shards,
        "data.val_shards": cfg.watch.probe_val_shards,
    }
    go_on = _command("evaluate", {"model": str(run), "protocol": "knn", **probed})
    return _closing(rows, what, run, go_on if all(probed.values()) else "")


def of_finetuning(cfg: FinetuneConfig, run: Path) -> str:
    """Return the closing lines of a fine-tuning run; what came out is read from its metrics.jsonl."""
    rows, distance = _rows(run), cfg.distances[0]
    tested = {
        f"data.{role}_shards": getattr(cfg.data, f"{role}_shards") for role in ("test", "query", "gallery")
    }
    tested = {key: shards for key, shards in tested.items() if shards}
    part = "test" if tested else "val"
    scores = {row["step"]: row["probe"][part][distance] for row in rows if part in row.get("probe", {})}
    what = _last_and_best(f"MAP@R ({part})", {step: found["map_at_r"] for step, found in scores.items()})
    go_on = _command("evaluate", {"model": str(run), "protocol": "retrieval", **tested})
    return _closing(rows, what, run, go_on if tested else "")


def of_evaluation(cfg: EvalConfig, run: Path | None) -> str:
    """Return the closing lines of an evaluation; run: the run folder of the model, None if it is not a run's."""
    out = cfg.out or run
    where = f"kept in {Path(out) / 'evals.json'}" if out else "kept nowhere: give a folder with --out"
    if run and cfg.features != "initial":
        other, why = replace(cfg, features="initial"), "the untrained network, for comparison"
    elif run:
        other, why = replace(cfg, features=None), "the trained network, for comparison"
    elif cfg.protocol == "retrieval":
        turned = cfg.distance == "euclidean"
        other, why = replace(cfg, distance="cosine" if turned else "euclidean"), "another distance"
    else:
        other, why = replace(cfg, protocol="linear" if cfg.protocol == "knn" else "knn"), "another protocol"
    return f"{where}\nnext ({why}): {_command('evaluate', differences(other))}"


def of_packing(prefixes: list[str], folder: Path) -> str:
    """Return the closing line of a packing: what to do with the shards of these prefixes."""
    shards = {prefix: f"{folder}/{prefix}-*.tar" for prefix in prefixes}
    if {"train", "test"} <= shards.keys() or {"train", "query", "gallery"} <= shards.keys():
        flags = {f"data.{prefix}_shards": pattern for prefix, pattern in shards.items() if prefix != "val"}
        go_on = _command("finetune", {"init": "timm:vit_small_patch16_224.dino", **flags, "out": "runs/dml"})
    elif "train" in shards:
        flags = {"config": "small_data", "data.shards": shards["train"], "out": "runs/mine"}
        go_on = _command("pretrain", flags)
    else:
        go_on = shlex.join(["glsd", "audit", *shards.values()])
    return f"next: {go_on}"


def _closing(rows: list[dict[str, Any]], what: list[str], run: Path, go_on: str) -> str:
    steps = rows[-1]["step"] if rows else 0
    curves = CURVES.format(run=shlex.quote(str(run)))
    return (
        f"finished after step {steps}{': ' if what else ''}{', '.join(what)}\n"
        f"weights, metrics and pictures: {run}\nnext: {go_on or curves}"
    )


def _rows(run: Path) -> list[dict[str, Any]]:
    with (run / "metrics.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def _last_and_best(name: str, shares: Mapping[int, float]) -> list[str]:
    """Return a share of the last step that has one, and the best one if it is another; nothing if there is none."""
    if not shares:
        return []
    last, best = max(shares), max(shares, key=lambda step: shares[step])
    line = f"{name} {shares[last]:.2%}"
    return [line if shares[best] == shares[last] else f"{line} (best: {shares[best]:.2%} after step {best})"]


def _command(name: str, values: Mapping[str, Any]) -> str:
    """Return a command line that a shell reads back to these values by their keys; None is the default."""
    words = ["glsd", name]
    for key, value in values.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
    return shlex.join(words)
