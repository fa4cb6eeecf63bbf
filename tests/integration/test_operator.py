"""The operator as a process against a real API server: a job's life, and what can come in between."""

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import ARTIFACT, MEASURED, PREPARED_WITH_TEST, JobBuilder, a_dataset, a_job, failure
from tests.support.control import Api, Manifest, Operator, Proxy, control_plane, eventually, operator
from tests.support.kubelet import Ended, Kubelet, trains_well
from tunewright_crds import names
from tunewright_crds.errors import ExitCode, FailureCode
from tunewright_crds.names import Role
from tunewright_crds.pod import Outcome, PodConfig, Published


@pytest.fixture(scope="module")
def plane() -> Api:
    return control_plane()


@pytest.fixture
async def world(plane: Api, tmp_path: Path) -> AsyncIterator["Here"]:
    async with plane as api, Proxy(api) as proxy:
        namespace = await api.make_namespace()
        async with Kubelet(api, namespace) as kubelet:
            yield Here(api, proxy, kubelet, namespace, tmp_path)
        await api.empty(namespace)


class Here:
    """One namespace with everything around it."""

    def __init__(self, api: Api, proxy: Proxy, kubelet: Kubelet, namespace: str, folder: Path) -> None:
        self.api, self.proxy, self.kubelet, self.namespace, self.folder = api, proxy, kubelet, namespace, folder

    def operator(self, **settings: str) -> contextlib.AbstractAsyncContextManager[Operator]:
        return operator(self.proxy.kubeconfig(self.folder), self.namespace, self.folder, **settings)

    async def apply(self, job: JobBuilder) -> Manifest:
        job.manifest["metadata"]["namespace"] = self.namespace
        return await self.api.create(job.manifest)

    async def status(self, name: str = "a", kind: str = "InstructionTuningJob") -> dict[str, Any]:
        job = await self.api.find(kind, self.namespace, name)
        found: dict[str, Any] = (job or {}).get("status") or {}
        return found

    async def until(
        self, what: str, holds: Callable[[dict[str, Any]], bool], one: Operator, name: str = "a", kind: str = "InstructionTuningJob"
    ) -> dict[str, Any]:
        """The status of a job or an InstructionDataset, once it is so."""

        async def look() -> dict[str, Any] | None:
            status = await self.status(name, kind)
            return status if holds(status) else None

        found = await eventually(what, look, context=one.tail)
        assert found
        return found


