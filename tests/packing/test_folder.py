import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from glsd.cli import pack
from glsd.errors import BrokenImage, UserError
from glsd.packing.folder import pack_folder
from glsd.packing.write import index_shards, pack_samples
from glsd.shards.store import open_shards
from tests.helpers.small_shards import noise_image, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


LAUNCH = Path(__file__).parents[2] / "launch" / "pack.py"


@pytest.fixture
def photos_folder(tmp_path) -> Path:
    """Two classes of 6 and 4 images in nested folders, and things that are no images."""
    src = tmp_path / "my photos"
    for number in range(10):
        folder = src / ("dog" if number < 6 else "cat/nested.folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"img {number}.v1{'.JPG' if number % 2 else '.jpeg'}").write_bytes(noise_image(number))
    (src / "cat" / "notes.txt").write_text("no image")
    (src / "cat" / "._img.jpg").write_bytes(b"apple double")
    (src / ".thumbnails").mkdir()
    (src / ".thumbnails" / "t.jpg").write_bytes(noise_image(20))
    return src


def contents(dst: Path, pattern: str = "train-*.tar") -> list[tuple[bytes, int]]:
    shards = open_shards(str(dst / pattern))
    return [(shards.read(i), shards.label(i)) for i in range(len(shards))]


def test_folder_with_classes(photos_folder, tmp_path):
    dst = tmp_path / "out" / "shards"
    summary = pack_folder(photos_folder, dst)
    assert (summary.num_images, summary.classes, summary.unreadable) == (10, ("cat", "dog"), ())
    assert summary.skipped == {".txt": 1, ".jpg": 1}
    assert sorted(p.name for p in dst.iterdir()) == [
        "classes.json",
        "train-000000.tar",
        "train-000000.tar.index",
        "train-files.tsv",
    ]
    assert json.loads((dst / "classes.json").read_text()) == ["cat", "dog"]
    packed = contents(dst)
    assert sorted(packed) == sorted((raw, int(n < 6)) for n, raw in enumerate(map(noise_image, range(10))))
    assert [label for _, label in packed] != sorted(label for _, label in packed)  # shuffled
    with tarfile.open(summary.shards[0]) as tar:
        names = tar.getnames()
    assert names[0] == "00000000.cls"
    assert {name.split(".")[1] for name in names} == {"cls", "jpg", "jpeg"}


def test_packing_is_reproducible_and_seeded(photos_folder, tmp_path):
    made = [
        pack_folder(photos_folder, tmp_path / name, shuffle_seed=seed).shards[0].read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert made[0] == made[1] != made[2]


def test_webdataset_reads_it(photos_folder, tmp_path):
    summary = pack_folder(photos_folder, tmp_path / "out")
    rows = list(webdataset.WebDataset(str(summary.shards[0]), shardshuffle=False))
    assert [int(row["cls"]) for row in rows] == [label for _, label in contents(tmp_path / "out")]
    assert [row["__key__"] for row in rows] == [f"{number:08d}" for number in range(10)]


def test_a_shard_is_byte_for_byte_what_webdataset_writes(photos_folder, tmp_path):
    shard = pack_folder(photos_folder, tmp_path / "out").shards[0]
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    samples: dict[str, dict[str, bytes]] = {}
    for name, content in members:
        key, _, extension = name.partition(".")
        samples.setdefault(key, {})[extension] = content
    with (
        open(tmp_path / "theirs.tar", "wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0) as writer,
    ):
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})
    assert len(samples) == 10
    assert shard.read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_flat_folder_has_no_labels(tmp_path):
    src = tmp_path / "src"
    (src / "sub").mkdir(parents=True)
    (src / "a.jpg").write_bytes(noise_image(0))
    (src / "sub" / "b.png").write_bytes(noise_image(1, "PNG"))
    summary = pack_folder(src, tmp_path / "out")
    assert (summary.num_images, summary.classes, summary.stray) == (2, (), "")
    assert {label for _, label in contents(tmp_path / "out")} == {-1}
    assert not (tmp_path / "out" / "classes.json").exists()


def test_val_keeps_the_labels_of_train(photos_folder, tmp_path):
    dst = tmp_path / "out"
    pack_folder(photos_folder, dst)
    val = tmp_path / "val"
    (val / "dog").mkdir(parents=True)
    (val / "dog" / "0.jpg").write_bytes(noise_image(30))
    assert pack_folder(val, dst, prefix="val").classes == ("cat", "dog")
    assert contents(dst, "val-*.tar") == [(noise_image(30), 1)]
    (val / "emu").mkdir()
    (val / "emu" / "0.jpg").write_bytes(noise_image(31))
    with pytest.raises(UserError, match=r"class 'emu'.*lacks: leave it out") as caught:
        pack_folder(val, dst, prefix="val2")
    assert "another folder" not in str(caught.value)  # there it would be number 1


def test_the_numbers_of_another_folder(photos_folder, tmp_path):
    numbers = tmp_path / "mine.json"
    numbers.write_text('["zebra", "dog", "cat"]')
    summary = pack_folder(photos_folder, tmp_path / "out", classes=numbers)
    assert summary.classes == ("zebra", "dog", "cat")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["zebra", "dog", "cat"]
    assert sorted(contents(tmp_path / "out")) == sorted(
        (noise_image(number), 1 if number < 6 else 2) for number in range(10)
    )
    pack_folder(photos_folder, tmp_path / "other")
    with pytest.raises(UserError, match=r"other/classes\.json of an earlier packing numbers other classes"):
        pack_folder(photos_folder, tmp_path / "other", prefix="x", classes=numbers)
    numbers.write_text('["dog"]')
    with pytest.raises(UserError, match=r"class 'cat', which .*mine\.json lacks"):
        pack_folder(photos_folder, tmp_path / "third", classes=numbers)
    (photos_folder / "top.jpg").write_bytes(noise_image(11))
    with pytest.raises(UserError, match=r"top\.jpg lies in no subfolder"):
        pack_folder(photos_folder, tmp_path / "third", classes=numbers)
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json"):
        pack_folder(photos_folder / "cat", tmp_path / "third", classes=tmp_path / "nowhere.json")


def test_a_key_leads_back_to_its_file(photos_folder, tmp_path):
    odd = "dog/tab\there\nand \\ ünd\udcff.jpg"
    (photos_folder / odd).write_bytes(noise_image(12))
    (photos_folder / "dog" / "empty.jpg").write_bytes(b"")
    shards = open_shards(
        [str(path) for path in pack_folder(photos_folder, tmp_path / "out", prefix="p").shards]
    )
    text = (tmp_path / "out" / "p-files.tsv").read_text("utf-8", "surrogateescape")
    head, *rows = text.split("\n")[:-1]
    assert head == "key\tfile"
    table = dict(row.split("\t") for row in rows)
    assert sorted(table) == [shards.key(i) for i in range(len(shards))]
    for number in range(len(shards)):
        file = table[shards.key(number)]
        for escape, character in (("\\\\", "\\"), ("\\t", "\t"), ("\\n", "\n")):
            file = file.replace(escape, character)
        assert (photos_folder / file).read_bytes() == shards.read(number)


def test_a_postscript_file_is_no_png(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(noise_image(0, "EPS"))
    (tmp_path / "src" / "b.png").write_bytes(noise_image(0, "PNG"))
    summary = pack_folder(tmp_path / "src", tmp_path / "out")
    reason = "not an image of a known format: it looks like PostScript; convert it to PNG or JPEG"
    assert summary.unreadable == (("a.png", reason),)


def test_shards_roll_over_at_their_size(tmp_path):
    big = os.urandom(400_000)
    summary = pack_samples([(big, "jpg", None)] * 7, tmp_path / "out", prefix="x", shard_megabytes=1)
    assert [path.name for path in summary.shards] == [f"x-{n:06d}.tar" for n in range(4)]
    shards = open_shards(str(tmp_path / "out" / "x-{000000..000003}.tar"))
    assert shards.shard_sizes.tolist() == [2, 2, 2, 1]
    assert [shards.key(i) for i in range(7)] == [f"{n:08d}" for n in range(7)]
    assert max(path.stat().st_size for path in summary.shards) <= 2**20
    one = pack_samples([(big * 4, "jpg", 0)] * 2, tmp_path / "large", shard_megabytes=1)
    assert len(one.shards) == 2  # an image larger than a shard gets its own


def test_unreadable_images_are_listed(photos_folder, tmp_path):
    (photos_folder / "dog" / "empty.jpg").write_bytes(b"")
    (photos_folder / "dog" / "text.jpg").write_bytes(b"this is text")
    (photos_folder / "dog" / "cut.jpg").write_bytes(noise_image(0)[:-300])
    (photos_folder / "dog" / "gone.jpg").symlink_to("nowhere")
    quick = pack_folder(photos_folder, tmp_path / "quick")
    assert {(Path(path).name, reason.split(":")[0]) for path, reason in quick.unreadable} == {
        ("empty.jpg", "empty file (0 bytes)"),
        ("text.jpg", "not an image of a known format"),
        ("gone.jpg", "[Errno 2] No such file or directory"),
    }
    assert quick.num_images == 11
    full = pack_folder(photos_folder, tmp_path / "full", full_check=True)
    assert full.num_images == 10
    assert "cut.jpg" in {Path(path).name for path, _ in full.unreadable}


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0.jpg").write_bytes(noise_image(0))
    src = tmp_path / "src"
    src.mkdir()
    (src / "class").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(src)
    assert pack_folder(src, tmp_path / "out").num_images == 1


def test_two_classes_that_are_one_folder_are_refused(tmp_path):
    """One of the two would lose its images; which one depends on the order of the names."""
    src = tmp_path / "src"
    (src / "cat" / "young").mkdir(parents=True)
    (src / "cat" / "0.jpg").write_bytes(noise_image(0))
    (src / "cat" / "young" / "1.jpg").write_bytes(noise_image(1))
    for link, target in (("dog", "cat"), ("ape", "cat"), ("bee/old", "../cat"), ("dog/x", "../cat/young")):
        (src / link).parent.mkdir(exist_ok=True)
        (src / link).symlink_to(target)
        with pytest.raises(
            UserError, match=r"are one folder \(a link\), but lie in two classes, .*'cat'.*: remove the link"
        ):
            pack_folder(src, tmp_path / "out")
        (src / link).unlink()
    (src / "dog").mkdir(exist_ok=True)
    (src / "dog" / "2.jpg").write_bytes(noise_image(2))
    for link in ("cat/again", "dog/papers", "cat/papers"):
        (tmp_path / "papers").mkdir(exist_ok=True)
        (src / link).symlink_to(src / "cat" / "young" if link == "cat/again" else tmp_path / "papers")
    summary = pack_folder(src, tmp_path / "out")
    assert summary.notes == (
        "left out folders that are links to a folder packed already: cat/young = cat/again, dog/papers = cat/papers",
    )
    assert sorted(contents(tmp_path / "out")) == sorted((noise_image(n), n // 2) for n in range(3))
    (src / "stray.jpg").write_bytes(noise_image(3))
    (src / "elk").symlink_to("cat")
    assert (
        pack_folder(src, tmp_path / "plain").notes[0].endswith("cat/papers, elk = cat")
    )  # no classes, no doubt


SPLIT_ROOTS = {
    "ImageNet": ["train/n01/0.jpg", "train/n02/1.jpg", "val/n01/2.jpg"],
    "other words": ["Training/a/0.jpg", "valid/a/1.jpg", "TEST/a/2.jpg"],
    "flat": ["train/0.jpg", "val/1.jpg"],
    "with something else": ["train/a/0.jpg", "test/a/1.jpg", "labels/2.jpg"],
    "one split": ["train/a/0.jpg", "train/b/1.jpg"],
}


@pytest.mark.parametrize("name", SPLIT_ROOTS)
def test_splits_are_no_classes(tmp_path, name):
    for number, path in enumerate(SPLIT_ROOTS[name]):
        (tmp_path / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / path).write_bytes(noise_image(number))
    first = sorted({path.split("/")[0] for path in SPLIT_ROOTS[name]} - {"labels"})[0]
    with pytest.raises(
        UserError,
        match=rf"subfolders of .*src are splits, not classes .*: glsd pack .*src/{first} DST --prefix {first}",
    ):
        pack_folder(tmp_path / "src", tmp_path / "out")
    names = sorted({path.split("/")[0] for path in SPLIT_ROOTS[name]})
    (tmp_path / "names.json").write_text(json.dumps(names))
    summary = pack_folder(tmp_path / "src", tmp_path / "out", classes=tmp_path / "names.json")
    assert summary.classes == tuple(names)


def test_classes_that_are_called_like_a_split(tmp_path):
    for number, path in enumerate(["train/0.jpg", "train/1.jpg", "car/2.jpg"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(noise_image(number))
    assert pack_folder(tmp_path, tmp_path / "out").classes == ("car", "train")


def test_a_folder_above_the_classes_is_told(tmp_path):
    for number in range(4):
        folder = tmp_path / "src" / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(noise_image(number))
    (note,) = pack_folder(tmp_path / "src", tmp_path / "out").notes
    assert (
        note
        == f"all images have one class, 'images': if its subfolders are the classes, pack {tmp_path}/src/images"
    )
    assert pack_folder(tmp_path / "src" / "images", tmp_path / "o2").notes == ()


def test_every_ending_of_a_known_format_is_an_image(tmp_path, capsys):
    src = tmp_path / "src"
    src.mkdir()
    kinds = {
        "jfif": "JPEG",
        "JPE": "JPEG",
        "jif": "JPEG",
        "pjpeg": "JPEG",
        "dib": "BMP",
        "pnm": "PPM",
        "apng": "PNG",
    }
    for number, (ending, kind) in enumerate(kinds.items()):
        (src / f"{number}.{ending}").write_bytes(noise_image(number, kind))
    for number in range(23):
        for copy in range(1 + (number < 2)):
            (src / f"{copy}.x{number:02d}").write_bytes(b"no image")
    pack.main([str(src), str(tmp_path / "out"), "--workers=0"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("packed 7 images without labels")
    assert printed[1].startswith("skipped 25 files that are not images: 2 .x00, 2 .x01, 1 .x02, ")
    assert printed[1].endswith(" and 3 of 3 other kinds")
    found = {raw for raw, _ in contents(tmp_path / "out")}
    assert found == {noise_image(number, kind) for number, kind in enumerate(kinds.values())}


def test_bad_folders(tmp_path, photos_folder):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="does not exist"):
        pack_folder(tmp_path / "nothing", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in .*empty: it is empty"):
        pack_folder(tmp_path / "empty", out)
    (tmp_path / "empty" / "a.heic").write_bytes(b"x")
    with pytest.raises(UserError, match="none of its 1 files is one; expected apng, "):
        pack_folder(tmp_path / "empty", out)
    with pytest.raises(UserError, match="is not a folder"):
        pack_folder(tmp_path / "empty" / "a.heic", out)
    (tmp_path / "empty" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="no usable image"):
        pack_folder(tmp_path / "empty", out)
    assert list(out.iterdir()) == []
    for bad in (
        tmp_path / "empty" / "a.jpg",
        tmp_path / "empty" / "a.jpg" / "below",
        Path("/proc/nothing/here"),
    ):
        with pytest.raises(UserError, match="cannot write to"):
            pack_folder(photos_folder, bad)
    for change in ({"shard_megabytes": 0}, {"prefix": ""}, {"prefix": "a/b"}):
        with pytest.raises(UserError):
            pack_folder(photos_folder, out, **change)


def test_shards_are_never_overwritten(photos_folder, tmp_path):
    dst = tmp_path / "out"
    before = pack_folder(photos_folder, dst).shards[0].read_bytes()
    with pytest.raises(UserError, match=r"already has train-000000\.tar"):
        pack_folder(photos_folder, dst, shuffle_seed=5)
    assert (dst / "train-000000.tar").read_bytes() == before
    pack_folder(photos_folder, dst, prefix="train-extra")
    assert pack_folder(photos_folder, dst, prefix="tr").num_images == 10  # other prefixes are no obstacle
    (dst / ".val.packing").mkdir()
    (dst / ".val.packing" / "val-000000.tar").write_bytes(b"half a shard")
    assert (
        pack_folder(photos_folder, dst, prefix="val").num_images == 10
    )  # what nobody vouches for is made anew
    assert not (dst / ".val.packing").exists()


def test_an_interrupted_packing_leaves_nothing(tmp_path):
    def samples():
        yield noise_image(0), "jpg", None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_samples(samples(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_is_one_line(photos_folder, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write to .*No space left"):
        pack_folder(photos_folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_index_for_existing_shards(make_shards, tmp_path, monkeypatch):
    pattern, packed = make_shards(3, 2, index=False)
    assert index_shards(pattern) == 5
    assert len(list((tmp_path / "shards").glob("*.tar.index"))) == 2
    monkeypatch.setenv("GLSD_CACHE", str(tmp_path / "unused"))
    shards = open_shards(pattern)
    assert shards.read(4) == packed[4][0]
    assert not (tmp_path / "unused").exists()


def test_broken_samples_can_be_packed_for_tests(tmp_path):
    pack_samples([(b"", "jpg", 1), (b"x", "jpg", None)], tmp_path / "out", prefix="t", classes=["a", "b"])
    shards = open_shards(str(tmp_path / "out" / "t-*.tar"))
    with pytest.raises(BrokenImage):
        shards.read(0)
    assert (tmp_path / "out" / "classes.json").exists()
    with pytest.raises(UserError, match="no usable image"):
        pack_samples([], tmp_path / "out", prefix="u")


@pytest.fixture
def launch(monkeypatch):
    """The main function of launch/pack.py."""
    return pack.main


def test_command_line(launch, photos_folder, tmp_path, capsys):
    (photos_folder / "dog" / "text.jpg").write_bytes(b"this is text")
    launch([str(photos_folder), str(tmp_path / "out"), "--prefix", "p"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("packed 10 images of 2 classes into 1 shard: ")
    assert printed[1] == "skipped 2 files that are not images: 1 .jpg, 1 .txt"
    assert printed[2:-1] == ["left out 1 unreadable image:", "  dog/text.jpg: not an image of a known format"]
    assert printed[-1] == f"next: glsd audit '{tmp_path}/out/p-*.tar'"
    (photos_folder / "stray.jpg").write_bytes(noise_image(11))
    launch([str(photos_folder), str(tmp_path / "out"), "--prefix", "q"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("packed 11 images without labels into ")
    assert printed[1].startswith(
        "the images have no labels because stray.jpg lies outside the subfolders: move "
    )
    (photos_folder / "stray.jpg").unlink()
    (tmp_path / "numbers.json").write_text('["dog", "cat"]')
    launch([str(photos_folder), str(tmp_path / "o2"), "--classes", str(tmp_path / "numbers.json")])
    assert {label for _, label in contents(tmp_path / "o2")} == {0, 1}
    assert (tmp_path / "o2" / "classes.json").read_text() == '[\n "dog",\n "cat"\n]\n'
    capsys.readouterr()
    (tmp_path / "out" / "p-000000.tar.index").unlink()
    launch(["index", str(tmp_path / "out" / "p-*.tar")])
    assert capsys.readouterr().out.strip() == "indexed 10 samples"
    tar = write_tar(tmp_path / "m.tar", [(f"{n}.{kind}", b"x") for n in range(3) for kind in ("png", "tif")])
    launch(["index", "--image", "tif", str(tar)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "indexed 3 samples"
    assert printed[1].startswith(
        "note: 3 further images of samples are not used: 3 .png; a sample has one image"
    )


@pytest.mark.slow
def test_empty_folder_on_the_command_line_is_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, LAUNCH, tmp_path, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no images in {tmp_path}: it is empty; expected apng, ")
    assert done.stderr.count("\n") == 1
