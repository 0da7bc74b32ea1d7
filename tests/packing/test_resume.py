"""A packing killed at every moment at which something becomes safe on disk, and resumed: the same files to the byte."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from glsd.errors import UserError
from glsd.packing.folder import pack_folder
from glsd.packing.lists import pack_list
from glsd.packing.retrieval_sets import pack_retrieval_set
from glsd.packing.split import assign_roles, split_shards
from glsd.packing.write import PackSummary, pack_samples
from tests.helpers.retrieval_trees import cub_tree
from tests.helpers.small_shards import encoded, noise_image

LAUNCH = Path(__file__).parents[2] / "launch" / "pack.py"
NUM_IMAGES = 26


def large(number: int) -> bytes:
    """An image file of some 200 KB, five of which make a shard of a megabyte; every fourth is larger in pixels only."""
    if number % 4 == 1:
        return encoded(Image.open(io.BytesIO(noise_image(number))).resize((80, 60)))
    noise = np.random.default_rng(number).bytes(195_000 + 1000 * number)
    return noise_image(number) + noise  # what follows the end of a JPEG is ignored


@pytest.fixture(scope="module")
def photos_folder(tmp_path_factory) -> Path:
    src = tmp_path_factory.mktemp("photos")
    folder_command(src)
    return src


def pack(src: Path, dst: Path, **change) -> PackSummary:
    return pack_folder(src, dst, **{"shard_megabytes": 1, "short_side": 30, **change})


def files(dst: Path) -> dict[str, bytes]:
    return {path.name: content(path) for path in dst.iterdir() if path.is_file()}


def content(path: Path) -> bytes:
    """A file's bytes; an index with its header sorted, which the library writes in any order."""
    raw = path.read_bytes()
    if path.suffix != ".index":
        return raw
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.dumps(json.loads(raw[8:end]), sort_keys=True).encode() + raw[end:]


def facts(*summaries: PackSummary) -> list[PackSummary]:
    """What does not depend on the folder of the shards, and on whether a packing was interrupted."""
    return [
        replace(one, shards=tuple(Path(path.name) for path in one.shards), num_resumed=0) for one in summaries
    ]


def killed(fatal: int, packing: Callable[[], object]) -> bool:
    """Pack in a process that kills itself before its ``fatal``-th call that makes something lasting; tell if it did."""

    def child():
        calls = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "truncate", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        packing()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def complete(dst: Path) -> bool:
    """Tell whether a packing has nothing left to do but to tidy up."""
    return any(dst.glob("*.tar")) and not any(dst.glob(".*.packing/journal.jsonl"))


@pytest.fixture(scope="module")
def whole(photos_folder, tmp_path_factory) -> tuple[dict[str, bytes], list[PackSummary]]:
    dst = tmp_path_factory.mktemp("whole")
    summary = pack(photos_folder, dst)
    assert len(summary.shards) > 3
    assert len(summary.unreadable) == 3
    assert summary.num_resumed == 0
    return files(dst), facts(summary)


def folder_command(src: Path) -> Callable[[Path], list[PackSummary]]:
    for number in range(NUM_IMAGES):
        folder = src / ("cat" if number % 3 else "dog")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(large(number) if number % 9 else b"no image")
    return lambda dst: [pack(src, dst)]


def labeled_shards(src: Path) -> str:
    """Twenty samples of four classes; two of them are no images."""
    samples = [(b"text" if n in (4, 11) else large(4 * n), "jpg", n % 4) for n in range(20)]
    pack_samples(samples, src, prefix="all", classes=["a", "b", "c", "d"])
    return f"{src}/all-*.tar"


def split_command(src: Path) -> Callable[[Path], list[PackSummary]]:
    shards = labeled_shards(src)
    return lambda dst: list(split_shards(shards, dst, shard_megabytes=1).values())


def roles_command(src: Path) -> Callable[[Path], list[PackSummary]]:
    shards, table = labeled_shards(src), src / "table.tsv"
    rows = [f"{number:08d}\t{'test' if number % 3 else 'train'}\n" for number in range(20)]
    table.write_text("key\tsplit\n" + "".join(rows))
    roles = {"gallery": ["train"], "query": ["test"]}
    return lambda dst: list(
        assign_roles(shards, dst, table=table, field="split", roles=roles, shard_megabytes=1).values()
    )


