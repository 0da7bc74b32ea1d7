"""Reports of a pretraining run: its description, health warnings, the samples."""

import itertools
from typing import Any

from glsd.cluster import dist
from glsd.config.parse import differences
from glsd.config.pretrain import PretrainConfig
from glsd.errors import with_config_keys
from glsd.pretrain.networks import State
from glsd.pretrain.plan import Plan
from glsd.runtime import health
from glsd.runtime.guard import StepReport
from glsd.runtime.loop import Training
from glsd.runtime.run import append_rows

# What the health rules call a setting -> its key.
HEALTH_KEYS = {
    key.partition(".")[2]: key
    for key in (
        "data.global_scale",
        "data.local_scale",
        "data.num_workers",
        "head.batch_norm",
        "head.num_prototypes",
        "loss.center_momentum",
        "loss.centering",
        "loss.global_weight",
        "loss.hinge",
        "loss.hinge_factor",
        "loss.local_weight",
        "loss.teacher_temp",
        "loss.warmup_teacher_temp",
        "optim.batch_size",
        "optim.clip_grad",
        "optim.lr",
        "optim.precision",
        "optim.teacher_momentum",
        "optim.warmup_epochs",
    )
}


def describe(cfg: PretrainConfig, plan: Plan, state: State) -> str:
    """Return what a user wants to see before a long run: how this one differs, how large and how long it is."""
    backbone = state.student.backbone
    millions = {
        name: sum(p.numel() for p in net.parameters()) / 1e6
        for name, net in (("backbone", backbone), ("all", state.student))
    }
    lines = [
        f"configuration beside the defaults: {' '.join(f'{key}={value}' for key, value in differences(cfg).items()) or 'none'}",
        f"{cfg.model.backbone}: {millions['backbone']:.2f} M parameters, {millions['all']:.2f} M with heads",
        f"{plan.num_samples} images, {plan.steps_per_epoch} steps an epoch, {plan.last_step} of {plan.total_steps} steps, "
        f"{dist.world_size()} ranks x {len(plan.micro_batches)} x {plan.micro_batches[0]} images",
    ]
    if backbone.load_report is not None:
        lines.append(f"weights from {cfg.model.init}: {backbone.load_report}")
    return "\n".join(lines)


def advise(t: Training[PretrainConfig, Plan, State], values: dict[str, Any]) -> None:
    """Warn once about what looks unhealthy in values of a flush or a probe, and name the key to change."""
    warmup = max(t.cfg.optim.warmup_epochs, t.cfg.optim.freeze_prototypes_epochs)
    findings = health.check(
        values,
        num_prototypes=t.cfg.head.num_prototypes,
        embed_dim=t.state.student.backbone.embed_dim,
        early=t.state.step < warmup * t.plan.steps_per_epoch,
    )
    for finding in findings:
        if finding.kind not in t.state.advised:
            t.state.advised.add(finding.kind)
            t.meters.say(f"warning at step {t.state.step}: {with_config_keys(finding.line, HEALTH_KEYS)}")


def log_samples(t: Training[PretrainConfig, Plan, State], reports: list[StepReport]) -> None:
    """Write down epoch and key of every sample of the last steps, step by step, in the order of the epoch."""
    first = t.state.step - len(reports)
    ranks_keys = dist.gather_objects([report.keys for report in reports])
    rows = []
    for number, step_keys in enumerate(zip(*ranks_keys, strict=True)):
        epoch = (first + number) // t.plan.steps_per_epoch
        # Ranks take the positions of a batch in turns.
        keys = [key for turn in itertools.zip_longest(*step_keys) for key in turn if key is not None]
        rows.append({"step": first + number + 1, "samples": [(epoch, key) for key in keys]})
    dist.together(lambda: append_rows(t.run.samples, rows))
