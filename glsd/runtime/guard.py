"""What ends a training run before it does harm: gradients that are not finite, too many samples that cannot be read."""

import itertools
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from glsd.batches import BrokenSample
from glsd.cluster import dist
from glsd.config.finetune import FinetuneConfig
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from glsd.pretrain.plan import Plan
from glsd.runtime.run import Run, append_rows


@runtime_checkable
class Watched(Protocol):
    """What the state of a training run has for its guard."""

    optimizer: torch.optim.Optimizer
    bad_step: Tensor  # first step whose gradients were not finite, -1 = none; on the device
    bad_loss: Tensor  # whether this rank's own loss was not finite then; on the device
    step: int  # optimizer steps done
    num_broken: int  # samples replaced so far, over all ranks


class StepReport(NamedTuple):
    """Which samples one step used on this rank, and which could not be read."""

    keys: tuple[str, ...]
    broken: tuple[BrokenSample, ...]


def note_bad_gradient(state: Watched, values: dict[str, Tensor]) -> None:
    """Note the first step with a bad gradient and keep the optimizer from moving on it, all on the device.

    Gradients are averages over ranks, so every rank notes the same step; whose loss was to blame is each rank's own note.
    """
    fine = torch.isfinite(values["grad_norm"])
    first = ~fine & (state.bad_step < 0)
    state.bad_step = torch.where(first, state.step, state.bad_step)
    state.bad_loss = torch.where(first, ~torch.isfinite(values["loss"]), state.bad_loss)
    # Fused optimizers skip the update where this is 1: the hook that gradient scalers use.
    state.optimizer.found_inf = (state.bad_step >= 0).float()  # type: ignore[attr-defined]


def check_gradients(state: Watched, run: Run, reports: list[StepReport]) -> None:
    """Stop on every rank if a gradient since the last check was not finite."""
    bad_step = int(state.bad_step)
    if bad_step >= 0:
        mine = reports[bad_step - state.step].keys if bool(state.bad_loss) else ()
        blamed = {rank: keys for rank, keys in enumerate(dist.gather_objects(mine)) if keys}
        where = "; ".join(
            f"rank {rank}, samples {' '.join(map(ascii, keys))}" for rank, keys in blamed.items()
        )
        raise UserError(
            f"step {bad_step + 1}: the {'loss' if blamed else 'gradient'} is not finite ({where or 'on every rank'}); nothing was "
            f"updated from it on and {run.checkpoints} keeps the last good checkpoint: lower optim.lr "
            "(a longer warm-up helps pretraining), or look at those samples"
        )


def check_samples(
    cfg: PretrainConfig | FinetuneConfig,
    num_samples: int,
    state: Watched,
    run: Run,
    reports: list[StepReport],
) -> UserError | None:
    """Write down the samples that could not be read since the last check; return an error if they have become too many."""
    first = state.step - len(reports)
    rows = [
        {"step": first + i + 1, **broken._asdict()}
        for i, report in enumerate(reports)
        for broken in report.broken
    ]
    rows = [row for ranks_rows in dist.gather_objects(rows) for row in ranks_rows]
    error = None
    try:
        append_rows(
            run.quarantine, sorted(rows, key=lambda row: (row["step"], row["epoch"], row["position"]))
        )
    except UserError as problem:
        error = problem
    dist.raise_together(error)
    state.num_broken += len(rows)
    seen = max(state.step * cfg.optim.batch_size, num_samples)  # no verdict on the first few samples
    if state.num_broken > cfg.data.max_bad_fraction * seen:
        return UserError(
            f"{state.num_broken} samples could not be read, more than data.max_bad_fraction {cfg.data.max_bad_fraction} of "
            f"{seen}: see {run.quarantine}, repair the shards or raise data.max_bad_fraction, then go on with --resume auto"
        )
    return None


def log_samples(plan: Plan, state: Watched, run: Run, reports: list[StepReport]) -> None:
    """Write down epoch and key of every sample since the last check, step by step, in the order of the epoch."""
    first = state.step - len(reports)
    ranks_keys = dist.gather_objects([report.keys for report in reports])
    rows = []
    for number, step_keys in enumerate(zip(*ranks_keys, strict=True)):
        epoch = (first + number) // plan.steps_per_epoch
        # Ranks take the positions of a batch in turns.
        keys = [key for turn in itertools.zip_longest(*step_keys) for key in turn if key is not None]
        rows.append({"step": first + number + 1, "samples": [(epoch, key) for key in keys]})
    dist.together(lambda: append_rows(run.samples, rows))
