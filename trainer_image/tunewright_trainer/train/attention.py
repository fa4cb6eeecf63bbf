"""Attention that keeps documents apart: what packs examples without padding and without letting one see another.

A micro-batch is one sequence of all its documents end to end, of shape [1, tokens]. Attention is the only place where tokens of a causal
transformer meet, so calling it once a document is all that isolation takes: exact, without a mask of tokens × tokens, and without the work
on pairs that a mask would throw away.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME: Final = "tunewright_documents"

# Read by every layer of a forward pass, and again by the backward pass where activations are recomputed. Plain module state rather than a
# context variable: on GPUs the backward pass runs in a thread of its own, which would not see one.
_lengths: Sequence[int] = ()


@contextmanager
def documents(lengths: Sequence[int]) -> Iterator[None]:
    """Say which documents the sequence is made of, by their lengths in tokens. Must enclose the forward and the backward pass."""
    global _lengths
    before, _lengths = _lengths, lengths
    try:
        yield
    finally:
        _lengths = before


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
    lengths = list(_lengths) or [query.shape[2]]
    pieces = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [_attend(q, k, v, dropout=dropout, scaling=scaling, window=sliding_window) for q, k, v in pieces]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, scaling: float | None, window: int | None
) -> torch.Tensor:
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    back = torch.arange(tokens, device=query.device)[:, None] - torch.arange(tokens, device=query.device)
    mask = (back >= 0) & (back < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
