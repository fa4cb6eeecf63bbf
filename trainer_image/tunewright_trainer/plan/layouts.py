"""What the layers of a model family hold on to for the backward pass: the numbers that the memory plan counts with.

A layer is described by widths in elements a token. Found with `torch.autograd.graph.saved_tensors_hooks` over transformers' own layers, and checked by
tests/unit/trainer/plan; a family that is not here has no plan rather than a wrong one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final


class Reads(StrEnum):
    """What a linear layer reads. Layers that read the same share one copy of it."""

    ATTENTION = "attention"  # the first norm's output
    OUTPUT = "output"  # what attention gives
    MLP = "mlp"  # the second norm's output
    DOWN = "down"  # the widened MLP


@dataclass(frozen=True)
class Family:
    """How the layers of a family are built. `linear`: its linear layers by the end of their names, and what each reads."""

    linear: Mapping[str, Reads]
    rms_norm: bool = True  # computed in steps: a second copy of its input is held where its weight learns
    head_norms: bool = False  # queries and keys are normalised too
    mlp_kept: int = 3  # tensors as wide as the MLP that are held: gate, its activation, and what it is multiplied with


_GATED: Final = {
    "self_attn.q_proj": Reads.ATTENTION,
    "self_attn.k_proj": Reads.ATTENTION,
    "self_attn.v_proj": Reads.ATTENTION,
    "self_attn.o_proj": Reads.OUTPUT,
    "mlp.gate_proj": Reads.MLP,
    "mlp.up_proj": Reads.MLP,
    "mlp.down_proj": Reads.DOWN,
}
_FUSED: Final = {
    "self_attn.qkv_proj": Reads.ATTENTION,
    "self_attn.o_proj": Reads.OUTPUT,
    "mlp.gate_up_proj": Reads.MLP,
    "mlp.down_proj": Reads.DOWN,
}
_GPT2: Final = {"attn.c_attn": Reads.ATTENTION, "attn.c_proj": Reads.OUTPUT, "mlp.c_fc": Reads.MLP, "mlp.c_proj": Reads.DOWN}

# By config.json's model_type.
FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(_GATED),
    "mistral": Family(_GATED),
    "qwen2": Family(_GATED),
    "qwen3": Family(_GATED, head_norms=True),
    "gemma": Family(_GATED),
    "phi3": Family(_FUSED),
    "gpt2": Family(_GPT2, rms_norm=False, mlp_kept=4),  # GELU by tanh, computed in steps
}


@dataclass(frozen=True)
class Geometry:
    """Widths of a model, in elements a token, and how many layers and tokens of vocabulary it has."""

    family: Family
    layers: int
    width: int
    heads: int  # width of all query heads together
    key_heads: int  # of all key heads
    inner: int  # of the MLP
    vocabulary: int
    tied: bool  # whether the output head is the embedding

    def reads(self, what: Reads) -> int:
        """Width of what a linear layer reads."""
        return {Reads.ATTENTION: self.width, Reads.OUTPUT: self.heads, Reads.MLP: self.width, Reads.DOWN: self.inner}[what]


def geometry(config: Mapping[str, Any]) -> Geometry | None:
    """The geometry that config.json tells; None for a family that has no plan, or where a number is missing."""
    family = FAMILIES.get(str(config.get("model_type")))
    try:
        return _geometry(family, config) if family else None
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _geometry(family: Family, config: Mapping[str, Any]) -> Geometry:
    if config["model_type"] == "gpt2":
        width = int(config["n_embd"])
        return Geometry(
            family,
            layers=int(config["n_layer"]),
            width=width,
            heads=width,
            key_heads=width,
            inner=int(config.get("n_inner") or 4 * width),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", True)),
        )
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = int(config.get("head_dim") or width // heads)
    return Geometry(
        family,
        layers=int(config["num_hidden_layers"]),
        width=width,
        heads=heads * head,
        key_heads=int(config.get("num_key_value_heads") or heads) * head,
        inner=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", config["model_type"] == "gemma")),
    )
