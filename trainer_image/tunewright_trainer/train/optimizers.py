"""The optimizers: those of torch, transformers and galore-torch, and how a step is taken with each.

lomo and adalomo update every weight within the backward pass, as soon as its gradient is there, which then goes: never more than one weight's
gradient is held. They are SGD and Adafactor applied like that (Lv et al. 2023, arXiv:2306.09782 and arXiv:2310.10195).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.hyperparameters import Galore, Hyperparameters, Optimizer
from tunewright_trainer.train import adalora
from tunewright_trainer.train.checkpoints import Tensors
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.sharding import gathered

ADAM_BETAS: Final = (0.9, 0.999)
ADAM_EPSILON: Final = 1e-8
MOMENTUM: Final = 0.9
_CLIP_EPSILON: Final = 1e-6  # as in torch's clip_grad_norm_

Weights = dict[str, torch.nn.Parameter]
Measured = dict[str, float]
_SCALAR: Final = "="  # ends the name of a state that is a plain number
_PROJECTION: Final = "projector"


class Updates(Protocol):
    """How the weights are brought forward by a step."""

    optimizer: torch.optim.Optimizer
    checks_first: bool
    """Whether a step that is not to be made leaves the weights as they were."""

    def take(self, backward: Callable[[], Measured], check: Callable[[float, float], None], *, rate: float) -> Measured:
        """One step at a learning rate. ``backward`` adds the whole batch's gradients, and may be called twice; ``check`` is
        given the loss and the norm of the gradient, and raises where the step is not to be made. Returns what was measured, ``grad_norm`` among it."""
        ...


def updates(tuned: Tuned, wanted: Hyperparameters) -> Updates:
    """The job's optimizer over what it trains."""
    optimizer = _optimizer(tuned, wanted)
    most = wanted.max_grad_norm or math.inf
    if wanted.optimizer.within_backward:
        return UpdatesWithin(optimizer, tuned.trainable, most=most)
    return UpdatesAfter(optimizer, tuned.trainable, most=most, budget=adalora.budget_of(tuned.peft))


