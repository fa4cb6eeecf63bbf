"""The typed InstructionDataset: what is refused, and what is filled in."""

import pytest
from pydantic import ValidationError

from tunewright_crds.instruction_dataset import DeletionPolicy, InstructionDatasetSpec

SMALLEST = {"model": {"uri": "s3://b-1/models/x/"}, "dataset": {"sources": [{"uri": "s3://b-1/rows.jsonl"}]}}


@pytest.mark.parametrize(
    ("field", "value", "blamed"),
    [
        ("dataset", {"ref": "other"}, "names its own sources"),
        ("dataset", {"sources": [{"uri": "s3://b-1/rows.jsonl", "format": "preference"}]}, "holds conversations only"),
        ("dataset", {"sources": []}, "give at least one of sources, or ref"),
        ("resources", {"gpusPerNode": 1}, "Extra inputs are not permitted"),
        ("retries", {"outOfMemory": 1}, "Extra inputs are not permitted"),
        ("deletionPolicy", "Forget", "'Retain' or 'Delete'"),
    ],
)
def test_what_cannot_work_is_refused(field: str, value: object, blamed: str) -> None:
    with pytest.raises(ValidationError, match=blamed):
        InstructionDatasetSpec.model_validate({**SMALLEST, field: value})


def test_by_default_data_stays_and_nothing_is_deleted() -> None:
    spec = InstructionDatasetSpec.model_validate(SMALLEST)
    assert (spec.deletion_policy, spec.ttl_seconds_after_last_use, spec.seed) == (DeletionPolicy.RETAIN, None, 42)
