"""Network namespaces that tests make do not outlive them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.spaces import ip

# Makes a namespace in which a process runs that nobody waits for, says so and is killed.
KILLED = """
import os, signal, subprocess, sys
from spaces import find, ip, undertaker
space = sys.argv[1]
undertaker("no-bridge", [space])
ip("netns", "add", space)
subprocess.Popen([find("ip"), "netns", "exec", space, "sleep", "600"], start_new_session=True)
while not ip("netns", "pids", space).stdout.strip(): pass
print("made", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slurm
def test_a_killed_process_takes_its_namespaces_along():
    space = f"glsd-killed-{os.getpid()}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, space], stdout=subprocess.PIPE, text=True, env=env, timeout=30
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "made\n")
    deadline = time.monotonic() + 10
    while space in ip("netns", "list").stdout:
        assert time.monotonic() < deadline, f"{space} has {ip('netns', 'pids', space).stdout.split()}"
        time.sleep(0.02)
