"""GGUF, the one-file form that llama.cpp and what is built on it read: weights, tokenizer and chat template.

    check(folder)                                     # before training: Refusal where there is no layout for the model
    write(network, folder, path, template=template)   # path: model.gguf
    difference(path, folder, ids, expected)           # llama.cpp runs the file

What llama.cpp calls its layouts differs from transformers in names (`gguf.TensorNameMap` has them), in what it expects of some weights, and in the
metadata; `_LAYOUTS` says which. Matrices are written in the precision of ``network``, vectors in fp32, as llama.cpp's own converter does.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.exports import PARAM, run_gguf

FILE: Final = "model.gguf"
PARTS: Final = 4
# Texts in which ways to cut words differ.
SAMPLES: Final = (
    "Hello, world! It's 12345.67 o'clock; they'll've gone.",
    "  two  spaces\n\n\tand a tab   ",
    "Überraschung, naïve café, 你好世界, привет, 🙂👍🏽",
    "snake_case camelCase x=[1,2]; // ...!?",
)

Change = Callable[[str, Any, Any], Any]  # name, weight and config to what llama.cpp expects


def _rotated_in_pairs(name: str, weight: Any, config: Any) -> Any:
    """Rows of queries and keys of each head in the order of llama.cpp's `llama`, which rotates neighbours where transformers rotates halves."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return weight
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _norms_from_zero(name: str, weight: Any, _: Any) -> Any:
    """Gemma's norms multiply by 1 + weight."""
    return weight + 1 if name.endswith("norm.weight") else weight


def _outputs_first(name: str, weight: Any, _: Any) -> Any:
    """GPT-2's matrices are stored as [inputs, outputs]."""
    return weight.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else weight


def _as_it_is(_: str, weight: Any, __: Any) -> Any:
    return weight


@dataclass(frozen=True)
class _Layout:
    """Name of llama.cpp's architecture, and what it expects of a weight."""

    architecture: str
    change: Change = _as_it_is


# By `model_type` of config.json.
_LAYOUTS: Final = {
    "llama": _Layout("llama", _rotated_in_pairs),
    "mistral": _Layout("llama", _rotated_in_pairs),
    "qwen2": _Layout("qwen2"),
    "qwen3": _Layout("qwen3"),
    "gemma": _Layout("gemma", _norms_from_zero),
    "phi3": _Layout("phi3"),
    "gpt2": _Layout("gpt2", _outputs_first),
}

# How a byte-level tokenizer cuts a text into words: by its regular expressions, the name that llama.cpp has for it.
_LLAMA_3: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS: Final = {
    (): "gpt-2",
    ("digits",): "smollm",
    (_LLAMA_3,): "llama-bpe",
    (_LLAMA_3.replace("{1,3}", ""),): "qwen2",
}


