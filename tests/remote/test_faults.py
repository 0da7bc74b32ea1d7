"""What a bad server does to a run: it goes on where that is possible, else every rank ends soon, with one clear line."""

import re
import time
from pathlib import Path

import pytest

from glsd.runtime import checkpoint
from tests.helpers.runs import assert_same_run
from tests.helpers.uneven_run import NAMES, steps_written
from tests.remote.faulty import FaultyServer
from tests.remote.killed_run import (
    CACHE_BYTES,
    ROOMY,
    argv_of,
    assert_copies,
    cache_environment,
    expected_samples,
    pack_uneven,
    partial_files,
    samples,
    shard_files,
    wait_for_step,
)
from tests.remote.servers import free_port
from tests.remote.warm import Started

STEPS = 20  # an epoch of 12 and a part of the next
PATIENCE = 2.0  # GLSD_REMOTE_TIMEOUT of these tests, in seconds
# From the beginning of the fault: what is cached is used up, the patience ends, every rank ends. That takes 7 seconds,
# of which 2 are the patience; the rest is for a machine with other things to do.
BOUND = 20.0

pytestmark = [pytest.mark.slow, pytest.mark.remote]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("uneven")
    pack_uneven(made)
    return made


@pytest.fixture(scope="session")
def straight(tmp_path_factory, warm, shards) -> Path:
    """A run on the local files that nothing happens to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    started = warm.start(argv_of(out, f"{shards}/{NAMES}", optim__max_steps=STEPS), out.with_suffix(".log"))
    assert started.wait(120) == 0, started.said()
    assert samples(out) == expected_samples(f"{shards}/{NAMES}", steps=STEPS)
    return out


@pytest.fixture
def server(shards):
    with FaultyServer(shards) as made:
        yield made


@pytest.fixture
def start(warm, server, tmp_path):
    """A function (name of the run, size of each rank's cache, ...) -> its started ranks.

    ``caches`` are the folders of the ranks' caches, as many as there are ranks; ``patience`` is in seconds.
    """

    def started(
        name: str = "run",
        *,
        caches: tuple[str, ...] = ("cache",),
        num_bytes: tuple[int, ...] = (ROOMY,),
        patience: float = PATIENCE,
        **changes: object,
    ) -> list[Started]:
        changes = {"optim__max_steps": STEPS} | changes
        argv = argv_of(tmp_path / name, f"{server.url}/{NAMES}", **changes)
        environments = [
            cache_environment(tmp_path / cache, num_bytes=num_bytes[rank % len(num_bytes)], timeout=patience)
            for rank, cache in enumerate(caches)
        ]
        if len(caches) == 1:
            return [warm.start(argv, tmp_path / f"{name}.log", environments[0])]
        return warm.start_ranks(argv, tmp_path / f"{name}.log", environments, free_port())

    return started


def end_well(started: list[Started]) -> None:
    codes = [rank.wait(60) for rank in started]
    assert codes == [0] * len(started), "\n".join(rank.said() for rank in started)


def end_with_one_line(started: list[Started], seconds: float, *expected: str) -> None:
    """Every rank ends with code 2 within some seconds, and one line over all ranks says why, with all that is expected."""
    deadline = time.monotonic() + seconds
    codes = [rank.wait(max(deadline - time.monotonic(), 0.1)) for rank in started]
    said = "\n".join(rank.said() for rank in started)
    assert codes == [2] * len(started), said
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if re.match(r"(?i)\S*(error|exception)\b", line)]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: "), said
    for pattern in expected:
        assert re.search(pattern, errors[0]), f"{pattern!r} is not in {errors[0]!r}"


def plan_all(server: FaultyServer, shards: Path, kind: str, **options) -> None:
    """Let every shard meet a fault, for ever or in its next ``times`` requests."""
    for path in shard_files(shards):
        server.plan(path.name, kind, **options)


PASSING: list[tuple[str, dict]] = [
    ("status", {"status": 500, "times": 2}),
    ("status", {"status": 503, "times": 2}),
    ("cut", {"after": 10_000, "times": 2}),
    ("reset", {"after": 10_000, "times": 2}),
    ("stall", {"after": 10_000, "seconds": 0.5, "times": 1}),
]


def test_what_passes_changes_nothing(start, server, shards, straight, tmp_path):
    """Each shard meets one of the faults, and then is served."""
    for number, path in enumerate(shard_files(shards)):
        kind, options = PASSING[number % len(PASSING)]
        server.plan(path.name, kind, **options)
    end_well(start(patience=10))
    assert_same_run(tmp_path / "run", straight)
    assert samples(tmp_path / "run") == samples(straight)
    assert_copies(tmp_path / "cache", shards)
    assert server.faults_left() == 0, "a fault was not met: nothing is shown"


def test_a_server_without_range_requests_will_do(start, server, shards, straight, tmp_path):
    plan_all(server, shards, "no_range")
    end_well(start())
    assert samples(tmp_path / "run") == samples(straight)
    for path in shard_files(shards):
        assert server.bytes_sent(path.name) == path.stat().st_size, path.name


def test_two_ranks_survive_what_passes(start, server, shards, straight, tmp_path):
    plan_all(server, shards, "status", status=503, times=1)
    plan_all(server, shards, "cut", after=10_000, times=1)
    end_well(start(caches=("cache", "cache"), patience=10))
    assert samples(tmp_path / "run") == samples(straight)


def test_a_server_that_comes_back_in_time_is_waited_for(start, server, straight, tmp_path):
    """It is gone for longer than what is cached lasts."""
    started = start(num_bytes=(CACHE_BYTES,), patience=20)
    wait_for_step(tmp_path / "run", 4, started)
    server.stop()
    time.sleep(3)
    server.start()
    end_well(started)
    assert samples(tmp_path / "run") == samples(straight)


@pytest.mark.parametrize(
    ("kind", "options", "ranks", "expected"),
    [
        ("status", {"status": 500}, 2, ["HTTP status 500"]),
        ("status", {"status": 404}, 1, ["HTTP status 404"]),
        ("cut", {"after": 1000}, 1, [r"\d attempts in"]),
        ("stall", {"after": 1000}, 2, [r"(?i)timeout.* \d attempts in"]),
        ("short", {"size": 20_000}, 2, ["20000 bytes", "in its index|when its download began"]),
        ("wrong", {}, 1, ["is not the one that its index"]),
        ("gone", {}, 2, [r"(?i)connect.* \d attempts in"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_pass_ends_every_rank(start, server, shards, tmp_path, kind, options, ranks, expected):
    """The fault comes in mid-run; when it is over the run goes on from the last checkpoint with the same samples."""
    run, caches = tmp_path / "run", ("cache",) * ranks
    more = {"optim__epochs": 40, "watch__checkpoint_every": 1, "num_bytes": (CACHE_BYTES,)}
    started = start(caches=caches, optim__max_steps=400, **more)
    wait_for_step(run, 4, started)
    if kind == "gone":
        server.stop()
    else:
        options = options | ({"instead": shard_files(shards)[0].read_bytes()} if kind == "wrong" else {})
        plan_all(server, shards, kind, **options)
    end_with_one_line(started, BOUND, re.escape(server.url) + r"/train-\d{6}\.tar", *expected)
    saved = checkpoint.load_latest(run / "checkpoints")
    assert saved is not None
    assert saved.step >= 3
    if kind == "gone":
        server.start()
    server.mend()
    steps = steps_written(run) + 6
    end_well(start(caches=caches, optim__max_steps=steps, **more))
    assert samples(run) == expected_samples(f"{shards}/{NAMES}", steps=steps)
    assert_copies(tmp_path / "cache", shards)


def test_one_rank_in_trouble_ends_all(start, server, tmp_path):
    """As on three machines: two have all shards, one has room for some and loses the server."""
    end_well(start("before", caches=("all",)))
    started = start(
        caches=("all", "some", "all"),
        num_bytes=(ROOMY, CACHE_BYTES, ROOMY),
        optim__epochs=40,
        optim__max_steps=400,
        watch__checkpoint_every=1,
    )
    wait_for_step(tmp_path / "run", 4, started)
    server.stop()
    end_with_one_line(started, BOUND, re.escape(server.url), "(?i)connect")
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints") is not None


def test_a_server_that_is_not_there_at_the_start(start, server, tmp_path):
    server.stop()
    end_with_one_line(start(caches=("cache", "cache")), BOUND, re.escape(server.url), "(?i)connect")
    assert not (tmp_path / "run").exists()


def test_a_shard_without_index_says_how_to_make_one(start, server, tmp_path):
    server.plan("train-000003.tar.index", "status", status=404)
    end_with_one_line(start(), BOUND, "train-000003.tar", "pack.py index")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shared_cache_downloads_each_shard_once(start, server, shards, straight, tmp_path, ranks):
    """Two runs, or the two ranks of one, want the same shards at the same time, of a server that takes its time."""
    plan_all(server, shards, "slow", rate=1_000_000)
    if ranks == 1:
        started = [*start("one", patience=30), *start("two", patience=30)]
    else:
        started = start("one", caches=("cache", "cache"), patience=30)
    end_well(started)
    for name in ("one", "two")[: 3 - ranks]:
        assert samples(tmp_path / name) == samples(straight)
    for path in shard_files(shards):
        assert server.bytes_sent(path.name) == path.stat().st_size, path.name


def test_a_crash_in_mid_download_neither_blocks_nor_poisons_the_others(
    start, server, shards, straight, tmp_path
):
    """The first run hangs in its first download, the second waits for the same shard; then the first is killed."""
    wanted = first_shard(shards)
    server.plan(wanted, "stall", after=10_000, times=1)
    (first,) = start("first", patience=60)
    deadline = time.monotonic() + 30
    while server.bytes_sent(wanted) < 10_000:
        assert time.monotonic() < deadline, first.said()
        time.sleep(0.01)
    (second,) = start("second", patience=60)
    time.sleep(3)
    assert partial_files(tmp_path / "cache")
    assert len(server.gets(wanted)) == 1, "the second run does not wait for the download of the first"
    assert steps_written(tmp_path / "second") == 0
    first.kill()
    assert second.wait(30) == 0, second.said()
    assert samples(tmp_path / "second") == samples(straight)
    assert_copies(tmp_path / "cache", shards)


def first_shard(shards: Path) -> str:
    """Return the name of the shard that holds the first sample of the first epoch."""
    key = expected_samples(f"{shards}/{NAMES}", steps=1)[0][1]
    (found,) = (path for path in shard_files(shards) if f"{key}.png".encode() in path.read_bytes())
    return found.name
