"""End a cluster whatever state it is in: nothing here asks a service to help, because it may be dead.

All that is needed is in the run folder, so that clusters of a checkout that was deleted can be ended too.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from . import network, services
from .build import run
from .node import KERNEL, KERNEL_BEFORE, cgroup_hierarchies
from .places import CHECKOUT, RUN_PREFIX, RUN_ROOT, Places

KEPT = {"logs", "lock"}  # what `down` leaves of the state folder
CONTAINER_LOGS = Path("/var/log/containers")  # the kubelet's links; their place is fixed in its code


def claim(at: Places) -> None:
    """Note whose cluster this is."""
    at.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    (at.run / "owner.json").write_text(json.dumps({"checkout": str(CHECKOUT), "name": at.name, "state": str(at.state)}))


def destroy(at: Places) -> None:
    """End every process, unmount and remove everything of the cluster except its logs."""
    for name in services.known(at):
        services.kill(name, at)  # at once: all that they would save is removed below
    kill_shims(at)
    kill_contained(at)
    unmount_below(at.run, at.kubelet, at.state)
    if shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin"):
        network.remove(at)
    remove_cgroups(at)
    remove_log_links(at)
    remove_shim_sockets(at)
    restore_kernel(at)
    shutil.rmtree(at.kubelet, ignore_errors=True)
    shutil.rmtree(at.run, ignore_errors=True)
    if at.state.exists():
        for left in [entry for entry in at.state.iterdir() if entry.name not in KEPT]:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() and not left.is_symlink() else left.unlink()


def destroy_orphans() -> None:
    """End the clusters of checkouts that do not exist any more."""
    for owner in RUN_ROOT.glob(f"{RUN_PREFIX}*/owner.json"):
        try:
            noted = json.loads(owner.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        if not (Path(noted["checkout"]) / "tests" / "cluster").exists():  # a dying service may still write beside it
            print(f"         ending cluster {noted['name']!r} of {noted['checkout']}, which is gone", flush=True)
            destroy(Places(noted["name"], Path(noted["state"]), owner.parent.name.removeprefix(RUN_PREFIX)))


def kill_shims(at: Places) -> None:
    """containerd's shims leave its process group; their arguments name the socket of their containerd."""
    for pid in pids():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"shim" in words[0] and str(at.containerd_socket).encode() in words:
                os.kill(pid, signal.SIGKILL)


def pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def kill_contained(at: Places) -> None:
    """Kill what is left in the cluster's cgroups until they are empty."""
    deadline = time.monotonic() + 20
    while (left := contained(at)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def contained(at: Places) -> set[int]:
    """Pids of all processes in the cluster's pods."""
    found: set[int] = set()
    for hierarchy in cgroup_hierarchies():
        for procs in (hierarchy / at.cgroup).rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in procs.read_text().split())
    return found


def unmount_below(*folders: Path) -> None:
    """Unmount everything mounted below the folders, the deepest first."""
    targets = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split()[4].encode().decode("unicode_escape")
        if any(Path(target).is_relative_to(folder) for folder in folders):
            targets.append(target)
    for target in reversed(targets):
        run(["umount", "--lazy", target])


def remove_cgroups(at: Places) -> None:
    for hierarchy in cgroup_hierarchies():
        folders = [folder for folder, _, _ in os.walk(hierarchy / at.cgroup, topdown=False)]
        for folder in folders:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def remove_log_links(at: Places) -> None:
    for link in CONTAINER_LOGS.glob("*.log") if CONTAINER_LOGS.exists() else []:
        if link.is_symlink() and Path(os.readlink(link)).is_relative_to(at.logs):
            link.unlink()


def remove_shim_sockets(at: Places) -> None:
    """Shims listen below containerd's own folder whatever its configuration; each notes its socket beside its task."""
    for note in (at.run / "containerd" / "io.containerd.runtime.v2.task").glob("*/*/address"):
        Path(note.read_text().removeprefix("unix://")).unlink(missing_ok=True)


def restore_kernel(at: Places) -> None:
    """Give the kernel back the settings that a kubelet changes, once no cluster with a node is left."""
    others = [slot for slot in RUN_ROOT.glob(f"{RUN_PREFIX}*/slot") if slot.parent != at.run]
    if others or not KERNEL_BEFORE.exists():
        return
    for setting, value in json.loads(KERNEL_BEFORE.read_text()).items():
        with contextlib.suppress(OSError):
            (KERNEL / setting).write_text(value)
    KERNEL_BEFORE.unlink()
