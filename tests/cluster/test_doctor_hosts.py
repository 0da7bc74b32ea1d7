"""The doctor on hosts of their own: what is wrong between them is found, and whose fault it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import (
    Host,
    Hosts,
    Started,
    made_hosts,
    wait_until,
)
from tests.helpers.doctor_rank import good_packages
from tests.helpers.uneven_run import pack_uneven

ROOT = Path(__file__).parents[2]
DOCTOR, RANK = str(ROOT / "launch" / "doctor.py"), str(ROOT / "tests" / "helpers" / "doctor_rank.py")
PORT = "29741"
pytestmark = [pytest.mark.slow, pytest.mark.multinode]


def start(
    hosts: Hosts, folder: Path, *arguments: str, impatient: bool = True, **changed: dict[str, str]
) -> dict[str, Started]:
    """Start the doctor with a rank on each host, as a scheduler does; ``changed``: of the environment, by host.

    impatient: with short bounds, and packages that are taken as good.
    """
    facts, started = folder / "packages.json", {}
    facts.write_text(json.dumps(good_packages()))
    script = [RANK, str(facts), "0", "impatient"] if impatient else [DOCTOR]
    world = len(list(hosts))
    for rank, host in enumerate(hosts):
        announced = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        env = {name: str(number) for name, number in announced.items()}
        env |= {"MASTER_ADDR": "h1", "MASTER_PORT": PORT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *script, "--json", "--wait", "60", *arguments]
        started[host.name] = host.run(command, folder / f"{host.name}.log", env | changed.get(host.name, {}))
    return started


def lines_of(run: Started, name: str) -> list[dict[str, str]]:
    said = [line for line in run.said().splitlines() if line.startswith('{"lines"')]
    assert said, run.said()
    return [line for line in json.loads(said[0])["lines"] if line["name"] == name]


def inside(host: Host, kind: str, *command: str) -> subprocess.CompletedProcess:
    """Run a command in one namespace of a host."""
    space = f"--{kind}=/proc/{host.first.pid}/ns/{ {'mount': 'mnt', 'net': 'net'}[kind] }"
    return subprocess.run(["nsenter", space, *command], capture_output=True, text=True)


def test_two_hosts_are_well(tmp_path):
    with made_hosts(2, tmp_path / "hosts") as hosts:
        shards = pack_uneven(tmp_path / "shards")
        words = ["--out", str(tmp_path / "runs"), "--shards", shards]
        runs = start(hosts, tmp_path, *words, impatient=False)
        codes = {name: run.wait(150) for name, run in runs.items()}
    first = runs["h1"]
    assert codes == {"h1": 0, "h2": 0}, first.said()
    assert "h2  10.232.5.2 (eth0)  rank 1  local 0  pid " in first.said()
    for name in ("launch", "address", "links", "clock", "shared out", "rename", "locks", "shards"):
        assert [line["verdict"] for line in lines_of(first, name)] == ["ok"], first.said()
    assert "all 2 ranks see" in lines_of(first, "shared out")[0]["found"]
    assert '"lines"' not in runs["h2"].said()
    assert not (tmp_path / "runs").exists()


def test_a_slow_link_and_folders_that_only_some_hosts_see(tmp_path):
    shards = pack_uneven(tmp_path / "shards")
    (tmp_path / "runs").mkdir()
    with made_hosts(3, tmp_path / "hosts") as hosts:
        bucket = "tc qdisc add dev eth0 root tbf rate 80mbit burst 64k latency 100ms"
        slowed = inside(hosts["h2"], "net", *bucket.split())
        for folder in ("runs", "shards"):
            hidden = inside(hosts["h3"], "mount", "mount", "-t", "tmpfs", "none", str(tmp_path / folder))
            assert hidden.returncode == 0, hidden.stderr
        runs = start(hosts, tmp_path, "--out", str(tmp_path / "runs"), "--shards", shards)
        codes = {name: run.wait(200) for name, run in runs.items()}
    first = runs["h1"]
    assert codes == {"h1": 1, "h2": 1, "h3": 1}, first.said()
    (sharing,) = lines_of(first, "shared out")
    assert sharing["found"].startswith("h3 (rank 2) cannot see what rank 0 writes")
    (data,) = lines_of(first, "shards")
    assert data["verdict"] == "FIX"
    assert data["found"].startswith("h3 (rank 2): no shard matches")
    if slowed.returncode:
        assert os.environ.get("GLSD_REQUIRE_CLUSTER") != "1", f"no slow link: {slowed.stderr.strip()}"
        pytest.skip(f"all but the slow link: this kernel cannot make one ({slowed.stderr.strip()})")
    (links,) = lines_of(first, "links")
    assert links["verdict"] == "FIX"
    assert "h2 to h1" in links["found"]
    assert "h2 to h3" in links["found"]
    assert "h1 to h3" not in links["found"]
    assert "of h2 (ethtool" in links["fix"]


def test_an_interface_that_one_host_has_not(tmp_path):
    with made_hosts(2, tmp_path / "hosts") as hosts:
        runs = start(hosts, tmp_path, h2={"GLOO_SOCKET_IFNAME": "ib0"})
        codes = {name: run.wait(200) for name, run in runs.items()}
    assert codes == {"h1": 1, "h2": 1}
    (line,) = lines_of(runs["h1"], "interface")
    assert "GLOO_SOCKET_IFNAME=ib0 names no interface of h2 (rank 1) (there: eth0)" in line["found"]
    assert any("h2 (rank 1): " in line["found"] for line in lines_of(runs["h1"], "all-reduce"))


def test_a_host_that_is_cut_off_while_the_doctor_looks(tmp_path):
    """Both sides end with one line, within the bounds of the check."""
    out = tmp_path / "runs"
    with made_hosts(2, tmp_path / "hosts") as hosts:
        runs = start(hosts, tmp_path, "--out", str(out))
        # The doctor's folder is there: both have arrived, and rank 1 is about to look for it.
        wait_until(lambda: any(out.glob(".doctor-*")), 100, lambda: f"files: {runs['h1'].said()}")
        hosts["h2"].cut()
        codes = {name: run.wait(200) for name, run in runs.items()}
    assert codes == {"h1": 1, "h2": 1}
    assert "h2 (rank 1): no answer within 13 s -> check whether" in runs["h1"].said()
    assert "error: rank 1 on h2: rank 0 is gone" in runs["h2"].said()
    assert "Traceback" not in runs["h1"].said() + runs["h2"].said()
