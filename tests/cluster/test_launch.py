"""What the launcher announced, and the network interface that gloo is told to use."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from glsd.cluster import launch
from glsd.errors import UserError

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.232.9.2", "ib0": "10.0.0.2"}
VARIABLES = (
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"),
    launch.INTERFACE_VARIABLE,
)


@pytest.fixture
def announce(monkeypatch):
    """A function that sets what the launcher announced, and nothing else."""

    def make(**environment: str) -> None:
        for name in VARIABLES:
            monkeypatch.setenv(name, "")  # so that what is set meanwhile goes, too
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    make()
    return make


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "127.0.0.1"}])
def test_one_process_as_asked_is_fine(announce, environment):
    announce(**environment)
    launch.check_world(1, "launch/x.py")


@pytest.mark.parametrize(
    ("environment", "num_processes"),
    [
        ({"WORLD_SIZE": "2"}, 1),  # accelerate launch --multi_gpu without ACCELERATE_USE_CPU
        ({"WORLD_SIZE": "2"}, 2),  # accelerate believes in 2 but there is no process group
        # accelerate launch --cpu --num_processes 2
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, 1),
    ],
)
def test_ranks_that_run_alone_are_told_the_right_launch_line(announce, environment, num_processes):
    announce(**environment)
    line = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes .* launch/x.py"
    with pytest.raises(UserError, match=line):
        launch.check_world(num_processes, "launch/x.py")


@pytest.fixture
def host(announce, monkeypatch):
    """A function that chooses the interface on one of two hosts, which has these interfaces."""

    def choose(interfaces=INTERFACES, **environment):
        announce(**{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"} | environment)
        addresses = {
            name: [SimpleNamespace(family=socket.AF_INET, address=address)]
            for name, address in interfaces.items()
        }
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
        monkeypatch.setattr(
            psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=True) for name in interfaces}
        )
        launch.choose_interface()
        return launch.os.environ.get(launch.INTERFACE_VARIABLE)

    return choose


def test_the_interface_that_leads_to_the_main_host(host, monkeypatch):
    monkeypatch.setattr(launch, "_source_address", lambda other: {"node1": "10.0.0.2"}[other])
    assert host(MASTER_ADDR="node1") == "ib0"
    assert launch.interface_to("node1") == ("ib0", "10.0.0.2")


def test_a_name_that_stands_for_loopback_leaves_the_only_other_interface(host):
    assert host({"lo": "127.0.0.1", "eth0": "10.232.9.2"}, MASTER_ADDR="127.0.1.1") == "eth0"
    assert launch.interface_to("127.0.1.1") == ("eth0", "10.232.9.2")


def test_a_choice_that_is_the_users(host):
    with pytest.raises(UserError, match="set GLOO_SOCKET_IFNAME to one of eth0, ib0"):
        host(MASTER_ADDR="127.0.1.1")
    with pytest.raises(UserError, match="set GLOO_SOCKET_IFNAME"):
        host(MASTER_ADDR="no such host")


def test_nothing_is_chosen_where_nothing_is_needed(host):
    assert host(MASTER_ADDR="127.0.1.1", GLOO_SOCKET_IFNAME="mine") == "mine"
    assert host(MASTER_ADDR="127.0.1.1", LOCAL_WORLD_SIZE="2") is None
    assert host() is None
    assert host(MASTER_ADDR="127.0.0.1") is None  # so all ranks are here, whatever the environment lacks
    assert host(MASTER_ADDR="localhost") is None


def test_the_way_to_this_machine():
    assert launch.interface_to("127.0.0.1") == ("lo", "127.0.0.1")
    assert launch._source_address("no such host") == ""
    assert launch._resolve("127.0.0.1") == (socket.AF_INET, "127.0.0.1")
