"""Reports of a metric-learning run: its sets, its description, and retrieval before, during and after training."""

import time
from typing import Any, NamedTuple

import numpy as np

from glsd.cluster import dist
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import differences
from glsd.data.balanced import ClassGroups, class_groups, split_classes
from glsd.data.transform import choose_sizes
from glsd.errors import UserError, config_keys
from glsd.evaluate.protocols import describe_scores, describe_search, score_retrieval
from glsd.evaluate.record import append_record, read_records
from glsd.evaluate.sets import (
    embed_set,
    open_labeled,
    open_retrieval,
)
from glsd.finetune.networks import State
from glsd.finetune.plan import Plan, rates_at
from glsd.models.embedder import Embedder
from glsd.runtime.loop import Training
from glsd.shards.store import ShardSet, check_disjoint, number_together


class Sets(NamedTuple):
    """The images to learn from, by class, and those to be retrieved."""

    train: ShardSet
    groups: ClassGroups
    val: np.ndarray  # images of train whose classes are held out; may be empty
    test: dict[str, ShardSet]  # {'test'}, or {'query', 'gallery'}, or nothing


def open_sets(cfg: FinetuneConfig) -> Sets:
    """Open all sets and check that they go together; UserError if a class is both learned from and measured."""
    train = open_labeled(cfg.data.train_shards, "data.train_shards")
    labels = train.labels()
    keys = {
        "labels": "data.train_shards",
        "drop_lone": "data.drop_lone_classes",
        "val_share": "data.val_share",
    }
    with config_keys(keys):
        groups = class_groups(labels, key_of=train.key, drop_lone=cfg.data.drop_lone_classes)
        groups, val = split_classes(groups, cfg.data.val_share)
    given = [key for key in ("test_shards", "query_shards", "gallery_shards") if getattr(cfg.data, key)]
    test = open_retrieval(cfg.data) if given else {}
    # The classes of train keep their numbers: they come first.
    number_together(
        {"data.train_shards": train, **{f"data.{name}_shards": part for name, part in test.items()}}
    )
    for name, shards in test.items():
        names = ("data.train_shards", f"data.{name}_shards")
        check_disjoint(train, shards, names=names)
        shared = np.intersect1d(np.unique(labels), np.unique(shards.labels()))
        if len(shared):
            raise UserError(
                f"{names[0]} and {names[1]} share {len(shared)} classes, as label {shared[0]}: retrieval is measured on classes "
                "never seen; make a class-disjoint split with: python launch/pack.py split SHARDS DST"
            )
    if not test and not len(val):
        raise UserError(
            "nothing to measure: set data.test_shards, or data.query_shards and data.gallery_shards, or data.val_share"
        )
    return Sets(train, groups, val, test)


def describe(cfg: FinetuneConfig, plan: Plan, state: State, sets: Sets) -> str:
    """Return what a user wants to see before a long run."""
    millions = sum(p.numel() for p in state.student.parameters()) / 1e6
    special = " ".join(f"{key}={value}" for key, value in differences(cfg).items()) or "none"
    classes = f"{plan.classes_per_batch} classes x {cfg.data.images_per_class} images"
    lines = [
        f"configuration beside the defaults: {special}",
        f"{cfg.model.backbone}: {millions:.2f} M parameters, embeddings of width {state.student.embed_dim}",
        f"{plan.num_samples} images of {plan.num_classes} classes to learn from, {len(sets.val)} held out; batches of {classes} "
        f"over {dist.world_size()} ranks; {plan.steps_per_epoch} steps an epoch, {plan.last_step} of {plan.total_steps} steps",
    ]
    if cfg.distills and cfg.sd.tau < 0.5 and not cfg.sd.mask_self:
        lines.append(
            f"warning: at sd.tau {cfg.sd.tau} an image's similarity with itself takes most of its distribution: set "
            "--sd.mask_self true, or look at sd_target_self in the metrics"
        )
    if state.student.backbone.load_report is not None:
        lines.append(f"weights from {cfg.init}: {state.student.backbone.load_report}")
    return "\n".join(lines)


def epoch_of(plan: Plan, step: int) -> float:
    """Return how many epochs are done after ``step`` steps."""
    return step / plan.steps_per_epoch


def step_numbers(cfg: FinetuneConfig, plan: Plan, step: int) -> dict[str, int | float]:
    """Return the scheduled quantities of a step for its row of metrics."""
    rates = rates_at(cfg, plan, step)
    return {"epoch": rates.epoch, "lr": cfg.optim.lr * rates.scale, "sd_weight": rates.sd_weight}


