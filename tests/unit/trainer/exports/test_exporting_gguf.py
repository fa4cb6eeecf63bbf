"""GGUF files, run by llama.cpp itself."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from tests.support.models import CHAT_TEMPLATE, tiny_model
from tests.support.training import a_job
from tests.support.vocabularies import byte_pairs, pieces
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.exports import check_forms, to_gguf
from tunewright_trainer.publish import verify

SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so that the probabilities differ much
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLOWED: Final = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Kind of model with what its config says besides the sizes, tokenizer, precision.
MODELS: Final[dict[str, tuple[str, dict[str, Any], Any, torch.dtype]]] = {
    "llama, tokenizer of pieces": ("llama", {}, pieces, torch.float32),
    "llama 3.1 in half precision": ("llama", {"rope_parameters": SLOWED}, lambda: byte_pairs("llama-3"), torch.bfloat16),
    "llama with positions drawn out": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        pieces,
        torch.float16,
    ),
    "mistral": ("mistral", {"sliding_window": 64}, pieces, torch.float32),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, lambda: byte_pairs("qwen2"), torch.float32),
    "qwen3": ("qwen3", {"head_dim": 32}, lambda: byte_pairs("qwen2"), torch.float32),
    "gemma": ("gemma", {"head_dim": 16}, pieces, torch.float32),
    "phi3": ("phi3", {}, pieces, torch.float32),
    "gpt2": ("gpt2", {"n_positions": 128}, lambda: byte_pairs("gpt-2"), torch.float32),
}


def a_model(folder: Path, kind: str, options: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer.save_pretrained(folder)
    sizes = SIZES if kind != "gpt2" else {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    # More rows than tokens, as many published models have.
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + 3, **(sizes | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for weight in network.parameters():
                if weight.dim() == 1:  # biases and norms that would hide a mistake
                    weight.add_(torch.randn_like(weight) * 0.1)
    network.to(dtype).save_pretrained(folder)
    return network


@pytest.mark.parametrize("name", list(MODELS))
def test_llama_cpp_computes_what_the_model_does(tmp_path: Path, name: str) -> None:
    kind, options, tokenizer, dtype = MODELS[name]
    network = a_model(tmp_path, kind, options, tokenizer(), dtype)
    ids = [(number * 37 + 11) % 200 + 5 for number in range(48)]
    with torch.no_grad():
        expected = network.float()(input_ids=torch.tensor([ids])).logits[0]
    to_gguf.check(tmp_path)
    to_gguf.write(network.to(dtype), tmp_path, tmp_path / "model.gguf", template=CHAT_TEMPLATE)
    limit = verify.OTHER_PROGRAM if dtype is torch.float32 else verify.ROUNDED
    assert to_gguf.difference(tmp_path / "model.gguf", tmp_path, ids, expected) < limit
    assert to_gguf.difference(tmp_path / "model.gguf", tmp_path, ids, expected.roll(1, dims=1)) > 10 * limit


def test_the_file_says_how_to_talk_to_the_model(tmp_path: Path) -> None:
    from gguf import GGUFReader

    network = a_model(tmp_path, *MODELS["mistral"][:2], pieces(), torch.float32)
    to_gguf.write(network, tmp_path, tmp_path / "model.gguf", template=CHAT_TEMPLATE)
    told = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert told["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert (told["tokenizer.ggml.bos_token_id"], told["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert told["tokenizer.ggml.add_bos_token"] is True
    assert told["llama.context_length"] == 64  # no further than the window, within which both attend to everything


def refusal(folder: Path, *forms: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        check_forms(a_job(folder, output={"formats": ["adapter", *forms]}).spec, folder)
    return caught.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt_neox"}, "no layout for gpt_neox models"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "positions that are scaled by yarn"),
        ({"model_type": "unheard-of"}, "no layout for unheard-of models"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "positions in a part of each head"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "attends in a way that is not written yet"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder models are not written yet"),
        ({}, "the tokenizer merges nothing"),
    ],
)
def test_what_has_no_layout_is_refused_before_training(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    found = refusal(folder, "gguf")
    assert (found.code, found.param) == (FailureCode.CONFIG_INVALID, "spec.output.formats")
    assert words in found.message


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path: Path) -> None:
    byte_pairs("unheard-of").save_pretrained(tmp_path)
    shutil.copy(tiny_model("llama") / "config.json", tmp_path)
    assert "cuts words in a way" in refusal(tmp_path, "gguf").message