class UpdatesAfter:
    """The weights are updated once all gradients are there. ``most``: the norm that gradients are clipped to; ``budget``: of ranks, with AdaLoRA."""

    checks_first = True

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Weights, *, most: float, budget: adalora.Budget | None = None) -> None:
        self.optimizer = optimizer
        self._weights = weights
        self._most = most
        self._budget = budget

    def take(self, backward: Callable[[], Measured], check: Callable[[float, float], None], *, rate: float) -> Measured:
        """See `Updates`."""
        measured = backward()
        if self._budget:
            measured |= self._budget.regularise()
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(self._weights.values(), self._most)))
        check(measured["loss"], norm)
        _set_rate(self.optimizer, rate)
        self.optimizer.step()
        if self._budget:
            self._budget.allocate(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return measured | {"grad_norm": norm}


class UpdatesWithin:
    """Each weight is updated within the backward pass. Clipping to the norm ``most`` takes a pass before, which measures it."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Weights, *, most: float) -> None:
        self.optimizer = optimizer
        self.checks_first = math.isfinite(most)
        self._most = most
        self._updating = False
        self._clipped = 1.0
        self._squares: list[torch.Tensor] = []
        for weight in weights.values():
            weight.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def take(self, backward: Callable[[], Measured], check: Callable[[float, float], None], *, rate: float) -> Measured:
        """See `Updates`. Without clipping there is one pass, and what it measures is checked after the update."""
        _set_rate(self.optimizer, rate)
        self._clipped = 1.0
        if self.checks_first:
            with torch.random.fork_rng():  # both passes draw the same dropout
                measured, norm = self._pass(backward)
            check(measured["loss"], norm)
            self._clipped = min(1.0, self._most / (norm + _CLIP_EPSILON))
        with self._updates():
            measured, again = self._pass(backward)
        if not self.checks_first:
            check(measured["loss"], again)
            norm = again
        return measured | {"grad_norm": norm}

    @contextmanager
    def _updates(self) -> Iterator[None]:
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    def _pass(self, backward: Callable[[], Measured]) -> tuple[Measured, float]:
        self._squares = []
        measured = backward()
        return measured, float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    def _arrived(self, weight: torch.nn.Parameter) -> None:
        """The gradient of a weight is whole."""
        assert weight.grad is not None
        self._squares.append(weight.grad.float().square().sum())
        if self._updating:
            weight.grad.mul_(self._clipped)
            self.optimizer.step()  # passes over weights without a gradient, which are all the others
        weight.grad = None


def check_passes(wanted: Hyperparameters, *, halvings: int) -> None:
    """Refuse to split a batch that has to go through the model at once."""
    if halvings and wanted.optimizer.within_backward:
        raise Refusal(
            FailureCode.CONFIG_INVALID,
            f"optimizer {wanted.optimizer} takes the whole batch at once, and it does not fit: lower batchSize",
            param="spec.hyperparameters.batchSize",
        )


def state_of(optimizer: torch.optim.Optimizer, weights: Weights) -> Tensors:
    """The optimizer's state as ``<weight>:<name>``; plain numbers and projections too."""
    found: Tensors = {}
    for name, weight in weights.items():
        for part, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{name}:{part}"] = value
            elif part != _PROJECTION:
                found[f"{name}:{part}{_SCALAR}"] = torch.tensor(value)
            elif value.ortho_matrix is not None:
                found[f"{name}:{part}"] = value.ortho_matrix
    return found


def restore(optimizer: torch.optim.Optimizer, weights: Weights, saved: Tensors) -> None:
    """Put saved state back, each tensor where the optimizer keeps it."""
    for name, value in saved.items():
        weight_name, _, part = name.rpartition(":")
        weight = weights[weight_name]
        state = optimizer.state[weight]
        if part.endswith(_SCALAR):
            state[part.removesuffix(_SCALAR)] = value.item()
        elif part == _PROJECTION:
            state[part].ortho_matrix = value.to(weight.device)
        else:
            state[part] = value.clone() if value.dim() == 0 and weight.device.type == "cpu" else value.to(weight.device)


def _optimizer(tuned: Tuned, wanted: Hyperparameters) -> torch.optim.Optimizer:
    """Biases and norms, which are vectors, do not decay."""
    weights = list(tuned.trainable.values())
    decaying = [{"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": wanted.weight_decay}]
    others = [{"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0}]
    groups = [group for group in decaying + others if group["params"]]
    if wanted.optimizer is Optimizer.GALORE:
        return _galore(tuned, wanted)
    if wanted.optimizer in (Optimizer.ADAFACTOR, Optimizer.ADALOMO):
        from transformers import Adafactor

        scaled = wanted.optimizer is Optimizer.ADALOMO  # by each weight's size, as the authors of AdaLomo have it
        optimizer: torch.optim.Optimizer = Adafactor(groups, lr=0.0, relative_step=False, scale_parameter=scaled, warmup_init=False)
        return optimizer
    if wanted.optimizer is Optimizer.SGD:
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)
    if wanted.optimizer is Optimizer.LOMO:
        return torch.optim.SGD(groups, lr=0.0)
    # Loshchilov and Hutter 2019.
    return torch.optim.AdamW(groups, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPSILON, fused=True)


def _galore(tuned: Tuned, wanted: Hyperparameters) -> torch.optim.Optimizer:
    """AdamW on gradients projected to a low rank (Zhao et al. 2024, arXiv:2403.03507), for all matrices but embeddings and the output head."""
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    class Projector(GaLoreProjector):  # type: ignore[misc]
        """Its matrix lies in memory as it does when it comes from a checkpoint, so that products with it are the same to the last bit."""

        def get_orthogonal_matrix(self, *arguments: Any, **more: Any) -> Any:
            return super().get_orthogonal_matrix(*arguments, **more).contiguous()

    options: Galore = wanted.galore
    ends = {
        id(layer.weight) for layer in (tuned.network.get_input_embeddings(), tuned.network.get_output_embeddings()) if layer is not None
    }
    weights = list(tuned.trainable.values())
    projected = [weight for weight in weights if weight.dim() == 2 and id(weight) not in ends]
    whole = [weight for weight in weights if weight.dim() == 2 and id(weight) in ends]
    vectors = [weight for weight in weights if weight.dim() != 2]
    settings = {"rank": options.rank, "update_proj_gap": options.update_every, "scale": options.scale, "proj_type": "std"}
    groups = [
        {"params": projected, "weight_decay": wanted.weight_decay, **settings},
        {"params": whole, "weight_decay": wanted.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = GaLoreAdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPSILON, no_deprecation_warning=True
    )
    for weight in projected:
        optimizer.state[weight][_PROJECTION] = Projector(
            options.rank, update_proj_gap=options.update_every, scale=options.scale, proj_type="std"
        )
    return optimizer


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
