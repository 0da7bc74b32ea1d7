"""Remote files and the cache of their copies, against a server that misbehaves as told."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from glsd.errors import UserError
from glsd.packing.write import pack_samples
from glsd.shards import remote
from glsd.shards.cache import (
    PART,
    WHOLE,
    ShardCache,
    cache_bytes,
    cache_folder,
)
from glsd.shards.find import find_shards, index_remote, shard_headers
from glsd.shards.prefetch import Prefetcher
from glsd.shards.remote import (
    beside,
    copy_to,
    identity,
    look_up,
    patience,
    read_all,
    shown,
)
from glsd.shards.store import open_shards
from tests.remote.faulty import FaultyServer
from tests.remote.servers import nginx

PIECE = 40_000
COUNT = 6  # shards of one sample, of SIZE bytes each
SIZE = 120_000


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GLSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLSD_REMOTE_TIMEOUT", "1.5")
    monkeypatch.setattr(remote, "PIECE", PIECE)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Shards of one sample each: not images, which nobody looks at here."""
    made = tmp_path / "served"
    for number in range(COUNT):
        raw = bytes([number]) + os.urandom(SIZE - 1)
        pack_samples([(raw, "jpg", number)], made, prefix=f"s{number}")
    return made


@pytest.fixture
def server(folder):
    with FaultyServer(folder) as made:
        yield made


def names(server: FaultyServer) -> list[str]:
    return [f"{server.url}/s{number}-000000.tar" for number in range(COUNT)]


def cache_of(tmp_path, *, shards: float) -> ShardCache:
    """A cache with room for so many of the shards."""
    return ShardCache(tmp_path / "copies", max_bytes=int(shards * (SIZE + 10_240)))


def copies(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob(f"*{WHOLE}"))


