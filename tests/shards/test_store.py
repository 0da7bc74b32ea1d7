import bz2
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from webdataset import TarWriter

from glsd.errors import BrokenImage, UserError
from glsd.packing.write import pack_samples
from glsd.shards import store as shards_module
from glsd.shards.find import find_shards
from glsd.shards.index import (
    build_index,
    index_path,
    map_index,
    read_header,
    write_index,
)
from glsd.shards.store import (
    check_disjoint,
    open_shards,
)
from tests.helpers.small_shards import noise_image, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("index", [True, False])
def test_every_sample_comes_back_bit_exact(make_shards, index):
    pattern, packed = make_shards(5, 3, 4, index=index)
    shards = open_shards(pattern)
    assert len(shards) == 12
    assert shards.shard_sizes.tolist() == [5, 3, 4]
    for number, (raw, _, label) in enumerate(packed):
        assert shards.read(number) == raw
        assert shards.label(number) == label
    assert shards.labels().tolist() == [label for _, _, label in packed]
    assert [shards.key(i) for i in (0, 4, 5, 8)] == ["00000000", "00000004", "00000000", "00000000"]
    assert [Path(shards.shard_of(i)).name for i in (4, 5, 8)] == [f"s-00000{i}.tar" for i in range(3)]
    for wrong in (-1, 12):
        with pytest.raises(IndexError):
            shards.read(wrong)


@pytest.mark.photos
def test_photographs_against_tarfile(photos):
    shards = open_shards(str(photos / "pretrain_caltech101" / "val-{000000..000001}.tar"))
    number = 0
    for path in shards.paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".jpg"):
                    assert shards.read(number) == file.read()
                else:
                    assert shards.label(number) == int(file.read())
                    number += 1
    assert number == len(shards) == 915


def test_groups_as_webdataset_does(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("dir.v1/first name.jpg", b"one"),
            ("dir.v1/first name.seg.png", b"mask"),
            ("dir.v1/first name.CLS", b" 7\n"),
            ("__meta__.json", b"{}"),
            ("._b.jpg", b"apple double"),
            ("README", b"no dot"),
            ("b.JPEG", b"two"),
            ("b.png", b"second image of the same sample"),
            ("ü\udcff.cls", b"-1"),
            ("ü\udcff.webp", b"three"),
        ],
    )
    shards = open_shards(str(path))
    assert [shards.key(i) for i in range(3)] == ["dir.v1/first name", "b", "ü\udcff"]
    assert [shards.read(i) for i in range(3)] == [b"one", b"two", b"three"]
    assert shards.labels().tolist() == [7, -1, -1]


def test_missing_and_empty_images_are_broken_not_lost(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.cls", b"1"), ("1.jpg", b""), ("2.jpg", b"x")])
    shards = open_shards(str(path))
    assert len(shards) == 3
    for number, reason in ((0, "no image"), (1, "0 bytes")):
        with pytest.raises(BrokenImage, match=reason):
            shards.read(number)
    assert shards.read(2) == b"x"


def test_links_are_never_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "0.jpg"), (tarfile.LNKTYPE, "1.jpg")):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
        header = tarfile.TarInfo("2.jpg")
        header.size = 1
        tar.addfile(header, io.BytesIO(b"x"))
    shards = open_shards(str(path))
    for number in (0, 1):
        with pytest.raises(BrokenImage, match="no image"):
            shards.read(number)


def test_long_and_pax_names(tmp_path):
    name = "d/" * 60 + "x" * 120
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            header = tarfile.TarInfo(name + ".jpg")
            header.size = 3
            tar.addfile(header, io.BytesIO(b"abc"))
        shards = open_shards(str(path))
        assert (shards.key(0), shards.read(0)) == (name, b"abc")


