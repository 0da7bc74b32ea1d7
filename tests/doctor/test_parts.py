"""What the doctor concludes from the facts of all ranks, and its parts that need no other process."""

import ast
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glsd.doctor import clock, devices, files, launch, network, packages
from glsd.doctor.line import Line, ranges, summary, table, who
from glsd.doctor.panel import Answer, bounded

ROOT = Path(__file__).parents[2]
HOSTS = {0: "h1", 1: "h1", 2: "h2", 3: "h2"}


def verdicts(lines: list[Line]) -> dict[str, str]:
    return {line.name: line.verdict for line in lines}


def the(lines: list[Line], name: str) -> Line:
    (line,) = (line for line in lines if line.name == name)
    return line


def test_lines_are_one_line_each_and_say_what_to_do():
    lines = [Line("ok", "a", "fine"), Line("FIX", "longer", "bad\n\x1b[31mthing", "do it")]
    assert table(lines) == ["ok    a       fine", "FIX   longer  bad  [31mthing -> do it"]
    assert summary(lines).startswith("1 ok, 0 to note, 1 to fix")
    with pytest.raises(ValueError):
        Line("FIX", "a", "no word of what to do")
    assert ranges([5, 0, 1, 2, 9]) == "0-2, 5, 9"
    assert who([0, 1, 3, 7], HOSTS) == "h1 (ranks 0-1), h2 (rank 3), rank 7"
    assert who(range(9), {r: f"h{r}" for r in range(9)}).endswith("h3 (rank 3) and 5 more")


# Packages.


@pytest.mark.parametrize("file", ["cli/doctor.py", "doctor/packages.py", "doctor/line.py", "errors.py"])
def test_what_looks_at_packages_runs_in_an_old_python_without_any(file):
    tree = ast.parse((ROOT / "glsd" / file).read_text(), feature_version=(3, 8))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module for node in top if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    others = {name for name in names if name and name.split(".")[0] not in sys.stdlib_module_names}
    assert others <= {"glsd.doctor", "glsd.doctor.line", "glsd.errors"}
    assert "__future__" in names  # annotations such as list[int] are not evaluated


def packages_of(**changes) -> dict:
    needed = packages.requirements(ROOT / "pyproject.toml")
    versions = dict.fromkeys(needed, "9999.0") | {"torch": "2.9.1", "torchvision": "0.24.1"}
    facts: dict = {"python": "3.12.1", "executable": "/py", "code": "/glsd (1)", "needed": needed}
    return facts | {"versions": versions, "pins": {}, "errors": {}} | changes


def test_packages_of_all_ranks_are_compared():
    assert verdicts(packages.judge({0: packages_of(), 2: packages_of()}, HOSTS)) == {"versions": "ok"}
    other = packages_of()["versions"] | {"numpy": "9998.0"}
    ranks = {0: packages_of(), 1: packages_of(), 2: packages_of(versions=other)}
    line = the(packages.judge(ranks, HOSTS), "versions")
    assert line.found == "numpy differs: 9999.0 on h1 (ranks 0-1); 9998.0 on h2 (rank 2)"
    assert line.fix == "pip install 'numpy==9999.0' on the other ranks"
    ranks = {0: packages_of(), 2: packages_of(code="/glsd (2)")}
    assert the(packages.judge(ranks, HOSTS), "code").verdict == "FIX"


@pytest.mark.parametrize(
    ("changes", "name", "said", "fix"),
    [
        ({"python": "3.10.4", "versions": {}}, "python", "3.10.4 (/py) is too old", "Python 3.11 to 3.13"),
        ({"errors": {"cv2": "ImportError: libGL"}}, "packages", "cannot import cv2", "--no-deps cv2"),
        (
            {"errors": {"torchvision": "x torchvision::nms does not exist", "timm": "the same"}},
            "torchvision",
            "torchvision::nms does not exist",
            "pip install --force-reinstall 'torch==2.9.1' torchvision",
        ),
        ({"pins": {"torchvision": "==2.9.0"}}, "torchvision", "needs torch ==2.9.0", "torch==2.9.1"),
    ],
)
def test_one_rank_with_broken_packages(changes, name, said, fix):
    (line,) = packages.judge({0: packages_of(**changes)}, {})
    assert (line.verdict, line.name) == ("FIX", name)
    assert said in line.found
    assert fix in line.fix


def test_versions_that_are_old_or_of_different_builds():
    versions = packages_of()["versions"] | {"torch": "2.8.0", "timm": "1.0.9"}
    (line,) = packages.judge({0: packages_of(versions=versions)}, {})
    assert "torch 2.8.0, timm 1.0.9" in line.found
    versions = packages_of()["versions"] | {"torch": "2.10.0+cpu"}
    lines = packages.judge({0: packages_of(versions=versions)}, {})
    assert verdicts(lines) == {"versions": "ok", "torchvision": "note"}


