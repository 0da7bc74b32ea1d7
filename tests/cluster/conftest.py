"""The cluster of these tests, and what becomes of them where there cannot be one."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts, slurm_cluster, slurm_jobs
from tests.helpers import uneven_run

ROOT = Path(__file__).parents[2]
# SLURM looks at time limits twice a minute. The second job is not warned: TERM is the first that it hears.
TIMED = {
    "warned": ["--time=1", "--signal=USR1@30"],
    "time_limit": ["--time=1", "--signal=CONT@1"],
    "measured": ["--time=1"],
}
# In front of SLURM's own: does not answer at first, in the ways that are seen, and squeue never.
BUSY = """#!/bin/sh
case $0-$* in
*squeue-*) exit 1 ;;
*hostnames*) ;;
*) echo >>"$0.calls" && case $(wc -l <"$0.calls") in 1) exit 1 ;; 2) exit 0 ;; 4) echo timeout >&2; exit 1 ;; esac ;;
esac
PATH=${PATH#*:} && exec scontrol "$@"
"""


# What the tests of a marker need: a function that returns why they cannot run, or nothing.
NEEDS = {"slurm": functools.cache(slurm_cluster.why_not), "multinode": hosts.why_not}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slurm: jobs on a SLURM cluster that the tests bring up; run by make test-cluster"
    )
    config.addinivalue_line(
        "markers", "multinode: hosts made of network namespaces; run by make test-cluster"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs what is not here; with GLSD_REQUIRE_CLUSTER=1 it fails instead."""
    for marker, why_not in NEEDS.items():
        if item.get_closest_marker(marker) and (why := why_not()):
            if os.environ.get("GLSD_REQUIRE_CLUSTER") == "1":
                pytest.fail(f"GLSD_REQUIRE_CLUSTER is set, but: {why}", pytrace=False)
            pytest.skip(why)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[slurm_cluster.Cluster]:
    """Two SLURM nodes that are hosts of their own."""
    made = slurm_cluster.up(tmp_path_factory.mktemp("slurm") / "state")
    yield made
    slurm_cluster.down(made)


@pytest.fixture(scope="session")
def jobs(cluster, python, tmp_path_factory) -> "slurm_jobs.Jobs":
    """Submits jobs to the cluster and waits for them."""
    return slurm_jobs.Jobs(cluster, tmp_path_factory.mktemp("jobs"), python)


@pytest.fixture(scope="session")
def stand_ins(jobs) -> dict[str, str]:
    """Jobs whose ranks only end as they are told, by name; they wait for SLURM while other tests compute."""
    plans = {
        "mistake": ("2", []),
        "bug": ("1", []),
        "killed": ("KILL 0", []),
        "stuck": ("75+ 75 75 75 0", []),
        "limited": ("75+ 75+ 0", ["GLSD_MAX_REQUEUES=1"]),
        "chained": ("75 0", ["GLSD_REQUEUE=0"]),
        "cancelled": ("wait 0", []),
        "batch_usr1": ("wait 0", []),
        "batch_term": ("wait 0", []),
        "warned": ("wait 0", []),
        "time_limit": ("wait 0", []),
        "measured": ("wait 0", []),
        "early": ("75 75 75 0", []),
        "busy": ("75+ 0", [f"PATH={jobs.folder}/programs:{os.environ['PATH']}"]),
        "inherited": ("0", ["SLURM_CPU_BIND_TYPE=mask_cpu:", "SLURM_MEM_PER_CPU=1", "SLURM_MEM_PER_NODE=2"]),
    }
    (jobs.folder / "programs").mkdir()
    for program in ("scontrol", "squeue"):
        (jobs.folder / "programs" / program).write_text(BUSY)
        (jobs.folder / "programs" / program).chmod(0o755)
    ids = {}
    for name, (words, variables) in plans.items():
        if name != "early":
            (jobs.folder / name / "checkpoints").mkdir(parents=True)
        options = [*TIMED.get(name, [])]
        export = ["ALL", f"GLSD_ROOT={ROOT}", slurm_jobs.STAND_IN, f"STAND_IN={words}", *variables]
        # The other node loses its power in a test.
        options += ["--nodelist=node1", f"--job-name={name}", f"--export={','.join(export)}"]
        script = "evaluate" if name == "measured" else "pretrain"
        ids[name] = jobs.sbatch(*options, f"{ROOT}/launch/slurm/{script}.sbatch", f"--out={name}")
    stand_in = f"--export=ALL,GLSD_ROOT={ROOT},{slurm_jobs.STAND_IN},STAND_IN=75 0"
    script = f"{ROOT}/launch/slurm/array.sbatch"
    ids["array"] = jobs.sbatch(
        "--array=1-3", "--nodelist=node1", stand_in, script, "pretrain", script, "tasks"
    )
    return ids


@pytest.fixture(scope="session")
def uneven_shards(tmp_path_factory) -> str:
    """The pattern of a few small shards of very different sizes."""
    return uneven_run.pack_uneven(tmp_path_factory.mktemp("uneven"))


def pytest_terminal_summary(terminalreporter) -> None:
    """Show how long it took until a loss was noticed and until a run went on: what the tests measured."""
    for report in terminalreporter.getreports("passed"):
        for line in report.capstdout.splitlines():
            if report.when == "call" and " after " in line and line.endswith(" s"):
                terminalreporter.write_line(f"measured: {line}")
