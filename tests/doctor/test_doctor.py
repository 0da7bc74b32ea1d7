"""The doctor as users run it: alone, on several ranks, and with faults that are really there."""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from glsd.cluster.launch import CPU_LAUNCH_LINE
from glsd.doctor import files, launch
from glsd.doctor import run as checks
from tests.helpers.doctor_rank import good_packages

ROOT = Path(__file__).parents[2]
DOCTOR = str(ROOT / "launch" / "doctor.py")
RANK = str(ROOT / "tests" / "helpers" / "doctor_rank.py")
OWN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
Done = subprocess.CompletedProcess


def environment(**extra: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in OWN}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra


def free_port() -> str:
    """Tests of this file may run at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(command: list[str], **extra: str) -> Done:
    return subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=300)


def lines_of(done: Done) -> dict[str, dict[str, str]]:
    """The lines of --json by name; of several with one name the worst."""
    found: dict[str, dict[str, str]] = {}
    for line in json.loads(done.stdout.splitlines()[-1])["lines"]:
        if line["name"] not in found or line["verdict"] == "FIX":
            found[line["name"]] = line
    return found


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> str:
    """A file with this environment's packages, every import taken as good."""
    path = tmp_path_factory.mktemp("facts") / "packages.json"
    path.write_text(json.dumps(good_packages()))
    return str(path)


