"""Shards that someone made to do harm, or that broke on the way: their samples, or one line; and a quarantine that adds up."""

import collections
import gzip
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate.state import AcceleratorState

from glsd.batches import BrokenSample
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.data.order import EpochOrder
from glsd.data.pretrain_loader import pretrain_loader
from glsd.errors import BrokenImage, UserError
from glsd.pretrain.train import pretrain
from glsd.shards.index import build_index, index_path, write_index
from glsd.shards.store import ShardSet, open_shards
from glsd.shards.tar import MAX_EXTENDED, TarError, read_members
from tests.helpers import fuzz_shards, fuzz_watch
from tests.helpers.fuzz_shards import (
    BLOCK,
    by_tarfile,
    header,
    member,
    pax,
    tar,
)
from tests.helpers.small_shards import noise_image, pack_noise
from tests.helpers.usual_spec import usual_spec

SEED = 5
NUM_MUTATED = 200
ONE, TWO = noise_image(1), noise_image(2)


pytestmark = pytest.mark.usefixtures("own_cache")


def contents(shards: ShardSet) -> list[tuple[str, bytes | str, int]]:
    """Key, bytes or reason, and label of every sample."""
    rows: list[tuple[str, bytes | str, int]] = []
    for number in range(len(shards)):
        try:
            got: bytes | str = shards.read(number)
        except BrokenImage as error:
            got = str(error)
        rows.append((shards.key(number), got, shards.label(number)))
    return rows


NO_IMAGE = "no image member"
LONG = "n" * 5000
SPARSE_MAP = bytes(504) + b"\0" + bytes(7)

# A shard -> its samples.
READABLE: dict[str, tuple[bytes, list[tuple[str, bytes | str, int]]]] = {
    "absolute and parent paths are names like others": (
        tar(member(b"/etc/passwd.jpg", ONE), member(b"../../up.jpg", TWO), member(b"../../up.cls", b"4")),
        [("/etc/passwd", ONE, -1), ("../../up", TWO, 4)],
    ),
    "links, devices, folders and pipes hold no image": (
        tar(
            *(member(b"%s.jpg" % kind, kind=kind, link=b"/etc/passwd") for kind in (b"1", b"2", b"3", b"6")),
            member(b"5.jpg", kind=b"5"),
            member(b"z.jpg", ONE),
        ),
        [("1", NO_IMAGE, -1), ("2", NO_IMAGE, -1), ("3", NO_IMAGE, -1), ("6", NO_IMAGE, -1), ("z", ONE, -1)],
    ),
    "a device of an exabyte has no data": (
        tar(header(b"d.jpg", 2**60, b"3"), member(b"z.jpg", ONE)),
        [("d", NO_IMAGE, -1), ("z", ONE, -1)],
    ),
    "executable members are passed over": (
        tar(
            member(b"a.jpg", ONE, mode=0o4777),
            member(b"a.pkl", b"cos\nsystem\n(S'touch executed'\ntR."),
            member(b"a.pyd", b"MZ"),
            member(b"a.pth", b"import os; os.system('touch executed')\n"),
            member(b"a.npy", b"\x93NUMPY"),
            member(b"a.cls", b"7"),
        ),
        [("a", ONE, 7)],
    ),
    "a pickle called an image is handed to the decoder, which refuses it": (
        tar(member(b"a.jpg", b"cos\nsystem\n"), member(b"b.jpg", ONE)),
        [("a", b"cos\nsystem\n", -1), ("b", ONE, -1)],
    ),
    "names in other encodings": (
        tar(
            member("ü.jpg".encode("latin-1"), ONE),
            member("日本.jpg".encode("shift-jis"), TWO),
            member("ü.jpg".encode(), ONE),
            pax({"path": b"\xff\xfe\n.jpg", "hdrcharset": b"BINARY"}) + member(b"x", TWO),
        ),
        [
            ("\udcfc", ONE, -1),
            ("日本".encode("shift-jis").decode(errors="surrogateescape"), TWO, -1),
            ("ü", ONE, -1),
            ("\udcff\udcfe\n", TWO, -1),
        ],
    ),
    "very long names": (
        tar(
            pax({"path": LONG.encode() + b".jpg"}) + member(b"x", ONE),
            member(b"././@LongLink", b"m" * 5000 + b".jpg\0", b"L", magic=b"ustar  \0") + member(b"y", TWO),
        ),
        [(LONG, ONE, -1), ("m" * 5000, TWO, -1)],
    ),
    "a key that comes again whole": (
        tar(member(b"a.jpg", ONE), member(b"b.jpg", TWO), member(b"a.jpg", TWO)),
        [("a", ONE, -1), ("b", TWO, -1), ("a", TWO, -1)],
    ),
    "empty members": (
        tar(*(member(b"%d.txt" % number) for number in range(3)), member(b"a.jpg"), member(b"b.jpg", ONE)),
        [
            *((f"{n}", NO_IMAGE, -1) for n in range(3)),
            ("a", "empty image member (0 bytes)", -1),
            ("b", ONE, -1),
        ],
    ),
    "a tar in a tar is one member": (
        tar(member(b"a.tar", by_tarfile(tarfile.USTAR_FORMAT)), member(b"b.jpg", ONE)),
        [("a", NO_IMAGE, -1), ("b", ONE, -1)],
    ),
    "sparse files are not pieced together": (
        tar(
            fuzz_shards.with_sum(header(b"s.jpg", 1024, b"S")[:482] + b"\1" + bytes(29))
            + SPARSE_MAP
            + bytes(1024),
            pax({"GNU.sparse.major": b"1", "GNU.sparse.name": b"t.jpg"}) + member(b"x", bytes(512)),
            member(b"u.jpg", ONE),
        ),
        [("s", NO_IMAGE, -1), ("t", NO_IMAGE, -1), ("u", ONE, -1)],
    ),
    "sizes in binary and in extended headers": (
        tar(
            header(b"a.jpg", b"\x80" + len(ONE).to_bytes(11)) + ONE + bytes(-len(ONE) % BLOCK),
            pax({"size": b"%d" % len(TWO)}) + header(b"b.jpg", 0) + TWO + bytes(-len(TWO) % BLOCK),
        ),
        [("a", ONE, -1), ("b", TWO, -1)],
    ),
    "10,000 extended headers in a row, where tarfile recurses": (
        tar(pax({"path": b"last.jpg"}), pax({"mtime": b"1"}) * 10_000, member(b"x", ONE)),
        [("last", ONE, -1)],
    ),
    "zeros behind the end": (tar(member(b"a.jpg", ONE), end=bytes(100_000)), [("a", ONE, -1)]),
}


