"""The data report: what was read, what was left out and why, and what the model will see of the rest."""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np

from tunewright_crds.dataset import DatasetStatus, Split
from tunewright_crds.job import Architecture
from tunewright_crds.method import REINFORCED, Examples
from tunewright_trainer.prepare.cleaning import Cleaner
from tunewright_trainer.prepare.drops import Drops
from tunewright_trainer.prepare.encode import IGNORED, Encoded, Ints
from tunewright_trainer.prepare.sources import MAX_ERRORS_TOLD, OpenSource
from tunewright_trainer.prepare.spill import Written
from tunewright_trainer.prepare.task import Task

SAMPLES: Final = 3
_BARS: Final = 40  # of the histogram
# Shares and counts from which on a warning is worth its line.
FEW, MANY, LITTLE, ENOUGH = 0.01, 0.05, 0.1, 100


class Findings:
    """What is noted while data is prepared. The report is the one place that shows rows: three examples with what is learned of them."""

    def __init__(self, task: Task, drops: Drops) -> None:
        self.sources = task.sources
        self.status = DatasetStatus(digest=task.digest, licenses=sorted({source.license for source in task.sources if source.license}))
        self.options = task.options
        self.longest = task.longest
        self.objective = task.config.spec.method.objective
        self.seq2seq = task.seq2seq
        self.examples = task.config.spec.method.examples
        self.drops = drops
        self.cleaner = Cleaner(task.options.cleaning)
        self.splits: dict[str, Written] = {}
        self.truncated = 0
        self._samples: list[tuple[int, list[dict[str, Any]]]] = []  # number of the source, the example in pieces
        self._tokens = self._unknown = 0
        self._marked = task.unpaired
        self.desirable = 0
        self._each = max(1, SAMPLES // sum(source.spec.split is Split.TRAIN for source in self.sources))
        self._bar = max(1, -(-self.longest // _BARS))
        self._lengths = np.zeros(-(-self.longest // self._bar), dtype=np.int64)

    def take(self, found: Encoded, tokenizer: Any, source: OpenSource) -> None:
        """Note a batch of examples."""
        self._tokens += len(found.ids)
        if tokenizer.unk_token_id is not None:
            self._unknown += int((found.ids == tokenizer.unk_token_id).sum())
        self.truncated += found.truncated
        self.desirable += int((found.chosen > 0).sum()) if self._marked else 0
        self._lengths += np.bincount((found.longest - 1) // self._bar, minlength=len(self._lengths))
        if source.spec.split is Split.TRAIN:
            wanted = range(min(self._room(source.index), len(found.lengths)))
            self._samples += [(source.index, _shown(found, number, tokenizer)) for number in wanted]

    def _room(self, source: int) -> int:
        """How many more examples of a source are shown."""
        return max(0, min(self._each - sum(number == source for number, _ in self._samples), SAMPLES - len(self._samples)))

    def tally(self) -> dict[str, Any]:
        """What was found while reading, for `add` elsewhere."""
        return {
            "sources": [{"rows": source.rows, "invalid": source.invalid, "errors": source.errors} for source in self.sources],
            "tokens": self._tokens,
            "unknown": self._unknown,
            "truncated": self.truncated,
            "desirable": self.desirable,
            "lengths": self._lengths.tolist(),
            "samples": self._samples,
            "rules": self.cleaner.facts(),
        }

    def add(self, tally: dict[str, Any]) -> None:
        """Take in what was found in data that comes after what this knows already."""
        for source, told in zip(self.sources, tally["sources"], strict=True):
            source.rows += told["rows"]
            source.invalid += told["invalid"]
            source.errors += told["errors"][: MAX_ERRORS_TOLD - len(source.errors)]
        self._tokens += tally["tokens"]
        self._unknown += tally["unknown"]
        self.truncated += tally["truncated"]
        self.desirable += tally["desirable"]
        self._lengths += np.array(tally["lengths"], dtype=np.int64)
        self.cleaner.add(tally["rules"])
        self._samples += [(number, sample) for number, sample in tally["samples"] if self._room(number)]

    def told_splits(self) -> dict[str, dict[str, int]]:
        return {name: asdict(written) for name, written in self.splits.items()}

    def facts(self) -> dict[str, Any]:
        """The report as data."""
        train = self.splits.get(Split.TRAIN.value, Written())
        packs = self.options.packing and self.examples is Examples.CONVERSATIONS and not self.seq2seq
        facts = {
            "objective": self.objective.value,
            "architecture": (Architecture.SEQ2SEQ if self.seq2seq else Architecture.CAUSAL).value,
            "examples": self.examples.value,
            "dataset": self.status.model_dump(mode="json", by_alias=True, exclude={"reused", "report_uri"}),
            "sources": [
                {
                    "uri": source.place.uri,
                    "files": len(source.files),
                    "skippedFiles": source.skipped[:MAX_ERRORS_TOLD],
                    "rows": source.rows,
                    "invalid": source.invalid,
                    "weight": source.spec.weight,
                    "license": source.license,
                }
                for source in self.sources
            ],
            "invalid": sum(source.invalid for source in self.sources),
            "errors": [error for source in self.sources for error in source.errors][:MAX_ERRORS_TOLD],
            "dropped": dict(self.drops.counts.most_common()),
            "droppedAt": self.drops.places,
            **self.cleaner.facts(),
            "truncated": self.truncated,
            "desirable": self.desirable if self._marked else None,
            "undesirable": int(self._lengths.sum()) - self.desirable if self._marked else None,
            "longestAllowed": self.longest,
            "splits": self.told_splits(),
            "packedShare": round(train.tokens / (train.rows * self.options.max_length), 4) if train.rows and packs else None,
            "unknownShare": round(self._unknown / self._tokens, 4) if self._tokens else None,
            "learnedShare": round(train.trainable_tokens / train.tokens, 4) if train.tokens else None,
            "examplesByTokens": [
                {"from": at * self._bar + 1, "to": min((at + 1) * self._bar, self.longest), "examples": int(count)}
                for at, count in enumerate(self._lengths)
            ],
            "samples": [sample for _, sample in self._samples],
        }
        return facts | {"warnings": [asdict(warning) for warning in warnings(facts)]}


@dataclass(frozen=True)
class Advice:
    """Something that is allowed and yet seldom meant."""

    what: str
    advice: str


def warnings(facts: dict[str, Any]) -> list[Advice]:
    """What a careful reader of the report would ask about."""
    data = facts["dataset"]
    examples = sum(bar["examples"] for bar in facts["examplesByTokens"])
    found: list[Advice] = []
    if not data["trainExamples"]:
        return found
    if facts["truncated"] > FEW * examples:
        share = facts["truncated"] / examples
        found.append(
            Advice(
                f"{share:.0%} of the examples are cut at maxLength.",
                "The model does not learn their ends: raise maxLength, or set overlong: drop.",
            )
        )
    if facts["objective"] not in REINFORCED and facts["learnedShare"] < LITTLE:
        found.append(
            Advice(
                f"Only {facts['learnedShare']:.1%} of the tokens are learned.",
                "Most of the time is spent on prompts; look at the examples below.",
            )
        )
    if facts["unknownShare"] > FEW:
        found.append(
            Advice(
                f"{facts['unknownShare']:.0%} of the tokens are unknown to the model's tokenizer.",
                "It cannot tell such words apart: take a model that knows the language.",
            )
        )
    if (twice := facts["dropped"].get("duplicate", 0)) > MANY * examples:
        found.append(
            Advice(
                f"{twice / examples:.0%} of the examples are duplicates.",
                "They are left out; ask whoever made the data why they are there.",
            )
        )
    if not data["validationExamples"]:
        found.append(
            Advice(
                "Nothing is kept for validation.",
                "Learning by heart will not show: set validationFraction, or a source with split: validation.",
            )
        )
    if data["trainExamples"] < ENOUGH:
        found.append(
            Advice(
                f"There are only {data['trainExamples']} examples to train on.", "Some hundred good ones are the least that usually helps."
            )
        )
    unknown = [source["uri"] for source in facts["sources"] if not source["license"]]
    if unknown:
        found.append(
            Advice(
                f"{len(unknown)} of {len(facts['sources'])} sources state no licence.",
                "Name it in the source's license: it travels with the model.",
            )
        )
    return found


def page(facts: dict[str, Any]) -> bytes:
    """The report as a web page that needs nothing else. Data is only ever text in it."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(facts, number="{:,}".format, share=lambda part: "–" if part is None else f"{part:.1%}").encode()


def _shown(found: Encoded, number: int, tokenizer: Any) -> list[dict[str, Any]]:
    """An example as text, in pieces that are learned or not; of a pair the prompt once, the chosen answer, and the rejected one, marked as such."""
    ids, labels = found.example(number)
    if not len(found.chosen):
        return _sample(ids, labels, tokenizer)
    cut = int(found.chosen[number])
    if cut == len(ids):
        return _sample(ids, labels, tokenizer)
    if cut == 0:
        return [piece | ({"rejected": True} if piece["learned"] else {}) for piece in _sample(ids, labels, tokenizer)]
    start = cut + int(np.argmax(labels[cut:] != IGNORED))
    worse = _sample(ids[start:], labels[start:], tokenizer)
    return _sample(ids[:cut], labels[:cut], tokenizer) + [piece | {"rejected": True} for piece in worse]


def _sample(ids: Ints, labels: Ints, tokenizer: Any) -> list[dict[str, Any]]:
    """An example as text, in pieces that are learned or not."""
    learned = labels >= 0
    cuts = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(learned)]
    return [{"text": tokenizer.decode(ids[start:end].tolist()), "learned": bool(learned[start])} for start, end in itertools.pairwise(cuts)]