def check(folder: Path) -> None:
    """Refuse (ConfigInvalid) a model of which no GGUF file can be made: by its architecture, its positions, or its tokenizer."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in _LAYOUTS:
        raise _unfit(f"there is no layout for {str(kind)[:64]} models, only for {', '.join(sorted(_LAYOUTS))}")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    scaling = _rope(config).get("rope_type", "default")
    if scaling not in ("default", "linear", "llama3"):
        raise _unfit(f"positions that are scaled by {scaling} are not written yet")
    if _rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise _unfit("positions in a part of each head are not written yet")
    if getattr(config, "use_sliding_window", False) or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise _unfit("the model attends in a way that is not written yet")
    _tokens(folder)


def write(network: Any, folder: Path, path: Path, *, template: str) -> None:
    """Write ``network`` with the tokenizer of ``folder`` and the chat template. The weights must be on the CPU."""
    import gguf

    config = network.config
    layout = _LAYOUTS[config.model_type]
    writer = gguf.GGUFWriter(path, layout.architecture)
    _write_numbers(writer, config)
    _write_tokenizer(writer, folder, rows=int(network.get_input_embeddings().weight.shape[0]), template=template)
    names = gguf.get_tensor_name_map(_architecture(layout.architecture), config.num_hidden_layers)
    for name, weight in network.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _unfit(f"llama.cpp has no name for the weight {name}")
        _add(writer, found, layout.change(name, weight.detach(), config))
    if (factors := _long_factors(config)) is not None:
        writer.add_tensor(f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def difference(path: Path, folder: Path, ids: list[int], expected: Any) -> float:
    """How far llama.cpp is from the trained model, as a share of its greatest logit; infinite where it does not even answer.

    ``expected`` are the trained model's logits [tokens, vocabulary] for ``ids``. Compared are the log probabilities of the likeliest next tokens after
    parts of the text. Raises `Refusal` (ConfigInvalid) where the file's tokenizer cuts other tokens than that of ``folder``.
    """
    import torch

    tokenizer = _load_tokenizer(folder)
    lengths = sorted({max(1, len(ids) * part // PARTS) for part in range(1, PARTS + 1)})
    plain = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    try:
        answer = run_gguf.ask(
            path, prompts=[ids[:length] for length in lengths], texts=list(SAMPLES), plain=plain, threads=torch.get_num_threads()
        )
    except ChildProcessError as error:
        raise Refusal(FailureCode.INTERNAL, f"llama.cpp cannot run the GGUF file: {error}") from error
    for text, cut in zip(SAMPLES, answer.tokens, strict=True):
        if cut != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise _unfit(f"llama.cpp cuts {text!r} into other tokens than the model's tokenizer")
    worst = 0.0
    for length, found in zip(lengths, answer.log_probabilities, strict=True):
        wanted = torch.log_softmax(expected[length - 1], dim=-1)
        apart = [abs(float(wanted[token]) - value) if value is not None else math.inf for token, value in found.items()]
        worst = max([worst, *apart]) if apart else math.inf
    return worst / max(float(expected.abs().max()), 1e-6)


def _add(writer: Any, name: str, weight: Any) -> None:
    import gguf
    import torch

    weight = weight.contiguous()
    if weight.dim() < 2:
        writer.add_tensor(name, weight.float().numpy())
    elif weight.dtype is torch.bfloat16:  # numpy has none: its bytes
        writer.add_tensor(name, weight.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, weight.numpy())


def _architecture(name: str) -> Any:
    import gguf

    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _write_numbers(writer: Any, config: Any) -> None:
    """The metadata that llama.cpp builds the model from."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    # Within its window, a model with sliding attention attends to everything; llama.cpp's `llama` always does.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type == "phi3":
        writer.add_sliding_window(0)


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _long_factors(config: Any) -> Any:
    """What each rotation of a Llama 3.1 is slowed by, [head size / 2]; None for other models.

    transformers gives the scaled rotations themselves; llama.cpp wants plain rotations divided by them.
    """
    if _rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = 2 * len(scaled)
    import torch

    plain = _rope(config)["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / scaled).numpy()


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer in llama.cpp's terms: its kind and way to cut words; of each token its text, type and score; and the merges, if it is byte-level."""

    model: str
    words: str
    texts: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_first: bool
    ids: dict[str, int | None]
    begins: bool


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tokens(folder: Path) -> _Tokens:
    from gguf import TokenType

    tokenizer = _load_tokenizer(folder)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model = settings["model"]
    if model["type"] != "BPE":
        raise _unfit(f"tokenizers of kind {model['type']} are not written yet, only BPE")
    byte_level = not model.get("byte_fallback")
    if not model["merges"]:
        raise _unfit("the tokenizer merges nothing, and llama.cpp has no such kind")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not byte_level and (settings["pre_tokenizer"] or {}).get("type") not in (None, "Metaspace", "Split"):
        raise _unfit("the tokenizer cuts words in a way that is not written yet")
    words = _words(settings) if byte_level else "default"
    # SentencePiece merges by score; its tokenizers come as merges in the order of falling scores.
    scores: dict[str, float] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair if not isinstance(pair, str) else pair.split(" ")
        scores.setdefault(left + right, -float(rank))
    added = {int(number): token for number, token in tokenizer.added_tokens_decoder.items()}
    by_number = {number: text for text, number in tokenizer.get_vocab().items()}
    texts, types = [], []
    for number in range(max(by_number) + 1):
        text = by_number.get(number, f"[UNUSED{number}]")
        texts.append(text)
        if number in added:
            types.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        elif number not in by_number:
            types.append(TokenType.UNUSED)
        else:
            is_byte = not byte_level and len(text) == 6 and text.startswith("<0x")
            types.append(TokenType.BYTE if is_byte else TokenType.NORMAL)
    names = ("bos", "eos", "pad", "unk")
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    first = tokenizer("a")["input_ids"][:1]
    return _Tokens(
        model="gpt2" if byte_level else "llama",
        words=words,
        texts=texts,
        types=[int(kind) for kind in types],
        scores=[scores.get(text, -float(len(merges))) for text in texts],
        merges=merges,
        space_first=tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0].startswith("▁"),
        ids=ids,
        begins=ids["bos"] is not None and first == [ids["bos"]],
    )


def _words(settings: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which the tokenizer cuts words."""
    steps = list(_steps(settings["pre_tokenizer"]))
    found = _WORDS.get(tuple(step for step in steps if step != "bytes"))
    if found is None or (settings.get("normalizer") and settings["normalizer"]["type"] != "NFC"):
        raise _unfit("the tokenizer cuts words in a way that is not among those known of llama.cpp")
    return found


def _steps(part: dict[str, Any] | None) -> Iterator[str]:
    kind = (part or {}).get("type")
    if part is None or kind == "ByteLevel":
        yield "bytes"
    elif kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "Split":
        yield part["pattern"].get("Regex", "")
    elif kind == "Digits" and part["individual_digits"]:
        yield "digits"
    else:
        yield str(kind)


def _write_tokenizer(writer: Any, folder: Path, *, rows: int, template: str) -> None:
    """``rows`` are those of the embedding: there may be more of them than tokens, or tokens that have none."""
    from gguf import TokenType

    tokens = _tokens(folder)
    spare = range(len(tokens.texts), rows)
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.words)
    writer.add_token_list([*tokens.texts[:rows], *(f"[UNUSED{number}]" for number in spare)])
    writer.add_token_types([*tokens.types[:rows], *(int(TokenType.UNUSED) for _ in spare)])
    if tokens.model == "llama":
        writer.add_token_scores([*tokens.scores[:rows], *(-float(rows) for _ in spare)])
        writer.add_add_space_prefix(tokens.space_first)
    else:
        writer.add_token_merges(tokens.merges)
    for name, number in tokens.ids.items():
        if number is not None and number < rows:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokens.begins)
    writer.add_chat_template(template)


def _unfit(message: str) -> Refusal:
    return Refusal(FailureCode.CONFIG_INVALID, f"format gguf: {message}; leave gguf out", param=PARAM)
