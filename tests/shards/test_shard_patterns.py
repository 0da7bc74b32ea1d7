"""Patterns of shards: paths as users write them, and what to do where a folder of photographs was named."""

from pathlib import Path

import pytest

from glsd.errors import UserError
from glsd.shards.cache import cache_folder
from glsd.shards.find import find_shards, find_sources


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder with two empty shards, another folder with one, and a folder of photographs."""
    for name in ("home/sh/a-0.tar", "home/sh/a-1.tar", "data/b.tar", "home/photos/cat/1.JPG", "flat/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "home/empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("pattern", ["~/sh/*.tar", "$HOME/sh/a-{0..1}.tar", "${HOME}/sh/a-[01].tar"])
def test_home_and_variables_in_a_pattern(home, pattern):
    assert find_shards(pattern) == [str(home / "sh/a-0.tar"), str(home / "sh/a-1.tar")]


def test_home_and_variables_in_every_entry_of_a_list(home):
    found = find_sources(["~/sh/a-0.tar", "$DATA/*.tar", "home/sh/a-1.tar"])
    assert found == [[str(home / "sh/a-0.tar")], [str(home.parent / "data/b.tar")], ["home/sh/a-1.tar"]]


def test_home_and_variables_in_the_place_of_the_cache(home, monkeypatch):
    for value in ("~/cache", "$HOME/cache", str(home / "cache")):
        monkeypatch.setenv("GLSD_CACHE", value)
        assert cache_folder("index") == home / "cache" / "index"
    monkeypatch.setenv("GLSD_CACHE", "$NO_SUCH/cache")
    with pytest.raises(UserError, match="the environment variable NO_SUCH is not set"):
        cache_folder("index")


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [
        ("~/photos", "{home}/photos"),
        ("~/photos/", "{home}/photos/"),
        ("~/photos/*.tar", "{home}/photos"),
        ("~/photos/*/*.JPG", "{home}/photos/cat"),
        ("flat", "flat"),
        ("flat/1.png", "flat"),
    ],
)
def test_a_folder_of_photographs_is_to_be_packed_first(home, pattern, folder):
    with pytest.raises(UserError) as caught:
        find_shards(pattern)
    command = (
        f"pack its images first (glsd pack {folder.format(home=home)} shards/), then give 'shards/*.tar'"
    )
    assert command in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("~/sh", "is a folder: name its files, e.g. '{home}/sh/*.tar'"),
        ("~/empty", "is a folder: name its files"),
        ("~/empty/*.tar", "no shard matches '{home}/empty/*.tar': check the path and the range"),
        ("~/no/*.tar", "no shard matches '{home}/no/*.tar': check the path and the range"),
        ("$NO_SUCH/*.tar", "the environment variable NO_SUCH is not set"),
    ],
)
def test_another_folder_is_not(home, pattern, advice):
    with pytest.raises(UserError) as caught:
        find_shards(pattern)
    assert advice.format(home=home) in str(caught.value)
    assert "glsd pack" not in str(caught.value)
