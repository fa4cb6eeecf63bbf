"""What the objectives that learn from rewards have in common: drawing answers, rewarding them, and how likely each token of them was."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import torch
from torch.nn.functional import cross_entropy

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import JobSpec
from tunewright_crds.reinforcement import Sampling
from tunewright_trainer.prepare.model import read_model
from tunewright_trainer.prepare.template import load_tokenizer
from tunewright_trainer.train import loss
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Row, Rows, grouped, micro_batch
from tunewright_trainer.train.metrics import Measured
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reward_model import load_reward_model, rewards_of
from tunewright_trainer.train.rewards import Rewards
from tunewright_trainer.train.rollouts import Drawing, Prompt, Sample, prompt_of, seeds, without_dropout
from tunewright_trainer.train.world import World

EVALUATED_AT_ONCE: Final = 256  # prompts of validation, which bounds the answers in memory


class Loss(Protocol):
    """The loss of one optimizer step over rows that it knows."""

    def size(self, rows: Sequence[Row]) -> int:
        """See `tunewright_trainer.train.objective.Optimised`."""
        ...

    def backward(self, tuned: Tuned, batch: MicroBatch, *, share_of: float) -> Measured:
        """See `tunewright_trainer.train.objective.Optimised`."""
        ...


Update = Callable[[Sequence[Row], Loss], Measured]
"""One optimizer step over rows; returns the metrics of the loss and the gradient's norm."""


@dataclass(frozen=True)
class Experience(Row):
    """A sample with what is learned from it. Tensors are [tokens of the answer], of what was when it was drawn."""

    advantages: torch.Tensor
    policy: torch.Tensor | None = None
    """Log-probabilities by the policy."""
    reference: torch.Tensor | None = None
    """Log-probabilities by the model before training."""


@dataclass(frozen=True)
class Setting:
    """What drawing and rewarding depend on besides the weights. ``folder`` holds the base model, ``prepared`` is the manifest of the data."""

    spec: JobSpec
    folder: Path
    prepared: Mapping[str, object]
    halvings: int = 0
    judge: Path | None = None
    """The folder of the reward model, if there is one."""
    world: World = field(default_factory=World)


@dataclass(frozen=True)
class Drawn:
    """The answers of a step, their rewards in all [samples], and what was measured of them."""

    samples: list[Sample]
    rewards: torch.Tensor
    measured: Measured = field(default_factory=dict)


