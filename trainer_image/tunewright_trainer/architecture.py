"""Which kind of model it is, as its config.json says: decoder-only (causal), or with an encoder that reads and a decoder that answers (seq2seq)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import Architecture, JobSpec, seq2seq_mistake

# Encoder-decoder models whose encoder reads text and whose decoder begins as `prepare_decoder_input_ids_from_labels` says.
SEQ2SEQ: Final = ("t5", "mt5", "umt5", "longt5", "bart")
HINTED: Final = ("t5", "mt5")
"""Those whose layers a hypernetwork can write for."""
_SEQ2SEQ_WEIGHTS: Final = "ForConditionalGeneration"


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The kind of model that a config.json describes."""
    return Architecture.SEQ2SEQ if config.get("is_encoder_decoder") is True else Architecture.CAUSAL


def is_seq2seq(folder: Path) -> bool:
    """Whether a model's folder, or an adapter's, holds an encoder-decoder; loads no library."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(config, dict) and architecture_of(config) is Architecture.SEQ2SEQ


def auto_model(folder: Path) -> Any:
    """transformers' class that loads the model of a folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if is_seq2seq(folder) else AutoModelForCausalLM


def check_stated(wanted: Architecture, config: Mapping[str, Any]) -> Architecture:
    """The kind of model; `Refusal` where the job states another one."""
    found = architecture_of(config)
    if wanted not in (Architecture.AUTO, found):
        raise Refusal(
            FailureCode.CONFIG_INVALID,
            f"architecture is {wanted.value}, and config.json says that the model is {found.value}: set it so, or leave it at auto",
            param="spec.model.architecture",
        )
    return found


def check_seq2seq(config: Mapping[str, Any], *, param: str) -> None:
    """Refuse an encoder-decoder that is not one of text to text, of a family that is known to work."""
    kind = config.get("model_type")
    named = [str(name) for name in config.get("architectures") or []]
    if kind not in SEQ2SEQ:
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED,
            f"model_type {str(kind)[:64]!r} is no encoder-decoder that can be tuned: those are {', '.join(SEQ2SEQ)}",
            param=param,
        )
    if named and not any(name.endswith(_SEQ2SEQ_WEIGHTS) for name in named):
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED, f"the weights are those of {', '.join(named)[:128]}, which answers with no text", param=param
        )


def check_method(spec: JobSpec) -> None:
    """Refuse what an encoder-decoder cannot follow."""
    if found := seq2seq_mistake(spec):
        raise Refusal(FailureCode.CONFIG_INVALID, found[1], param=found[0])


def check_hint(config: Mapping[str, Any]) -> None:
    """Refuse a model that no hypernetwork can write for."""
    kind = config.get("model_type")
    if kind not in HINTED:
        raise Refusal(
            FailureCode.CONFIG_INVALID,
            f"tuner hint is for {' and '.join(HINTED)}, and the model is {str(kind)[:64]}",
            param="spec.method.tuner",
        )
