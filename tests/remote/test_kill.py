"""Runs on remote shards that are killed again and again, or go on with other ranks, use the samples of one that was not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import assert_same_run
from tests.helpers.uneven_run import NAMES
from tests.remote.killed_run import (
    CACHE_BYTES,
    SIZES,
    argv_of,
    assert_copies,
    bytes_in,
    cache_environment,
    expected_samples,
    pack_uneven,
    run_with_kills,
    samples,
    wait_for_step,
)
from tests.remote.servers import (
    Served,
    free_port,
    nginx,
    s3,
)

KILLS = 20
STEPS = 132  # 11 epochs of 12
RATE = 1_500_000  # bytes a second: an epoch's shards take about as long as its steps


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("uneven")
    pack_uneven(made)
    return made


@pytest.fixture(scope="session")
def straight(tmp_path_factory, warm, folder) -> Path:
    """A run on the local files that nothing happens to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    started = warm.start(argv_of(out, f"{folder}/{NAMES}"), out.with_suffix(".log"))
    assert started.wait(120) == 0, started.said()
    assert samples(out) == expected_samples(f"{folder}/{NAMES}", steps=STEPS)
    return out


@contextlib.contextmanager
def serve(kind: str, work: Path, folder: Path) -> Iterator[Served]:
    with {"nginx": nginx, "s3": s3}[kind](work, folder=folder, rate=RATE) as served:
        yield served


def draw_moments(seed: int) -> list[tuple[int, float]]:
    """Steps all over the run but its last epochs, and some time after each: in a start, a download, a step, a save."""
    draws = np.random.default_rng(seed)
    steps = np.sort(draws.integers(0, 90, KILLS))
    return [(int(step), float(draws.uniform(0, 0.8))) for step in steps]


@pytest.mark.slow
@pytest.mark.remote
@pytest.mark.parametrize("kind", ["nginx", "s3"])
def test_twenty_kills_change_nothing(tmp_path, warm, folder, straight, kind):
    run = tmp_path / "killed"
    with serve(kind, tmp_path / "server", folder) as served:
        environment = cache_environment(tmp_path / "cache") | served.environment
        argv = argv_of(run, f"{served.url}/{NAMES}")
        left = run_with_kills(warm, argv, run, environment, moments=draw_moments(seed=5))
        downloads = [row for row in served.requests(".tar") if row[0] == "GET"]
    assert len(left) == KILLS
    assert samples(run) == samples(straight)
    assert_same_run(run, straight)
    assert sum(kill["partial"] > 0 for kill in left) >= 3, f"too few kills fell into downloads: {left}"
    assert len(downloads) > 2 * len(SIZES), "everything stayed in the cache: nothing is shown"
    assert max(kill["bytes"] for kill in left) <= CACHE_BYTES, left
    assert bytes_in(tmp_path / "cache") <= CACHE_BYTES
    assert_copies(tmp_path / "cache", folder)


@pytest.mark.slow
@pytest.mark.remote
def test_ranks_come_and_go_in_mid_epoch(tmp_path, warm, folder):
    """Two ranks are killed in the first epoch, one in the second, three end the run: each sample once in each epoch."""
    run, steps = tmp_path / "run", 36
    with nginx(tmp_path / "server", folder=folder) as served:
        environment = cache_environment(tmp_path / "cache")
        argv = argv_of(run, f"{served.url}/{NAMES}", data__num_workers=2, optim__max_steps=steps)
        for world, step in ((2, 6), (1, 18), (3, steps)):
            log = tmp_path / f"ranks{world}.log"
            ranks = warm.start_ranks(argv, log, [environment] * world, free_port())
            if step < steps:
                wait_for_step(run, step, ranks)
                for rank in ranks:
                    rank.kill()
            else:
                assert [rank.wait(120) for rank in ranks] == [0] * world, ranks[0].said()
            told = ranks[0].said()
            assert f"{world} ranks x 1 x {6 // world} images" in told
            resumed = int(told.split(" at step ")[1].split()[0]) if "resumed from" in told else 0
            assert (resumed > 0) == (world != 2)
            assert world == 2 or resumed % 12, "not in mid-epoch: nothing is shown"
    used = samples(run)
    assert used == expected_samples(f"{folder}/{NAMES}", steps=steps)
    for epoch in range(3):
        keys = [key for number, key in used if number == epoch]
        assert len(keys) == len(set(keys)) == sum(SIZES)