class Answering:
    """Draws and rewards answers, and tells how likely they were. Of several processes each does so for a part of the answers; all have all of them."""

    def __init__(self, tuned: Tuned, setting: Setting, sampling: Sampling) -> None:
        from tunewright_trainer.prepare.template import chat_template

        spec = setting.spec
        self.tuned = tuned
        self.world = setting.world
        self.temperature = sampling.temperature
        self.longest = sampling.max_new_tokens
        self._seed = spec.hyperparameters.seed
        self._micro, self._halvings = spec.hyperparameters.micro_batch_size, setting.halvings
        self._rewards = Rewards(spec.method.rewards)
        self._room = (read_model(setting.folder).context or 1 << 30) - self.longest
        template = str(setting.prepared.get("chatTemplate") or chat_template(setting.folder, spec.model.chat_template))
        self._drawing = Drawing(
            tuned,
            load_tokenizer(setting.folder),
            template,
            longest=self.longest,
            temperature=self.temperature,
            micro_batch_size=self._micro,
            halvings=setting.halvings,
        )
        without_dropout(tuned.network)
        self._judge = load_reward_model(setting.judge, device=tuned.device, dtype=tuned.compute) if setting.judge else None

    def draw(self, rows: Sequence[Row], *, step: int, each: int) -> Drawn:
        """So many answers to the prompt of each row, one after the other."""
        prompts = [prompt for prompt in self._prompts(rows) for _ in range(each)]
        seeded = list(zip(prompts, seeds(self._seed, step, len(prompts)), strict=True))
        return self._rewarded(
            self.world.together(seeded, lambda own: self._drawing.draw([prompt for prompt, _ in own], [seed for _, seed in own]))
        )

    def likeliest(self, rows: Rows) -> Measured:
        """Metrics of the likeliest answers to the rows' prompts."""
        totals: Measured = {}
        for start in range(0, len(rows), EVALUATED_AT_ONCE):
            part = [rows[index] for index in range(start, min(start + EVALUATED_AT_ONCE, len(rows)))]
            found = self._rewarded(self.world.together(self._prompts(part), self._drawing.draw)).measured
            totals = {name: totals.get(name, 0.0) + value * len(part) for name, value in found.items() if name.startswith("reward")}
        means = {f"eval_{name}": total / len(rows) for name, total in totals.items() if name != "reward_std"}
        return means | {"eval_loss": -means["eval_reward"]}

    def _prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        prompts = [prompt_of(row) for row in rows]
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest > self._room:
            raise Refusal(
                FailureCode.CONFIG_INVALID,
                f"a prompt of {longest} tokens and an answer of up to {self.longest} (maxNewTokens) are more than the {self._room + self.longest} tokens "
                "that the model reads: lower one of them",
                param="spec.dataset.maxLength",
            )
        return prompts

    def _rewarded(self, samples: list[Sample]) -> Drawn:
        total, each = self._rewards.of(samples)
        if self._judge is not None:
            each["model"] = torch.stack(self.world.together(samples, self._judged))
            total = total + each["model"]
        lengths = torch.tensor([sample.targets for sample in samples], dtype=torch.float)
        measured = {f"rewards/{name}": float(found.mean()) for name, found in each.items()} | {
            "reward": float(total.mean()),
            "reward_std": float(total.std(correction=0)),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": sum(not sample.ended for sample in samples) / len(samples),
        }
        return Drawn(samples, total, measured)

    def _judged(self, samples: Sequence[Sample]) -> Sequence[torch.Tensor]:
        """What the reward model gives each answer with its prompt."""
        return rewards_of(self._judge, samples, device=self.tuned.device, micro_batch_size=self._micro, halvings=self._halvings).unbind()

    @torch.no_grad()
    def log_probabilities(self, rows: Sequence[Row], tuned: Tuned) -> list[torch.Tensor]:
        """[tokens of the answer] for each row, in nats at the temperature of drawing, on the processor."""
        return [each for (each,) in self.of_tokens(rows, lambda batch: log_probabilities(tuned, batch, self.temperature)[:1])]

    @torch.no_grad()
    def of_tokens(self, rows: Sequence[Row], found: Callable[[MicroBatch], Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
        """What ``found`` gives of the tokens of answers [targets], for each row and on the processor."""

        def of(own: Sequence[Row]) -> list[tuple[torch.Tensor, ...]]:
            told: list[tuple[torch.Tensor, ...]] = []
            for group in grouped(own, self._micro, halvings=self._halvings):
                batch = micro_batch(group, self.tuned.device)
                with documents(batch.segments):
                    parts = [torch.split(each.cpu(), [row.targets for row in group]) for each in found(batch)]
                told += zip(*parts, strict=True)
            return told

        return self.world.together(rows, of)


def log_probabilities(tuned: Tuned, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[targets] log-probability of each token of the answers, and [targets] the entropy there, without gradient. Must be called within `attention.documents`."""
    logits = loss.forward(tuned, batch) / temperature
    return -cross_entropy(logits, batch.targets, reduction="none"), entropies(logits.detach())


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Of logits [n, vocabulary], in nats [n]."""
    likely = torch.log_softmax(logits, dim=-1)
    return -(likely.exp() * likely).sum(dim=-1)


def clipped(policy: torch.Tensor, old: torch.Tensor, gains: torch.Tensor, *, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The surrogate's loss of each action, and whether the clipping held it back (Schulman et al. 2017, arXiv:1707.06347, equation 7); all [actions]."""
    ratio = torch.exp(policy - old)
    held = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * gains, held * gains), (held * gains) < (ratio * gains)


class Reference:
    """What the model was before: itself without its adapter, or where it has none a frozen copy, which doubles the weights in memory."""

    def __init__(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self._copy: Tuned | None = None
        if tuned.peft is None:
            network = copy.deepcopy(tuned.network).requires_grad_(False).to(tuned.compute)
            self._copy = replace(tuned, network=network.eval())

    @contextlib.contextmanager
    def as_before(self) -> Iterator[Tuned]:
        """The model to ask."""
        if self._copy is not None:
            yield self._copy
            return
        assert self._tuned.peft is not None
        with self._tuned.peft.disable_adapter():
            yield self._tuned


def mean_of(found: Sequence[Measured]) -> Measured:
    """The mean of each metric over several updates."""
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}
