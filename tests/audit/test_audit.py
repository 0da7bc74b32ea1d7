"""Shards with known faults, each found where it was planted; and near duplicates against a slow literal twin."""

import io
import itertools
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from glsd.audit import NEAR_BITS
from glsd.audit.census import fingerprint, parse_splits
from glsd.audit.duplicates import MAX_DIFFERENCE, MIN_CORRELATION, find_near_duplicates
from glsd.audit.report import Examination, examine
from glsd.cli import door as _door
from glsd.cli import pack as pack_command
from glsd.errors import UserError
from glsd.packing.folder import pack_folder
from glsd.packing.write import pack_samples
from glsd.shards.index import index_path
from glsd.shards.store import open_shards
from tests.helpers.small_shards import encoded, noise_image, scene, write_tar

LAUNCH = Path(__file__).parents[2] / "launch" / "pack.py"


pytestmark = pytest.mark.usefixtures("own_cache")


def pack(
    folder: Path, prefix: str, images: list[bytes], labels: Sequence[int | None] | None = None, **more
) -> str:
    labels = [number % 2 for number in range(len(images))] if labels is None else labels
    samples = [(raw, "jpg", label) for raw, label in zip(images, labels, strict=True)]
    pack_samples(samples, folder, prefix=prefix, **more)
    return str(folder / f"{prefix}-*.tar")


def scenes(start: int, count: int) -> list[bytes]:
    return [encoded(scene(seed)) for seed in range(start, start + count)]


def levels(found: Examination) -> dict[str, str]:
    """The worst level of each topic."""
    worst: dict[str, str] = {}
    for finding in found.findings:
        worst[finding.topic] = max(
            worst.get(finding.topic, ""), finding.level, key=("", "ok", "note", "FIX").index
        )
    return worst


def items(found: Examination, topic: str) -> list[str]:
    return [
        f"{where} {what}"
        for finding in found.findings
        if finding.topic == topic
        for where, what in finding.items
    ]


def test_healthy_shards(tmp_path):
    train, test = (pack(tmp_path, name, scenes(100 * n, 20)) for n, name in enumerate(("train", "test")))
    found = examine({"train": [train], "test": [test]})
    assert set(levels(found).values()) == {"ok"}
    assert not found.has_problems
    one = found.splits[0]
    assert (one.name, one.shards, one.images, one.labels) == ("train", 1, 20, 2)
    assert one.percentiles["width"] == (96,) * 5
    assert one.total_bytes == sum(map(len, scenes(0, 20)))
    assert examine({"train": [train], "test": [test]}, workers=2) == found


def test_unreadable_images(tmp_path):
    broken = {3: b"", 7: encoded(scene(7))[:-200], 11: b"text"}
    shards = pack(tmp_path, "a", [broken.get(n, raw) for n, raw in enumerate(scenes(0, 12))])
    for workers in (0, 2):
        found = examine({"a": [shards]}, workers=workers)
        assert found.has_problems
        lines = items(found, "unreadable")
        assert [line.split()[:2] for line in lines] == [["a-000000.tar", f"{n:08d}"] for n in broken]
        assert "empty image member" in lines[0]
        assert "truncated" in lines[1]
        assert levels(found)["duplicates"] == levels(found)["near duplicates"] == "ok"


def test_twelve_bits_in_files_of_sixteen(tmp_path):
    """They train nearly black; the auditor says what range it found, and what to do."""

    def deep(seed: int, bits: int) -> bytes:
        gray = np.asarray(scene(seed).convert("L")).astype(np.uint16)
        gray[0, 0] = 255
        return encoded(Image.fromarray((gray * 257) >> (16 - bits)), "PNG")

    twelve = pack(tmp_path, "twelve", [deep(n, 12) for n in range(6)])
    found = examine({"a": [twelve]})
    assert levels(found)["range"] == "FIX"
    (text,) = (finding.text for finding in found.findings if finding.topic == "range")
    assert text == (
        "a: 6 of 6 images of more than 8 bits are nearly black: values up to 4095 of 65535. If their white is there, "
        "multiply the values by 16 before packing"
    )
    assert items(found, "range")[1] == "twelve-000000.tar 00000001 values up to 4095 of 65535"
    mixed = pack(tmp_path, "mixed", [*(deep(n, 16) for n in range(5)), deep(9, 10)])
    found = examine({"a": [mixed]})
    assert levels(found)["range"] == "note"
    assert items(found, "range") == ["mixed-000000.tar 00000005 values up to 1023 of 65535"]
    assert "range" not in levels(examine({"a": [pack(tmp_path, "whole", [deep(n, 16) for n in range(5)])]}))
    assert "range" not in levels(examine({"a": [pack(tmp_path, "eight", scenes(0, 5))]}))


