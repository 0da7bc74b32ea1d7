"""The first story: a student and its momentum teacher look at crops of unlabeled images until they agree."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from glsd.batches import CropBatch
from glsd.cluster import dist, fsdp, shutdown
from glsd.cluster.launch import start
from glsd.config.parse import dump
from glsd.config.pretrain import PretrainConfig
from glsd.data.order import epoch_samples
from glsd.data.photometric import photometric
from glsd.data.pretrain_loader import pretrain_loader
from glsd.errors import StoppedEarly, UserError, config_keys
from glsd.losses.center import ema_center
from glsd.optim.clip import CLIPPERS
from glsd.optim.ema import ema_update
from glsd.pretrain.networks import State, build
from glsd.pretrain.objective import (
    Pixels,
    mean_logits,
    mean_values,
    run_teacher,
)
from glsd.pretrain.plan import (
    Plan,
    Rates,
    crop_spec,
    make_plan,
    rates_at,
)
from glsd.pretrain.report import (
    advise,
    describe,
    draw_first_batch,
    open_probe,
    probe,
)
from glsd.rng import step_seed
from glsd.runtime import checkpoint
from glsd.runtime.checkpoint import Checkpoint
from glsd.runtime.guard import (
    StepReport,
    check_gradients,
    check_samples,
    log_samples,
    note_bad_gradient,
)
from glsd.runtime.meters import Meters
from glsd.runtime.run import (
    Run,
    StopVote,
    catch_signals,
    open_run,
    rewind,
)
from glsd.shards.store import ShardSet, open_shards


def pretrain(cfg: PretrainConfig) -> Path:
    """Pretrain as configured and return the run directory.

    Asked to stop (TERM, USR1, INT) it saves and raises StoppedEarly. Raises UserError for what in the configuration, the
    data or the checkpoint cannot work, before the first step where that can be known; a run that already has checkpoints
    keeps them.
    """
    accelerator = start(
        cfg.optim.precision,
        "launch/pretrain.py",
        # Not together with no_sync: torch 2.15 fails in the second backward pass of a step.
        static_graph=cfg.optim.micro_batch == 0,
        grad_compression=cfg.optim.grad_compression,
    )
    with config_keys({"lost_after": "cluster.lost_after"}):
        shutdown.watch_others(cfg.cluster.lost_after)
    shards = open_shards(cfg.data.shards, weights=cfg.data.weights)
    plan = make_plan(cfg, epoch_samples(shards.shard_sizes, shards.shard_weights))
    state = build(cfg, accelerator)
    run = Run(Path(cfg.out))
    saved = restore(cfg, state, run, shards) if cfg.resume == "auto" else None
    batches = make_batches(cfg, shards, state.step * cfg.optim.batch_size)
    probe_sets = open_probe(cfg)
    # All is checked: from here on it may write.
    open_run(run.folder, resolved_config=dump(cfg), resume=cfg.resume == "auto")
    if saved is not None:
        rewind(run.folder, saved.step)
        dist.barrier()  # before anybody appends to what was rewound
    meters = Meters(run.folder, total_steps=plan.last_step, start_step=state.step, device=accelerator.device)
    with contextlib.closing(meters), catch_signals() as signal_name:
        meters.say(describe(cfg, plan, state))
        if saved is not None:
            meters.load_state(saved.state["meters"])
            meters.say(f"resumed from {saved.path} at step {saved.step}")

        def look(values: dict[str, Any]) -> None:
            advise(cfg, plan, state, values, meters)

        with meters.aside():
            if state.step == 0:
                first = next(batches)
                batches = itertools.chain([first], batches)
                draw_first_batch(run, state, augment(first.to(accelerator.device)), first)
            if probe_sets and (state.step % cfg.watch.probe_every == 0 or state.step == plan.last_step):
                look(probe(cfg, probe_sets, meters, state, accelerator))
        since_check: list[StepReport] = []
        stop_vote = StopVote()
        while state.step < plan.last_step:
            rates = rates_at(cfg, plan, state.step)
            since_check.append(train_step(cfg, plan, rates, state, batches, meters, accelerator))
            state.step += 1
            meters.advance(state.step, images=plan.rank_images)
            last = state.step == plan.last_step
            flushing = last or state.step % cfg.watch.log_every == 0
            stopping = stop_vote(signal_name(), last=last)
            probing = bool(probe_sets) and (last or state.step % cfg.watch.probe_every == 0)
            # Before a probe, too: it may take longer than what a preempted run has left.
            saving = last or bool(stopping) or probing or state.step % cfg.watch.checkpoint_every == 0
            error = None
            if flushing or saving:
                check_gradients(state, run, since_check)
                if cfg.watch.sample_log:
                    log_samples(plan, state, run, since_check)
                error = check_samples(cfg, plan.num_samples, state, run, since_check)
                since_check.clear()
            if flushing:
                look(meters.flush(state.step, num_broken=state.num_broken, **rates.shown()))
            if saving or error:
                with meters.aside():
                    save(cfg, state, meters, run, shards)
            if error:
                raise error
            if stopping:
                raise StoppedEarly(f"stopped by {stopping} after step {state.step}; go on with --resume auto")
            if probing and probe_sets:
                with meters.aside():
                    look(probe(cfg, probe_sets, meters, state, accelerator))
    return run.folder


def make_batches(cfg: PretrainConfig, shards: ShardSet, consumed: int) -> Iterator[CropBatch]:
    """Return this rank's endless micro-batches from sample number ``consumed`` on."""
    d = cfg.data
    return pretrain_loader(
        shards,
        crop_spec=crop_spec(d),
        seed=cfg.seed,
        window_shards=d.window_shards,
        consumed=consumed,
        batch_size=cfg.optim.batch_size,
        micro_batch=cfg.optim.micro_batch,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=d.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def augment(batch: CropBatch) -> Pixels:
    """Change the colors of all crops, on the device they are on."""
    return Pixels(
        global_crops=photometric(batch.global_crops, batch.global_photometric),
        local_crops=photometric(batch.local_crops, batch.local_photometric),
        global_boxes=batch.global_boxes,
        local_boxes=batch.local_boxes,
    )


def train_step(
    cfg: PretrainConfig,
    plan: Plan,
    rates: Rates,
    state: State,
    batches: Iterator[CropBatch],
    meters: Meters,
    accelerator: Accelerator,
) -> StepReport:
    """Take one optimizer step, without waiting for the device; from the first bad gradient on the weights do not move."""
    decay, no_decay = state.optimizer.param_groups
    decay["lr"], decay["weight_decay"], no_decay["lr"] = rates.lr, rates.weight_decay, rates.lr
    torch.manual_seed(step_seed(cfg.seed, state.step, dist.rank()))  # stochastic depth
    used, outs = [], []
    for number, share in enumerate(plan.shares, start=1):
        with meters.waiting():
            batch = next(batches)
        used.append(batch)
        pixels = augment(batch.to(accelerator.device))
        with accelerator.autocast():
            targets = run_teacher(
                state.teacher,
                pixels.global_crops,
                centers=state.centers,
                temp=rates.teacher_temp,
                sinkhorn_iterations=cfg.loss.sinkhorn_iterations
                if cfg.loss.centering == "sinkhorn"
                else None,
            )
        # Gradients travel between ranks with the last micro-batch only.
        fsdp.synchronize_gradients(state.losses, number == len(plan.shares))
        with contextlib.nullcontext() if number == len(plan.shares) else accelerator.no_sync(state.model):
            out = state.model(pixels, targets)
            accelerator.backward(out.loss * share)
        outs.append(out)
    fsdp.hand_over_gradients(state.student, state.own)
    norms = CLIPPERS[cfg.optim.clip_mode](state.own.values(), cfg.optim.clip_grad, in_parts=bool(state.plans))
    values = {**mean_values(outs, plan.shares), "grad_norm": torch.linalg.vector_norm(norms)}
    note_bad_gradient(state, values)
    if rates.freeze_prototypes:
        for name, parameter in state.own.items():
            if "prototypes" in name:
                parameter.grad = None
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    ema_update(state.own_teacher, state.own, rates.momentum)
    for kind, mean in mean_logits(outs, plan.shares).items():
        state.centers[kind] = ema_center(
            state.centers[kind], dist.all_reduce_mean(mean), cfg.loss.center_momentum
        )
    for name, value in values.items():
        meters.add(name, value)
    return StepReport(
        keys=tuple(key for batch in used for key in batch.keys),
        broken=tuple(broken for batch in used for broken in batch.broken),
    )


def save(cfg: PretrainConfig, state: State, meters: Meters, run: Run, shards: ShardSet) -> None:
    """Write a checkpoint from which the run goes on as if it had never stopped."""
    meters.sync()
    checkpoint.save(
        run.checkpoints,
        step=state.step,
        tensors={
            "student": fsdp.gather_state(state.student),
            "teacher": fsdp.gather_state(state.teacher),
            "centers": state.centers,
        },
        state={
            "meters": meters.state(),
            "num_broken": state.num_broken,
            "order": order_of(cfg, shards),
        },
        optimizer=fsdp.gather_optimizer(state.optimizer, state.student),
        keep=cfg.watch.keep_checkpoints,
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
