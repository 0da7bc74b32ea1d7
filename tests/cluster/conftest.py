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
sys.path.insert(0, str(ROOT / "launch" / "slurm"))
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
def uneven_shards(tmp_path_factory) -> str:
    """The pattern of a few small shards of very different sizes."""
    return tiny_run.pack_uneven(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts ranks on hosts within a second."""
    made = Forks()
    yield made
    made.end()
