import dataclasses
import functools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from glsd.cli import pack
from glsd.errors import UserError
from glsd.packing.retrieval_sets import RETRIEVAL_SETS, pack_retrieval_set
from glsd.shards.store import open_shards
from tests.helpers.retrieval_trees import cub_tree, lines, put
from tests.helpers.small_shards import noise_image

pytestmark = pytest.mark.usefixtures("own_cache")


save_mat = functools.partial(savemat, do_compression=True)  # as MATLAB does; a changed byte is seen


def structs(*rows: dict) -> np.ndarray:
    """A MATLAB struct array, 1 x n, as the owner's files have it."""
    array = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for place, row in enumerate(rows):
        for name, value in row.items():
            array[name][0, place] = value if isinstance(value, str) else np.array([[value]], dtype=np.uint8)
    return array


def cells(*texts: str) -> np.ndarray:
    array = np.empty((1, len(texts)), dtype=object)
    array[0, :] = texts
    return array


CAR_NAMES = [f"Car {number} 2012" for number in range(1, 197)]
CAR_CLASSES = {"train": [99, 1, 98, 196], "test": [1, 99, 98]}  # the owner's halves have classes in common


def merged_cars_tree(src: Path) -> dict[str, tuple[str, str]]:
    classes = [number for half in CAR_CLASSES.values() for number in half]
    paths = [f"car_ims/{place:06d}.jpg" for place in range(len(classes))]
    put(src, paths)
    annotations = [
        {"relative_im_path": path, "bbox_x1": 3, "class": number, "test": place % 2}
        for place, (path, number) in enumerate(zip(paths, classes, strict=True))
    ]
    save_mat(src / "cars_annos.mat", {"annotations": structs(*annotations), "class_names": cells(*CAR_NAMES)})
    return expected_cars(paths, classes)


def devkit_cars_tree(src: Path) -> dict[str, tuple[str, str]]:
    devkit = src / "devkit"
    devkit.mkdir(parents=True)
    paths, classes = [], []
    for half, numbers in CAR_CLASSES.items():
        names = [f"{place:05d}.jpg" for place in range(1, len(numbers) + 1)]  # the same names in both halves
        rows = [{"bbox_x1": 3, "class": n, "fname": name} for n, name in zip(numbers, names, strict=True)]
        file = devkit / f"cars_{half}_annos{'_withlabels' * (half == 'test')}.mat"
        save_mat(file, {"annotations": structs(*rows)})
        paths += [f"cars_{half}/{name}" for name in names]
        classes += numbers
    put(src, paths)
    save_mat(devkit / "cars_meta.mat", {"class_names": cells(*CAR_NAMES)})
    return expected_cars(paths, classes)


def expected_cars(paths: list[str], classes: list[int]) -> dict[str, tuple[str, str]]:
    return {
        path: ("train" if number <= 98 else "test", CAR_NAMES[number - 1])
        for path, number in zip(paths, classes, strict=True)
    }


SOP_ROWS = {"train": [(2, "chair"), (1, "bicycle"), (2, "chair")], "test": [(12, "bicycle"), (10, "lamp")]}


def sop_tree(src: Path) -> dict[str, tuple[str, str]]:
    root = src / "Stanford_Online_Products"
    expected = {}
    for role, rows in SOP_ROWS.items():
        table = ["image_id class_id super_class_id path"]
        for place, (number, kind) in enumerate(rows, 1):
            path = f"{kind}_final/{number:012d}_{role}{place}.JPG"
            table.append(f"{place} {number} 3 {path}")
            expected[path] = (role, f"{kind}_{number}")
        lines(root / f"Ebay_{role}.txt", *table)
    put(root, list(expected))
    return expected


