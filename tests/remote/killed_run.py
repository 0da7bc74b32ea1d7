"""Runs on a few uneven shards, how to kill one at random moments, and what is compared afterwards."""

import json
import time
from pathlib import Path

from glsd.data.order import EpochOrder, epoch_length
from glsd.shards.store import open_shards
from tests.helpers import small_shards, uneven_run
from tests.helpers.uneven_run import steps_written
from tests.remote.warm import Started, Warm

SIZES = (5, 13, 2, 9, 17, 1, 7, 3, 11, 4)  # samples per shard: 72, 12 batches of 6, 1.6 MB
CACHE_BYTES = 1_100_000  # the largest two windows fit, all shards do not
ROOMY = 100_000_000


def pack_uneven(folder: Path) -> None:
    """Write SIZES[i] images of about 19 KB into ``folder/train-<i>.tar``, with an index each."""
    small_shards.pack_uneven(folder, SIZES, side=80)


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def argv_of(out: Path, shards: str, **changes: object) -> list[str]:
    """The command line of a run with a loader process, for two windows of shards; it goes on if there is a checkpoint."""
    ours = {"data__num_workers": 1, "data__window_shards": 2, "optim__epochs": 11, "optim__batch_size": 6}
    return uneven_run.argv_of(out, shards, **(ours | changes))


def cache_environment(cache: Path, *, num_bytes: int = CACHE_BYTES, timeout: float = 60) -> dict[str, str]:
    """What bounds the cache and the patience of a run."""
    gigabytes, seconds = f"{num_bytes / 1e9:.6f}", str(timeout)
    return {"GLSD_CACHE": str(cache), "GLSD_CACHE_GB": gigabytes, "GLSD_REMOTE_TIMEOUT": seconds}


def samples(run: Path) -> list[tuple[int, str]]:
    """All (epoch, key) that a run has used, in order; its steps are numbered without a gap."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(epoch, key) for line in lines for epoch, key in line["samples"]]


def expected_samples(
    shards: str, *, steps: int, batch_size: int = 6, window_shards: int = 2
) -> list[tuple[int, str]]:
    """The first ``steps`` batches as the order of the (local) shards has them, without any run."""
    opened = open_shards(shards)
    length = epoch_length(len(opened), batch_size)
    found: list[tuple[int, str]] = []
    epoch = 0
    while len(found) < steps * batch_size:
        order = EpochOrder(opened.shard_sizes, seed=0, epoch=epoch, window_shards=window_shards)
        found += [(epoch, opened.key(order[position])) for position in range(length)]
        epoch += 1
    return found[: steps * batch_size]


def wait_for_step(run: Path, step: int, started: list[Started], seconds: float = 60) -> None:
    """Wait until a running run has come to a step; AssertionError if it ends before or takes too long."""
    deadline = time.monotonic() + seconds
    while steps_written(run) < step:
        for process in started:
            assert process.poll() is None, f"ended with {process.code} before step {step}: {process.said()}"
        assert time.monotonic() < deadline, f"step {step} was not reached: {started[0].said()}"
        time.sleep(0.005)


def run_with_kills(
    warm: Warm, argv: list[str], run: Path, environment: dict[str, str], *, moments: list[tuple[int, float]]
) -> list[dict[str, int]]:
    """Start a run and kill -9 it (loader processes too) at each moment, then let it end; return what each kill left.

    A moment (step, seconds): so long after the log of samples has come to the step. After a kill the log still has
    the steps after the last checkpoint, so that the same step again means: so long after the start.
    """
    left = []
    cache = Path(environment["GLSD_CACHE"])
    for number, (step, seconds) in enumerate(moments):
        started, begun = warm.start(argv, run.with_suffix(f".{number}.log"), environment), time.time()
        wait_for_step(run, step, [started])
        time.sleep(seconds)
        assert started.poll() is None, f"ended with {started.code} before kill {number}: {started.said()}"
        started.kill()
        partial = sum(path.stat().st_mtime > begun for path in partial_files(cache))
        left.append({"step": steps_written(run), "partial": partial, "bytes": bytes_in(cache)})
    last = warm.start(argv, run.with_suffix(".last.log"), environment)
    assert last.wait(120) == 0, last.said()
    return left


def partial_files(cache: Path) -> list[Path]:
    """What downloads in progress have in a cache, or killed ones have left."""
    return list(cache.rglob("*.part"))


def bytes_in(cache: Path) -> int:
    """Bytes of all files of a cache but the indices."""
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix != ".index")


def assert_copies(cache: Path, folder: Path) -> None:
    """Every copy in a cache is one of the shards of the folder, and there are some."""
    shards = {path.read_bytes() for path in shard_files(folder)}
    copies = list(cache.rglob("*.shard"))
    assert copies
    for path in copies:
        assert path.read_bytes() in shards, f"{path} is no shard"
