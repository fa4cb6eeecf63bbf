"""The forms of one job's model: what is published, checked, and told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.models import CHAT_TEMPLATE, tiny_model
from tests.support.training import a_job, documents, packed, publish_data, train_here
from tests.support.vocabularies import byte_pairs
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import read_spec
from tunewright_crds.tuned_model import Kind
from tunewright_trainer.exports import to_gguf, to_onnx
from tunewright_trainer.publish import publishing, verify
from tunewright_trainer.storage import LocalStore

SHORT = {"batchSize": 4, "epochs": 2, "learningRate": 0.01}
ALL = ["adapter", "merged", "onnx", "gguf"]
READ_BY = {
    "adapter": "PeftModel.from_pretrained",
    "merged": "AutoModelForCausalLM",
    "onnx": 'InferenceSession("model.onnx")',
    "gguf": "llama-server",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bf16 with a tokenizer that llama.cpp knows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_pairs("gpt-2")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=packed(documents(16), 2))
    return store


def job(base: Path, **parts: Any) -> Any:
    return a_job(base, hyperparameters=SHORT, **parts)


def test_every_form_computes_the_same_and_is_told(base: Path, store: LocalStore, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = job(base, output={"formats": ALL})
    outcome = train_here(wanted, store, tmp_path)
    assert outcome.artifact is not None
    assert outcome.artifact.kind == "adapter"
    assert [form.kind for form in outcome.artifact.forms] == ALL
    folders = {form.kind: Path(form.uri) for form in outcome.artifact.forms}
    for kind, folder in folders.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["kind"] == kind
        assert {file["name"] for file in manifest["files"]} == {path.name for path in folder.iterdir()} - {"manifest.json"}
        card = (folder / "README.md").read_text()
        assert all(said in card for said in ("licences: cc0", "`/never/read`", "| loss |", "torch 2", READ_BY[kind]))
        document = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
        assert (document["kind"], document["metadata"]["name"]) == ("InstructionTuningJob", "tune")
        assert read_spec(document["spec"], local=True) == wanted.spec
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"], dtype=torch.float32)
    ids = torch.arange(20)[None] * 3 + 5
    with torch.no_grad():
        expected = merged(input_ids=ids).logits[0]
    # The rounded weights are the same in all of them.
    assert verify.difference(expected, to_onnx.logits(folders["onnx"], ids)) < verify.SAME
    weights = {tensor.name: tensor for tensor in GGUFReader(folders["gguf"] / "model.gguf").tensors}
    written = torch.from_numpy(weights["output.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(written, merged.lm_head.weight.to(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(folders["onnx"]).chat_template == CHAT_TEMPLATE


def test_a_run_that_comes_by_again_publishes_only_what_is_missing(
    base: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(base, method={"tuner": "full"}, output={"formats": ["gguf"]})
    first = train_here(wanted, store, tmp_path)
    assert first.artifact is not None
    assert [form.kind for form in first.artifact.forms] == ["full", "gguf"]
    manifest = Path(first.artifact.forms[1].uri) / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()  # killed while the form was uploaded
    monkeypatch.setitem(publishing._WRITERS, Kind.FULL, lambda *_: pytest.fail("published again"))
    second = train_here(wanted, store, tmp_path, attempt=2)
    assert second.artifact == first.artifact
    assert manifest.read_bytes() == kept


def test_a_form_that_cannot_be_made_costs_no_other(base: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise Refusal(FailureCode.MODEL_UNSUPPORTED, "format onnx: not this one", param="spec.output.formats")

    monkeypatch.setattr(to_onnx, "write", unable)
    with pytest.raises(Refusal) as caught:
        train_here(job(base, output={"formats": ["onnx", "gguf"]}), store, tmp_path)
    assert (caught.value.code, caught.value.param) == (FailureCode.MODEL_UNSUPPORTED, "spec.output.formats")
    published = caught.value.message.partition("(published: ")[2].rstrip(")").split(", ")
    assert [Path(folder).name for folder in published] == ["adapter", "gguf"]
    assert all((Path(folder) / "manifest.json").exists() for folder in published)


def test_a_file_that_computes_something_else_is_not_published(
    base: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_gguf, "_LAYOUTS", {"llama": to_gguf._Layout("llama")})  # rotated as transformers does
    with pytest.raises(Refusal) as caught:
        train_here(job(base, output={"formats": ["gguf"]}), store, tmp_path)
    assert caught.value.code is FailureCode.INTERNAL
    assert "the gguf, loaded again, differs" in caught.value.message
    assert not list(store.root.rglob("gguf/manifest.json"))


def test_a_form_that_is_known_to_be_impossible_is_refused_before_training(store: LocalStore, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama"), other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"model_type": "gpt_neox"}))
    with pytest.raises(Refusal) as caught:
        train_here(job(other, output={"formats": ["gguf"]}), store, tmp_path)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, "spec.output.formats")
    assert not list(store.root.rglob("checkpoints"))
