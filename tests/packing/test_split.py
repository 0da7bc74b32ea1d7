import gzip
import json
import tracemalloc
import zlib
from pathlib import Path

import pytest

from glsd.cli import pack
from glsd.errors import UserError
from glsd.packing.split import assign_roles, parse_roles, split_shards
from glsd.packing.write import pack_samples
from glsd.shards.store import open_shards
from tests.helpers.small_shards import noise_image, write_tar

LABELS = [4, 0, 9, 4, 2, 0, 9, 9, 2, 7]  # five classes, with gaps, in no order
NAMES = [f"class {label}" for label in range(10)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def shards(tmp_path) -> str:
    """Ten images with LABELS as keys 00000000 to 00000009, and the names of ten classes."""
    samples = [(noise_image(place), "jpeg", label) for place, label in enumerate(LABELS)]
    pack_samples(samples, tmp_path / "all", prefix="all", classes=NAMES)
    return str(tmp_path / "all" / "all-*.tar")


@pytest.fixture
def main(monkeypatch):
    return pack.main


def packed(dst: Path, role: str) -> dict[bytes, int]:
    found = open_shards(str(dst / f"{role}-*.tar"))
    return {found.read(number): found.label(number) for number in range(len(found))}


def places(dst: Path, role: str) -> set[int]:
    """The places in LABELS of a role's images; they are whole and have kept their labels."""
    number = {noise_image(place): place for place in range(len(LABELS))}
    images = packed(dst, role)
    assert all(label == LABELS[number[raw]] for raw, label in images.items())
    return {number[raw] for raw in images}


def with_labels(*labels: int) -> set[int]:
    return {place for place, label in enumerate(LABELS) if label in labels}


@pytest.mark.parametrize(
    ("share", "training", "testing"),
    [
        (0.5, (0, 2, 4), (7, 9)),  # the odd class trains
        (0.2, (0, 2, 4, 7), (9,)),
        (0.8, (0,), (2, 4, 7, 9)),
        (0.3, (0, 2, 4, 7), (9,)),
        (0.65, (0, 2), (4, 7, 9)),
    ],
)
def test_classes_are_disjoint(shards, tmp_path, share, training, testing):
    made = split_shards(shards, tmp_path / "out", test_share=share)
    assert places(tmp_path / "out", "train") == with_labels(*training)
    assert places(tmp_path / "out", "test") == with_labels(*testing)
    assert (made["train"].num_classes, made["test"].num_classes) == (len(training), len(testing))
    assert made["train"].num_images + made["test"].num_images == 10
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == NAMES


def test_images_that_stay_behind_are_told(tmp_path, main, capsys):
    members = [
        (f"{n}.{kind}", raw)
        for n in range(2)
        for kind, raw in (
            ("cls", b"%d" % n),
            ("png", noise_image(n, "PNG")),
            ("edited.png", noise_image(n + 5, "PNG")),
        )
    ]
    write_tar(tmp_path / "all.tar", members)
    main(["split", str(tmp_path / "all.tar"), str(tmp_path / "out")])
    assert "\nnote: 2 further images of samples are not used: 2 .edited.png;" in capsys.readouterr().out
    assert packed(tmp_path / "out", "test") == {noise_image(1, "PNG"): 1}


def test_the_share_is_of_classes_whatever_floats_say(tmp_path):
    pack_samples([(noise_image(n), "jpg", n) for n in range(100)], tmp_path / "all", prefix="all")
    for share, count in ((0.29, 29), (0.57, 57), (0.5, 50), (0.01, 1), (0.99, 99)):
        made = split_shards(str(tmp_path / "all" / "*.tar"), tmp_path / f"{share}", test_share=share)
        assert made["test"].num_classes == count
        assert set(packed(tmp_path / f"{share}", "test").values()) == set(range(100 - count, 100))
        assert not (tmp_path / f"{share}" / "classes.json").exists()


def test_a_split_leads_back_to_the_shards(shards, tmp_path):
    split_shards(shards, tmp_path / "out")
    made = open_shards(str(tmp_path / "out" / "test-*.tar"))
    rows = (tmp_path / "out" / "test-files.tsv").read_text().splitlines()[1:]
    sources = dict(row.split("\t") for row in rows)
    for number in range(len(made)):
        shard, key = sources[made.key(number)].rsplit("/", 1)
        assert shard == str(tmp_path / "all" / "all-000000.tar")
        assert noise_image(int(key)) == made.read(number)


def test_class_names_from_a_file(shards, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"n {label}\n" for label in range(10)), encoding="utf-8")
    split_shards(shards, tmp_path / "a", classes_file=tmp_path / "names.txt")
    assert json.loads((tmp_path / "a" / "classes.json").read_text()) == [f"n {n}" for n in range(10)]
    (tmp_path / "names.json").write_text(json.dumps(NAMES[::-1]))
    split_shards(shards, tmp_path / "b", classes_file=tmp_path / "names.json")
    assert json.loads((tmp_path / "b" / "classes.json").read_text()) == NAMES[::-1]
    for text, match in (
        ("a\nb\n", r"role train: label 4 has no name: only 2 classes are named"),
        ("a\n\nb\n", r"names\.txt, line 2 is empty"),
        ("a\n" * 10, r"two classes have the name 'a'"),
    ):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(UserError, match=match):
            split_shards(shards, tmp_path / "c", classes_file=tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"cannot read .*nothing\.txt"):
        split_shards(shards, tmp_path / "c", classes_file=tmp_path / "nothing.txt")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5, float("nan"), 0.05, 0.95])