def test_samples_come_back_bit_exact_and_are_downloaded_once(server, folder):
    local = open_shards([str(folder / f"s{number}-000000.tar") for number in range(COUNT)])
    for _ in range(2):
        shards = open_shards(f"{server.url}/s{{0..5}}-000000.tar")
        assert [shards.read(i) for i in range(COUNT)] == [local.read(i) for i in range(COUNT)]
        assert shards.labels().tolist() == list(range(COUNT))
        assert shards.fingerprint() == local.fingerprint()  # a run may go on from copies elsewhere
    for name in ("s0-000000.tar", "s5-000000.tar"):
        size = (folder / name).stat().st_size
        assert server.bytes_sent(name) == size
        assert len(server.gets(name)) == -(-size // PIECE)
        assert (
            len(server.gets(f"{name}.index")) == 2
        )  # this server tells no version by which to know it again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cut", {"after": 7_000}),
        ("reset", {"after": 7_000}),
        ("status", {"status": 503}),
        ("status", {"status": 429}),
        ("wrong", None),
    ],
)
def test_what_passes_is_survived_and_costs_one_piece(server, folder, tmp_path, kind, options):
    raw = (folder / "s1-000000.tar").read_bytes()
    if kind == "wrong":  # fewer bytes than asked for, without any error
        kind, options = "short", {"size": 3 * PIECE + 11}
        server.plan("s1-000000.tar", kind, times=1, **options)
        expected = 0
    else:
        server.plan("s1-000000.tar", kind, times=2, **options)
        expected = 2
    with open(tmp_path / "copy", "w+b") as file:
        copy_to(file, names(server)[1], len(raw))
    assert (tmp_path / "copy").read_bytes() == raw
    assert len(server.gets("s1-000000.tar")) == -(-len(raw) // PIECE) + expected


def test_a_short_piece_is_asked_for_again(server, folder, tmp_path):
    raw = (folder / "s1-000000.tar").read_bytes()
    server.plan("s1-000000.tar", "short", times=1, size=100)
    with open(tmp_path / "copy", "w+b") as file:
        copy_to(file, names(server)[1], len(raw))
    assert (tmp_path / "copy").read_bytes() == raw
    assert len(server.gets("s1-000000.tar")) == -(-len(raw) // PIECE) + 1


def test_a_file_that_has_become_short_is_no_longer_asked_for(server, tmp_path):
    server.plan("s1-000000.tar", "short", size=100)
    with (
        open(tmp_path / "copy", "w+b") as file,
        pytest.raises(UserError, match="has 100 bytes, and had 120001"),
    ):
        copy_to(file, names(server)[1], SIZE + 1)
    assert len(server.gets("s1-000000.tar")) == 1


def test_a_server_without_ranges_sends_everything_at_once(server, folder, tmp_path):
    raw = (folder / "s1-000000.tar").read_bytes()
    server.plan("s1-000000.tar", "no_range")
    with open(tmp_path / "copy", "w+b") as file:
        copy_to(file, names(server)[1], len(raw))
    assert (tmp_path / "copy").read_bytes() == raw
    assert len(server.gets("s1-000000.tar")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "message", "at_once"),
    [
        ("status", {"status": 403}, "HTTP status 403", True),
        ("status", {"status": 404}, "HTTP status 404", True),
        ("status", {"status": 500}, r"HTTP status 500.*attempts in .*GLSD_REMOTE_TIMEOUT", False),
        ("cut", {"after": 5}, r"attempts in .*GLSD_REMOTE_TIMEOUT", False),
        ("stall", {"after": 5}, r"attempts in .*GLSD_REMOTE_TIMEOUT", False),
    ],
)
def test_what_does_not_pass_ends_in_one_line_in_bounded_time(
    server, tmp_path, kind, options, message, at_once
):
    address = names(server)[2].replace("http://", "http://user:secret@")
    server.plan("s2-000000.tar", kind, **options)
    started = time.monotonic()
    with open(tmp_path / "copy", "w+b") as file, pytest.raises(UserError, match=message) as caught:
        copy_to(file, address, SIZE)
    seconds = time.monotonic() - started
    assert seconds < (0.7 if at_once else patience() + 0.5 * patience() + 1)
    said = str(caught.value)
    assert "\n" not in said
    assert shown(names(server)[2]) in said
    assert "secret" not in said


def test_a_log_shows_no_secrets():
    assert shown("https://me:word@host/a.tar?X-Signature=abc") == "https://host/a.tar"
    assert shown("s3://bucket/a@b.tar") == "s3://bucket/a@b.tar"
    assert shown("local/what-?.tar") == "local/what-?.tar"


def test_a_new_signature_makes_no_other_file():
    signed = "https://host/get?file=a.tar&X-Amz-Expires=9&X-Amz-Signature={}&sig=b&se=c"
    assert identity(signed.format(1)) == identity(signed.format(2)) == "https://host/get?file=a.tar"
    assert identity("https://host/get?file=a.tar") != identity("https://host/get?file=b.tar")
    assert identity("https://me:word@host/a.tar?Signature=x") == "https://host/a.tar"
    assert beside("https://host/a.tar?Signature=x", ".index") == "https://host/a.tar.index?Signature=x"
    assert beside("/data/a?.tar", ".index") == "/data/a?.tar.index"


def test_a_server_that_is_not_there(server):
    address = names(server)[0]
    server.stop()
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"cannot find {address}.*attempts in .*GLSD_REMOTE_TIMEOUT"):
        open_shards(address)
    assert 1.4 < time.monotonic() - started < 4


def test_bad_addresses_and_settings(server, monkeypatch):
    for pattern, message in (
        (f"{server.url}/x-000000.tar", r"no shard at .*/x-000000\.tar \(HTTP status 404\)"),
        ("gs2://b/x.tar", "expected a local path or an address that begins with http"),
        ([names(server)[0]] * 2, "named twice"),
    ):
        with pytest.raises(UserError, match=message):
            open_shards(pattern)
    for name, read in (("GLSD_REMOTE_TIMEOUT", patience), ("GLSD_CACHE_GB", cache_bytes)):
        for wrong in ("soon", "-1", "0", "nan", "inf"):
            monkeypatch.setenv(name, wrong)
            with pytest.raises(UserError, match=f"{name} is '{wrong}'"):
                read()
        monkeypatch.delenv(name)


