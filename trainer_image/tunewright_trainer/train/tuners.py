"""Which weights of a model change: all, its biases, or those of an adapter of PEFT."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import JobSpec
from tunewright_crds.method import LORA_FAMILY, Tuner
from tunewright_trainer.train import options

_NAMES_TOLD: Final = 12
_TARGETS: Final = "spec.method.lora.targetModules"


def apply(network: Any, spec: JobSpec, *, steps: int) -> Any | None:
    """Make what the job's tuner changes of ``network``, and only that, trainable and fp32. Returns PEFT's wrapper where there is an adapter.

    An adapter begins as the job's seed says. ``steps`` is the length of the run. Raises `Refusal` (ConfigInvalid) naming the field.
    """
    tuner = spec.method.tuner
    network.requires_grad_(tuner is Tuner.FULL)
    if tuner is Tuner.FULL:
        return None
    peft = None
    if tuner is Tuner.BITFIT:
        free_biases(network)
    else:
        peft = add_adapter(network, spec, steps=steps)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    if not trained:
        raise Refusal(FailureCode.CONFIG_INVALID, f"tuner {tuner} finds nothing in this model to train", param="spec.method.tuner")
    for weight in trained:
        weight.data = weight.data.float()
    return peft


def free_biases(network: Any) -> None:
    """BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): the biases of every layer are trained."""
    for name, weight in network.named_parameters():
        weight.requires_grad_(name.rpartition(".")[2] == "bias")


def add_adapter(network: Any, spec: JobSpec, *, steps: int) -> Any:
    """Put the adapter's layers into ``network``; returns PEFT's wrapper."""
    from peft import get_peft_model

    config = options.checked(spec.method, steps=steps)
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (list, set)):
        lora = spec.method.tuner in LORA_FAMILY
        check_targets(network, sorted(targets), param=_TARGETS if lora else f"{options.PARAM}.target_modules")
    torch.manual_seed(spec.hyperparameters.seed)
    try:
        return get_peft_model(network, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise options.complaint(error) from error


def check_targets(network: torch.nn.Module, targets: Sequence[str], *, param: str = _TARGETS) -> None:
    """Refuse names that match no layer; PEFT itself is content if one of them does."""
    layers = [name for name, module in network.named_modules() if next(module.parameters(recurse=False), None) is not None]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise Refusal(
                FailureCode.CONFIG_INVALID,
                f"no layer of the model is called {target}; it has {', '.join(known[:_NAMES_TOLD])}",
                param=param,
            )
