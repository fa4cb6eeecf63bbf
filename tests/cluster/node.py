"""The node: containerd, kubelet, kube-proxy and CoreDNS in a network namespace of their own."""

import json
import sys
from pathlib import Path
from typing import Any

from . import oci
from .build import program_path, run
from .control_plane import answers_on_node, kubeconfig_of, kubectl
from .network import Addresses
from .places import CHECKOUT, RUN_ROOT, ClusterError, Places
from .services import Service

NODE = "node"
GPUS = 8  # patched into the node's capacity, so that GPU requests are admitted and scheduled for real
PAUSE_IMAGE = "localhost/tunewright/pause:1"
RUNTIME_CLASS = "tunewright-dev"
CGROUPS = Path("/sys/fs/cgroup")
KERNEL = Path("/proc/sys")
KUBELET_CHANGES = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
]
KERNEL_BEFORE = RUN_ROOT / "tunewright-kernel.json"  # as it was before the first kubelet; shared by all clusters
SOURCES = ["crds", "operator", "api", "trainer_image"]  # packages that the editable installation in .venv points to

OBJECTS = f"""\
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {{name: {RUNTIME_CLASS}}}
handler: {RUNTIME_CLASS}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: tunewright-coredns}}
rules:
- {{apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}}
- {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: tunewright-coredns}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: tunewright-coredns}}
subjects:
- {{apiGroup: rbac.authorization.k8s.io, kind: User, name: "tunewright:coredns"}}
"""


def prepare(at: Places, addresses: Addresses) -> None:
    """Write every program's configuration and make the folders and cgroups that they expect."""
    at.config.mkdir(parents=True, exist_ok=True)
    for hierarchy in cgroup_hierarchies():
        (hierarchy / at.cgroup).mkdir(exist_ok=True)
    if not KERNEL_BEFORE.exists():
        write_json(KERNEL_BEFORE, {setting: (KERNEL / setting).read_text().strip() for setting in KUBELET_CHANGES})
    write_json(at.config / "dev-spec.json", dev_runtime_spec())
    write_json(at.config / "cni" / "10-tunewright.conflist", cni_network(at, addresses))
    write_json(at.config / "kubelet.json", kubelet_configuration(at, addresses))
    write_json(at.config / "kube-proxy.json", proxy_configuration(at, addresses))
    write(at.config / "resolv.conf", f"nameserver {addresses.node}\n")
    write(at.config / "containerd.toml", containerd_configuration(at))
    write(at.config / "Corefile", corefile(at, addresses))


def write_json(file: Path, content: dict[str, Any]) -> None:
    write(file, json.dumps(content, indent=2) + "\n")


def write(file: Path, content: str) -> None:
    """Write a file unless it holds just that already: kube-proxy ends when its configuration is written again."""
    if not file.exists() or file.read_text() != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def cgroup_hierarchies() -> list[Path]:
    """Every place where a process can be limited: one folder a controller (v1), or the one of v2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [folder for folder in CGROUPS.iterdir() if (folder / "cgroup.procs").exists()]


def services(at: Places, addresses: Addresses) -> list[Service]:
    """The node's programs in the order of their start."""
    kube = str(program_path("kube"))
    socket = str(at.containerd_socket)
    kubelet = [
        *[kube, "kubelet", f"--config={at.config / 'kubelet.json'}", f"--kubeconfig={kubeconfig_of(at, 'kubelet')}"],
        *[f"--root-dir={at.kubelet}", f"--hostname-override={NODE}", f"--node-ip={addresses.node}"],
        f"--cert-dir={at.config / 'kubelet'}",
    ]
    proxy = [kube, "kube-proxy", f"--config={at.config / 'kube-proxy.json'}", f"--hostname-override={NODE}"]
    coredns = [str(program_path("coredns")), "-conf", str(at.config / "Corefile")]
    return [
        Service(
            "containerd",
            ["containerd", "--config", str(at.config / "containerd.toml"), "--log-level", "warn"],
            ready=lambda: succeeds(["ctr", "--address", socket, "version"]),
            after_start=lambda: import_pause_image(at),
            on_node=True,
        ),
        Service("kubelet", kubelet, ready=lambda: node_is_ready(at), after_start=lambda: advertise_gpus(at), on_node=True),
        Service("kube-proxy", proxy, ready=lambda: answers_on_node(at, "http://127.0.0.1:10256/livez"), on_node=True),
        Service("coredns", coredns, ready=lambda: answers_on_node(at, "http://127.0.0.1:8181/ready"), on_node=True),
    ]


def ctr(at: Places, *words: str) -> str:
    """Run containerd's own tool on the kubelet's images and containers."""
    return run(["ctr", "--address", str(at.containerd_socket), "--namespace", "k8s.io", *words])


def succeeds(command: list[str]) -> bool:
    try:
        run(command, seconds=20)
    except ClusterError:
        return False
    return True


