"""Where everything of a cluster lies, keyed so that two checkouts or two names never meet.

    <checkout>/.tunewright/<name>/   kubeconfig, cluster.json, keys, configuration, data, logs
    <checkout>/.tunewright/bin/      kubectl and helm
    /run/tunewright-<key>/           sockets, pid files, the runtime's state, and whose cluster it is
    /var/lib/tunewright-<key>/       the kubelet's folder: volumes of pods, and sockets
    ~/.cache/tunewright/             programs and images, shared by all checkouts

Folders with sockets have short names because a socket's path is limited to 107 bytes. The run folder knows enough to clean up after a
checkout that is gone.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = CHECKOUT / ".tunewright" / "bin"
RUN_ROOT = Path("/run")
RUN_PREFIX = "tunewright-"


class ClusterError(Exception):
    """Something that the person who runs the cluster can act on; shown without a traceback."""


def cache() -> Path:
    """The folder of things that outlive a checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunewright"


@dataclass(frozen=True)
class Places:
    """Folders and names of one cluster."""

    name: str
    state: Path
    key: str

    @property
    def run(self) -> Path:
        return RUN_ROOT / f"{RUN_PREFIX}{self.key}"

    @property
    def kubelet(self) -> Path:
        return Path("/var/lib") / f"{RUN_PREFIX}{self.key}"

    @property
    def pids(self) -> Path:
        return self.run / "pids"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def config(self) -> Path:
        return self.state / "config"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def facts(self) -> Path:
        return self.state / "cluster.json"

    @property
    def containerd_socket(self) -> Path:
        return self.run / "containerd.sock"

    @property
    def namespace(self) -> str:
        """The network namespace that plays the node."""
        return f"{RUN_PREFIX}{self.key}"

    @property
    def link(self) -> str:
        """The host's end of the wire to the node; the kernel allows 15 characters."""
        return f"tw{self.key}"

    @property
    def cgroup(self) -> str:
        return f"{RUN_PREFIX}{self.key}"


def places(name: str) -> Places:
    """The places of the cluster `name` of this checkout."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", name):
        raise ClusterError(f"{name!r} is no cluster name: use at most 32 small letters, digits and hyphens")
    key = hashlib.sha256(f"{CHECKOUT}\0{name}".encode()).hexdigest()[:8]
    return Places(name=name, state=CHECKOUT / ".tunewright" / name, key=key)
