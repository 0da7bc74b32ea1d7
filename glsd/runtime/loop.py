"""The loop of a training run: the duties after each step, the same for pretraining, fine-tuning and the dry run."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from accelerate import Accelerator

from glsd.cluster import dist
from glsd.errors import StoppedEarly
from glsd.runtime.checkpoint import Checkpoint
from glsd.runtime.guard import StepReport, check_gradients, check_samples
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run, StopVote, catch_signals, open_run, rewind

Config = TypeVar("Config")
Plan = TypeVar("Plan")
State = TypeVar("State")


@dataclass(kw_only=True)
class Training(Generic[Config, Plan, State]):
    """What a run carries from step to step."""

    cfg: Config
    plan: Plan
    state: State
    run: Run
    accelerator: Accelerator
    meters: Meters
    stop_signal: Callable[[], str] = lambda: ""  # the name of the signal that this process got, "" for none


class Duties(NamedTuple):
    """What a story does in the loop, and how often."""

    step: Callable[[], StepReport]
    step_numbers: Callable[[int], dict[str, Any]]  # of a step, equal on all ranks, for its row of metrics
    flushed: Callable[[dict[str, Any]], None]  # looks at a row of metrics
    checked: Callable[
        [list[StepReport]], None
    ]  # looks at the samples that the steps since the last check used
    save: Callable[[], None]
    probe: Callable[[], None]
    is_save_due: Callable[[int], bool]  # after so many steps
    is_probe_due: Callable[[int], bool]
    log_every: int
    batch_size: int
    max_bad_fraction: float


@contextlib.contextmanager
def open_training(
    cfg: Config,
    plan: Plan,
    state: State,
    run: Run,
    accelerator: Accelerator,
    *,
    saved: Checkpoint | None,
    resolved_config: str,
    resume: bool,
    about: str,
) -> Iterator[Training[Config, Plan, State]]:
    """Open the run folder for writing, rewound to ``saved``, say what the run is about, and catch signals.

    Call it when everything else has been checked: what is refused must leave the folder as it was.
    """
    open_run(run.folder, resolved_config=resolved_config, resume=resume)
    if saved is not None:
        rewind(run.folder, saved.step)
        dist.barrier()  # before anybody appends to what was rewound
    total, start = plan.last_step, state.step  # type: ignore[attr-defined]
    meters = Meters(run.folder, total_steps=total, start_step=start, device=accelerator.device)
    with contextlib.closing(meters), catch_signals() as stop_signal:
        meters.say(about)
        if saved is not None:
            meters.load_state(saved.state["meters"])
            meters.say(f"resumed from {saved.path} at step {saved.step}")
        yield Training(
            cfg=cfg,
            plan=plan,
            state=state,
            run=run,
            accelerator=accelerator,
            meters=meters,
            stop_signal=stop_signal,
        )


def take_steps(t: Training, duties: Duties) -> None:
    """Take steps up to the last one; after each do what is due: flush, vote, check, save, stop, probe.

    Raises StoppedEarly after saving if any rank got a signal, UserError for gradients that are not finite and for too many
    samples that cannot be read.
    """
    reports: list[StepReport] = []
    stop_vote = StopVote()
    while t.state.step < t.plan.last_step:
        reports.append(duties.step())
        t.state.step += 1
        step = t.state.step
        t.meters.advance(step, images=t.plan.rank_images)
        last = step == t.plan.last_step
        flushing = last or step % duties.log_every == 0
        stopping = stop_vote(t.stop_signal(), last=last)
        probing = duties.is_probe_due(step)
        # Before a probe, too: it may take longer than what a preempted run has left.
        saving = last or bool(stopping) or probing or duties.is_save_due(step)
        error = None
        if flushing or saving:
            check_gradients(t.state, t.run, reports)
            duties.checked(reports)
            error = check_samples(
                t.state,
                t.run,
                reports,
                batch_size=duties.batch_size,
                epoch_samples=t.plan.num_samples,
                max_bad_fraction=duties.max_bad_fraction,
            )
            reports.clear()
        if flushing:
            numbers = duties.step_numbers(step - 1)
            duties.flushed(t.meters.flush(step, num_broken=t.state.num_broken, **numbers))
        if saving or error:
            with t.meters.aside():
                duties.save()
        if error:
            raise error
        if stopping:
            raise StoppedEarly(f"stopped by {stopping} after step {step}; go on with --resume auto")
        if probing:
            with t.meters.aside():
                duties.probe()
