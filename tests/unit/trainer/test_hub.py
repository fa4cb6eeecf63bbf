"""Data and models of the hub, read by huggingface_hub from a stand-in of its server."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import LARGE, Hub, clean_client
from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, out, prepare_here, report
from tunewright_crds import names
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig, StorageSettings
from tunewright_crds.storage import dataset_key
from tunewright_trainer import train
from tunewright_trainer.prepare.sources import OpenSource, open_sources
from tunewright_trainer.serve.server import open_base
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train.base import fetch_base, fetch_model

TOKEN = "hf_secret"
DATA = "org/rows"
MODEL = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, with its address in the mounted credentials of data and model."""
    secret = clean_client(monkeypatch, tmp_path, "DATASET_CREDENTIALS", "MODEL_CREDENTIALS", patience=0)
    with Hub() as running:
        (secret / "HF_ENDPOINT").write_text(running.address)
        yield running


def give_token(tmp_path: Path, token: str) -> None:
    (tmp_path / "secret" / "HF_TOKEN").write_text(f"{token}\n")


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def a_job(path: str, *, model: str = "", **dataset: Any) -> PodConfig:
    """A job over an address below the data set, and a model of the hub if one is named."""
    source: dict[str, Any] = {"uri": f"hf://datasets/{DATA}@{path}"}
    parts: dict[str, Any] = {"dataset": {"credentialsSecret": "hub", **dataset}}
    if model:
        parts["model"] = {"uri": model, "credentialsSecret": "hub"}
    return a_data_job(source, base=None if model or dataset else Path("model"), **parts)


def read(source: OpenSource, scratch: Path) -> list[str]:
    scratch.mkdir()
    found = [read.found.text for read in source.read(range(len(source.files)), scratch)]  # type: ignore[union-attr]
    assert list(scratch.iterdir()) == []
    return found


def test_files_folders_and_patterns_are_read_at_the_commit_that_was_found_first(hub: Hub, tmp_path: Path) -> None:
    large = "x" * LARGE
    first = {
        "README.md": b"---\nlicense: mit\n---\n",
        "a.jsonl": lines("a"),
        "en/part 1.jsonl": lines("1"),
        "en/deep/part-ü.jsonl": lines(large),
        "de/part-3.jsonl": lines("3"),
    }
    commit = hub.commit("dataset", DATA, first)
    hub.commit("dataset", DATA, {"a.jsonl": lines("of a pull request")}, ref="refs/pr/1")
    addresses = {
        "main": ["a", "3", large, "1"],
        "main/a.jsonl": ["a"],
        "main/en/": [large, "1"],
        "main/en": [large, "1"],
        "main/*/part*.jsonl": ["3", "1"],
        "main/**/part-*": ["3", large],
        f"{commit}/a.jsonl": ["a"],
        "refs/pr/1/a.jsonl": ["of a pull request"],
    }
    opened = {path: open_sources(a_job(path))[0] for path in addresses}
    hub.commit("dataset", DATA, dict.fromkeys(first, lines("later")))
    for number, (path, wanted) in enumerate(addresses.items()):
        assert read(opened[path], tmp_path / f"scratch-{number}") == wanted, path
    whole = opened["main"]
    assert (whole.license, whole.identity()["commit"]) == ("mit", commit)
    assert [source.identity()["commit"] for source in open_sources(a_job("main/a.jsonl"))] != [commit]


NOT_THERE = {
    "a file": ("main/none.jsonl", "none.jsonl does not exist"),
    "a pattern": ("main/none/*.jsonl", "nothing matches"),
    "a revision": ("v9/a.jsonl", "org/rows has no revision v9"),
}


@pytest.mark.parametrize(("path", "said"), NOT_THERE.values(), ids=NOT_THERE)
def test_what_is_not_there_is_told(hub: Hub, path: str, said: str) -> None:
    hub.commit("dataset", DATA, {"a.jsonl": lines("a")})
    with pytest.raises(Refusal, match=said) as caught:
        open_sources(a_job(path))
    assert (caught.value.code, caught.value.param) == (FailureCode.DATA_NOT_FOUND, "spec.dataset.sources[0].uri")


