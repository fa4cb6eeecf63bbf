"""The manifests of everything that the operator makes for a job: pure functions from typed input to plain dictionaries."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import orjson

from tunewright_crds import names
from tunewright_crds.dataset import Dataset, DatasetStatus
from tunewright_crds.errors import user_exit_codes
from tunewright_crds.evaluation import Measured
from tunewright_crds.fields import amount, claim_of
from tunewright_crds.job import JobSpec
from tunewright_crds.names import Role
from tunewright_crds.pod import JobIdentity, PodConfig, Published
from tunewright_crds.resources import Resources
from tunewright_crds.tuned_model import Artifact, Base, Form, Kind, ModelSource, Serving, TunedModelSpec
from tunewright_operator.observed import Identity, Prepared
from tunewright_operator.settings import Settings

Manifest = dict[str, Any]

USER: Final = 65532  # the images' user; has no entry in any passwd
_TOKEN_SECONDS: Final = 3600  # the kubelet renews the progress token at 80 % of this
_COMPUTING: Final = (Role.TRAIN, Role.EVALUATE)


def pod_config(owner: Identity, spec: JobSpec, settings: Settings) -> PodConfig:
    """What the job's pods are told. The version sorts by the job's age and is the same however often it is asked for."""
    return PodConfig(
        job=JobIdentity(namespace=owner.namespace, name=owner.name, uid=owner.uid),
        spec=spec,
        storage=settings.storage,
        version=f"{owner.created:%Y%m%d}-{owner.uid[:8]}",
        progress_url=settings.progress_url,
    )


def owner_reference(owner: Identity) -> Manifest:
    """Makes a child go when its owner goes."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": owner.kind,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def uid_label(owner: Identity) -> tuple[str, str]:
    """The label by which children of this owner are found."""
    return (names.LABEL_DATASET_UID if owner.kind == Prepared.KIND else names.LABEL_JOB_UID), owner.uid


def child_labels(owner: Identity, **more: str) -> dict[str, str]:
    """The labels of an owner's children; a name too long for a label's value is cut by a hash."""
    label = owner.name if len(owner.name) <= names.MAX_LABEL else names.child_name(owner.name, "job")
    kind = names.LABEL_DATASET if owner.kind == Prepared.KIND else names.LABEL_JOB
    return {names.LABEL_MANAGED_BY: names.MANAGED_BY, kind: label, **dict([uid_label(owner)]), **more}