def phase(wanted: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: status.get("phase") == wanted


def runs_on(role: Role, attempt: int, name: str) -> Ended | None:
    """Data is prepared; training goes on until it is stopped."""
    return trains_well(role, attempt, name) if role is Role.PREPARE else None


def trains(status: dict[str, Any]) -> bool:
    return any(entry["type"] == "Training" and entry["status"] == "True" for entry in status.get("conditions", ()))


async def test_a_jobs_whole_life_takes_eight_writes_and_two_events(world: Here) -> None:
    world.kubelet.follow(runs_on)
    async with world.operator(LEASE_SECONDS="60") as one:  # so long that no pause of a busy machine makes it repeat anything
        await world.apply(a_job())
        await world.until("the attempt runs", trains, one)
        world.kubelet.follow(trains_well)
        status = await world.until("done", phase("Succeeded"), one)
        model = await world.api.find("TunedModel", world.namespace, "a")

        async def told() -> bool:
            code, page = await one.probe("/metrics")
            return code == 200 and f'tunewright_jobs{{namespace="{world.namespace}",phase="Succeeded"}} 1.0' in page

        await eventually("the metrics tell it", told, context=one.tail)
        assert await one.stop() == 0
    assert model is not None
    assert model["spec"]["version"] == status["model"]["version"]
    assert (status["attempts"][0]["reason"], status["attempts"][0]["reachedStep"]) == ("Succeeded", 100)
    assert (world.kubelet.made(Role.PREPARE), world.kubelet.made(Role.TRAIN)) == (["a-prepare"], ["a-train-1"])
    writes = [write for write in world.proxy.writes if world.namespace in write and "tunedmodels/a/status" not in write]
    assert len([write for write in writes if write.endswith("/events")]) <= 2, writes
    assert len([write for write in writes if not write.endswith("/events")]) <= 8, writes


async def test_many_jobs_train_on_what_one_instruction_dataset_prepared(world: Here) -> None:
    world.kubelet.follow(lambda role, attempt, name: None)  # everything takes its time
    async with world.operator() as one:
        for name in ("a", "b"):
            await world.apply(a_job(name).with_spec(dataset={"ref": "d"}))
            await world.until("it waits", lambda status: "there is no InstructionDataset d" in str(status), one, name)
        made = await world.api.create(a_dataset("d", world.namespace, ttlSecondsAfterLastUse=0))
        for name in ("a", "b"):
            await world.until("it hears what it waits for", lambda status: "d is preparing" in str(status), one, name)
        await world.until("it counts them", lambda status: status.get("users") == 2, one, "d", "InstructionDataset")
        world.kubelet.follow(runs_on)
        for name in ("a", "b"):
            await world.until("it trains", trains, one, name)
        begin = time.monotonic()
        await world.apply(a_job("c").with_spec(dataset={"ref": "d"}))
        status = await world.until("the third job trains", lambda status: bool(status.get("attempts")), one, "c")
        print(f"a job over data that is ready: its training Job is made {time.monotonic() - begin:.2f} s after it was applied")
        assert status["dataset"] == await dataset_of(world)
        _, page = await one.probe("/metrics")
        assert f'tunewright_datasets{{namespace="{world.namespace}",phase="Ready"}} 1.0' in page
        world.kubelet.follow(trains_well)
        for name in ("a", "b", "c"):
            await world.until("done", phase("Succeeded"), one, name)

        async def gone() -> bool:
            return await world.api.find("InstructionDataset", world.namespace, "d") is None

        await eventually("unused, it goes", gone, context=one.tail)
    assert world.kubelet.made(Role.PREPARE) == ["d-prepare-dataset"], "prepared once"
    events = [
        event for event in await world.api.list("Event", world.namespace) if event["involvedObject"]["uid"] == made["metadata"]["uid"]
    ]
    assert [(event["involvedObject"]["kind"], event["reason"]) for event in events] == [("InstructionDataset", "DataPrepared")]


def publishes_whole_models(role: Role, attempt: int, name: str) -> Ended | None:
    """Everything works, and what is published is a whole model."""
    ended = trains_well(role, attempt, name)
    if role is not Role.TRAIN or ended is None:
        return ended
    artifact = Published(kind="merged", uri=f"s3://tunewright/models/{name}/merged", digest=name)
    return Ended(Outcome(attempt=attempt, resumed_from_step=0, reached_step=100, artifact=artifact))


async def test_jobs_that_are_made_of_one_another_wait_for_one_another(world: Here) -> None:
    """Applied in the wrong order and all at once; the first one fails, and is applied anew."""
    broken = Ended(failure(FailureCode.DATA_INVALID, "row 3"), 65)
    world.kubelet.follow(lambda role, attempt, name: broken)
    async with world.operator() as one:
        await world.apply(a_job("third").with_spec(model={"uri": "model://helper"}))
        await world.until("it waits", lambda status: "no other job that makes it" in str(status), one, "third")
        await world.apply(a_job("second").with_spec(model={"uri": "model://first"}, output={"modelName": "helper"}))
        await world.until(
            "it hears who makes its model", lambda status: "job second, which makes it, is pending" in str(status), one, "third"
        )
        await world.apply(a_job("first"))
        await world.until("it hears of the failure", lambda status: "job first failed (DataInvalid: row 3)" in str(status), one, "second")
        world.kubelet.follow(publishes_whole_models)
        await world.api.delete("InstructionTuningJob", world.namespace, "first", propagationPolicy="Background")
        await world.kubelet.collect_garbage()
        await world.apply(a_job("first"))
        status = await world.until("the last one is done", phase("Succeeded"), one, "third")
        models = {name: (await world.api.find("TunedModel", world.namespace, name) or {})["spec"] for name in ("first", "helper", "third")}
    assert [taken["uri"] for taken in status["takenModels"]] == ["s3://tunewright/models/second/merged"]
    assert models["third"]["base"]["uri"] == "s3://tunewright/models/second/merged"
    assert models["third"]["source"]["models"] == [f"model://helper@{models['helper']['version']}"]
    assert models["helper"]["source"]["models"] == [f"model://first@{models['first']['version']}"]


def measures(role: Role, attempt: int, name: str) -> Ended | None:
    """Of data with rows to test with; the model of a job that is called `poor` is not good enough."""
    if role is Role.PREPARE:
        return Ended(PREPARED_WITH_TEST)
    if role is not Role.EVALUATE:
        return trains_well(role, attempt, name)
    missed = failure(FailureCode.QUALITY_TOO_LOW, "f1 is 0.2, and at least 0.5 is required", evaluation=MEASURED.evaluation)
    return Ended(missed, ExitCode.QUALITY) if name == "poor" else Ended(MEASURED)


async def test_a_model_is_registered_with_what_was_measured_of_it_if_it_is_good_enough(world: Here) -> None:
    world.kubelet.follow(measures)
    required = {
        "evaluation": {"require": [{"metric": "f1", "min": 0.5}]},
        "dataset": {"sources": [{"uri": "s3://data/rows.jsonl"}], "testFraction": 0.1},
    }
    async with world.operator() as one:
        for name in ("good", "poor"):
            await world.apply(a_job(name).with_spec(**required))
        good = await world.until("the good one is done", phase("Succeeded"), one, "good")
        poor = await world.until("the poor one is not", phase("Failed"), one, "poor")
        models = [await world.api.find("TunedModel", world.namespace, name) for name in ("good", "poor")]
    assert models[0] is not None
    assert models[0]["spec"]["metrics"] == good["evaluation"]["metrics"] == poor["evaluation"]["metrics"]
    assert models[1] is None
    assert (poor["error"]["code"], poor["model"]["uri"]) == ("QualityTooLow", ARTIFACT.uri)
    assert sorted(name for name in world.kubelet.jobs.values() if "poor" in name) == ["poor-evaluate", "poor-prepare", "poor-train-1"]


async def test_what_several_pods_read_side_by_side_is_joined_and_trained_on(world: Here) -> None:
    async with world.operator() as one:
        await world.apply(a_job().with_spec(dataset={"sources": [{"uri": "s3://data/*.jsonl"}], "shards": 3}))
        await world.until("done", phase("Succeeded"), one)
    assert sorted(world.kubelet.jobs.values()) == ["a-prepare", "a-shards", "a-train-1"]
    assert world.kubelet.shards("a-shards") == 3


async def test_pods_that_train_together_find_one_another_and_are_let_through(world: Here) -> None:
    """A name with a dot is no hostname, and one that begins with a digit is none of a Service."""
    async with world.operator() as one:
        await world.apply(a_job("7b.v2").with_spec(resources={"nodes": 3}))
        await world.until("done", phase("Succeeded"), one, "7b.v2")
        (made,) = [job for job in await world.api.list("Job", world.namespace) if job["metadata"]["labels"][names.LABEL_ROLE] == Role.TRAIN]
        pod = made["spec"]["template"]["spec"]
        kinds = ("Service", "NetworkPolicy")
        service, policy = [await world.api.find(kind, world.namespace, pod["subdomain"]) for kind in kinds]
    assert (made["spec"]["completionMode"], made["spec"]["completions"], made["spec"]["parallelism"]) == ("Indexed", 3, 3)
    told = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert told[names.MASTER_ADDR] == f"{made['metadata']['name']}-0.{pod['subdomain']}"
    assert service
    assert policy
    for selector in (service["spec"]["selector"], policy["spec"]["podSelector"]["matchLabels"]):
        assert selector.items() <= made["spec"]["template"]["metadata"]["labels"].items()
    assert all(body["metadata"]["ownerReferences"][0]["name"] == "7b.v2" for body in (service, policy))


async def test_an_instruction_dataset_takes_its_data_with_it(world: Here) -> None:
    world.kubelet.follow(lambda role, attempt, name: None)
    found = functools.partial(world.api.find, "InstructionDataset", world.namespace, "d")
    async with world.operator() as one:
        made = await world.api.create(a_dataset("d", world.namespace, deletionPolicy="Delete"))
        await world.until("it is being prepared", phase("Preparing"), one, "d", "InstructionDataset")
        assert ((await found()) or {})["metadata"]["finalizers"] == [names.FINALIZER]
        world.kubelet.follow(runs_on)  # what discards runs on
        await world.until("it is ready", phase("Ready"), one, "d", "InstructionDataset")
        await world.api.delete("InstructionDataset", world.namespace, "d")
        discard = names.discard_name("d", made["metadata"]["uid"])
        body = await eventually("its data is being removed", lambda: world.api.find("Job", world.namespace, discard), context=one.tail)
        assert body
        assert "ownerReferences" not in body["metadata"]
        assert await found(), "it stays until that is done"
        world.kubelet.follow(trains_well)

        async def gone() -> bool:
            return await found() is None

        await eventually("it goes", gone, context=one.tail)
        assert "Refused" not in one.tail()
    assert world.kubelet.made(Role.PREPARE) == ["d-prepare-dataset"]


async def dataset_of(world: Here) -> dict[str, Any]:
    """What a job tells of the data that the InstructionDataset prepared."""
    told: dict[str, Any] = (await world.status("d", "InstructionDataset"))["dataset"]
    return told | {"reused": True}


async def test_suspended_resumed_and_cancelled_as_its_owner_wishes(world: Here) -> None:
    world.kubelet.follow(runs_on)
    async with world.operator() as one:
        await world.apply(a_job())
        await world.until("the attempt runs", trains, one)
        await world.api.patch("InstructionTuningJob", world.namespace, "a", {"spec": {"suspend": True}})
        status = await world.until(
            "held, with a checkpoint", lambda status: phase("Suspended")(status) and "endTime" in status["attempts"][0], one
        )
        assert (status["attempts"][0]["reason"], status["lastCheckpoint"]["step"]) == ("Suspended", 40)
        await world.api.patch("InstructionTuningJob", world.namespace, "a", {"spec": {"suspend": False}})
        await world.until("the second attempt runs", lambda status: trains(status) and len(status["attempts"]) == 2, one)
        await world.api.patch("InstructionTuningJob", world.namespace, "a", {"spec": {"cancel": True}})
        status = await world.until("cancelled", phase("Cancelled"), one)
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Suspended", "Cancelled"]
    assert await world.api.find("TunedModel", world.namespace, "a") is None


async def test_an_operator_that_starts_again_in_the_middle_changes_nothing(world: Here) -> None:
    world.kubelet.follow(runs_on)
    async with world.operator() as one:
        await world.apply(a_job())
        before = await world.until("the attempt runs", trains, one)
        one.kill()
        await one.running.wait()
        written = len(world.proxy.writes)
        await one.start()

        async def leads() -> bool:
            code, page = await one.probe("/metrics")
            return code == 200 and f'tunewright_jobs{{namespace="{world.namespace}",phase="Training"}} 1.0' in page

        await eventually("it knows the job", leads, context=one.tail)
        # A pass over another job ends after those over the first: nothing is left to be done for that one.
        await world.apply(a_job("b"))
        await world.until("the other job trains", trains, one, "b")
        assert await world.status() == before
        assert [write for write in world.proxy.writes[written:] if write.endswith("/a/status")] == []
        world.kubelet.follow(trains_well)
        await world.until("done", phase("Succeeded"), one)
    assert world.kubelet.made(Role.TRAIN) == ["a-train-1", "b-train-1"]


async def test_a_job_made_anew_under_the_same_name_is_another_job(world: Here) -> None:
    world.kubelet.follow(runs_on)
    async with world.operator() as one:
        first = await world.apply(a_job())
        await world.until("the attempt runs", trains, one)
        await world.api.delete("InstructionTuningJob", world.namespace, "a", propagationPolicy="Background")
        second = await world.apply(a_job())

        def waits(status: dict[str, Any]) -> bool:
            return any("stands in the way" in entry["message"] for entry in status.get("conditions", ()))

        await world.until("it waits for the old children to go", waits, one)
        await world.kubelet.collect_garbage()
        world.kubelet.follow(trains_well)
        status = await world.until("done", phase("Succeeded"), one)
    assert status["model"]["version"].endswith(second["metadata"]["uid"][:8])
    assert first["metadata"]["uid"] != second["metadata"]["uid"]
    assert world.kubelet.made(Role.TRAIN) == ["a-train-1", "a-train-1"], "one for each of the two jobs"


async def test_without_the_api_server_health_says_so_and_afterwards_everything_goes_on(world: Here) -> None:
    world.kubelet.follow(runs_on)
    async with world.operator(HEALTH_SECONDS="2") as one:
        await world.apply(a_job())
        await world.until("the attempt runs", trains, one)

        async def healthy() -> bool:
            return (await one.probe("/healthz"))[0] == 200

        async def ill() -> bool:
            code, text = await one.probe("/healthz")
            return code == 503 and "nothing was heard" in text

        await eventually("it is well", healthy, context=one.tail)
        world.proxy.die()
        await eventually("it says that it hears nothing", ill, context=one.tail)
        world.kubelet.follow(trains_well)  # the attempt ends, and a new job comes, while nobody can look
        await world.apply(a_job("b"))
        world.proxy.revive()
        await eventually("it is well again", healthy, context=one.tail)
        await world.until("the first job ends", phase("Succeeded"), one)
        await world.until("the second job ends", phase("Succeeded"), one, "b")
        assert one.running.returncode is None, one.tail()
    assert world.kubelet.made(Role.TRAIN) == ["a-train-1", "b-train-1"]


async def test_a_job_that_the_api_server_will_not_have_done_holds_up_nobody(world: Here) -> None:
    async with world.operator() as one:
        poison = a_job("poison").with_spec(resources={"nodeSelector": {"not a label!": "x"}})
        await world.apply(poison)
        for number in range(20):
            await world.apply(a_job(f"good-{number}"))
        for number in range(20):
            await world.until("done", phase("Succeeded"), one, f"good-{number}")

        def refused(status: dict[str, Any]) -> bool:
            return any("was refused" in entry["message"] for entry in status.get("conditions", ()))

        status = await world.until("the poisoned one says why", refused, one, "poison")
    assert status["phase"] == "Preparing"


async def test_of_two_replicas_one_leads_and_the_other_takes_over_when_it_is_killed(world: Here) -> None:
    world.kubelet.follow(runs_on)
    async with world.operator(IDENTITY="one", LEASE_SECONDS="8") as one:
        await world.apply(a_job())
        await world.until("the attempt runs", trains, one)
        async with world.operator(IDENTITY="two", LEASE_SECONDS="8") as two:

            async def stands_by() -> bool:
                return (await two.probe("/readyz"))[0] == 200

            async def leads() -> bool:
                return "tunewright_leader 1.0" in (await two.probe("/metrics"))[1]

            await eventually("the second is ready", stands_by, context=two.tail)
            assert not await leads(), "it leads although the first one lives"
            one.kill()
            await eventually("the second leads", leads, context=two.tail)
            world.kubelet.follow(trains_well)
            await world.until("done", phase("Succeeded"), two)
            assert await two.stop() == 0
    assert world.kubelet.made(Role.TRAIN) == ["a-train-1"]
    lease = await world.api.find("Lease", world.namespace, "tunewright-operator")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == "", "given back"


async def test_pods_of_a_job_on_gpus_are_told_the_memory_of_the_largest_that_it_may_get(world: Here) -> None:
    pool = {"pool": world.namespace}
    nodes = {f"{world.namespace}-{gib}": gib for gib in (24, 80)}
    try:
        for name, gib in nodes.items():
            labels = pool | {"nvidia.com/gpu.memory": str(gib * 1024)}
            await world.api.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
            await world.api.patch("Node", "", name, {"status": {"allocatable": {"nvidia.com/gpu": "1"}}}, "status")
        async with world.operator() as one:
            await world.apply(a_job().with_spec(resources={"gpusPerNode": 1, "nodeSelector": pool}))
            await world.until("done", phase("Succeeded"), one)
        config = (await world.api.list("ConfigMap", world.namespace, f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"))[0]
        assert PodConfig.model_validate_json(config["data"][names.CONFIG_KEY]).gpu_memory == 80 * 2**30
    finally:
        for name in nodes:
            await world.api.delete("Node", "", name)
