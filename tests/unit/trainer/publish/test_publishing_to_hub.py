"""Copies on the hub: the hub's own client against a stand-in, with whole attempts on tiny models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import Hub, clean_client
from tests.support.models import tiny_model
from tests.support.training import a_job, documents, packed, publish_data, train_here
from tunewright_crds.errors import FailureCode
from tunewright_crds.pod import PodConfig
from tunewright_crds.status import HubCopy
from tunewright_trainer.storage import LocalStore, open_hub

REPOSITORY = "team/helper"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, with its address and the right to write in the mounted credentials."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    secret = clean_client(monkeypatch, tmp_path, "HUB_CREDENTIALS", patience=5)
    with Hub() as running:
        running.writer = "writes"
        (secret / "HF_ENDPOINT").write_text(running.address)
        (secret / "HF_TOKEN").write_text("writes")
        yield running


def a_copied_job(**output: Any) -> PodConfig:
    numbers = {"batchSize": 2, "maxSteps": 2}
    return a_job(hyperparameters=numbers, output={"hub": {"repository": REPOSITORY}, **output})


def train(config: PodConfig, work: Path, *, attempt: int = 1) -> HubCopy:
    store = LocalStore(work / "store")
    if attempt == 1:
        publish_data(store, work, train=packed(documents(4, longest=16), 1))
    outcome = train_here(config, store, work, attempt=attempt)
    assert outcome.artifact is not None, "whatever the hub says, what is published is published"
    assert (Path(outcome.artifact.uri) / "manifest.json").exists()
    assert outcome.artifact.hub is not None
    return outcome.artifact.hub


def test_the_served_form_is_copied_as_one_private_commit_and_loads_from_there(hub: Hub, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    told = train(a_copied_job(formats=["adapter", "merged"]), tmp_path)
    repo = hub.repos[REPOSITORY]
    assert told == HubCopy(uri=f"hf://{REPOSITORY}@{repo.refs['main']}")
    assert repo.private
    files = repo.commits[repo.refs["main"]]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "manifest.json", "tokenizer.json"} <= files.keys()
    assert json.loads(files["manifest.json"])["kind"] == "adapter"
    assert hub.large, "the weights went by LFS"

    fetched = tmp_path / "fetched"
    place = open_hub(f"hf://{REPOSITORY}@main/", {"HF_ENDPOINT": hub.address}, missing=FailureCode.MODEL_NOT_FOUND, param="x")
    for info in place.store.list(""):
        place.store.download(info.key, fetched / info.key)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), fetched)

    assert train(a_copied_job(formats=["adapter", "merged"]), tmp_path, attempt=2) == told
    assert len(repo.commits) == 2, "the repository's own first one, and ours"


def test_a_commit_whose_answer_is_lost_is_made_once(hub: Hub, tmp_path: Path) -> None:
    hub.forgetful = True
    told = train(a_copied_job(), tmp_path)
    assert told.uri.endswith(hub.repos[REPOSITORY].refs["main"])
    assert len(hub.repos[REPOSITORY].commits) == 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda hub: setattr(hub, "writer", "another"), "AccessDenied: the hub does not let us write (403): give an HF_TOKEN"),
        (lambda hub: setattr(hub, "broken", True), "StorageUnavailable: "),
    ],
    ids=["a token that may not write", "a hub that is away"],
)
def test_why_there_is_no_copy_is_told_and_the_job_is_done_all_the_same(hub: Hub, tmp_path: Path, spoil: Any, said: str) -> None:
    spoil(hub)
    told = train(a_copied_job(), tmp_path)
    assert told.uri == ""
    assert told.error.startswith(said)
