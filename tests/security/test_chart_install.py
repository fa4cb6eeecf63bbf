"""helm on a real API server: install, upgrade, uninstall; the session key outlives an upgrade, and nothing outlives the release."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.cluster import facts
from tests.cluster.places import BIN
from tests.support.stack import Kubectl, cluster, run

GONE_SECONDS = 60
NAMESPACE = "tunewright-system"
LISTED = "serviceaccounts,secrets,services,deployments,roles,rolebindings,clusterroles,clusterrolebindings,poddisruptionbudgets,crds"


@pytest.fixture
def kubectl() -> Iterator[Kubectl]:
    """A control plane of its own: what a release leaves behind must be told from what other tests made."""
    cluster("up", "--name", "chart", "--control-plane-only")
    try:
        yield Kubectl(facts("chart").kubeconfig)
    finally:
        cluster("down", "--name", "chart", timeout=120)


def helm(kubectl: Kubectl, *arguments: str) -> str:
    return run(str(BIN / "helm"), *arguments, "--namespace", NAMESPACE, env=kubectl.env, timeout=120)


def everything(kubectl: Kubectl) -> set[str]:
    """Every object of the kinds that the chart makes; what Kubernetes itself puts into a namespace aside, and what is on its way out: an API server that has
    little of its machine may take minutes to see that a definition has no objects."""
    items = (one for one in kubectl.get(LISTED, "--all-namespaces")["items"] if "deletionTimestamp" not in one["metadata"])
    told = {f"{one['kind']} {one['metadata'].get('namespace', '')}/{one['metadata']['name']}" for one in items}
    return {one for one in told if not one.endswith("/default")}


def session_key(kubectl: Kubectl) -> str:
    found: str = kubectl.get("secret", "tunewright-session-key", "-n", NAMESPACE)["data"]["key"]
    return found


def test_install_upgrade_uninstall(kubectl: Kubectl) -> None:
    kubectl("create", "namespace", NAMESPACE)
    kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    before = everything(kubectl)
    said = helm(kubectl, "install", "tunewright", "charts/tunewright", "--set", "storage.bucket=bucket", "--set", "crds.keep=false")
    assert "kubectl -n NAMESPACE apply -f job.yaml" in said
    kubectl("wait", "--for=condition=Established", "crd/instructiontuningjobs.tunewright.dev", "--timeout=60s")
    for name in ("tunewright-operator", "tunewright-api"):
        template = kubectl.get("deployment", name, "-n", NAMESPACE)["spec"]["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": template["spec"]}
        kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))  # admitted by the `restricted` level

    key = session_key(kubectl)
    helm(
        kubectl, "upgrade", "tunewright", "charts/tunewright", "--reuse-values", "--set", "api.replicas=2", "--set", "namespaces={default}"
    )
    assert session_key(kubectl) == key
    assert kubectl.get("deployment", "tunewright-api", "-n", NAMESPACE)["spec"]["replicas"] == 2
    assert not kubectl.find("clusterrole", "tunewright-operator"), "with namespaces, the operator has no rights over the whole cluster"

    helm(kubectl, "uninstall", "tunewright")
    deadline = time.monotonic() + GONE_SECONDS
    while (left := everything(kubectl) - before) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left
    assert everything(kubectl) == before
