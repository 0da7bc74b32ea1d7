"""Metrics of a run: summed on the device, flushed every few steps to metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glsd.cluster import dist
from glsd.errors import UserError, one_line
from glsd.files import flush
from glsd.runtime.sections import SECTIONS, board_name, numbers
from glsd.runtime.trackers import TENSORBOARD, Trackers

PICTURES = f"{len(SECTIONS) + 1}_pictures"  # the section below all others


class Meters:
    """Collects values between two flushes and writes one row of metrics per flush.

    metrics.jsonl holds the rows; TensorBoard (folder/tensorboard) and other trackers are views of what people watch of
    them. Clock values are under "timing", so that the rest of two runs can be compared bit for bit.
    folder: the run folder. total_steps: of the whole run, for the bar and the time left. start_step: steps done before. A
    resumed run purges TensorBoard from that step on and shows the kept rows of the step again. device: of added tensors.
    trackers: "tensorboard", "wandb", "mlflow". config: of the run, YAML, for trackers. Raises UserError for a
    tracker that cannot start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        start_step: int,
        device: torch.device,
        trackers: Sequence[str] = (TENSORBOARD,),
        config: str = "",
    ) -> None:
        self._folder, self._device, self._total = folder, device, total_steps
        self._dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._sums: dict[str, Tensor | int | float] = {}
        self._counts: dict[str, float] = {}
        self._totals: dict[str, int | float] = {}
        self._step = start_step
        self._started = time.perf_counter()
        self._start_window()
        self._file = self._board = self._bar = self._trackers = None
        if dist.is_main():
            path = folder / "metrics.jsonl"
            self._file = path.open("a", buffering=1)
            self._trackers = Trackers(trackers, folder, config, say=self.say)
            if TENSORBOARD in trackers:
                # From the step of the checkpoint itself: its probe runs again.
                self._board = _summary_writer(folder / "tensorboard", purge_step=start_step)
            for row in _rows_of(path, start_step):
                self._show(row, again=True)
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def add(self, name: str, value: Tensor | int | float) -> None:
        """Add a value to the mean of ``name`` over window and ranks, without waiting for a 0-d tensor."""
        if isinstance(value, Tensor):
            value = value.detach().to(self._dtype)
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def count(self, name: str, amount: int | float) -> None:
        """Take an amount whose sum over window and ranks is wanted (a number on the host)."""
        self._totals[name] = self._totals.get(name, 0.0) + amount

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the block as waiting for data, by the host's clock: for a GPU with queued work an upper bound."""
        start, before = time.perf_counter(), dist.doing("waiting")
        yield
        dist.doing(before)
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the block (a probe, a save) from images/s, step time and data wait."""
        start, before = time.perf_counter(), dist.doing("aside")
        yield
        dist.doing(before)
        self._window_start += time.perf_counter() - start

    def advance(self, step: int, images: int) -> None:
        """Record that ``step`` is done and used ``images`` images on this rank."""
        self._images += images
        dist.doing(str(step))
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._window_steps += step - self._step
        self._step = step

    def flush(self, step: int, **extra: int | float) -> dict[str, Any]:
        """Write one row of everything added since the last flush and return it, the same on every rank.

        This is a collective call and the only host synchronization. extra: host numbers equal on all ranks (epoch,
        schedules). The row has step, extra, means, totals, and "timing" with images_per_s (all ranks), data_wait (share of
        the time, 0..1), step_s and elapsed_s (of this process).
        """
        values = self._read()
        row = {"step": step, **extra, **values, "timing": self._timing()}
        self.write(row)
        self._say_row(row)
        self._sums, self._counts, self._totals = {}, {}, {}
        self._start_window()
        return row

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, which has a ``step``, to metrics.jsonl and TensorBoard, on rank 0.

        JSON has no NaN and no infinity. They are written as the strings "nan", "inf", "-inf", which float() reads.
        """
        if self._file is None:
            return
        with self._disk():
            self._file.write(json.dumps(_for_json(row), allow_nan=False) + "\n")
            self._show(row)

    def _show(self, row: Mapping[str, Any], *, again: bool = False) -> None:
        """Show a row in TensorBoard, and unless it is shown again, in the other trackers, which forget nothing."""
        named = ((board_name(name), value) for name, value in numbers(row).items())
        shown = {name: value for name, value in named if name is not None}
        if self._board is not None:
            for name, value in shown.items():
                self._board.add_scalar(name, value, row["step"])
        if self._trackers is not None and not again:
            self._trackers.log(shown, row["step"])

    def picture(self, name: str, file: Path) -> None:
        """Show a PNG of this step in the trackers, on rank 0."""
        if self._trackers is None:
            return
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        if self._board is not None:
            self._board.add_image(f"{PICTURES}/{name}", pixels, self._step, dataformats="HWC")
        self._trackers.picture(f"{PICTURES}/{name}", pixels, self._step)

    def projector(
        self, vectors: Float[Tensor, "n d"], thumbnails: UInt8[Tensor, "n 3 h w"], titles: list[str]
    ) -> None:
        """Show vectors in TensorBoard's projector, with a thumbnail and a title each, on rank 0."""
        if self._board is not None:
            self._board.add_embedding(
                vectors, metadata=titles, label_img=thumbnails.float() / 255, global_step=self._step
            )

    def say(self, line: str) -> None:
        """Print a line on rank 0 without breaking the progress bar."""
        if dist.is_main():
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def sync(self) -> None:
        """Flush the files to the disk itself, before the checkpoint that relies on them, on rank 0."""
        if self._file is None:
            return
        with self._disk():
            flush(self._file)
            if self._board is not None:
                self._board.flush()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        before = dist.doing("aside")
        try:
            yield
        except OSError as problem:
            raise UserError(
                f"cannot write the metrics of {self._folder}: {one_line(problem)}; free space or make it writable, "
                "then go on with --resume auto"
            ) from problem
        finally:
            dist.doing(before)

    def close(self) -> None:
        """Close the files and the bar."""
        dist.doing("closing")
        self.sync()
        for part in (self._file, self._board, self._bar, self._trackers):
            if part is not None:
                part.close()
        self._file = self._board = self._bar = self._trackers = None

    def state(self) -> list[dict[str, Any]]:
        """Return what is not flushed yet as JSON values, one entry per rank, for the checkpoint (a collective call)."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return dist.gather_objects({"sums": sums, "counts": dict(self._counts), "totals": dict(self._totals)})

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Continue from ``state()``: the next row is bitwise what it would have been without the interruption.

        With another number of ranks the entries are distributed again, and the row is the same up to rounding.
        """
        self._sums, self._counts, self._totals = {}, {}, {}
        share = dist.world_size() / len(states)  # a step counts once, however many ranks took it
        for state in states[dist.rank() :: dist.world_size()]:
            for name, value in state["sums"].items():
                self._sums[name] = self._sums.get(name, 0.0) + share * value
                self._counts[name] = self._counts.get(name, 0) + share * state["counts"][name]
            for name, value in state["totals"].items():
                self.count(name, value)

    def _start_window(self) -> None:
        self._window_start = time.perf_counter()
        self._waited, self._images, self._window_steps = 0.0, 0, 0

    def _read(self) -> dict[str, float]:
        # Ranks may hold different names (only one met a broken sample); the vectors must agree to be reduced.
        names = sorted(set().union(*dist.gather_objects(sorted(self._sums))))
        totals = sorted(set().union(*dist.gather_objects(sorted(self._totals))))
        like = torch.zeros(1, dtype=self._dtype, device=self._device)
        sums = [like + self._sums.get(n, 0.0) for n in names]
        host = [float(self._counts.get(n, 0)) for n in names] + [self._totals.get(n, 0.0) for n in totals]
        packed = torch.cat([*sums, like.new_tensor(host)])
        numbers = dist.all_reduce_sum(packed).tolist()
        means = {n: numbers[i] / numbers[len(names) + i] for i, n in enumerate(names)}
        return means | dict(zip(totals, numbers[2 * len(names) :], strict=True))

    def _timing(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._window_start, 1e-9)
        gathered = dist.gather_objects((self._images, self._waited / seconds, seconds))
        images, waits, durations = zip(*gathered, strict=True)
        return {
            "images_per_s": sum(images) / max(durations),
            "data_wait": sum(waits) / len(waits),
            "step_s": seconds / max(self._window_steps, 1),
            "elapsed_s": time.perf_counter() - self._started,
        }

    def _say_row(self, row: Mapping[str, Any]) -> None:
        timing = row["timing"]
        brief = {
            "loss": f"{row['loss']:.4f}" if "loss" in row else "-",
            "images/s": f"{timing['images_per_s']:.1f}",
            "data wait": f"{timing['data_wait']:.0%}",
        }
        if self._bar is not None:
            self._bar.set_postfix(brief)
        else:
            left = timing["step_s"] * max(self._total - row["step"], 0)
            text = "  ".join(f"{name} {value}" for name, value in brief.items())
            self.say(f"step {row['step']}/{self._total}  {text}  left {tqdm.format_interval(left)}")


def _summary_writer(folder: Path, *, purge_step: int):
    from torch.utils.tensorboard import SummaryWriter  # a second of import that only rank 0 of a run needs

    return SummaryWriter(str(folder), purge_step=purge_step)


def _rows_of(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the rows of one step that a resumed run has kept, with "nan" and "inf" as numbers."""
    with path.open() as lines:
        rows = [json.loads(line) for line in lines if f'"step": {step},' in line]
    return [
        {name: float(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
        if row["step"] == step
    ]


def _for_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _for_json(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
