"""The forward pass of encoder-decoders: sources are read beside one another, and the output head is computed only where a target has a token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunewright_trainer.train import hint
from tunewright_trainer.train.data import Padded
from tunewright_trainer.train.model import Tuned


def forward(tuned: Tuned, batch: Padded) -> torch.Tensor:
    """Logits [targets, vocabulary] in fp32."""
    with tuned.autocast():
        return logits(tuned.network, batch).float()


def logits(network: Any, batch: Padded) -> torch.Tensor:
    """Logits [targets, vocabulary]. The decoder begins as the model itself shifts labels, each family in its own way."""
    begun = network.prepare_decoder_input_ids_from_labels(labels=batch.labels)
    if hint.is_attached(network):
        read = hint.read(network, batch).inputs()
    else:
        read = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with _head_at(network, batch.keep):
        found: torch.Tensor = network(**read, decoder_input_ids=begun, use_cache=False).logits
    return found


@contextmanager
def _head_at(network: Any, keep: torch.Tensor) -> Iterator[None]:
    """Have the output head see only the hidden states at ``keep`` [targets], which count the positions of all rows."""
    hook = network.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[keep],))
    try:
        yield
    finally:
        hook.remove()
