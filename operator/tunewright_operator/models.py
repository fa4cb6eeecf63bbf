"""What happens to tuned models: which engine serves each, what its pods hold, and what is told of it. Pure, like ``reconcile``.

Adapters over one base model and namespace share an engine (a Deployment with a Service); a whole model has one of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError

from tunewright_crds import names
from tunewright_crds.fields import amount
from tunewright_crds.names import Condition, Reason
from tunewright_crds.pod import clean
from tunewright_crds.tuned_model import Kind, TunedModelSpec, TunedModelStatus
from tunewright_operator import builders
from tunewright_operator.conditions import Truth, set_condition
from tunewright_operator.failures import hindrance
from tunewright_operator.observed import DIGEST_ANNOTATION, Deployed, Identity, Pod, Served
from tunewright_operator.settings import Settings

# The engine of models that nobody serves: they still have a status.
UNSERVED: Final = ""
_RETRY_SECONDS: Final = 10.0

Holdings = Mapping[str, str]  # model id: version ("" where the pod tells none)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A TunedModel with its typed spec and status."""

    id: Identity
    spec: TunedModelSpec
    status: TunedModelStatus

    @classmethod
    def of(cls, view: Served) -> "Wanted | None":
        """None where the spec makes no sense; the resource's schema keeps such ones out."""
        try:
            spec = TunedModelSpec.model_validate(view.spec)
        except ValidationError:
            return None
        try:
            return cls(view.id, spec, TunedModelStatus.model_validate(view.raw_status))
        except ValidationError:
            return cls(view.id, spec, TunedModelStatus.model_validate({}))

    @property
    def engine(self) -> str:
        """Name of the engine that serves it. A whole model keeps its engine from version to version: a new one rolls in without a gap."""
        if not self.spec.serving.enabled or self.id.deleting:
            return UNSERVED
        shared = self.spec.kind is Kind.ADAPTER
        return names.engine_name(self.spec.base.uri if shared else f"{names.MODELS}/{self.id.namespace}/{self.id.name}")


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine at one moment. ``holdings``: what each ready pod (by name) says it holds; None where it did not answer."""

    namespace: str
    name: str
    models: tuple[Wanted, ...]
    deployment: Deployed | None
    pods: tuple[Pod, ...]
    holdings: Mapping[str, Holdings | None]
    now: datetime
    trouble: Mapping[str, str] = field(default_factory=dict)  # model: why it could not be loaded


@dataclass(frozen=True, slots=True)
class Load:
    """An adapter that a pod shall hold; ``uri`` empty: shall hold no more."""

    pod: Pod
    model: str
    uri: str = ""
    version: str = ""


@dataclass
class EnginePlan:
    """What is to be done for one engine."""

    apply: list[dict[str, Any]] = field(default_factory=list)
    remove: bool = False
    loads: list[Load] = field(default_factory=list)
    statuses: dict[str, TunedModelStatus] = field(default_factory=dict)  # by name of the TunedModel
    wake_in: float | None = None


def ready_pods(pods: tuple[Pod, ...]) -> list[Pod]:
    """Pods that answer."""
    return [pod for pod in pods if pod.ready and pod.ip and not pod.id.deleting]


def reconcile_engine(seen: Engine, settings: Settings) -> EnginePlan:
    """What to do about one engine and the models on it."""
    if seen.name == UNSERVED:
        return EnginePlan(statuses={model.id.name: _unserved(model, seen.now) for model in seen.models})
    if not seen.models:
        return EnginePlan(remove=seen.deployment is not None)
    plan = EnginePlan()
    manifests = engine_manifests(seen, settings)
    if seen.deployment is None or seen.deployment.digest != manifests[0]["metadata"]["annotations"][DIGEST_ANNOTATION]:
        plan.apply = manifests
    if seen.models[0].spec.kind is Kind.ADAPTER:
        plan.loads = _loads(seen)
    plan.statuses = {model.id.name: _served(seen, model) for model in seen.models}
    if plan.loads or any(held is None for held in seen.holdings.values()):
        plan.wake_in = _RETRY_SECONDS
    return plan


def _loads(seen: Engine) -> list[Load]:
    loads = []
    wanted = {model.id.name: model.spec for model in seen.models}
    for pod in ready_pods(seen.pods):
        held = seen.holdings.get(pod.id.name)
        if held is None:
            continue
        loads += [
            Load(pod, name, spec.artifact.uri, spec.version) for name, spec in sorted(wanted.items()) if held.get(name) != spec.version
        ]
        loads += [Load(pod, name) for name in sorted(held) if name != names.ENGINE_BASE_ID and name not in wanted]
    return loads


def _served(seen: Engine, model: Wanted) -> TunedModelStatus:
    status = model.status.model_copy(deep=True)
    pods = ready_pods(seen.pods)
    holding = [pod for pod in pods if _holds(seen.holdings.get(pod.id.name), model)]
    tell = _teller(status, model, seen.now)
    hindered = _hindrance(seen, model, pods)
    if pods and len(holding) == len(pods):
        tell(Condition.LOADED, "True", Reason.LOADED, f"{len(pods)} of {len(pods)} pods hold version {model.spec.version}")
    else:
        tell(
            Condition.LOADED, "False", Reason.STARTING if not pods else Reason.NOT_READY, f"{len(holding)} of {len(pods)} pods; {hindered}"
        )
    if holding:
        tell(Condition.READY, "True", Reason.READY, "")
        status.served_version = model.spec.version
    else:
        tell(Condition.READY, "False", Reason.NOT_READY, hindered)
        # An earlier version may answer still, while the new one is loaded.
        status.served_version = next((held[model.id.name] for held in seen.holdings.values() if held and model.id.name in held), "")
    status.endpoint = f"http://{seen.name}.{seen.namespace}.svc:{names.ENGINE_PORT}"
    status.message = "" if holding else clean(hindered)
    return status


def _holds(held: Holdings | None, model: Wanted) -> bool:
    if not held or model.id.name not in held:
        return False
    return held[model.id.name] in ((model.spec.version,) if model.spec.kind is Kind.ADAPTER else (model.spec.version, ""))


def _hindrance(seen: Engine, model: Wanted, pods: list[Pod]) -> str:
    if model.id.name in seen.trouble:
        return seen.trouble[model.id.name]
    if pods:
        return "the model is being loaded"
    starting = next((pod for pod in seen.pods if not pod.id.deleting), None)
    return hindrance(starting)[1]


def _unserved(model: Wanted, now: datetime) -> TunedModelStatus:
    status = model.status.model_copy(deep=True)
    tell = _teller(status, model, now)
    tell(Condition.LOADED, "False", Reason.NOT_WANTED, "spec.serving.enabled is false")
    tell(Condition.READY, "False", Reason.NOT_WANTED, "spec.serving.enabled is false")
    status.endpoint = status.served_version = status.message = ""
    return status


def _teller(status: TunedModelStatus, model: Wanted, now: datetime) -> Callable[[Condition, Truth, str, str], None]:
    status.observed_generation = model.id.generation

    def tell(type_: Condition, truth: Truth, reason: str, message: str) -> None:
        set_condition(status.conditions, type_, truth, reason=reason, message=message, generation=model.id.generation, now=now)

    return tell


def engine_manifests(seen: Engine, settings: Settings) -> list[dict[str, Any]]:
    """Deployment, Service and NetworkPolicy of an engine. They belong to every model on it and go with the last."""
    labels = {names.LABEL_MANAGED_BY: names.MANAGED_BY, names.LABEL_ROLE: names.Role.SERVE.value, names.LABEL_ENGINE: seen.name}
    selector = {names.LABEL_ENGINE: seen.name}
    models = sorted(seen.models, key=lambda model: model.id.name)
    first = models[0]
    asked = [model.spec.serving for model in models]
    pod = builders.serving_pod(
        base=first.spec.served_uri,
        namespace=seen.namespace,
        model_id="" if first.spec.kind is Kind.ADAPTER else first.id.name,
        credentials=first.spec.base.credentials_secret,
        cpu=max((serving.resources.cpu for serving in asked), key=amount),
        memory=max((serving.resources.memory for serving in asked), key=amount),
        gpus=max(serving.resources.gpus for serving in asked),
        settings=settings,
    )
    deployment = {
        "replicas": max(serving.replicas for serving in asked),
        "selector": {"matchLabels": selector},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    service = {"selector": selector, "ports": [{"name": "http", "port": names.ENGINE_PORT, "targetPort": names.ENGINE_PORT}]}
    platform = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.lease_namespace}}}
    policy = {
        "podSelector": {"matchLabels": selector},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [platform], "ports": [{"port": names.ENGINE_PORT, "protocol": "TCP"}]}],
    }
    meta = {
        "name": seen.name,
        "namespace": seen.namespace,
        "labels": labels,
        "ownerReferences": [
            {"apiVersion": names.API_VERSION, "kind": "TunedModel", "name": model.id.name, "uid": model.id.uid} for model in models
        ],
    }
    digest = builders.digest_of({"meta": meta, "deployment": deployment, "service": service, "policy": policy})
    # The Deployment comes first here and is applied last: its annotation says that everything was.
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": meta | {"annotations": {DIGEST_ANNOTATION: digest}},
            "spec": deployment,
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service},
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": policy},
    ]