def measure(t: Training[FinetuneConfig, Plan, State], sets: Sets) -> None:
    """Retrieve with the student's embeddings (at the start also with the bare features) and note it in ``state.scores``.

    In float32, whatever the training: half precision makes ties. accelerate has put autocast into the student's own forward.
    """
    cfg, state = t.cfg, t.state
    student = state.student.eval()
    networks: dict[str, Any] = {"": lambda images: Embedder.forward(student, images)}
    if state.step == 0 and student.head is not None:
        networks["frozen "] = lambda images: student.backbone(images)[0]
    sizes = choose_sizes(cfg.data.crop or 0, resize=cfg.data.resize)
    found: dict[str, Any] = {}
    for kind, forward in networks.items():
        parts = {"test": sets.test, "val": {"test": sets.train} if len(sets.val) else {}}
        for part, shard_sets in parts.items():
            embedded = {
                role: embed_set(
                    shards,
                    forward,
                    name=part if role == "test" else role,
                    sizes=sizes,
                    batch_size=cfg.watch.batch_size,
                    num_workers=cfg.data.num_workers,
                    device=t.accelerator.device,
                    chosen=sets.val if part == "val" else None,
                )
                for role, shards in shard_sets.items()
            }
            if embedded:
                found[f"{kind}{part}"] = score_retrieval(
                    embedded,
                    recall_at=cfg.watch.recall_at,
                    distances=cfg.distances,
                    device=t.accelerator.device,
                )
    student.train()
    epoch = epoch_of(t.plan, state.step)
    state.scores[str(state.step)] = found
    t.meters.write({"step": state.step, "probe": {"epoch": epoch, **found}})
    for what, by_distance in found.items():
        for distance, scores in by_distance.items():
            t.meters.say(f"epoch {epoch:<4g} {what:<12} {distance:<9}  {describe_scores(scores)}")


def summarize(t: Training[FinetuneConfig, Plan, State], sets: Sets) -> None:
    """Say what was gained since the start, and append it to evals.json."""
    cfg, plan, state, run = t.cfg, t.plan, t.state, t.run
    steps = sorted(map(int, state.scores))
    first, last = (state.scores[str(step)] for step in (steps[0], steps[-1]))
    part, distance = "test" if "test" in last else "val", cfg.distances[0]
    chosen = None
    if "test" in last and "val" in last:
        chosen = max(steps, key=lambda step: state.scores[str(step)]["val"][distance]["map_at_r"])
    measured = sets.test if part == "test" else {"test": sets.train}
    kept = ""
    if chosen is not None and not (run.checkpoints / f"step_{chosen:08d}").is_dir():
        kept = " (no longer on disk: watch.keep_checkpoints)"
    if dist.is_main():
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": f"student of {run.folder}",
            "step": state.step,
            "protocol": {name: describe_search(measured, name) for name in cfg.distances},
            "loss": cfg.loss,
            "reg": cfg.reg,
            "seed": cfg.seed,
            "epoch 0": first,
            f"epoch {epoch_of(plan, steps[-1]):g}": last,
        }
        if chosen is not None:
            record[f"epoch {epoch_of(plan, chosen):g}, chosen by val"] = state.scores[str(chosen)]
        written = [(old.get("reg"), old.get("step")) for old in read_records(run.folder)]
        if (cfg.reg, state.step) not in written:  # it is when a finished run is resumed
            append_record(run.folder, record)
    before, after = first[part][distance], last[part][distance]
    t.meters.say(describe_search(measured, distance))
    if frozen := first.get(f"frozen {part}"):
        t.meters.say(f"frozen    {part} {distance}: {describe_scores(frozen[distance])}")
    if chosen is not None:
        line = describe_scores(state.scores[str(chosen)]["test"][distance])
        epoch = epoch_of(plan, chosen)
        t.meters.say(
            f"chosen    test {distance} at epoch {epoch:g}{kept}, the best MAP@R of the held-out classes: {line}"
        )
    names = {"recall@1": "Recall@1", "map_at_r": "MAP@R"}
    gains = ", ".join(
        f"{name} {100 * before[key]:.2f} -> {100 * after[key]:.2f} % ({100 * (after[key] - before[key]):+.2f})"
        for key, name in names.items()
        if key in before
    )
    t.meters.say(f"final     {part} {distance}, epoch 0 -> {epoch_of(plan, steps[-1]):g}: {gains}")