# Ranks and devices.


def place(rank: int, **changes) -> dict:
    host = HOSTS[rank]
    facts = {"host": host, "machine": host, "pid": 100 + rank, "local_rank": rank % 2, "master": "10.0.0.1"}
    facts |= {"master_resolved": "10.0.0.1", "own_name_resolved": f"10.0.0.{1 + rank // 2}"}
    facts |= {"address": f"10.0.0.{1 + rank // 2}", "interface": "eth0", "interfaces": ["eth0", "lo"]}
    return facts | {"named": {}} | changes


@pytest.mark.parametrize(
    ("announced", "said"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "tcp://10.0.0.9:80"}, ""),
        ({"RANK": "0", "MASTER_PORT": "tcp://10.0.0.9:80"}, ""),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "00"}, "WORLD_SIZE is '00'"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, "RANK is 'abc'"),
        ({"RANK": "-1", "LOCAL_RANK": "\u00b2"}, "RANK is '-1', LOCAL_RANK is '\u00b2': expected the number"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks"),
        ({"RANK": "1"}, "RANK=1 is announced, but no WORLD_SIZE"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 is announced, but WORLD_SIZE=1: ranks go from 0 to 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is announced, but WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}, "not MASTER_ADDR, MASTER_PORT"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "h1", "MASTER_PORT": "70000"},
            "MASTER_PORT is '70000'",
        ),
    ],
)
def test_launch_lines_that_fail_silently(monkeypatch, announced, said):
    for name in (*launch.ANNOUNCED, *launch.NUMBERS, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in announced.items():
        monkeypatch.setenv(name, value)
    lines = launch.silent_mistakes()
    assert [line.verdict for line in lines] == (["FIX"] if said else [])
    assert said in "".join(line.found for line in lines)
    # What is looked at all the same, on this host only, can do with any of them.
    assert verdicts(launch.judge({0: launch.facts()}, 1, {})) == {"launch": "ok"}
    devices.facts()


def test_ranks_are_waited_for_longer_than_packages_may_take():
    assert packages.ARRIVE_SECONDS > packages.IMPORT_SECONDS


def test_the_map_of_ranks_and_what_can_be_wrong_with_it():
    found = {rank: place(rank) for rank in HOSTS}
    assert launch.host_names(found) == HOSTS
    assert set(verdicts(launch.judge(found, 4, HOSTS)).values()) == {"ok"}
    lines = launch.rank_map(found, dict.fromkeys(HOSTS, "CPU"))
    assert lines[1] == "h2  10.0.0.2 (eth0)  rank 2-3  local 0-1  pid 102, 103  CPU"
    three = {rank: found[rank] for rank in (0, 1, 2)}
    assert "WORLD_SIZE=4 is announced, 3 came: h2 (rank 3) missing" in launch.judge(three, 4, HOSTS)[0].found
    assert launch.judge(three, 3, HOSTS)[0].verdict == "note"  # two on one host, one on the other
    same = found | {3: place(3, local_rank=0)}
    assert "the same LOCAL_RANK" in launch.judge(same, 4, HOSTS)[0].found
    named = found | {2: place(2, named={"NCCL_SOCKET_IFNAME": "ib0"})}
    line = the(launch.judge(named, 4, HOSTS), "interface")
    assert "NCCL_SOCKET_IFNAME=ib0 names no interface of h2 (rank 2) (there: eth0)" in line.found


def test_hosts_of_one_name_are_told_apart():
    found = {rank: place(rank, host="node") for rank in (0, 2)} | {2: place(2, host="node", machine="other")}
    names = launch.host_names(found)
    assert names == {0: "node@10.0.0.1", 2: "node@10.0.0.2"}
    assert the(launch.judge(found, 2, names), "hostnames").verdict == "note"


@pytest.mark.parametrize(
    ("value", "there"),
    [("eth", True), ("=eth", False), ("=eth0", True), ("ib,eth", True), ("^eth", False), ("^ib", True)],
)
def test_names_of_interfaces(value, there):
    assert launch.matches(value, ["eth0", "lo"]) is there


def device(cuda: dict | None = None, **changes) -> dict:
    none = {"files": 0, "build": "12.8", "hip": "", "count": 0, "why_not": ""}
    facts: dict = {
        "cuda": none | (cuda or {}),
        "visible": None,
        "cores": 16,
        "threads": 2,
        "open_files": 65536,
    }
    facts |= {"processes": -1, "memory": 64e9, "shm": 32e9, "infiniband": False, "locked_memory": -1}
    return facts | changes


def gpu(uuid: str, **changes) -> dict:
    facts = {"files": 2, "count": 2, "name": "H100", "memory": 80 << 30, "taken": 0, "capability": [9, 0]}
    return device(facts | {"bf16": True, "uuid": uuid} | changes)


@pytest.mark.parametrize(
    ("found", "verdict", "said"),
    [
        ({0: device(), 2: device()}, "ok", "there is no GPU"),
        ({0: gpu("a"), 1: gpu("b"), 2: gpu("a")}, "ok", "3 x H100, 80 GiB, capability 9.0"),
        ({0: gpu("a"), 1: gpu("a")}, "FIX", "h1 (ranks 0-1) share a GPU"),
        ({0: gpu("a"), 2: gpu("a", name="A100")}, "note", "different GPUs"),
        ({0: gpu("a", taken=40 << 30)}, "note", "in use already"),
        ({0: gpu("a"), 2: device()}, "FIX", "no GPU here, other ranks have one: h2 (rank 2)"),
        ({0: device({"files": 1, "build": ""})}, "FIX", "this torch is built for CPUs"),
        ({0: device({"files": 1, "why_not": "driver too old"})}, "FIX", "cannot use it: driver too old"),
        ({0: device({"files": 1}, visible="")}, "note", "CUDA_VISIBLE_DEVICES='' hides the GPUs"),
    ],
)
def test_devices(found, verdict, said):
    lines = [line for line in devices.judge(found, HOSTS) if line.name == "device"]
    assert any(line.verdict == verdict and said in line.found for line in lines), lines


def test_more_ranks_than_gpus():
    without_name = device({"files": 1, "count": 1})
    (line,) = (x for x in devices.judge({0: gpu("a", count=1), 1: without_name}, HOSTS) if x.name == "device")
    assert "h1 (rank 1): more ranks than GPUs (1) there" in line.found


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "said"),
    [
        ({"threads": 16}, "threads", "note", "32 threads of 2 ranks for 16 cores on h1"),
        ({"open_files": 256}, "limits", "FIX", "256 open files on h1 (ranks 0-1)"),
        ({"open_files": 1024}, "limits", "note", "1024 open files"),
        ({"shm": 64e6}, "limits", "FIX", "/dev/shm has 32 MB free per rank"),
        ({"memory": 4e9}, "limits", "note", "2.0 GB of memory per rank"),
        (
            {"infiniband": True, "locked_memory": 65536},
            "limits",
            "note",
            "65536 bytes of memory may be locked",
        ),
    ],
)
def test_limits(changes, name, verdict, said):
    found = {0: device(**changes), 1: device(**changes), 2: device()}
    line = the(devices.judge(found, HOSTS), name)
    assert line.verdict == verdict
    assert said in line.found


