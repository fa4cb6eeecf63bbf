"""What answers get by the rewards that a job has tuned its model with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunewright_crds.job import JobSpec
from tunewright_trainer.prepare.template import end_of_turn_ids, tokenize
from tunewright_trainer.serve.turns import End
from tunewright_trainer.train.data import IGNORED, Ints
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reward_model import load_reward_model, rewards_of
from tunewright_trainer.train.rewards import Rewards
from tunewright_trainer.train.rollouts import Sample


class Rewarding:
    """The rewards of a job: its rules, and its reward model, in the folder ``judge``, if it has one."""

    def __init__(self, spec: JobSpec, judge: Path | None, tokenizer: Any, template: str, end: End) -> None:
        self._rewards = Rewards(spec.method.rewards)
        self._folder, self._judge = judge, None
        self._tokenizer, self._end = tokenizer, end
        self._turn_end = np.asarray(end_of_turn_ids(tokenizer, template), dtype=np.int64)
        self._most = spec.evaluation.max_new_tokens

    def of(
        self, tuned: Tuned, prompts: Sequence[Ints], said: Sequence[Sequence[int]], texts: Sequence[str], expected: Sequence[str | None]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """What each answer gets in all, and by name what for, before it is weighted. ``said``: token ids of the answers, without what ends them."""
        samples = [self._sample(*each) for each in zip(prompts, said, texts, expected, strict=True)]
        total, each = self._rewards.of(samples)
        if self._folder is not None:
            each["model"] = self._judged(samples, tuned)
            total = total + each["model"]
        return total.tolist(), {name: found.tolist() for name, found in each.items()}

    def _sample(self, prompt: Ints, said: Sequence[int], text: str, expected: str | None) -> Sample:
        """As training has it, which ends an answer that was not cut off as turns end."""
        ended = len(said) < self._most
        tokens = tokenize(self._tokenizer, [text])[0] if self._end.texts else list(said)  # a text that ends a turn may stand within
        answer = np.concatenate([np.asarray(tokens, dtype=np.int64), self._turn_end[: len(self._turn_end) * ended]])
        ids = np.concatenate([prompt, answer])
        labels = np.concatenate([np.full(len(prompt), IGNORED), answer])
        return Sample(ids, labels, [len(ids)], text, expected or "", ended)

    def _judged(self, samples: Sequence[Sample], tuned: Tuned) -> torch.Tensor:
        """[samples]"""
        if self._judge is None:
            assert self._folder is not None
            self._judge = load_reward_model(self._folder, device=tuned.device, dtype=tuned.compute)
        return rewards_of(self._judge, samples, device=tuned.device)
