"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): adapters as P·Λ·Q, whose singular values compete for ranks while they are trained.

PEFT decides which to keep. What it remembers of each weight lies in the optimizer's state, so that checkpoints hold it.
"""

from typing import Any, Final

import torch

from tunewright_crds.errors import FailureCode, Refusal

_ADAPTER: Final = "default"
_SENSITIVITY, _UNCERTAINTY, _KEPT = "sensitivity", "uncertainty", "kept"  # of a weight; of a singular value
_UPDATES: Final = "updates"
_NO_RUN: Final = 2**31  # as long as options are only checked, no run is too short for them
_STEPS: Final = "spec.hyperparameters.maxSteps"


def schedule(*, steps: int) -> dict[str, Any]:
    """The options that say when ranks are given away, by the length of the run: not in its first tenth, nor in the last three tenths."""
    return {"tinit": steps // 10, "tfinal": 3 * steps // 10, "total_step": steps or _NO_RUN}


def check(config: Any, *, steps: int) -> None:
    """Refuse (ConfigInvalid) ranks that cannot become fewer, and runs too short for it."""
    param = "spec.method.options.target_r"
    if not 0 < config.target_r < config.init_r:
        raise Refusal(
            FailureCode.CONFIG_INVALID, f"target_r ({config.target_r}) must be above 0 and below init_r ({config.init_r})", param=param
        )
    if steps and steps - config.tfinal < 2:
        raise Refusal(
            FailureCode.CONFIG_INVALID, f"tuner adalora needs two steps before the last tfinal ({config.tfinal}) of {steps}", param=_STEPS
        )


def budget_of(peft: Any | None) -> "Budget | None":
    """What AdaLoRA does beside the optimizer, where the adapter is one."""
    return Budget(peft) if _is_one(peft) else None


class Budget:
    """The ranks of an adapter."""

    def __init__(self, peft: Any) -> None:
        self._tuner = peft.base_model
        self._config = peft.peft_config[_ADAPTER]
        self._weights = {name: weight for name, weight in self._tuner.model.named_parameters() if "lora_" in name and weight.requires_grad}
        self._values = {name: weight for name, weight in self._weights.items() if ".lora_E." in name}
        self._vectors = [(name, weight) for name, weight in self._weights.items() if ".lora_E." not in name]

    def regularise(self) -> dict[str, float]:
        """Add the gradient that keeps P and Q orthogonal (the paper's equation 4, by PEFT with norms that are not squared); returns what it is the gradient of."""
        apart = []
        for name, weight in self._vectors:
            product = weight @ weight.T if ".lora_A." in name else weight.T @ weight
            apart.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        loss = self._config.orth_reg_weight * torch.stack(apart).mean()
        torch.autograd.backward(loss)
        return {"orthogonality_loss": float(loss.detach())}

    def allocate(self, optimizer: torch.optim.Optimizer) -> None:
        """After an optimizer step, with its gradients still there: weigh what each rank does, and set those to 0 that are over the budget of this step."""
        state, allocator = optimizer.state, self._tuner.rankallocator
        memory = {name: state[weight] for name, weight in self._weights.items()}
        allocator.ipt = {name: kept[_SENSITIVITY] for name, kept in memory.items() if _SENSITIVITY in kept}
        allocator.exp_avg_ipt = dict(allocator.ipt)
        allocator.exp_avg_unc = {name: kept[_UNCERTAINTY] for name, kept in memory.items() if _UNCERTAINTY in kept}
        masks = {name: memory[name][_KEPT].flatten().bool().tolist() for name in self._values if _KEPT in memory[name]}
        self._config.rank_pattern = masks or None
        first = memory[next(iter(self._values))]
        first[_UPDATES] = first.get(_UPDATES, 0) + 1
        self._tuner.update_and_allocate(first[_UPDATES])
        for name, kept in memory.items():
            if name in allocator.exp_avg_ipt:
                kept |= {_SENSITIVITY: allocator.exp_avg_ipt[name], _UNCERTAINTY: allocator.exp_avg_unc[name]}
        for name, mask in (self._config.rank_pattern or {}).items():
            memory[name][_KEPT] = torch.tensor(mask, dtype=torch.uint8)


def settle(peft: Any | None) -> None:
    """Have the adapter saved with the ranks that its weights have, those of another moment than the last too: what is 0 adds nothing."""
    if not _is_one(peft):
        return
    assert peft is not None
    values = {name: weight for name, weight in peft.base_model.model.named_parameters() if ".lora_E." in name}
    peft.peft_config[_ADAPTER].rank_pattern = {name: (weight != 0).flatten().tolist() for name, weight in values.items()}


def _is_one(peft: Any | None) -> bool:
    return peft is not None and peft.peft_config[_ADAPTER].peft_type == "ADALORA"
