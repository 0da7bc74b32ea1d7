"""Which network card gloo is told to use."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from glsd.cluster import interface
from glsd.errors import UserError

CARDS = {"lo": "127.0.0.1", "eth0": "10.232.9.2", "ib0": "10.0.0.2"}


@pytest.fixture
def host(monkeypatch):
    """A host with cards of ours, one of two in a run."""

    def make(cards=CARDS, **environment):
        mine = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"} | environment
        monkeypatch.setattr(interface, "os", SimpleNamespace(environ=mine))
        addresses = {
            name: [SimpleNamespace(family=socket.AF_INET, address=address)] for name, address in cards.items()
        }
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
        monkeypatch.setattr(
            psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=True) for name in cards}
        )
        interface.choose_interface()
        return mine.get(interface.VARIABLE)

    return make


def test_the_card_that_leads_to_the_main_host(host, monkeypatch):
    monkeypatch.setattr(interface, "_own_address", lambda other: {"node1": "10.0.0.2"}[other])
    assert host(MASTER_ADDR="node1") == "ib0"


def test_a_name_that_stands_for_loopback_leaves_the_only_other_card(host):
    assert host({"lo": "127.0.0.1", "eth0": "10.232.9.2"}, MASTER_ADDR="127.0.1.1") == "eth0"


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


def test_the_own_address_on_this_machine():
    assert interface._own_address("127.0.0.1") == "127.0.0.1"
    assert interface._own_address("no such host") == ""
    assert interface._resolved("127.0.0.1") == (socket.AF_INET, "127.0.0.1")