def test_a_share_must_leave_both_sides(shards, tmp_path, share):
    with pytest.raises(UserError, match=rf"test_share {share} of 5 classes leaves nothing"):
        split_shards(shards, tmp_path / "out", test_share=share)


def test_images_without_label(tmp_path):
    samples = [(noise_image(0), "jpg", 0), (noise_image(1), "jpg", None), (noise_image(2), "jpg", 1)]
    pack_samples(samples, tmp_path / "some", prefix="x")
    with pytest.raises(UserError, match=r"1 of 3 images have no label, first 00000001 in .*x-000000\.tar"):
        split_shards(str(tmp_path / "some" / "*.tar"), tmp_path / "out")


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    samples = [(noise_image(place), "jpg", place) for place in range(4)]
    pack_samples([*samples, (b"", "jpg", 0), (b"text", "jpg", 3)], tmp_path / "some", prefix="x")
    made = split_shards(str(tmp_path / "some" / "*.tar"), tmp_path / "out")
    shard = tmp_path / "some" / "x-000000.tar"
    assert made["train"].unreadable == ((f"{shard}/00000004", "empty image member (0 bytes)"),)
    assert made["test"].unreadable == ((f"{shard}/00000005", "not an image of a known format"),)
    assert (made["train"].num_images, made["test"].num_images) == (2, 2)


def test_folders_must_agree_on_the_classes(shards, tmp_path):
    for number, classes in enumerate((NAMES, NAMES[::-1], ())):
        samples = [(noise_image(20), "jpg", 1)]
        pack_samples(samples, tmp_path / f"more{number}", prefix="more", classes=classes)
    made = split_shards([shards, str(tmp_path / "more0" / "*.tar")], tmp_path / "out")
    assert made["train"].num_images + made["test"].num_images == 11
    for other in ("more1", "more2"):
        with pytest.raises(
            UserError, match=r"all/classes\.json and .*more\d/classes\.json name different classes"
        ):
            split_shards([shards, str(tmp_path / other / "*.tar")], tmp_path / "out2")


VALUES = ["test", "train", "val", "test", "test", "train", "val", "train", "test", "train"]
ROLES = {"query": ["test"], "gallery": ["train", "val"]}


def json_lines(values: list) -> str:
    rows = [{"key": f"{place:08d}", "n": place % 2, "split": value} for place, value in enumerate(values)]
    return "".join(f"{json.dumps(row)}\n" for row in reversed(rows))


def tsv(values: list) -> str:
    rows = [f"{value}\t{place:08d}\n" for place, value in enumerate(values)]
    return "split\tkey\n" + "".join(reversed(rows))