def inshop_tree(src: Path) -> dict[str, tuple[str, str]]:
    rows = [
        ("img/WOMEN/Dresses/id_00000007/02_1_front.jpg", "id_00000007", "query"),
        ("img/MEN/Denim/id_00000002/01_2_side.jpg", "id_00000002", "train"),
        ("img/WOMEN/Dresses/id_00000007/02_2_side.jpg", "id_00000007", "gallery"),
        ("img/MEN/Denim/id_00000002/01_1_front.jpg", "id_00000002", "train"),
        ("img/MEN/Shirts/id_00000001/01_1_front.jpg", "id_00000001", "query"),
        ("img/MEN/Shirts/id_00000001/01_7_full.jpg", "id_00000001", "gallery"),
    ]
    table = [f"{path:<70} {item}   {role}" for path, item, role in rows]
    lines(src / "Eval" / "list_eval_partition.txt", "6", "image_name item_id evaluation_status", *table)
    put(src, [path for path, _, _ in rows])
    return {path: (role, item) for path, item, role in rows}


TREES = {
    "cub200": cub_tree,
    "cars196": merged_cars_tree,
    "cars196 devkit": devkit_cars_tree,
    "sop": sop_tree,
    "inshop": inshop_tree,
}


@pytest.fixture
def src(tmp_path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def packed(dst: Path, roles) -> dict[str, tuple[str, str, bytes]]:
    """Role, class name and bytes of each source file, as the shards, classes.json and the tables of files say."""
    names = json.loads((dst / "classes.json").read_text())
    found = {}
    for role in roles:
        shards = open_shards(str(dst / f"{role}-*.tar"))
        rows = (dst / f"{role}-files.tsv").read_text().splitlines()[1:]
        files = dict(row.split("\t") for row in rows)
        assert sorted(files) == sorted(shards.key(number) for number in range(len(shards)))
        for number in range(len(shards)):
            file = files[shards.key(number)]
            found[file] = (role, names[shards.label(number)], shards.read(number))
    return found


@pytest.mark.parametrize("tree", TREES)
def test_official_layout(tree, src, tmp_path):
    name, dst = tree.split()[0], tmp_path / "out"
    expected = TREES[tree](src)
    summaries = pack_retrieval_set(name, src, dst, allow_incomplete=True)
    roles = list(RETRIEVAL_SETS[name].published)
    assert list(summaries) == roles
    root = next(
        (folder for folder in (src / "CUB_200_2011", src / "Stanford_Online_Products") if folder.exists()),
        src,
    )
    assert packed(dst, roles) == {
        path: (role, label, (root / path).read_bytes()) for path, (role, label) in expected.items()
    }
    for role, summary in summaries.items():
        mine = [label for found, label in expected.values() if found == role]
        assert (summary.num_images, summary.num_classes) == (len(mine), len(set(mine)))
        assert summary.unreadable == ()
    labels = {role: set(open_shards(str(dst / f"{role}-*.tar")).labels()) for role in roles}
    assert all(labels["train"].isdisjoint(labels[role]) for role in roles[1:])
    if name == "inshop":
        assert labels["query"] == labels["gallery"]


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("cub200", [f"{number:03d}.Bird_{number}" for number in range(1, 201)]),
        ("cars196", CAR_NAMES),
        ("sop", ["bicycle_1", "chair_2", "lamp_10", "bicycle_12"]),  # by number, not by text
        ("inshop", ["id_00000001", "id_00000002", "id_00000007"]),
    ],
)
def test_labels_follow_the_owners_numbers(name, classes, src, tmp_path):
    TREES[name](src)
    pack_retrieval_set(name, src, tmp_path / "out", allow_incomplete=True)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == classes


@pytest.mark.parametrize(
    ("name", "folder"), [("cub200", "CUB_200_2011"), ("sop", "Stanford_Online_Products")]
)
def test_the_data_folder_itself_may_be_named(name, folder, src, tmp_path):
    expected = TREES[name](src)
    pack_retrieval_set(name, src / folder, tmp_path / "out", allow_incomplete=True)
    found = packed(tmp_path / "out", ["train", "test"])
    assert {path: (role, label) for path, (role, label, _) in found.items()} == expected