def config_map(config: PodConfig, owner: Identity) -> Manifest:
    """The immutable config of a job or an InstructionDataset."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": names.config_name(owner.name, owner.uid),
            "namespace": owner.namespace,
            "labels": child_labels(owner),
            "ownerReferences": [owner_reference(owner)],
        },
        "immutable": True,
        "data": {names.CONFIG_KEY: config.model_dump_json(by_alias=True, exclude_none=True)},
    }


def prepare_name(owner: Identity) -> str:
    """The batch Job that prepares the data of this owner."""
    return names.dataset_prepare_name(owner.name) if owner.kind == Prepared.KIND else names.prepare_name(owner.name)


def prepare_job(config: PodConfig, owner: Identity, settings: Settings) -> Manifest:
    """The batch Job that prepares the data; never asks for a GPU."""
    return _batch_job(
        prepare_name(owner),
        config,
        owner,
        settings,
        role=Role.PREPARE,
        labels={},
        arguments=["prepare", "--config", names.CONFIG_FILE],
    )


def shards_name(owner: Identity) -> str:
    """The batch Job that reads the data of this owner in parts."""
    return names.dataset_shards_name(owner.name) if owner.kind == Prepared.KIND else names.shards_name(owner.name)


def shards_job(config: PodConfig, owner: Identity, settings: Settings) -> Manifest:
    """The Indexed batch Job whose pods read a part of the sources each. A part that broke for no lasting reason is read again by itself."""
    arguments = ["prepare", "--config", names.CONFIG_FILE, "--shard"]
    manifest = _batch_job(shards_name(owner), config, owner, settings, role=Role.SHARD, labels={}, arguments=arguments)
    count, user_errors = config.spec.dataset.shards, {"containerName": "trainer", "operator": "In", "values": user_exit_codes()}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    del manifest["spec"]["backoffLimit"]
    manifest["spec"] |= {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimitPerIndex": 3,
        "podFailurePolicy": {
            "rules": [{"action": "Ignore", "onPodConditions": disrupted}, {"action": "FailJob", "onExitCodes": user_errors}]
        },
    }
    return manifest


def discard_job(config: PodConfig, owner: Identity, settings: Settings, *, digest: str) -> Manifest:
    """The batch Job that removes prepared data. It outlives its InstructionDataset, so it belongs to nobody and carries its config with it."""
    arguments = ["discard", "--config", names.CONFIG_FILE, "--dataset", digest]
    name = names.discard_name(owner.name, owner.uid)
    manifest = _batch_job(name, config, owner, settings, role=Role.DISCARD, labels={}, arguments=arguments)
    del manifest["metadata"]["ownerReferences"]
    manifest["spec"] |= {"backoffLimit": 2, "ttlSecondsAfterFinished": 600}
    told = config.model_copy(update={"spec": config.spec.model_copy(update={"dataset": Dataset(ref=owner.name)})})  # an annotation is short
    template = manifest["spec"]["template"]
    template["metadata"] |= {"annotations": {names.CONFIG_ANNOTATION: told.model_dump_json(by_alias=True, exclude_none=True)}}
    field = {"path": names.CONFIG_KEY, "fieldRef": {"fieldPath": f"metadata.annotations['{names.CONFIG_ANNOTATION}']"}}
    carried = {"name": "config", "downwardAPI": {"items": [field]}}
    template["spec"]["volumes"] = [carried if volume["name"] == "config" else volume for volume in template["spec"]["volumes"]]
    return manifest


def training_job(config: PodConfig, job: Identity, settings: Settings, *, attempt: int, dataset: str, halvings: int) -> Manifest:
    """The batch Job of one training attempt. ``halvings``: how often the micro-batch is halved for it.

    Of several nodes each is a pod of an Indexed Job. With ``backoffLimit: 0`` the first pod that fails ends them all, and none is made anew: the next
    attempt starts all of them from the same checkpoint.
    """
    arguments = ["train", "--config", names.CONFIG_FILE, "--attempt", str(attempt), "--dataset", dataset]
    name = names.attempt_name(job.name, attempt)
    manifest = _batch_job(
        name,
        config,
        job,
        settings,
        role=Role.TRAIN,
        labels={names.LABEL_ATTEMPT: str(attempt)},
        arguments=arguments + (["--halvings", str(halvings)] if halvings else []),
    )
    pod, wanted = manifest["spec"]["template"]["spec"], config.spec.resources
    if wanted.nodes > 1:
        manifest["spec"] |= {"completionMode": "Indexed", "completions": wanted.nodes, "parallelism": wanted.nodes}
        pod["subdomain"] = names.peers_name(job.uid)
        pod["containers"][0]["env"] += _rendezvous(name, job, wanted)
    return manifest


def _rendezvous(name: str, job: Identity, wanted: Resources) -> list[Manifest]:
    """Where the processes of an attempt meet: at the pod with index 0, whose hostname is the Job's name with the index."""
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{names.COMPLETION_INDEX}']"}}
    return [
        {"name": names.MASTER_ADDR, "value": f"{name}-0.{names.peers_name(job.uid)}"},
        {"name": names.MASTER_PORT, "value": str(names.RENDEZVOUS_PORT)},
        {"name": names.NODES, "value": str(wanted.nodes)},
        {"name": names.NODE_RANK, "valueFrom": index},
        {"name": names.PROCESSES_PER_NODE, "value": str(wanted.processes_per_node)},
    ]