def import_pause_image(at: Places) -> None:
    """Give containerd the image of process 1 of every pod."""
    if PAUSE_IMAGE in ctr(at, "images", "list", "-q").split():
        return
    archive = at.state / "pause.tar"
    program = oci.File("pause", program_path("pause").read_bytes(), mode=0o755)
    oci.write_archive(archive, PAUSE_IMAGE, layers=[oci.layer([program])], config={"Entrypoint": ["/pause"], "User": "65535:65535"})
    ctr(at, "images", "import", str(archive))
    archive.unlink()


def node_is_ready(at: Places) -> bool:
    status = 'jsonpath={.items[?(@.metadata.name=="node")].status.conditions[?(@.type=="Ready")].status}'
    return kubectl(at, "get", "nodes", "-o", status) == "True"


def advertise_gpus(at: Places) -> None:
    """Patched after each start of the kubelet, which resets capacities that it does not know when it registers."""
    patch = json.dumps({"status": {"capacity": {"nvidia.com/gpu": str(GPUS)}}})
    kubectl(at, "patch", "node", NODE, "--subresource=status", "--type=merge", f"--patch={patch}")


def add_objects(at: Places) -> None:
    """The runtime class of development and what CoreDNS may read."""
    kubectl(at, "apply", "--server-side", "-f", "-", given=OBJECTS)


def cni_network(at: Places, addresses: Addresses) -> dict[str, Any]:
    """Point-to-point wires: with `bridge`, replies of Services between pods of one node would need br_netfilter."""
    addressing = {
        "type": "host-local",
        "dataDir": str(at.run / "cni"),
        "ranges": [[{"subnet": addresses.pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "0.4.0",
        "name": "tunewright",
        "plugins": [{"type": "ptp", "ipMasq": False, "ipam": addressing}, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def kubelet_configuration(at: Places, addresses: Addresses) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": addresses.node,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(at.config / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{at.cgroup}",
        "failCgroupV1": False,  # sandboxes still mix v1 and v2
        "failSwapOn": False,
        "clusterDNS": [addresses.node],
        "clusterDomain": "cluster.local",
        "resolvConf": str(at.config / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{at.containerd_socket}",
        "podLogsDir": str(at.logs / "pods"),
        "oomScoreAdj": 0,  # a lower score needs CAP_SYS_RESOURCE
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # images are imported, not pulled: one that was collected would not come back
        "serializeImagePulls": False,
        "syncFrequency": "10s",
        "shutdownGracePeriod": "0s",
    }


def proxy_configuration(at: Places, addresses: Addresses) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "bindAddress": addresses.node,
        "clusterCIDR": addresses.pods,
        "clientConnection": {"kubeconfig": str(kubeconfig_of(at, "kube-proxy"))},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "oomScoreAdj": 0,
        # zero: leave the kernel's own limits alone
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "nftables": {"minSyncPeriod": "100ms", "syncPeriod": "10s"},
    }


def containerd_configuration(at: Places) -> str:
    runtimes = 'plugins."io.containerd.grpc.v1.cri".containerd.runtimes'
    runc = f'BinaryName = "runc"\n    Root = "{at.run / "runc"}"'  # crun refuses mixed cgroups
    return f"""\
version = 2
root = "{at.state / "containerd"}"
state = "{at.run / "containerd"}"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{at.containerd_socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true  # sandboxes lack CAP_SYS_RESOURCE
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{at.config / "cni"}"
  [{runtimes}.runc]
    runtime_type = "io.containerd.runc.v2"
    [{runtimes}.runc.options]
    {runc}
  [{runtimes}.{RUNTIME_CLASS}]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "{at.config / "dev-spec.json"}"
    [{runtimes}.{RUNTIME_CLASS}.options]
    {runc}
"""


def corefile(at: Places, addresses: Addresses) -> str:
    """Only the cluster's names are known; others are denied at once instead of timing out."""
    return f"""\
cluster.local:53 in-addr.arpa:53 {{
  bind {addresses.node}
  errors
  ready 127.0.0.1:8181
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig_of(at, "coredns")}
    ttl 2
  }}
}}
.:53 {{
  bind {addresses.node}
  template ANY ANY . {{
    rcode NXDOMAIN
  }}
}}
"""


def dev_mounts() -> list[Path]:
    """What the checkout's `.venv` needs to run at its own path: itself, the Python it points to, our sources."""
    environment = CHECKOUT / ".venv"
    python = (environment / "bin" / "python").resolve()
    interpreter = python.parents[1] if python.exists() else Path(sys.base_prefix)
    wanted = [environment, *([] if interpreter == Path("/usr") else [interpreter]), *(CHECKOUT / source for source in SOURCES)]
    return [folder for folder in wanted if folder.is_dir()]


def dev_runtime_spec() -> dict[str, Any]:
    """containerd's default specification plus the mounts: pods under the `restricted` level may not ask for host paths themselves."""
    spec: dict[str, Any] = json.loads(run(["ctr", "oci", "spec"]))
    for folder in dev_mounts():
        spec["mounts"].append({"destination": str(folder), "type": "bind", "source": str(folder), "options": ["rbind", "ro"]})
    return spec
