"""What a label is in the shards, and sets whose classes are compared by name."""

import pickle
from pathlib import Path

import pytest

from glsd.errors import UserError
from glsd.packing.write import index_shards, pack_samples
from glsd.shards.labels import read_classes
from glsd.shards.store import number_together, open_shards
from tests.helpers.small_shards import noise_image, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    "raw",
    [b"dog", b"", b"1.5", b"-2", b"1_0", b"1e3", b"9" * 40, b"7" + b" " * 2000 + b"8", "٣".encode(), b"\xff"],
)
def test_label_that_is_no_integer(tmp_path, raw):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.cls", raw)])
    with pytest.raises(
        UserError, match=r"a\.tar.*'0\.cls'.*integer >= 0, or a class name that the classes\.json beside"
    ):
        open_shards(str(path))


def tar_of_labels(path: Path, *labels: str) -> str:
    members = ((f"{n}.jpg", b"x") for n in range(len(labels)))
    texts = ((f"{n}.cls", label.encode()) for n, label in enumerate(labels))
    return str(write_tar(path, [row for pair in zip(members, texts, strict=True) for row in pair]))


def test_label_members_that_are_numbers(tmp_path):
    path = tar_of_labels(tmp_path / "a.tar", "3", " 4\n", "5.0", "006", "-1", "-1.0", "nan", "None", "N/A")
    assert open_shards(path).labels().tolist() == [3, 4, 5, 6, -1, -1, -1, -1, -1]


def test_label_members_that_are_names(tmp_path):
    """They are looked up in the classes.json beside the shard, by which their numbers stay checked."""
    path = tar_of_labels(tmp_path / "a.tar", "dog", "cat\n", "NA", "None", "dog")
    names = tmp_path / "classes.json"
    names.write_text('["cat", "NA", "dog"]')
    assert open_shards(path).labels().tolist() == [2, 0, 1, -1, 2]
    names.write_text('["dog", "NA", "cat"]')
    with pytest.raises(
        UserError, match=r"classes\.json is not the one by which the index of .*a\.tar numbers"
    ):
        open_shards(path)
    index_shards(path)
    assert open_shards(path).labels().tolist() == [0, 2, 1, -1, 0]
    names.unlink()
    with pytest.raises(UserError, match=r"is not the one by which"):
        open_shards(path)
    names.write_text('["cat", "dog"]')
    mixed = tar_of_labels(tmp_path / "b.tar", "dog", "1", "cat")
    with pytest.raises(UserError, match=r"b\.tar: 2 label members hold names, 1 numbers"):
        open_shards(mixed)
    with pytest.raises(UserError, match=r"'1\.cls' holds b'emu': .*class name that the classes\.json"):
        open_shards(tar_of_labels(tmp_path / "c.tar", "dog", "emu"))


def test_numbers_of_label_members_are_never_names(tmp_path):
    """Our own shards hold numbers beside a classes.json whose names may be numbers, too."""
    path = tar_of_labels(tmp_path / "a.tar", "2", "1")
    (tmp_path / "classes.json").write_text('["0", "10", "2"]')
    assert open_shards(path).labels().tolist() == [2, 1]


NUMBERINGS = {"a": ["x", "y"], "b": ["x", "y"], "c": ["y", "z", "x"], "d": [], "e": []}


@pytest.fixture
def numbered(tmp_path):
    """The function that opens a set of the folders named, each with a label 0, a label 1 and its own classes.json."""
    rows = [(noise_image(number), "jpg", number) for number in range(2)]
    for name, classes in NUMBERINGS.items():
        pack_samples(rows, tmp_path / name, classes=classes)
    return lambda names: open_shards([str(tmp_path / name / "*.tar") for name in names])


def test_sets_are_compared_by_the_names_of_their_classes(numbered):
    for names, expected in (
        ("a b", [[0, 1], [0, 1]]),
        ("a c", [[0, 1], [1, 2]]),  # x y and y z
        ("c a", [[0, 1], [2, 0]]),
        ("ac b", [[0, 1, 1, 2], [0, 1]]),
        ("ca", [[0, 1, 2, 0]]),
        ("d e", [[0, 1], [0, 1]]),
    ):
        sets = {name: numbered(name) for name in names.split()}
        for _ in range(2):  # again is no other numbering
            number_together(sets)
            assert [shards.labels().tolist() for shards in sets.values()] == expected
        # Our own objects, as they go to worker processes.
        copies = [pickle.loads(pickle.dumps(shards)) for shards in sets.values()]  # noqa: S301
        assert [[copy.label(i) for i in range(len(copy))] for copy in copies] == expected


def test_sets_that_cannot_be_compared_are_refused(numbered, tmp_path):
    for names in ("a d", "d a", "ad", "ab de"):
        with pytest.raises(
            UserError, match=r"has class names \(.*classes\.json\), but .* has only numbers"
        ) as caught:
            number_together({name: numbered(name) for name in names.split()})
        assert "\n" not in str(caught.value)
    (tmp_path / "b" / "classes.json").write_text('["x"]')
    with pytest.raises(
        UserError, match=r"has the label 1, but the classes\.json beside it names only 1 classes"
    ):
        number_together({"a": numbered("a"), "b": numbered("b")})


def test_labels_that_are_missing_stay_so(tmp_path):
    for name, classes in (("a", ["x", "y"]), ("b", ["y", "x"])):
        rows = [(noise_image(number), "jpg", label) for number, label in enumerate((1, None, 0))]
        pack_samples(rows, tmp_path / name, classes=classes)
    sets = {name: open_shards(str(tmp_path / name / "*.tar")) for name in "ab"}
    number_together(sets)
    assert sets["b"].labels().tolist() == [0, -1, 1] == [sets["b"].label(i) for i in range(3)]


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '["a", 1]', '["a", "a"]', '"ab"', "[" * 200_000])
def test_damaged_classes_files(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json") as caught:
        read_classes(tmp_path / "classes.json")
    assert "\n" not in str(caught.value)
