"""What is remembered, whatever order events come in."""

from typing import Any

from tests.support.builders import START, a_dataset, a_job
from tunewright_crds import names
from tunewright_operator.observed import Batch, Identity, Job, Pod, Prepared
from tunewright_operator.stores import Stores
from tunewright_operator.usage import Use

KEY = ("ns", "a")


def meta(name: str, uid: str, version: int, owner: str = "", **more: Any) -> dict[str, Any]:
    owners = [{"uid": owner, "controller": True}] if owner else []
    return {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version), "ownerReferences": owners, **more}


def job(uid: str, version: int) -> Job:
    return Job.of(a_job().manifest | {"metadata": meta("a", uid, version)})


def batch(uid: str, version: int, owner: str) -> Batch:
    labels = {names.LABEL_ROLE: "train", names.LABEL_ATTEMPT: "1"}
    return Batch.of({"metadata": meta("a-train-1", uid, version, owner, labels=labels)})


def pod(uid: str, version: int, owner: str, phase: str = "Running") -> Pod:
    return Pod.of({"metadata": meta("a-train-1-0", uid, version, owner), "status": {"phase": phase}})


def seen(stores: Stores) -> tuple[list[str], list[str]]:
    """UIDs of the children that a pass over the job looks at."""
    observed = stores.observe(KEY, now=START)
    return ([child.id.uid for child in observed.batches], [child.id.uid for child in observed.pods]) if observed else ([], [])


def test_children_that_come_before_their_job_are_found() -> None:
    stores = Stores()
    stores.put_pod(pod("p", 3, "b"))
    stores.put_batch(batch("b", 2, "j"))
    stores.put_job(job("j", 1))
    assert seen(stores) == (["b"], ["p"])


def test_an_older_view_never_replaces_a_newer_one() -> None:
    stores = Stores()
    assert stores.put_pod(pod("p", 5, "b", "Failed"))
    assert not stores.put_pod(pod("p", 4, "b", "Running"))
    assert stores.pods.by_key["ns", "a-train-1-0"].phase == "Failed"


def test_the_deleted_are_remembered_as_long_as_their_job_is_there() -> None:
    stores = Stores()
    stores.put_job(job("j", 1))
    stores.put_batch(batch("b", 2, "j"))
    stores.put_pod(pod("p", 3, "b"))
    stores.drop_pod(pod("p", 4, "b").id)
    stores.drop_batch(batch("b", 5, "j").id)
    observed = stores.observe(KEY, now=START)
    assert observed is not None
    assert (observed.batches[0].gone, observed.pods[0].gone) == (True, True)
    stores.drop_job(job("j", 6).id)
    stores.put_job(job("j2", 7))
    assert seen(stores) == ([], [])
    assert not any((stores._batches_of, stores._pods_of, stores._owner_of_batch)), "nothing is kept of what is gone"


def test_a_job_made_anew_under_the_same_name_has_none_of_the_old_ones_children() -> None:
    stores = Stores()
    stores.put_job(job("old", 1))
    stores.put_batch(batch("b", 2, "old"))
    stores.put_job(job("new", 3))  # the deletion itself was missed
    assert seen(stores) == ([], [])
    stores.drop_job(Identity.of({"metadata": meta("a", "old", 4)}))
    assert KEY in stores.jobs.by_key, "a late deletion of the old one does not take the new one away"


def test_the_unfinished_jobs_of_an_instruction_dataset_are_known_at_once() -> None:
    stores = Stores()
    stores.put_dataset(Prepared.of(a_dataset("d") | {"metadata": meta("d", "u", 1)}))

    def put(version: int, *, ref: str = "d", uid: str = "j", **status: Any) -> tuple[int, int]:
        """Users of ``d``, and those of them that wait, when a job is so."""
        body = a_job().with_spec(dataset={"ref": ref}).manifest | {"metadata": meta("a", uid, version), "status": status}
        stores.put_job(Job.of(body))
        seen = stores.observe_dataset(("ns", "d"), now=START)
        assert seen is not None
        return seen.users, len(stores.usage.users(Use.WAITS, ("ns", "d")))

    assert put(2) == (1, 1)
    assert put(3, dataset={"digest": "x"}) == (1, 0)
    assert stores.usage.users(Use.TRAINS, ("ns", "x")) == [job("j", 3).id]
    assert put(1) == (1, 0), "an older view changes nothing"
    assert put(4, phase="Failed") == (0, 0)
    assert put(5, ref="other") == (0, 0)
    assert put(6, uid="anew") == (1, 1)
    assert put(7, uid="again") == (1, 1), "the deletion of the one before was missed"
    stores.drop_job(Identity.of({"metadata": meta("a", "again", 8)}))
    assert not any((stores.usage._uses, stores.usage._users)), "nothing is kept of what is gone"


def test_what_keeps_the_data_of_a_deleted_instruction_dataset_is_counted() -> None:
    stores = Stores()
    status = {"phase": "Ready", "dataset": {"digest": "x"}}
    going = {"deletionTimestamp": "2026-03-01T12:00:00Z"}

    def put(name: str, version: int, digest: str = "x", **more: Any) -> None:
        body = a_dataset(name) | {
            "metadata": meta(name, f"uid-{name}", version, **more),
            "status": status | {"dataset": {"digest": digest}},
        }
        stores.put_dataset(Prepared.of(body))

    def counted() -> tuple[int, int, bool]:
        seen = stores.observe_dataset(("ns", "d"), now=START)
        assert seen is not None
        return seen.trainees, seen.twins, seen.discard is not None

    put("d", 1, **going, finalizers=[names.FINALIZER])
    put("other", 2, digest="y")
    assert counted() == (0, 0, False)
    stores.put_job(Job.of(a_job().manifest | {"metadata": meta("a", "j", 3), "status": {"phase": "Training", "dataset": {"digest": "x"}}}))
    put("twin", 4)
    assert counted() == (1, 1, False), "a job with sources of its own counts as well"
    put("twin", 5, **going, finalizers=[names.FINALIZER])
    stores.put_batch(Batch.of({"metadata": meta("d-discard-uid-d", "b", 6, labels={names.LABEL_ROLE: "discard"})}))
    assert counted() == (1, 0, True), "of two that are going, neither waits for the other"


def test_an_orphaned_pod_still_counts_for_its_job() -> None:
    stores = Stores()
    stores.put_job(job("j", 1))
    stores.put_batch(batch("b", 2, "j"))
    stores.put_pod(pod("p", 3, "b"))
    stores.put_pod(pod("p", 4, "", "Failed"))
    observed = stores.observe(KEY, now=START)
    assert observed is not None
    assert [child.phase for child in observed.pods] == ["Failed"]
