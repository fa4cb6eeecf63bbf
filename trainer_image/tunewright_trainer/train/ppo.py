"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) of a language model, as Ziegler et al. 2019 (arXiv:1909.08593) and Ouyang et al. 2022
(arXiv:2203.02155) do it, with the details that Huang et al. 2024 (arXiv:2403.17031) list.

An answer is a sequence of actions, its tokens. Each is rewarded by minus the coefficient times how much likelier it is than by the model before training (the
estimator k1 of the divergence), and the last by the reward of the answer too. What is to be expected from a token on, its value, is told by a linear head on the
policy's own last hidden states, which begins at 0 and is not published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from tunewright_crds import reinforcement
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Row, Rows, permutation
from tunewright_trainer.train.metrics import Measured
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reinforced import Answering, Experience, Reference, Setting, Update, clipped, log_probabilities, mean_of
from tunewright_trainer.train.rollouts import Sample

COEFFICIENT: Final = "kl_coefficient"
MOST_CHANGE: Final = 0.2  # of the coefficient within the horizon, as a share (Ziegler et al. 2019, section 2.2)
_LEAST_VARIANCE: Final = 1e-8

Tokens = list[torch.Tensor]
"""For each answer something of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Valued(Experience):
    """Experience with values. Tensors are [tokens of the answer]."""

    values: torch.Tensor
    """When the answer was drawn."""
    returns: torch.Tensor
    """What the values should have been."""


class Ppo:
    """Learns from answers and what was expected of them; see `tunewright_trainer.train.objective.Reinforced`."""

    def __init__(self, tuned: Tuned, setting: Setting) -> None:
        self._options = setting.spec.method.ppo
        self._seed = setting.spec.hyperparameters.seed
        self._answering = Answering(tuned, setting, self._options)
        self._reference = Reference(tuned)
        tuned.head = value_head(tuned)

    def learn(self, rows: Sequence[Row], *, step: int, state: dict[str, float], update: Update) -> tuple[Sequence[Row], Measured]:
        """See `tunewright_trainer.train.objective.Reinforced`."""
        options, answering = self._options, self._answering
        drawn = answering.draw(rows, step=step, each=1)
        samples = drawn.samples
        found = answering.of_tokens(samples, lambda batch: valued(answering.tuned, batch, answering.temperature))
        policy, values = [own for own, _, _ in found], [expected for _, _, expected in found]
        with self._reference.as_before() as before:
            reference = answering.log_probabilities(samples, before)
        coefficient = state.get(COEFFICIENT, options.kl_coefficient)
        divergences = [own - other for own, other in zip(policy, reference, strict=True)]
        scores = [
            float(reward) - options.missing_end_penalty * (not sample.ended) for reward, sample in zip(drawn.rewards, samples, strict=True)
        ]
        experience = experienced(samples, policy, values, divergences, scores, coefficient=coefficient, decay=options.gae_lambda)
        passes = self._passes(experience, step=step, update=update)
        kl = float(torch.stack([each.sum() for each in divergences]).mean())
        state[COEFFICIENT] = adapted(coefficient, kl=kl, answers=len(samples), options=options)
        returns = torch.cat([one.returns for one in experience])
        missed = (returns - torch.cat(values)).var(correction=0) / returns.var(correction=0).clamp(min=_LEAST_VARIANCE)
        told = {
            "objective/kl": kl,
            "objective/kl_coefficient": coefficient,
            "objective/entropy": -float(torch.stack([each.sum() for each in policy]).mean()),
            "objective/non_score_reward": -coefficient * kl,
            "objective/rlhf_reward": sum(scores) / len(scores) - coefficient * kl,
            "val/explained_variance": float(1 - missed),
            "updates": float(len(passes)),
        }
        return samples, drawn.measured | mean_of(passes) | told

    def evaluate(self, rows: Rows) -> Measured:
        """See `tunewright_trainer.train.objective.Reinforced`."""
        return self._answering.likeliest(rows)

    def _passes(self, experience: Sequence[Valued], *, step: int, update: Update) -> list[Measured]:
        """The optimizer steps on the answers of a step, in an order that is a function of the seed and the step."""
        options, temperature = self._options, self._answering.temperature
        found: list[Measured] = []
        for epoch in range(options.epochs):
            order = permutation(len(experience), seed=self._seed, epoch=step * options.epochs + epoch)
            for part in np.array_split(order, min(options.mini_batches, len(experience))):
                chosen = [experience[number] for number in sorted(part.tolist())]
                loss = Surrogate(options, temperature=temperature)
                found.append(update(chosen, loss))
                if options.kl_limit and found[-1]["policy/approxkl_avg"] > options.kl_limit:
                    return found
        return found


def value_head(tuned: Tuned) -> torch.nn.Linear:
    """A head that expects 0 of everything, on the hidden states that the output head reads."""
    output = tuned.network.get_output_embeddings()
    if output is None:
        raise Refusal(FailureCode.MODEL_UNSUPPORTED, "the model has no output head, whose input ppo would value", param="spec.model.uri")
    head = torch.nn.Linear(output.weight.shape[1], 1).to(tuned.device)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return head


def valued(tuned: Tuned, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies as `log_probabilities` gives them, and values, each [targets]. Must be called within `attention.documents`."""
    read: list[torch.Tensor] = []

    def remember(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        read.append(given[0])

    hook = tuned.network.get_output_embeddings().register_forward_pre_hook(remember)
    try:
        policy, entropy = log_probabilities(tuned, batch, temperature)
    finally:
        hook.remove()
    hidden = read[-1][0] if tuned.keeps_logits else read[-1][0, batch.keep]
    assert tuned.head is not None
    values: torch.Tensor = tuned.head(hidden.float())[:, 0]
    return policy, entropy, values


def experienced(
    samples: Sequence[Sample],
    policy: Tokens,
    values: Tokens,
    divergences: Tokens,
    scores: Sequence[float],
    *,
    coefficient: float,
    decay: float,
) -> list[Valued]:
    """What is learned from the answers: advantages with mean 0 and variance 1 over all their tokens."""
    gains: Tokens = []
    for divergence, score, expected in zip(divergences, scores, values, strict=True):
        rewards = -coefficient * divergence
        rewards[-1] += score
        gains.append(advantages(rewards, expected, decay=decay))
    returns = [gain + expected for gain, expected in zip(gains, values, strict=True)]
    whole = whitened(torch.cat(gains))
    parts = torch.split(whole, [len(gain) for gain in gains])
    return [
        Valued(one.input_ids, one.labels, one.lengths, gain, own, values=expected, returns=aim)
        for one, gain, own, expected, aim in zip(samples, parts, policy, values, returns, strict=True)
    ]


def advantages(rewards: torch.Tensor, values: torch.Tensor, *, decay: float) -> torch.Tensor:
    """Generalised advantage estimation without discount (Schulman et al. 2016, arXiv:1506.02438, equation 16), of the tokens of one answer [tokens]."""
    gains = torch.zeros_like(rewards)
    following = value = 0.0
    for at in range(len(rewards) - 1, -1, -1):
        following = float(rewards[at]) + value - float(values[at]) + decay * following
        gains[at], value = following, float(values[at])
    return gains


def whitened(values: torch.Tensor) -> torch.Tensor:
    """With mean 0 and variance 1 [n]."""
    return (values - values.mean()) * torch.rsqrt(values.var(correction=0) + _LEAST_VARIANCE)


def adapted(coefficient: float, *, kl: float, answers: int, options: reinforcement.Ppo) -> float:
    """The coefficient of the next step: greater where answers diverge by more than the target, smaller where by less (Ziegler et al. 2019, section 2.2)."""
    if not options.kl_target:
        return coefficient
    error = min(max(kl / options.kl_target - 1, -MOST_CHANGE), MOST_CHANGE)
    return coefficient * (1 + error * answers / options.kl_horizon)


class Surrogate:
    """The clipped surrogate of each token, and the clipped squared error of its value."""

    def __init__(self, options: reinforcement.Ppo, *, temperature: float) -> None:
        self._options = options
        self._temperature = temperature

    def size(self, rows: Sequence[Row]) -> int:
        """The loss is the mean over tokens."""
        return max(1, sum(row.targets for row in rows))

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        rows = [row for row in batch.rows if isinstance(row, Valued)]
        with documents(batch.segments):
            policy, entropy, values = valued(tuned, batch, self._temperature)
            each, measured = self.tokens(policy, values, rows)
            torch.autograd.backward(each.sum() / share_of)
        told = measured | {"loss": each.detach(), "policy/entropy_avg": entropy}
        return {name: float(found.sum()) / share_of for name, found in told.items()}

    def tokens(self, policy: torch.Tensor, values: torch.Tensor, rows: Sequence[Valued]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each token and what is measured of it [tokens]. ``policy``: log-probabilities of the rows' tokens, in nats, and ``values`` theirs."""
        options, device = self._options, policy.device
        old = torch.cat([row.policy for row in rows if row.policy is not None]).to(device)
        gains, before, aims = (torch.cat([getattr(row, name) for row in rows]).to(device) for name in ("advantages", "values", "returns"))
        losses, beyond = clipped(policy, old, gains, clip=options.clip)
        near = before + (values - before).clamp(-options.value_clip, options.value_clip)
        plain, held = (values - aims) ** 2, (near - aims) ** 2
        errors = 0.5 * torch.max(plain, held)
        measured = {
            "loss/policy_avg": losses.detach(),
            "val/loss": errors.detach(),
            "val/clipfrac_avg": (held > plain).float(),
            "policy/clipfrac_avg": beyond.float(),
            "policy/approxkl_avg": 0.5 * (policy - old).detach() ** 2,
        }
        return losses + options.value_coefficient * errors, measured
