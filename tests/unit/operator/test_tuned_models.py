"""Jobs and InstructionDatasets that name tuned models (``model://``): what they wait for, what they take, and that they keep it."""

from typing import Any, cast

import pytest

from tests.support.builders import PREPARED, TRAINED, Around, DatasetWorld, World, a_dataset, a_job, a_model, failure, settings
from tunewright_crds.errors import FailureCode
from tunewright_crds.names import DatasetPhase, Phase
from tunewright_crds.pod import PodConfig
from tunewright_crds.status import PublishedForm
from tunewright_operator.builders import Manifest
from tunewright_operator.cluster import Cluster
from tunewright_operator.conditions import condition, holds
from tunewright_operator.controller import Controller
from tunewright_operator.engines import Engines
from tunewright_operator.metrics import Metrics
from tunewright_operator.observed import Awaited, Job, Prepared, Served
from tunewright_operator.stores import Stores

GOING = {"deletionTimestamp": "2026-03-01T12:00:00Z"}


def maker(name: str = "m", phase: str = "", created: str = "2026-03-01T12:00:00Z", **status: Any) -> Job:
    """A job that publishes ``m``."""
    body = a_job(name).manifest
    told = {"phase": phase, **status} if phase else {}
    return Job.of(body | {"metadata": body["metadata"] | {"uid": f"uid-{name}", "creationTimestamp": created}, "status": told})


def awaiting(model: Manifest | None = None, *makers: Job) -> dict[str, Awaited]:
    return {"m": Awaited(Served.of(model) if model else None, makers)}


def naming(uri: str = "model://m", **spec: Any) -> World:
    return World(a_job().with_spec(model={"uri": uri}, **spec))


def told_to_pods(world: Around[Any]) -> list[str]:
    """The base model in every config that pods were given."""
    made = [body for plan in world.plans for body in plan.create if body["kind"] == "ConfigMap"]
    return [PodConfig.model_validate_json(body["data"]["job.json"]).spec.model.uri for body in made]


FAILED_MAKER = {"code": "DataEmpty", "message": "no row is left"}
WAITING: dict[str, tuple[str, dict[str, Awaited], str]] = {
    "for one that nobody makes": ("model://m", awaiting(), "there is no TunedModel m in this namespace, and no other job that makes it"),
    "for a job that nobody has looked at": (
        "model://m",
        awaiting(None, maker()),
        "TunedModel m is not there yet: job m, which makes it, is pending",
    ),
    "for a job that trains": (
        "model://m",
        awaiting(None, maker(phase="Training")),
        "TunedModel m is not there yet: job m, which makes it, is training",
    ),
    "for a job that failed": (
        "model://m",
        awaiting(None, maker(phase="Failed", error=FAILED_MAKER)),
        "TunedModel m is not there: job m failed (DataEmpty: no row is left); mend it and apply it anew",
    ),
    "for a job that tries again what another failed at": (
        "model://m",
        awaiting(None, maker("old", "Preparing"), maker("new", "Failed", "2026-04-01T12:00:00Z", error=FAILED_MAKER)),
        "TunedModel m is not there yet: job old, which makes it, is preparing",
    ),
    "for a job that was cancelled": (
        "model://m",
        awaiting(None, maker(phase="Cancelled")),
        "TunedModel m is not there: job m was cancelled; apply it anew",
    ),
    "for a model that was deleted": (
        "model://m",
        awaiting(None, maker(phase="Succeeded")),
        "TunedModel m is not there any more: job m made it; apply that anew",
    ),
    "for a model that is going": (
        "model://m",
        awaiting(a_model() | {"metadata": {"name": "m", "namespace": "ns", **GOING}}),
        "TunedModel m is being deleted",
    ),
    "for a version that nobody makes": (
        "model://m@v2",
        awaiting(a_model(), maker(phase="Succeeded")),
        "TunedModel m has version v1, not v2",
    ),
    "for a version to come": (
        "model://m@v2",
        awaiting(a_model(), maker("next", "Training")),
        "TunedModel m has version v1, not v2; job next is to publish another one",
    ),
}


@pytest.mark.parametrize(("uri", "awaited", "message"), WAITING.values(), ids=WAITING)
def test_a_job_waits(uri: str, awaited: dict[str, Awaited], message: str) -> None:
    world = naming(uri, activeDeadlineSeconds=100)
    world.awaited = awaited
    world.settle()
    told = condition(world.status.conditions, "ModelReady")
    assert told is not None
    assert (told.status, told.reason, told.message) == ("False", "WaitingForModel", message)
    assert (world.status.phase, world.batches, world.status.taken_models) == (Phase.PENDING, {}, [])
    world.pass_time(101).settle()
    assert world.status.error is not None
    assert world.status.error.code == "DeadlineExceeded", "the deadline counts"