@pytest.mark.parametrize("name", READABLE)
def test_strange_but_whole_shards_are_read(name, tmp_path):
    raw, expected = READABLE[name]
    (tmp_path / "a.tar").write_bytes(raw)
    assert contents(open_shards(str(tmp_path / "a.tar"))) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "own_cache"]


IMAGE = member(b"a.jpg", ONE)

REFUSED: dict[str, tuple[bytes, str]] = {
    "an exabyte is claimed": (
        tar(IMAGE, header(b"b.jpg", 2**60)),
        "of 1152921504606846976 bytes in a file of",
    ),
    "a size below zero": (tar(IMAGE, header(b"b.jpg", -1)), "no size"),
    "a size that only Python reads": (tar(IMAGE, header(b"b.jpg", b"1_0")), "no size"),
    "an extended size of 30 digits": (tar(pax({"size": b"9" * 30}), IMAGE), "no size"),
    "an extended header of a gigabyte": (tar(header(b"x", 2**30, b"x"), IMAGE), "1073741824 bytes"),
    "a long name of a gigabyte": (tar(header(b"L", 2**30, b"L"), IMAGE), "1073741824 bytes"),
    "a record of length 0": (tar(member(b"x", b"0 path=x\n", b"x"), IMAGE), "damaged extended header"),
    "a record longer than its header": (tar(member(b"x", b"99 path=x\n", b"x"), IMAGE), "damaged extended"),
    "a megabyte of digits": (tar(member(b"x", b"1" * MAX_EXTENDED, b"x"), IMAGE), "damaged extended"),
    "one name for all": (tar(pax({"path": b"x.jpg"}, b"g"), IMAGE), "gives all members one name or size"),
    "an extended header of nothing": (tar(IMAGE, pax({"path": b"b.jpg"})), "no member after"),
    "a sparse map without end": (
        tar(
            IMAGE,
            fuzz_shards.with_sum(header(b"s", 0, b"S")[:482] + b"\1" + bytes(29)),
            b"\1" * 5120,
            end=b"",
        ),
        "map of a sparse member truncated",
    ),
    "a wrong checksum": (tar(IMAGE, member(b"b.jpg", TWO, sum=b"000000")), "damaged header at byte"),
    "no end": (tar(IMAGE, end=b""), "no end mark"),
    "half an end": (tar(IMAGE, end=bytes(BLOCK)), "no end mark"),
    "garbage behind the end": (tar(IMAGE, end=bytes(2 * BLOCK) + b"x"), "joined"),
    "a second tar behind it": (tar(IMAGE) + tar(member(b"b.jpg", TWO)), "joined"),
    "half a header": (tar(IMAGE, end=header(b"b.jpg", 0)[:200]), "header truncated"),
    "compressed": (gzip.compress(tar(IMAGE)), "compressed with gzip, .*: uncompress it"),
    "an image": (ONE, "not a tar header"),
    "zeros": (bytes(5120), "holds no image"),
    "nothing": (b"", "no end mark"),
    "links only": (tar(member(b"a.jpg", kind=b"2", link=b"b.jpg")), "holds no image"),
    "one member twice": (tar(IMAGE, IMAGE), "'a.jpg' appears twice"),
    "long name twice": (
        tar(pax({"path": b"n" * 9000 + b".jpg"}), IMAGE, pax({"path": b"n" * 9000 + b".jpg"}), IMAGE),
        "n[.]{3}' appears twice",
    ),
    "labels behind all images": (
        tar(
            *(member(b"%d.jpg" % n, ONE) for n in range(3)), *(member(b"%d.cls" % n, b"1") for n in range(3))
        ),
        "the members of sample '0' are not consecutive",
    ),
    "a pickle as label": (tar(IMAGE, member(b"a.cls", b"cos\nsystem\n")), "'a.cls' holds"),
    "a label of a gigabyte": (tar(IMAGE, member(b"a.cls", b"1" * (1 << 20))), "'a.cls' holds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_indexed_ends_in_one_line(name, tmp_path):
    raw, reason = REFUSED[name]
    path = tmp_path / "a.tar"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=reason) as caught:
        build_index(path)
    message = str(caught.value)
    assert message.startswith(f"shard {path}")
    assert message.isprintable()
    assert len(message) < 500


def test_a_shard_of_a_gigabyte_of_nothing_is_not_read(tmp_path):
    """Sizes are claims: a file with holes holds any size, and its bytes must not be taken into memory to see that."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member(b"a.jpg", ONE) + header(b"b.jpg", 8 << 30))
        file.seek(8 << 30, os.SEEK_CUR)
        file.write(bytes(2 * BLOCK))
    process = psutil.Process()
    before = process.memory_info().rss
    shards = open_shards(str(path))
    assert shards.read(0) == ONE
    with pytest.raises(BrokenImage, match="8589934592 bytes"):
        shards.read(1)
    assert process.memory_info().rss - before < 200 << 20


@pytest.mark.slow
def test_many_tiny_members_take_little_time_and_memory(tmp_path):
    """Ten times the members take about ten times as long: nothing is compared with all that came before."""
    taken = []
    for count in (3_000, 30_000):
        path = tmp_path / f"{count}.tar"
        path.write_bytes(tar(*(member(b"%07d.jpg" % number) for number in range(count)), IMAGE))
        start = time.process_time()
        assert len(build_index(path)) == count + 1
        taken.append(time.process_time() - start)
    assert taken[1] < 40 * taken[0] + 0.5
    one_sample = tmp_path / "one.tar"
    one_sample.write_bytes(tar(*(member(b"a.x%07d" % number) for number in range(30_000)), IMAGE))
    assert len(build_index(one_sample)) == 1


def by_python(path: Path) -> list[tuple[str, int, int]]:
    """The slow twin: name, place and size of every plain file, as the standard library reads them."""
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        plain = (entry for entry in archive if entry.isreg() and not entry.issparse())
        return [(entry.name, entry.offset_data, entry.size) for entry in plain]


def by_us(path: Path) -> list[tuple[str, int, int]]:
    with path.open("rb") as file:
        return [(one.name, one.offset, one.size) for one in read_members(file) if one.regular]


@pytest.mark.slow
def test_members_are_those_of_the_standard_library(tmp_path):
    path = tmp_path / "a.tar"
    wholes = fuzz_shards.originals()
    for raw in wholes.values():
        path.write_bytes(raw)
        assert by_us(path) == by_python(path)
    compared = 0
    for number in range(300):
        raw = fuzz_shards.mutated(number, wholes, SEED)[1]
        if b"GNU.sparse" in raw:
            continue  # of a version that it does not know, it takes a sparse member for a plain one
        path.write_bytes(raw)
        try:
            ours = by_us(path)
            theirs = by_python(path)
        except (TarError, tarfile.TarError, ValueError):
            continue  # each refuses what the other lets pass, such as a damaged header in the middle
        # At a header whose date or owner it cannot read it ends without a word: what it saw until then must be the same.
        assert ours[: len(theirs)] == theirs, number
        compared += ours == theirs
    assert compared > 60


@pytest.mark.slow
def test_200_mutated_shards_and_100_mutated_indices(tmp_path):
    """Samples, broken samples or one line, within 30 s and 1 GiB of address space each; nothing run, nothing written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "work").mkdir()
    arguments = [str(SEED), str(NUM_MUTATED), str(tmp_path / "work")]
    os.environ["GLSD_CACHE"] = str(tmp_path / "work" / "cache")  # put back by the fixture
    rows = fuzz_watch.run("fuzz_run_shards.py", arguments, tmp_path / "empty")
    done = [row for row in rows if "done" in row]
    assert [row["done"] for row in done] == [*range(NUM_MUTATED), *range(NUM_MUTATED // 2)]
    assert [row for row in done if "escaped" in row or row["seen"]] == [], f"seed {SEED}"
    assert all(("samples" in row) != ("error" in row) for row in done)
    assert all("error" in row or row["same"] for row in done if row["name"] == "index")
    for row in done:
        path = str(tmp_path / "work" / ("pax.tar" if row["name"] == "index" else f"{row['done']}.tar"))
        message = row.get("error", path)
        assert path in message
        assert message.isprintable(), message
        assert len(message) < 700
    mutated = done[:NUM_MUTATED]
    assert 40 < sum("error" in row for row in mutated) < NUM_MUTATED - 40
    assert max(row["grown"] for row in done) < 100 << 20
    assert list((tmp_path / "empty").iterdir()) == []


NUMBERS_OF_HEADER = {
    "an index of 2^63 samples": (b'"count":"6"', b'"count":"9223372036854775807"'),
    "spans in floats": (b'"data_offsets":[0,', b'"data_offsets":[0.0,'),
    "spans in truth values": (b'"data_offsets":[0,', b'"data_offsets":[false,'),
    "an infinite mark": (b'"marks":"[', b'"marks":"[1e999,'),
    "no marks": (b'"marks":"[', b'"marks":"[],"no":"['),
    "nested deeply": (b'"marks":"[', b'"marks":"' + b"[" * 100_000),
    "an infinite size": (b'"shard_bytes":"', b'"shard_bytes":1e999,"no":"'),
    "a version of two lines": (b'"version":"', b'"version":"1\\n2'),
    "a version that is a list": (b'"version":"', b'"version":[],"no":"'),
    "no checksum": (b'"checksum"', b'"checksun"'),
}


@pytest.mark.parametrize("name", NUMBERS_OF_HEADER)
def test_nonsense_in_the_header_of_an_index_ends_in_one_line(name, tmp_path):
    pattern, _ = pack_noise(tmp_path, 6)
    (path,) = (tmp_path / "shards").glob("*.tar")
    raw = index_path(path).read_bytes()
    old, new = NUMBERS_OF_HEADER[name]
    text, data = raw[8 : 8 + int.from_bytes(raw[:8], "little")], raw[8 + int.from_bytes(raw[:8], "little") :]
    assert old in text
    text = text.replace(old, new, 1)
    index_path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(UserError, match=r"s-000000\.tar\.index is damaged.*pack\.py index") as caught:
        open_shards(pattern)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_every_changed_byte_of_an_index_is_seen(tmp_path):
    """Not one array: an offset that is off by a little gives other bytes, a label another class."""
    pattern, _ = pack_noise(tmp_path, 6)
    (path,) = (tmp_path / "shards").glob("*.tar")
    whole = contents(open_shards(pattern))
    raw = index_path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for place in range(start, len(raw)):
        index_path(path).write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            contents(open_shards(pattern))
    write_index(build_index(path), index_path(path), shard_name=path.name)
    assert contents(open_shards(pattern)) == whole


# Quarantine.

BROKEN = {
    1: b"",
    4: b"cos\nsystem\n",
    7: noise_image(7)[:-300],
    11: b"\x89PNG\r\n\x1a\n" + bytes(40),
    17: b"GIF89a",
}
REASONS = {
    1: "empty image member (0 bytes)",
    4: "not an image of a known format",
    7: "truncated JPEG (no end-of-image marker)",
}
SIZES = (7, 5, 8)
SPEC = usual_spec(global_size=16, local_size=8, num_local=1)
BATCH, EPOCHS = 6, 4


def expected_draws(
    sizes: tuple[int, ...], batch: int, seed: int, window: int, epochs: int
) -> set[tuple[int, int, int]]:
    """(epoch, position, index) of every broken sample that the order draws: computed without any loader."""
    total = sum(sizes) // batch * batch
    orders = [EpochOrder(sizes, seed=seed, epoch=epoch, window_shards=window) for epoch in range(epochs)]
    return {(e, p, order[p]) for e, order in enumerate(orders) for p in range(total) if order[p] in BROKEN}


def own_draws(broken: list[BrokenSample]) -> set[tuple[int, int, int]]:
    return {(one.epoch, one.position, one.index) for one in broken}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reports_every_broken_draw_once(tmp_path, workers):
    pattern, _ = pack_noise(tmp_path, *SIZES, change=BROKEN)
    shards = open_shards(pattern)
    steps = sum(SIZES) // BATCH * EPOCHS
    setup: dict[str, Any] = {
        "crop_spec": SPEC,
        "match_rule": None,
        "seed": 3,
        "window_shards": 2,
        "consumed": 0,
        "batch_size": BATCH,
        "micro_batch": 3,
    }
    reported: dict[int, list[BrokenSample]] = {}
    for world_size in (1, 2):
        reported[world_size] = []
        for rank in range(world_size):
            stream = pretrain_loader(
                shards, **setup, rank=rank, world_size=world_size, num_workers=workers, pin_memory=False
            )
            for _ in range(steps * (2 if world_size == 1 else 1)):
                reported[world_size] += next(stream).broken
            del stream
    assert sorted(reported[1]) == sorted(reported[2])
    # Samples in the order, and those that were drawn in the place of one and are broken themselves: one line each.
    places = collections.Counter((one.epoch, one.position) for one in reported[1])
    first: dict[tuple[int, int], BrokenSample] = {}
    for one in reported[1]:
        first.setdefault((one.epoch, one.position), one)
    assert own_draws(list(first.values())) == expected_draws(SIZES, BATCH, 3, 2, EPOCHS)
    assert len(first) == len(places)
    for one in reported[1]:
        assert one.index in BROKEN
        assert one.key == shards.key(one.index)
        assert one.replaced_by not in BROKEN
        assert 0 <= one.replaced_by < len(shards)
        assert one.reason.startswith(REASONS.get(one.index, ("unreadable", "not an image")))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_quarantine_of_a_run_adds_up(tmp_path, tiny_run, workers):
    pattern, _ = pack_noise(tmp_path, *SIZES, change=BROKEN)
    argv = tiny_run(
        "run",
        data__shards=pattern,
        data__num_workers=workers,
        data__max_bad_fraction=1.0,
        optim__batch_size=BATCH,
        optim__epochs=EPOCHS,
    )
    cfg = load(PretrainConfig, argv)
    AcceleratorState._reset_state()
    run = pretrain(cfg)
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    shards = open_shards(pattern)
    listed = [(line["epoch"], line["position"]) for line in lines]
    draws = expected_draws(SIZES, BATCH, cfg.seed, cfg.data.window_shards, EPOCHS)
    in_order = {(line["epoch"], line["position"], line["index"]) for line in lines}
    assert draws <= in_order
    assert {(epoch, position) for epoch, position, _ in draws} == set(listed)
    per_epoch = sum(SIZES) // BATCH
    for line in lines:
        assert line["index"] in BROKEN
        assert line["replaced_by"] not in BROKEN
        assert line["key"] == shards.key(line["index"])
        assert line["reason"].startswith(REASONS.get(line["index"], ("unreadable", "not an image")))
        assert line["step"] == line["epoch"] * per_epoch + line["position"] // BATCH + 1
    assert listed == sorted(listed)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["num_broken"] == len(lines) > 10
    running = [sum(line["step"] <= row["step"] for line in lines) for row in metrics]
    assert [row["num_broken"] for row in metrics] == running
