"""etcd, API server, controller manager and scheduler, on the host."""

import secrets
import ssl
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .build import program_path, run
from .network import Addresses
from .places import ClusterError, Places
from .services import Service

DAYS = "3650"
USERS = {  # file name: (user, group)
    "admin": ("admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "kube-proxy": ("system:kube-proxy", ""),
    "kubelet": ("system:node:node", "system:nodes"),
    "coredns": ("tunewright:coredns", ""),
}


@dataclass(frozen=True)
class Ports:
    """Ports on the host, chosen free when the cluster is made and kept for its life."""

    etcd: int
    etcd_peer: int
    apiserver: int
    s3: int


def prepare(at: Places, ports: Ports, addresses: Addresses | None) -> None:
    """Make keys, certificates, tokens and kubeconfigs, once in a cluster's life."""
    if (at.config / "tokens.csv").exists():
        return
    at.config.mkdir(parents=True, exist_ok=True)
    at.config.chmod(0o700)
    make_certificates(at.config, addresses)
    host = addresses.host if addresses else "127.0.0.1"
    rows = []
    for file, (user, group) in USERS.items():
        token = secrets.token_hex(24)
        rows.append(f'{token},{user},{user},"{group}"')
        address = "127.0.0.1" if file in ("admin", "kube-controller-manager", "kube-scheduler") else host
        write_kubeconfig(kubeconfig_of(at, file), f"https://{address}:{ports.apiserver}", at.config / "ca.crt", token)
    (at.config / "tokens.csv").write_text("\n".join(rows) + "\n")


def kubeconfig_of(at: Places, user: str) -> Path:
    return at.kubeconfig if user == "admin" else at.config / f"{user}.kubeconfig"


def make_certificates(folder: Path, addresses: Addresses | None) -> None:
    """An authority, the API server's certificate, its client certificate for the kubelet, and the key of service accounts."""
    names = "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1"
    if addresses:
        names += f",IP:{addresses.host},IP:{addresses.api_service}"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", DAYS]
    openssl(folder, "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=tunewright-test")
    sign(folder, "apiserver", "/CN=kube-apiserver", f"subjectAltName={names}\nextendedKeyUsage=serverAuth\n")
    sign(folder, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", "extendedKeyUsage=clientAuth\n")
    openssl(folder, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "service-accounts.key")
    openssl(folder, "ec", "-in", "service-accounts.key", "-pubout", "-out", "service-accounts.pub")


def sign(folder: Path, name: str, subject: str, extensions: str) -> None:
    (folder / f"{name}.ext").write_text(extensions)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    openssl(folder, "req", *key, "-out", f"{name}.csr", "-subj", subject)
    authority = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", DAYS]
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", *authority, "-extfile", f"{name}.ext", "-out", f"{name}.crt")


def openssl(folder: Path, *words: str) -> None:
    run(["openssl", *words], cwd=folder)


def write_kubeconfig(file: Path, server: str, authority: Path, token: str) -> None:
    file.touch(mode=0o600)
    file.write_text(f"""\
apiVersion: v1
kind: Config
current-context: tunewright
clusters:
- name: tunewright
  cluster: {{server: "{server}", certificate-authority: "{authority}"}}
users:
- name: tunewright
  user: {{token: {token}}}
contexts:
- name: tunewright
  context: {{cluster: tunewright, user: tunewright}}
""")


def services(at: Places, ports: Ports, addresses: Addresses | None, *, controllers: bool) -> list[Service]:
    """The control plane's programs in the order of their start."""
    api = [etcd(at, ports), apiserver(at, ports, addresses)]
    return [*api, *controller_services(at, nodes=addresses is not None)] if controllers else api


def etcd(at: Places, ports: Ports) -> Service:
    client, peer = f"http://127.0.0.1:{ports.etcd}", f"http://127.0.0.1:{ports.etcd_peer}"
    command = [
        *[str(program_path("kube")), "etcd", "--name=default", f"--data-dir={at.state / 'etcd'}", "--log-level=warn"],
        *["--unsafe-no-fsync", "--quota-backend-bytes=4294967296"],  # tests only: speed is worth more than surviving a power cut
        *[f"--listen-client-urls={client}", f"--advertise-client-urls={client}"],
        *[f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"],
    ]
    return Service("etcd", command, ready=lambda: answers(f"{client}/health"))


def apiserver(at: Places, ports: Ports, addresses: Addresses | None) -> Service:
    config = at.config
    command = [
        *[str(program_path("kube")), "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{ports.etcd}"],
        *[f"--secure-port={ports.apiserver}", f"--cert-dir={config}"],
        *[f"--tls-cert-file={config / 'apiserver.crt'}", f"--tls-private-key-file={config / 'apiserver.key'}"],
        *["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", f"--token-auth-file={config / 'tokens.csv'}"],
        *["--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--allow-privileged=true"],
        f"--service-account-key-file={config / 'service-accounts.pub'}",
        f"--service-account-signing-key-file={config / 'service-accounts.key'}",
        *["--max-requests-inflight=800", "--max-mutating-requests-inflight=400"],  # control-plane benchmarks are not to measure this
    ]
    if addresses:
        command += [
            *["--bind-address=0.0.0.0", f"--advertise-address={addresses.host}", f"--service-cluster-ip-range={addresses.services}"],
            "--kubelet-preferred-address-types=InternalIP",  # the host does not know the node by its name
            f"--kubelet-client-certificate={config / 'kubelet-client.crt'}",
            f"--kubelet-client-key={config / 'kubelet-client.key'}",
        ]
    else:
        command += ["--bind-address=127.0.0.1", "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.99.0.0/20"]
    return Service("apiserver", command, ready=lambda: answers(f"https://127.0.0.1:{ports.apiserver}/readyz", authority=config / "ca.crt"))


def controller_services(at: Places, *, nodes: bool) -> list[Service]:
    """Controller manager, and a scheduler where there is a node to schedule to."""
    manager = [
        *[str(program_path("kube")), "kube-controller-manager", f"--kubeconfig={kubeconfig_of(at, 'kube-controller-manager')}"],
        *["--leader-elect=false", "--secure-port=0", "--use-service-account-credentials=true"],
        *[f"--root-ca-file={at.config / 'ca.crt'}", f"--service-account-private-key-file={at.config / 'service-accounts.key'}"],
        *["--node-monitor-period=2s", "--node-monitor-grace-period=16s", "--terminated-pod-gc-threshold=1000"],
        *["--kube-api-qps=500", "--kube-api-burst=1000", "--concurrent-job-syncs=20", "--concurrent-gc-syncs=20"],
    ]
    scheduler = [
        *[str(program_path("kube")), "kube-scheduler", f"--kubeconfig={kubeconfig_of(at, 'kube-scheduler')}"],
        *["--leader-elect=false", "--secure-port=0", "--kube-api-qps=500", "--kube-api-burst=1000"],
    ]
    found = [Service("controller-manager", manager, ready=lambda: service_account_is_made(at))]
    return [*found, Service("scheduler", scheduler, ready=lambda: True)] if nodes else found


def service_account_is_made(at: Places) -> bool:
    """The controllers work once they made the first namespace's account; pods are refused before."""
    return "serviceaccount/default" in kubectl(at, "get", "serviceaccounts", "-n", "default", "-o", "name")


def kubectl(at: Places, *words: str, given: str | None = None) -> str:
    """Run kubectl as the cluster's administrator."""
    return run([str(program_path("kube")), "kubectl", f"--kubeconfig={at.kubeconfig}", *words], given=given, seconds=120)


def answers(url: str, *, authority: Path | None = None) -> bool:
    """Whether a GET of the URL is answered with 200."""
    context = ssl.create_default_context(cafile=str(authority)) if authority else None
    try:
        # without the environment's proxies: the services are on this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def answers_on_node(at: Places, url: str) -> bool:
    """Whether a GET from inside the node's network is answered with 200."""
    program = "import sys, urllib.request; urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5)"
    try:
        run(["nsenter", f"--net=/run/netns/{at.namespace}", "--", sys.executable, "-c", program, url], seconds=20)
    except ClusterError:
        return False
    return True