def test_a_user_without_a_home_is_asked_for_a_folder(monkeypatch):
    """As in a container that runs with a number that its system does not know."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GLSD_CACHE")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match=r"no home folder .* set GLSD_CACHE"):
        cache_folder("shards")


def test_a_shard_without_index_is_refused_until_it_is_made(server, folder):
    address = names(server)[3]
    Path(f"{folder}/s3-000000.tar.index").unlink()
    with pytest.raises(UserError, match=r"has no readable index beside it.*pack\.py index http"):
        open_shards(address)
    assert index_remote(address, upload=False) == 1
    assert open_shards(address).label(0) == 3


def test_the_index_of_a_replaced_shard_is_fetched_anew(server, folder):
    address = names(server)[0]
    assert open_shards(address).label(0) == 0
    for suffix in ("", ".index"):
        os.replace(folder / f"s4-000000.tar{suffix}", folder / f"s0-000000.tar{suffix}")
        os.utime(folder / f"s0-000000.tar{suffix}", (1, 1))
    assert open_shards(address).read(0)[0] == 4


@pytest.mark.parametrize("fault", ["short", "wrong"])
def test_another_file_than_the_index_says(server, folder, fault):
    shards = open_shards(names(server)[0])
    size = (folder / "s0-000000.tar").stat().st_size
    options = {"size": size // 2} if fault == "short" else {"instead": b"other"}
    server.plan("s0-000000.tar", fault, **options)
    message = rf"has {size // 2} bytes but {size} in its index" if fault == "short" else "is not the one that"
    with pytest.raises(UserError, match=message):
        shards.read(0)
    server.mend()
    assert len(shards.read(0)) == SIZE


def test_the_cache_is_bounded_and_forgets_what_was_not_used_for_longest(server, tmp_path):
    addresses = names(server)
    headers = shard_headers(addresses)
    cache = cache_of(tmp_path, shards=3.5)
    for number in (0, 1, 2):
        cache.fetch(addresses[number], headers[number])
        os.utime(copies(cache)[-1])
    times = {path: stamp for stamp, path in enumerate(copies(cache))}
    for path, stamp in times.items():
        os.utime(path, (stamp, stamp))
    oldest, *newer = sorted(times, key=times.__getitem__)
    cache.fetch(addresses[3], headers[3])
    assert not oldest.exists()
    assert all(path.exists() for path in newer)
    for number in range(COUNT):
        assert cache.read(addresses[number], headers[number], int(headers[number].shard_bytes) - 1024, 1024)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.max_bytes
    assert len(copies(cache)) == 3


def test_reading_keeps_a_copy_young(server, tmp_path):
    addresses = names(server)
    headers = shard_headers(addresses)
    cache = cache_of(tmp_path, shards=2.5)
    cache.fetch(addresses[0], headers[0])
    (first,) = copies(cache)
    os.utime(first, (1, 1))
    cache.fetch(addresses[1], headers[1])
    cache.read(addresses[0], headers[0], 0, 10)
    cache.fetch(addresses[2], headers[2])
    assert first.exists()
    assert len(copies(cache)) == 2


def test_a_shard_larger_than_the_cache(server, tmp_path):
    (header,) = shard_headers(names(server)[:1])
    cache = cache_of(tmp_path, shards=0.5)
    with pytest.raises(UserError, match="does not fit"):
        cache.fetch(names(server)[0], header)
    with pytest.raises(UserError, match=r"GLSD_CACHE_GB allows .* two windows take"):
        cache.check_room(header.shard_bytes, "two windows")
    assert list(cache.folder.glob(f"*{PART}")) == []


def test_files_of_the_user_in_the_same_folder_stay(server, tmp_path):
    addresses = names(server)
    headers = shard_headers(addresses)
    cache = cache_of(tmp_path, shards=1.5)
    cache.folder.mkdir()
    theirs = [cache.folder / name for name in ("train-000000.tar", "x.part", "notes.shard")]
    for path in theirs:
        path.write_bytes(bytes(SIZE))
        os.utime(path, (1, 1))
    for number in range(3):
        cache.fetch(addresses[number], headers[number])
    assert all(path.exists() for path in theirs)
    assert len(copies(cache)) == 2  # one of ours, and notes.shard


def test_what_is_asked_for_ahead_stays_when_room_is_made(server, tmp_path):
    addresses = names(server)
    headers = shard_headers(addresses)
    cache = cache_of(tmp_path, shards=4.5)
    for number in (2, 3, 0, 1):  # 2 and 3 came ahead, 0 and 1 are read
        cache.fetch(addresses[number], headers[number])
        time.sleep(0.02)
    for number in (2, 3, 4, 5):  # the window after that, and the one behind it
        cache.fetch(addresses[number], headers[number], wait=False)
        time.sleep(0.02)
    here = [number for number in range(COUNT) if cache._path(addresses[number], headers[number]).exists()]
    assert here == [2, 3, 4, 5]


def test_room_is_waited_for_while_others_download(server, tmp_path):
    addresses = names(server)
    headers = shard_headers(addresses)
    server.plan("s0-000000.tar", "slow", rate=250_000)
    cache = cache_of(tmp_path, shards=1.5)
    other = threading.Thread(target=cache.fetch, args=(addresses[0], headers[0]))
    other.start()
    deadline = time.monotonic() + 20
    while not server.bytes_sent("s0-000000.tar") and time.monotonic() < deadline:
        time.sleep(0.01)
    cache.fetch(addresses[1], headers[1], wait=False)
    assert not cache._path(addresses[1], headers[1]).exists()
    cache.fetch(addresses[1], headers[1])
    assert cache._path(addresses[1], headers[1]).exists()
    other.join(20)


def test_a_copy_that_was_cut_is_downloaded_again(server, folder):
    shards = open_shards(names(server)[0])
    whole = shards.read(0)
    (copy,) = (Path(os.environ["GLSD_CACHE"]) / "shards").glob(f"*{WHOLE}")
    os.truncate(copy, 1000)
    assert shards.read(0) == whole
    assert server.bytes_sent("s0-000000.tar") == 2 * (folder / "s0-000000.tar").stat().st_size


def test_an_index_that_came_damaged_is_not_kept(server, folder):
    address = names(server)[1]
    server.plan("s1-000000.tar.index", "cut", times=1, after=100)  # passes
    server.plan("s1-000000.tar.index", "short", size=100)  # HEAD and GET agree: the file is short
    with pytest.raises(UserError, match=rf"index {address}\.index is damaged"):
        open_shards(address)
    server.mend()
    assert open_shards(address).label(0) == 1


def test_our_copy_of_an_index_that_is_damaged_is_fetched_again(folder, tmp_path):
    with nginx(tmp_path / "web", folder=folder) as web:  # it tells versions, so that the copy is used again
        address = f"{web.url}/s1-000000.tar"
        open_shards(address)
        (copy,) = (Path(os.environ["GLSD_CACHE"]) / "index").glob("*.index")
        copy.write_bytes(copy.read_bytes()[:-9])
        assert open_shards(address).label(0) == 1


def test_an_index_that_may_not_be_asked_for_is_made_here(server):
    address = names(server)[2]
    server.plan("s2-000000.tar.index", "status", status=403)
    with pytest.raises(UserError, match="has no readable index beside it"):
        open_shards(address)
    assert index_remote(address, upload=False) == 1
    assert open_shards(address).label(0) == 2


def test_an_index_of_a_damaged_shard_names_its_address(server, folder):
    with open(folder / "s0-000000.tar", "r+b") as file:
        file.write(b"x" * 2000)
    with pytest.raises(UserError, match=rf"shard {names(server)[0]} is damaged"):
        index_remote(names(server)[0], upload=False)
    assert list((Path(os.environ["GLSD_CACHE"]) / "shards").iterdir()) == []


def test_a_fork_leaves_no_lock_behind(server, tmp_path):
    addresses = names(server)
    headers = shard_headers(addresses)
    cache = cache_of(tmp_path, shards=9)
    server.plan("s0-000000.tar", "slow", rate=250_000)
    other = threading.Thread(target=cache.fetch, args=(addresses[0], headers[0]))
    other.start()
    deadline = time.monotonic() + 20
    while not server.bytes_sent("s0-000000.tar") and time.monotonic() < deadline:
        time.sleep(0.01)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    other.join(20)
    cache.fetch(addresses[1], headers[1])
    os.unlink(cache._path(addresses[0], headers[0]))
    cache.fetch(addresses[0], headers[0])
    child.kill()
    child.join()


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (header,) = shard_headers(names(server)[:1])
    cache = ShardCache(tmp_path / "file" / "below", max_bytes=10**9)
    with pytest.raises(UserError, match=r"cannot use the shard cache.*GLSD_CACHE"):
        cache.fetch(names(server)[0], header)


def _fetch(folder: Path, address: str, done: object) -> None:
    (header,) = shard_headers([address])
    ShardCache(folder, max_bytes=10**9).fetch(address, header)
    done.put(os.getpid())  # type: ignore[attr-defined]


def test_processes_download_a_shard_once(server, folder, tmp_path):
    server.plan("s0-000000.tar", "slow", rate=300_000)
    made = multiprocessing.get_context("fork")
    done: multiprocessing.Queue = made.Queue()
    workers = [
        made.Process(target=_fetch, args=(tmp_path / "copies", names(server)[0], done)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert server.bytes_sent("s0-000000.tar") == (folder / "s0-000000.tar").stat().st_size
    assert len(list((tmp_path / "copies").glob("*"))) == 2  # the copy and the lock


def test_a_crash_in_mid_download_is_taken_over(server, folder, tmp_path):
    server.plan("s0-000000.tar", "slow", rate=60_000)
    made = multiprocessing.get_context("fork")
    done: multiprocessing.Queue = made.Queue()
    victim = made.Process(target=_fetch, args=(tmp_path / "copies", names(server)[0], done))
    victim.start()
    deadline = time.monotonic() + 20
    while server.bytes_sent("s0-000000.tar") < 50_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    (header,) = shard_headers(names(server)[:1])
    cache = ShardCache(tmp_path / "copies", max_bytes=int(1.5 * header.shard_bytes))
    cache.fetch(names(server)[0], header, wait=False)  # leaves it to the other one
    assert copies(cache) == []
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert len(list(cache.folder.glob(f"*{PART}"))) == 1
    server.mend()
    # Another shard needs the room: what the dead one left goes.
    address = names(server)[1]
    (other,) = shard_headers([address])
    cache.fetch(address, other)
    assert len(list(cache.folder.glob(f"*{PART}"))) == 0
    cache.fetch(names(server)[0], header)
    assert (
        cache.read(names(server)[0], header, 0, header.shard_bytes) == (folder / "s0-000000.tar").read_bytes()
    )


def test_one_waits_for_another_no_longer_than_for_a_server(server, tmp_path):
    server.plan("s0-000000.tar", "stall", after=1000)
    (header,) = shard_headers(names(server)[:1])
    caches = [ShardCache(tmp_path / "copies", max_bytes=10**9) for _ in range(3)]
    errors: list[tuple[float, str]] = []
    started = time.monotonic()

    def fetch(cache: ShardCache) -> None:
        try:
            cache.fetch(names(server)[0], header)
        except UserError as error:
            errors.append((time.monotonic() - started, str(error)))

    threads = [threading.Thread(target=fetch, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 3
    assert max(seconds for seconds, _ in errors) < 2 * patience() + 0.5 * patience() + 1.5
    assert all("GLSD_REMOTE_TIMEOUT" in said for _, said in errors)


def test_prefetching_fetches_in_order_and_what_is_wanted_now():
    fetched: list[int] = []
    blocked, begun = threading.Event(), threading.Event()

    def fetch(number: int) -> None:
        begun.set()
        assert blocked.wait(10)
        fetched.append(number)

    prefetcher = Prefetcher(fetch)
    prefetcher.want([1, 2, 3])
    assert begun.wait(10)
    prefetcher.want([7, 8])  # instead of 2 and 3
    blocked.set()
    deadline = time.monotonic() + 10
    while len(fetched) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert fetched == [1, 7, 8]


def test_patterns_on_a_web_server(folder, tmp_path):
    with nginx(tmp_path / "web", folder=folder) as web:
        assert find_shards(f"{web.url}/s*.tar") == [
            f"{web.url}/s{number}-000000.tar" for number in range(COUNT)
        ]
        assert find_shards(f"{web.url}/s{{4,2}}-*.tar") == [
            f"{web.url}/s{number}-000000.tar" for number in (4, 2)
        ]
        found, missing = look_up([f"{web.url}/s1-000000.tar", f"{web.url}/s9-000000.tar"])
        assert found is not None
        assert found.size == (folder / "s1-000000.tar").stat().st_size
        assert missing is None
        assert read_all(f"{web.url}/s1-000000.tar.index") == (folder / "s1-000000.tar.index").read_bytes()
        with pytest.raises(UserError, match=r"no shard matches '.*/t\*\.tar'"):
            find_shards(f"{web.url}/t*.tar")