def test_a_repository_that_is_not_there_is_told(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"dataset org/rows of .* does not exist") as caught:
        open_sources(a_job("main"))
    assert caught.value.code is FailureCode.DATA_NOT_FOUND
    with pytest.raises(Refusal, match=r"model org/none of .* does not exist") as caught:
        fetch_base(a_job("main", model="hf://org/none@main"), tmp_path / "model")
    assert (caught.value.code, caught.value.param) == (FailureCode.MODEL_NOT_FOUND, "spec.model.uri")


@pytest.mark.parametrize("gated", [False, True], ids=["private", "gated"])
def test_what_needs_a_token_is_read_with_that_of_the_secret_only(hub: Hub, tmp_path: Path, gated: bool) -> None:
    hub.commit("dataset", DATA, {"a.jsonl": lines("a")})
    hub.repo("dataset", DATA).token, hub.repo("dataset", DATA).gated = TOKEN, gated
    for number, token in enumerate(("", "hf_other")):
        give_token(tmp_path, token)
        with pytest.raises(Refusal, match="HF_TOKEN") as caught:
            read(open_sources(a_job("main"))[0], tmp_path / f"denied-{number}")
        assert caught.value.code is FailureCode.ACCESS_DENIED
        assert ("gated" in caught.value.message) == gated
    give_token(tmp_path, TOKEN)
    assert read(open_sources(a_job("main"))[0], tmp_path / "scratch") == ["a"]


