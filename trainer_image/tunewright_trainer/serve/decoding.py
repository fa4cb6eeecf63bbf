"""How a model reads a prompt and goes on token by token: decoder-only models, and encoder-decoders."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import torch

PREFILL_TOKENS: Final = 512  # of a prompt read in one step: others get their turn between
RELATIVE_CONTEXT: Final = 4096  # tokens of a prompt, and of an answer, where positions are relative and set no bound


class Decoding(Protocol):
    """One generation. Logits are [vocabulary] in fp32, of the token that comes next."""

    def read(self, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits after each part of the prompt; the last are those of the first token to write."""
        ...

    def go_on(self, token: int) -> torch.Tensor:
        """Logits after one more token."""
        ...


def decoding(network: Any, *, begin: Callable[[Any], Any] = lambda cache: cache) -> Decoding:
    """A new generation by a transformers model. ``begin`` makes of an empty cache the one with which a text begins; encoder-decoders begin at nothing."""
    return _EncoderDecoder(network) if network.config.is_encoder_decoder else _Causal(network, begin)


def context_of(network: Any, tokenizer: Any) -> int:
    """Tokens that fit: prompt and answer together, or for an encoder-decoder each by itself."""
    positions = int(getattr(network.config, "max_position_embeddings", 0) or 0)
    if positions:
        return positions
    return RELATIVE_CONTEXT if network.config.is_encoder_decoder else int(tokenizer.model_max_length)


class _Causal:
    """The prompt and the answer are one text."""

    def __init__(self, network: Any, begin: Callable[[Any], Any]) -> None:
        from transformers import DynamicCache

        self._network = network
        self._cache = begin(DynamicCache(config=network.config))

    def read(self, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        for part in torch.split(torch.tensor([list(prompt)], device=self._network.device), PREFILL_TOKENS, dim=1):
            yield self._forward(part)

    def go_on(self, token: int) -> torch.Tensor:
        return self._forward(torch.tensor([[token]], device=self._network.device))

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        answer = self._network(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = answer.logits[0, -1].float()
        return logits


class _EncoderDecoder:
    """The encoder reads the prompt once, at once, for each of its tokens sees all others; the decoder writes the answer."""

    def __init__(self, network: Any) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self._network = network
        self._cache = EncoderDecoderCache(DynamicCache(config=network.config), DynamicCache(config=network.config))
        self._read: Any = None

    def read(self, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        self._read = self._network.get_encoder()(input_ids=torch.tensor([list(prompt)], device=self._network.device))
        yield self._forward(self._beginning())

    def go_on(self, token: int) -> torch.Tensor:
        return self._forward([token])

    def _beginning(self) -> list[int]:
        """What the decoder begins with; published BARTs are also forced to write the beginning of a text first."""
        wanted = self._network.generation_config
        start = wanted.decoder_start_token_id
        begin = [self._network.config.decoder_start_token_id if start is None else start]
        return [*begin, wanted.forced_bos_token_id] if wanted.forced_bos_token_id is not None else begin

    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        answer = self._network(
            encoder_outputs=self._read,
            decoder_input_ids=torch.tensor([list(ids)], device=self._network.device),
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: torch.Tensor = answer.logits[0, -1].float()
        return logits
