"""What stands in for python in these tests does as python does where they look."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import (
    Host,
    Started,
    made_hosts,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.multinode]

SCRIPT = """
import os, platform, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: None)
print(platform.node(), os.getcwd(), os.environ.get("WORD"), *sys.argv[1:], flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(75)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_it_says_and_ends_as_python_does(python, script, tmp_path):
    both = [
        subprocess.run(
            [program, "-u", str(script), "0", "a word"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "WORD": "here"},
        )
        for program in (sys.executable, python)
    ]
    assert both[0].returncode == both[1].returncode == 75
    assert (both[0].stdout, both[0].stderr) == (both[1].stdout, both[1].stderr)


def start(host: Host, line: list[str], log: Path) -> Started:
    started = host.run(line, log)
    wait_until(lambda: "h1 " in started.said(), 60, started.said)
    return started


def test_it_ends_with_its_host_or_of_a_signal_and_leaves_nothing(python, script, tmp_path):
    with made_hosts(1, tmp_path / "hosts") as hosts:
        host = hosts["h1"]
        for number in (signal.SIGTERM, signal.SIGKILL):
            started = start(host, [python, str(script), "100"], tmp_path / f"{number}.log")
            assert len(host.pids()) == 2, "what was started, and its fork"
            os.kill(started.pid, number)
            assert started.wait(10) == -number
            wait_until(lambda: not host.pids(), 10, lambda: str(host.pids()))
        started = start(host, [python, str(script), "100"], tmp_path / "host.log")
        host.kill()
        assert started.code == -signal.SIGKILL


def test_signals_around_its_end_change_no_exit_code(python, script):
    for late in (0.0, 0.1, 0.2):
        started = [subprocess.Popen([python, str(script), "0.3"], stdout=subprocess.PIPE) for _ in range(4)]
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(late)
        while any(process.poll() is None for process in started):
            for process in started:
                process.send_signal(signal.SIGUSR1)
            time.sleep(0.002)
        assert [process.wait() for process in started] == [75] * 4
        for process in started:
            process.communicate()
