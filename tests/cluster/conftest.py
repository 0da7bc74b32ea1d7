"""The cluster of these tests, and what becomes of them where there cannot be one."""

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import slurm_cluster
import tiny_run
from forks import Forks

ROOT = Path(__file__).parents[2]
# SLURM looks at time limits twice a minute. The second job is not warned: TERM is the first that it hears.
TIMED = {"warned": ["--time=1", "--signal=USR1@30"], "time_limit": ["--time=1", "--signal=CONT@1"]}
sys.path.insert(0, str(ROOT / "launch" / "slurm"))  # for submit.py
import slurm_jobs  # noqa: E402

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
def jobs(cluster, tmp_path_factory) -> "slurm_jobs.Jobs":
    """Submits jobs to the cluster and waits for them."""
    return slurm_jobs.Jobs(cluster, tmp_path_factory.mktemp("jobs"))


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
    }
    ids = {}
    for name, (words, variables) in plans.items():
        (jobs.folder / name / "checkpoints").mkdir(parents=True)
        options = [*TIMED.get(name, [])]
        export = ["ALL", f"GLSD_ROOT={ROOT}", slurm_jobs.STAND_IN, f"STAND_IN={words}", *variables]
        # The other node loses its power in a test.
        options += ["--nodelist=node1", f"--job-name={name}", f"--export={','.join(export)}"]
        ids[name] = jobs.sbatch(*options, f"{ROOT}/launch/slurm/pretrain.sbatch", f"--out={name}")
    return ids


@pytest.fixture(scope="session")
def uneven_shards(tmp_path_factory) -> str:
    """The pattern of a few small shards of very different sizes."""
    return tiny_run.pack_uneven(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts ranks on hosts within a second."""
    made = Forks()
    yield made
    made.end()