@pytest.mark.parametrize("index", [True, False])
def test_a_shard_cut_anywhere_is_an_error_at_open(make_shards, index):
    pattern, _ = make_shards(3, index=index)
    path = find_shards(pattern)[0]
    whole = Path(path).read_bytes()
    end = build_index(path)
    data_end = int(end.image_offset[-1] + end.image_size[-1])
    cuts = [0, 1, 511, 512, len(whole) // 2, data_end - 1, data_end, data_end + 512]
    for cut in cuts:
        Path(path).write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"s-000000\.tar.*(truncated|not an uncompressed)"):
            open_shards(pattern)
    Path(path).write_bytes(whole)
    open_shards(pattern)


def test_damage_in_the_middle_is_an_error(make_shards):
    pattern, _ = make_shards(3, index=False)
    path = Path(find_shards(pattern)[0])
    whole = bytearray(path.read_bytes())
    second = int(build_index(path).image_offset[1]) - 512
    whole[second : second + 512] = b"\xff" * 512
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"damaged"):
        open_shards(pattern)


def test_joined_and_compressed_tars_are_refused(make_shards, tmp_path):
    pattern, _ = make_shards(2, 2, index=False)
    first, second = (Path(path) for path in find_shards(pattern))
    (tmp_path / "joined.tar").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match="joined"):
        open_shards(str(tmp_path / "joined.tar"))
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(first)
    with pytest.raises(
        UserError, match=r"compressed with gzip, not an uncompressed tar file: uncompress it \(gunzip"
    ):
        open_shards(str(tmp_path / "c.tar.gz"))
    raw = first.read_bytes()
    for made, words in (
        (bz2.compress(raw), "compressed with bzip2.*bunzip2"),
        (lzma.compress(raw), "compressed with xz.*unxz"),
        (b"PK\x03\x04" + raw, "a zip archive.*unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS.*git lfs pull"),
    ):
        (tmp_path / "made.tar").write_bytes(made)
        with pytest.raises(UserError, match=words):
            open_shards(str(tmp_path / "made.tar"))


def test_tar_without_images_and_doubled_members(tmp_path):
    with pytest.raises(UserError, match="holds no image"):
        open_shards(str(write_tar(tmp_path / "a.tar", [("photo.of.cat.jpg", b"x"), ("b.txt", b"")])))
    with pytest.raises(UserError, match="holds no image"):
        open_shards(str(write_tar(tmp_path / "b.tar", [])))
    with pytest.raises(UserError, match=r"'0\.jpg' appears twice"):
        open_shards(str(write_tar(tmp_path / "c.tar", [("0.jpg", b"x"), ("0.jpg", b"y")])))


def test_index_is_cached_elsewhere_and_follows_the_file(make_shards, tmp_path, monkeypatch):
    pattern, packed = make_shards(3, index=False)
    monkeypatch.setenv("GLSD_CACHE", str(tmp_path / "cache"))
    open_shards(pattern)
    path = Path(find_shards(pattern)[0])
    assert [p.suffix for p in path.parent.glob("s-*")] == [".tar"]  # nothing beside the user's data
    (cached,) = (tmp_path / "cache" / "index").iterdir()
    before = cached.stat().st_mtime_ns
    open_shards(pattern)
    assert cached.stat().st_mtime_ns == before
    with TarWriter(str(path), encoder=False) as tar:
        tar.write({"__key__": "new", "jpg": packed[0][0]})
    assert len(open_shards(pattern)) == 1


def test_stale_or_damaged_sidecar(make_shards):
    pattern, packed = make_shards(3)
    path = find_shards(pattern)[0]
    sidecar = index_path(path)
    good = sidecar.read_bytes()
    for bad in (
        b"",
        b"12345678",
        good[:40],
        good[:-1],
        good + b"x",
        b"\xff" * 200,
        good.replace(b"I64", b"F64", 1),
    ):
        sidecar.write_bytes(bad)
        with pytest.raises(UserError, match=r"s-000000\.tar\.index is damaged.*pack\.py index"):
            open_shards(pattern)
    sidecar.write_bytes(good.replace(b'"version":"3"', b'"version":"9"'))
    with pytest.raises(UserError, match="version 9"):
        open_shards(pattern)
    sidecar.write_bytes(good)
    with TarWriter(path, encoder=False) as tar:
        for number in range(40):
            tar.write({"__key__": f"{number}", "jpg": packed[0][0]})
    with pytest.raises(UserError, match=r"bytes but .* in its index.*truncated or was replaced"):
        open_shards(pattern)