def retrieval_command(src: Path) -> Callable[[Path], list[PackSummary]]:
    cub_tree(src)
    for number, path in enumerate(sorted(src.rglob("*.jpg"))):
        path.write_bytes(noise_image(number) + np.random.default_rng(number).bytes(500_000))
    return lambda dst: list(
        pack_retrieval_set("cub200", src, dst, shard_megabytes=1, allow_incomplete=True).values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", [folder_command, split_command, roles_command, retrieval_command])
def test_killed_at_every_moment(command, tmp_path):
    (tmp_path / "src").mkdir()
    packing = command(tmp_path / "src")
    summaries = facts(*packing(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    num_shards = sum(len(one.shards) for one in summaries)
    resumed, fatal = [], 0
    while True:
        fatal += 1
        dst = tmp_path / str(fatal)
        if not killed(fatal, partial(packing, dst)):
            break
        if complete(dst):  # the very last moments
            with pytest.raises(UserError, match=r"already has .*-000000\.tar"):
                packing(dst)
            assert files(dst) == whole
            assert not any(path.is_dir() for path in dst.iterdir())
            continue
        found = packing(dst)
        assert (files(dst), facts(*found)) == (whole, summaries), f"killed before call {fatal}"
        resumed.append(sum(one.num_resumed for one in found))
    assert fatal > 8 * num_shards
    assert num_shards > 3
    assert resumed == sorted(resumed)
    assert set(resumed) == set(range(num_shards + 1))


def test_killed_again_and_again(photos_folder, tmp_path, whole):
    rounds = 1
    while killed(12, lambda: pack(photos_folder, tmp_path)):
        rounds += 1
        assert rounds < 20
    assert rounds > 3
    assert {name: raw for name, raw in files(tmp_path).items() if name[0] != "."} == whole[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(photos_folder, tmp_path, whole, workers):
    summary = pack(photos_folder, tmp_path, workers=workers)
    assert (files(tmp_path), facts(summary)) == whole


def test_resumed_by_other_workers(photos_folder, tmp_path, whole):
    assert killed(22, lambda: pack(photos_folder, tmp_path))
    assert pack(photos_folder, tmp_path, workers=2).num_resumed > 0
    assert files(tmp_path) == whole[0]


def test_another_packing_does_not_go_on(photos_folder, tmp_path, whole):
    assert killed(22, lambda: pack(photos_folder, tmp_path))
    before = files(tmp_path / ".train.packing")
    with pytest.raises(
        UserError, match=r"unfinished packing with shard_megabytes 1, now 2: .*delete that folder"
    ):
        pack(photos_folder, tmp_path, shard_megabytes=2)
    extra = photos_folder / "dog" / "extra.jpg"
    extra.write_bytes(noise_image(50))
    try:
        with pytest.raises(UserError, match="unfinished packing of other images, labels or classes"):
            pack(photos_folder, tmp_path)
    finally:
        extra.unlink()
    with pytest.raises(UserError, match=r"unfinished packing: finish it with the command that began it"):
        pack_samples([(noise_image(0), "jpg", None)], tmp_path)
    pack(photos_folder, tmp_path, prefix="val")
    assert set(files(tmp_path / ".train.packing")) == set(before)
    pack(photos_folder, tmp_path)
    assert whole[0].items() <= files(tmp_path).items()


def test_a_damaged_journal(photos_folder, tmp_path):
    assert killed(22, lambda: pack(photos_folder, tmp_path))
    journal = tmp_path / ".train.packing" / "journal.jsonl"
    good = journal.read_bytes()
    for bad in (b"[1]\n", good + b"{}\n", good + b"[" * 10_000 + b"\n", b"\xff\n"):
        journal.write_bytes(bad)
        with pytest.raises(UserError, match=r"is damaged|unfinished packing"):
            pack(photos_folder, tmp_path)
    journal.write_bytes(good)
    (tmp_path / ".train.packing" / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"lacks train-000000\.tar, which its journal calls finished"):
        pack(photos_folder, tmp_path)


def test_ctrl_c_keeps_what_is_finished(photos_folder, tmp_path, monkeypatch, whole):
    read = Path.read_bytes
    count = 0

    def stopped(path):
        nonlocal count
        count += path.suffix == ".jpg"
        if count == 15 and path.suffix == ".jpg":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stopped)
    with pytest.raises(
        KeyboardInterrupt, match="stopped; finished shards kept: 2; the same command resumes after them"
    ):
        pack(photos_folder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".train.packing"]
    names = {path.name for path in (tmp_path / ".train.packing").iterdir()}
    assert names == {
        *(f"train-00000{n}.tar{end}" for n in range(2) for end in ("", ".index")),
        "train-files.tsv",
        "classes.json",
        "journal.jsonl",
    }
    assert pack(photos_folder, tmp_path).num_resumed == 2
    assert files(tmp_path) == whole[0]


@pytest.mark.parametrize("moment", [9, 10, 11, 12, 13, 24])
def test_a_full_disk_keeps_what_is_finished(moment, photos_folder, tmp_path, monkeypatch, whole):
    """The disk is full at one moment: for a tar, an index, a folder, the table or the journal."""
    sync, count = os.fsync, 0

    def full(handle):
        nonlocal count
        count += 1
        if count == moment:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*: No space left .*\(finished shards kept: \d;"):
            pack(photos_folder, tmp_path)
    assert pack(photos_folder, tmp_path).num_resumed > 0
    assert files(tmp_path) == whole[0]


def test_two_at_once_are_refused(photos_folder, tmp_path):
    started, go_on = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def samples():
        started.set()
        go_on.wait(60)
        yield noise_image(0), "jpg", None

    first = multiprocessing.get_context("fork").Process(
        target=lambda: pack_samples(samples(), tmp_path, prefix="a")
    )
    first.start()
    assert started.wait(60)
    with pytest.raises(UserError, match=f"another process is packing into {tmp_path}: wait for it"):
        pack(photos_folder, tmp_path, prefix="b")
    go_on.set()
    first.join(60)
    assert first.exitcode == 0
    pack(photos_folder, tmp_path, prefix="b")
    assert not [name for name in files(tmp_path) if name.startswith(".")]


def test_no_shard_is_overwritten_by_going_on(photos_folder, tmp_path):
    assert killed(22, lambda: pack(photos_folder, tmp_path))
    (tmp_path / "train-000000.tar").write_bytes(b"somebody else's")
    with pytest.raises(UserError, match=r"already has train-000000\.tar"):
        pack(photos_folder, tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"somebody else's"


def test_a_dead_worker_is_one_line(tmp_path):
    rows = ["path,label"]
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(noise_image(number))
        rows.append(f"{number}.jpg,0")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    read, parent = Path.read_bytes, os.getpid()

    def deadly(path):
        if path.name == "7.jpg" and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", deadly)
        with pytest.raises(UserError, match="a worker process died, perhaps because memory ran out"):
            pack_list(tmp_path / "list.csv", tmp_path / "out", prefix="x", workers=2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_the_command_killed_and_given_again(photos_folder, tmp_path, whole):
    """A real process with workers, killed as soon as its second shard is safe; its workers end too."""
    command = [
        sys.executable,
        LAUNCH,
        photos_folder,
        tmp_path / "out",
        "--shard_megabytes=1",
        "--short_side=30",
    ]
    journal = tmp_path / "out" / ".train.packing" / "journal.jsonl"
    process = subprocess.Popen(
        [*command, "--workers=2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait(60)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    finished = journal.read_bytes().count(b"\n") - 1 if journal.exists() else None
    done = subprocess.run([*command, "--workers=1"], capture_output=True, text=True, timeout=300, check=False)
    if finished is None:  # it was faster than we: all is there, and nothing is overwritten
        assert (done.returncode, "already has train-000000.tar" in done.stderr) == (2, True)
    else:
        assert done.returncode == 0, done.stderr
        assert "resumed after" in done.stdout
    assert files(tmp_path / "out") == whole[0]


def test_the_table_tells_what_was_resized(photos_folder, tmp_path, whole):
    head, *rows = whole[0]["train-files.tsv"].decode().splitlines()
    assert head == "key\tfile\tresized_from"
    was = {row.split("\t")[1]: row.split("\t")[2] for row in rows}
    assert {int(Path(name).stem) for name, size in was.items() if size == "80x60"} == set(
        range(1, NUM_IMAGES, 4)
    ) - {9}
    assert set(was.values()) == {"80x60", ""}
    assert whole[1][0].num_resized == 6
    pack(photos_folder, tmp_path, short_side=60)
    head, *rows = (tmp_path / "train-files.tsv").read_text().splitlines()
    assert {row.split("\t")[2] for row in rows} == {""}
    assert json.loads((tmp_path / "classes.json").read_text()) == ["cat", "dog"]
