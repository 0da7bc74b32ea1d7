"""The doctor where the system itself is at fault: disks, clocks and users that only root can make."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.hosts import why_not
from tests.helpers.doctor_rank import good_packages

ROOT = Path(__file__).parents[2]
RANK = str(ROOT / "tests" / "helpers" / "doctor_rank.py")
PORT, NOBODY = "29747", "54321"  # a user that no list of the system has
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multinode,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "fine"),
]


@pytest.fixture
def folder():
    """A folder that every user may enter, with the facts of packages that are taken as good."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        (Path(path) / "packages.json").write_text(json.dumps(good_packages()))
        yield Path(path)


def start(
    folder: Path,
    *arguments: str,
    inside: tuple[str, ...] = (),
    ahead: str = "0",
    announced: dict[str, str] | None = None,
) -> subprocess.Popen:
    command = [*inside, sys.executable, RANK, str(folder / "packages.json"), ahead, "impatient", "--json"]
    known = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    own = known | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    own |= announced or {}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], env=own, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen) -> tuple[dict[str, dict[str, str]], str]:
    """The lines to be fixed by name, and what was said on stderr; exit code 1, and no traceback."""
    try:
        said, complaints = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 1, complaints
    assert "Traceback" not in complaints
    lines = json.loads(said.splitlines()[-1])["lines"] if said else []
    return {line["name"]: line for line in lines if line["verdict"] == "FIX"}, complaints


def test_a_rank_with_a_clock_and_a_disk_of_its_own(folder):
    """Rank 1 is on a host of another name, whose clock is ahead and that has something else where --out is."""
    out = folder / "out"
    out.mkdir()
    script = f'hostname other; mount -t tmpfs none {out}; exec "$@"'
    inside = ("unshare", "--uts", "--mount", "sh", "-c", script, "sh")
    announced = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "LOCAL_RANK": "0"}
    first = start(folder, "--out", str(out), announced=announced | {"RANK": "0"})
    second = start(folder, "--out", str(out), inside=inside, ahead="90", announced=announced | {"RANK": "1"})
    wrong, _ = ended(first)
    ended(second)
    assert "90.0 s" in wrong["clock"]["found"]
    assert "other (rank 1) cannot see what rank 0 writes" in wrong["shared out"]["found"]
    assert "rename" not in wrong
    assert list(out.iterdir()) == []


def test_a_full_disk(folder):
    out = folder / "out"
    out.mkdir()
    script = f'mount -t tmpfs -o size=16m none {out}; exec "$@"'
    inside = ("unshare", "--mount", "sh", "-c", script, "sh")
    wrong, _ = ended(start(folder, "--out", str(out), inside=inside))
    assert wrong["out write"]["found"] == "64 MB cannot be written: No space left on device"
    assert "out disk" in wrong


def test_a_user_that_the_system_does_not_know(folder):
    """It has no home, and --out is where it may not even look."""
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    inside = ("setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups")
    wrong, _ = ended(start(folder, "--out", str(closed / "x"), inside=inside))
    assert "this user is unknown to the system" in wrong["cache disk"]["found"]
    assert "set GLSD_CACHE" in wrong["cache disk"]["fix"]
    assert "cannot be written" in wrong["out disk"]["found"]
    assert "Permission denied" in wrong["shared out"]["found"]