def test_other_places_of_the_files(src, tmp_path):
    devkit_cars_tree(src)
    (src / "devkit" / "cars_test_annos_withlabels.mat").rename(src / "cars_test_annos_withlabels.mat")
    made = pack_retrieval_set("cars196", src, tmp_path / "cars", allow_incomplete=True)
    assert made["test"].num_images == 3
    shop = src / "In-shop Clothes Retrieval Benchmark"
    inshop_tree(shop)
    (shop / "Eval" / "list_eval_partition.txt").rename(shop / "list_eval_partition.txt")
    (shop / "Img").mkdir()
    (shop / "img").rename(shop / "Img" / "img")
    made = pack_retrieval_set("inshop", src, tmp_path / "shop", allow_incomplete=True)
    assert [made[role].num_images for role in ("train", "query", "gallery")] == [2, 2, 2]


def test_images_are_shuffled_by_the_seed(src, tmp_path):
    expected = cub_tree(src)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack_retrieval_set("cub200", src, tmp_path / name, shuffle_seed=seed, allow_incomplete=True)
    first, again, other = (list(packed(tmp_path / name, ["train", "test"])) for name in "abc")
    assert first == again != other
    assert set(first) == set(other) == set(expected)


def test_published_sizes():
    totals = {name: sum(n for n, _ in one.published.values()) for name, one in RETRIEVAL_SETS.items()}
    assert totals == {"cub200": 11_788, "cars196": 16_185, "sop": 120_053, "inshop": 52_712}
    classes = {name: [n for _, n in one.published.values()] for name, one in RETRIEVAL_SETS.items()}
    assert sum(classes["cub200"]) == 200
    assert sum(classes["cars196"]) == 196
    assert sum(classes["sop"]) == 22_634
    assert sum(classes["inshop"][:2]) == 7_982


@pytest.mark.parametrize("tree", TREES)
def test_counts_must_be_the_published_ones(tree, src, tmp_path, monkeypatch):
    name = tree.split()[0]
    expected = TREES[tree](src)
    with pytest.raises(UserError) as caught:
        pack_retrieval_set(name, src, tmp_path / "out")
    benchmark = RETRIEVAL_SETS[name]
    train = [label for role, label in expected.values() if role == "train"]
    images, classes = benchmark.published["train"]
    assert f"lists {len(train)} images of {len(set(train))} classes for train" in str(caught.value)
    assert f"has {images} of {classes}: " in str(caught.value)
    assert benchmark.owner in str(caught.value)
    assert "--allow_incomplete" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    right = {}
    for role in benchmark.published:
        mine = [label for found, label in expected.values() if found == role]
        right[role] = (len(mine), len(set(mine)))
    monkeypatch.setitem(RETRIEVAL_SETS, name, dataclasses.replace(benchmark, published=right))
    assert sum(made.num_images for made in pack_retrieval_set(name, src, tmp_path / "out").values()) == len(
        expected
    )


@pytest.fixture
def small_cub(src, monkeypatch) -> Path:
    """A tree of CUB-200-2011 with the counts that are asked for."""
    cub_tree(src)
    small = dataclasses.replace(RETRIEVAL_SETS["cub200"], published={"train": (3, 2), "test": (3, 2)})
    monkeypatch.setitem(RETRIEVAL_SETS, "cub200", small)
    return src / "CUB_200_2011"


def test_missing_images(small_cub, tmp_path):
    first, second = sorted((small_cub / "images").glob("*/*.jpg"))[:2]
    first.unlink()
    second.unlink()
    with pytest.raises(
        UserError, match=r"Bird_\d\.jpg is missing, one of 2 such images of .*caltech\.edu.*allow"
    ):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=True)
    assert made["train"].num_images == 1
    assert {path for path, _ in made["train"].unreadable} == {
        str(path.relative_to(small_cub)) for path in (first, second)
    }


def test_damaged_images(small_cub, tmp_path):
    bad = max((small_cub / "images").glob("*/*.jpg"))
    bad.write_bytes(b"this is text")
    with pytest.raises(
        UserError, match=r"Bird_2\.jpg cannot be read \(not an image.*caltech\.edu.*allow_incomplete"
    ):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        ".train.packing"
    ]  # no training images alone
    made = pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=True)
    assert (made["train"].num_images, made["train"].num_resumed) == (3, 1)
    assert made["test"].unreadable == ((str(bad.relative_to(small_cub)), "not an image of a known format"),)
    assert (made["test"].num_images, made["test"].num_classes) == (2, 1)