def test_this_machine_s_facts_can_be_judged():
    line = the(devices.judge({0: devices.facts()}, {}), "threads")
    assert "cores" in line.found
    (line,) = launch.judge({0: launch.facts()}, 1, {})
    assert line.verdict == "ok"


# Network and clocks.


@pytest.mark.parametrize("number", range(9))
def test_rounds_have_each_pair_once_and_nobody_twice_at_a_time(number):
    plan = network.rounds(range(number))
    pairs = Counter(pair for pairs in plan for pair in pairs)
    assert set(pairs) == {(a, b) for a in range(number) for b in range(a + 1, number)}
    assert set(pairs.values()) <= {1}
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in plan)
    assert len(plan) <= number


@pytest.mark.parametrize("number", [3, 4, 64])
def test_a_slow_host_is_named_whatever_the_number_of_hosts(number):
    hosts = {rank: f"h{rank}" for rank in range(number)}
    speeds = {(a, b): 1e9 for a in hosts for b in hosts if a != b}
    assert network.judge_links(speeds, hosts, 1, 1).verdict == "ok"
    slow = {pair: speed / (4 if 2 in pair else 1) for pair, speed in speeds.items()}
    line = network.judge_links(slow, hosts, 1, 1)
    assert line.verdict == "FIX"
    assert "of h2 (ethtool" in line.fix
    # A link that other work slowed a little does not hide which host all the slow ones share.
    bad = {pair: speed / (100 if 2 in pair else 1) for pair, speed in speeds.items()} | {
        (0, 1): speeds[0, 1] / 4
    }
    line = network.judge_links(bad, hosts, 1, 1)
    assert "of h2 (ethtool" in line.fix
    one = network.judge_links(speeds | {(0, 1): 1e8}, hosts, 1, 2)
    assert "h0 to h1 100.0 MB/s" in one.found
    assert "1 of 2 rounds" in one.found


