"""Fine-tuning: a backbone learns from labels which images belong together, and is measured on classes it has not seen."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glsd.batches import LabeledCrops
from glsd.cluster import dist, shutdown
from glsd.cluster.launch import start
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import dump
from glsd.data.balanced_loader import balanced_loader
from glsd.errors import UserError, config_keys
from glsd.evaluate.record import cannot_write
from glsd.finetune.networks import State, build, resolve
from glsd.finetune.plan import Plan, make_plan, rates_at
from glsd.finetune.report import Sets, describe, measure, open_sets, step_numbers, summarize
from glsd.finetune.step import train_step
from glsd.losses.mdr import MdrStatistics
from glsd.runtime import checkpoint
from glsd.runtime.checkpoint import Checkpoint
from glsd.runtime.loop import Duties, Training, is_probe_due, open_training, take_steps
from glsd.runtime.run import Run, earlier_precision
from glsd.runtime.trackers import tracker_names

ROLES = ("test", "query", "gallery")


def finetune(cfg: FinetuneConfig) -> Path:
    """Fine-tune as configured, measure before, during and after, and return the run directory.

    Asked to stop (TERM, USR1, INT) it saves and raises StoppedEarly. Raises UserError for what in the configuration, the
    data, the weights or the checkpoint cannot work, before the first step where that can be known.
    """
    run = Run(Path(cfg.out))
    accelerator = start(
        cfg.optim.precision,
        "launch/finetune_dml.py",
        earlier_precision=earlier_precision(run) if cfg.resume == "auto" else "",
    )
    cfg = replace(cfg, optim=replace(cfg.optim, precision=accelerator.mixed_precision))
    with config_keys({"lost_after": "cluster.lost_after"}):
        shutdown.watch_others(cfg.cluster.lost_after)
    cfg, source = dist.together(lambda: resolve(cfg))
    sets = dist.together(lambda: open_sets(cfg))
    plan = make_plan(cfg, len(sets.groups.members), len(sets.groups))
    state = dist.together(lambda: build(cfg, source, plan.num_classes, accelerator))
    saved = restore(cfg, plan, state, run, sets) if cfg.resume == "auto" else None
    batches = make_batches(cfg, plan, sets, state.step)
    with config_keys({"trackers": "watch.trackers"}):
        trackers = tracker_names(cfg.watch.trackers)
    with open_training(
        cfg,
        plan,
        state,
        run,
        accelerator,
        saved=saved,
        resolved_config=dump(cfg),
        resume=cfg.resume == "auto",
        trackers=trackers,
        about=describe(cfg, plan, state, sets),
        check=lambda: dist.raise_together(cannot_write(run.folder) if dist.is_main() else None),
    ) as t:
        probe_every = cfg.watch.eval_every * plan.steps_per_epoch
        if is_probe_due(probe_every, state.step, state.step == plan.last_step):
            with t.meters.aside():
                measure(t, sets)
        duties = Duties(
            step=lambda: train_step(t, rates_at(cfg, plan, state.step), batches),
            step_numbers=lambda step: step_numbers(cfg, plan, step),
            save=lambda: save(t, sets),
            probe=lambda: measure(t, sets),
            log_every=cfg.watch.log_every,
            save_every=cfg.watch.checkpoint_every or plan.steps_per_epoch,
            probe_every=probe_every,
            saves_before_probe=False,
            batch_size=cfg.optim.batch_size,
            max_bad_fraction=cfg.data.max_bad_fraction,
        )
        with config_keys({"lr": "optim.lr", "max_bad_fraction": "data.max_bad_fraction"}):
            take_steps(t, duties)
        with t.meters.aside():
            summarize(t, sets)
    return run.folder


@config_keys({"num_workers": "data.num_workers"})
def make_batches(cfg: FinetuneConfig, plan: Plan, sets: Sets, first_step: int) -> Iterator[LabeledCrops]:
    """Return this rank's endless share of the batches from step ``first_step`` on."""
    return balanced_loader(
        sets.train,
        sets.groups,
        size=cfg.data.crop or 0,
        scale=cfg.data.scale,
        flip_prob=cfg.data.flip_prob,
        seed=cfg.seed,
        classes=plan.classes_per_batch,
        images_per_class=cfg.data.images_per_class,
        first_step=first_step,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=cfg.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def save(t: Training[FinetuneConfig, Plan, State], sets: Sets) -> None:
    """Write a checkpoint from which the run goes on as if it had never stopped."""
    state = t.state
    t.meters.sync()
    tensors = {
        "student": state.student.state_dict(),
        "losses": {
            **{f"ranking.{name}": tensor for name, tensor in state.ranking.state_dict().items()},
            "levels": state.levels.detach(),
            **{f"mdr.{name}": tensor for name, tensor in state.mdr_statistics._asdict().items()},
        },
    }
    if state.teacher is not None:
        tensors["teacher"] = state.teacher.state_dict()
    checkpoint.save(
        t.run.checkpoints,
        step=state.step,
        tensors=tensors,
        state={
            "meters": t.meters.state(),
            "num_broken": state.num_broken,
            "scores": state.scores,
            "order": order_of(t.cfg, sets),
        },
        optimizer=state.optimizer.state_dict(),
        keep=t.cfg.watch.keep_checkpoints,
    )


def restore(cfg: FinetuneConfig, plan: Plan, state: State, run: Run, sets: Sets) -> Checkpoint | None:
    """Load the newest intact checkpoint, if there is one; a refused one changes nothing, here or on the disk."""
    saved = checkpoint.load_latest(run.checkpoints)
    if saved is None:
        return None
    if "losses" not in saved.tensors:
        raise UserError(f"{saved.path} is a checkpoint of a pretraining run: give another --out")
    if saved.step > plan.last_step:
        raise UserError(
            f"{saved.path} is at step {saved.step}, this run would end at step {plan.last_step}: raise optim.max_steps, or "
            "give another --out"
        )
    for key, value in order_of(cfg, sets).items():
        if saved.state["order"].get(key) != value:
            raise UserError(
                f"{key} is not what {saved.path} was made with: the run would not go on as it began; use the same, or "
                "another --out"
            )
    groups = [group["names"] for group in saved.optimizer["param_groups"]]
    if groups != [group["names"] for group in state.optimizer.param_groups]:
        raise UserError(
            f"{saved.path} trained other parameters than these (loss, reg, model, optim.optimizer, ...): use the configuration "
            "it was made with"
        )
    checkpoint.restore(state.student, saved.tensors["student"], source=f"{saved.path}/student.safetensors")
    if state.teacher is not None:
        checkpoint.restore(
            state.teacher, saved.tensors["teacher"], source=f"{saved.path}/teacher.safetensors"
        )
    losses, device = dict(saved.tensors["losses"]), state.levels.device
    statistics = {name: losses.pop(f"mdr.{name}").to(device) for name in MdrStatistics._fields}
    state.mdr_statistics = MdrStatistics(**statistics)
    with torch.no_grad():
        state.levels.copy_(losses.pop("levels"))
    ranking = {name.removeprefix("ranking."): tensor for name, tensor in losses.items()}
    checkpoint.restore(state.ranking, ranking, source=f"{saved.path}/losses.safetensors")
    # Rates and decay are those of this start's configuration, as every other setting.
    settings = [
        {key: group[key] for key in ("base_lr", "weight_decay")} for group in state.optimizer.param_groups
    ]
    state.optimizer.load_state_dict(saved.optimizer)
    for group, own in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(own)
    state.step, state.num_broken = saved.step, saved.state["num_broken"]
    state.scores = saved.state["scores"]
    return saved


def order_of(cfg: FinetuneConfig, sets: Sets) -> dict[str, Any]:
    """Return what must stay for the run to be one run, by the key to blame: samples, epochs, losses, measurements."""
    measured = {role: sets.test[role].fingerprint() if role in sets.test else "" for role in ROLES}
    return {
        "data.train_shards": sets.train.fingerprint(),
        **{f"data.{role}_shards": fingerprint for role, fingerprint in measured.items()},
        "data.crop": cfg.data.crop,
        "data.resize": cfg.data.resize,
        "watch.recall_at": cfg.watch.recall_at,
        "optim.optimizer": cfg.optim.optimizer,
        "mdr.levels": cfg.mdr.levels,
        "data.images_per_class": cfg.data.images_per_class,
        "data.val_share": cfg.data.val_share,
        "data.drop_lone_classes": cfg.data.drop_lone_classes,
        "optim.batch_size": cfg.optim.batch_size,
        "optim.steps_per_epoch": cfg.optim.steps_per_epoch,
        "optim.epochs": cfg.optim.epochs,
        "loss": cfg.loss,
        "reg": cfg.reg,
        "seed": cfg.seed,
    }
