"""The dry run: a few real steps tell whether a run fits into memory and how long it takes. It writes nothing."""

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from glsd.batches import CropBatch
from glsd.cluster import dist, fsdp
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from glsd.precision import cpu_multiplies_bf16
from glsd.pretrain.networks import State
from glsd.pretrain.plan import Plan, rates_at
from glsd.pretrain.probe import open_probe
from glsd.pretrain.report import describe
from glsd.pretrain.step import train_step
from glsd.pretrain.train import make_batches, restore, set_up
from glsd.runtime.loop import Training
from glsd.runtime.memory import grown_since, mark_memory, total_memory
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run

MIB, GIB = 2**20, 2**30
# Seconds after which no further step is taken, and how many are at most. Warming up takes at least one step and ends when
# the batches that the loader had ready are used up: they came at no cost.
WARMUP_SECONDS, MEASURE_SECONDS, MAX_STEPS = 30.0, 30.0, 20
GPU_WARMUP_STEPS = 3  # compiling, choosing kernels
OUT_OF_MEMORY = "can't allocate memory"  # what torch says of the CPU's


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will need; bytes on this rank's device."""

    parameters: dict[str, int]  # student: 'backbone', 'heads'
    memory: dict[str, int]  # 'weights', 'teacher', 'gradients', 'optimizer state', 'activations and loss'
    device_memory: int
    images_per_s: float  # of all ranks
    data_wait: float  # share of the time, 0..1
    step_s: float
    steps_left: int

    @property
    def hours(self) -> float:
        """Hours to the end of the run, without checkpoints and probes."""
        return self.steps_left * self.step_s / 3600


def forecast(cfg: PretrainConfig) -> Forecast:
    """Build the run that is configured, take a few of its steps and print what it will need.

    With resume 'auto' and a checkpoint in the run folder it looks from there to the end. The run folder is only read.
    Raises the UserErrors of training, and one if the steps do not fit into the memory.
    """
    cfg, accelerator, shards, plan, state = set_up(cfg)
    run = Run(Path(cfg.out))
    if cfg.resume == "auto" and restore(cfg, state, run, shards) is None and dist.is_main():
        print(f"no checkpoint in {run.checkpoints}: looking at a run from step 0", flush=True)
    open_probe(cfg, shards)
    steps_left = max(0, plan.last_step - state.step)
    batches = make_batches(cfg, state, shards)
    restored = size(optimizer_tensors(state))
    mark = mark_memory(accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        meters = Meters(
            run.folder, total_steps=plan.last_step, start_step=state.step, device=accelerator.device
        )
        with contextlib.closing(meters):
            meters.say("dry run: a few steps, nothing is kept\n" + describe(cfg, plan, state))
            t = Training(cfg=cfg, plan=plan, state=state, run=run, accelerator=accelerator, meters=meters)
            timing = measure(t, batches)
    found = Forecast(
        parameters={
            "backbone": count(state.student.backbone.parameters()),
            "heads": count(state.student.parameters()) - count(state.student.backbone.parameters()),
        },
        memory=memory_of(state, restored + grown_since(mark, accelerator.device)),
        device_memory=total_memory(accelerator.device),
        images_per_s=timing["images_per_s"],
        data_wait=timing["data_wait"],
        step_s=timing["step_s"],
        steps_left=steps_left,
    )
    if dist.is_main():
        print(report(found, accelerator.device, cfg.optim.precision), flush=True)
    return found


def measure(t: Training[PretrainConfig, Plan, State], batches: Iterator[CropBatch]) -> dict[str, float]:
    """Return the timing of the meters over some steps after the warm-up; every rank takes as many."""
    cfg, plan, device = t.cfg, t.plan, t.accelerator.device
    ready = 2 * cfg.data.num_workers // len(plan.micro_batches)  # what the DataLoader fetches ahead
    least = GPU_WARMUP_STEPS if device.type == "cuda" else 1
    try:
        for seconds, fewest, most in (
            (WARMUP_SECONDS, least, least + ready),
            (MEASURE_SECONDS, 2, MAX_STEPS),
        ):
            begin, done = time.perf_counter(), 0
            while done < fewest or (done < most and go_on(begin, seconds)):
                rates = rates_at(cfg, plan, min(t.state.step, plan.last_step - 1))
                # As in all but the first epochs: frozen prototypes have no moments yet.
                train_step(t, replace(rates, freeze_prototypes=False), batches)
                t.state.step += 1
                done += 1
                t.meters.advance(t.state.step, images=plan.rank_images)
            row = t.meters.flush(t.state.step)
    except RuntimeError as problem:
        if not isinstance(problem, torch.OutOfMemoryError) and OUT_OF_MEMORY not in str(problem):
            raise
        raise UserError(
            f"optim.batch_size {cfg.optim.batch_size} does not fit into {total_memory(device) / GIB:.0f} GiB of "
            f"{device.type} memory ({plan.micro_batches[0]} images at a time): set a lower optim.micro_batch, or lower "
            "head.num_prototypes"
        ) from problem
    return row["timing"]


def go_on(begin: float, seconds: float) -> bool:
    """Tell whether there is time for another step: the main rank's clock decides for all."""
    return dist.broadcast_object(time.perf_counter() - begin < seconds)


def memory_of(state: State, beyond: int) -> dict[str, int]:
    """Return what the memory is for: of the peak beyond both networks the rest is activations and loss."""
    student, teacher = (fsdp.local_parameters(network).values() for network in (state.student, state.teacher))
    known = {
        "weights": size([*student, *state.student.buffers()]),
        "teacher": size([*teacher, *state.teacher.buffers()]),
        "gradients": size(parameter for parameter in student if parameter.requires_grad),
        "optimizer state": size(optimizer_tensors(state)),
    }
    return {
        **known,
        "activations and loss": max(0, beyond - known["gradients"] - known["optimizer state"]),
    }


def optimizer_tensors(state: State) -> list[Tensor]:
    held = [value for values in state.optimizer.state.values() for value in values.values()]
    return [value for value in held if isinstance(value, Tensor)]


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def report(found: Forecast, device: torch.device, precision: str) -> str:
    """Return the forecast as a user reads it."""
    needed = sum(found.memory.values())
    how = {"no": "float32", "bf16": "bfloat16"}[precision]
    if device.type == "cpu":
        how += f", {torch.get_num_threads()} CPU threads a rank"
    heads, backbone = found.parameters["heads"], found.parameters["backbone"]
    lines = [
        f"parameters: {(backbone + heads) / 1e6:.2f} M ({backbone / 1e6:.2f} M backbone, {heads / 1e6:.2f} M heads), "
        "twice with the teacher",
        f"memory: {needed / MIB:.0f} MiB of {found.device_memory / MIB:.0f} MiB ({device.type}) on each rank, besides libraries"
        + (" and loader processes" if device.type == "cpu" else ""),
        *(f"  {name:<22}{amount / MIB:9.1f} MiB" for name, amount in found.memory.items()),
        f"speed: {found.images_per_s:.1f} images/s ({how}), {found.step_s:.3f} s a step, "
        f"{found.data_wait:.0%} of it waiting for data",
        f"to the end: {found.steps_left} steps, {found.hours:.2f} hours, without checkpoints and probes",
    ]
    if precision == "bf16" and device.type == "cpu" and not cpu_multiplies_bf16():
        lines.append("slow because this CPU has no bfloat16 instructions: set optim.precision to no")
    if needed > 0.9 * found.device_memory:
        lines.append(
            "warning: less than a tenth of the memory is left: set optim.micro_batch below the images of a rank"
        )
    return "\n".join(lines)
