"""Prepared data that goes with its InstructionDataset: held until storage is free of it, and never taken from under anybody."""

import re
from typing import Any

import pytest

from tests.support.builders import PREPARED, DatasetWorld
from tunewright_crds import names
from tunewright_crds.pod import PodConfig
from tunewright_operator.conditions import condition

DISCARD = "d-discard-12345678"


def prepared(*, policy: str = "Delete", **spec: Any) -> DatasetWorld:
    """An InstructionDataset that is ready."""
    world = DatasetWorld(spec={"deletionPolicy": policy, **spec})
    world.settle()
    world.finish("d-prepare-dataset", PREPARED).settle()
    return world


def deleted(**more: int) -> DatasetWorld:
    """One that was deleted a while ago. ``more``: who else uses its data."""
    world = prepared()
    for name, value in more.items():
        setattr(world, name, value)
    world.delete().settle()
    assert world.held
    assert DISCARD not in world.batches, "a job may have taken the data a moment ago"
    world.pass_time(13).settle()
    return world


def told(world: DatasetWorld) -> str:
    ready = condition(world.status.conditions, "Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "Deleting")
    return ready.message


def events(world: DatasetWorld) -> list[tuple[str, bool]]:
    """Reasons of the events, and whether they warn."""
    return [(event.reason, event.warning) for plan in world.plans for event in plan.events]


def test_it_is_held_before_anything_is_prepared_and_only_while_its_owner_wants_that() -> None:
    world = DatasetWorld(spec={"deletionPolicy": "Delete"})
    assert world.reconcile().hold is True
    assert world.reconcile().hold is None
    world.change(deletionPolicy="Retain").settle()
    assert not world.held
    world.change(deletionPolicy="Delete").settle()
    assert world.held
    kept = prepared(policy="Retain")
    assert not kept.held
    assert [plan.hold for plan in kept.plans] == [None] * len(kept.plans)


def test_its_data_is_removed_and_then_it_goes() -> None:
    world = deleted()
    body = world.batches[DISCARD]
    assert "ownerReferences" not in body["metadata"], "it outlives its InstructionDataset"
    spec = body["spec"]
    assert (spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (2, 600)
    pod = spec["template"]["spec"]
    assert pod["containers"][0]["args"] == ["discard", "--config", names.CONFIG_FILE, "--dataset", "d1"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "config"]
    field = volume["downwardAPI"]["items"][0]
    key = re.search(r"\['(.*)'\]", field["fieldRef"]["fieldPath"])
    assert key is not None
    config = PodConfig.model_validate_json(spec["template"]["metadata"]["annotations"][key[1]])
    assert (config.job.namespace, config.storage.bucket, field["path"]) == ("ns", "tunewright", names.CONFIG_KEY)
    assert world.held
    assert "is being removed" in told(world)
    world.finish(DISCARD).settle()
    assert not world.held
    assert events(world)[-1] == ("DataDiscarded", False)


def test_while_a_job_trains_on_it_the_data_stays() -> None:
    world = deleted(trainees=1)
    assert "until every unfinished job that trains on it has ended" in told(world)
    world.pass_time(100_000).settle()
    assert (world.held, DISCARD in world.batches) == (True, False)
    assert world.plans[-1].wake_at is not None
    world.trainees = 0
    world.settle()
    assert DISCARD in world.batches


def test_data_that_another_instruction_dataset_has_too_stays() -> None:
    world = prepared()
    world.twins = 1
    world.delete().settle()
    assert (world.held, DISCARD in world.batches) == (False, False)


def test_without_data_there_is_nothing_to_wait_for_but_its_pods() -> None:
    world = DatasetWorld(spec={"deletionPolicy": "Delete"})
    world.settle()
    world.start("d-prepare-dataset")
    world.delete().settle()
    assert world.held, "its pod may still write"
    world.collect().settle()
    assert not world.held


def test_an_owner_who_wants_the_data_after_all_may_say_so_while_it_is_deleted() -> None:
    world = prepared()
    world.delete().settle()
    world.change(deletionPolicy="Retain").settle()
    assert (world.held, DISCARD in world.batches) == (False, False)


def test_data_that_cannot_be_removed_stays_and_that_is_told() -> None:
    world = deleted()
    world.finish(DISCARD, exit_code=69).settle()
    assert not world.held
    assert events(world)[-1] == ("DataStays", True)


@pytest.mark.parametrize(("obstacle", "held"), [("forbidden: because it is being terminated", False), ("forbidden: exceeded quota", True)])
def test_a_job_that_cannot_be_made_holds_up_no_namespace_that_is_deleted(obstacle: str, held: bool) -> None:
    world = deleted()
    del world.batches[DISCARD]
    family = world.family(confirmed=True) | {"obstacles": {DISCARD: obstacle}}
    plan = world.decide(family)
    assert world.held is held
    assert [event.reason for event in plan.events] == ([] if held else ["DataStays"])
