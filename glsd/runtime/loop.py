"""The loop of a training run: the duties after each step, the same for pretraining and fine-tuning."""

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from glsd.cluster import dist
from glsd.errors import INTERRUPTED, StoppedEarly
from glsd.runtime.checkpoint import Checkpoint
from glsd.runtime.guard import StepReport, check_gradients, check_samples
from glsd.runtime.meters import Meters
from glsd.runtime.run import Run, open_run, rewind

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ANSWER = "stopping after this step; press again to stop now"  # to Ctrl-C
STOPPED = "stopped at once; --resume auto goes on from the last checkpoint, if there is one"
GRACE = 3.0  # seconds that the main thread has to end after a second Ctrl-C
LAST = 0  # no signal has this number

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


@dataclass(kw_only=True)
class Duties:
    """What a story does in the loop, and how often."""

    step: Callable[[], StepReport]
    step_numbers: Callable[[int], dict[str, Any]]  # of a step, equal on all ranks, for its row of metrics
    flushed: Callable[[dict[str, Any]], None] = lambda row: None  # looks at a row of metrics
    # Looks at the samples of the steps since the last check.
    checked: Callable[[list[StepReport]], None] = lambda reports: None
    save: Callable[[], None]
    probe: Callable[[], None]
    log_every: int  # steps, as the next two
    save_every: int
    probe_every: int  # 0 = never; otherwise after the last step, too
    saves_before_probe: bool  # a probe may take longer than what a preempted run has left
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
    trackers: Sequence[str],
    check: Callable[[], None] = lambda: None,
) -> Iterator[Training[Config, Plan, State]]:
    """Open the run folder for writing, rewound to ``saved`` after a last ``check``, print ``about``, and catch signals.

    Call it when everything else has been checked: what is refused must leave the folder as it was.
    """
    open_run(run.folder, resolved_config=resolved_config, resume=resume)
    check()
    if saved is not None:
        rewind(run.folder, saved.step)
        dist.barrier()  # before anybody appends to what was rewound
    total, start = plan.last_step, state.step  # type: ignore[attr-defined]
    meters = Meters(
        run.folder,
        total_steps=total,
        start_step=start,
        device=accelerator.device,
        trackers=trackers,
        config=resolved_config,
    )
    with contextlib.closing(meters), catch_signals() as stop_signal:
        meters.say(about)
        if saved is not None:
            meters.load_state(saved.state["meters"])
            meters.say(f"resumed from {saved.path} at step {saved.step}")
        elif resume:
            meters.say(f"no checkpoint in {run.checkpoints}: starting at step 0")
        yield Training(
            cfg=cfg,
            plan=plan,
            state=state,
            run=run,
            accelerator=accelerator,
            meters=meters,
            stop_signal=stop_signal,
        )


def is_probe_due(probe_every: int, step: int, last: bool) -> bool:
    """Tell whether to probe after ``step`` steps: every so many steps (0 = never), and after the last one."""
    return probe_every > 0 and (last or step % probe_every == 0)


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
        probing = is_probe_due(duties.probe_every, step, last)
        saving = (
            last or bool(stopping) or step % duties.save_every == 0 or (probing and duties.saves_before_probe)
        )
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


class BadGradient:
    """The first step whose gradient was not finite; it lives on the device, so that no step waits for it."""

    def __init__(self, device: torch.device):
        self.step = torch.tensor(-1, device=device)  # -1 = none
        self.of_loss = torch.tensor(False, device=device)  # whether this rank's own loss was not finite then

    def note(self, step: int, values: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Note the first step with a bad gradient, the same on every rank, and keep the optimizer from moving from then on."""
        first = ~torch.isfinite(values["grad_norm"]) & (self.step < 0)
        self.step = torch.where(first, step, self.step)
        self.of_loss = torch.where(first, ~torch.isfinite(values["loss"]), self.of_loss)
        # Fused optimizers skip the update where this is 1: the hook that gradient scalers use.
        optimizer.found_inf = (self.step >= 0).float()  # type: ignore[attr-defined]


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], str]]:
    """Record SIGTERM, SIGUSR1 and SIGINT in the block instead of ending the process; yield a function that names the signal.

    It returns "" before a signal. Each process records its own; StopVote makes ranks agree. Launchers and schedulers send
    a signal several times, so repeats change nothing, also after the block: the process is about to end. Ctrl-C is answered
    in one line, and a second one raises KeyboardInterrupt in the block.
    """
    note = ""
    stop_now = threading.Event()

    def leave_note(number: int, _frame: object) -> None:
        nonlocal note
        if stop_now.is_set():
            raise KeyboardInterrupt(STOPPED)
        note = note or signal.Signals(number).name

    before = {number: signal.signal(number, leave_note) for number in SIGNALS}
    try:
        with answer_interrupts(stop_now):
            yield lambda: note
    finally:
        for number, handler in before.items():
            leaving = note and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaving else handler)


@contextlib.contextmanager
def answer_interrupts(stop_now: threading.Event) -> Iterator[None]:
    """Answer the first Ctrl-C in the block on rank 0, and interrupt the main thread at the second, with ``stop_now`` set.

    A thread does it: python handles signals between two operations, and one may take seconds or wait for another rank.
    A main thread that does not leave the block soon is not waited for. A launcher passes a Ctrl-C on, so that it comes twice.
    """
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    passed_on = any(name in os.environ for name in ("WORLD_SIZE", "SLURM_JOB_ID"))
    patience = 2.0 if passed_on else 0.1  # seconds
    has_left = threading.Event()

    def listen() -> None:
        first = None
        while (number := os.read(ours, 1)[0]) != LAST:
            if number != signal.SIGINT or stop_now.is_set():
                continue
            if first is None:
                first = time.monotonic()
                say(ANSWER)
            elif time.monotonic() - first >= patience:
                stop_now.set()
                _thread.interrupt_main(signal.SIGINT)
                if not has_left.wait(GRACE):
                    say(STOPPED)
                    os._exit(INTERRUPTED)

    def say(line: str) -> None:
        if dist.is_main():
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, f"\n{line}\n".encode())  # print() may be in the middle of another line

    thread = threading.Thread(target=listen, daemon=True, name="answer_interrupts")
    thread.start()
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    try:
        yield
    finally:
        has_left.set()
        signal.set_wakeup_fd(before)
        os.write(theirs, bytes([LAST]))
        thread.join()
        for end in (ours, theirs):
            os.close(end)


class StopVote:
    """Lets all ranks stop after the same step, whichever of them got the signal, without waiting for each other.

    The answer to the question of one step is read after the next one, when it has long arrived.
    """

    def __init__(self) -> None:
        self._asked: Callable[[], int] = lambda: 0

    def __call__(self, signal_name: str, *, last: bool) -> str:
        """Return the signal to stop for now, "" to go on, the same on every rank; signal_name: that of this process."""
        number = signal.Signals[signal_name].value if signal_name else 0
        if dist.world_size() > 1:
            before = self._asked()
            if not before and not last:
                self._asked = dist.begin_max(number)
            number = before
        return signal.Signals(number).name if number else ""
