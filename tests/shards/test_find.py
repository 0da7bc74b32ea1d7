"""Which shards a pattern names, and which members of a sample are not used."""

import io
import os
import tarfile

import pytest

from glsd.errors import UserError
from glsd.packing.write import index_shards, pack_samples
from glsd.shards.find import find_shards
from glsd.shards.index import index_path
from glsd.shards.store import open_shards
from tests.helpers.small_shards import noise_image, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_tars_of_links_are_told(tmp_path, kind, capsys):
    links = [(f"{number}.jpg", b"") for number in range(3)]
    with pytest.raises(UserError, match=r"holds no image: 3 of its members are links.*tar --dereference"):
        open_shards(str(write_tar(tmp_path / "a.tar", links, kind)))
    with tarfile.open(write_tar(tmp_path / "b.tar", links, kind), "a") as tar:
        header = tarfile.TarInfo("9.jpg")
        header.size = 1
        tar.addfile(header, io.BytesIO(b"x"))
    assert len(open_shards(str(tmp_path / "b.tar"))) == 4
    assert "3 images are links, which are not followed" in capsys.readouterr().err


MANY = [
    *(
        (f"{n}.{kind}", f"{n} {kind}".encode())
        for n in range(2)
        for kind in ("mask.png", "png", "tif", "JPG")
    ),
    ("2.edited.jpg", b"2 edited.jpg"),
    ("2.cls", b"7"),
    ("3.json", b"{}"),
    ("3.jfif", b"3 jfif"),
]


def test_further_images_of_a_sample_are_counted_and_can_be_chosen(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", MANY)
    shards = open_shards(str(path))
    assert [shards.read(i) for i in (0, 1, 3)] == [b"0 png", b"1 png", b"3 jfif"]
    told = "7 further images of samples are not used: 2 .mask.png, 2 .tif, 2 .jpg, 1 .edited.jpg; a sample has one"
    assert told in capsys.readouterr().err
    open_shards(str(path))
    assert capsys.readouterr().err == ""  # said once, when the index is made
    for image in (".TIF", "tif"):
        assert index_shards(str(path), image=image) == 4
        shards = open_shards(str(path))
        assert [shards.read(i) for i in range(2)] == [b"0 tif", b"1 tif"]
        assert shards.labels().tolist() == [-1, -1, 7, -1]
        (line,) = shards.unused_members()
        assert line.startswith(
            "8 further images of samples are not used: 2 .mask.png, 2 .png, 2 .jpg, 1 .edited.jpg, 1 .jfif;"
        )
    index_shards(str(path), image="edited.jpg")
    assert open_shards(str(path)).read(2) == b"2 edited.jpg"
    with pytest.raises(
        UserError, match=r"holds no image: expected members of the kind \.gif, found \.mask\.png"
    ):
        index_shards(str(path), image="gif")


def test_names_with_several_dots_are_told(tmp_path):
    """Photographs whose names differ behind the first dot are one sample, each another kind of member."""
    path = write_tar(tmp_path / "a.tar", [(f"photo.2021.{n:02d}.jpg", b"x") for n in range(40)])
    with pytest.raises(
        UserError,
        match=r"found \.2021\.00\.jpg, \.2021\.01\.jpg, .*; give each image its own name before the first dot",
    ) as caught:
        open_shards(str(path))
    assert len(str(caught.value)) < 500
    index_shards(str(path), image="2021.07.jpg")
    (line,) = open_shards(str(path)).unused_members()
    assert line.startswith("39 further images of samples are not used: 23 others, 1 .2021.00.jpg, ")


def test_damaged_notes_of_an_index_are_seen(tmp_path):
    path = write_tar(tmp_path / "a.tar", MANY)
    index_shards(str(path))
    sidecar = index_path(path)
    good = sidecar.read_bytes()
    for was, now in ((b".tif", b".tof"), (b"unused", b"unuzed"), (b'png\\": 2', b'png\\": 3')):
        assert was in good
        sidecar.write_bytes(good.replace(was, now, 1))
        with pytest.raises(UserError, match="is damaged"):
            open_shards(str(path)).labels()


ODD_FOLDERS = ["shards [v2]", "a{b,c}", "what?", "star*", "[ab]", "{1..2}", "x[!y]", "deep [1]/and [2]"]


@pytest.mark.parametrize("name", ODD_FOLDERS)
def test_folders_are_taken_literally(make_shards, tmp_path, name, monkeypatch):
    make_shards(2, 2)
    folder = tmp_path / name
    folder.parent.mkdir(exist_ok=True)
    os.rename(tmp_path / "shards", folder)
    (tmp_path / "a").mkdir(exist_ok=True)  # what the pattern [ab] would match
    monkeypatch.chdir(tmp_path)
    for where in (str(folder), name):
        expected = [f"{where}/s-00000{number}.tar" for number in range(2)]
        for pattern in ("s-*.tar", "s-{000000..000001}.tar", "s-00000[01].tar", "s-00000?.tar"):
            assert find_shards(f"{where}/{pattern}") == expected
        assert find_shards(expected) == expected
        with pytest.raises(UserError, match="no shard matches"):
            find_shards(f"{where}/t-*.tar")


@pytest.mark.parametrize("name", ["train [v2]", "a{b,c}", "x{", "[0-9]"])
def test_names_of_shards_may_hold_brackets(tmp_path, name):
    shard = pack_samples([(noise_image(0), "jpg", 0)], tmp_path / "out", prefix=name).shards[0]
    assert find_shards(f"{tmp_path}/out/{name}-*.tar") == [str(shard)]
    assert find_shards(str(shard)) == [str(shard)]
