"""Pretraining: a student and its momentum teacher look at crops of unlabeled images until they agree."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from glsd.batches import CropBatch
from glsd.cluster import dist, fsdp, shutdown
from glsd.cluster.launch import start
from glsd.config.parse import dump
from glsd.config.pretrain import PretrainConfig
from glsd.data.order import epoch_samples
from glsd.data.pretrain_loader import MatchRule, pretrain_loader
from glsd.errors import UserError, config_keys
from glsd.models.weights import absolute_init
from glsd.pretrain.networks import State, build
from glsd.pretrain.pictures import draw_first_batch, draw_probe
from glsd.pretrain.plan import Plan, crop_spec, make_plan, rates_at
from glsd.pretrain.probe import earlier_scores, headline_of, open_probe, probe, probe_period
from glsd.pretrain.report import (
    advise,
    describe,
    log_samples,
)
from glsd.pretrain.step import next_step
from glsd.runtime import checkpoint
from glsd.runtime.checkpoint import Checkpoint
from glsd.runtime.loop import Duties, Training, is_probe_due, open_training, take_steps
from glsd.runtime.run import Run, earlier_precision
from glsd.runtime.trackers import tracker_names
from glsd.shards.store import ShardSet, open_shards


def pretrain(cfg: PretrainConfig) -> Path:
    """Pretrain as configured and return the run directory.

    Asked to stop (TERM, USR1, INT) it saves and raises StoppedEarly. Raises UserError for what in the configuration, the
    data or the checkpoint cannot work, before the first step where that can be known; a run that already has checkpoints
    keeps them.
    """
    cfg, accelerator, shards, plan, state = set_up(cfg)
    run = Run(Path(cfg.out))
    saved = restore(cfg, state, run, shards) if cfg.resume == "auto" else None
    batches = make_batches(cfg, state, shards)
    probe_sets = open_probe(cfg, shards)
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
        about=describe(cfg, plan, state),
    ) as t:
        probe_every = probe_period(cfg, plan)
        headline = headline_of(cfg, probe_sets)
        history = earlier_scores(run.metrics, headline)
        if probe_sets is not None:  # without probes the best one stays what earlier probes chose
            checkpoint.point_best(run.checkpoints, history)

        def look() -> None:
            if probe_sets is None:
                return
            scores, measured = probe(t, probe_sets)
            advise(t, scores)
            history[state.step] = scores[headline]
            checkpoint.point_best(run.checkpoints, history)
            if cfg.watch.pictures:
                draw_probe(t, probe_sets, measured, last=state.step == plan.last_step)

        with t.meters.aside():
            if state.step == 0:
                first = next(batches)
                batches = itertools.chain([first], batches)
                draw_first_batch(t, first, shards)
            if is_probe_due(probe_every, state.step, state.step == plan.last_step):
                look()
        duties = Duties(
            step=partial(next_step, t, batches),
            step_numbers=lambda step: rates_at(cfg, plan, step).shown(),
            flushed=lambda row: advise(t, row),
            checked=lambda reports: log_samples(t, reports) if cfg.watch.sample_log else None,
            save=lambda: save(t, shards),
            probe=look,
            log_every=cfg.watch.log_every,
            save_every=cfg.watch.checkpoint_every,
            probe_every=probe_every,
            saves_before_probe=True,
            batch_size=cfg.optim.batch_size,
            max_bad_fraction=cfg.data.max_bad_fraction,
        )
        with config_keys({"lr": "optim.lr", "max_bad_fraction": "data.max_bad_fraction"}):
            take_steps(t, duties)
    return run.folder


def set_up(cfg: PretrainConfig) -> tuple[PretrainConfig, Accelerator, ShardSet, Plan, State]:
    """Meet the other ranks, open the shards and build both networks, for training and for the dry run.

    The configuration comes back with a precision that suits this machine, and an ``init`` that means the same everywhere.
    """
    accelerator = start(
        cfg.optim.precision,
        "launch/pretrain.py",
        earlier_precision=earlier_precision(Run(Path(cfg.out))) if cfg.resume == "auto" else "",
        # Not together with no_sync: torch 2.15 fails in the second backward pass of a step.
        static_graph=cfg.optim.micro_batch == 0,
        grad_compression=cfg.optim.grad_compression,
    )
    cfg = replace(
        cfg,
        optim=replace(cfg.optim, precision=accelerator.mixed_precision),
        model=replace(cfg.model, init=absolute_init(cfg.model.init)),
    )
    with config_keys({"lost_after": "cluster.lost_after", "weights": "data.weights"}):
        shutdown.watch_others(cfg.cluster.lost_after)
        shards = open_shards(cfg.data.shards, weights=cfg.data.weights)
    plan = make_plan(cfg, epoch_samples(shards.shard_sizes, shards.shard_weights))
    return cfg, accelerator, shards, plan, build(cfg, accelerator)


@config_keys({name: f"data.{name}" for name in ("window_shards", "num_workers")})
def make_batches(cfg: PretrainConfig, state: State, shards: ShardSet) -> Iterator[CropBatch]:
    """Return this rank's endless micro-batches from the state's step on."""
    d = cfg.data
    rule = MatchRule(state.student.backbone.stride, cfg.loss.hinge, cfg.loss.hinge_factor)
    return pretrain_loader(
        shards,
        crop_spec=crop_spec(d),
        match_rule=rule if cfg.matching in ("geometric", "both") else None,
        seed=cfg.seed,
        window_shards=d.window_shards,
        consumed=state.step * cfg.optim.batch_size,
        batch_size=cfg.optim.batch_size,
        micro_batch=cfg.optim.micro_batch,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=d.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def save(t: Training[PretrainConfig, Plan, State], shards: ShardSet) -> None:
    """Write a checkpoint from which the run goes on as if it had never stopped."""
    state = t.state
    t.meters.sync()
    checkpoint.save(
        t.run.checkpoints,
        step=state.step,
        tensors={
            "student": fsdp.gather_state(state.student),
            "teacher": fsdp.gather_state(state.teacher),
            "centers": state.centers,
        },
        state={
            "meters": t.meters.state(),
            "num_broken": state.num_broken,
            "order": order_of(t.cfg, shards),
        },
        optimizer=fsdp.gather_optimizer(state.optimizer, state.student),
        keep=t.cfg.watch.keep_checkpoints,
        keep_every=t.cfg.watch.keep_every,
    )


def restore(cfg: PretrainConfig, state: State, run: Run, shards: ShardSet) -> Checkpoint | None:
    """Load the newest intact checkpoint, if there is one; a refused one changes nothing, here or on the disk."""
    saved = checkpoint.load_latest(run.checkpoints)
    if saved is None:
        return None
    for key, value in order_of(cfg, shards).items():
        if saved.state["order"].get(key, value) != value:  # data.weights is younger than some checkpoints
            raise UserError(
                f"{key} is not what {saved.path} was made with: the order of samples would change; "
                "use the same, or another --out"
            )
    groups = [group["names"] for group in saved.optimizer["param_groups"]]
    if groups != [group["names"] for group in state.optimizer.param_groups]:
        raise UserError(
            f"{saved.path} trained other parameters than these: it is a checkpoint of another architecture "
            "(head.shared, head.trainable_gain, matching, ...): use the configuration it was made with"
        )
    for name, network in (("student", state.student), ("teacher", state.teacher)):
        checkpoint.restore(network, saved.tensors[name], source=f"{saved.path}/{name}.safetensors")
    fsdp.load_optimizer(state.optimizer, saved.optimizer, state.student)
    for name, center in saved.tensors["centers"].items():
        state.centers[name] = center.to(state.centers[name].device)
    state.step, state.num_broken = saved.step, saved.state["num_broken"]
    return saved


def order_of(cfg: PretrainConfig, shards: ShardSet) -> dict[str, str | int]:
    """Return everything that decides which sample comes when, by the key to blame."""
    return {
        "data.shards": shards.fingerprint(),
        "data.weights": " ".join(map(str, cfg.data.weights)),
        "data.window_shards": cfg.data.window_shards,
        "optim.batch_size": cfg.optim.batch_size,
        "seed": cfg.seed,
    }
