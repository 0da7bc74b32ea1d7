"""Paths mean the same everywhere; atomic writes leave the old file or the new one; locks end with their process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from glsd.errors import UserError
from glsd.files import expand, locked, new_folder, replacing, try_lock, unlock, written


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("a/~", "a/~"),
        ("./~", "./~"),
        ("$DATA/x", "/data/x"),
        ("${DATA}/x-{000..003}.tar", "/data/x-{000..003}.tar"),
        ("x$DATA$DATA", "x/data/data"),
        ("$FAR/x", "s3://bucket/x"),
        ("$NEAR/x", "/home/me/near/x"),
        ("a$$DATA", "a$DATA"),
        ("a$1 $-", "a$1 $-"),
        ("s3://bucket/~/$DATA", "s3://bucket/~/$DATA"),
        ("timm:vit_small_patch16_224.dino", "timm:vit_small_patch16_224.dino"),
        ("", ""),
    ],
)
def test_a_path_is_expanded_as_a_shell_would(path, expected, monkeypatch):
    for name, value in {"HOME": "/home/me", "DATA": "/data", "FAR": "s3://bucket", "NEAR": "~/near"}.items():
        monkeypatch.setenv(name, value)
    assert expand(path) == expected
    if not expected.startswith("~"):
        assert expand(written(expected)) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NO_SUCH/x", "path '$NO_SUCH/x': the environment variable NO_SUCH is not set"),
        ("a/${NO_SUCH}", "the environment variable NO_SUCH is not set: set it, or write $$"),
        ("$EMPTY/x", "the environment variable EMPTY is not set"),
        ("~no_such_user/x", "path '~no_such_user/x': there is no such home folder"),
    ],
)
def test_a_path_that_names_nothing_is_one_line(path, message, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError) as caught:
        expand(path)
    assert message in str(caught.value)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_bytes(b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "deep" / "new", tmp_path / "empty"):
        with new_folder(path) as folder:
            (folder / "file").write_bytes(b"all")
            assert not path.exists() or names(path) == []
        assert names(path) == ["file"]
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "empty") as folder:
        (folder / "other").write_bytes(b"all")
    assert names(tmp_path) == ["deep", "empty"]
    assert names(tmp_path / "empty") == ["file"]


def test_a_replaced_file_has_the_mode_of_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert oct((tmp_path / "file").stat().st_mode & 0o777) == "0o640"


def test_file_and_folder_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    fsync, replace, calls = os.fsync, os.replace, []

    def noted_fsync(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr("os.fsync", noted_fsync)
    monkeypatch.setattr("os.replace", noted_replace)
    with replacing(tmp_path / "file") as file:
        file.write(b"x")
    assert calls[0].startswith("/.file.")
    assert calls[1:] == ["rename", ""]


def test_a_lock_keeps_other_threads_out(tmp_path):
    inside, most = 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most
        with locked(tmp_path / "lock"):
            with guard:
                inside += 1
                most = max(most, inside)
            with pytest.raises(TimeoutError), locked(tmp_path / "lock2", timeout=0.0):
                pass
            with guard:
                inside -= 1

    with locked(tmp_path / "lock2"):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


HOLDER = """
import os, pathlib, sys, time
from glsd.files import locked

with locked(pathlib.Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_releases_its_lock_also_while_its_children_live(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    child = int(process.stdout.readline())
    try:
        with pytest.raises(TimeoutError), locked(tmp_path / "lock", timeout=0.0):
            pass
        process.kill()
        process.wait(60)
        with locked(tmp_path / "lock", timeout=5.0):
            os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available"), locked(tmp_path / "lock"):
        pass


def test_the_lock_of_an_open_file_follows_it_when_it_is_renamed(tmp_path):
    with open(tmp_path / "part", "wb") as file:
        assert try_lock(file)
        os.rename(tmp_path / "part", tmp_path / "whole")
        with open(tmp_path / "whole", "rb") as other:
            assert not try_lock(other)
            unlock(file)
            assert try_lock(other)
