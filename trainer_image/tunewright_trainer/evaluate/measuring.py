"""What one model makes of the test rows: how likely their answers are, and its own."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
import torch

from tunewright_crds.job import JobSpec
from tunewright_crds.method import REINFORCED, Examples, Objective
from tunewright_trainer.evaluate.answers import answers, text_of
from tunewright_trainer.evaluate.examples import Example
from tunewright_trainer.evaluate.rewarding import Rewarding
from tunewright_trainer.prepare.template import chat_template, load_tokenizer
from tunewright_trainer.serve.turns import End, end_of_turn
from tunewright_trainer.train import attention, loss
from tunewright_trainer.train.data import micro_batch
from tunewright_trainer.train.dpo import likelihoods
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reward_model import scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What one model made of one task, an entry for each example: what teacher forcing gives, and the answers to those that can be asked."""

    losses: list[float]  # summed over the answer's tokens, in nats
    right: list[int]  # tokens that were the likeliest
    tokens: list[int]
    answers: list[str]
    preferred: list[bool] = field(default_factory=list)  # of preferences: the chosen answer is likelier than the rejected one
    likelihoods: list[float] = field(default_factory=list)  # of answers that are marked: the mean over the tokens, in nats
    good: list[bool] = field(default_factory=list)  # and how they are marked
    rewards: list[float] = field(default_factory=list)  # of the answers, by the job's own rewards
    terms: dict[str, list[float]] = field(default_factory=dict)  # and what for


class Measuring:
    """How the models of a job are measured, whose base lies in ``base``, and whose reward model, if it learned from one, in ``judge``."""

    def __init__(self, spec: JobSpec, base: Path, judge: Path | None) -> None:
        self.tokenizer = load_tokenizer(base)
        template = chat_template(base, spec.model.chat_template)
        self.end: End = end_of_turn(self.tokenizer, template)
        self.context = _context(base) or int(self.tokenizer.model_max_length)
        self.most = spec.evaluation.max_new_tokens
        self._judges = spec.method.objective is Objective.REWARD
        self._marked = spec.method.examples is Examples.UNPAIRED
        self._pad = next(token for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if token is not None)
        self._rewarding = None
        if spec.method.objective in REINFORCED:
            self._rewarding = Rewarding(spec, judge, self.tokenizer, template, self.end)
        self.tokenizer.chat_template = template

    @torch.no_grad()
    def of(self, model: Tuned, examples: Sequence[Example], name: str, *, tell: Callable[[int], None]) -> Found:
        """The entries of each example; ``tell`` hears how many were answered."""
        model.network.eval()
        log.info("%s: measuring on %d examples", name, len(examples))
        if self._judges:
            return Found([], [], [], [], preferred=[_judges_better(model, one) for one in examples])
        forced = [(one, loss.evaluate(model, micro_batch([one.document], model.device))) for one in examples if one.document.targets]
        right = [each for one, each in forced if one.desirable]
        marked = forced if self._marked else []
        asked = answerable(examples)
        said = answers(
            model,
            [one.prompt for one in asked],
            end=self.end,
            pad=self._pad,
            most=self.most,
            context=self.context,
            name=name,
            tell=tell,
        )
        found = Found(
            losses=[each[0] for each in right],
            right=[each[1] for each in right],
            tokens=[each[2] for each in right],
            answers=[text_of(self.tokenizer, ids, self.end) for ids in said],
            preferred=[_prefers(model, one) for one in examples if one.rejected is not None],
            likelihoods=[-each[0] / max(1, each[2]) for _, each in marked],
            good=[one.desirable for one, _ in marked],
        )
        if self._rewarding is None or not asked:
            return found
        expected = [self.expected(one) for one in asked]
        rewards, terms = self._rewarding.of(model, [one.prompt for one in asked], said, found.answers, expected)
        return replace(found, rewards=rewards, terms=terms)

    def expected(self, example: Example) -> str | None:
        """The right answer; None for a prompt without one."""
        if not example.document.targets and self._rewarding is not None:
            return None
        return text_of(self.tokenizer, example.answer.tolist(), self.end)

    def prompt(self, example: Example) -> str:
        """What was asked, as text."""
        return str(self.tokenizer.decode(example.prompt.tolist(), skip_special_tokens=False))


def answerable(examples: Sequence[Example]) -> list[Example]:
    """Those that can be answered, and whose answer in the data is not a bad one."""
    return [one for one in examples if one.answer_at and one.desirable]


def _prefers(model: Tuned, example: Example) -> bool:
    """Whether the chosen answer is likelier than the rejected one, by the sum over its tokens."""
    assert example.rejected is not None
    batch = micro_batch([example.document, example.rejected], model.device)
    with attention.documents(batch.segments):
        chosen, rejected = likelihoods(model, batch).logps.tolist()
    return bool(chosen > rejected)


def _judges_better(model: Tuned, example: Example) -> bool:
    """Whether a reward model gives the chosen answer more than the rejected one."""
    assert example.rejected is not None
    with model.autocast():
        chosen, rejected = scores(model.network, micro_batch([example.document, example.rejected], model.device)).tolist()
    return bool(chosen > rejected)


def _context(folder: Path) -> int:
    settings = orjson.loads((folder / "config.json").read_bytes())
    return int(settings.get("max_position_embeddings") or settings.get("n_positions") or 0)
