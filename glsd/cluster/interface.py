"""Which network card leads to the other hosts."""

import os
import socket

import psutil

from glsd.errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"
NOWHERE = ("127.0.0.1", "::1")  # where no other host can come to


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, where several hosts work together and it is not set, to the card that leads to MASTER_ADDR.

    gloo would take the address that the host's own name stands for, which Debian and Ubuntu make 127.0.1.1: no other host
    finds it there, and some ranks wait for ever. Raises UserError, with the names to choose from, if it cannot be told.
    """
    environment = os.environ
    several_hosts = int(environment.get("WORLD_SIZE", "1")) > int(environment.get("LOCAL_WORLD_SIZE", "1"))
    master = environment.get("MASTER_ADDR")
    if VARIABLE in environment or not several_hosts or not master or _resolved(master)[1] in NOWHERE:
        return
    found = {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    names = sorted(
        name for name, stats in psutil.net_if_stats().items() if stats.isup and not _is_loopback(name)
    )
    name = found.get(_own_address(master), "")
    if name not in names:  # MASTER_ADDR is this host by a name that leads nowhere else
        if len(names) != 1:
            raise UserError(
                f"MASTER_ADDR {master} does not tell which network card leads to the other hosts: set {VARIABLE} to one of "
                f"{', '.join(names) or 'the cards (none is up)'}"
            )
        name = names[0]
    environment[VARIABLE] = name


def _own_address(other: str) -> str:
    """Return the address that packets to another host would come from; nothing is sent."""
    family, address = _resolved(other)
    if not address:  # an empty one would mean any address
        return ""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((address, 1))
            return str(asking.getsockname()[0])
    except OSError:
        return ""


def _resolved(host: str) -> tuple[int, str]:
    """Return family and address of a host, of a name that has none one that leads nowhere."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    except OSError:
        return socket.AF_INET, ""
    return family, str(address[0])


def _is_loopback(name: str) -> bool:
    return any(
        address.family == socket.AF_INET and address.address.startswith("127.")
        for address in psutil.net_if_addrs().get(name, [])
    )