def test_a_strict_packing_refuses_what_a_lenient_one_left_out(small_cub, tmp_path):
    """Begun with --allow_incomplete, without it the same packing must not pass over a damaged image."""
    images = sorted((small_cub / "images").glob("*/*.jpg"))
    damaged = [images[0], *(path for path in images if path.parent.name > "100.Bird_100")]
    for path in damaged:
        path.write_bytes(b"this is text")
    with pytest.raises(UserError, match=r"no usable image in role test.*finished shards kept: 1; the same"):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=True)
    for path in damaged[1:]:
        path.write_bytes(noise_image(1))
    with pytest.raises(UserError, match=rf"{damaged[0].name} cannot be read \(not an image"):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out")
    made = pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=True)
    assert [(one.num_images, one.num_resumed) for one in made.values()] == [(2, 1), (3, 0)]


def test_the_extension_is_that_of_the_content(small_cub, tmp_path):
    for path in (small_cub / "images").glob("*/*.jpg"):
        path.write_bytes(noise_image(3, "PNG"))
    pack_retrieval_set("cub200", small_cub, tmp_path / "out")
    assert b"00000000.png" in (tmp_path / "out" / "train-000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("tree", "file", "owner"),
    [
        ("cub200", "CUB_200_2011/images.txt", "caltech.edu"),
        ("cub200", "CUB_200_2011/classes.txt", "caltech.edu"),
        ("cub200", "CUB_200_2011/image_class_labels.txt", "caltech.edu"),
        ("cars196", "cars_annos.mat", "no longer served"),
        ("cars196 devkit", "devkit/cars_meta.mat", "no longer served"),
        ("cars196 devkit", "devkit/cars_train_annos.mat", "no longer served"),
        ("cars196 devkit", "devkit/cars_test_annos_withlabels.mat", "no longer served"),
        ("sop", "Stanford_Online_Products/Ebay_train.txt", "cvgl.stanford.edu"),
        ("sop", "Stanford_Online_Products/Ebay_test.txt", "cvgl.stanford.edu"),
        ("inshop", "Eval/list_eval_partition.txt", "mmlab.ie.cuhk.edu.hk"),
    ],
)
def test_missing_annotation_file(tree, file, owner, src, tmp_path):
    TREES[tree](src)
    (src / file).unlink()
    with pytest.raises(UserError) as caught:
        pack_retrieval_set(tree.split()[0], src, tmp_path / "out", allow_incomplete=True)
    assert str(caught.value).startswith(f"{src / file} ")
    assert "is missing: it belongs to " in str(caught.value)
    assert owner in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no folder: expected CUB-200-2011 .*caltech\.edu"):
        pack_retrieval_set("cub200", tmp_path / "nowhere", tmp_path / "out")


