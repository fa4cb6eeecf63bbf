"""From answers to numbers: what each metric is, and how sure it is."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tunewright_crds.evaluation import Classification, MetricName

Floats = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95
MAX_CLASSES: Final = 50
_LABEL_WORDS, _LABEL_CHARACTERS = 5, 40
_EXAMPLES_A_CLASS: Final = 3
_CELLS: Final = 2_000_000  # of the table of resamples that is in memory at a time
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Ratio:
    """A metric that is a sum over the examples by another sum, [examples] each; ``exponential``: e to the power of that."""

    numerators: Floats
    denominators: Floats
    exponential: bool = False

    @classmethod
    def mean(cls, values: Sequence[float] | Floats) -> "Ratio":
        """The plain mean."""
        return cls(np.asarray(values, dtype=np.float64), np.ones(len(values)))

    def of(self, counts: Floats) -> Floats:
        """The metric [resamples], each example taken as often as ``counts`` [resamples, examples] says."""
        ratio = (counts @ self.numerators) / np.maximum(counts @ self.denominators, 1e-12)
        return np.exp(np.minimum(ratio, 700.0)) if self.exponential else ratio

    def __len__(self) -> int:
        return len(self.numerators)

    @property
    def value(self) -> float:
        return float(self.of(np.ones((1, len(self))))[0])


@dataclass(frozen=True)
class Corpus:
    """A metric of all examples together, from statistics of each [examples, statistics], summed."""

    statistics: Floats
    compute: Callable[[list[float]], float]

    @classmethod
    def of_sacrebleu(cls, metric: Any, answers: Sequence[str], expected: Sequence[str]) -> "Corpus":
        """By sacrebleu's own parts: its own resampling holds every draw of every example in memory, and fails where a score is exactly 0 (2.6)."""
        statistics = metric._extract_corpus_statistics(list(answers), [list(expected)])
        return cls(np.asarray(statistics, dtype=np.float64), lambda sums: float(metric._compute_score_from_stats(sums).score))

    def __len__(self) -> int:
        return len(self.statistics)

    def of(self, counts: Floats) -> Floats:
        """As `Ratio.of`."""
        return np.array([self.compute([round(total) for total in row]) for row in (counts @ self.statistics).tolist()])

    @property
    def value(self) -> float:
        return float(self.of(np.ones((1, len(self))))[0])


@dataclass(frozen=True)
class Ranking:
    """How often of two examples, a good and a bad one, the good one has more: the area under the ROC curve, where as much as the other counts half.

    ``values`` and ``good`` are [examples].
    """

    values: Floats
    good: np.ndarray[Any, np.dtype[np.bool_]]

    def __len__(self) -> int:
        return len(self.values)

    def of(self, counts: Floats) -> Floats:
        """As `Ratio.of`; 1/2 where all examples that are drawn are good, or all bad."""
        order = np.argsort(self.values, kind="stable")
        _, starts = np.unique(self.values[order], return_index=True)
        ranked, is_good = counts[:, order], self.good[order]
        good, bad = (np.add.reduceat(ranked * which, starts, axis=1) for which in (is_good, ~is_good))
        below = np.cumsum(bad, axis=1) - bad / 2
        pairs = good.sum(axis=1) * bad.sum(axis=1)
        return np.where(pairs > 0, (good * below).sum(axis=1) / np.maximum(pairs, 1), 0.5)

    @property
    def value(self) -> float:
        return float(self.of(np.ones((1, len(self))))[0])


Resampled = Ratio | Corpus | Ranking


def resampled(metrics: Sequence[Resampled], *, seed: int) -> list[Floats]:
    """Each metric [resamples] over the same `RESAMPLES` draws of the examples with replacement (the bootstrap: Efron 1979)."""
    count = len(metrics[0])
    random = np.random.default_rng(seed)
    at_once = max(1, _CELLS // count)
    parts: list[list[Floats]] = [[] for _ in metrics]
    for start in range(0, RESAMPLES, at_once):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(at_once, RESAMPLES - start)).astype(np.float64)
        for part, metric in zip(parts, metrics, strict=True):
            part.append(metric.of(drawn))
    return [np.concatenate(part) for part in parts]


