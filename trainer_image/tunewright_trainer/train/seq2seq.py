"""The forward pass of encoder-decoders: sources are read beside one another, and the output head is computed only where a target has a token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunewright_trainer.train.data import Padded
from tunewright_trainer.train.model import Tuned


def forward(tuned: Tuned, batch: Padded) -> torch.Tensor:
    """Logits [targets, vocabulary] in fp32. The decoder begins as the model itself shifts labels, each family in its own way."""
    network = tuned.network
    begun = network.prepare_decoder_input_ids_from_labels(labels=batch.labels)
    with tuned.autocast(), _head_at(network, batch.keep):
        answer = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, decoder_input_ids=begun, use_cache=False)
    logits: torch.Tensor = answer.logits
    return logits.float()


@contextmanager
def _head_at(network: Any, keep: torch.Tensor) -> Iterator[None]:
    """Have the output head see only the hidden states at ``keep`` [targets], which count the positions of all rows."""
    hook = network.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[keep],))
    try:
        yield
    finally:
        hook.remove()
