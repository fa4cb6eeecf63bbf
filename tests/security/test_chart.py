"""The chart as rendered: pods that a ``restricted`` namespace admits, no more rights than needed, and values that are spelt right."""

from typing import Any

import pytest

from tests.cluster.places import BIN
from tests.support.front_end import render
from tests.support.stack import CommandFailed, run
from tunewright_crds import names

EVERYTHING = ("metrics.monitors=true", "metrics.annotations=true", "api.podDisruptionBudget=true", "operator.podDisruptionBudget=true")
EVERY_SETTING = ("api.openMetrics=true", "operator.replicas=2", "image.pullSecrets={pull}", "image.registry=mirror.example")


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] in kinds]


def rules(objects: list[dict[str, Any]], component: str) -> list[dict[str, Any]]:
    """Every rule of the roles of a component."""
    roles = [
        one for one in of_kind(objects, "Role", "ClusterRole") if one["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    return [rule for role in roles for rule in role["rules"]]


def test_helm_finds_nothing_to_say() -> None:
    run(str(BIN / "helm"), "lint", "--strict", "charts/tunewright", "--set", "storage.bucket=bucket")


@pytest.mark.parametrize("settings", [(), EVERYTHING + EVERY_SETTING])
def test_every_pod_is_restricted(settings: tuple[str, ...]) -> None:
    deployments = of_kind(render(*settings), "Deployment")
    assert {one["metadata"]["name"] for one in deployments} == {"tunewright-operator", "tunewright-api"}
    for one in deployments:
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPath" not in volume for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("settings", [(), ("namespaces={a,b}",)])
def test_rights_are_few_and_touch_no_secret(settings: tuple[str, ...]) -> None:
    objects = render(*settings)
    for rule in [rule for role in of_kind(objects, "Role", "ClusterRole") for rule in role["rules"]]:
        words = [*rule.get("apiGroups", []), *rule.get("resources", []), *rule["verbs"], *rule.get("nonResourceURLs", [])]
        assert not {"*", "secrets", "escalate", "bind", "impersonate", "pods/exec", "serviceaccounts/token"} & set(words)
        assert "nodes" not in words or rule == {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}
    granted = {(resource, verb) for rule in rules(objects, "api") for resource in rule.get("resources", []) for verb in rule["verbs"]}
    reads = {(resource, verb) for resource in (names.JOBS, names.MODELS) for verb in ("get", "list", "watch")}
    reviews = {("tokenreviews", "create"), ("subjectaccessreviews", "create")}
    assert granted == reads | reviews | {(f"{names.JOBS}/status", "patch"), ("pods", "get")}


def test_people_have_the_same_rights_on_every_resource_of_ours() -> None:
    for rule in rules(render(), "users"):
        assert set(rule["resources"]) == {names.JOBS, names.DATASETS, names.MODELS}


def test_with_namespaces_nothing_else_can_be_touched() -> None:
    told = {one["metadata"]["name"] for one in of_kind(render("namespaces={a,b}"), "ClusterRoleBinding")}
    assert told == {"tunewright-api-reviews", "tunewright-operator-nodes"}
    objects = render("namespaces={a,b}", "operator.readNodes=false")
    assert {one["metadata"]["name"] for one in of_kind(objects, "ClusterRoleBinding")} == {"tunewright-api-reviews"}
    bound = {(one["metadata"]["name"], one["metadata"].get("namespace")) for one in of_kind(objects, "RoleBinding")}
    assert bound == {
        *((f"tunewright-{component}", namespace) for component in ("operator", "api") for namespace in ("a", "b")),
        ("tunewright-operator-lease", None),
    }
    for deployment in of_kind(objects, "Deployment"):
        environment = {one["name"]: one["value"] for one in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
        assert environment["TUNEWRIGHT_NAMESPACES"] == "a,b"


def test_settings_reach_the_operator() -> None:
    objects = render("operator.settings.stallSeconds=90", "trainer.image=mine/trainer:2", "image.tag=1.2", "image.registry=mirror.example")
    operator = next(one for one in of_kind(objects, "Deployment") if one["metadata"]["name"] == "tunewright-operator")
    container = operator["spec"]["template"]["spec"]["containers"][0]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert container["image"] == "mirror.example/tunewright/operator:1.2"
    assert environment["TUNEWRIGHT_TRAINER_IMAGE"] == "mirror.example/mine/trainer:2"
    assert environment["TUNEWRIGHT_STALL_SECONDS"] == "90"
    assert environment["TUNEWRIGHT_BACKOFF_BASE_SECONDS"] == "30"
    assert environment["TUNEWRIGHT_PROGRESS_URL"] == "http://tunewright-api.tunewright-system.svc:80/internal/progress"


REFUSED = {
    "an unknown value": ("api.replica=2", "replica"),
    "an unknown setting": ("operator.settings.stallSecond=2", "stallSecond"),
    "an unknown part": ("ui.enabled=true", "ui"),
    "no bucket": ("storage.bucket=", "bucket"),
    "text for a number": ("api.replicas=two", "replicas"),
    "an endpoint without a scheme": ("storage.endpoint=minio:9000", "endpoint"),
    "a namespace that cannot be": ("namespaces={A_B}", "namespaces"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_misspelt_are_refused_by_name(case: str) -> None:
    setting, told = REFUSED[case]
    with pytest.raises(CommandFailed, match=told):
        render(setting)


@pytest.mark.parametrize(
    ("settings", "installed", "kept"), [((), 3, True), (("crds.keep=false",), 3, False), (("crds.install=false",), 0, False)]
)
def test_definitions_are_installed_and_kept_as_told(settings: tuple[str, ...], installed: int, kept: bool) -> None:
    definitions = of_kind(render(*settings), "CustomResourceDefinition")
    assert len(definitions) == installed
    for one in definitions:
        assert (one["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep") is kept
