"""Attention that keeps documents apart: what packs examples without padding and without letting one see another.

A micro-batch is one sequence of all its documents end to end, of shape [1, tokens]. Attention is the only place where tokens of a causal
transformer meet, so calling it once a document is all that isolation takes: exact, without a mask of tokens × tokens, and without the work
on pairs that a mask would throw away. Of documents that begin alike (`layout`) the beginning is a segment by itself, which all of them look back to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME: Final = "tunewright_documents"


@dataclass(frozen=True)
class Segments:
    """The parts of a sequence by their ``lengths`` in tokens, and for each the number of that which it ``continues``; -1: none."""

    lengths: Sequence[int] = ()
    continues: Sequence[int] = ()


# Read by every layer of a forward pass, and again by the backward pass where activations are recomputed. Plain module state rather than a
# context variable: on GPUs the backward pass runs in a thread of its own, which would not see one.
_segments = Segments()


@contextmanager
def documents(segments: Segments) -> Iterator[None]:
    """Say which documents the sequence is made of. Must enclose the forward and the backward pass."""
    global _segments
    before, _segments = _segments, segments
    try:
        yield
    finally:
        _segments = before


def register() -> None:
    """Make the attention known to transformers as ``attn_implementation=NAME``; transformers builds no mask for a name without one."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document.

    ``query`` is [1, heads, tokens, width]; ``key`` and ``value`` may have fewer heads (grouped queries). Returns [1, tokens, heads, width].
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with capped scores or sinks")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    lengths = list(_segments.lengths) or [query.shape[2]]
    queries, keys, values = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    attended = [
        _attend(
            queries[number],
            *(torch.cat([part[trunk], part[number]], dim=2) if trunk >= 0 else part[number] for part in (keys, values)),
            dropout=dropout,
            scaling=scaling,
            window=sliding_window,
        )
        for number, trunk in enumerate(_segments.continues or [-1] * len(lengths))
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, scaling: float | None, window: int | None
) -> torch.Tensor:
    """The queries are those of the last keys."""
    tokens, all_tokens = query.shape[2], key.shape[2]
    if tokens == all_tokens and (window is None or tokens <= window):
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    back = torch.arange(all_tokens - tokens, all_tokens, device=query.device)[:, None] - torch.arange(all_tokens, device=query.device)
    mask = (back >= 0) & (back < (window or all_tokens))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
