"""ONNX files, run by ONNX Runtime."""

from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_model
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.exports import to_onnx
from tunewright_trainer.publish import verify


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_onnx_runtime_computes_what_the_model_does(tmp_path: Path, kind: str) -> None:
    import onnxruntime
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    more = {} if kind == "gpt2" else {"intermediate_size": 32, "num_key_value_heads": 2}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
    to_onnx.write(network, tmp_path)
    ids = torch.arange(30)[None] * 7 % 100
    with torch.no_grad():
        expected = network(input_ids=ids).logits[0]
        padded = network(input_ids=ids[:, 5:]).logits[0]
    assert verify.difference(expected, to_onnx.logits(tmp_path, ids)) < verify.SAME
    # Texts of any number and length, padded on the left.
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    mask = torch.ones_like(ids).repeat(3, 1)
    mask[1, :5] = 0
    (logits,) = session.run(["logits"], {"input_ids": ids.repeat(3, 1).numpy(), "attention_mask": mask.numpy()})
    assert verify.difference(expected, torch.from_numpy(logits[2])) < verify.SAME
    if kind != "gpt2":  # whose positions count from the first token, padding or not
        assert verify.difference(padded, torch.from_numpy(logits[1, 5:])) < verify.SAME


def test_what_the_exporter_cannot_follow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    monkeypatch.setattr(
        type(network.model.layers[0].mlp), "forward", lambda self, hidden: hidden if hidden.sum() > 0 else self.up_proj(hidden)
    )
    with pytest.raises(Refusal) as caught:
        to_onnx.write(network, tmp_path)
    assert (caught.value.code, caught.value.param) == (FailureCode.MODEL_UNSUPPORTED, "spec.output.formats")
    assert "the exporter cannot follow this model" in caught.value.message
