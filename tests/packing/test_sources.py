"""Lists, torchvision's data sets and large photographs: what goes in comes out, to the bit where nothing must change."""

import builtins
import gzip
import io
import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image, ImageCms, JpegImagePlugin, TiffImagePlugin

from glsd.cli import pack
from glsd.data.decode import decode
from glsd.errors import BrokenImage, UserError
from glsd.packing.folder import pack_folder
from glsd.packing.lists import pack_list
from glsd.packing.resize import shorten
from glsd.packing.torchvision_sets import TORCHVISION_SETS, pack_torchvision
from glsd.shards.store import open_shards
from tests.helpers.small_shards import encoded, noise_image

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def photos_folder(tmp_path) -> Path:
    """Six images, x/0.jpg to x/5.jpg."""
    (tmp_path / "src" / "x").mkdir(parents=True)
    for number in range(6):
        (tmp_path / "src" / "x" / f"{number}.jpg").write_bytes(noise_image(number))
    return tmp_path / "src"


def packed(dst: Path, prefix: str = "train") -> dict[bytes, int]:
    shards = open_shards(str(dst / f"{prefix}-*.tar"))
    return {shards.read(i): shards.label(i) for i in range(len(shards))}


def sources(dst: Path, prefix: str = "train") -> list[str]:
    return sorted(row.split("\t")[1] for row in (dst / f"{prefix}-files.tsv").read_text().splitlines()[1:])


LABELS = [3, 0, 3, 1, 0, 3]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_list_with_numbers(photos_folder, tmp_path, kind):
    file = photos_folder / f"list.{kind}"
    paths = [f"x/{number}.jpg" for number in range(6)]
    if kind == "parquet":
        pq.write_table(pa.table({"more": paths, "label": LABELS, "path": paths}), file)
    else:
        sign = "," if kind == "csv" else "\t"
        rows = [f'"a{sign}b"{sign}{label}{sign}{path}' for label, path in zip(LABELS, paths, strict=True)]
        file.write_text("\ufeffmore" + f"{sign}label{sign}path\n" + "\n\n".join(rows))
    summary = pack_list(file, tmp_path / "out", prefix="train")
    assert (summary.num_images, summary.classes, summary.num_classes) == (6, (), 3)
    assert packed(tmp_path / "out") == {noise_image(number): LABELS[number] for number in range(6)}
    assert not (tmp_path / "out" / "classes.json").exists()
    assert sources(tmp_path / "out") == paths