def write_table(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.tsv", "t.tsv.gz"])
def test_roles_by_a_table(shards, tmp_path, name):
    # Keys that the shards lack are no mistake: a table may be of more shards than these.
    text = (tsv if ".tsv" in name else json_lines)([*VALUES, "unseen"])
    table = write_table(tmp_path / name, text)
    made = assign_roles(shards, tmp_path / "out", table=table, field="split", roles=ROLES)
    assert list(made) == ["query", "gallery"]
    assert places(tmp_path / "out", "query") == {0, 3, 4, 8}
    assert places(tmp_path / "out", "gallery") == {1, 2, 5, 6, 7, 9}
    assert made["query"].num_classes == len({LABELS[place] for place in (0, 3, 4, 8)})
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == NAMES


def test_values_that_are_no_text(shards, tmp_path):
    table = write_table(tmp_path / "t.jsonl", json_lines(VALUES))
    assign_roles(shards, tmp_path / "out", table=table, field="n", roles={"a": ["0"], "b": ["1"]})
    assert places(tmp_path / "out", "b") == {1, 3, 5, 7, 9}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (json_lines(VALUES[:-1]), r"t\.jsonl has no key 00000009, which .*all-000000\.tar has"),
        (
            json_lines([*VALUES[:-1], "odd"]),
            r"1 images have split 'odd', which belongs to no role.*--role unused=odd",
        ),
        (json_lines(["test"] * 10), r"role gallery gets no image: split has the values test"),
        (
            json_lines(VALUES) + '{"key": "00000003", "split": "val"}\n',
            r"line 11: the key 00000003 comes again",
        ),
        ('{"key": "00000000"}\n', r"line 1: expected at least 'key' and 'split', found '{"),
        ('{"split": "test"}\n', r"line 1: expected at least 'key' and 'split'"),
        ('["key", "split"]\n', r"line 1: expected at least 'key' and 'split'"),
        (json_lines(VALUES) + "{oops\n", r"t\.jsonl, line 11: Expecting property name"),
        ("", r"table .*t\.jsonl has no rows"),
        ("[" * 200_000 + "\n", r"t\.jsonl, line 1: maximum recursion depth"),
        (
            '{"key": "a", "split": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
            r"line 1: maximum recursion depth",
        ),
        (
            '{"key": "a", "split": "' + "x" * 2**20 + '"}\n',
            r"t\.jsonl, line 1: longer than 1048576 characters",
        ),
    ],
)
def test_tables_that_do_not_fit(shards, tmp_path, text, match):
    table = write_table(tmp_path / "t.jsonl", text)
    with pytest.raises(UserError, match=match) as caught:
        assign_roles(shards, tmp_path / "out", table=table, field="split", roles=ROLES)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tables_that_cannot_be_read(shards, tmp_path):
    def refused(name: str, content: bytes, match: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=match):
            assign_roles(shards, tmp_path / "out", table=tmp_path / name, field="split", roles=ROLES)

    refused("t.tsv", b"split\tkey\ntest\n", r"t\.tsv, line 2: expected the columns split, key, found 'test'")
    refused("t.tsv", b"kind\tkey\ntest\t00000000\n", r"t\.tsv, line 2: expected at least 'key' and 'split'")
    refused("t.jsonl.gz", b"plain text", r"cannot read table .*t\.jsonl\.gz: Not a gzipped file")
    refused(
        "t.jsonl.gz", gzip.compress(json_lines(VALUES).encode())[:-12], r"cannot read table .*t\.jsonl\.gz: "
    )
    refused("t.jsonl", b"\xff\xfe", r"t\.jsonl, line 0: .*can't decode")
    refused("t.tsv", b"", r"table .*t\.tsv has no rows")
    refused("t.tsv", b"split\tkey\n", r"table .*t\.tsv has no rows")
    twice = b"key\tsplit\tsplit\n00000000\ttest\ttrain\n"
    refused("t.tsv", twice, r"t\.tsv, line 1: the column 'split' comes twice")
    refused(
        "t.jsonl.gz", gzip.compress(b" " * 2**24), r"t\.jsonl\.gz, line 1: longer than 1048576 characters"
    )
    refused("t.tsv.gz", gzip.compress(b"x" * 2**24), r"t\.tsv\.gz, line 1: longer than 1048576 characters")
    refused("t.tsv.json", b"key\tsplit\n", r"expected a file of one of the kinds")
    refused("t.tsv.zip", b"key\tsplit\n", r"expected a file of one of the kinds")
    refused("t.csv", b"key,split\n", r"t\.csv: expected a file of one of the kinds \.jsonl, ")
    with pytest.raises(UserError, match=r"cannot read table .*nothing\.jsonl"):
        assign_roles(shards, tmp_path / "out", table=tmp_path / "nothing.jsonl", field="split", roles=ROLES)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match=r"table .*(too long|null byte)"):
            assign_roles(shards, tmp_path / "out", table=f"{name}.jsonl", field="split", roles=ROLES)
        with pytest.raises(UserError, match=r"cannot read .*(too long|null byte)"):
            split_shards(shards, tmp_path / "out", classes_file=name)


