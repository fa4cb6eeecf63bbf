"""What each metric is, and how sure it is."""

import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import roc_auc_score

from tunewright_crds.evaluation import Classification, MetricName
from tunewright_trainer.evaluate import scores
from tunewright_trainer.evaluate.scores import Ranking, Ratio

ANSWERS = {
    "the same": ("Paris", "Paris", 1.0, 1.0),
    "case, articles and punctuation do not count": ("The answer: paris!", "answer paris.", 1.0, 1.0),
    "one word of two": ("red car", "red bus", 0.0, 0.5),
    "a word said twice counts once": ("red red", "red", 0.0, 2 / 3),
    "nothing said": ("", "red", 0.0, 0.0),
    "punctuation alone is compared as it is": ("!", "?", 0.0, 0.0),
    "punctuation alone, the same": ("?", "?", 1.0, 1.0),
    "another script": ("Москва", "москва", 1.0, 1.0),
    "punctuation of another script": ("「東京」", "東京", 1.0, 1.0),
}


@pytest.mark.parametrize(("answer", "expected", "exact", "f1"), ANSWERS.values(), ids=ANSWERS)
def test_answers_are_compared_as_the_field_does(answer: str, expected: str, exact: float, f1: float) -> None:
    assert scores.exact_match(answer, expected) == exact
    assert scores.token_f1(answer, expected) == pytest.approx(f1)


def test_overlap_is_measured_in_every_script() -> None:
    found = scores.of_text(["der rote Hund", "красный дом"], ["der Hund", "красный дом"])
    assert list(found[MetricName.ROUGE_L].numerators) == pytest.approx([0.8, 1.0])
    corpus = scores.of_corpus(["the cat sat on the mat"] * 3, ["the cat sat on the mat"] * 3)
    assert [metric.value for metric in corpus.values()] == pytest.approx([100, 100])
    assert scores.of_corpus(["yes", "no"], ["yes", "no"])[MetricName.BLEU].value == pytest.approx(100), (
        "answers of one word have no 4-grams"
    )


def test_corpus_metrics_are_sacrebleus_with_intervals() -> None:
    answers, expected = ["a b c d e f", "x", "a dog runs"], ["a b c d e f", "y", "the dog runs home"]
    found = scores.of_corpus(answers, expected)
    assert found[MetricName.BLEU].value == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score)
    assert found[MetricName.CHRF].value == pytest.approx(sacrebleu.corpus_chrf(answers, [expected]).score)
    for metric in found.values():
        low, high = scores.interval(scores.resampled([metric], seed=1)[0])
        assert low < metric.value < high


def test_intervals_shrink_with_the_number_of_examples_and_hold_the_value() -> None:
    random = np.random.default_rng(3)
    widths = []
    for count in (20, 2000):
        ratio = Ratio.mean((random.random(count) < 0.7).tolist())
        low, high = scores.interval(scores.resampled([ratio], seed=1)[0])
        assert low <= ratio.value <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
    # The standard error of a share of 0.7 among 2,000 is 0.0102, and the interval is 3.92 of them.
    assert widths[1] == pytest.approx(3.92 * 0.0102, rel=0.15)


def test_the_same_seed_draws_the_same_and_models_are_compared_on_the_same_draws() -> None:
    values = np.arange(10.0)
    worse, better = Ratio.mean(values.tolist()), Ratio.mean((values + 1).tolist())
    first, again = (scores.resampled([worse, better], seed=4) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert scores.interval(first[1] - first[0]) == pytest.approx((1, 1)), "each draw differs by what each example differs by"


def test_perplexity_is_of_all_tokens_not_of_examples() -> None:
    ratio = Ratio(np.array([2.0, 10.0]), np.array([1.0, 9.0]), exponential=True)
    assert ratio.value == pytest.approx(np.exp(1.2))


LABELS = {
    "few short answers are labels": (["Yes", "no"] * 5, "auto", ["no", "yes"]),
    "as many answers as examples are none": ([str(n) for n in range(10)], "auto", []),
    "sentences are none": (["this answer has far too many words", "no"] * 5, "auto", []),
    "sentences are, if so wanted": (
        ["this answer has far too many words", "no"] * 2,
        "always",
        ["no", "this answer has far too many words"],
    ),
    "labels are none, if so wanted": (["yes", "no"] * 5, "never", []),
    "one label tells nothing": (["yes"] * 10, "always", []),
}


@pytest.mark.parametrize(("expected", "wanted", "labels"), LABELS.values(), ids=LABELS)
def test_what_counts_as_labels(expected: list[str], wanted: str, labels: list[str]) -> None:
    assert scores.classes(expected, Classification(wanted)) == labels


def test_an_answer_that_is_no_label_is_wrong_and_of_no_class() -> None:
    accuracy, macro, table = scores.of_labels(["yes", "yes", "No.", "perhaps"], ["yes", "no", "no", "no"], ["no", "yes"])
    assert accuracy.value == 0.5
    assert [(row["label"], row["precision"], row["recall"], row["examples"]) for row in table] == [
        ("no", 1.0, 1 / 3, 3),
        ("yes", 0.5, 1.0, 1),
    ]
    assert macro[MetricName.MACRO_RECALL] == pytest.approx(2 / 3)
    assert macro[MetricName.MACRO_F1] == pytest.approx((0.5 + 2 / 3) / 2)


def test_a_ranking_is_the_area_under_the_curve_with_ties_by_half() -> None:
    random = np.random.default_rng(4)
    values, good = random.integers(0, 6, 40).astype(float), random.random(40) < 0.4
    ranking = Ranking(values, good)
    counts = random.integers(0, 3, (5, 40)).astype(float)
    expected = [roc_auc_score(good, values, sample_weight=row) for row in counts]
    assert ranking.of(counts) == pytest.approx(expected)
    assert ranking.value == pytest.approx(roc_auc_score(good, values))
    assert ranking.of(np.where(good, 0.0, 1.0)[None]) == [0.5], "bad ones alone tell nothing"