def test_a_test_half_without_classes(src, tmp_path):
    devkit_cars_tree(src)
    (src / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    save_mat(src / "devkit" / "cars_test_annos.mat", {"annotations": structs({"fname": "00001.jpg"})})
    with pytest.raises(
        UserError, match=r"cars_test_annos\.mat has no classes.*needs cars_test_annos_withlabels\.mat"
    ):
        pack_retrieval_set("cars196", src, tmp_path / "out")
    (src / "devkit" / "cars_test_annos.mat").rename(src / "devkit" / "cars_test_annos_withlabels.mat")
    with pytest.raises(
        UserError, match=r"withlabels\.mat cannot be read .*: its annotations lack the field 'class'"
    ):
        pack_retrieval_set("cars196", src, tmp_path / "out")


@pytest.mark.parametrize(
    ("tree", "file", "line", "text", "match"),
    [
        ("cub200", "images.txt", 2, "8", r"images\.txt, line 2: expected image_id image_name, found '8'"),
        ("cub200", "classes.txt", 5, "five five", r"classes\.txt, line 5: invalid literal for int.*'five'"),
        (
            "cub200",
            "image_class_labels.txt",
            1,
            "12 201",
            r"classes\.txt lacks the class of image 12, .*Bird_5\.jpg",
        ),
        (
            "cub200",
            "image_class_labels.txt",
            1,
            "99 2",
            r"image_class_labels\.txt lacks the class of image 12,",
        ),
        (
            "sop",
            "Ebay_train.txt",
            1,
            "1 1 1 a.JPG",
            r"Ebay_train\.txt, line 1: expected image_id class_id super_cl",
        ),
        (
            "sop",
            "Ebay_test.txt",
            3,
            "1 1 x.JPG",
            r"Ebay_test\.txt, line 3: expected image_id class_id .*found '1 1 x",
        ),
        (
            "sop",
            "Ebay_test.txt",
            3,
            "1 2 3 lamp_final/x.JPG",
            r"class lamp_2 of lamp_final/x.JPG is in train and in test",
        ),
        (
            "inshop",
            "list_eval_partition.txt",
            2,
            "",
            r"partition\.txt, line 2: expected image_name item_id eval.* ''",
        ),
        (
            "inshop",
            "list_eval_partition.txt",
            4,
            "img/a.jpg id_1 val",
            r"line 4: expected train, query or gal.*'val'",
        ),
        (
            "inshop",
            "list_eval_partition.txt",
            4,
            "img/a.jpg id_1",
            r"line 4: expected image_name item_id eval",
        ),
    ],
)
def test_damaged_annotation_line(tree, file, line, text, match, src, tmp_path):
    TREES[tree](src)
    (path,) = src.rglob(file)
    rows = path.read_text().splitlines()
    rows[line - 1] = text
    lines(path, *rows)
    with pytest.raises(UserError, match=match) as caught:
        pack_retrieval_set(tree, src, tmp_path / "out", allow_incomplete=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_image_listed_twice(small_cub, tmp_path):
    rows = (small_cub / "images.txt").read_text().splitlines()
    lines(small_cub / "images.txt", *rows[:-1], "12 " + rows[0].split()[1])
    with pytest.raises(
        UserError, match=r"images\.txt lists images/101\.Bird_101/Bird_0\.jpg twice \(roles test and"
    ):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out")


def test_an_image_listed_twice_by_another_spelling(small_cub, tmp_path):
    rows = (small_cub / "images.txt").read_text().splitlines()
    lines(
        small_cub / "images.txt", *rows[:-1], "12 " + rows[1].split()[1].replace("/", "/./")
    )  # test, now train
    with pytest.raises(UserError, match=r"lists images/001\.Bird_1/Bird_1\.jpg twice \(roles train and test"):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out")


@pytest.mark.slow
def test_damaged_matlab_files(src, tmp_path):
    merged_cars_tree(src)
    file = src / "cars_annos.mat"
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:200], whole[: len(whole) // 2], whole[:-40]):
        file.write_bytes(content)
        with pytest.raises(
            UserError,
            match=r"cars_annos\.mat(, annotation| cannot be read as a MATLAB file: .*restore it; its owner)",
        ):
            pack_retrieval_set("cars196", src, tmp_path / "out")
    file.write_bytes(whole[:124] + struct.pack("<H", 0x0200) + whole[126:])  # version 7.3 is HDF5
    with pytest.raises(UserError, match=r"cannot be read as a MATLAB file: "):
        pack_retrieval_set("cars196", src, tmp_path / "out")
    names = cells(*CAR_NAMES)
    save_mat(file, {"class_names": names})
    with pytest.raises(
        UserError, match=r"cars_annos\.mat cannot be read .*: it has no variable 'annotations'"
    ):
        pack_retrieval_set("cars196", src, tmp_path / "out")
    save_mat(file, {"class_names": names, "annotations": np.arange(3)})
    with pytest.raises(UserError, match=r": its annotations lack the field 'class'"):
        pack_retrieval_set("cars196", src, tmp_path / "out")
    for rows, match in (
        (structs({"relative_im_path": 7, "class": 1}), "annotation 1: its file name is no text"),
        (structs({"relative_im_path": "1.jpg", "class": "1"}), "annotation 1: class 1, expected 1 to 196"),
    ):
        save_mat(file, {"class_names": names, "annotations": rows})
        with pytest.raises(UserError, match=match):
            pack_retrieval_set("cars196", src, tmp_path / "out")
    for number in (0, 197):
        rows = structs(*({"relative_im_path": "car_ims/1.jpg", "class": value} for value in (1, number)))
        save_mat(file, {"class_names": names, "annotations": rows})
        with pytest.raises(UserError, match=rf"annotation 2: class {number}, expected 1 to 196"):
            pack_retrieval_set("cars196", src, tmp_path / "out")


@pytest.mark.parametrize(("place", "byte"), [(144, 0), (196, 0), (161, 255)])
def test_a_byte_that_breaks_the_reader(place, byte, src, tmp_path):
    """By itself SciPy 1.17 ends here in UnboundLocalError, ZeroDivisionError and MemoryError."""
    file = src / "cars_annos.mat"
    rows = structs(*({"relative_im_path": f"car_ims/{n}.jpg", "class": n} for n in (1, 2)))
    savemat(file, {"annotations": rows, "class_names": cells("a", "b")})
    raw = bytearray(file.read_bytes())
    raw[place] = byte
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"cars_annos\.mat cannot be read as a MATLAB file: ") as caught:
        pack_retrieval_set("cars196", src, tmp_path / "out", allow_incomplete=True)
    assert "\n" not in str(caught.value)


ESCAPES = [
    "/{0}/secret.jpg",
    "../../{1}/secret.jpg",
    "001.Bird_1/../../../secret.jpg",
    "..",
    "a/\0.jpg",
    "a/\x85.jpg",
]


@pytest.mark.parametrize("allow_incomplete", [False, True])
@pytest.mark.parametrize("path", ESCAPES)
def test_paths_out_of_the_data_set(path, allow_incomplete, small_cub, tmp_path):
    put(tmp_path, ["secret.jpg"])
    path = path.format(str(tmp_path).strip("/"), tmp_path.name)
    rows = (small_cub / "images.txt").read_text().splitlines()
    lines(small_cub / "images.txt", *rows[:-1], f"12 {path}")
    with pytest.raises(UserError, match=r"images\.txt lists the path '.*expected one below") as caught:
        pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=allow_incomplete)
    assert repr(f"images/{path}") in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_an_absolute_path_in_other_sets(src, tmp_path):
    put(tmp_path, ["secret.jpg"])
    inshop_tree(src)
    table = src / "Eval" / "list_eval_partition.txt"
    lines(table, *table.read_text().splitlines(), f"{tmp_path}/secret.jpg id_00000001 query")
    with pytest.raises(
        UserError, match=r"partition\.txt lists the path '/.*/secret\.jpg': expected one below"
    ):
        pack_retrieval_set("inshop", src, tmp_path / "out", allow_incomplete=True)
    rows = structs({"relative_im_path": f"{tmp_path}/secret.jpg", "class": 1})
    save_mat(src / "cars_annos.mat", {"annotations": rows, "class_names": cells("a")})
    with pytest.raises(
        UserError, match=r"cars_annos\.mat lists the path '/.*/secret\.jpg': expected one below"
    ):
        pack_retrieval_set("cars196", src, tmp_path / "out", allow_incomplete=True)


