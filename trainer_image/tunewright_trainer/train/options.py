"""Options of an adapter, held against the config class that PEFT has for it. No model is needed, so preparing finds the mistake already."""

import difflib
import json
import typing
from dataclasses import fields
from typing import Any, Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.method import LORA_FAMILY, OWN, PROMPT_LEARNING, Method, Objective, Tuner
from tunewright_trainer.train import adalora

PARAM: Final = "spec.method.options"
# Tuners that PEFT calls otherwise.
_TYPES: Final = {Tuner.QLORA: "LORA", Tuner.DORA: "LORA", Tuner.PREFIX: "PREFIX_TUNING", Tuner.PROMPT: "PROMPT_TUNING"}
# What is right for most where the job says nothing and PEFT's own default is nothing, or another for every family of models.
_EVERYWHERE: Final = {"target_modules": "all-linear"}
_DEFAULTS: Final[dict[Tuner, dict[str, Any]]] = {
    Tuner.IA3: {},  # keys, values and the second feed-forward layer, by PEFT's table of families
    Tuner.LN_TUNING: {},  # norms, by PEFT's table of families
    Tuner.ADAPTION_PROMPT: {"adapter_len": 10, "adapter_layers": 1},
    **{key: {"num_virtual_tokens": 20} for key in PROMPT_LEARNING},
}
_TASKS: Final = {Objective.REWARD: "SEQ_CLS"}  # PEFT trains and saves the head of these too
_NAMES_TOLD: Final = 8

_OURS: Final = "is set by the platform"
_MORE: Final = "needs or changes more than a job can say"
_OF_THE_JOB: Final = {
    "r": "stands in spec.method.lora.rank",
    "lora_alpha": "stands in spec.method.lora.alpha",
    "lora_dropout": "stands in spec.method.lora.dropout",
    "target_modules": "stands in spec.method.lora.targetModules",
    "use_rslora": "stands in spec.method.lora.rslora",
    "use_dora": "is tuner dora",
}
_WITHOUT_EFFECT: Final = "has no effect with tuner adalora"
_OF_ADALORA: Final = {
    "r": "is init_r at the beginning and target_r at the end",
    "rank_pattern": "is what training finds",
    **dict.fromkeys(("use_dora", "use_rslora", "alpha_pattern", "lora_bias", "init_lora_weights"), _WITHOUT_EFFECT),
    **dict.fromkeys(("trainable_token_indices", "ensure_weight_tying"), _WITHOUT_EFFECT),
}
_REFUSED: Final = (
    dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version"), _OURS)
    | dict.fromkeys(("base_model_name_or_path", "revision", "inference_mode", "total_step"), _OURS)
    # Biases of the base would change, and stay changed without the adapter.
    | {"bias": "would change the base itself; biases are what tuner bitfit trains"}
    | dict.fromkeys(("megatron_config", "megatron_core", "runtime_config", "runtime_offload_base_weight", "layer_replication"), _MORE)
    | dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"), _MORE)
    | dict.fromkeys(("arrow_config", "kasa_config", "use_bdlora", "use_qalora", "qalora_group_size", "alora_invocation_tokens"), _MORE)
    | dict.fromkeys(("tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text"), _MORE)
    | dict.fromkeys(("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"), "is read from the model")
    | dict.fromkeys(("target_parameters", "target_svd_config", "use_asa"), _MORE)
)
_KEEP_THE_BASE: Final = (True, False, "gaussian", "orthogonal")  # ways to begin a LoRA adapter that leave the base as it is


def checked(method: Method, *, steps: int = 0) -> Any:
    """PEFT's config of the job's adapter; ``steps`` is the length of the run in optimizer steps, where it is known.

    Raises `Refusal` (ConfigInvalid) naming the option.
    """
    kind = config_class(method.tuner)
    known = {field.name for field in fields(kind)}
    for name, value in method.options.items():
        _check_name(name, method.tuner, known)
        _check_value(name, value, typing.get_type_hints(kind)[name])
    if method.options.get("init_lora_weights", True) not in _KEEP_THE_BASE:
        raise _refusal(
            "init_lora_weights", f"can be {', '.join(json.dumps(value) for value in _KEEP_THE_BASE)}; other ways change the base"
        )
    try:
        config = kind(**({"task_type": _TASKS.get(method.objective, "CAUSAL_LM")} | _from_job(method, steps) | method.options))
    except (ValueError, TypeError) as error:
        raise complaint(error) from error
    if method.tuner is Tuner.ADALORA:
        adalora.check(config, steps=steps)
    return config


def type_name(tuner: Tuner) -> str:
    """PEFT's name of a tuner."""
    return _TYPES.get(tuner, tuner.name)


def config_class(tuner: Tuner) -> Any:
    """PEFT's config class for a tuner, which is none of `OWN`."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert tuner not in OWN
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[type_name(tuner)]]


def complaint(error: Exception) -> Refusal:
    """What PEFT says, as a refusal."""
    return Refusal(FailureCode.CONFIG_INVALID, " ".join(str(error).split())[:400], param=PARAM)


def _from_job(method: Method, steps: int) -> dict[str, Any]:
    """What the config class gets beside the options."""
    if method.tuner is Tuner.ADALORA:
        return _EVERYWHERE | adalora.schedule(steps=steps)
    if method.tuner not in LORA_FAMILY:
        return _DEFAULTS.get(method.tuner, _EVERYWHERE)
    lora = method.lora
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.target_modules if lora.target_modules == "all-linear" else lora.target_modules.split(","),
        "use_rslora": lora.rslora,
        "use_dora": method.tuner is Tuner.DORA,
    }


def _check_name(name: str, tuner: Tuner, known: set[str]) -> None:
    refused = _REFUSED | (_OF_THE_JOB if tuner in LORA_FAMILY else _OF_ADALORA if tuner is Tuner.ADALORA else {})
    if name in known and name not in refused:
        return
    if name in refused:
        raise _refusal(name, refused[name])
    own = sorted(known - refused.keys())
    near = difflib.get_close_matches(name, own, n=_NAMES_TOLD, cutoff=0.5) or own[:_NAMES_TOLD]
    raise _refusal(name, f"is no option of tuner {tuner}; there are {', '.join(near)}")


def _check_value(name: str, value: Any, hint: Any) -> None:
    """Dataclasses do not look at what they are given."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        wanted = "; or ".join(dict.fromkeys(one["msg"] for one in error.errors()))
        raise _refusal(name, f"cannot be {json.dumps(value)[:60]}: {wanted[:200]}") from error


def _refusal(name: str, why: str) -> Refusal:
    return Refusal(FailureCode.CONFIG_INVALID, f"{name} {why}", param=f"{PARAM}.{name}")