def test_copies_inside_a_split_are_a_note(tmp_path):
    bitmap = encoded(Image.open(io.BytesIO(scenes(2, 1)[0])), "PNG")  # the same pixels, other bytes
    shards = pack(tmp_path, "a", [*scenes(0, 10), *scenes(4, 1), bitmap], [0] * 11 + [5])
    found = examine({"a": [shards]})
    assert not found.has_problems
    assert items(found, "duplicates") == [
        "a-000000.tar 00000011 = a-000000.tar 00000002",
        "a-000000.tar 00000010 = a-000000.tar 00000004",
    ]
    (text,) = (finding.text for finding in found.findings if finding.topic == "duplicates")
    assert text == "a: 2 of 12 images are copies of another (1 bit for bit), 1 with another label"
    assert levels(found)["near duplicates"] == "ok"


def test_leakage_is_to_be_fixed(tmp_path):
    train = pack(tmp_path, "train", scenes(0, 10))
    again = encoded(scene(3).resize((61, 40)), quality=60)
    test = pack(tmp_path, "test", [*scenes(50, 5), scenes(8, 1)[0], again])
    found = examine({"train": [train], "test": [test]})
    assert found.has_problems
    assert items(found, "leakage") == ["test: test-000000.tar 00000005 = train: train-000000.tar 00000008"]
    assert items(found, "near leakage") == [
        "train: train-000000.tar 00000003 ~ test: test-000000.tar 00000006",
        "test: test-000000.tar 00000006 ~ train: train-000000.tar 00000003",
    ]
    inside = examine({"all": [train, test]})
    assert not inside.has_problems
    assert items(inside, "near duplicates") == ["test-000000.tar 00000006 ~ train-000000.tar 00000003"]
    three = examine({"train": [train], "query": [pack(tmp_path, "query", scenes(80, 3))], "test": [test]})
    assert items(three, "near leakage") == items(found, "near leakage")


def test_labels(tmp_path):
    some = pack(tmp_path, "some", scenes(0, 6), [0, 1, None, 0, None, 1])
    none = pack(tmp_path, "none", scenes(10, 6), [None] * 6)
    uneven = pack(tmp_path, "uneven", scenes(20, 14), [0] * 11 + [1, 2, 2])
    found = examine({"some": [some]})
    assert found.has_problems
    assert items(found, "labels") == [f"some-000000.tar 0000000{n} no label" for n in (2, 4)]
    assert not examine({"none": [none]}).has_problems
    (text,) = (f.text for f in examine({"uneven": [uneven]}).findings if f.topic == "classes")
    assert text.startswith("uneven: 3 classes have 1 to 11 images; 1 class has one image, ")
    assert levels(examine({"uneven": [uneven]}))["classes"] == "note"
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    found = examine({"uneven": [uneven]})
    assert found.has_problems
    assert items(found, "labels") == [f"uneven-000000.tar 000000{n} label 2" for n in (12, 13)]


def test_sizes(tmp_path):
    odd = [encoded(scene(1, 20, 30)), encoded(scene(2, 400, 50)), encoded(Image.new("RGB", (64, 64), "gray"))]
    found = examine({"a": [pack(tmp_path, "a", [*scenes(10, 5), *odd])]})
    assert [items(found, topic) for topic in ("tiny", "long", "blank")] == [
        ["a-000000.tar 00000005 20 x 30"],
        ["a-000000.tar 00000006 400 x 50"],
        ["a-000000.tar 00000007 64 x 64"],
    ]
    assert not found.has_problems
    big = examine({"b": [pack(tmp_path, "b", [encoded(scene(n, 1400, 1000)) for n in range(3)])]})
    assert levels(big)["large"] == "note"


