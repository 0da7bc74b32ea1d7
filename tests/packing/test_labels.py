"""The contract of labels (docs/labels.md), against a literal twin: right labels, or one line; never another number."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glsd.cli import pack
from glsd.errors import UserError
from glsd.packing.folder import pack_folder
from glsd.packing.lists import pack_list
from glsd.packing.write import PackSummary
from glsd.shards.store import open_shards
from tests.helpers.small_shards import noise_image

pytestmark = pytest.mark.usefixtures("own_cache")

FEW = 6  # images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder with 0.jpg to 5.jpg, which differ."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(FEW):
        (folder / f"{number}.jpg").write_bytes(noise_image(number))
    return folder


def packed(dst: Path, prefix: str = "train") -> dict[int, int]:
    """The label of each image that was packed."""
    number_of = {noise_image(number): number for number in range(FEW)}
    shards = open_shards(f"{dst}/{prefix}-*.tar")
    return {number_of[shards.read(i)]: shards.label(i) for i in range(len(shards))}


def write_csv(file: Path, labels: list[str], separator: str = ",") -> Path:
    with open(file, "w", newline="", encoding="utf-8") as lines:
        rows = csv.writer(lines, delimiter=separator)
        rows.writerow(["path", "label"])
        rows.writerows([f"{number}.jpg", label] for number, label in enumerate(labels))
    return file


def pack_labels(labels: list[str], images: Path, folder: Path, **settings) -> tuple[list[int], PackSummary]:
    """Pack a CSV of labels; return the label of each row, -1 where the image was left out, and the summary."""
    file = write_csv(folder / "list.csv", labels)
    dst = settings.pop("dst", folder / "out")
    summary = pack_list(file, dst, root=images, **settings)
    found = packed(dst, settings.get("prefix", "train"))
    return [found.get(number, -1) for number in range(len(labels))], summary


NUMBERS = {
    "floats": (["0.0", "10.0", "2.0", "1.0"], [0, 10, 2, 1]),
    "floats and integers": (["0", "10.0", "2.", "1.00"], [0, 10, 2, 1]),
    "decimal commas": (["0,0", "10,0", "2,0"], [0, 10, 2]),
    "missing": (["3", "", "nan", "12.0"], [3, -1, -1, 12]),
    "more missing": (["3", "None", "N/A", "-1.0", "<NA>", "4"], [3, -1, -1, -1, -1, 4]),
    "most missing": (["NULL", "null", "NA", "-1", "NaN", "7"], [-1, -1, -1, -1, -1, 7]),
    "blanks around": ([" 3 ", "4"], [3, 4]),
    "eighteen digits": (["999999999999999999"], [999999999999999999]),
}
NAMES = {
    "names": (["emu", "cat", "emu", "dog"], [2, 0, 2, 1]),
    "names and missing": (["emu", "NA", "cat", ""], [1, -1, 0, -1]),
    "nearly a mark": (["none", "Nan", "na", "NIL"], [3, 1, 2, 0]),
    "booleans": (["True", "False", "True"], [1, 0, 1]),
    "padded": (["010", "009", "100", "1000"], [1, 0, 2, 3]),
    "padded beside names": (["007", "emu"], [0, 1]),
    "names with digits": (["7up", "v2.0", "3-1"], [1, 2, 0]),
}
REFUSED = {
    "a name among numbers": (["0", "1", "unknown"], "label 0 is a number, label 'unknown' a name"),
    "a number among names": (["cat", "911"], "label 911 is a number, label 'cat' a name"),
    "booleans among numbers": (["True", "1"], "label 1 is a number, label 'True' a name"),
    "a fraction": (["0.5", "1"], r"label 0\.5: expected whole numbers"),
    "fractions only": (["1.5", "2.5"], r"label 1\.5: expected whole numbers"),
    "thousands": (["1,000", "2"], "label 1,000: expected whole numbers"),
    "an exponent": (["1e3", "2"], "label 1e3: expected whole numbers"),
    "savetxt": (["1.000e+00"], r"label 1\.000e\+00: expected whole numbers"),
    "negative": (["-7", "1"], "label -7: expected whole numbers"),
    "signed": (["+3", "-0.0"], r"label \+3: expected whole numbers"),
    "infinite": (["inf", "1"], "label inf: expected whole numbers"),
    "nineteen digits": (["1000000000000000000"], "label 1000000000000000000: expected whole numbers"),
    "padded to two widths": (["007", "07"], "padded with zeros to several widths"),
    "padded and not": (["007", "7"], "label 7 is a number, label '007' a name"),
    "padded floats": (["007", "100.0"], r"label 100\.0 is a number, label '007' a name"),
    "nothing": (["", "nan", "-1"], "no row has a label; without labels: --label_column ''"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_columns_of_numbers(images, tmp_path, case):
    texts, expected = NUMBERS[case]
    labels, summary = pack_labels(texts, images, tmp_path)
    assert (labels, summary.classes) == (expected, ())
    assert not (tmp_path / "out" / "classes.json").exists()


@pytest.mark.parametrize("case", NAMES)
def test_columns_of_names(images, tmp_path, case):
    texts, expected = NAMES[case]
    labels, summary = pack_labels(texts, images, tmp_path)
    assert labels == expected
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == list(summary.classes)
    assert [summary.classes[label] for label in labels if label >= 0] == [
        text for text, label in zip(texts, expected, strict=True) if label >= 0
    ]


@pytest.mark.parametrize("case", REFUSED)
def test_columns_that_are_refused(images, tmp_path, case):
    texts, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason) as caught:
        pack_labels(texts, images, tmp_path)
    assert str(caught.value).isprintable()


PARQUET = {
    "int8": pa.array([3, None, -1, 12], pa.int8()),
    "uint64": pa.array([3, None, None, 12], pa.uint64()),
    "float32": pa.array([3, None, float("nan"), 12], pa.float32()),
    "double": pa.array([3.0, -1.0, float("nan"), 12.0]),
    "decimal": pa.array([3, None, -1, 12], pa.int64()).cast(pa.decimal128(21, 2)),
    "categories of numbers": pa.array([3, None, -1, 12]).dictionary_encode(),
    "categories of floats": pa.array([3.0, None, -1.0, 12.0]).dictionary_encode(),
    "text": pa.array(["3", None, "nan", "12.0"]),
    "large text": pa.array(["3", "", "None", "12"], pa.large_string()),
    "categories of text": pa.array(["3.0", "", "-1", " 12"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_every_type_of_a_parquet_column_is_the_same(images, tmp_path, kind):
    paths = [f"{number}.jpg" for number in range(4)]
    pq.write_table(pa.table({"path": paths, "label": PARQUET[kind]}), tmp_path / "a.parquet")
    summary = pack_list(tmp_path / "a.parquet", tmp_path / "out", root=images)
    assert packed(tmp_path / "out") == {0: 3, 3: 12}
    assert summary.classes == ()


def test_other_types_of_a_parquet_column(images, tmp_path):
    paths = ["0.jpg", "1.jpg", "2.jpg"]
    for column, expected in (
        (pa.array([True, None, False]), {0: 1, 2: 0}),
        (pa.array(["emu", None, "cat"]).dictionary_encode(), {0: 1, 2: 0}),
    ):
        pq.write_table(pa.table({"path": paths, "label": column}), tmp_path / "a.parquet")
        dst = tmp_path / str(column.type)
        pack_list(tmp_path / "a.parquet", dst, root=images)
        assert packed(dst) == expected
    for column, reason in (
        (pa.nulls(3), "no row has a label"),
        (pa.array([[1], [2], [3]]), "of type list<.*>: expected whole numbers or names"),
        (pa.array([b"a", b"b", b"c"]), "of type binary: expected whole numbers or names"),
        (pa.array([0.5, 1, 2]), r"label 0\.5: expected whole numbers"),
    ):
        pq.write_table(pa.table({"path": paths, "label": column}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=reason):
            pack_list(tmp_path / "a.parquet", tmp_path / "out", root=images)


def write_declared(file: Path, labels: list[int], names: list[str]) -> Path:
    """A Parquet list as the datasets library writes it, with the names of the classes in the metadata."""
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"path": [f"{n}.jpg" for n in range(len(labels))], "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), file)
    return file


def test_names_that_a_parquet_file_declares(images, tmp_path):
    one = write_declared(tmp_path / "one.parquet", [0, 1, -1, 2], ["zebra", "None", "10"])
    assert pack_list(one, tmp_path / "out", root=images).classes == ("zebra", "None", "10")
    assert packed(tmp_path / "out") == {0: 0, 1: 1, 3: 2}
    # By name, where there is a numbering: not by place.
    other = write_declared(tmp_path / "other.parquet", [0, 1], ["10", "zebra"])
    pack_list(other, tmp_path / "out", root=images, prefix="val")
    assert packed(tmp_path / "out", "val") == {0: 2, 1: 0}
    with pytest.raises(
        UserError, match=r"one\.parquet and .*other\.parquet name different classes in their metadata"
    ):
        pack_list([one, other], tmp_path / "both", root=images)
    beyond = write_declared(tmp_path / "beyond.parquet", [0, 2], ["10", "zebra"])
    with pytest.raises(
        UserError, match=r"beyond\.parquet: column 'label' holds label 2, but its metadata name only 2"
    ):
        pack_list(beyond, tmp_path / "out", root=images, prefix="x")


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_list_with_another_separator(images, tmp_path, ending, separator):
    file = write_csv(tmp_path / f"a{ending}", ["dog, big; brown", "cat"], separator)
    summary = pack_list(file, tmp_path / "out", root=images)
    assert packed(tmp_path / "out") == {0: 1, 1: 0}
    assert summary.classes == ("cat", "dog, big; brown")


def test_a_list_with_another_separator_and_other_columns(images, tmp_path):
    (tmp_path / "a.csv").write_text("file;klass\n0.jpg;cat\n")
    with pytest.raises(
        UserError, match=r"a\.csv has no column 'path', but 'file', 'klass': name it with --path_column"
    ):
        pack_list(tmp_path / "a.csv", tmp_path / "out", root=images)
    pack_list(tmp_path / "a.csv", tmp_path / "out", root=images, path_column="file", label_column="klass")
    assert packed(tmp_path / "out") == {0: 0}


def test_a_column_that_comes_twice(images, tmp_path):
    (tmp_path / "a.csv").write_text("path,label,label\n0.jpg,1,2\n")
    with pytest.raises(UserError, match=r"a\.csv has 2 columns 'label': expected one"):
        pack_list(tmp_path / "a.csv", tmp_path / "out", root=images)


def class_folders(root: Path, images: Path, names: list[str]) -> Path:
    """A folder for each name, with the images in turn."""
    for number in range(FEW):
        folder = root / names[number % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes((images / f"{number}.jpg").read_bytes())
    return root


def test_numbers_that_are_names_are_looked_up(images, tmp_path):
    """Folders 0 to 11 are numbered in the order of their text, a list of the same set by the same names."""
    dst, names = tmp_path / "out", ["0", "2", "10", "1", "-1", "-0"]
    pack_folder(class_folders(tmp_path / "src", images, names), dst)
    order = sorted(names)
    assert json.loads((dst / "classes.json").read_text()) == order
    for number, texts in enumerate(
        (["10", "2", "-1", "0"], ["10.0", "2.0", "-1.0", "nan"], ["10,0", "", "1"])
    ):
        labels, summary = pack_labels(texts, images, tmp_path, dst=dst, prefix=f"v{number}")
        names_of = [text.removesuffix(".0").removesuffix(",0") for text in texts]
        assert labels == [order.index(name) if name in order else -1 for name in names_of]
        assert summary.classes == tuple(order)
    with pytest.raises(
        UserError, match=r"label 3 is a number and no class name of .*classes\.json: write the names"
    ):
        pack_labels(["0", "3"], images, tmp_path, dst=dst, prefix="w")
    with pytest.raises(UserError, match=r"label 3 is a number and no class name of"):
        pack_labels(["0", "3"], images, tmp_path, dst=tmp_path / "x", classes=dst / "classes.json")


def test_a_class_that_is_called_none(images, tmp_path, capsys):
    """In a file of names it is a class; without one it means no label, which is said."""
    dst = tmp_path / "out"
    pack_folder(class_folders(tmp_path / "src", images, ["NA", "cat", "None"]), dst)
    assert pack_labels(["None", "NA", "nan", "cat"], images, tmp_path, dst=dst, prefix="val")[0] == [
        1,
        0,
        -1,
        2,
    ]
    file = write_csv(tmp_path / "list.csv", ["None", "emu", "None", "nan", ""])
    assert not pack.main(["list", str(file), str(tmp_path / "o2"), "--root", str(images), "--workers=0"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "left out 4 images without label:"
    assert printed[2] == "  0.jpg: no label (None)"
    assert printed[-2].startswith(
        "2 no label (None), 1 no label (nan): if that is a class, list the names of all classes"
    )


def test_places_in_a_file_of_names(images, tmp_path, capsys):
    """Numbers are places in a file that the user names, never in one that happens to lie there."""
    names = tmp_path / "names.json"
    names.write_text('["zebra", "emu", "cat"]')
    file = write_csv(tmp_path / "list.csv", ["2", "0.0", "1"])
    arguments = ["list", str(file), str(tmp_path / "out"), "--root", str(images), "--workers=0"]
    assert not pack.main([*arguments, "--classes", str(names)])
    assert packed(tmp_path / "out") == {0: 2, 1: 0, 2: 1}
    assert (
        f"note: the labels are numbers: they were taken as places in {names}, where 'zebra' is 0"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"label 0\.0 is a number and no class name of"):
        pack.main([*arguments, "--prefix", "val"])
    with pytest.raises(UserError, match="label 3 has no name: only 3 classes are named in"):
        pack_labels(["0", "3"], images, tmp_path, dst=tmp_path / "x", classes=names)


def test_names_after_numbers_in_one_folder(images, tmp_path):
    dst = tmp_path / "out"
    pack_labels(["2", "0", "1"], images, tmp_path, dst=dst)
    with pytest.raises(
        UserError, match=r"src has class names, but the labels of .*train-000000\.tar.* without names"
    ):
        pack_folder(class_folders(tmp_path / "src", images, ["0", "1", "2"]), dst, prefix="val")
    for prefix in ("val", "tr"):
        with pytest.raises(UserError, match="without names"):
            pack_labels(["cat", "emu"], images, tmp_path, dst=dst, prefix=prefix)
    pack_labels(["2"], images, tmp_path, dst=tmp_path / "more", prefix="train-more")
    with pytest.raises(UserError, match=r"train-more-000000\.tar.* without names"):
        pack_labels(["cat"], images, tmp_path, dst=tmp_path / "more", prefix="train")
    assert pack_labels(["1", "7"], images, tmp_path, dst=dst, prefix="val")[0] == [1, 7]


# ---- the fuzz: a literal twin of the contract ----

MARKS = ["", "nan", "NaN", "-nan", "-NaN", "None", "null", "NULL", "N/A", "n/a", "NA", "<NA>"]
MARKS += ["#N/A", "#NA", "#N/A N/A", "-1", "-1.0"]
ANIMALS = ["cat", "dog", "emu", "a1", "v2.0", "True", "none", "x y"]
ODD = ["0.5", "1e3", "-7", "+3", "1,000", "inf", "007", "-0", ".5", "1_0", "3rd"]


def without_fraction(text: str) -> str:
    for ending in (".00", ".0", ".", ",0"):
        digits = text.removesuffix(ending).lstrip("-")
        if text.endswith(ending) and digits.isdigit() and str(int(digits)) == digits:
            return text.removesuffix(ending)
    return text


def as_number(text: str) -> int | None:
    text = without_fraction(text)
    return int(text) if text.isdigit() and str(int(text)) == text else None


def as_name(text: str, names: list[str]) -> int | None:
    found = [names.index(way) for way in (text, without_fraction(text)) if way in names]
    return found[0] if found else None


def reads_as_number(text: str) -> bool:
    """Written out, and not by the pattern of the library; 007 is none."""
    if text.isdigit() and len(text) > 1 and text.startswith("0"):
        return False
    try:
        float(text.replace(",", ".", 1).replace("_", "x"))
    except ValueError:
        return False
    return text.lower().lstrip("+-") not in ("nan", "infinity")


def twin(texts: list[str], names: list[str], *, names_given: bool) -> list[int] | None:
    """The labels of a column by the contract; None = it must be refused.

    names: of the file that numbers the classes. names_given: by --classes, so that numbers may be places in it.
    """
    words = [text.strip() for text in texts]
    says = [text for text in words if as_name(text, names) is not None or text not in MARKS]
    if not says:
        return None
    if names:
        if all(as_name(text, names) is not None for text in says):
            return [-1 if (label := as_name(text, names)) is None else label for text in words]
        if not names_given or any(reads_as_number(name) or name.isdigit() for name in names):
            return None
        places = [as_number(text) for text in says]
        if any(place is None or place >= len(names) for place in places):
            return None
        return [-1 if text not in says else int(as_number(text) or 0) for text in words]
    if all(as_number(text) is not None for text in says):
        return [-1 if text not in says else int(as_number(text) or 0) for text in words]
    if any(map(reads_as_number, says)):
        # Only numbers that are padded to one width may be names, too.
        widths = {len(text) for text in says if text.isdigit() and text.startswith("0") and text != "0"}
        if len(widths) != 1 or not all(text.isdigit() and len(text) >= min(widths) for text in says):
            return None
    elif len({int(text) for text in says if text.isdigit()}) < len({text for text in says if text.isdigit()}):
        return None
    order = sorted(set(says))
    return [order.index(text) if text in says else -1 for text in words]


def random_column(rng: random.Random) -> list[str]:
    """Six labels of mostly one kind: numbers, floats, names or padded numbers, with marks and other things in between."""
    count = rng.choice((2, 5, 12, 30))
    kinds = {
        "numbers": lambda: str(rng.randrange(count)),
        "floats": lambda: f"{rng.randrange(count)}{rng.choice(('.0', '.0', '', ',0', '.00'))}",
        "names": lambda: rng.choice(ANIMALS),
        "padded": lambda: f"{rng.randrange(count):0{rng.choice((2, 2, 2, 3))}d}",
        "odd": lambda: rng.choice(ODD),
    }
    main, other = (
        rng.choice(["numbers", "floats", "names", "padded", "numbers", "floats", "names", "odd"]),
        rng.choice([*kinds]),
    )
    share = rng.choice((0, 0, 0, 0.2))
    column = [kinds[other if rng.random() < share else main]() for _ in range(FEW)]
    missing = rng.choice((0, 0, 0.2, 0.5))
    return [rng.choice(MARKS) if rng.random() < missing else text for text in column]


def as_parquet(texts: list[str], rng: random.Random) -> pa.Array:
    """The column in one of the types that hold it as it is."""
    kinds = [pa.array(texts), pa.array(texts, pa.large_string()), pa.array(texts).dictionary_encode()]
    kinds.append(pa.array([text or None for text in texts]))
    if all(text in MARKS or (as_number(text) is not None) for text in texts):
        numbers = [None if text in MARKS else as_number(text) for text in texts]
        floats = [np.nan if number is None else float(number) for number in numbers]
        kinds += [pa.array(numbers, pa.int64()), pa.array(numbers, pa.int16()), pa.array(floats)]
        kinds += [pa.array(numbers, pa.int64()).dictionary_encode(), pa.array(floats, pa.float32())]
    return rng.choice(kinds)


def write_random(file: Path, texts: list[str], rng: random.Random) -> Path:
    if file.suffix != ".parquet":
        return write_csv(file, texts, rng.choice(",;\t"))
    pq.write_table(
        pa.table({"path": [f"{n}.jpg" for n in range(FEW)], "label": as_parquet(texts, rng)}), file
    )
    return file


@pytest.fixture
def quick(monkeypatch):
    """Files need not be safe on disk: waiting for it is most of a small packing."""
    monkeypatch.setattr("os.fsync", lambda fd: None)


def is_refused(argv: list[str], capsys) -> bool:
    """Whether a packing ends with a UserError of one printable line, rather than with 0."""
    said = "\n"
    try:
        assert not pack.main([*argv, "--workers=0"])
    except UserError as error:
        said = str(error)
    capsys.readouterr()
    assert said == "\n" or said.isprintable()
    return said != "\n"


def by_row(dst: Path, prefix: str = "train") -> list[int]:
    found = packed(dst, prefix)
    return [found.get(number, -1) for number in range(FEW)]


@pytest.mark.slow
def test_500_random_columns_are_packed_as_their_twin(images, tmp_path, capsys, quick):
    rng = random.Random(13)
    outcomes = {"packed": 0, "refused": 0}
    for number in range(500):
        texts = random_column(rng)
        names = rng.choice(([], [], [], ["cat", "dog", "emu", "a1", "v2.0", "True", "none", "x y"]))
        folder = tmp_path / str(number)
        folder.mkdir()
        file = write_random(folder / f"list{rng.choice(('.csv', '.tsv', '.parquet'))}", texts, rng)
        argv = ["list", str(file), str(folder / "out"), "--root", str(images)]
        if names:
            (folder / "names.json").write_text(json.dumps(names))
            argv += ["--classes", str(folder / "names.json")]
        expected = twin(texts, names, names_given=True)
        if is_refused(argv, capsys):
            assert expected is None, (texts, names)
            assert not list((folder / "out").glob("*"))
        else:
            assert by_row(folder / "out") == expected, (texts, names)
        outcomes["refused" if expected is None else "packed"] += 1
    assert min(outcomes.values()) > 100, outcomes


FOLDERS = [["0", "1", "2", "10"], ["cat", "dog", "emu"], ["1.0", "2.0"], ["001", "002", "010"]]
FOLDERS += [["cat", "911"], ["NA", "None"], ["-1", "0", "1"]]


@pytest.mark.slow
def test_500_random_folders_and_lists_are_packed_as_their_twin(images, tmp_path, capsys, quick):
    """A folder and a list of one set, either first, into one place or two, with or without --classes."""
    rng = random.Random(14)
    outcomes = {"packed": 0, "refused": 0}
    roots = [class_folders(tmp_path / f"set{n}", images, names) for n, names in enumerate(FOLDERS)]
    for number in range(500):
        which = rng.randrange(len(FOLDERS))
        names = FOLDERS[which]
        texts = random_column(rng)
        if rng.random() < 0.7:
            texts = [rng.choice(names) + rng.choice(("", "", ".0")) for _ in range(FEW)]
            texts[0] = rng.choice((texts[0], rng.choice(MARKS), "unknown"))
        base = tmp_path / str(number)
        base.mkdir()
        file = write_random(base / f"list{rng.choice(('.csv', '.parquet'))}", texts, rng)
        list_dst = base / rng.choice(("folder", "list"))
        folder_argv = [str(roots[which]), str(base / "folder"), "--prefix", "f"]
        list_argv = ["list", str(file), str(list_dst), "--root", str(images), "--prefix", "l"]
        shared, order = list_dst.name == "folder", sorted(names)
        known = order if shared else []
        if rng.random() < 0.5:  # the folder first
            assert not is_refused(folder_argv, capsys)
            given = rng.random() < 0.5
            if given:
                list_argv += ["--classes", str(base / "folder" / "classes.json")]
            expected = twin(texts, order if given else known, names_given=given)
        else:
            expected, given = twin(texts, [], names_given=False), False
        refused = is_refused(list_argv, capsys)
        assert refused == (expected is None), (texts, names, given, shared)
        if not refused:
            assert by_row(list_dst, "l") == expected, (texts, names, given, shared)
        if not (base / "folder" / "f-000000.tar").exists():
            _pack_folder_second(base, order, expected, texts, folder_argv, shared, capsys)
        classes = base / "folder" / "classes.json"
        if (base / "folder" / "f-000000.tar").exists():
            told = json.loads(classes.read_text())
            assert [told[label] for label in by_row(base / "folder", "f")] == [
                names[n % len(names)] for n in range(FEW)
            ]
        outcomes["refused" if refused else "packed"] += 1
    assert min(outcomes.values()) > 100, outcomes


def _pack_folder_second(base, order, expected, texts, folder_argv, shared, capsys) -> None:
    """Pack the folder behind the list: into the place of a list of names only if they have its classes."""
    names = sorted({text.strip() for text, label in zip(texts, expected or [], strict=False) if label >= 0})
    numbers = bool(names) and all(as_number(name) is not None for name in names)
    must_fit = shared and expected is not None
    refused = is_refused(folder_argv, capsys)
    assert refused == (must_fit and (numbers or not set(order) <= set(names))), (texts, order)
