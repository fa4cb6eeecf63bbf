"""Tiny random models with real tokenizers, made by script: nothing is downloaded.

    folder = tiny_model("llama", chat_template=True)

Each is made once a test session and must not be changed: copy it first (`shutil.copytree`).
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, Literal

Layout = Literal["llama", "gpt2"]

SEED: Final = 5
CONTEXT: Final = 512
END: Final = "<|im_end|>"
SPECIAL: Final = {"bos_token": "<|begin|>", "eos_token": END, "pad_token": "<|pad|>"}
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@functools.cache
def tiny_model(layout: Layout = "llama", *, chat_template: bool = False) -> Path:
    """A folder with config.json, model.safetensors and a tokenizer whose tokens are bytes and a few markers. About 0.2 MB."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{layout}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE if chat_template else None)
    tokenizer.save_pretrained(folder)
    _untrained(layout, tokenizer).save_pretrained(folder)
    return folder


@functools.cache
def decided_model() -> Path:
    """A `tiny_model` whose output head is larger: its answers are far from evenly random, and a small change moves them, as in a model that has learned."""
    from safetensors.torch import load_file, save_file

    folder = Path(tempfile.mkdtemp(prefix="decided-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(tiny_model("llama", chat_template=True), folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def byte_tokenizer(*, chat_template: str | None = None) -> Any:
    """Every byte is a token of its own, so any text can be tokenised and its tokens counted by hand; markers are single tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*SPECIAL.values(), "<|im_start|>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **SPECIAL)
    wrapped.chat_template = chat_template
    return wrapped


def _untrained(layout: Layout, tokenizer: Any) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if layout == "gpt2":
            config = GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=CONTEXT,
                n_embd=32,
                n_layer=2,
                n_head=2,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                **ids,
            )
            return GPT2LMHeadModel(config)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=False,
                **ids,
            )
        )