def test_uneven_shards_and_keys_twice(tmp_path):
    patterns = [pack(tmp_path, f"a{n}", scenes(100 * n, count)) for n, count in enumerate((4, 4, 12))]
    found = examine({"a": patterns})
    assert levels(found)["balance"] == levels(found)["keys"] == "note"
    assert len(items(found, "keys")) == 12
    assert {line.split()[1] for line in items(found, "keys")} == {f"{n:08d}" for n in range(4)}
    assert not found.has_problems


def test_findings_name_the_file_of_the_user(tmp_path):
    for number, name in enumerate(("menorah/IMG 1426.jpg", "menorah/a\tb\\n.jpg", "emu/c.jpg", "emu/d.jpg")):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        raw = scenes(number // 2, 1)[0] if number < 3 else b"\xff\xd8\xff" + b"no image"
        (tmp_path / "src" / name).write_bytes(raw)
    pack_folder(tmp_path / "src", tmp_path / "out")
    table = (tmp_path / "out" / "train-files.tsv").read_text().splitlines()[1:]
    key = {row.split("\t")[1]: row.split("\t")[0] for row in table}
    found = examine({"train": [f"{tmp_path}/out/train-*.tar"]})
    (line,) = items(found, "duplicates")
    names = [
        ("menorah/IMG 1426.jpg", "menorah/IMG 1426.jpg"),
        ("menorah/a\tb\\n.jpg", r"menorah/a\tb\\n.jpg"),
    ]
    ends = {f"{name} (train-000000.tar {key[cell]})" for name, cell in names}
    assert set(line.split(" = ")) == ends
    (tmp_path / "out" / "train-files.tsv").unlink()
    (line,) = items(examine({"train": [f"{tmp_path}/out/train-*.tar"]}), "duplicates")
    assert set(line.split(" = ")) == {f"train-000000.tar {key[cell]}" for _, cell in names}


def test_images_of_samples_that_are_not_used(tmp_path):
    members = [
        (f"{n}{kind}", scenes(n + 7 * (kind == ".2.jpg"), 1)[0])
        for n in range(3)
        for kind in (".jpg", ".2.jpg")
    ]
    found = examine({"a": [str(write_tar(tmp_path / "a.tar", members))]})
    (text,) = (finding.text for finding in found.findings if finding.topic == "unused")
    assert text.startswith("3 further images of samples are not used: 3 .2.jpg;")
    assert levels(found)["unused"] == "note"


def test_damaged_shards(tmp_path):
    good = pack(tmp_path, "good", scenes(0, 5))
    for fault in ("cut", "other", "index"):
        shard = Path(pack(tmp_path, fault, scenes(10, 5)).replace("*", "000000"))
        if fault == "cut":
            shard.write_bytes(shard.read_bytes()[:-12_000])
        elif fault == "other":
            raw = bytearray(shard.read_bytes())
            raw[:] = raw[:600] + bytes(len(raw) - 1600) + raw[-1000:]
            shard.write_bytes(raw)
        else:
            index_path(shard).write_bytes(b"no index")
        found = examine({"a": [good, str(shard)]})
        assert found.has_problems
        assert items(found, "shards")[0].startswith(f"{shard} ")
        assert found.splits[0].images in (5, 10)
        (alone,) = examine({"a": [str(shard)]}).splits
        assert alone.images in (0, 5)
    index_path(good.replace("*", "000000")).unlink()
    found = examine({"a": [good]})
    assert levels(found)["index"] == "note"
    assert not found.has_problems


def test_names_that_no_terminal_shows(tmp_path, monkeypatch):
    """A file name of another encoding, or one that would paint the screen, is printed with escapes."""
    src = tmp_path / "src"
    src.mkdir()
    for name in (b"caf\xe9.jpg", b"\x1b[2Jred\n.jpg"):
        Path(os.fsdecode(os.path.join(os.fsencode(src), name))).write_bytes(b"no image")
    (src / "fine.jpg").write_bytes(scenes(0, 1)[0])
    screen = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", [str(LAUNCH), str(src), str(tmp_path / "out"), "--workers=0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(LAUNCH), run_name="__main__")
    assert end.value.code == 0
    printed = screen.buffer.getvalue().decode()
    assert "\n  caf\\udce9.jpg: not an image" in printed
    assert "\n  \\x1b[2Jred\\n.jpg: not an image" in printed
    with pytest.raises(SystemExit):
        _door.run(lambda argv: print("what nobody escaped: \udce9"))
    assert screen.buffer.getvalue().endswith(b"nobody escaped: \\udce9\n")


