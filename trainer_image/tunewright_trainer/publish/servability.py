"""Who can serve an adapter: a pure function of its config, as PEFT writes it."""

from typing import Any, Final

from tunewright_crds.method import CONVERTIBLE, UNMERGED
from tunewright_crds.tuned_model import Servability
from tunewright_trainer.train.options import type_name

VLLM_RANK: Final = 512  # the most that vLLM's max_lora_rank can be
# vLLM refuses these, or passes them over in silence, which is worse: it scales every layer alike.
_NOT_OF_VLLM: Final = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)
_CONVERTIBLE: Final = {type_name(tuner) for tuner in CONVERTIBLE}
_UNMERGED: Final = {type_name(tuner) for tuner in UNMERGED}


def verdict(config: dict[str, Any]) -> Servability:
    """By an adapter's ``adapter_config.json``."""
    kind, plain = config["peft_type"], config.get("bias", "none") == "none"
    if kind == "LORA" and plain and config["r"] <= VLLM_RANK and not any(config.get(name) for name in _NOT_OF_VLLM):
        return Servability.VLLM_LORA
    if kind in _CONVERTIBLE and plain and not config.get("modules_to_save"):
        return Servability.CONVERT
    return Servability.TRANSFORMERS if kind in _UNMERGED else Servability.MERGE
