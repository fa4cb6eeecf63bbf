"""Answers of the model's own to prompts, which objectives that learn from rewards are about.

What is drawn is a function of the weights and of (seed, step, number of the answer), however many answers go through the model at once: each
answer has a generator of its own, whose noise is added to the logits, of which then the greatest is taken (the Gumbel-max trick). So the answers
are the same on a run that goes on from a checkpoint.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from tunewright_trainer.prepare.template import end_of_turn, end_of_turn_ids
from tunewright_trainer.train.data import AUTO_MICRO_TOKENS, IGNORED, Ints, Row, splitmix
from tunewright_trainer.train.model import Tuned

# Drawing keeps keys and values only, of which many more fit than of the activations of training.
_DRAWN_AT_ONCE: Final = 4 * AUTO_MICRO_TOKENS


@dataclass(frozen=True)
class Prompt:
    """Token ids of what is to be answered, and of the answer that the data gives; none where it gives none."""

    ids: Ints
    reference: Ints


@dataclass(frozen=True)
class Sample(Row):
    """A prompt with an answer of the model's own, which is what the labels hold. ``ended``: by itself, rather than for its length."""

    text: str
    reference: str
    ended: bool


def prompt_of(row: Row) -> Prompt:
    """What comes before the last answer of a row, and that answer."""
    learned = np.flatnonzero(row.labels != IGNORED)
    if not len(learned):
        return Prompt(row.input_ids, row.input_ids[:0])
    breaks = np.flatnonzero(np.diff(learned) > 1)
    start = learned[breaks[-1] + 1] if len(breaks) else learned[0]
    return Prompt(row.input_ids[:start], row.input_ids[start : learned[-1] + 1])


def seeds(seed: int, step: int, count: int) -> list[int]:
    """A seed for each answer of a step."""
    start = splitmix(splitmix(np.array([seed], dtype=np.uint64)) + np.uint64(step))
    return [int(one) >> 1 for one in splitmix(start + np.arange(count, dtype=np.uint64))]


class Drawing:
    """Draws answers of at most ``longest`` tokens, which end where those of the served model end."""

    def __init__(
        self,
        tuned: Tuned,
        tokenizer: Any,
        template: str,
        *,
        longest: int,
        temperature: float,
        micro_batch_size: int | str,
        halvings: int,
    ) -> None:
        self._tuned = tuned
        self._tokenizer = tokenizer
        self._marker = end_of_turn(tokenizer, template)
        self._ends = [end_of_turn_ids(tokenizer, template)]
        if tokenizer.eos_token_id is not None:
            self._ends.append([int(tokenizer.eos_token_id)])
        self._longest = longest
        self._temperature = temperature
        self._rows = max(1, micro_batch_size >> halvings) if isinstance(micro_batch_size, int) else None
        self._tokens = _DRAWN_AT_ONCE >> halvings

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int] | None = None) -> list[Sample]:
        """An answer to each prompt: drawn by its seed, or without seeds the likeliest token each time."""
        samples: list[Sample] = []
        with answering(self._tuned):
            for start, end in self._groups(prompts):
                given = None if seeds is None else seeds[start:end]
                answers = self._answers([prompt.ids for prompt in prompts[start:end]], given)
                samples += [self._sample(prompt, *answer) for prompt, answer in zip(prompts[start:end], answers, strict=True)]
        return samples

    def _groups(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, int]]:
        start = 0
        widest = 0
        for number, prompt in enumerate(prompts):
            widest = max(widest, len(prompt.ids) + self._longest)
            rows = number + 1 - start
            if rows > 1 and (rows > (self._rows or rows) or (self._rows is None and rows * widest > self._tokens)):
                yield start, number
                start, widest = number, len(prompt.ids) + self._longest
        yield start, len(prompts)

    @torch.no_grad()
    def _answers(self, prompts: Sequence[Ints], seeds: Sequence[int] | None) -> list[tuple[Ints, bool]]:
        """Token ids of the answers, and whether each ended by itself. Prompts are padded on the left."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        network, device = self._tuned.network, self._tuned.device
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        noise = [] if seeds is None else [_Noise(seeds, self._temperature, device)]
        # A config of our own: that of the model may change probabilities, as by top-k or repetition penalties.
        network.generation_config = GenerationConfig(max_new_tokens=self._longest, do_sample=False, use_cache=True, pad_token_id=0)
        with self._tuned.autocast():
            whole = network.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=LogitsProcessorList(noise),
                stopping_criteria=StoppingCriteriaList([_Ended(self._ends, width)]),
            )
        return [self._until_end(answer) for answer in whole[:, width:].cpu().numpy().astype(np.int64)]

    def _until_end(self, answer: Ints) -> tuple[Ints, bool]:
        tokens = answer.tolist()
        for length in range(1, len(tokens) + 1):
            if any(tokens[max(0, length - len(end)) : length] == end for end in self._ends):
                return answer[:length], True
        return answer, False

    def _sample(self, prompt: Prompt, answer: Ints, ended: bool) -> Sample:
        labels = np.concatenate([np.full(len(prompt.ids), IGNORED), answer])
        whole = np.concatenate([prompt.ids, answer])
        return Sample(whole, labels, [len(whole)], self._text(answer), self._text(prompt.reference), ended)

    def _text(self, ids: Ints) -> str:
        """What an answer says, without what ends it and white space around it."""
        text = str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text.strip().removesuffix(self._marker or "\0").strip()


class _Noise:
    """Gumbel noise on logits [answers, vocabulary], so that the greatest is a draw at this temperature."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        times = torch.empty_like(scores)
        for row, generator in zip(times, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self._temperature - times.log()


class _Ended:
    """Which answers are complete: they end as turns end."""

    def __init__(self, ends: Sequence[Sequence[int]], width: int) -> None:
        self._ends = [torch.tensor(end) for end in ends]
        self._width = width

    def __call__(self, ids: torch.Tensor, _: torch.Tensor, **__: Any) -> torch.Tensor:
        answers = ids[:, self._width :]
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for end in self._ends:
            if answers.shape[1] >= len(end):
                done |= (answers[:, -len(end) :] == end.to(ids.device)).all(dim=1)
        return done


@contextmanager
def answering(tuned: Tuned) -> Iterator[None]:
    """The network as one that answers: attention with keys and values of before and with padding, which that of training has not."""
    network = tuned.network
    training, attention, config = network.training, network.config._attn_implementation, network.generation_config
    network.eval()
    network.set_attn_implementation("sdpa" if network._supports_sdpa else "eager")
    try:
        yield
    finally:
        network.set_attn_implementation(attention)
        network.generation_config = config
        network.train(training)


def without_dropout(network: torch.nn.Module) -> None:
    """Have nothing dropped out any more: the policy that is trained must be the one that has answered (Huang et al. 2024, arXiv:2403.17031)."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (which modules have none of)