def peers(job: Identity) -> list[Manifest]:
    """What lets the pods of one job find and reach one another: a headless Service for their names, and a NetworkPolicy by which nobody else reaches them.

    Nobody proves who he is to torch's rendezvous, so that it is open to the job's own pods only.
    """
    own = dict([(names.LABEL_ROLE, Role.TRAIN.value), uid_label(job)])
    meta = {
        "name": names.peers_name(job.uid),
        "namespace": job.namespace,
        "labels": child_labels(job, **{names.LABEL_ROLE: Role.TRAIN.value}),
        "ownerReferences": [owner_reference(job)],
    }
    # Names have to resolve while the others are still starting.
    service = {"clusterIP": "None", "selector": own, "publishNotReadyAddresses": True}
    policy = {
        "podSelector": {"matchLabels": own},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": own}}]}],
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service},
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": policy},
    ]


def evaluating_job(config: PodConfig, job: Identity, settings: Settings, *, dataset: str, model: str) -> Manifest:
    """The batch Job that measures the published model at the address ``model``. It asks for what training asks for."""
    arguments = ["evaluate", "--config", names.CONFIG_FILE, "--dataset", dataset, "--model", model]
    return _batch_job(names.evaluate_name(job.name), config, job, settings, role=Role.EVALUATE, labels={}, arguments=arguments)


def _batch_job(
    name: str, config: PodConfig, owner: Identity, settings: Settings, *, role: Role, labels: dict[str, str], arguments: list[str]
) -> Manifest:
    all_labels = child_labels(owner, **{names.LABEL_ROLE: role.value}, **labels)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": owner.namespace, "labels": all_labels, "ownerReferences": [owner_reference(owner)]},
        "spec": {
            # One Job is one attempt: whether there is another, and from which checkpoint, is decided by the operator.
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {"metadata": {"labels": all_labels}, "spec": _pod(config, owner, settings, role=role, arguments=arguments)},
        },
    }


def _pod(config: PodConfig, owner: Identity, settings: Settings, *, role: Role, arguments: list[str]) -> Manifest:
    wanted = config.spec.resources
    gpus = {Role.TRAIN: wanted.gpus_per_node, Role.EVALUATE: min(1, wanted.gpus_per_node)}.get(role, 0)  # one process evaluates
    secrets = {names.STORAGE_CREDENTIALS: settings.storage_secret}
    if config.spec.model.credentials_secret:
        secrets[names.MODEL_CREDENTIALS] = config.spec.model.credentials_secret
    if config.spec.dataset.credentials_secret:
        secrets[names.DATASET_CREDENTIALS] = config.spec.dataset.credentials_secret
    if role is Role.EVALUATE and config.spec.evaluation.judge.api_key_secret:
        secrets[names.JUDGE_CREDENTIALS] = config.spec.evaluation.judge.api_key_secret
    if role is Role.TRAIN:
        secrets |= _destinations(config.spec)
    volumes, mounts = _secret_files(secrets)
    model = [] if role is Role.DISCARD else [claim_of(config.spec.model.uri)]
    data = config.spec.dataset.claims if role in (Role.SHARD, Role.PREPARE) else []
    claimed, claim_mounts = _claims([*model, *data])
    volumes += [
        *claimed,
        {"name": "config", "configMap": {"name": names.config_name(owner.name, owner.uid)}},
        {"name": "scratch", "emptyDir": {"sizeLimit": wanted.scratch}},
        {"name": "progress", "projected": {"sources": [_progress_token()]}},
    ]
    mounts += [
        *claim_mounts,
        {"name": "config", "mountPath": names.CONFIG_FILE.rsplit("/", 1)[0], "readOnly": True},
        {"name": "scratch", "mountPath": names.SCRATCH},
        {"name": "progress", "mountPath": names.PROGRESS_TOKEN.rsplit("/", 1)[0], "readOnly": True},
    ]
    container = _container(
        "trainer",
        wanted.image or settings.trainer_image,
        settings,
        arguments=arguments,
        resources=resources(wanted.cpu, wanted.memory, wanted.gpu_resource, gpus),
    )
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_seconds,
        **pod_safety(),
        **_present(
            nodeSelector=wanted.node_selector,
            tolerations=[
                toleration.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True) for toleration in wanted.tolerations
            ],
            priorityClassName=wanted.priority_class_name if role in _COMPUTING else "",
            serviceAccountName=wanted.service_account_name,
            runtimeClassName=settings.runtime_class(gpus),
        ),
        "containers": [
            container
            | {"volumeMounts": mounts, "env": _environment(wanted.cpu, processes=wanted.processes_per_node if role is Role.TRAIN else 1)}
        ],
        "volumes": volumes,
    }