def bitmap(number: int) -> bytes:
    """Pictures whose files are all of one size."""
    return noise_image(number, "BMP")


SAME_SIZE = {
    "in another order": lambda rows: rows[::-1],
    "of other images": lambda rows: [(bitmap(n + 50), ext, label) for n, (_, ext, label) in enumerate(rows)],
    "with other labels": lambda rows: [(raw, ext, label + 1) for raw, ext, label in rows],
    "with labels from the middle on": lambda rows: [
        (raw, ext, label + label // 2) for raw, ext, label in rows
    ],
}


@pytest.mark.parametrize("extension", ["bmp", "jpg"])  # the label comes after the image, or before it
@pytest.mark.parametrize("change", SAME_SIZE)
def test_sidecar_of_another_shard_of_the_same_size(tmp_path, change, extension):
    """Whatever the files' times are: copies and archives do not keep them."""
    rows = [(bitmap(number), extension, number) for number in range(5)]
    one, other = (
        pack_samples(part, tmp_path / name).shards[0]
        for name, part in (("a", rows), ("b", SAME_SIZE[change](rows)))
    )
    assert one.stat().st_size == other.stat().st_size
    open_shards(str(other))
    for time in (1, 2_000_000_000):
        os.utime(index_path(one), (time, time))
        assert open_shards(str(one)).labels().tolist() == [0, 1, 2, 3, 4]
    other.write_bytes(one.read_bytes())
    with pytest.raises(UserError, match=r"is not the one that its index .* made for.*pack\.py index"):
        open_shards(str(other))
    write_index(build_index(other), index_path(other), shard_name=other.name)
    assert open_shards(str(other)).labels().tolist() == [0, 1, 2, 3, 4]


def test_sets_that_share_a_shard(make_shards, tmp_path):
    pattern, _ = make_shards(2, 2, 2)
    first, second, third = find_shards(pattern)
    train = open_shards([first, second])
    check_disjoint(train, open_shards(third), names=("a", "b"))
    (tmp_path / "link.tar").symlink_to(second)
    (tmp_path / "link.tar.index").symlink_to(index_path(second))
    for shared in (second, str(tmp_path / "link.tar")):
        with pytest.raises(UserError, match=rf"^data.a and data.b have 1 shards in common, such as {shared}"):
            check_disjoint(train, open_shards([third, shared]), names=("data.a", "data.b"))


def test_index_round_trip(tmp_path, make_shards):
    pattern, _ = make_shards(4)
    index = build_index(find_shards(pattern)[0])
    write_index(index, tmp_path / "x.index", shard_name="x")
    again = map_index(read_header(tmp_path / "x.index"))
    for name in ("image_offset", "image_size", "label", "key_end", "key_bytes"):
        np.testing.assert_array_equal(getattr(index, name), getattr(again, name))
    assert (again.marks, again.digest) == (index.marks, index.digest)
    assert (again.shard_bytes, read_header(tmp_path / "x.index").count) == (index.shard_bytes, 4)
    assert [path.name for path in tmp_path.glob("*x.index*")] == ["x.index"]  # no temporary file left


def test_index_that_points_outside(make_shards):
    pattern, _ = make_shards(2)
    path = find_shards(pattern)[0]
    index = build_index(path)
    beyond = replace(index, image_size=np.array([1 << 60, 5]))
    write_index(beyond, index_path(path), shard_name="s")
    with pytest.raises(UserError, match=r"index of shard .* is damaged"):
        open_shards(pattern).read(0)


def test_unwritable_cache(make_shards, tmp_path, monkeypatch):
    pattern, _ = make_shards(2, index=False)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GLSD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write the index.*GLSD_CACHE"):
        open_shards(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "no shards given"),
        ([], "no shards given"),
        ("pipe:cat x.tar", "pipes are not supported"),
        ("ftp://host/x.tar", r"ftp://host/x\.tar: expected a local path or an address that begins with http"),
        ("{tmp}/nothing-*.tar", r"no shard matches '.*nothing-\*"),
        ("{tmp}/shards/s-{000000..000003}.tar", r"no shard matches '.*s-000002.tar' \(of the pattern"),
        ("{tmp}/shards", "is a folder"),
        ("{tmp}/shards/s-{000.tar", "no shard matches|unbalanced"),
        (["{tmp}/shards/s-000000.tar", "{tmp}/shards/../shards/s-*.tar"], "named twice"),
    ],
)
def test_bad_patterns(make_shards, tmp_path, pattern, message):
    make_shards(2, 2)
    given = [pattern] if isinstance(pattern, str) else pattern
    given = [one.replace("{tmp}", str(tmp_path)) for one in given]
    with pytest.raises(UserError, match=message) as caught:
        open_shards(given[0] if isinstance(pattern, str) else given)
    assert "\n" not in str(caught.value)


