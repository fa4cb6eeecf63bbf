"""The single-machine cluster keeps what the other tests rely on."""

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import EndpointConnectionError

from . import Facts, cleanup, fixtures, node, services
from .fixtures import Kubectl
from .places import CHECKOUT, Places, places

pytestmark = pytest.mark.cluster

RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "readOnlyRootFilesystem": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
AUDIENCE = "somebody-else"
NAME = "self-test"  # a cluster of their own: the last of these tests kills it


@pytest.fixture(scope="module")
def cluster() -> Facts:
    fixtures.running(NAME)
    return fixtures.with_images(NAME, "dev")


@pytest.fixture
def kubectl(cluster: Facts) -> Iterator[Kubectl]:
    """kubectl in a fresh namespace that demands the `restricted` pod security level."""
    name = f"cluster-{uuid.uuid4().hex[:8]}"
    admin = Kubectl(cluster.kubeconfig, "default")
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    admin.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": level}})
    yield Kubectl(cluster.kubeconfig, name)
    admin("delete", "namespace", name, "--wait=false")


def pod(cluster: Facts, name: str, *command: str, **spec: Any) -> dict[str, Any]:
    """A pod that a `restricted` namespace admits; `container` in `spec` adds to its container."""
    container = {"name": "main", "image": cluster.images["dev"], "command": list(command), "securityContext": RESTRICTED}
    container |= spec.pop("container", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container], **spec},
    }


def ended(found: dict[str, Any]) -> bool:
    return found["status"]["phase"] in ("Succeeded", "Failed")


def is_ready(found: dict[str, Any]) -> bool:
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in found["status"].get("conditions", []))


def output_of(kubectl: Kubectl, wanted: dict[str, Any]) -> str:
    """Run the pod to its end and return what it printed."""
    kubectl.create(wanted)
    name = wanted["metadata"]["name"]
    found = kubectl.wait("pod", name, ended)
    printed = kubectl("logs", name)
    assert found["status"]["phase"] == "Succeeded", printed
    return printed