BOTH = [{"kind": kind, "uri": f"s3://tunewright/ns/models/m/v1/{kind}", "digest": f"v1-{kind}"} for kind in ("adapter", "merged")]
TAKEN: dict[str, tuple[str, Manifest, str]] = {
    "a merged model": ("model://m", a_model(), "merged"),
    "a model of which every weight was tuned": ("model://m", a_model(kind="full"), "full"),
    "the version that is named": ("model://m@v1", a_model(), "merged"),
    "the merged form beside a served adapter": ("model://m", a_model(kind="adapter", forms=BOTH), "merged"),
}


@pytest.mark.parametrize(("uri", "model", "form"), TAKEN.values(), ids=TAKEN)
def test_what_is_taken_is_what_pods_are_told_of(uri: str, model: Manifest, form: str) -> None:
    world = naming(uri)
    world.settle()
    world.awaited = awaiting(model)
    world.settle()
    (taken,) = world.status.taken_models
    address = f"s3://tunewright/ns/models/m/v1/{form}"
    assert taken.model_dump() == {"field": "spec.model.uri", "name": "m", "version": "v1", "uri": address, "digest": f"v1-{form}"}
    assert (world.status.phase, told_to_pods(world)) == (Phase.PREPARING, [address])
    assert holds(world.status.conditions, "ModelReady")


def test_a_new_version_or_a_deletion_changes_nothing_for_a_job_that_has_taken_its_model() -> None:
    world = naming()
    world.awaited = awaiting(a_model())
    world.settle()
    world.awaited = awaiting(a_model(version="v2"))
    world.finish("a-prepare", failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69).settle()
    world.collect().pass_time(60).settle()
    world.finish("a-prepare", PREPARED).settle()
    world.awaited = awaiting()
    world.finish("a-train-1", failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69).settle()
    world.pass_time(600).settle()
    world.finish("a-train-2", TRAINED).settle()
    assert set(told_to_pods(world)) == {"s3://tunewright/ns/models/m/v1/merged"}
    assert world.status.phase is Phase.SUCCEEDED
    assert world.model is not None
    assert world.model["spec"]["base"]["uri"] == "s3://tunewright/ns/models/m/v1/merged"
    assert world.model["spec"]["source"]["models"] == ["model://m@v1"]


def test_a_suspended_job_takes_nothing_before_it_is_resumed() -> None:
    world = naming(suspend=True)
    world.awaited = awaiting(a_model())
    world.settle()
    assert (world.status.phase, world.status.taken_models) == (Phase.SUSPENDED, [])
    world.awaited = awaiting(a_model(version="v2"))
    world.change(suspend=False).settle()
    assert [taken.version for taken in world.status.taken_models] == ["v2"]