def _destinations(spec: JobSpec) -> dict[str, str]:
    """Secrets by mount path for where results go beside the platform's storage: only the pod that sends them gets them."""
    found = {
        names.MLFLOW_CREDENTIALS: spec.tracking.mlflow.credentials_secret,
        names.WANDB_CREDENTIALS: spec.tracking.wandb.credentials_secret,
        names.HUB_CREDENTIALS: spec.output.hub.credentials_secret,
    }
    return {path: secret for path, secret in found.items() if secret}


def _progress_token() -> Manifest:
    return {
        "serviceAccountToken": {
            "audience": names.PROGRESS_AUDIENCE,
            "expirationSeconds": _TOKEN_SECONDS,
            "path": names.PROGRESS_TOKEN.rsplit("/", 1)[1],
        }
    }


def _secret_files(secrets: dict[str, str]) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes and mounts by mount path. Optional: with workload identity there is no Secret, and a missing one is the trainer's to tell."""
    volumes, mounts = [], []
    for path, secret in secrets.items():
        name = path.rsplit("/", 1)[1]
        volumes.append({"name": name, "secret": {"secretName": secret, "optional": True, "defaultMode": 0o440}})
        mounts.append({"name": name, "mountPath": path, "readOnly": True})
    return volumes, mounts


def _claims(claims: Iterable[str]) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes and mounts of PersistentVolumeClaims, read-only; a claim is no name for a volume, as it may hold dots and be long."""
    volumes, mounts = [], []
    for number, claim in enumerate(sorted(set(claims) - {""})):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": f"claim-{number}", "mountPath": names.volume_path(claim), "readOnly": True})
    return volumes, mounts


def _environment(cpu: str, *, processes: int = 1) -> list[Manifest]:
    """Processes share the processors. Libraries that count the node's processors instead of the container's start far too many threads; HOME is the only writable place."""
    return [
        {"name": "OMP_NUM_THREADS", "value": str(max(1, math.ceil(amount(cpu)) // processes))},
        {"name": "HOME", "value": names.SCRATCH},
        {"name": "TMPDIR", "value": names.SCRATCH},
    ]


def _container(name: str, image: str, settings: Settings, *, arguments: list[str], resources: Manifest) -> Manifest:
    return {
        "name": name,
        "image": image,
        **_present(imagePullPolicy=settings.trainer_image_pull_policy),
        "command": ["tunewright-trainer"],
        "args": arguments,
        "resources": resources,
        "terminationMessagePath": names.TERMINATION_MESSAGE,
        # Only what the trainer says on purpose: the log may quote anything.
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def pod_safety() -> Manifest:
    """What the `restricted` pod security standard asks of a pod, and no token of the API server."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def resources(cpu: str, memory: str, gpu_resource: str, gpus: int) -> Manifest:
    """Requests and limits: memory is bounded, processors may be borrowed, GPUs are whole."""
    devices = {gpu_resource: str(gpus)} if gpus else {}
    return {"requests": {"cpu": cpu, "memory": memory, **devices}, "limits": {"memory": memory, **devices}}


def _present(**fields: Any) -> Manifest:
    return {name: value for name, value in fields.items() if value}