@pytest.fixture
def ranks(python, facts):
    """A function that runs ranks of the doctor with what each does (None: it does not come) and returns how each ended.

    numbers: their RANKs; extra: of the environment of all.
    """

    def start(
        *whats: str | None, arguments: Sequence[str] = (), numbers: Sequence[int] = (), **extra: str
    ) -> list[Done]:
        announced = {"WORLD_SIZE": str(len(whats)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        running = []
        for place, what in enumerate(whats):
            number = str(numbers[place] if numbers else place)
            own = environment(**announced | {"RANK": number, "LOCAL_RANK": number} | extra)
            command = [python, RANK, facts, "0", what or "", "--json", *arguments]
            pipe = subprocess.PIPE
            running += (
                [subprocess.Popen(command, env=own, stdout=pipe, stderr=pipe, text=True)] if what else []
            )
        try:
            said = [process.communicate(timeout=150) for process in running]
        finally:
            for process in running:
                process.kill()
        return [
            Done(process.args, process.returncode, *both) for process, both in zip(running, said, strict=True)
        ]

    return start


@pytest.mark.slow
@pytest.mark.multinode
def test_alone(tmp_path, digit_shards, ranks):
    out = tmp_path / "runs" / "x"
    command = [sys.executable, DOCTOR, "--json", "--out", str(out), "--shards", f"{digit_shards}/*.tar"]
    done = run(command)
    lines = lines_of(done)
    assert done.returncode == int(any(line["verdict"] == "FIX" for line in lines.values())), done.stderr
    assert {"versions", "launch", "device", "threads", "limits", "out disk", "out write", "shards"} <= {
        *lines
    }
    assert "3 shards of 72 samples" in lines["shards"]["found"]
    assert lines["versions"]["verdict"] == "ok"
    assert not out.parent.exists()  # as before
    (missing,) = ranks("as it is", arguments=["--shards", str(tmp_path / "no-{0..3}.tar")])
    assert missing.returncode == 1
    assert "no shard matches" in lines_of(missing)["shards"]["found"]
    assert "Traceback" not in done.stderr + missing.stderr


def test_bad_arguments():
    for words in (["--wat"], ["--wait", "-3"], ["--shards"]):
        done = run([sys.executable, DOCTOR, *words])
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_without_torch_at_all(tmp_path):
    venv.create(tmp_path / "bare")
    done = run([str(tmp_path / "bare" / "bin" / "python"), DOCTOR, "--json"], PYTHONPATH="")
    assert done.returncode == 1, done.stderr
    line = lines_of(done)["packages"]
    assert "not installed for" in line["found"]
    assert "torch" in line["found"]
    assert "pip install -e ." in line["fix"]
    other = run([str(tmp_path / "bare" / "bin" / "python"), DOCTOR], PYTHONPATH="", RANK="1", WORLD_SIZE="2")
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.startswith("error: rank 1 on ")
    assert len(other.stderr.splitlines()) == 1


def fake_package(folder: Path, name: str, version: str, body: str = "") -> str:
    """Metadata of another version, and with a body the package too, in front of the installed ones."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if body:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(body)
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.mark.slow
@pytest.mark.multinode
def test_a_torchvision_that_does_not_fit_torch(tmp_path):
    body = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    path = fake_package(tmp_path / "fake", "torchvision", "0.77.0+cpu", body)
    done = run([sys.executable, DOCTOR, "--json", "--out", str(tmp_path / "out")], PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = lines_of(done)
    assert "torchvision 0.77.0+cpu" in lines["torchvision"]["found"]
    assert "operator torchvision::nms does not exist" in lines["torchvision"]["found"]
    assert "pip install --force-reinstall 'torch==" in lines["torchvision"]["fix"]
    assert "packages" not in lines  # timm is not blamed for it
    assert lines["out write"]["verdict"] == "ok"  # and the other checks went on


@pytest.mark.slow
@pytest.mark.multinode
def test_the_launcher_that_starts_one_process_of_two(facts):
    line = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    done = run(
        [
            *line,
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            RANK,
            facts,
            "0",
            "as it is",
        ]
    )
    assert done.returncode == 1
    (said,) = (row for row in done.stdout.splitlines() if row.startswith("FIX"))
    assert "accelerate was asked for several processes but started one" in said
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in said


@pytest.mark.slow
@pytest.mark.multinode
def test_two_ranks_of_the_launcher_of_which_one_has_another_numpy(tmp_path, digit_shards):
    """The README's launch line; local rank 1 is given other metadata by what the launcher starts."""
    path = fake_package(tmp_path / "fake", "numpy", "2.0.99")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"if os.environ['RANK'] == '1': os.environ['PYTHONPATH'] = {path!r}; sys.path.insert(0, {path.split(':')[0]!r})\n"
        "from glsd.doctor import packages\n"
        "packages.try_imports = lambda names: {}\n"  # takes seconds; test_alone does it
        f"sys.argv[0] = {DOCTOR!r}\n"
        f"runpy.run_path({DOCTOR!r}, run_name='__main__')\n"
    )
    words = shlex.split(CPU_LAUNCH_LINE.format(n=2, script=script))[:-1]
    command = [
        str(Path(sys.executable).parent / words[1]),
        *words[2:],
        "--json",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--shards", f"{digit_shards}/*.tar"]
    command.insert(2, f"--main_process_port={free_port()}")
    done = run(command, ACCELERATE_USE_CPU="true")
    assert done.returncode == 1, done.stderr
    lines = lines_of(done)
    assert "numpy differs" in lines["versions"]["found"]
    assert "2.0.99 on" in lines["versions"]["found"]
    assert "(rank 1)" in lines["versions"]["found"]
    others = {name: line for name, line in lines.items() if name != "versions"}
    good = {"launch", "address", "all-reduce", "shared out", "rename", "locks", "shards"}
    assert {name for name in good if others[name]["verdict"] != "ok"} <= {
        "all-reduce"
    }  # a note on a busy machine
    assert "rank 0-1  local 0-1" in done.stdout


@pytest.mark.slow
@pytest.mark.multinode
def test_three_ranks(ranks, tmp_path):
    first, *others = ranks(*["as it is"] * 3, arguments=["--out", str(tmp_path / "out")])
    lines = lines_of(first)
    assert lines["launch"]["found"] == "3 ranks on 1 host"
    assert lines["all-reduce"]["found"].startswith("right; a sum of")
    assert lines["shared out"]["found"].startswith("all 3 ranks see")
    for other in others:
        assert (other.stdout, other.returncode) == ("", first.returncode)


@pytest.mark.slow
@pytest.mark.multinode
def test_a_rank_that_never_comes(ranks, tmp_path):
    arguments = ["--wait", "3", "--out", str(tmp_path / "out")]
    done, second = ranks("waits less", "waits less", None, arguments=arguments)
    assert (done.returncode, second.returncode) == (1, 1)
    lines = lines_of(done)
    assert lines["launch"]["found"].startswith("WORLD_SIZE=3 is announced, 2 came: rank 2 missing")
    assert lines["all-reduce"]["found"].startswith("not measured")
    assert lines["shared out"]["verdict"] == "ok"  # among those that are there


@pytest.mark.slow
@pytest.mark.multinode
@pytest.mark.parametrize("what", ["hangs", "dies"])
def test_a_rank_that_hangs_or_dies_in_a_check(ranks, what):
    """The check is cut short for all, which is the tests' part; the rest goes on."""
    done, second, third = ranks("waits less", "waits less", what, arguments=[])
    assert (done.returncode, second.returncode) == (1, 1), done.stderr
    assert third.returncode == (9 if what == "dies" else 1)
    said = lines_of(done)["device"]["found"]
    assert "(rank 2): " in said
    assert said.endswith("no answer within 5 s" if what == "dies" else "not done within 2 s")
    assert lines_of(done)["cache disk"]["found"]


@pytest.mark.slow
@pytest.mark.multinode
def test_rank_0_that_dies_is_told_of_by_the_others_in_one_line(ranks):
    _, second = ranks("dies", "as it is", arguments=[])
    assert second.returncode == 1
    (said,) = second.stderr.splitlines()  # and no frames of C++
    assert said.startswith("error: rank 1 on ")
    assert "rank 0 is gone (check 'device')" in second.stderr


@pytest.mark.slow
@pytest.mark.multinode
def test_one_number_for_two_ranks(ranks):
    """Of three ranks the third came with the number of the second, as with a --machine_rank given twice."""
    ended = ranks(*["waits less"] * 3, numbers=(0, 1, 1), arguments=["--wait", "3"])
    assert [done.returncode for done in ended] == [1, 1, 1]
    assert "RANK=1 is there twice: " in ended[0].stdout
    assert "rank 2 missing" in ended[0].stdout
    assert sum("RANK=1 is there twice" in done.stderr for done in ended) == 1


@pytest.mark.slow
@pytest.mark.multinode
def test_announcements_that_make_no_sense(ranks):
    """One of them was a traceback, one was silence, one was told of as a host that cannot be reached."""
    for extra, said in (
        ({"RANK": "abc"}, "RANK is 'abc'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"RANK": "7"}, "RANK=7 is announced, but WORLD_SIZE=1"),
    ):
        (done,) = ranks("as it is", **extra)
        assert (done.returncode, done.stderr) == (1, "")
        assert said in lines_of(done)["launch"]["found"]
    # One task of many: rank 0's table does not have it.
    (task,) = ranks("as it is", RANK="7", SLURM_PROCID="7")
    assert (task.returncode, task.stdout) == (1, "")
    (said,) = task.stderr.splitlines()
    assert said.startswith("error: rank 7 on ")
    assert "ranks go from 0 to 0" in said


@pytest.mark.slow
@pytest.mark.multinode
@pytest.mark.parametrize(
    ("dead_from", "names"), [("start", ["disk", "shared out"]), ("sharing", ["out disk"])]
)
def test_a_disk_that_does_not_answer_holds_no_rank_up(tmp_path, monkeypatch, dead_from, names):
    """Every look at --out is one that can be left behind."""
    out, alive, looked = tmp_path / "out", threading.Event(), []

    def dead(function):
        def wrapped(path, *rest, **named):
            if dead_from == "start" and str(path).startswith(str(out)):
                looked.append(threading.current_thread())
                alive.wait(20.0)
            return function(path, *rest, **named)

        return wrapped

    for name in (
        "stat",
        "lstat",
        "statvfs",
        "mkdir",
        "rmdir",
        "listdir",
        "scandir",
        "unlink",
        "open",
        "replace",
    ):
        monkeypatch.setattr(os, name, dead(getattr(os, name)))
    if dead_from == "sharing":

        def dies(*given):
            nonlocal dead_from
            dead_from = "start"
            return {"seen": True, "seconds": 0.0, "why": ""}

        monkeypatch.setattr(files, "see", dies)
        monkeypatch.setattr(files, "write_speed", lambda folder: {"seconds": 1.0, "why": ""})
    monkeypatch.setattr(checks, "QUICK", 0.2)
    monkeypatch.setattr(checks, "SLACK", 0.2)
    for name in (*launch.ANNOUNCED, *launch.NUMBERS):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    try:
        code, panel, _ = checks.examine(good_packages(), shards=(), out=str(out), wait=5.0)
        assert time.monotonic() - began < 15.0
        assert code == 1
    finally:
        alive.set()
    assert looked
    assert threading.main_thread() not in looked
    assert [line.name for line in panel.lines if "not done within 0 s" in line.found] == names