def test_links_in_the_data_set_are_followed(small_cub, tmp_path):
    (small_cub / "images").rename(tmp_path / "elsewhere")
    (small_cub / "images").symlink_to(tmp_path / "elsewhere")
    assert pack_retrieval_set("cub200", small_cub, tmp_path / "out")["train"].num_images == 3


def test_a_name_too_long_for_the_disk(small_cub, tmp_path):
    rows = (small_cub / "images.txt").read_text().splitlines()
    lines(small_cub / "images.txt", *rows[:-1], f"12 101.Bird_101/{'x' * 5000}.jpg")
    with pytest.raises(UserError, match=r"x\.jpg is missing, one of 1 such images"):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out")
    made = pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=True)
    ((path, reason),) = made["test"].unreadable
    assert path.endswith("xx.jpg")
    assert "too long" in reason
    with pytest.raises(UserError, match=r"is no folder: expected CUB-200-2011"):
        pack_retrieval_set("cub200", tmp_path / ("x" * 5000), tmp_path / "two")
    with pytest.raises(UserError, match=r"cannot write to .*xxx: File name too long"):
        pack_retrieval_set("cub200", small_cub, tmp_path / ("x" * 5000), allow_incomplete=True)


@pytest.mark.timeout(20)  # opening a pipe waits for somebody to write into it
def test_pipes_and_folders_are_no_images(small_cub, src, tmp_path):
    pipe, folder = sorted((small_cub / "images").glob("*/*.jpg"))[:2]
    pipe.unlink()
    os.mkfifo(pipe)
    folder.unlink()
    folder.mkdir()
    with pytest.raises(UserError, match=r"Bird_\d\.jpg is missing, one of 2 such images"):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out")
    made = pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=True)
    assert {path for path, _ in made["train"].unreadable} == {
        str(path.relative_to(small_cub)) for path in (pipe, folder)
    }
    assert all("is no regular file" in reason for _, reason in made["train"].unreadable)
    (small_cub / "classes.txt").unlink()
    os.mkfifo(small_cub / "classes.txt")
    with pytest.raises(UserError, match=r"cannot read .*classes\.txt: it is no regular file"):
        pack_retrieval_set("cub200", small_cub, tmp_path / "two")
    os.mkfifo(src / "cars_annos.mat")
    with pytest.raises(UserError, match=r"cannot read .*cars_annos\.mat: it is no regular file"):
        pack_retrieval_set("cars196", src, tmp_path / "two")