def test_a_pod_reaches_a_service_by_its_name_and_the_object_storage(cluster: Facts, kubectl: Kubectl) -> None:
    server = pod(cluster, "web", "/usr/bin/python3", "-m", "http.server", "8080", "--directory", "/etc")
    probe = {"httpGet": {"path": "/hostname", "port": 8080}, "periodSeconds": 1}
    server["spec"]["containers"][0]["readinessProbe"] = probe
    kubectl.create(server)
    ports = [{"port": 80, "targetPort": 8080}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": ports}}
    kubectl.create(service)
    kubectl.wait("pod", "web", is_ready)
    script = """
import sys, time, urllib.error, urllib.request
deadline = time.monotonic() + 60  # a Service's rules are in place a moment after its pod is ready
while True:
    try:
        print("web says", urllib.request.urlopen("http://web/hostname", timeout=5).read().decode().strip())
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.5)
try:
    urllib.request.urlopen(sys.argv[1], timeout=30)
except urllib.error.HTTPError as refused:
    print("storage answers", refused.headers["Content-Type"])
"""
    printed = output_of(kubectl, pod(cluster, "client", "/usr/bin/python3", "-c", script, cluster.s3.endpoint_in_cluster))
    assert "web says web" in printed
    assert "storage answers application/xml" in printed


def test_a_projected_token_is_valid_for_its_audience_only(cluster: Facts, kubectl: Kubectl) -> None:
    source = {"serviceAccountToken": {"audience": AUDIENCE, "path": "token", "expirationSeconds": 600}}
    reader = pod(
        cluster,
        "reader",
        *("/bin/cat", "/var/run/token/token"),
        volumes=[{"name": "token", "projected": {"sources": [source]}}],
        container={"volumeMounts": [{"name": "token", "mountPath": "/var/run/token", "readOnly": True}]},
    )
    token = output_of(kubectl, reader).strip()

    def review(audience: str) -> dict[str, Any]:
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token, "audiences": [audience]}}
        status: dict[str, Any] = kubectl.create(asked)["status"]
        return status

    accepted = review(AUDIENCE)
    assert accepted["authenticated"], accepted
    assert accepted["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["reader"]
    assert not review("https://kubernetes.default.svc.cluster.local").get("authenticated")


def test_a_pod_that_takes_too_much_memory_is_told_as_such(cluster: Facts, kubectl: Kubectl) -> None:
    greedy = ("/usr/bin/python3", "-c", "print(len(bytearray(512 << 20)))")
    kubectl.create(pod(cluster, "greedy", *greedy, container={"resources": {"limits": {"memory": "64Mi", "cpu": "500m"}}}))
    state = kubectl.wait("pod", "greedy", ended)["status"]["containerStatuses"][0]["state"]
    assert (state["terminated"]["reason"], state["terminated"]["exitCode"]) == ("OOMKilled", 137)


def test_the_dev_runtime_class_runs_the_checkouts_code_in_a_restricted_namespace(cluster: Facts, kubectl: Kubectl) -> None:
    script = """
import pathlib, sys, pydantic, tunewright_crds
print(tunewright_crds.__file__)
try:
    pathlib.Path(tunewright_crds.__file__).with_name("written").touch()
except OSError as refused:
    print(type(refused).__name__)
"""
    printed = output_of(kubectl, pod(cluster, "dev", "python", "-c", script, runtimeClassName=cluster.runtime_class))
    assert printed.split() == [str(CHECKOUT / "crds" / "tunewright_crds" / "__init__.py"), "OSError"]


def test_gpus_are_scheduled_until_there_are_no_more(cluster: Facts, kubectl: Kubectl) -> None:
    def asks_for(gpus: int) -> dict[str, Any]:
        return {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}

    assert output_of(kubectl, pod(cluster, "fits", "/bin/echo", "ran", container=asks_for(node.GPUS))).strip() == "ran"
    kubectl.create(pod(cluster, "too-many", "/bin/true", container=asks_for(node.GPUS + 1)))
    conditions = kubectl.wait("pod", "too-many", lambda found: bool(found["status"].get("conditions")))["status"]["conditions"]
    assert [(one["reason"], "nvidia.com/gpu" in one["message"]) for one in conditions] == [("Unschedulable", True)]


def test_up_leaves_a_healthy_cluster_alone(cluster: Facts) -> None:
    at = places(NAME)
    before = {name: services.own_pid(name, at) for name in services.known(at)}
    assert "start" not in fixtures.command("up", "--name", NAME)
    assert {name: services.own_pid(name, at) for name in services.known(at)} == before
    assert None not in before.values()


def test_object_storage_can_fail_and_come_back_with_its_data(cluster: Facts) -> None:
    s3 = boto3.client(
        "s3",
        endpoint_url=cluster.s3.endpoint,
        aws_access_key_id=cluster.s3.access_key,
        aws_secret_access_key=cluster.s3.secret_key,
        region_name=cluster.s3.region,
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )
    bucket = f"cluster-{uuid.uuid4().hex[:8]}"
    s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket=bucket, Key="kept", Body=b"content")
    fixtures.command("stop", "s3", "--name", NAME)
    try:
        with pytest.raises(EndpointConnectionError):
            s3.get_object(Bucket=bucket, Key="kept")
    finally:
        fixtures.command("start", "s3", "--name", NAME)
    assert s3.get_object(Bucket=bucket, Key="kept")["Body"].read() == b"content"
    s3.delete_object(Bucket=bucket, Key="kept")
    s3.delete_bucket(Bucket=bucket)
    s3.close()


def test_after_a_crash_up_repairs_and_down_leaves_nothing() -> None:
    at = places(NAME)
    try:
        cluster = fixtures.running(NAME)
        admin = Kubectl(cluster.kubeconfig, "default")
        kept = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "kept"}}
        admin.create({**kept, "spec": {"containers": [{"name": "main", "image": node.PAUSE_IMAGE}]}})
        admin.wait("pod", "kept", is_ready)
        kill(services.own_pid("apiserver", at), services.own_pid("etcd", at))
        repaired = fixtures.running(NAME)
        assert repaired == cluster
        assert is_ready(admin.get("pod", "kept"))
        assert cleanup.contained(at), "the pod's processes are in the cluster's cgroup"
        kill(*(services.own_pid(name, at) for name in services.known(at)))
    finally:
        fixtures.command("down", "--name", NAME)
    assert remains(at) == []
    assert not at.run.exists()
    assert not at.kubelet.exists()
    assert [entry.name for entry in at.state.iterdir() if entry.name not in cleanup.KEPT] == []


def kill(*pids: int | None) -> None:
    for pid in pids:
        assert pid is not None, "the service runs before it is killed"
        os.killpg(pid, signal.SIGKILL)


def remains(at: Places) -> list[str]:
    """Processes, interfaces, mounts and cgroups that carry the cluster's key."""
    listed = subprocess.run(["ip", "-json", "link"], capture_output=True, text=True, check=True).stdout
    interfaces = [link["ifname"] for link in json.loads(listed) if at.key in link["ifname"]]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if at.key in line]
    cgroups = [str(folder) for hierarchy in node.cgroup_hierarchies() for folder in hierarchy.glob(f"*{at.key}*")]
    processes = []
    for pid in cleanup.pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        except OSError:
            continue
        processes += [words.replace("\0", " ")] if f"tunewright-{at.key}" in words or f"{at.state}/" in words else []
    return [*interfaces, *mounts, *cgroups, *processes]