def tuned_model(
    config: PodConfig,
    artifact: Published,
    *,
    step: int,
    dataset: DatasetStatus,
    made_from: list[str],
    metrics: Sequence[Measured],
    serving: Serving,
) -> Manifest:
    """The published model. It belongs to nobody: deleting the job keeps it. ``made_from``: the tuned models (``model://...``) that the job took."""
    spec = TunedModelSpec(
        base=Base(uri=artifact.base or config.spec.model.uri, credentials_secret=config.spec.model.credentials_secret),
        kind=Kind(artifact.kind),
        artifact=Artifact(uri=artifact.uri, digest=artifact.digest),
        forms=[Form.model_validate(form.model_dump()) for form in artifact.forms],
        version=config.version,
        source=ModelSource(
            job=config.job.name,
            uid=config.job.uid,
            step=step,
            dataset_digest=dataset.digest,
            models=made_from,
            licenses=dataset.licenses,
        ),
        metrics=list(metrics),
        serving=serving,
    )
    return {
        "apiVersion": names.API_VERSION,
        "kind": "TunedModel",
        "metadata": {
            "name": config.model_name,
            "namespace": config.job.namespace,
            "labels": {names.LABEL_MANAGED_BY: names.MANAGED_BY},
        },
        "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def serving_pod(
    *, base: str, namespace: str, model_id: str, credentials: str, cpu: str, memory: str, gpus: int, settings: Settings
) -> Manifest:
    """The pod of an engine. ``model_id``: the one model that it serves; empty: the base with adapters."""
    arguments = [
        "serve",
        "--base",
        base,
        "--namespace",
        namespace,
        "--bucket",
        settings.storage_bucket,
        "--region",
        settings.storage_region,
    ]
    arguments += ["--port", str(names.ENGINE_PORT)]
    for flag, value in (("--prefix", settings.storage_prefix), ("--endpoint", settings.storage_endpoint), ("--model-id", model_id)):
        arguments += [flag, value] if value else []
    volumes, mounts = _secret_files(
        {names.STORAGE_CREDENTIALS: settings.storage_secret} | ({names.MODEL_CREDENTIALS: credentials} if credentials else {})
    )
    claimed, claim_mounts = _claims([claim_of(base)])
    probe = {"httpGet": {"path": "/health", "port": names.ENGINE_PORT}, "timeoutSeconds": 5}
    container = _container(
        "engine", settings.trainer_image, settings, arguments=arguments, resources=resources(cpu, memory, "nvidia.com/gpu", gpus)
    )
    return {
        "terminationGracePeriodSeconds": 30,
        **pod_safety(),
        **_present(runtimeClassName=settings.runtime_class(gpus)),
        "containers": [
            container
            | {
                "ports": [{"name": "http", "containerPort": names.ENGINE_PORT}],
                # A large model takes long to load: liveness waits for the start-up probe, and that waits for an hour.
                "startupProbe": probe | {"periodSeconds": 2, "failureThreshold": 1800},
                "readinessProbe": probe | {"periodSeconds": 5},
                "livenessProbe": probe | {"periodSeconds": 20, "failureThreshold": 6},
                "volumeMounts": [*mounts, *claim_mounts, {"name": "scratch", "mountPath": names.SCRATCH}],
                "env": _environment(cpu),
            }
        ],
        "volumes": [*volumes, *claimed, {"name": "scratch", "emptyDir": {}}],
    }


def event(about: Identity, *, reason: str, message: str, warning: bool, stamp: str, unique: str) -> Manifest:
    """A core/v1 Event. ``stamp``: RFC 3339 time; ``unique`` makes the same event the same object when it is told twice."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{about.name[:200]}.{unique}", "namespace": about.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": about.kind,
            "name": about.name,
            "namespace": about.namespace,
            "uid": about.uid,
        },
        "reason": reason,
        "message": message[:1024],
        "type": "Warning" if warning else "Normal",
        "source": {"component": names.OPERATOR_MANAGER},
        "reportingComponent": names.OPERATOR_MANAGER,
        "reportingInstance": names.OPERATOR_MANAGER,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }


def digest_of(manifest: Manifest) -> str:
    """A short address of a manifest's content, to see whether it changed."""
    return hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