def test_inshop_on_a_disk_that_ignores_case(src, tmp_path):
    inshop_tree(src)
    (src / "Img").mkdir()
    (src / "img").rename(src / "Img" / "img")
    (src / "img").symlink_to(src / "Img")  # what such a disk shows
    made = pack_retrieval_set("inshop", src, tmp_path / "out", allow_incomplete=True)
    assert [made[role].num_images for role in ("train", "query", "gallery")] == [2, 2, 2]


def test_a_folder_of_another_packing(small_cub, tmp_path):
    dst = tmp_path / "out"
    pack_retrieval_set("cub200", small_cub, dst)
    before = {path.name: path.read_bytes() for path in dst.iterdir()}
    with pytest.raises(UserError, match=r"already has train-000000\.tar"):
        pack_retrieval_set("cub200", small_cub, dst)
    for path in dst.glob("train-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"already has test-000000\.tar"):  # the second role's are seen, too
        pack_retrieval_set("cub200", small_cub, dst)
    assert {path.name for path in dst.iterdir()} == {name for name in before if not name.startswith("train")}
    other = tmp_path / "other"
    other.mkdir()
    (other / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(UserError, match=r"other/classes\.json of an earlier packing numbers other classes"):
        pack_retrieval_set("cub200", small_cub, other)
    assert (other / "classes.json").read_text() == '["cat", "dog"]'


def test_a_role_without_images(small_cub, tmp_path):
    for path in (small_cub / "images").glob("1*/*.jpg"):
        if path.parent.name > "100.Bird_100":
            path.unlink()
    for path in (small_cub / "images").glob("200*/*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"no usable image in role test; images/.*: \[Errno 2\] No such file"):
        pack_retrieval_set("cub200", small_cub, tmp_path / "out", allow_incomplete=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".train.packing"]


def test_command_line(small_cub, tmp_path, capsys, monkeypatch):
    main = pack.main
    main(["cub200", str(small_cub), str(tmp_path / "out"), "--shard_megabytes", "1"])
    *packed, following = capsys.readouterr().out.splitlines()
    assert packed == [
        f"packed 3 images of 2 classes into 1 shard: {tmp_path}/out/{role}-000000.tar"
        for role in ("train", "test")
    ]
    assert following.startswith("next: glsd finetune --init ")
    next((small_cub / "images").glob("001*/*.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        main(["cub200", str(small_cub), str(tmp_path / "two")])
    main(["cub200", str(small_cub), str(tmp_path / "two"), "--allow_incomplete"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("packed 2 images of 2 classes into 1 shard: ")
    assert printed[1] == "left out 1 unreadable image:"
    assert printed[2].endswith(".jpg: empty file (0 bytes)")
    for name in RETRIEVAL_SETS:
        with pytest.raises(UserError, match=r"is no folder: expected "):
            main([name, str(tmp_path / "nothing"), str(tmp_path / "three")])
