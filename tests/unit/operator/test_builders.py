"""What the operator's manifests promise: restricted pods, no GPU before the data is ready, and the same answer however often they are asked for."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.builders import START, a_job, settings
from tunewright_crds import names
from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.job import JobSpec, read_spec
from tunewright_crds.pod import PodConfig, Published
from tunewright_crds.tuned_model import Serving
from tunewright_operator import builders
from tunewright_operator.observed import Identity, owner_uid
from tunewright_operator.settings import Settings

JOB = Identity("ns", "a", "12345678-aaaa", 1, 1, START, False, "InstructionTuningJob")


def spec(**fields: Any) -> JobSpec:
    return read_spec(a_job().with_spec(**fields).manifest["spec"])


def pods(wanted: JobSpec, chosen: Settings, job: Identity = JOB, *, halvings: int = 0) -> tuple[Any, Any]:
    """The pods of preparation and training."""
    config = builders.pod_config(job, wanted, chosen)
    prepare = builders.prepare_job(config, job, chosen)
    train = builders.training_job(config, job, chosen, attempt=3, dataset="d1", halvings=halvings)
    return prepare["spec"]["template"]["spec"], train["spec"]["template"]["spec"]


def engine(**fields: Any) -> Any:
    """The pod of an engine."""
    told = {"base": "s3://models/b/", "namespace": "ns", "model_id": "", "credentials": "", "cpu": "1500m", "memory": "4Gi", "gpus": 0}
    return builders.serving_pod(**{**told, "settings": settings(gpu_runtime_class="nvidia"), **fields})


def test_every_pod_meets_the_restricted_standard_and_has_no_token_of_the_api_server() -> None:
    discard = builders.discard_job(builders.pod_config(JOB, spec(), settings()), JOB, settings(), digest="d1")
    for pod in (*pods(spec(), settings()), engine(), discard["spec"]["template"]["spec"]):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == builders.USER
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert {next(key for key in volume if key != "name") for volume in pod["volumes"]} <= {
            "secret",
            "configMap",
            "emptyDir",
            "projected",
            "downwardAPI",
        }


def test_pods_read_secrets_as_files_and_the_progress_token_is_good_for_nothing_else() -> None:
    wanted = spec(
        model={"uri": "s3://models/b/", "credentialsSecret": "model-keys"},
        dataset={"sources": [{"uri": "s3://data/x.jsonl"}], "credentialsSecret": "data-keys"},
    )
    _, pod = pods(wanted, settings(storage_secret="keys"))
    mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for path, secret in (
        (names.STORAGE_CREDENTIALS, "keys"),
        (names.MODEL_CREDENTIALS, "model-keys"),
        (names.DATASET_CREDENTIALS, "data-keys"),
    ):
        assert volumes[mounted[path]]["secret"] == {"secretName": secret, "optional": True, "defaultMode": 0o440}
    token = volumes["progress"]["projected"]["sources"][0]["serviceAccountToken"]
    assert token["audience"] == names.PROGRESS_AUDIENCE
    assert all("valueFrom" not in variable for variable in pod["containers"][0]["env"])


CLAIMED = spec(
    model={"uri": "pvc://models/llama/"},
    dataset={
        "sources": [{"uri": "pvc://data.v1/a.jsonl"}, {"uri": "pvc://data.v1/b/*.jsonl"}, {"uri": "s3://data/x.jsonl"}],
        "cleaning": {"decontaminate": {"enabled": True, "against": ["pvc://benchmarks/"]}},
    },
)


def test_pods_mount_the_claims_that_they_read_from_and_cannot_write_to_them() -> None:
    prepare, train = pods(CLAIMED, settings())
    for pod, claims in (
        (prepare, ["benchmarks", "data.v1", "models"]),
        (train, ["models"]),
        (engine(base="pvc://models/llama/"), ["models"]),
        (engine(), []),
    ):
        volumes = {volume["name"]: volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        assert [volume["claimName"] for volume in volumes.values()] == claims
        assert all(volume["readOnly"] for volume in volumes.values())
        mounts = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] in volumes]
        assert mounts == [
            {"name": f"claim-{number}", "mountPath": f"/volumes/{claim}", "readOnly": True} for number, claim in enumerate(claims)
        ]


def test_a_job_of_more_claims_than_a_pod_mounts_is_refused() -> None:
    sources = [{"uri": f"pvc://c{number}/x.jsonl"} for number in range(8)]
    assert len(spec(dataset={"sources": sources}).dataset.claims) == 8
    with pytest.raises(ValidationError, match=r"lie on 9 volumes .* a pod mounts at most 8"):
        spec(dataset={"sources": sources}, model={"uri": "pvc://models/x/"})


@pytest.mark.parametrize("uri", ["pvc://claim", "pvc:///x", "pvc://Claim/x", "pvc://-a/x", "pvc://a/x\n"])
def test_an_address_that_names_no_claim_is_refused(uri: str) -> None:
    with pytest.raises(ValidationError, match=r"pvc://claim/path"):
        spec(model={"uri": uri})


def test_only_training_asks_for_a_gpu_its_runtime_and_its_priority() -> None:
    wanted = spec(resources={"gpusPerNode": 1, "gpuResource": "example.com/gpu", "cpu": "1500m", "priorityClassName": "high"})
    prepare, train = pods(wanted, settings(gpu_runtime_class="nvidia"))
    assert train["containers"][0]["resources"]["limits"]["example.com/gpu"] == "1"
    assert (train["runtimeClassName"], train["priorityClassName"]) == ("nvidia", "high")
    assert "example.com/gpu" not in prepare["containers"][0]["resources"]["limits"]
    assert "runtimeClassName" not in prepare
    assert "priorityClassName" not in prepare
    assert {"name": "OMP_NUM_THREADS", "value": "2"} in train["containers"][0]["env"]
    assert "runtimeClassName" not in engine()
    assert engine(gpus=2)["runtimeClassName"] == "nvidia"


def test_a_runtime_class_for_all_holds_for_gpus_too_unless_they_have_their_own() -> None:
    for gpu_class, expected in (("", ("sandbox", "sandbox")), ("nvidia", ("sandbox", "nvidia"))):
        chosen = settings(trainer_runtime_class="sandbox", gpu_runtime_class=gpu_class)
        assert tuple(pod["runtimeClassName"] for pod in pods(spec(resources={"gpusPerNode": 1}), chosen)) == expected


def test_what_a_job_asks_of_its_node_reaches_its_pods() -> None:
    toleration = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    wanted = spec(
        resources={
            "nodeSelector": {"disk": "fast"},
            "tolerations": [toleration],
            "serviceAccountName": "trainer",
            "image": "own:1",
            "scratch": "7Gi",
        }
    )
    for pod in pods(wanted, settings(grace_seconds=77, trainer_image_pull_policy="Never")):
        assert (pod["nodeSelector"], pod["tolerations"], pod["serviceAccountName"]) == ({"disk": "fast"}, [toleration], "trainer")
        assert (pod["terminationGracePeriodSeconds"], pod["restartPolicy"]) == (77, "Never")
        assert (pod["containers"][0]["image"], pod["containers"][0]["imagePullPolicy"]) == ("own:1", "Never")
        assert {"name": "scratch", "emptyDir": {"sizeLimit": "7Gi"}} in pod["volumes"]


@pytest.mark.parametrize(("halvings", "flags"), [(0, []), (2, ["--halvings", "2"])])
def test_the_trainer_is_told_its_attempt_its_data_and_how_often_the_micro_batch_is_halved(halvings: int, flags: list[str]) -> None:
    prepare, train = pods(spec(), settings(), halvings=halvings)
    assert prepare["containers"][0]["args"] == ["prepare", "--config", names.CONFIG_FILE]
    assert train["containers"][0]["args"] == ["train", "--config", names.CONFIG_FILE, "--attempt", "3", "--dataset", "d1", *flags]


def test_one_job_is_one_attempt_and_belongs_to_its_job() -> None:
    config = builders.pod_config(JOB, spec(), settings())
    for manifest in (
        builders.config_map(config, JOB),
        builders.prepare_job(config, JOB, settings()),
        builders.training_job(config, JOB, settings(), attempt=1, dataset="d", halvings=0),
    ):
        assert owner_uid(manifest) == JOB.uid
        assert manifest["metadata"]["labels"][names.LABEL_JOB_UID] == JOB.uid
        if manifest["kind"] == "Job":
            assert (manifest["spec"]["backoffLimit"], manifest["spec"]["podReplacementPolicy"]) == (0, "Failed")


def test_the_config_is_immutable_and_reads_back_as_it_was_written() -> None:
    config = builders.pod_config(
        JOB, spec(hyperparameters={"learningRate": 0.003}), settings(storage_prefix="p", progress_url="http://api")
    )
    manifest = builders.config_map(config, JOB)
    assert manifest["immutable"] is True
    assert PodConfig.model_validate_json(manifest["data"][names.CONFIG_KEY]) == config
    assert (
        builders.config_map(builders.pod_config(JOB, config.spec, settings(storage_prefix="p", progress_url="http://api")), JOB) == manifest
    )


@pytest.mark.parametrize("read", ["hf://org/base@0123abc", ""], ids=["told by the trainer", "told by an older trainer"])
def test_a_published_model_names_the_base_that_was_read(read: str) -> None:
    config = builders.pod_config(JOB, spec(model={"uri": "hf://org/base@main"}), settings())
    artifact = Published(kind="adapter", uri="s3://b/k", digest="d", base=read)
    made = builders.tuned_model(config, artifact, step=1, dataset=DatasetStatus(), made_from=[], metrics=[], serving=Serving())
    assert made["spec"]["base"]["uri"] == (read or "hf://org/base@main")


def test_the_longest_name_gives_children_that_kubernetes_takes() -> None:
    long = Identity("ns", "x" * 253, "12345678-aaaa", 1, 1, START, False, "InstructionTuningJob")
    config = builders.pod_config(long, spec(output={"modelName": "m"}), settings())
    for manifest in (
        builders.config_map(config, long),
        builders.training_job(config, long, settings(), attempt=100, dataset="d", halvings=0),
    ):
        assert len(manifest["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values())
    told = builders.event(long, reason="R", message="m" * 5000, warning=False, stamp="t", unique="u")
    assert len(told["metadata"]["name"]) <= 253
    assert len(told["message"]) <= 1024


@pytest.mark.parametrize(("quantity", "number"), [("500m", 0.5), ("2", 2), ("1.5Gi", 1.5 * 2**30), ("3k", 3000), ("4Ti", 2**42)])
def test_quantities_are_read_as_kubernetes_reads_them(quantity: str, number: float) -> None:
    assert builders.amount(quantity) == pytest.approx(number)


def test_only_training_pods_hold_what_results_are_sent_away_with() -> None:
    tracking = {"mlflow": {"uri": "https://m", "credentialsSecret": "m"}, "wandb": {"project": "p", "credentialsSecret": "w"}}
    wanted = spec(tracking=tracking, output={"hub": {"repository": "a/b", "credentialsSecret": "h"}})
    prepare, train = pods(wanted, settings())
    secrets = [{volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume} for pod in (prepare, train)]
    assert secrets[1] - secrets[0] == {"m", "w", "h"}
    mounts = {mount["mountPath"] for mount in train["containers"][0]["volumeMounts"]}
    assert {names.MLFLOW_CREDENTIALS, names.WANDB_CREDENTIALS, names.HUB_CREDENTIALS} <= mounts