def interval(values: Floats) -> tuple[float, float]:
    """The middle `CONFIDENCE` of resampled values."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def normalised(text: str) -> str:
    """Without case, punctuation, articles and further white space, as the evaluation script of SQuAD has it (Rajpurkar et al. 2016)."""
    plain = "".join(" " if _is_punctuation(character) else character for character in text.lower())
    words = _ARTICLES.sub(" ", plain).split()
    return " ".join(words) or text.strip()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: str, expected: str) -> float:
    """1 where both say the same once `normalised`."""
    return float(normalised(answer) == normalised(expected))


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words that both have, once `normalised`."""
    said, wanted = normalised(answer).split(), normalised(expected).split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


class _Words:
    """Words of any script; the tokenizer that rouge-score brings knows Latin letters only."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def rouge_l() -> Callable[[str, str], float]:
    """ROUGE-L's F-measure (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, expected: float(scorer.score(expected, answer)["rougeL"].fmeasure)


def of_text(answers: Sequence[str], expected: Sequence[str]) -> dict[MetricName, Resampled]:
    """Metrics that compare an answer with the right one."""
    scorers = {MetricName.EXACT_MATCH: exact_match, MetricName.F1: token_f1, MetricName.ROUGE_L: rouge_l()}
    return {
        name: Ratio.mean([score(answer, right) for answer, right in zip(answers, expected, strict=True)]) for name, score in scorers.items()
    }


def of_corpus(answers: Sequence[str], expected: Sequence[str]) -> dict[MetricName, Resampled]:
    """Metrics of all answers together, 0 to 100: BLEU (Papineni et al. 2002) and chrF (Popović 2015) as sacrebleu has them."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # In effective order: as usual, unless all answers are too short for the longer n-grams.
    metrics = {MetricName.BLEU: BLEU(force=True, effective_order=True), MetricName.CHRF: CHRF()}
    return {name: Corpus.of_sacrebleu(metric, answers, expected) for name, metric in metrics.items()}


def classes(expected: Sequence[str], wanted: Classification) -> list[str]:
    """The labels that the right answers are, `normalised`; none where they are no labels."""
    counts = Counter(normalised(text) for text in expected)
    if wanted is Classification.NEVER or not 2 <= len(counts) <= MAX_CLASSES:
        return []
    short = all(len(label.split()) <= _LABEL_WORDS and len(label) <= _LABEL_CHARACTERS for label in counts)
    few = len(counts) * _EXAMPLES_A_CLASS <= len(expected)
    return sorted(counts) if wanted is Classification.ALWAYS or (short and few) else []


def of_labels(
    answers: Sequence[str], expected: Sequence[str], labels: Sequence[str]
) -> tuple[Ratio, dict[MetricName, float], list[Mapping[str, Any]]]:
    """Accuracy, the macro averages, and what each class comes to. An answer that is no label is wrong, and of no class."""
    from sklearn.metrics import precision_recall_fscore_support

    said, right = [normalised(text) for text in answers], [normalised(text) for text in expected]
    accuracy = Ratio.mean([float(one == other) for one, other in zip(said, right, strict=True)])
    each = precision_recall_fscore_support(right, said, labels=list(labels), zero_division=0)
    table: list[Mapping[str, Any]] = [
        {"label": label, "precision": float(precision), "recall": float(recall), "f1": float(f1), "examples": int(support)}
        for label, precision, recall, f1, support in zip(labels, *each, strict=True)
    ]
    names = (MetricName.MACRO_PRECISION, MetricName.MACRO_RECALL, MetricName.MACRO_F1)
    return accuracy, {name: float(np.mean(values)) for name, values in zip(names, each, strict=False)}, table
