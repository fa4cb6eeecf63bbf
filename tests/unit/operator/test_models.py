"""How tuned models come to be served: shared engines, loads without a restart, and what is told of each."""

import copy
from typing import Any

import pytest

from tests.support.builders import START, settings
from tunewright_crds import names
from tunewright_crds.tuned_model import Kind
from tunewright_operator.conditions import condition
from tunewright_operator.models import UNSERVED, Engine, EnginePlan, Load, Wanted, reconcile_engine
from tunewright_operator.observed import Deployed, Pod, Served

BASE = "s3://models/base/"


def a_model(name: str, *, version: str = "v1", kind: Kind = Kind.ADAPTER, enabled: bool = True, **serving: Any) -> Wanted:
    body = {
        "metadata": {"name": name, "namespace": "ns", "uid": f"uid-{name}", "generation": 2},
        "spec": {
            "base": {"uri": BASE},
            "kind": kind.value,
            "artifact": {"uri": f"s3://t/ns/models/{name}/{version}/{kind.value}"},
            "version": version,
            "serving": {"enabled": enabled, **serving},
        },
    }
    wanted = Wanted.of(Served.of(body))
    assert wanted is not None
    return wanted


def a_pod(name: str, *, ready: bool = True) -> Pod:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    labels = {names.LABEL_ENGINE: "engine"}
    meta = {"name": name, "namespace": "ns", "uid": name, "labels": labels}
    return Pod.of({"metadata": meta, "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions}})


def look(
    *models: Wanted, pods: tuple[Pod, ...] = (), deployed: bool = True, trouble: str = "", **holdings: dict[str, str] | None
) -> EnginePlan:
    """What is done about the engine of ``models``. ``holdings``: by pod."""
    name = models[0].engine if models else "engine-of-nobody"
    seen = Engine("ns", name, models, None, pods, holdings, START, {models[0].id.name: trouble} if trouble else {})
    if deployed and name != UNSERVED:
        plan = reconcile_engine(seen, settings())
        manifest = copy.deepcopy(plan.apply[0]) if plan.apply else {"metadata": {"name": name, "namespace": "ns"}}
        seen = Engine("ns", name, models, Deployed.of(manifest), pods, holdings, START, seen.trouble)
    return reconcile_engine(seen, settings())


def truth(plan: EnginePlan, model: str, type_: str) -> tuple[str, str]:
    told = condition(plan.statuses[model].conditions, type_)
    return (told.status, told.reason) if told else ("", "")


def test_adapters_over_one_base_share_an_engine_and_whole_models_have_their_own() -> None:
    assert a_model("a").engine == a_model("b", version="v9").engine
    merged = a_model("a", kind=Kind.MERGED)
    assert len({a_model("a").engine, merged.engine, a_model("b", kind=Kind.MERGED).engine}) == 3
    assert merged.engine == a_model("a", kind=Kind.MERGED, version="v2").engine, "a new version rolls into the same engine"
    assert a_model("a", enabled=False).engine == UNSERVED


def test_a_first_model_gets_a_deployment_a_service_and_a_policy_that_admits_only_the_platform() -> None:
    plan = look(a_model("a", replicas=2), a_model("b", replicas=3, resources={"memory": "9Gi", "cpu": "500m"}), deployed=False)
    deployment, service, policy = plan.apply
    assert [body["kind"] for body in plan.apply] == ["Deployment", "Service", "NetworkPolicy"]
    assert deployment["spec"]["replicas"] == 3, "the most that any asks for"
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["requests"] == {"cpu": "1", "memory": "9Gi"}
    assert container["args"][:3] == ["serve", "--base", BASE]
    assert "--model-id" not in container["args"]
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert (
        service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == {names.LABEL_ENGINE: deployment["metadata"]["name"]}
    )
    admitted = policy["spec"]["ingress"][0]["from"]
    assert admitted == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tunewright"}}}]
    assert [owner["name"] for owner in deployment["metadata"]["ownerReferences"]] == ["a", "b"]


def test_a_whole_model_is_served_from_its_artefact_under_its_own_name() -> None:
    model = a_model("a", kind=Kind.FULL)
    arguments = look(model, deployed=False).apply[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--base") + 1] == model.spec.artifact.uri
    assert arguments[arguments.index("--model-id") + 1] == "a"


def test_ready_pods_are_brought_to_hold_exactly_what_is_wanted() -> None:
    held = {names.ENGINE_BASE_ID: "", "a": "v0", "gone": "v1"}
    plan = look(a_model("a"), a_model("b"), pods=(a_pod("p"), a_pod("q", ready=False)), p=held)
    loads = [(load.pod.id.name, load.model, load.version) for load in plan.loads]
    assert loads == [("p", "a", "v1"), ("p", "b", "v1"), ("p", "gone", "")]
    assert all(isinstance(load, Load) for load in plan.loads)
    assert plan.wake_in is not None
    assert plan.apply == [], "a new adapter restarts nothing"


STATES: dict[str, tuple[EnginePlan, tuple[str, str], tuple[str, str], str]] = {
    "no pod yet": (look(a_model("a")), ("False", "Starting"), ("False", "NotReady"), ""),
    "loaded everywhere": (
        look(a_model("a"), pods=(a_pod("p"), a_pod("q")), p={"a": "v1"}, q={"a": "v1"}),
        ("True", "Loaded"),
        ("True", "Ready"),
        "v1",
    ),
    "loaded in one pod of two": (
        look(a_model("a"), pods=(a_pod("p"), a_pod("q")), p={"a": "v1"}, q={}),
        ("False", "NotReady"),
        ("True", "Ready"),
        "v1",
    ),
    "the version before answers still": (
        look(a_model("a"), pods=(a_pod("p"),), p={"a": "v0"}),
        ("False", "NotReady"),
        ("False", "NotReady"),
        "v0",
    ),
    "a pod that does not answer": (look(a_model("a"), pods=(a_pod("p"),), p=None), ("False", "NotReady"), ("False", "NotReady"), ""),
    "nobody wants it served": (look(a_model("a", enabled=False)), ("False", "NotWanted"), ("False", "NotWanted"), ""),
}


@pytest.mark.parametrize(("plan", "loaded", "ready", "version"), STATES.values(), ids=STATES.keys())
def test_what_is_told_of_a_model(plan: EnginePlan, loaded: tuple[str, str], ready: tuple[str, str], version: str) -> None:
    status = plan.statuses["a"]
    assert (truth(plan, "a", "Loaded"), truth(plan, "a", "Ready"), status.served_version) == (loaded, ready, version)
    assert (status.message == "") == (ready[1] != "NotReady")
    assert (status.endpoint == "") == (ready[1] == "NotWanted")


def test_an_adapter_that_does_not_load_says_why_and_is_tried_again() -> None:
    plan = look(a_model("a"), a_model("b"), pods=(a_pod("p"),), trouble="/v1/load_lora_adapter: 400 rank too high", p={"b": "v1"})
    assert "rank too high" in plan.statuses["a"].message
    assert plan.wake_in is not None
    assert truth(plan, "b", "Ready") == ("True", "Ready")


def test_an_engine_that_no_model_wants_is_removed_and_nothing_is_done_twice() -> None:
    assert look().remove
    assert not look(deployed=False).remove
    again = look(a_model("a"), pods=(a_pod("p"),), p={"a": "v1", names.ENGINE_BASE_ID: ""})
    assert (again.apply, again.loads, again.remove, again.wake_in) == ([], [], False, None)
