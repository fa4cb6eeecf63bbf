"""Small tokenizers of the kinds that published models have, trained here: nothing is downloaded."""

import functools
from typing import Any, Final

TEXT: Final = (
    "The quick brown fox jumps over the lazy dog; they'll say it's 12345 times, won't they? "
    "Hello world, hello there, the other than that which them then these those. two spaces and a tab "
)
BEGIN, END, PAD = "<s>", "</s>", "<unk>"
_LLAMA_3: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS: Final = {"llama-3": _LLAMA_3, "qwen2": _LLAMA_3.replace("{1,3}", ""), "unheard-of": r"\p{L}|\P{L}+", "gpt-2": ""}


@functools.cache
def byte_pairs(cuts: str) -> Any:
    """A byte-level BPE of 320 tokens and three markers that cuts words as `gpt-2`, `llama-3` or `qwen2` do, or in a way of its own (`unheard-of`)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = _CUTS[cuts]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole]) if pattern else whole
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[PAD, BEGIN, END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return _wrapped(tokenizer)


@functools.cache
def pieces() -> Any:
    """As Llama 2 and Mistral have it: a word begins with ▁, what is not in the vocabulary goes by bytes, and a text begins with <s>."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    learning = Tokenizer(models.BPE())
    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learning.normalizer = marked
    learning.train_from_iterator(TEXT.split(), trainers.BpeTrainer(vocab_size=120, show_progress=False))
    import json

    learned = json.loads(learning.to_str())["model"]
    names = [PAD, BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in learned["vocab"] if name not in names]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=PAD, fuse_unk=True))
    tokenizer.normalizer = marked
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=PAD)
