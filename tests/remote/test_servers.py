"""The servers of these tests do what the tests rely on."""

import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.remote.faulty import FaultyServer
from tests.remote.servers import nginx, s3

CONTENT = os.urandom(300_000)


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "files"
    made.mkdir()
    (made / "a.tar").write_bytes(CONTENT)
    return made


def get(url: str, part: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={part}"} if part else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status, answer.read()


def test_nginx_serves_ranges_lists_and_keeps_a_log(tmp_path, folder):
    with nginx(tmp_path / "nginx", folder=folder) as served:
        assert get(f"{served.url}/a.tar") == (200, CONTENT)
        assert get(f"{served.url}/a.tar", "1000-1999") == (206, CONTENT[1000:2000])
        assert b"a.tar" in get(f"{served.url}/")[1]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{served.url}/b.tar")
    assert [row[2:] for row in served.requests("a.tar")] == [
        ["200", "300000", "-"],
        ["206", "1000", "bytes=1000-1999"],
    ]


def test_nginx_limits_the_rate_from_the_first_byte_on(tmp_path, folder):
    with nginx(tmp_path / "nginx", folder=folder, rate=600_000) as served:
        start = time.monotonic()
        assert get(f"{served.url}/a.tar")[1] == CONTENT
        assert time.monotonic() - start > 0.35


@pytest.mark.slow
def test_s3_serves_what_the_folder_has(tmp_path, folder):
    """In its own process: s3fs takes its address from the environment."""
    body = (
        "import fsspec, sys; print(fsspec.open(sys.argv[1]).open().read() == open(sys.argv[2], 'rb').read())"
    )
    with s3(tmp_path / "s3", folder=folder) as served:
        command = [sys.executable, "-c", body, f"{served.url}/a.tar", str(folder / "a.tar")]
        environment = {**os.environ, **served.environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "True\n", done.stderr
    assert any(row[0] == "GET" for row in served.requests("shards/a.tar"))


def test_each_fault_is_what_it_says(folder):
    """A fault is met as often as planned, by whole and by partial requests; the file is served well again after it."""
    (folder / "b.tar").write_bytes(b"other")
    with FaultyServer(folder) as server:
        url = f"{server.url}/a.tar"
        assert get(url, "10-19") == (206, CONTENT[10:20])
        assert get(url, "-5") == (206, CONTENT[-5:])
        for code in (404, 500, 503):
            server.plan("a.tar", "status", status=code, times=1)
            with pytest.raises(urllib.error.HTTPError, match=str(code)):
                get(url, "10-19")
        server.plan("a.tar", "cut", after=70_000, times=2)
        for part in ("", "100-200099"):
            with pytest.raises(http.client.IncompleteRead) as cut:
                get(url, part)
            assert len(cut.value.partial) == 70_000
        server.plan("a.tar", "reset", after=70_000, times=1)
        with pytest.raises(ConnectionResetError):
            get(url)
        server.plan("a.tar", "stall", after=10, seconds=0.3, times=1)
        start = time.monotonic()
        assert get(url) == (200, CONTENT)
        assert 0.3 < time.monotonic() - start < 3
        server.plan("a.tar", "slow", rate=1_000_000, times=1)
        start = time.monotonic()
        assert get(url) == (200, CONTENT)
        assert 0.25 < time.monotonic() - start < 3
        server.plan("a.tar", "short", size=1000, times=1)
        assert get(url) == (200, CONTENT[:1000])
        server.plan("a.tar", "wrong", instead=b"other", times=1)
        assert get(url, "0-9") == (206, b"otherother")
        server.plan("a.tar", "no_range", times=1)
        assert get(url, "10-19") == (200, CONTENT)
        assert get(url) == (200, CONTENT)
    assert server.bytes_sent("a.tar") == 4 * 300_000 + 3 * 70_000 + 1000 + 10 + 5 + 10
    assert [request.part for request in server.gets("a.tar")][:2] == [(10, 20), (-5, 10**9)]


def test_a_server_that_disappears_cuts_what_is_open_and_comes_back(folder):
    with FaultyServer(folder) as server:
        url = f"{server.url}/a.tar"
        server.plan("a.tar", "stall", after=1000)
        answer = urllib.request.urlopen(url, timeout=10)
        assert answer.read(1000) == CONTENT[:1000]
        server.stop()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            answer.read()
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(url)
        server.mend()
        server.start()
        assert get(url) == (200, CONTENT)
