"""What is to be prepared, and the address that it has."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import orjson

from tunewright_crds.dataset import Dataset, Split
from tunewright_crds.job import Architecture
from tunewright_crds.method import Examples, Tuner
from tunewright_crds.pod import PodConfig
from tunewright_trainer.architecture import check_hint, check_method
from tunewright_trainer.prepare.model import BaseModel, check_supported, fetch_base_model
from tunewright_trainer.prepare.sources import OpenSource, open_held_out, open_sources
from tunewright_trainer.prepare.template import chat_template

DATA_VERSION: Final = 4  # raised whenever the same input would be prepared differently
# Options of the data set that the data depends on; where the sources lie, with which keys and by how many pods they are read changes nothing.
_OPTIONS: Final = (
    "validationFraction",
    "testFraction",
    "cleaning",
    "maxLength",
    "overlong",
    "packing",
    "trainOn",
    "maxInvalidFraction",
)


@dataclass(frozen=True)
class Task:
    """The data of a job, for its model."""

    config: PodConfig
    sources: list[OpenSource]
    held_out: list[OpenSource]
    model: BaseModel
    template: str

    @classmethod
    def open(cls, config: PodConfig, folder: Path) -> "Task":
        """Look up sources and model; the model's small files come into `folder`. Raises `Refusal` where they are not there."""
        model = fetch_base_model(config, folder)
        template = chat_template(model.folder, config.spec.model.chat_template)
        return cls(config, open_sources(config), open_held_out(config), model, template)

    @cached_property
    def options(self) -> Dataset:
        """As they take effect: examples that are prompts are not packed."""
        return self.config.spec.dataset.model_copy(update={"packing": False}) if self.prompts else self.config.spec.dataset

    @property
    def pairs(self) -> bool:
        """Whether the examples are pairs of preferences."""
        return self.config.spec.method.examples is Examples.PREFERENCES

    @property
    def unpaired(self) -> bool:
        """Whether the examples are answers that are marked as good or bad: pairs of which one side is missing."""
        return self.config.spec.method.examples is Examples.UNPAIRED

    @property
    def prompts(self) -> bool:
        """Whether the examples are prompts for the model to answer itself."""
        return self.config.spec.method.examples is Examples.PROMPTS

    @property
    def seq2seq(self) -> bool:
        """Whether the examples are sources with their targets."""
        return self.model.seq2seq

    @property
    def instructed(self) -> bool:
        """Whether instructions stand apart from their inputs."""
        return self.config.spec.method.tuner is Tuner.HINT

    def check(self) -> None:
        """Refuse a model that cannot be tuned, or not in this way."""
        check_supported(self.model, self.config.spec.model.architecture)
        if self.seq2seq:
            check_method(self.config.spec)
        if self.instructed:
            check_hint(self.model.config)

    @property
    def seed(self) -> int:
        return self.config.spec.hyperparameters.seed

    @property
    def longest(self) -> int:
        """Tokens that an example may have. Positions begin anew with each example, so a packed row may be longer than the model reads."""
        return min(self.options.max_length, self.model.context or self.options.max_length)

    @property
    def compares(self) -> bool:
        """Whether near duplicates are looked for: to drop them, or to keep them away from the rows to test with."""
        tests = self.options.test_fraction > 0 or any(source.spec.split is Split.TEST for source in self.sources)
        return self.options.cleaning.near_duplicates.enabled or tests

    @cached_property
    def depends(self) -> dict[str, Any]:
        """Everything that the prepared data depends on."""
        options = self.options.model_dump(mode="json", by_alias=True)
        method = self.config.spec.method
        examples: dict[str, Any] = {"examples": method.examples.value} if self.prompts or self.unpaired else {}
        if self.pairs:
            examples = {"objective": "dpo"}  # as it was called before other objectives learned from the same pairs
        if self.prompts:
            examples |= {"answered": method.compares_answers}
        held_out = {"heldOut": [source.identity() for source in self.held_out]} if self.held_out else {}
        architecture = {"architecture": Architecture.SEQ2SEQ.value, "instructed": self.instructed} if self.seq2seq else {}
        commit = {"modelCommit": self.model.commit} if self.model.commit else {}
        return {
            "version": DATA_VERSION,
            "sources": [source.identity() for source in self.sources],
            "options": {name: options[name] for name in _OPTIONS},
            "seed": self.seed,
            "template": self.template,
            "model": self.model.hashes,
            **examples,
            **architecture,
            **held_out,
            **commit,
        }

    @cached_property
    def digest(self) -> str:
        """The address of the prepared data: SHA-256 of what it depends on."""
        return hashlib.sha256(orjson.dumps(self.depends, option=orjson.OPT_SORT_KEYS)).hexdigest()