def test_unnamed_splits_are_told(tmp_path, monkeypatch):
    for name in ("train", "test"):
        pack(tmp_path, name, scenes(0, 3))
    found = examine(parse_splits([f"{tmp_path}/*.tar"]))
    (text,) = (finding.text for finding in found.findings if finding.topic == "splits")
    assert text.endswith("name them: glsd audit test='.../test-*.tar' train='.../train-*.tar'")
    assert parse_splits(["train=a", "b", "test=x=y", "train=c", "./t=1/d"]) == {
        "train": ["a", "c"],
        "shards": ["b", "./t=1/d"],
        "test": ["x=y"],
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2021 [a]").mkdir()
    text = "year=2021 [a]/x-*.tar"  # a folder that exists, and no name of a split
    assert parse_splits([text, f"train={text}"]) == {"shards": [text], "train": [text]}


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no shard matches"):
        examine({"a": [str(tmp_path / "nothing-*.tar")]})
    shards = pack(tmp_path, "a", scenes(0, 3))
    with pytest.raises(UserError, match="near_bits is 99"):
        examine({"a": [shards]}, near_bits=99)
    with pytest.raises(UserError, match="workers is -1"):
        examine({"a": [shards]}, workers=-1)


def test_command_line(tmp_path, capsys, monkeypatch):
    main = pack_command.main
    train, test = pack(tmp_path, "train", scenes(0, 6)), pack(tmp_path, "test", scenes(5, 6))
    assert main(["doctor", train, "--workers=0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["sick"], told["splits"]["shards"]["images"]) == (False, 6)
    table = tmp_path / "found.tsv"
    assert main(["doctor", f"train={train}", f"test={test}", "--workers=0", "--list", str(table)]) == 1
    printed = capsys.readouterr().out
    assert "FIX   leakage" in printed
    assert printed.splitlines()[-1] == "1 problem to fix, 0 notes"
    assert table.read_text().splitlines() == [
        "level\ttopic\twhere\twhat",
        "FIX\tleakage\ttest: test-000000.tar 00000000\t= train: train-000000.tar 00000005",
    ]


def changed() -> dict[str, Image.Image]:
    whole = scene(1, 320, 240)
    return {
        "coded again": Image.open(io.BytesIO(encoded(whole, quality=20))),
        "halved": whole.resize((160, 120), Image.Resampling.BILINEAR),
        "squeezed": whole.resize((224, 224)),
        "brighter": ImageEnhance.Brightness(whole).enhance(1.15),
        "trimmed": whole.crop((2, 2, 318, 238)),
    }


def prints(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    made = [fingerprint(np.asarray(image)) for image in images]
    return np.array([code for code, _ in made], dtype=np.uint64), np.stack([thumb for _, thumb in made])


@pytest.mark.parametrize("change", changed())
def test_what_is_nearly_the_same(change):
    others = [scene(seed, 320, 240) for seed in range(2, 40)]
    codes, thumbs = prints([scene(1, 320, 240), *others, changed()[change]])
    found = find_near_duplicates(
        codes, thumbs, np.zeros(len(codes), int), np.arange(len(codes)), max_bits=NEAR_BITS
    )
    assert found.group.tolist() == [*range(len(codes) - 1), 0]
    assert (found.partner == -1).all()


def test_color_and_day_and_night_are_told_apart():
    whole = scene(1, 320, 240)
    red, green, blue = whole.split()
    night = ImageEnhance.Brightness(whole).enhance(0.4)
    gray = Image.fromarray(np.asarray(whole.convert("L"))).convert("RGB")
    codes, thumbs = prints([whole, Image.merge("RGB", (blue, green, red)), night, gray])
    found = find_near_duplicates(codes, thumbs, np.arange(4), np.arange(4), max_bits=NEAR_BITS)
    assert found.partner.tolist() == [-1] * 4


@pytest.mark.parametrize("max_bits", [0, 3, 6])
def test_pairs_as_the_slow_twin_finds_them(max_bits, monkeypatch):
    """Hashes near one another, thumbnails that agree or not, tiles that cut through the buckets."""
    monkeypatch.setattr("glsd.audit.duplicates.TILE", 7)
    monkeypatch.setattr("glsd.audit.duplicates.PAIRS_AT_ONCE", 5)
    rng = np.random.default_rng(max_bits)
    made: list[tuple[int, np.ndarray]] = []
    for _ in range(25):
        center, picture = int(rng.integers(0, 2**63)), rng.integers(0, 256, 432).astype(float)
        for _ in range(6):
            flips = rng.choice(64, rng.integers(0, max_bits // 2 + 2), replace=False)
            code = center ^ sum(1 << int(bit) for bit in flips)
            made.append((code, picture + rng.normal(0, rng.choice([2, 14, 40]), 432)))
    codes = np.array([code for code, _ in made], dtype=np.uint64)
    thumbs = np.stack([thumb for _, thumb in made]).clip(0, 255).astype(np.uint8)
    splits, contents = rng.integers(0, 3, len(codes)), rng.integers(0, 100, len(codes))
    group = list(range(len(codes)))
    partners: list[set[int]] = [set() for _ in codes]
    for a, b in itertools.combinations(range(len(codes)), 2):
        one, other = thumbs[a].astype(float), thumbs[b].astype(float)
        near = bin(int(codes[a]) ^ int(codes[b])).count("1") <= max_bits
        same = (
            np.corrcoef(one, other)[0, 1] >= MIN_CORRELATION
            and np.sqrt(((one - other) ** 2).mean()) <= MAX_DIFFERENCE
        )
        if near and same:
            group = [min(group[a], group[b]) if g in (group[a], group[b]) else g for g in group]
            if splits[a] != splits[b] and contents[a] != contents[b]:
                partners[a].add(b)
                partners[b].add(a)
    found = find_near_duplicates(codes, thumbs, splits, contents, max_bits=max_bits)
    assert found.group.tolist() == group
    assert 0 < sum(map(bool, partners)) < len(codes)
    for row, partner in enumerate(found.partner.tolist()):
        assert partner in partners[row] if partners[row] else partner == -1


@pytest.mark.slow
def test_a_hundred_thousand_are_compared_in_seconds():
    rng = np.random.default_rng(0)
    n = 100_000
    codes = rng.integers(0, 2**63, n, dtype=np.uint64)
    thumbs = rng.integers(0, 256, (n, 432), dtype=np.uint8)
    codes[n // 2 : n // 2 + 50] = codes[:50] ^ np.uint64(0b1010001)
    thumbs[n // 2 : n // 2 + 50] = thumbs[:50]
    codes[-2000:], thumbs[-2000:] = codes[-1], thumbs[-1]  # frames of a camera that saw nothing
    found = find_near_duplicates(codes, thumbs, np.zeros(n, int), np.arange(n), max_bits=NEAR_BITS)
    assert (found.group[n // 2 : n // 2 + 50] == np.arange(50)).all()
    assert (found.group != np.arange(n)).sum() == 50 + 1999


@pytest.mark.photos
@pytest.mark.slow
def test_photographs_coded_again_and_halved(photos):
    """All of them are found again, each as itself; of 400 photographs of 99 classes, almost none is taken for another."""
    shards = open_shards(str(photos / "pretrain_caltech101" / "val-*.tar"))
    images = [Image.open(io.BytesIO(shards.read(index))).convert("RGB") for index in range(400)]
    again = [
        image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC) for image in images
    ]
    again = [Image.open(io.BytesIO(encoded(image, quality=40))) for image in again]
    codes, thumbs = prints(images + again)
    found = find_near_duplicates(codes, thumbs, np.repeat([0, 1], 400), np.arange(800), max_bits=NEAR_BITS)
    assert (found.partner[:400] >= 400).all()
    assert (found.group[400:] == found.group[:400]).all()
    assert len(set(found.group)) >= 398


def test_nothing_and_one_image():
    empty = find_near_duplicates(
        np.zeros(0, np.uint64),
        np.zeros((0, 432), np.uint8),
        np.zeros(0, int),
        np.zeros(0, int),
        max_bits=NEAR_BITS,
    )
    assert empty.group.tolist() == []
    raw = np.asarray(Image.open(io.BytesIO(noise_image(0))))
    code, thumb = fingerprint(raw[:1, :1])
    assert bin(code).count("1") <= 32
    assert thumb.reshape(-1, 3).std(0).max() == 0