def test_a_wrong_sum_is_said():
    here = {"right": True, "bytes": 10**6, "seconds": 1e-3, "latency": 1e-4, "links": [], "rounds": [0, 0]}
    (line,) = network.judge({0: here, 1: here}, HOSTS)
    assert line.verdict == "ok"
    assert "(1,000 MB/s)" in line.found
    (line,) = network.judge({0: here, 1: here | {"right": False}}, HOSTS)
    assert (line.verdict, line.found) == ("FIX", "a wrong sum on rank 1")
    (line,) = network.judge({0: here | {"seconds": 1.0}}, HOSTS)
    assert line.verdict == "note"


def test_the_clock_that_is_off_is_named():
    hosts = {0: "h1", 1: "h2", 2: "h3"}
    assert clock.judge({1: 0.01, 2: -0.9}, hosts).verdict == "ok"
    line = clock.judge({1: -7.0, 2: 0.1}, hosts)
    assert (line.verdict, line.found) == ("note", "h2 is 7.0 s behind the other hosts")
    line = clock.judge({1: 100.0, 2: 100.0}, hosts)
    assert (line.verdict, line.found) == ("FIX", "h1 is 100.0 s behind the other hosts")


# Files, and ranks that do not answer.


@pytest.mark.slow
def test_a_file_that_is_not_replaced_at_once_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RENAME_SECONDS", 1.0)
    folder = Path(files.prepare(tmp_path, "token")["folder"])
    assert files.see(folder, "token", 1)["seen"]
    assert files.seen_back(folder, "token", [0, 1]) == []

    def both() -> list[Line]:
        with ThreadPoolExecutor(2) as pool:
            found = dict(enumerate(pool.map(lambda rank: files.turns(folder, rank), (0, 1))))
        return files.judge_turns(found, HOSTS)

    assert verdicts(both()) == {"rename": "ok", "locks": "ok"}

    def in_place(path, text):
        path.write_text("")
        time.sleep(0.05)  # a disk takes some time between the two
        path.write_text(text)

    for left in ("held", "turn"):
        (folder / left).unlink()
    monkeypatch.setattr(files, "replace", in_place)
    line = the(both(), "rename")
    assert line.verdict == "FIX"
    assert "half-written" in line.found


def test_a_folder_that_is_not_shared_is_said_within_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SEE_SECONDS", 0.2)
    seen = {0: {"seen": True, "seconds": 0.0, "why": ""}, 2: files.see(tmp_path / "no", "token", 2)}
    (line,) = files.judge_sharing(seen, [], "/runs", HOSTS)
    assert "h2 (rank 2) cannot see what rank 0 writes to /runs (No such file or directory)" in line.found
    folder = Path(files.prepare(tmp_path, "token")["folder"])
    assert files.seen_back(folder, "token", [0, 2]) == [2]
    back = {rank: {"seen": True, "seconds": 0.0, "why": ""} for rank in (0, 2)}
    (line,) = files.judge_sharing(back, [2], "/runs", HOSTS)
    assert "rank 0 does not see what h2 (rank 2) writes" in line.found


def test_room_on_disks(tmp_path):
    there = files.disk(tmp_path / "not" / "yet")
    assert there["writable"]
    disks = {0: {"out": there | {"free": 100e9, "inodes": 10**6}}}
    assert verdicts(files.judge_disks(disks, {})) == {"out disk": "ok"}
    for changes, verdict in (({"free": 5e9}, "note"), ({"free": 1e9}, "FIX"), ({"inodes": 3}, "FIX")):
        changed = {0: disks[0], 2: {"out": disks[0]["out"] | changes}}
        line = the(files.judge_disks(changed, HOSTS), "out disk")
        assert line.verdict == verdict
        assert "h2 (rank 2)" in line.found


def test_what_the_doctor_made_goes_and_nothing_else(tmp_path):
    ours = files.prepare(tmp_path / "runs" / "x", "token")
    (tmp_path / "runs" / "other").touch()
    files.clean(ours["made"])
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "other"]


def test_a_user_without_a_home_is_told_of_the_cache(tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("GLSD_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    found = files.disks(str(tmp_path))
    lines = files.judge_disks({0: found, 2: found | {"cache": found["out"]}}, HOSTS)
    (line,) = (line for line in lines if line.name == "cache disk" and line.verdict == "FIX")
    assert "this user is unknown to the system on h1 (rank 0)" in line.found
    assert "set GLSD_CACHE" in line.fix
    monkeypatch.setenv("GLSD_CACHE", str(tmp_path))
    assert files.disks("")["cache"]["folder"] == str(tmp_path)


def test_work_that_hangs_or_fails_is_an_answer():
    assert bounded(lambda: {"a": 1}, 5.0) == Answer(value={"a": 1})
    free = threading.Event()
    try:
        assert bounded(free.wait, 0.1).error == "not done within 0 s"
    finally:
        free.set()
    assert "No such file" in bounded(lambda: Path("/no/such").read_text(), 5.0).error
    with pytest.raises(KeyError):
        bounded(lambda: HOSTS[-1], 5.0)
