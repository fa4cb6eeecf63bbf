"""What is tested with is not trained on: a piece of it inside a longer row is found, and a common phrase is not one."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.preparing import a_data_job, examples, prepare_here, report, write_lines
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer.prepare import contamination

SECRET = "On the seventh day the old lighthouse keeper finally wrote down his own name in ink"  # 16 words
COMMON = "The answer to this question is that it depends on the"  # 11 words
REASON = "shares 13 words in a row with a held-out row"


def a_job(tmp_path: Path, train: list[dict[str, Any]], held: list[Any], *, split: str = "", **options: Any) -> PodConfig:
    """Rows to train on, and others that are held out as a source with this split, or in `against`."""
    sources: list[Any] = [write_lines(tmp_path / "train.jsonl", train)]
    other = str(write_lines(tmp_path / "held.jsonl", held))
    if split:
        sources.append({"uri": other, "split": split})
    rule = {"enabled": True, "against": [] if split else [other], **options}
    return a_data_job(*sources, dataset={"cleaning": {"decontaminate": rule}})


def a_row(prompt: str, completion: str = "Yes.") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


TRAIN = [
    a_row("Go on.", f"Once there was a story. {SECRET.upper().replace(' ', ', ')}! And so it ended."),
    a_row(COMMON, "weather in the north"),
    a_row(" ".join(SECRET.split()[:12]), "and then nothing"),
    a_row("Two and two?", "four"),
    a_row("Two and two?", "five"),
]
HELD: dict[str, tuple[list[Any], str]] = {
    "a source to test with": ([a_row("Copy.", SECRET), a_row(f"{COMMON} general", "mood"), a_row("two AND two", "Four")], "test"),
    "a source to validate with": ([a_row("Copy.", SECRET), a_row(f"{COMMON} general", "mood"), a_row("two AND two", "Four")], "validation"),
    "files of known shapes": ([a_row("Copy.", SECRET), a_row(f"{COMMON} general", "mood"), a_row("two AND two", "Four")], ""),
    "files of any shape": (
        [{"title": "", "body": {"parts": [3, SECRET]}}, {"x": f"{COMMON} general mood"}, {"q": "two AND two", "a": "Four"}],
        "",
    ),
}


@pytest.mark.parametrize(("held", "split"), HELD.values(), ids=HELD)
def test_rows_that_share_a_run_of_words_are_not_trained_on(tmp_path: Path, held: list[Any], split: str) -> None:
    prepare_here(a_job(tmp_path, TRAIN, held, split=split), tmp_path)
    assert report(tmp_path)["droppedAt"] == {REASON: ["train.jsonl:1", "train.jsonl:4"]}
    assert len(examples(tmp_path)) == 3
    assert len(examples(tmp_path, split or "test")) == (3 if split else 0), "what is compared with is no data"


def test_a_longer_run_is_shared_by_fewer(tmp_path: Path) -> None:
    prepare_here(a_job(tmp_path, TRAIN[:3], [a_row("Copy.", SECRET)], words=17), tmp_path)
    assert len(examples(tmp_path)) == 3


def test_system_messages_are_not_compared(tmp_path: Path) -> None:
    rows = [{"system": SECRET, "prompt": f"{n} is what?", "completion": "A number."} for n in range(2)]
    prepare_here(a_job(tmp_path, rows[:1], rows[1:]), tmp_path)
    assert len(examples(tmp_path)) == 1


def test_the_address_follows_what_is_compared_with(tmp_path: Path) -> None:
    digests = []
    for text in (SECRET, COMMON, SECRET):
        outcome = prepare_here(a_job(tmp_path, TRAIN, [{"text": text}]), tmp_path)
        assert outcome.dataset is not None
        digests.append(outcome.dataset.digest)
    assert digests[0] == digests[2] != digests[1]


def test_rows_that_cannot_be_compared_end_the_job(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"held.jsonl:1: is no JSON object.*must be readable") as told:
        prepare_here(a_job(tmp_path, TRAIN, [["no object"]]), tmp_path)
    assert (told.value.code, told.value.param) == (FailureCode.DATA_INVALID, "spec.dataset.cleaning.decontaminate.against[0]")
    with pytest.raises(Refusal, match="holds no rows"):
        prepare_here(a_job(tmp_path, TRAIN, []), tmp_path)


def test_more_than_fits_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "MOST_RUNS", 3)
    with pytest.raises(Refusal, match="more than 3 different runs of 13 words"):
        prepare_here(a_job(tmp_path, TRAIN, [{"text": SECRET}]), tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to compare with": ({"enabled": True}, "decontaminate needs something to compare with"),
    "against without the rule": ({"against": ["s3://data/x"]}, "against is for a decontamination that is enabled"),
}


@pytest.mark.parametrize(("rule", "said"), REFUSED.values(), ids=REFUSED)
def test_a_rule_without_effect_is_refused(tmp_path: Path, rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        a_data_job(tmp_path, dataset={"cleaning": {"decontaminate": rule}})