def test_a_list_with_names_and_an_earlier_numbering(photos_folder, tmp_path):
    names = ["emu", "007", "emu", "cat", "007", "emu"]
    rows = [f"{photos_folder}/x/{n}.jpg;{name}".replace(";", ",") for n, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("\n".join(["file,species", *rows]))
    settings = {"path_column": "file", "label_column": "species", "prefix": "train"}
    assert pack_list(tmp_path / "list.csv", tmp_path / "out", **settings).classes == ("007", "cat", "emu")
    assert packed(tmp_path / "out") == {
        noise_image(n): ["007", "cat", "emu"].index(name) for n, name in enumerate(names)
    }
    (tmp_path / "mine.json").write_text('["cat", "dog", "emu", "007"]')
    pack_list(str(tmp_path / "list.csv"), tmp_path / "o2", classes=tmp_path / "mine.json", **settings)
    assert set(packed(tmp_path / "o2").values()) == {0, 2, 3}
    (tmp_path / "list.csv").write_text("\n".join(["file,species", *rows[:2], rows[3].replace("cat", "yak")]))
    with pytest.raises(UserError, match=r"has the class 'yak', which .*classes\.json lacks"):
        pack_list(tmp_path / "list.csv", tmp_path / "out", **{**settings, "prefix": "val"})


def test_several_lists_and_another_root(photos_folder, tmp_path):
    for part in range(2):
        rows = [f"{number}.jpg,{part}" for number in range(3 * part, 3 * part + 3)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *rows]))
    lists = [tmp_path / "0.csv", tmp_path / "1.csv"]
    pack_list(lists, tmp_path / "out", root=photos_folder / "x", prefix="train")
    assert packed(tmp_path / "out") == {noise_image(number): number // 3 for number in range(6)}


def test_rows_that_cannot_be_packed_are_listed(photos_folder, tmp_path):
    (photos_folder / "pipe.jpg").symlink_to("/dev/zero")
    rows = ["x/0.jpg,5", "x/1.jpg,", "x/2.jpg,-1", "x/9.jpg,1", "pipe.jpg,1", "x/3.jpg, 2 "]
    (photos_folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    summary = pack_list(photos_folder / "list.csv", tmp_path / "out", prefix="train")
    assert packed(tmp_path / "out") == {noise_image(0): 5, noise_image(3): 2}
    reasons = dict(summary.unreadable)
    assert reasons["x/1.jpg"] == reasons["x/2.jpg"] == "no label"
    assert "No such file" in reasons["x/9.jpg"]
    assert "no regular file" in reasons["pipe.jpg"]
    summary = pack_list(photos_folder / "list.csv", tmp_path / "plain", label_column="", prefix="train")
    assert set(packed(tmp_path / "plain").values()) == {-1}
    assert (summary.num_images, summary.num_classes) == (4, 0)


BAD_LISTS = {
    "path,label\n": "has no rows",
    "": r"has no column 'path', but : name it with --path_column",
    "path,labels\nx/0.jpg,1": r"no column 'label', but 'path', 'labels'; did you mean 'labels'\?: name it with --label_column",
    "path,label\nx/0.jpg": r"list\.csv, line 2: 1 cells, the header has 2",
    "path,label\n,3": r"line 2: empty path",
    "path,label\nx/0.jpg,": "no row has a label; without labels: --label_column ''",
    "path,label\nx/0.jpg,-7": "label -7: expected whole numbers from 0",
    "path,label\nx/90.jpg,1": r"no usable image in .*list\.csv; x/90\.jpg: .*No such file",
    'path,label\n"x/0.jpg,1': r"list\.csv, line 2: unexpected end of data",
    "path,label\n" + "x" * 2**20 + "y,1": "field larger than field limit",
}


@pytest.mark.parametrize("text", BAD_LISTS, ids=range(len(BAD_LISTS)))
def test_bad_lists(photos_folder, tmp_path, text):
    (photos_folder / "list.csv").write_text(text)
    with pytest.raises(UserError, match=BAD_LISTS[text]):
        pack_list(photos_folder / "list.csv", tmp_path / "out", prefix="train")


def test_bad_list_files(photos_folder, tmp_path):
    for name, raw, message in (
        ("a.parquet", b"PAR1 no", "cannot read list .*a.parquet: "),
        ("a.txt", b"", r"expected a name that ends with \.csv, \.tsv or \.parquet"),
        ("missing.csv", None, "cannot read list .*missing.csv: No such file"),
    ):
        if raw is not None:
            (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match=message):
            pack_list(tmp_path / name, tmp_path / "out", prefix="train")
    for column, message in (
        (pa.array([1, 2]), "of type int64: expected text, bytes or"),
        (pa.array(["a.jpg", None]), "row 1: empty path"),
    ):
        pq.write_table(pa.table({"path": column, "label": [0, 1]}), tmp_path / "b.parquet")
        with pytest.raises(UserError, match=message):
            pack_list(tmp_path / "b.parquet", tmp_path / "out", prefix="train")
    pq.write_table(pa.table({"path": ["a"], "label": [0.5]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"label 0\.5: expected whole numbers from 0"):
        pack_list(tmp_path / "b.parquet", tmp_path / "out", prefix="train")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need pyarrow: pip install 'glsd\[parquet\]'"):
        pack_list(tmp_path / "a.parquet", tmp_path / "out", prefix="train")


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_with_images_inside(tmp_path, workers):
    """As the datasets library writes it: {bytes, path}, row groups, the names of the classes in the metadata."""
    names = {"info": {"features": {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata={"huggingface": json.dumps(names)})
    for part in range(2):
        rows = [
            {"image": {"bytes": noise_image(n, "PNG"), "path": None}, "label": n % 3}
            for n in range(12 * part, 12 * part + 12)
        ]
        rows[5]["image"] = {"bytes": None, "path": "elsewhere.png"}
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / f"{part}.parquet", row_group_size=5)
    lists = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    summary = pack_list(lists, tmp_path / "out", path_column="image", prefix="train", workers=workers)
    assert summary.classes == ("cat", "dog", "emu")
    assert set(summary.unreadable) == {(f"{n}.parquet#5", "no image in this row") for n in range(2)}
    images = packed(tmp_path / "out")
    assert images == {noise_image(n, "PNG"): n % 3 for n in range(24) if n not in (5, 17)}
    order = [n for raw in images for n in range(24) if noise_image(n, "PNG") == raw]
    assert order != sorted(order)
    groups = [(n // 12, n % 12 // 5) for n in order]
    assert len([0 for a, b in pairwise(groups) if a != b]) == len(set(groups)) - 1  # each group together
    table = [
        row.split("\t")[1] for row in (tmp_path / "out" / "train-files.tsv").read_text().splitlines()[1:]
    ]
    assert table == [f"{n // 12}.parquet#{n % 12}" for n in order]


def write_idx(folder: Path, split: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    """The files of MNIST, as its owners describe them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(
        struct.pack(">IIII", 2051, *pixels.shape) + pixels.tobytes()
    )
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(
        struct.pack(">II", 2049, len(labels)) + labels.tobytes()
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_mnist_from_torchvision(tmp_path, workers):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), (np.arange(20) % 10).astype(np.uint8)
    for split, take in (("train", slice(0, 15)), ("t10k", slice(15, 20))):
        write_idx(tmp_path / "data" / "MNIST" / "raw", split, pixels[take], labels[take])
    summary = pack_torchvision("MNIST", tmp_path / "data", tmp_path / "out", workers=workers)
    assert summary.classes == tuple(torchvision.datasets.MNIST.classes)
    found = {
        np.asarray(Image.open(io.BytesIO(raw))).tobytes(): label
        for raw, label in packed(tmp_path / "out").items()
    }
    assert found == {pixels[n].tobytes(): labels[n] for n in range(15)}
    assert Image.open(io.BytesIO(next(iter(packed(tmp_path / "out"))))).mode == "L"
    pack_torchvision("MNIST", tmp_path / "data", tmp_path / "out", split="test")
    assert sorted(packed(tmp_path / "out", "test").values()) == [5, 6, 7, 8, 9]
    assert sources(tmp_path / "out", "test")[0] == "MNIST/test#0"
    with pytest.raises(UserError, match="split 'val' of MNIST: expected train or test"):
        pack_torchvision("MNIST", tmp_path / "data", tmp_path / "out", split="val")


def test_files_of_torchvision_sets_are_packed_as_they_are(tmp_path):
    """Describable Textures: lists of files; a class of them in the order of its own names."""
    root = tmp_path / "data" / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    files = [f"{name}/{name}_{n}.jpg" for n, name in enumerate(["zigzag", "banded", "zigzag", "dotted"])]
    for n, file in enumerate(files):
        (root / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / file).write_bytes(noise_image(n))
    (root / "labels" / "train1.txt").write_text("\n".join(files))
    summary = pack_torchvision("DTD", tmp_path / "data", tmp_path / "out", prefix="p")
    assert summary.classes == ("banded", "dotted", "zigzag")
    assert packed(tmp_path / "out", "p") == {noise_image(n): label for n, label in enumerate([2, 0, 2, 1])}
    assert sources(tmp_path / "out", "p") == sorted(f"dtd/dtd/images/{file}" for file in files)
    (tmp_path / "mine.json").write_text('["zigzag", "dotted", "banded"]')
    pack_torchvision("DTD", tmp_path / "data", tmp_path / "o2", classes=tmp_path / "mine.json")
    assert packed(tmp_path / "o2") == {noise_image(n): label for n, label in enumerate([0, 2, 0, 1])}
    with pytest.raises(UserError, match=r"torchvision cannot open DTD .*Unknown value 'tst'"):
        pack_torchvision("DTD", tmp_path / "data", tmp_path / "o3", split="tst")


def test_a_folder_of_classes_from_torchvision(tmp_path):
    for n, name in enumerate(["River", "Forest", "River"]):
        (tmp_path / "data" / "eurosat" / "2750" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "eurosat" / "2750" / name / f"{n}.jpg").write_bytes(noise_image(n))
    summary = pack_torchvision("EuroSAT", tmp_path / "data", tmp_path / "out")
    assert summary.classes == ("Forest", "River")
    assert packed(tmp_path / "out", "all") == {noise_image(n): label for n, label in enumerate([1, 0, 1])}
    with pytest.raises(UserError, match="split 'train' of EuroSAT: it has no splits"):
        pack_torchvision("EuroSAT", tmp_path / "data", tmp_path / "out", split="train")


def test_torchvision_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"unknown torchvision data set 'CIFAR11'.* did you mean 'CIFAR10'"):
        pack_torchvision("CIFAR11", tmp_path, tmp_path / "out")
    for name in TORCHVISION_SETS:
        with pytest.raises(
            UserError, match=f"torchvision cannot open {name} in .*; check the folder, or add --download"
        ):
            pack_torchvision(name, tmp_path, tmp_path / "out")
    write_idx(tmp_path / "MNIST" / "raw", "train", np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8))
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"")
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match="torchvision cannot open MNIST"):
        pack_torchvision("MNIST", tmp_path, tmp_path / "out", split="test")


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth waves, as photographs mostly are."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / (width / a) + y / (height / b)) for a, b in ((5, 3), (4, 7), (9, 2))]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def shortened(raw: bytes, short_side: int) -> tuple[bytes, str, str]:
    made = shorten(raw, short_side)
    assert made is not None
    return made


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (500, 1999), (301, 300)])
def test_a_large_photograph_is_made_smaller(width, height):
    raw = encoded(photo(width, height), "JPEG", quality=95)
    small, extension, was = shortened(raw, 200)
    image = Image.open(io.BytesIO(small))
    assert (extension, was, image.format) == ("jpg", f"{width}x{height}", "JPEG")
    assert min(image.size) == 200
    assert image.size[0] / image.size[1] == pytest.approx(width / height, rel=0.003)
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    assert {component[1:3] for component in image.layer} == {(1, 1)}  # color as fine as brightness
    exact = decode(raw).permute(1, 2, 0).numpy()
    twin = np.asarray(Image.fromarray(exact).resize(image.size, Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(np.asarray(image) - twin).mean() < 1.5
    assert shorten(raw, min(width, height)) is None


def test_a_checkerboard_becomes_gray():
    """Without antialiasing, one pixel in eight would be picked: black or white."""
    board = (np.indices((640, 640)).sum(0) % 2 * 255).astype(np.uint8)
    small, _, _ = shortened(encoded(Image.fromarray(board).convert("RGB"), "PNG"), 80)
    assert np.abs(np.asarray(Image.open(io.BytesIO(small))).astype(int) - 127).max() <= 2


def test_noise_becomes_a_jpeg_too():
    """Pillow gives libjpeg too little room for such a file when it is to optimize its tables."""
    noise = 255 * np.random.default_rng(0).integers(0, 2, (400, 400, 3), dtype=np.uint8)
    raw = encoded(Image.fromarray(noise), "JPEG", quality=100, subsampling=0)
    small, _, _ = shortened(raw, 399)
    assert Image.open(io.BytesIO(small)).size == (399, 399)


def test_what_becomes_of_the_format():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    turned, _, was = shortened(encoded(photo(300, 100), "JPEG", exif=exif, icc_profile=profile), 50)
    image = Image.open(io.BytesIO(turned))
    assert (was, image.size, image.info["icc_profile"], dict(image.getexif())) == (
        "100x300",
        (50, 150),
        profile,
        {},
    )
    for kind, mode, options, expected in (
        ("PNG", "RGB", {}, ("PNG", "RGB")),
        ("PNG", "RGBA", {}, ("PNG", "RGB")),
        ("TIFF", "RGB", {}, ("PNG", "RGB")),
        ("JPEG", "L", {}, ("JPEG", "L")),
        ("JPEG", "CMYK", {"icc_profile": b"x" * 16 + b"CMYK" + b"x" * 200}, ("JPEG", "RGB")),
        ("WEBP", "RGB", {}, ("JPEG", "RGB")),
    ):
        image = Image.open(io.BytesIO(shortened(encoded(photo(90, 80, mode), kind, **options), 40)[0]))
        assert (image.format, image.mode) == expected
        assert ("icc_profile" in image.info) is False
    with pytest.raises(BrokenImage):
        shorten(encoded(photo(90, 80), "JPEG")[:-700], 40)


def test_what_is_made_smaller_can_be_read_by_all():
    """Pillow itself refuses a PNG with more than 1 MiB of color profile; libjpeg, one of more than 16 MiB."""
    small = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for size, is_kept in ((len(small), True), (1 << 20, True), ((1 << 20) + 1, False), (17 << 20, False)):
        profile = small + bytes(np.random.default_rng(0).integers(0, 256, size - len(small), dtype=np.uint8))
        for kind in ("TIFF", "PNG", "JPEG") if size < 16 << 20 else ("TIFF", "PNG"):
            made, extension, _ = shortened(encoded(photo(96, 48), kind, icc_profile=profile), 32)
            image = Image.open(io.BytesIO(made))
            image.load()
            assert (image.size, extension) == ((64, 32), "jpg" if kind == "JPEG" else "png")
            assert image.info.get("icc_profile") == (profile if is_kept else None)
            assert decode(made).shape == (3, 32, 64)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_and_turned_images_are_made_smaller(kind):
    """What is written is what decode() reads, whatever was stored: 16 bits, white is zero, on its side."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 6
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = Image.fromarray(np.asarray(photo(120, 90, "L")).astype(np.uint16) * 257)
    raw = encoded(gray, kind, **({"tiffinfo": tags} if kind == "TIFF" else {"exif": exif.tobytes()}))
    made, extension, was = shortened(raw, 90 - 1)
    image = Image.open(io.BytesIO(made))
    assert (extension, was, image.mode, image.size) == ("png", "90x120", "L", (89, 119))
    whole = Image.fromarray(decode(raw)[0].numpy()).resize((89, 119), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(image), np.asarray(whole))


def test_short_side_leaves_the_rest_to_the_bit(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    small, large = encoded(photo(64, 90), "JPEG"), encoded(photo(640, 480), "JPEG")
    (src / "small.jpeg").write_bytes(small)
    (src / "large.webp").write_bytes(encoded(photo(640, 480), "WEBP"))
    (src / "cut.jpg").write_bytes(large[:-2000])
    summary = pack_folder(src, tmp_path / "out", short_side=64)
    assert (summary.num_images, summary.num_resized) == (2, 1)
    assert [(path, "truncated" in reason) for path, reason in summary.unreadable] == [("cut.jpg", True)]
    shards = open_shards(str(tmp_path / "out" / "*.tar"))
    sizes = {tuple(decode(shards.read(i)).shape[1:]) for i in range(2)}
    assert sizes == {(90, 64), (64, 85)}
    assert small in {shards.read(i) for i in range(2)}
    with pytest.raises(UserError, match="short_side is 0"):
        pack_folder(src, tmp_path / "other", short_side=0)
    with pytest.raises(UserError, match="workers is -1"):
        pack_folder(src, tmp_path / "other", workers=-1)


def test_command_line(photos_folder, tmp_path, capsys, monkeypatch):
    main = pack.main
    rows = [f"x/{number}.jpg,{number % 2}" for number in range(6)]
    (photos_folder / "list.csv").write_text("\n".join(["path,label", *rows, "x/7.jpg,1"]))
    argv = ["list", str(photos_folder / "list.csv"), str(tmp_path / "out"), "--workers=0"]
    main([*argv, "--short_side=20", "--prefix=p"])
    assert capsys.readouterr().out.splitlines()[:-2] == [
        f"packed 6 images of 2 classes (without names) into 1 shard: {tmp_path}/out/p-000000.tar",
        "resized 6 images; the table of source files says which",
        "left out 1 unreadable image:",
    ]
    for split in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw", split, np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8))
    main(["torchvision", "MNIST", str(tmp_path), str(tmp_path / "mnist"), "--workers=0"])
    assert capsys.readouterr().out.startswith(
        f"packed 3 images of 1 class into 1 shard: {tmp_path}/mnist/train-0"
    )

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "read_bytes", stop)
    assert main([*argv, "--prefix=q"]) == 130
    assert capsys.readouterr().err.endswith("stopped: nothing was packed\n")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith((".", "q"))]