def test_an_outage_is_told_once_patience_is_over(hub: Hub, tmp_path: Path) -> None:
    hub.commit("dataset", DATA, {"a.jsonl": lines("a")})
    hub.broken = True
    with pytest.raises(Refusal, match="the hub answered 503") as caught:
        open_sources(a_job("main"))
    assert caught.value.code is FailureCode.STORAGE_UNAVAILABLE
    (tmp_path / "secret" / "HF_ENDPOINT").write_text("http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(Refusal, match="ConnectError") as caught:
        open_sources(a_job("main"))
    assert caught.value.code is FailureCode.STORAGE_UNAVAILABLE


def test_an_outage_between_listing_and_reading_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library tries again for half a minute
    hub.commit("dataset", DATA, {"a.jsonl": lines("a")})
    (source,) = open_sources(a_job("main"))
    hub.broken = True
    with pytest.raises(Refusal, match="the hub answered 503") as caught:
        read(source, tmp_path / "scratch")
    assert caught.value.code is FailureCode.STORAGE_UNAVAILABLE


def test_an_outage_is_waited_out(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_STORAGE_PATIENCE_SECONDS", "120")
    hub.commit("dataset", DATA, {"a.jsonl": lines("a")})
    hub.broken = True
    back = threading.Timer(2, lambda: setattr(hub, "broken", False))
    back.start()
    try:
        assert read(open_sources(a_job("main"))[0], tmp_path / "scratch") == ["a"]
    finally:
        back.join()


def test_offline_mode_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match="while HF_HUB_OFFLINE is set") as caught:
        open_sources(a_job("main"))
    assert caught.value.code is FailureCode.CONFIG_INVALID


@pytest.mark.parametrize("text", ["a", "x" * LARGE], ids=["small", "large"])
def test_content_that_is_not_what_was_listed_is_refused(hub: Hub, tmp_path: Path, text: str) -> None:
    hub.commit("dataset", DATA, {"a.jsonl": lines(text)})
    hub.tampered["a.jsonl"] = lines(text).replace(b"text", b"next")
    with pytest.raises(Refusal, match=r"a.jsonl changed while it was read") as caught:
        read(open_sources(a_job("main"))[0], tmp_path / "scratch")
    assert caught.value.code is FailureCode.DATA_INVALID


def test_a_file_whose_name_climbs_is_refused(hub: Hub) -> None:
    hub.commit("dataset", DATA, {"a.jsonl": lines("a"), "../../b.jsonl": lines("b")})
    for path in ("main", "main/../b.jsonl", "main/**/*.jsonl"):
        with pytest.raises(Refusal, match="not followed") as caught:
            open_sources(a_job(path))
        assert caught.value.code is FailureCode.CONFIG_INVALID


def model_files(**more: bytes) -> dict[str, bytes]:
    """The files of a model, with what must not be downloaded beside them."""
    files = {path.name: path.read_bytes() for path in tiny_model("llama", chat_template=True).iterdir()}
    return files | {"pytorch_model.bin": b"pickled", "modeling.py": b"raise SystemExit", "onnx/model.safetensors": b"another"} | more


def test_data_is_prepared_and_the_model_fetched_from_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("dataset", DATA, {"rows.jsonl": lines("one", "two")})
    commit = hub.commit("model", MODEL, model_files())
    config = a_job("main", model=f"hf://{MODEL}@main")
    store = LocalStore(tmp_path / "store")
    outcome = prepare_here(config, tmp_path, store=store)
    assert outcome.dataset is not None
    assert outcome.dataset.train_examples == 2
    # The branch moves on: what is trained is what the data was prepared for, and new data is prepared for what it is now.
    weights = model_files()["model.safetensors"]
    hub.commit("model", MODEL, model_files(**{"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}))
    monkeypatch.setattr("tunewright_trainer.train.recipe.train", lambda attempt: (attempt.spec.model.uri, attempt.model))
    trained: Any = train.run(config, attempt=1, dataset_digest=outcome.dataset.digest, work=tmp_path / "training", store=store)
    address, folder = trained
    assert address == f"hf://{MODEL}@{commit}", "what is served later is the same"
    wanted = {path.name for path in tiny_model("llama", chat_template=True).iterdir()}
    assert {path.name for path in folder.iterdir()} == wanted
    assert (folder / "model.safetensors").read_bytes() == (tiny_model("llama", chat_template=True) / "model.safetensors").read_bytes()
    assert (
        json.loads(store.get_bytes(f"{dataset_key(config.job.namespace, outcome.dataset.digest)}/manifest.json"))["model"]["commit"]
        == commit
    )
    again = prepare_here(config, tmp_path, store=store)
    assert again.dataset is not None
    assert not again.dataset.reused


def test_the_engine_fetches_its_base_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.commit("model", MODEL, model_files(), ref="v1")
    folder = fetch_model(open_base(f"hf://{MODEL}@v1", StorageSettings(bucket="platform")), tmp_path / "model")
    assert (folder / "model.safetensors").stat().st_size == (tiny_model("llama", chat_template=True) / "model.safetensors").stat().st_size
    assert not (folder / "pytorch_model.bin").exists()


def test_pickled_weights_are_refused(hub: Hub, tmp_path: Path) -> None:
    files = {name: data for name, data in model_files().items() if not name.endswith(".safetensors")}
    hub.commit("model", MODEL, files)
    hub.commit("dataset", DATA, {"rows.jsonl": lines("one")})
    with pytest.raises(Refusal, match="pickled weights") as caught:
        prepare_here(a_job("main", model=f"hf://{MODEL}@main"), tmp_path)
    assert caught.value.code is FailureCode.MODEL_UNSAFE


def test_the_report_names_the_address(hub: Hub, tmp_path: Path) -> None:
    hub.commit("dataset", DATA, {"rows.jsonl": lines("one", "two")})
    prepare_here(a_job("main/*.jsonl", packing=False), tmp_path)
    assert [source["uri"] for source in report(tmp_path)["sources"]] == [f"hf://datasets/{DATA}@main/*.jsonl"]
    assert out(tmp_path).exists("manifest.json")


def test_on_one_machine_the_librarys_own_settings_hold_and_the_log_names_the_commits(hub: Hub, tmp_path: Path) -> None:
    commits = [hub.commit("dataset", DATA, {"rows.jsonl": lines("one", "two")}), hub.commit("model", MODEL, model_files())]
    hub.repo("dataset", DATA).token = TOKEN
    spec = {"model": {"uri": f"hf://{MODEL}@main"}, "dataset": {"sources": [{"uri": f"hf://datasets/{DATA}@main/*.jsonl"}]}}
    manifest = {"apiVersion": names.API_VERSION, "kind": "InstructionTuningJob", "metadata": {"name": "tune"}, "spec": spec}
    (tmp_path / "job.yaml").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "tunewright_trainer", "prepare", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "out")]
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [commit for commit in commits if f"is commit {commit}" not in done.stdout + done.stderr] == []
    assert [source["commit"] for source in json.loads(out(tmp_path).get_bytes("sources.json"))["sources"]] == commits[:1]
