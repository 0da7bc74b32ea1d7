"""The second story: a backbone learns from labels which images belong together, and is measured on classes it has not seen."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from glsd.batches import LabeledCrops
from glsd.cluster import dist, shutdown
from glsd.cluster.launch import start
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import dump
from glsd.data.balanced_loader import balanced_loader
from glsd.data.photometric import normalize
from glsd.errors import StoppedEarly, UserError, config_keys
from glsd.evaluate.record import cannot_write
from glsd.finetune.networks import State, build, resolve
from glsd.finetune.objective import batch_losses
from glsd.finetune.plan import (
    Plan,
    Rates,
    make_plan,
    rates_at,
)
from glsd.finetune.report import (
    Sets,
    describe,
    is_due,
    measure,
    open_sets,
    summarize,
)
from glsd.losses.mdr import MdrStatistics
from glsd.optim.clip import clip_global
from glsd.precision import widened
from glsd.rng import step_seed
from glsd.runtime import checkpoint
from glsd.runtime.checkpoint import Checkpoint
from glsd.runtime.guard import (
    StepReport,
    check_gradients,
    check_samples,
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

ROLES = ("test", "query", "gallery")
BATCH_SEED = -1  # in place of a rank: draws that all ranks share


def finetune(cfg: FinetuneConfig) -> Path:
    """Fine-tune as configured, measure before, during and after, and return the run directory.

    Asked to stop (TERM, USR1, INT) it saves and raises StoppedEarly. Raises UserError for what in the configuration, the
    data, the weights or the checkpoint cannot work, before the first step where that can be known.
    """
    accelerator = start(cfg.optim.precision, "launch/finetune_dml.py")
    with config_keys({"lost_after": "cluster.lost_after"}):
        shutdown.watch_others(cfg.cluster.lost_after)
    run = Run(Path(cfg.out))
    cfg, source = dist.together(lambda: resolve(cfg))
    sets = dist.together(lambda: open_sets(cfg))
    plan = make_plan(cfg, len(sets.groups.members), len(sets.groups))
    state = dist.together(lambda: build(cfg, source, plan.num_classes, accelerator))
    saved = restore(cfg, plan, state, run, sets) if cfg.resume == "auto" else None
    batches = make_batches(cfg, plan, sets, state.step)
    # All is checked: from here on it may write.
    open_run(run.folder, resolved_config=dump(cfg), resume=cfg.resume == "auto")
    dist.raise_together(cannot_write(run.folder) if dist.is_main() else None)
    if saved is not None:
        rewind(run.folder, saved.step)
        dist.barrier()  # before anybody appends to what was rewound
    meters = Meters(run.folder, total_steps=plan.last_step, start_step=state.step, device=accelerator.device)
    with contextlib.closing(meters), catch_signals() as signal_name:
        meters.say(describe(cfg, plan, state, sets))
        if saved is not None:
            meters.load_state(saved.state["meters"])
            meters.say(f"resumed from {saved.path} at step {saved.step}")
        if is_due(cfg, plan, state.step):
            with meters.aside():
                measure(cfg, plan, state, sets, meters, accelerator)
        since_check: list[StepReport] = []
        stop_vote = StopVote()
        while state.step < plan.last_step:
            rates = rates_at(cfg, plan, state.step)
            since_check.append(train_step(cfg, rates, state, batches, meters, accelerator))
            state.step += 1
            meters.advance(state.step, images=plan.micro_batch)
            ends_epoch = state.step % plan.steps_per_epoch == 0
            if state.teacher is not None and ends_epoch:
                state.teacher.load_state_dict(state.student.state_dict())
            last = state.step == plan.last_step
            flushing = last or state.step % cfg.watch.log_every == 0
            stopping = stop_vote(signal_name(), last=last)
            every = cfg.watch.checkpoint_every
            saving = last or bool(stopping) or (state.step % every == 0 if every else ends_epoch)
            error = None
            if flushing or saving:
                check_gradients(state, run, since_check)
                error = check_samples(cfg, plan.num_samples, state, run, since_check)
                since_check.clear()
            if flushing:
                shown = {"epoch": rates.epoch, "lr": cfg.optim.lr * rates.scale, "sd_weight": rates.sd_weight}
                meters.flush(state.step, num_broken=state.num_broken, **shown)
            if saving or error:
                with meters.aside():
                    save(cfg, state, meters, run, sets)
            if error:
                raise error
            if stopping:
                raise StoppedEarly(f"stopped by {stopping} after step {state.step}; go on with --resume auto")
            if is_due(cfg, plan, state.step):
                with meters.aside():
                    measure(cfg, plan, state, sets, meters, accelerator)
        with meters.aside():
            summarize(cfg, plan, state, sets, run, meters)
    return run.folder


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


def train_step(
    cfg: FinetuneConfig,
    rates: Rates,
    state: State,
    batches: Iterator[LabeledCrops],
    meters: Meters,
    accelerator: Accelerator,
) -> StepReport:
    """Take one optimizer step on the global batch, without waiting for the device."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * rates.scale
    torch.manual_seed(step_seed(cfg.seed, state.step, dist.rank()))  # stochastic depth
    with meters.waiting():
        batch = next(batches)
    device_batch = batch.to(accelerator.device)
    images = normalize(device_batch.images)
    teacher_embeddings = None
    with accelerator.autocast():
        embeddings = state.model(images)
        if state.teacher is not None and rates.sd_weight > 0:
            with torch.no_grad():
                teacher_embeddings = dist.gather_equal(widened(state.teacher(images)))
    losses = batch_losses(
        cfg,
        state,
        dist.gather_with_grad(widened(embeddings)),
        dist.gather_equal(device_batch.labels),
        teacher_embeddings,
        sd_weight=rates.sd_weight,
        seed=step_seed(cfg.seed, state.step, BATCH_SEED),
    )
    accelerator.backward(losses.loss)
    for parameter in state.loss_parameters():
        if parameter.grad is not None:
            parameter.grad = dist.all_reduce_mean(parameter.grad)
    norms = clip_global([*state.student.parameters(), *state.loss_parameters()], cfg.optim.clip_grad)
    values = {"loss": losses.loss, **losses.parts, "grad_norm": torch.linalg.vector_norm(norms)}
    note_bad_gradient(state, values)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.mdr_statistics = losses.mdr_statistics
    for name, value in values.items():
        meters.add(name, value)
    return StepReport(keys=batch.keys, broken=batch.broken)


def save(cfg: FinetuneConfig, state: State, meters: Meters, run: Run, sets: Sets) -> None:
    """Write a checkpoint from which the run goes on as if it had never stopped."""
    meters.sync()
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
        run.checkpoints,
        step=state.step,
        tensors=tensors,
        state={
            "meters": meters.state(),
            "num_broken": state.num_broken,
            "scores": state.scores,
            "order": order_of(cfg, sets),
        },
        optimizer=state.optimizer.state_dict(),
        keep=cfg.watch.keep_checkpoints,
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
