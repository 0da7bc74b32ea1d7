"""glsd embed: every readable image once, whatever kills it and however many ranks make it."""

import csv
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import glsd
from glsd.errors import UserError
from glsd.files import locked
from glsd.inference import parts
from glsd.inference.run import embed_files
from glsd.inference.vectors import read_vectors
from glsd.packing.folder import pack_folder
from glsd.shards.store import open_shards
from tests.helpers.hard_pictures import BROKEN, hard_pictures
from tests.helpers.launched import run, warm_launch_line
from tests.helpers.ranks import run_ranks
from tests.helpers.small_shards import encoded, scene
from tests.helpers.trained import trained_networks


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder with the runs "pretrained" and "tuned"."""
    root = tmp_path_factory.mktemp("trained")
    trained_networks(root)
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return hard_pictures(tmp_path_factory.mktemp("pictures"))


def embed(trained: Path, images: Path | str, out: Path, **changes):
    settings = {"num_workers": 0, "index": "none", "batch_size": 8, **changes}
    return embed_files(str(trained / "pretrained"), [str(images)], out, **settings)


def readable(pictures: Path) -> list[str]:
    return [name for name in glsd.list_images(pictures) if name != BROKEN]


@pytest.mark.parametrize("form", [".parquet", ".npy", ".csv", ".safetensors"])
def test_every_readable_image_has_the_vector_that_the_model_gives(trained, pictures, tmp_path, form):
    out = tmp_path / "deep" / f"my vectors{form}"
    summary = embed(trained, pictures, out)
    table = read_vectors(out)
    names = readable(pictures)
    assert table.names == names
    assert table.labels == [name.split("/")[0] for name in names]
    everything = glsd.list_images(pictures)
    assert [everything[number] for number in table.numbers] == names
    expected = glsd.load(trained / "pretrained").embed([pictures / name for name in names], batch_size=16)
    np.testing.assert_allclose(table.vectors, expected, rtol=0, atol=1e-6)
    assert (summary.num_vectors, summary.images_done, summary.resumed) == (79, 80, 0)
    assert [name for name, _ in summary.unreadable] == [BROKEN]
    listed = (tmp_path / "deep" / f"{out.name}.unreadable.txt").read_text()
    assert listed.startswith(f"{BROKEN}\t")
    assert listed.count("\n") == 1
    record = table.record
    assert record["step"] == 7
    assert (
        record["model"] == str(trained / "pretrained" / "checkpoints" / "step_00000007")
        or Path(record["model"]).is_dir()
    )
    assert (record["width"], record["transform"], record["glsd"]) == (
        32,
        "EvalTransform(resize=37, crop=32)",
        glsd.__version__,
    )
    assert not (tmp_path / "deep" / f"{out.name}.parts").exists()
    again = embed(trained, pictures, out)
    assert (again.num_vectors, again.images_done) == (79, 0)


def test_the_libraries_read_what_was_written(trained, pictures, tmp_path):
    from pyarrow import parquet
    from safetensors.numpy import load_file

    for form in (".parquet", ".npy", ".csv", ".safetensors"):
        embed(trained, pictures, tmp_path / f"x{form}")
    names = readable(pictures)
    vectors = np.load(tmp_path / "x.npy")
    assert vectors.shape == (79, 32)
    assert np.array_equal(load_file(tmp_path / "x.safetensors")["vectors"], vectors)
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert np.array_equal(np.array(table["vector"], np.float32), vectors)
    assert [os.fsdecode(name) for name in table["name_bytes"]] == names
    assert [name for name in table["name"] if "\\udcff" in name] == ["a/byte \\udcff.png"]
    assert table["label"] == [name[0] for name in names]
    for file in ("x.csv", "x.npy.names.csv", "x.safetensors.names.csv"):
        with open(tmp_path / file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert [row["name"] for row in rows] == names
        if file == "x.csv":
            columns = [[row[f"v{place}"] for place in range(32)] for row in rows]
            assert np.array_equal(np.array(columns, np.float32), vectors)


def dies_at(call: int, trained: Path, pictures: Path, out: Path) -> bool:
    """Embed in a process that kills itself before its n-th rename or deletion; tell whether it died."""

    def child():
        calls = 0

        def deadly(function):
            def wrapped(*args, **settings):
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **settings)

            return wrapped

        os.replace, os.unlink = deadly(os.replace), deadly(os.unlink)
        shutil.rmtree = deadly(shutil.rmtree)
        embed(trained, pictures, out)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def files(out: Path) -> dict[str, bytes]:
    """The output and all beside it, by the end of the name."""
    return {f.name.removeprefix(out.name): f.read_bytes() for f in out.parent.iterdir() if f.is_file()}


def test_killed_again_and_again_it_becomes_the_same_file(trained, pictures, tmp_path):
    whole, out = tmp_path / "whole" / "w.parquet", tmp_path / "x" / "x.parquet"
    embed(trained, pictures, whole)
    draw = random.Random(3)
    deaths = 0
    while dies_at(draw.randint(1, 12), trained, pictures, out):
        deaths += 1
        assert deaths < 30
    assert deaths > 1
    assert files(out) == files(whole)
    assert len(list(out.parent.iterdir())) == 2


@pytest.mark.slow
def test_killed_once_at_every_moment_it_becomes_the_same_file(trained, pictures, tmp_path):
    embed(trained, pictures, tmp_path / "whole" / "x.npy")
    for call in itertools.count(2):
        out = tmp_path / str(call) / "x.npy"
        died = dies_at(call, trained, pictures, out)
        if not died:
            break
        embed(trained, pictures, out)
        assert files(out) == files(tmp_path / "whole" / "x.npy")
        assert read_vectors(out).names == readable(pictures)
        assert not out.with_name("x.npy.parts").exists()
    assert call > 12


def test_two_ranks_write_the_file_of_one(trained, pictures, tmp_path):
    embed(trained, pictures, tmp_path / "one.parquet")
    body = f"""
    from glsd.inference.run import embed_files
    settings = {{"num_workers": 0, "index": "none", "batch_size": 8}}
    made = embed_files({str(trained / "pretrained")!r}, [{str(pictures)!r}], folder / "two.parquet", **settings)
    print(made is None if rank else made.num_vectors)
    """
    printed = run_ranks(body, tmp_path)
    assert [text.splitlines()[-1] for text in printed] == ["79", "True"]
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


@pytest.mark.slow
def test_the_launch_line_embeds_on_two_ranks(trained, pictures, tmp_path):
    embed(trained, pictures, tmp_path / "one.parquet")
    body = tmp_path / "body.py"
    body.write_text("import sys\nfrom glsd.cli.main import run\nrun('embed', sys.argv[1:])\n")
    environment, command = warm_launch_line()
    words = [
        str(trained / "pretrained"),
        str(pictures),
        "--batch_size=8",
        f"--out={tmp_path / 'two.parquet'}",
    ]
    done = run([*command, str(body), *words], environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert done.stdout.count("wrote     79 vectors") == 1
    assert done.stdout.count("next: glsd search ") == 1


@pytest.fixture
def half_done(trained, pictures, tmp_path) -> Path:
    """An output of which the first two parts of three are made."""
    out = tmp_path / "x.parquet"
    calls = []

    class Stop(Exception):
        pass

    original = parts.Parts.write

    def write(self, part, found):
        if part == 2:
            raise Stop
        calls.append(part)
        original(self, part, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.Parts, "write", write)
        with pytest.raises(Stop):
            embed(trained, pictures, out)
    assert calls == [0, 1]
    return out


def test_it_goes_on_after_the_last_part(half_done, trained, pictures):
    summary = embed(trained, pictures, half_done)
    assert (summary.resumed, summary.images_done, summary.num_vectors) == (64, 16, 79)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other"])
def test_a_damaged_part_is_made_again(half_done, trained, pictures, tmp_path, damage, capsys):
    part = half_done.with_name("x.parquet.parts") / "part-000000.safetensors"
    raw = bytearray(part.read_bytes())
    raw[-5] ^= 8
    other = (part.parent / "part-000001.safetensors").read_bytes()
    part.write_bytes({"cut": raw[:-40], "bit": raw, "empty": b"", "other": other}[damage])
    summary = embed(trained, pictures, half_done)
    assert (summary.resumed, summary.images_done) == (32, 48)
    assert "part-000000.safetensors is damaged" in capsys.readouterr().out
    embed(trained, pictures, tmp_path / "whole.parquet")
    assert half_done.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("made", ["parts", "file"])
def test_another_call_is_refused(half_done, trained, pictures, tmp_path, made):
    if made == "file":
        embed(trained, pictures, half_done)
    before = half_done.read_bytes() if made == "file" else b""
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved, copy_function=shutil.copy2)
    for settings, message in (
        ({"precision": "bf16"}, r"the precision was 'no', now 'bf16'"),
        ({"pool": "cls"}, r"the model '.*' has changed"),
        ({"role": "student"}, r"the model '.*' has changed|the model was"),
        ({"images": moved}, rf"the images title was '.*', now '{moved}'"),
        ({"images": pictures / "a"}, r"the images title was "),
    ):
        settings = {"images": pictures, **settings}
        with pytest.raises(UserError, match=message) as refused:
            embed(trained, settings.pop("images"), half_done, **settings)
        assert "choose another --out" in str(refused.value)
    with pytest.raises(UserError, match="the model was "):
        embed_files(str(trained / "tuned"), [str(pictures)], half_done, num_workers=0)
    if made == "file":
        assert half_done.read_bytes() == before


def test_an_image_that_was_changed_meanwhile_is_noticed(trained, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        scene(number).save(folder / f"{number}.png")
    embed(trained, folder, tmp_path / "x.npy")
    scene(9).save(folder / "1.png")
    with pytest.raises(UserError, match=rf"the images title '{folder}' has changed since"):
        embed(trained, folder, tmp_path / "x.npy")


def test_two_processes_do_not_write_the_same_parts(half_done, trained, pictures):
    folder = half_done.with_name("x.parquet.parts")
    with locked(folder / "lock"), pytest.raises(UserError, match="another process writes these parts"):
        embed(trained, pictures, half_done)
    embed(trained, pictures, half_done)


def test_what_cannot_be_is_said_in_one_line(trained, pictures, tmp_path):
    (tmp_path / "broken").mkdir()
    for name in "ab":
        (tmp_path / "broken" / f"{name}.png").write_bytes(b"nothing")
    (tmp_path / "foreign.npy").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"")
    for images, out, settings, message in (
        (
            tmp_path / "broken",
            "x.npy",
            {},
            "none of the 2 images can be read, the first is 'a.png': not an image",
        ),
        (pictures, "x.jpg", {}, "ends in .parquet, .npy, .csv, .safetensors"),
        (pictures, "foreign.npy", {}, "was not written by glsd embed"),
        (pictures, "file/x.npy", {}, "cannot write .*file/x.npy.parts"),
        (pictures, "x.npy", {"index": "tree"}, "unknown index 'tree'"),
        (pictures, "x.npy", {"precision": "half"}, "precision is 'half'"),
        (pictures, "x.npy", {"batch_size": 0}, "batch_size is 0"),
        (tmp_path / "none", "x.npy", {}, "no such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            embed(trained, images, tmp_path / out, **settings)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x.npy").exists()
    assert (tmp_path / "foreign.npy").read_bytes() == b"x"


def test_lists_and_shards_give_the_vectors_of_the_folder(trained, pictures, tmp_path):
    embed(trained, pictures, tmp_path / "folder.npy")
    expected = dict(zip(readable(pictures), read_vectors(tmp_path / "folder.npy").vectors, strict=True))
    names = readable(pictures)[::-1]
    with open(tmp_path / "list.csv", "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((name, f"class {name[0]}") for name in [*names, "gone.png"])]
        )
    summary = embed(trained, tmp_path / "list.csv", tmp_path / "list.npy", root=str(pictures))
    table = read_vectors(tmp_path / "list.npy")
    assert table.names == names
    assert table.labels == [f"class {name[0]}" for name in names]
    np.testing.assert_allclose(table.vectors, [expected[name] for name in names], rtol=0, atol=1e-6)
    assert summary.unreadable[0][0] == "gone.png"
    pack_folder(pictures, tmp_path / "shards", workers=0)
    embed(trained, f"{tmp_path}/shards/*.tar", tmp_path / "packed.npy")
    table = read_vectors(tmp_path / "packed.npy")
    packed = open_shards(f"{tmp_path}/shards/*.tar")
    by_bytes = {(pictures / name).read_bytes(): name for name in names}
    assert len(table.names) == 79
    for row, number in enumerate(table.numbers.tolist()):
        name = by_bytes[packed.read(number)]
        assert table.names[row] == packed.key(number)
        assert table.labels is not None
        assert table.labels[row] == name[0]
        np.testing.assert_allclose(table.vectors[row], expected[name], rtol=0, atol=1e-6)


def test_a_parquet_list_that_holds_the_images(trained, tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    raw = [encoded(scene(number), "PNG") for number in range(5)]
    columns = {"path": [*raw, b"broken"], "label": [0, 1, 0, -1, 1, 1]}
    parquet.write_table(arrow.table(columns), tmp_path / "in.parquet")
    embed(trained, tmp_path / "in.parquet", tmp_path / "x.npy")
    table = read_vectors(tmp_path / "x.npy")
    assert table.names == [f"in.parquet#{number}" for number in range(5)]
    assert table.labels == ["0", "1", "0", None, "1"]
    expected = glsd.load(trained / "pretrained").embed([scene(number) for number in range(5)])
    np.testing.assert_allclose(table.vectors, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", [".parquet", ".npy", ".csv", ".safetensors"])
def test_a_file_that_was_changed_is_refused(trained, pictures, tmp_path, form):
    out = tmp_path / f"x{form}"
    embed(trained, pictures, out)
    raw = out.read_bytes()
    place = len(raw) // 2
    if form == ".csv":
        lines = raw.split(b"\n")
        lines[20] = lines[21]
        changed = b"\n".join(lines)
    else:
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
    for bad in (changed, raw[: len(raw) // 3], b""):
        out.write_bytes(bad)
        with pytest.raises(UserError, match=r"is damaged or was changed|cannot read|was not written by"):
            read_vectors(out)
    out.write_bytes(raw)
    assert len(read_vectors(out).names) == 79


def test_the_size_of_parts_depends_on_the_number_of_images_alone():
    assert [parts.part_size(n) for n in (1, 2048, 2049, 64_000, 10**7)] == [32, 32, 33, 1000, 8192]


def test_the_plan_can_be_read(half_done):
    plan = json.loads((half_done.with_name("x.parquet.parts") / "plan.json").read_text())
    assert (plan["images"], plan["width"], plan["step"]) == (80, 32, 7)
