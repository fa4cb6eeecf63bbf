"""Greedy answers in batches: the likeliest token each time, until the answer's end."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from tunewright_trainer.process import is_out_of_memory
from tunewright_trainer.serve.turns import End
from tunewright_trainer.train import attention
from tunewright_trainer.train.data import Ints, filled
from tunewright_trainer.train.model import Tuned

log = logging.getLogger(__name__)

BATCH_TOKENS: Final = 16_384  # of prompts and answers that are in the cache at a time
BATCH_PROMPTS: Final = 64
_TELL_SECONDS: Final = 10.0


def answers(
    tuned: Tuned,
    prompts: Sequence[Ints],
    *,
    end: End,
    pad: int,
    most: int,
    context: int,
    name: str,
    tell: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Token ids of the answer to each prompt, without what ends it; at most ``most``, and never beyond ``context`` with the prompt.
    ``tell`` is told how many there are, after each batch.

    A batch holds prompts of about one length and is cut in two where it needs too much memory.
    """
    found: dict[int, list[int]] = {}
    told = time.monotonic()
    with ordinary_attention(tuned.network):
        for batch in _batches(prompts, most):
            found |= zip(batch, _answer(tuned, [prompts[at] for at in batch], end, pad, most, context), strict=True)
            tell(len(found))
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                log.info("%s: %d of %d prompts answered", name, len(found), len(prompts))
    return [found[index] for index in range(len(prompts))]


def _batches(prompts: Sequence[Ints], most: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    while order:
        count = max(1, min(BATCH_PROMPTS, BATCH_TOKENS // (len(prompts[order[0]]) + most)))
        yield order[:count]
        order = order[count:]


def _answer(tuned: Tuned, prompts: Sequence[Ints], end: End, pad: int, most: int, context: int) -> list[list[int]]:
    seq2seq = tuned.network.config.is_encoder_decoder
    room = min(most, context - (0 if seq2seq else max(len(prompt) for prompt in prompts)))
    if room < 1:
        return [[] for _ in prompts]
    try:
        return (_write if seq2seq else _generate)(tuned, prompts, end, pad, room)
    except Exception as error:
        if len(prompts) == 1 or not is_out_of_memory(error):
            raise
    log.info("%d prompts at a time need too much memory; half as many are tried", len(prompts))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(prompts) // 2
    return _answer(tuned, prompts[:half], end, pad, most, context) + _answer(tuned, prompts[half:], end, pad, most, context)


@torch.inference_mode()
def _generate(tuned: Tuned, prompts: Sequence[Ints], end: End, pad: int, room: int) -> list[list[int]]:
    from transformers import GenerationConfig

    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.copy())
        mask[row, width - len(prompt) :] = 1
    options = GenerationConfig(max_new_tokens=room, do_sample=False, eos_token_id=sorted(end.ids) or None, pad_token_id=pad)
    with tuned.autocast():
        whole = (tuned.peft or tuned.network).generate(
            input_ids=ids.to(tuned.device), attention_mask=mask.to(tuned.device), generation_config=options
        )
    return [_until_end(row, end.ids) for row in whole[:, width:].tolist()]


@torch.inference_mode()
def _write(tuned: Tuned, prompts: Sequence[Ints], end: End, pad: int, room: int) -> list[list[int]]:
    """What the decoder of an encoder-decoder writes. Prompts are filled up behind: where positions are absolute they begin at the first token."""
    from transformers import GenerationConfig

    ids = torch.from_numpy(filled(prompts, -1)).to(tuned.device)
    own = tuned.network.config
    options = GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        eos_token_id=sorted(end.ids) or None,
        pad_token_id=pad,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    with tuned.autocast():
        written = (tuned.peft or tuned.network).generate(
            input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), generation_config=options
        )
    return [_until_end(row, end.ids) for row in written[:, 1:].tolist()]


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    return next((ids[:at] for at, token in enumerate(ids) if token in ends), ids)


@contextmanager
def ordinary_attention(network: Any) -> Iterator[None]:
    """Generation, and models that others ask, need attention with a cache and with padding, which training's has not; and no options of the model's own, such as sampling."""
    from transformers import GenerationConfig

    before, of_training = network.generation_config, network.config._attn_implementation == attention.NAME
    if of_training:
        network.set_attn_implementation("sdpa")
    network.generation_config = GenerationConfig()
    network.eval()
    try:
        yield
    finally:
        network.generation_config = before
        if of_training:
            network.set_attn_implementation(attention.NAME)


def text_of(tokenizer: Any, ids: Sequence[int], end: End) -> str:
    """An answer as text, without what ends it."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    for marker in end.texts:
        text = text.partition(marker)[0]
    return text.strip()