def test_patterns_keep_their_order(make_shards, tmp_path, monkeypatch):
    make_shards(1, 1, 1, 1)
    folder = tmp_path / "shards"
    names = [
        Path(p).name[7:8] for p in find_shards([f"{folder}/s-00000[23].tar", f"{folder}/s-00000{{1,0}}.tar"])
    ]
    assert names == ["2", "3", "1", "0"]
    (folder / "s-files.tsv").write_text("key\tfile\n")
    assert len(find_shards(f"{folder}/s-*")) == 4  # not the indices and the table beside them
    (folder / "odd {1..2}[x].tar").write_bytes((folder / "s-000000.tar").read_bytes())
    assert len(open_shards(f"{folder}/odd {{1..2}}[x].tar")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(find_shards("~/shards/s-*.tar")) == 4


def test_fingerprint_means_names_counts_and_order(make_shards, tmp_path):
    pattern, _ = make_shards(3, 2)
    same, _ = make_shards(3, 2, folder="elsewhere")
    assert open_shards(pattern).fingerprint() == open_shards(same).fingerprint()
    first, second = find_shards(pattern)
    assert open_shards([second, first]).fingerprint() != open_shards([first, second]).fingerprint()
    other, _ = make_shards(2, 3, folder="other")
    assert open_shards(other).fingerprint() != open_shards(pattern).fingerprint()


def test_pickled_set_reads_the_same(make_shards):
    pattern, packed = make_shards(3, 3)
    shards = open_shards(pattern)
    shards.read(0)
    again = pickle.loads(pickle.dumps(shards))  # noqa: S301 - our own object, as it goes to worker processes
    assert [again.read(i) for i in range(6)] == [raw for raw, _, _ in packed]


def test_few_files_are_open_at_a_time(make_shards, monkeypatch):
    pattern, packed = make_shards(*[2] * 9)
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 3)
    shards = open_shards(pattern)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(18), *range(17, -1, -1)]:
        assert shards.read(number) == packed[number][0]
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 4
    del shards
    assert len(os.listdir("/proc/self/fd")) == before


def test_shard_that_vanishes_or_shrinks_while_in_use(make_shards):
    pattern, _ = make_shards(2, 2)
    shards = open_shards(pattern)
    first, second = find_shards(pattern)
    os.unlink(first)
    with pytest.raises(UserError, match=r"cannot read shard .*s-000000\.tar: No such file"):
        shards.read(0)
    os.truncate(second, 600)
    with pytest.raises(UserError, match=r"s-000001\.tar ends before byte"):
        shards.read(3)


@pytest.mark.slow
def test_a_hundred_million_samples_take_little_memory(tmp_path):
    program = Path(__file__).with_name("huge_index.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == 100_000_000
    assert found["opened_mib"] < 100
    assert found["used_mib"] < 100
