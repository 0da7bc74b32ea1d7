"""One metric-learning step on the global batch, top to bottom."""

from collections.abc import Iterator

import torch

from glsd.batches import LabeledCrops
from glsd.cluster import dist
from glsd.config.finetune import FinetuneConfig
from glsd.data.photometric import normalize
from glsd.finetune.networks import State
from glsd.finetune.objective import batch_losses
from glsd.finetune.plan import Plan, Rates
from glsd.optim import clip_global
from glsd.precision import widened
from glsd.rng import step_seed
from glsd.runtime.guard import StepReport
from glsd.runtime.loop import Training

BATCH_SEED = -1  # in place of a rank: draws that all ranks share


def train_step(
    t: Training[FinetuneConfig, Plan, State], rates: Rates, batches: Iterator[LabeledCrops]
) -> StepReport:
    """Take one optimizer step on the global batch, without waiting for the device."""
    cfg, state = t.cfg, t.state
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * rates.scale
    torch.manual_seed(step_seed(cfg.seed, state.step, dist.rank()))  # stochastic depth
    with t.meters.waiting():
        batch = next(batches)
    device_batch = batch.to(t.accelerator.device)
    images = normalize(device_batch.images)
    teacher_embeddings = None
    with t.accelerator.autocast():
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
    t.accelerator.backward(losses.loss)
    for parameter in state.loss_parameters():
        if parameter.grad is not None:
            parameter.grad = dist.all_reduce_mean(parameter.grad)
    norms = clip_global([*state.student.parameters(), *state.loss_parameters()], cfg.optim.clip_grad)
    values = {"loss": losses.loss, **losses.parts, "grad_norm": torch.linalg.vector_norm(norms)}
    state.bad_gradient.note(state.step, values, state.optimizer)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.mdr_statistics = losses.mdr_statistics
    if state.teacher is not None and (state.step + 1) % t.plan.steps_per_epoch == 0:
        state.teacher.load_state_dict(state.student.state_dict())
    for name, value in values.items():
        t.meters.add(name, value)
    return StepReport(keys=batch.keys, broken=batch.broken)
