"""One pretraining step, top to bottom: every change of a weight or a statistic is one named line."""

from collections.abc import Iterator

import torch
from jaxtyping import Float32
from torch import Tensor

from glsd.batches import CropBatch
from glsd.cluster import dist, fsdp
from glsd.config.pretrain import PretrainConfig
from glsd.data.photometric import photometric
from glsd.losses.center import ema_center
from glsd.optim import CLIPPERS, ema_update
from glsd.pretrain.networks import State
from glsd.pretrain.objective import mean_logits, run_teacher, step_values
from glsd.pretrain.plan import Plan, Rates, rates_at
from glsd.rng import step_seed
from glsd.runtime.guard import StepReport
from glsd.runtime.loop import Training


def next_step(t: Training[PretrainConfig, Plan, State], batches: Iterator[CropBatch]) -> StepReport:
    """Take the step that the state is at, with the scheduled rates."""
    return train_step(t, rates_at(t.cfg, t.plan, t.state.step), batches)


def train_step(
    t: Training[PretrainConfig, Plan, State], rates: Rates, batches: Iterator[CropBatch]
) -> StepReport:
    """Take one optimizer step, without waiting for the device; from the first bad gradient on the weights do not move."""
    cfg, plan, state = t.cfg, t.plan, t.state
    decay, no_decay = state.optimizer.param_groups
    decay["lr"], decay["weight_decay"], no_decay["lr"] = rates.lr, rates.weight_decay, rates.lr
    torch.manual_seed(step_seed(cfg.seed, state.step, dist.rank()))  # stochastic depth
    used, losses = [], []
    for number, share in enumerate(plan.shares, start=1):
        with t.meters.waiting():
            used.append(next(batches))
        batch = used[-1].to(t.accelerator.device)
        global_crops, local_crops = augment(batch)
        with t.accelerator.autocast():
            temp, iterations = rates.teacher_temp, plan.sinkhorn_iterations
            targets = run_teacher(state.teacher, global_crops, state.centers, temp, iterations)
        # Gradients travel between ranks with the last micro-batch only.
        with fsdp.gradient_sync(state.model, number == len(plan.shares)):
            losses.append(state.model(global_crops, local_crops, batch.match, targets))
            t.accelerator.backward(losses[-1].total * share)
    fsdp.collect_gradients(state.student)
    student, teacher = fsdp.local_parameters(state.student), fsdp.local_parameters(state.teacher)
    clip = CLIPPERS[cfg.optim.clip_mode]
    norms = clip(student.values(), cfg.optim.clip_grad, sharded=fsdp.is_sharded(state.student))
    values = {**step_values(losses, plan.shares), "grad_norm": torch.linalg.vector_norm(norms)}
    state.bad_gradient.note(state.step, values, state.optimizer)
    if rates.freeze_prototypes:
        for name, parameter in student.items():
            if "prototypes" in name:
                parameter.grad = None
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    ema_update(teacher, student, rates.momentum)
    for kind, mean in mean_logits(losses, plan.shares).items():
        state.centers[kind] = ema_center(state.centers[kind], mean, cfg.loss.center_momentum)
    for name, value in values.items():
        t.meters.add(name, value)
    return StepReport(sum((batch.keys for batch in used), ()), sum((batch.broken for batch in used), ()))


def augment(
    batch: CropBatch,
) -> tuple[Float32[Tensor, "g b 3 h w"], Float32[Tensor, "l b 3 hl wl"]]:
    """Return the global and the local crops with changed colors, normalized, on the device they are on."""
    global_crops = photometric(batch.global_crops, batch.global_photometric)
    return global_crops, photometric(batch.local_crops, batch.local_photometric)