REFUSED: dict[str, tuple[Manifest, str]] = {
    "an adapter": (
        a_model(kind="adapter"),
        "TunedModel m is an adapter over s3://models/base/, and a whole model is needed: "
        "publish it with output.formats: [merged], or [adapter, merged]",
    ),
    "what nobody can read": (a_model(kind="magic"), "TunedModel m: kind: Input should be"),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_will_never_do_fails_the_job_with_advice(model: Manifest, message: str) -> None:
    world = naming()
    world.awaited = awaiting(model)
    world.settle()
    error = world.status.error
    assert error is not None
    assert (world.status.phase, error.code, error.param) == (Phase.FAILED, "ConfigInvalid", "spec.model.uri")
    assert error.message.startswith(message)
    assert world.batches == {}


def test_an_instruction_dataset_waits_too_and_a_job_that_waits_for_it_says_what_for() -> None:
    world = DatasetWorld(spec={"model": {"uri": "model://m"}})
    world.awaited = awaiting(None, maker(phase="Training"))
    world.settle()
    assert (world.status.phase, world.batches) == (DatasetPhase.PENDING, {})
    job = World(a_job().with_spec(dataset={"ref": "d"}))
    job.dataset = world.job
    job.settle()
    told = condition(job.status.conditions, "DataReady")
    assert told is not None
    assert told.message == "InstructionDataset d is pending: TunedModel m is not there yet: job m, which makes it, is training"
    world.awaited = awaiting(a_model())
    world.settle()
    assert (world.status.phase, told_to_pods(world)) == (DatasetPhase.PREPARING, ["s3://tunewright/ns/models/m/v1/merged"])
    world.finish("d-prepare-dataset", PREPARED).settle()
    assert world.status.phase is DatasetPhase.READY


def test_every_published_form_is_registered() -> None:
    world = World()
    world.settle()
    world.finish("a-prepare", PREPARED).settle()
    assert TRAINED.artifact is not None
    forms = [PublishedForm(kind=kind, uri=f"s3://b/{kind}", digest=kind) for kind in ("adapter", "merged")]
    artifact = TRAINED.artifact.model_copy(update={"forms": forms})
    world.finish("a-train-1", TRAINED.model_copy(update={"artifact": artifact})).settle()
    assert world.model is not None
    assert [form["kind"] for form in world.model["spec"]["forms"]] == ["adapter", "merged"]


# Who hears of what


def stamped(body: Manifest, version: int, **more: Any) -> Manifest:
    return body | {"metadata": body["metadata"] | {"uid": f"uid-{body['metadata']['name']}", "resourceVersion": str(version)}} | more


def controller() -> Controller:
    nobody = cast(Any, None)
    return Controller(settings(), cluster=cast(Cluster, nobody), engines=cast(Engines, nobody), stores=Stores(), metrics=Metrics())


def test_those_who_wait_hear_of_the_model_and_of_the_jobs_that_make_it() -> None:
    one = controller()

    def heard() -> tuple[int, int]:
        """Passes asked for since the last look: of jobs, of InstructionDatasets."""
        depths = one.jobs.depth, one.datasets.depth
        for queue in (one.jobs, one.datasets):
            while queue.depth:
                queue._queued.discard(queue._ready.get_nowait())
        return depths

    one.take_job(Job.of(stamped(a_job("waits").with_spec(model={"uri": "model://m"}).manifest, 1)))
    one.take_dataset(Prepared.of(stamped(a_dataset("waits-too", model={"uri": "model://m@v1"}), 2)))
    one.take_job(Job.of(stamped(a_job("other").with_spec(model={"uri": "model://n"}).manifest, 3)))
    assert heard() == (0, 0)
    making = a_job("x").with_spec(output={"modelName": "m"}).manifest
    one.take_job(Job.of(stamped(making, 4)))
    assert heard() == (1, 1), "a job that makes it was applied"
    one.take_job(Job.of(stamped(making, 5, status={"phase": "Training"})))
    assert heard() == (1, 1)
    one.take_job(Job.of(stamped(making, 6, status={"phase": "Training", "progress": {"step": 1}})))
    assert heard() == (0, 0), "its steps concern nobody"
    one.take_model(Served.of(stamped(a_model(), 7)))
    assert heard() == (1, 1)
    one.take_model(Served.of(stamped(a_model(), 8, status={"message": "x"})))
    assert heard() == (0, 0)
    taken = [{"field": "spec.model.uri", "name": "m", "version": "v1", "uri": "s3://b/k"}]
    one.take_job(Job.of(stamped(a_job("waits").with_spec(model={"uri": "model://m"}).manifest, 9, status={"takenModels": taken})))
    one.take_model(Served.of(stamped(a_model(version="v2"), 10)))
    assert heard() == (0, 1), "who has taken it no longer cares"
    one.take_job(Job.of(stamped(making, 11)), deleted=True)
    assert heard() == (0, 1)


def test_what_a_pass_sees_of_a_tuned_model_that_is_waited_for() -> None:
    stores = Stores()
    waiting = stamped(a_job("waits").with_spec(model={"uri": "model://waits"}).manifest, 1)
    stores.put_job(Job.of(waiting))

    def seen() -> Awaited | None:
        found = stores.observe(("ns", "waits"), now=World().now)
        return found.awaited.get("waits") if found else None

    assert seen() == Awaited(), "a job does not wait for itself"
    stores.put_job(Job.of(stamped(a_job("x").with_spec(output={"modelName": "waits"}).manifest, 2)))
    stores.models.put(Served.of(stamped(a_model("waits"), 3)))
    found = seen()
    assert found is not None
    assert ([job.id.name for job in found.makers], found.model is not None) == (["x"], True)
    stores.put_job(Job.of(waiting | {"metadata": waiting["metadata"] | {"resourceVersion": "4"}, "status": {"phase": "Failed"}}))
    assert seen() is None
