"""Stops a training run before it does harm: gradients that are not finite, too many samples that cannot be read."""

from typing import Any, NamedTuple

from glsd.batches import BrokenSample
from glsd.cluster import dist
from glsd.errors import UserError
from glsd.runtime.run import Run, append_rows


class StepReport(NamedTuple):
    """Which samples one step used on this rank, and which could not be read."""

    keys: tuple[str, ...]
    broken: tuple[BrokenSample, ...]


def check_gradients(state: Any, run: Run, reports: list[StepReport]) -> None:
    """Stop on every rank if a gradient since the last check was not finite; ``reports``: of the steps since then."""
    bad_step = int(state.bad_gradient.step)
    if bad_step < 0:
        return
    mine = reports[bad_step - state.step].keys if bool(state.bad_gradient.of_loss) else ()
    blamed = {rank: keys for rank, keys in enumerate(dist.gather_objects(mine)) if keys}
    where = "; ".join(f"rank {rank}, samples {' '.join(map(ascii, keys))}" for rank, keys in blamed.items())
    raise UserError(
        f"step {bad_step + 1}: the {'loss' if blamed else 'gradient'} is not finite ({where or 'on every rank'}); nothing was "
        f"updated from it on and {run.checkpoints} keeps the last good checkpoint: lower lr "
        "(a longer warm-up helps pretraining), or look at those samples"
    )


def check_samples(
    state: Any,
    run: Run,
    reports: list[StepReport],
    *,
    batch_size: int,
    epoch_samples: int,
    max_bad_fraction: float,
) -> UserError | None:
    """Write down the samples that could not be read since the last check; return an error if they have become too many."""
    first = state.step - len(reports)
    rows = [
        {"step": first + i + 1, **broken._asdict()}
        for i, report in enumerate(reports)
        for broken in report.broken
    ]
    rows = [row for ranks_rows in dist.gather_objects(rows) for row in ranks_rows]
    rows.sort(key=lambda row: (row["step"], row["epoch"], row["position"]))
    dist.together(lambda: append_rows(run.quarantine, rows))
    state.num_broken += len(rows)
    seen = max(state.step * batch_size, epoch_samples)  # no verdict on the first few samples
    if state.num_broken <= max_bad_fraction * seen:
        return None
    return UserError(
        f"{state.num_broken} samples could not be read, more than max_bad_fraction {max_bad_fraction} of {seen}: see "
        f"{run.quarantine}, repair the shards or raise max_bad_fraction, then go on with --resume auto"
    )