def test_a_gzip_bomb_is_not_unpacked(shards, tmp_path):
    raw = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = b"0" * 2**20
    bomb = b"".join([*(raw.compress(zeros) for _ in range(200)), raw.flush()])  # 200 MiB in one line
    (tmp_path / "t.jsonl.gz").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"line 1: longer than 1048576 characters"):
            assign_roles(shards, tmp_path / "out", table=tmp_path / "t.jsonl.gz", field="split", roles=ROLES)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_the_kind_of_a_table_is_its_last_extension(shards, tmp_path):
    # An objects-a-line table whose name has .tsv in it.
    for name in ("t.tsv.jsonl", "t.tsv.jsonl.gz"):
        table = write_table(tmp_path / name, json_lines(VALUES))
        assign_roles(shards, tmp_path / f"{name}.out", table=table, field="split", roles=ROLES)
        assert places(tmp_path / f"{name}.out", "query") == {0, 3, 4, 8}


def test_a_key_of_two_samples(shards, tmp_path):
    pack_samples([(noise_image(20), "jpg", 1)], tmp_path / "more", prefix="more", classes=NAMES)
    table = write_table(tmp_path / "t.jsonl", json_lines(VALUES))
    both = [shards, str(tmp_path / "more" / "*.tar")]
    with pytest.raises(
        UserError, match=r"key 00000000 of .*more-000000\.tar occurs twice in the shards given"
    ):
        assign_roles(both, tmp_path / "out", table=table, field="split", roles=ROLES)


def test_roles_as_they_are_typed():
    assert parse_roles(["query=test", "gallery=train,val"]) == {
        "query": ("test",),
        "gallery": ("train", "val"),
    }
    for text in ("query", "=test", "query=", "query=a,,b"):
        with pytest.raises(UserError, match=r"expected a role and its values, such as"):
            parse_roles([text])
    with pytest.raises(UserError, match="role query is given twice"):
        parse_roles(["query=a", "query=b"])


def test_roles_that_contradict(shards, tmp_path):
    table = write_table(tmp_path / "t.jsonl", json_lines(VALUES))

    def refused(roles: dict, match: str) -> None:
        with pytest.raises(UserError, match=match):
            assign_roles(shards, tmp_path / "out", table=table, field="split", roles=roles)

    refused({}, "no roles given")
    refused({"a": ["test"], "b": ["val", "train", "test"]}, r"value 'test' is given to a and to b")
    refused({"a": ["test", "test"]}, r"value 'test' is given to a and to a")
    refused({"../a": ["test"], "b": ["train", "val"]}, r"prefix '\.\./a'")


def test_command_line(main, shards, tmp_path, capsys):
    main(["split", shards, str(tmp_path / "s"), "--test_share", "0.4"])
    *packed, following = capsys.readouterr().out.splitlines()
    assert following.startswith("next: glsd finetune --init ")
    assert packed == [
        f"packed 6 images of 3 classes into 1 shard: {tmp_path}/s/train-000000.tar",
        f"packed 4 images of 2 classes into 1 shard: {tmp_path}/s/test-000000.tar",
    ]
    (tmp_path / "names.txt").write_text("\n".join(NAMES[::-1]))
    main(
        [
            "split",
            shards,
            str(tmp_path / "n"),
            "--classes_file",
            str(tmp_path / "names.txt"),
            "--shuffle_seed",
            "3",
        ]
    )
    assert json.loads((tmp_path / "n" / "classes.json").read_text()) == NAMES[::-1]
    capsys.readouterr()
    table = write_table(tmp_path / "t.jsonl.gz", json_lines(VALUES))
    options = [
        "--table",
        str(table),
        "--field",
        "split",
        "--role",
        "query=test",
        "--role",
        "gallery=train,val",
    ]
    main(["roles", shards, str(tmp_path / "r"), *options])
    assert capsys.readouterr().out.splitlines()[:-1] == [
        f"packed 4 images of 2 classes into 1 shard: {tmp_path}/r/query-000000.tar",
        f"packed 6 images of 3 classes into 1 shard: {tmp_path}/r/gallery-000000.tar",
    ]
    with pytest.raises(UserError, match=r"already has query-000000\.tar"):
        main(["roles", shards, str(tmp_path / "r"), *options])
    with pytest.raises(UserError, match=r"role 'query': expected a role and its values"):
        main(["roles", shards, str(tmp_path / "x"), *options, "--role", "query"])


def test_no_command_is_still_a_folder(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "--full_check" in printed
    assert "glsd pack split" in printed
    with pytest.raises(SystemExit):
        main([])
