"""The node's own network: a namespace with one wire to the host, and addresses that nobody else on the machine uses.

A node of its own keeps kube-proxy's rules, the kubelet's ports and pod interfaces out of the host and apart from other
clusters. Everything is gone with the namespace.
"""

import json
import socket
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from .build import locked, run
from .places import RUN_ROOT, ClusterError, Places

SLOTS = range(100, 200)  # a cluster gets one 10.<slot>.0.0/16


@dataclass(frozen=True)
class Addresses:
    """The parts of a cluster's block."""

    slot: int

    @property
    def host(self) -> str:
        """The host as pods and the node see it: API server and S3 are here."""
        return f"10.{self.slot}.0.1"

    @property
    def node(self) -> str:
        return f"10.{self.slot}.0.2"

    @property
    def services(self) -> str:
        return f"10.{self.slot}.64.0/20"

    @property
    def api_service(self) -> str:
        return f"10.{self.slot}.64.1"

    @property
    def pods(self) -> str:
        return f"10.{self.slot}.128.0/20"


def create(at: Places) -> Addresses:
    """Make the namespace and the wire, and route pods and Services to it; those that exist are used again."""
    noted = at.run / "slot"
    if noted.exists() and (Path("/run/netns") / at.namespace).exists():
        return Addresses(int(noted.read_text()))
    with locked(RUN_ROOT / "tunewright.lock"):
        remove(at)
        addresses = Addresses(free_slot(prefer=SLOTS[int(at.key, 16) % len(SLOTS)]))
        connect(at, addresses)
    noted.write_text(str(addresses.slot))
    return addresses


def connect(at: Places, addresses: Addresses) -> None:
    inside = ["-n", at.namespace]
    for words in [
        ["netns", "add", at.namespace],
        ["link", "add", at.link, "type", "veth", "peer", "name", "eth0", "netns", at.namespace],
        ["addr", "add", f"{addresses.host}/30", "dev", at.link],
        ["link", "set", at.link, "up"],
        [*inside, "link", "set", "lo", "up"],
        [*inside, "addr", "add", f"{addresses.node}/30", "dev", "eth0"],
        [*inside, "link", "set", "eth0", "up"],
        [*inside, "route", "add", "default", "via", addresses.host],
        ["route", "add", addresses.services, "via", addresses.node],
        ["route", "add", addresses.pods, "via", addresses.node],
    ]:
        run(["ip", *words])
    run(["ip", "netns", "exec", at.namespace, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])


def remove(at: Places) -> None:
    """Remove wire and namespace if they are there; routes go with the wire."""
    if (Path("/sys/class/net") / at.link).exists():
        run(["ip", "link", "del", at.link])
    if (Path("/run/netns") / at.namespace).exists():
        run(["ip", "netns", "del", at.namespace])


def free_slot(*, prefer: int) -> int:
    """A slot whose block no address and no route of this machine touches."""
    taken = used_networks()
    slot: int
    for slot in (prefer, *SLOTS):
        block = IPv4Network(f"10.{slot}.0.0/16")
        if not any(block.overlaps(network) for network in taken):
            return slot
    raise ClusterError("no free 10.x.0.0/16 block between 10.100 and 10.199: stop other clusters with `python3 -m tests.cluster down`")


def used_networks() -> list[IPv4Network]:
    routes = json.loads(run(["ip", "-4", "-json", "route", "show", "table", "all"]) or "[]")
    found = [route["dst"] for route in routes if route.get("dst", "default") != "default"]
    return [network for network in map(IPv4Network, found) if network.prefixlen > 0]


def free_port(*, taken: set[int]) -> int:
    """A TCP port that nobody listens on, on any address, now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            taken.add(port)
            return port
