"""Data that is prepared once and trained on by many jobs, and leaves storage when nobody wants it any more."""

import json
import time
from typing import Any

import pytest

from tests.support.models import tiny_model
from tests.support.rows import alpaca_rows
from tests.support.stack import wait_for
from tests.support.tenant import JOB_SECONDS, Tenant, a_dataset, a_job
from tunewright_crds import names, storage


@pytest.fixture
def inputs(tenant: Tenant) -> dict[str, str]:
    """A tiny model and 60 rows, uploaded."""
    return {
        "model": tenant.upload_folder("model", tiny_model("llama", chat_template=True)),
        "data": tenant.upload_rows("rows.jsonl", alpaca_rows(60)),
    }


def test_three_jobs_over_data_that_is_prepared_once(tenant: Tenant, inputs: dict[str, str]) -> None:
    shared: dict[str, Any] = {"dataset": {"ref": "shared-v1"}, "hyperparameters": {"maxSteps": 2, "batchSize": 4}}
    tenant.apply(a_job("first", **inputs, **shared))
    tenant.wait("first", "it waits", lambda status: "there is no InstructionDataset shared-v1" in str(status))
    tenant.apply(a_dataset("shared-v1", **inputs))
    tenant.apply(a_job("second", **inputs, **shared))
    ready = wait_for("the data is ready", lambda: tenant.dataset("shared-v1").get("status", {}).get("dataset"), seconds=JOB_SECONDS)
    done = [tenant.wait_phase(name, "Succeeded") for name in ("first", "second")]
    assert [status["dataset"] for status in done] == [ready | {"reused": True}] * 2
    assert ready["trainExamples"] + ready["validationExamples"] == 60

    tenant.stack.s3().delete_object(Bucket="uploads", Key=inputs["data"].removeprefix("s3://uploads/"))
    begin = time.monotonic()
    tenant.apply(a_job("third", **inputs, **shared))
    tenant.wait("third", "its training Job is made", lambda status: status.get("attempts"))
    print(f"a job over data that is ready: its training Job is there {time.monotonic() - begin:.2f} s after `kubectl apply` began")
    tenant.wait_phase("third", "Succeeded")
    prepared = tenant.stack.kubectl.get("jobs", "-n", tenant.namespace, "-l", f"{names.LABEL_ROLE}={names.Role.PREPARE}")["items"]
    assert [job["metadata"]["name"] for job in prepared] == ["shared-v1-prepare-dataset"], "no job prepared anything itself"
    assert "Ready" in tenant.stack.kubectl("get", "ids", "-n", tenant.namespace)
    leaves_storage_with_its_resource(tenant, storage.dataset_key(tenant.namespace, ready["digest"]) + "/")


def leaves_storage_with_its_resource(tenant: Tenant, folder: str) -> None:
    """Its owner may want that at any time; everything else of the namespace stays."""
    change = json.dumps({"spec": {"deletionPolicy": "Delete"}})
    tenant.stack.kubectl("patch", "ids", "shared-v1", "-n", tenant.namespace, "--type=merge", "-p", change)
    wait_for("it is held", lambda: names.FINALIZER in tenant.dataset("shared-v1")["metadata"].get("finalizers", []), seconds=60)
    assert "manifest.json" in tenant.keys(folder)
    tenant.stack.kubectl("delete", "ids", "shared-v1", "-n", tenant.namespace, "--wait=false")
    wait_for("it goes", lambda: not tenant.dataset("shared-v1"), seconds=JOB_SECONDS, context=lambda: tenant.story("third"))
    assert tenant.keys(folder) == set()
    assert tenant.keys(f"{tenant.namespace}/models/")
