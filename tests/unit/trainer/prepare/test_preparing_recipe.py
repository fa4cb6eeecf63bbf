"""What the owner of a data set is promised: stable splits, an address that changes when it should, drops that are counted."""

import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, examples, out, prepare_here, report, write_lines
from tests.support.rows import alpaca_rows
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_trainer import process
from tunewright_trainer.prepare import encoding, reading
from tunewright_trainer.prepare.model import fetch_base_model
from tunewright_trainer.prepare.sources import open_sources
from tunewright_trainer.prepare.task import Task
from tunewright_trainer.prepare.template import chat_template
from tunewright_trainer.storage import LocalStore

SPLIT = {"validationFraction": 0.2, "testFraction": 0.1}


def digest(outcome: Outcome) -> str:
    assert outcome.dataset is not None
    return outcome.dataset.digest


def test_the_splits_do_not_depend_on_the_order_or_the_files_of_the_rows(tmp_path: Path) -> None:
    data = alpaca_rows(100)
    first = write_lines(tmp_path / "one.jsonl", data)
    outcome = prepare_here(a_data_job(first, dataset=SPLIT), tmp_path / "first")
    random.Random(1).shuffle(data)
    parts = [write_lines(tmp_path / f"{n}.jsonl", data[n::3]) for n in range(3)]
    prepare_here(a_data_job(*parts, dataset=SPLIT), tmp_path / "second")
    found = {split: sorted(examples(tmp_path / "first", split)) for split in ("train", "validation", "test")}
    assert {split: len(members) for split, members in found.items()} == {"train": 70, "validation": 20, "test": 10}
    assert found == {split: sorted(examples(tmp_path / "second", split)) for split in found}
    assert outcome.dataset is not None
    assert (outcome.dataset.train_examples, outcome.dataset.validation_examples, outcome.dataset.test_examples) == (70, 20, 10)


def test_rows_that_are_added_move_few_others_between_the_splits(tmp_path: Path) -> None:
    for count in (100, 110):
        prepare_here(a_data_job(write_lines(tmp_path / f"{count}.jsonl", alpaca_rows(count)), dataset=SPLIT), tmp_path / str(count))
    before, after = (set(examples(tmp_path / count, "validation")) for count in ("100", "110"))
    assert len(before & after) >= 15


def test_another_seed_draws_another_split(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", alpaca_rows(100))
    for seed in (1, 2):
        prepare_here(a_data_job(file, dataset=SPLIT, hyperparameters={"seed": seed}), tmp_path / str(seed))
    assert sorted(examples(tmp_path / "1", "validation")) != sorted(examples(tmp_path / "2", "validation"))


def test_a_row_to_test_with_is_never_trained_on(tmp_path: Path) -> None:
    data = alpaca_rows(30)
    sources = [
        {"uri": str(write_lines(tmp_path / "train.jsonl", data))},
        {"uri": str(write_lines(tmp_path / "test.jsonl", data[5:9])), "split": "test"},
        {"uri": str(write_lines(tmp_path / "validation.jsonl", data[7:12])), "split": "validation"},
    ]
    prepare_here(a_data_job(*sources, dataset=SPLIT | {"testFraction": 0}), tmp_path)
    found = {split: set(examples(tmp_path, split)) for split in ("train", "validation", "test")}
    assert {split: len(members) for split, members in found.items()} == {"train": 23, "validation": 3, "test": 4}
    assert report(tmp_path)["dropped"] == {"duplicate": 9 - 2 + 2}


CHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "the learning rate": ({"hyperparameters": {"learningRate": 0.5}}, False),
    "the tuner": ({"method": {"tuner": "full"}}, False),
    "the resources": ({"resources": {"cpu": "3"}}, False),
    "the longest length": ({"dataset": {"maxLength": 400}}, True),
    "packing": ({"dataset": {"packing": True}}, True),
    "a fraction": ({"dataset": {"validationFraction": 0.1}}, True),
    "cleaning": ({"dataset": {"cleaning": {"deduplicate": False}}}, True),
    "what is learned": ({"dataset": {"trainOn": "all"}}, True),
    "the seed of the split": ({"hyperparameters": {"seed": 7}}, True),
    "the template": ({"model": {"chatTemplate": "{{ messages[0]['content'] }}{{ eos_token }}"}}, True),
}


@pytest.mark.parametrize(("parts", "changed"), CHANGES.values(), ids=CHANGES)
def test_the_address_changes_when_the_data_would(tmp_path: Path, parts: dict[str, Any], changed: bool) -> None:
    file = write_lines(tmp_path / "data.jsonl", alpaca_rows(2))
    assert (_address(a_data_job(file, **parts), tmp_path) != _address(a_data_job(file), tmp_path)) is changed


def _address(config: PodConfig, work: Path) -> str:
    model = fetch_base_model(config, work / "base")
    template = chat_template(model.folder, config.spec.model.chat_template)
    return Task(config, open_sources(config), [], model, template).digest


def test_the_address_follows_the_content_of_sources_and_tokenizer_and_not_their_place(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", alpaca_rows(2))
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", chat_template=True), model)
    before = _address(a_data_job(file, base=model), tmp_path)
    assert _address(a_data_job(file), tmp_path) == before
    write_lines(file, alpaca_rows(3))
    after = _address(a_data_job(file, base=model), tmp_path)
    assert after != before
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 99}))
    assert _address(a_data_job(file, base=model), tmp_path) != after


def test_data_that_was_prepared_before_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    config = a_data_job(write_lines(tmp_path / "data.jsonl", alpaca_rows(20)), dataset=SPLIT)
    first = prepare_here(config, tmp_path, store=store).dataset
    monkeypatch.setattr(reading, "load_tokenizer", lambda _: pytest.fail("it was prepared again"))
    second = prepare_here(config, tmp_path, store=store).dataset
    assert first is not None
    assert second is not None
    assert (first.reused, second.reused) == (False, True)
    assert second.model_dump(exclude={"reused"}) == first.model_dump(exclude={"reused"})
    assert second.report_uri.endswith(f"{first.digest}/report.html")


def test_the_same_job_writes_the_same_bytes(tmp_path: Path) -> None:
    config = a_data_job(write_lines(tmp_path / "data.jsonl", alpaca_rows(50)), dataset=SPLIT | {"packing": True})
    manifests = []
    for name in ("one", "two"):
        prepare_here(config, tmp_path / name)
        manifests.append(out(tmp_path / name).get_bytes("manifest.json"))
    assert manifests[0] == manifests[1]


def test_another_job_in_the_same_folder_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", alpaca_rows(50))
    prepare_here(a_data_job(file, dataset=SPLIT), tmp_path)
    prepare_here(a_data_job(file), tmp_path)
    assert not list((tmp_path / "out").glob("validation/*"))
    assert len(examples(tmp_path)) == 50


def test_what_is_dropped_is_counted_by_its_reason(tmp_path: Path) -> None:
    data = [
        *alpaca_rows(10),
        *alpaca_rows(2),
        {"instruction": "empty answer", "output": " "},
        {"instruction": "long", "output": "y" * 5000},
        {"instruction": "longer than the model reads " + "x" * 600, "output": "never reached"},
        {"instruction": "cut", "output": "z" * 600},
    ]
    config = a_data_job(write_lines(tmp_path / "data.jsonl", data), dataset={"cleaning": {"maxCharacters": 1000}})
    outcome = prepare_here(config, tmp_path)
    told = report(tmp_path)
    assert told["dropped"] == {
        "duplicate": 2,
        "answer shorter than cleaning.minOutputCharacters": 1,
        "longer than cleaning.maxCharacters": 1,
        "nothing to learn within maxLength": 1,
    }
    assert told["truncated"] == 1
    assert outcome.dataset is not None
    assert (outcome.dataset.train_examples, outcome.dataset.rejected) == (11, 5)
    dropping = a_data_job(tmp_path / "data.jsonl", dataset={"overlong": "drop"})
    prepare_here(dropping, tmp_path)
    assert report(tmp_path)["dropped"]["longer than maxLength"] == 3


def test_a_stop_ends_it_with_nothing_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = threading.Event()
    event.set()
    monkeypatch.setattr(process, "stop_requested", event)
    with pytest.raises(process.Stopped):
        prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", alpaca_rows(5))), tmp_path)
    assert not out(tmp_path).exists("manifest.json")


def test_the_report_shows_what_is_learned(tmp_path: Path) -> None:
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", [{"prompt": "Q", "completion": "A"}])), tmp_path)
    (sample,) = report(tmp_path)["samples"]
    assert sample == [
        {"text": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "learned": False},
        {"text": "A<|im_end|>", "learned": True},
    ]


def test_arrow_files_open_with_the_datasets_library(tmp_path: Path) -> None:
    from datasets import Dataset

    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", alpaca_rows(5)), dataset={"packing": True}), tmp_path)
    (file,) = (tmp_path / "out" / "train").glob("*.arrow")
    found = Dataset.from_file(str(file))
    assert found.column_names == ["input_ids", "labels", "lengths"]
    assert sum(len(row["lengths"]) for row in found) == 5


def test_the_page_tells_what_the_report_holds_and_data_is_only_text_in_it(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    data = [{"prompt": evil, "completion": f"{n} {evil}"} for n in range(9)]
    file = write_lines(tmp_path / "data.jsonl", [*data, data[0], {"prompt": "a", "completion": ""}])
    prepare_here(a_data_job(file), tmp_path)
    page = out(tmp_path).get_bytes("report.html").decode()
    assert evil not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;|im_end|&gt;</mark>" in page, "the answer, marked as learned"
    assert "http://" not in page
    assert "https://" not in page, "it needs nothing else"
    for told in ("duplicate", "data.jsonl:10", "answer shorter than cleaning.minOutputCharacters", "data.jsonl:11", "not stated"):
        assert told in page
    told_at = [json.loads(line) for line in out(tmp_path).get_bytes("drops.jsonl").splitlines()]
    assert told_at == [
        {"reason": "answer shorter than cleaning.minOutputCharacters", "source": 0, "file": "data.jsonl", "line": 11},
        {"reason": "duplicate", "source": 0, "file": "data.jsonl", "line": 10},
    ]


ADVICE: dict[str, tuple[list[dict[str, str]], dict[str, Any], str]] = {
    "cut answers": ([{"prompt": f"{n}", "completion": "b" * 600} for n in range(4)], {}, "100% of the examples are cut at maxLength."),
    "long prompts": ([{"prompt": f"{n}" + "a" * 400, "completion": "b"} for n in range(4)], {}, "of the tokens are learned."),
    "duplicates": ([{"prompt": "a", "completion": "b"}] * 2, {}, "50% of the examples are duplicates."),
    "no validation": ([{"prompt": "a", "completion": "b"}], {}, "Nothing is kept for validation."),
    "few": ([{"prompt": "a", "completion": "b"}], {}, "There are only 1 examples to train on."),
    "no licence": ([{"prompt": "a", "completion": "b"}], {}, "1 of 1 sources state no licence."),
}


@pytest.mark.parametrize(("data", "dataset", "said"), ADVICE.values(), ids=ADVICE)
def test_the_report_warns_of_what_is_seldom_meant(tmp_path: Path, data: list[dict[str, str]], dataset: dict[str, Any], said: str) -> None:
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", data), dataset=dataset), tmp_path)
    assert any(said in warning["what"] for warning in report(tmp_path)["warnings"]), report(tmp_path)["warnings"]


def test_good_data_is_not_warned_of(tmp_path: Path) -> None:
    source = {"uri": str(write_lines(tmp_path / "data.jsonl", alpaca_rows(200))), "license": "cc0"}
    prepare_here(a_data_job(source, dataset={"validationFraction": 0.1}), tmp_path)
    assert report(tmp_path)["warnings"] == []


def test_rows_with_the_prompt_of_a_held_out_row_are_not_trained_on(tmp_path: Path) -> None:
    test = write_lines(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "1"}])
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "2"}, {"prompt": "b", "completion": "3"}])
    prepare_here(a_data_job(train, {"uri": str(test), "split": "test"}), tmp_path)
    assert len(examples(tmp_path)) == 1
    assert report(tmp_path)["droppedAt"] == {"same prompt as a held-out row": ["train.jsonl:1"]}


def test_rows_of_one_prompt_stay_together(tmp_path: Path) -> None:
    data = [{"prompt": f"{n // 5}", "completion": f"{n}"} for n in range(200)]
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", data), dataset={"validationFraction": 0.2, "testFraction": 0.1}), tmp_path)
    prompts = {
        split: {told.text.partition("<|im_end|>")[0] for told in examples(tmp_path, split)} for split in ("train", "validation", "test")
    }
    assert all(prompts.values())
    assert sum(map(len, prompts.values())) == 40, "no prompt is in two splits"


def test_many_rows_are_encoded_by_several_processes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 50)
    monkeypatch.setattr(encoding, "ALONE", 2)
    file = write_lines(tmp_path / "data.jsonl", alpaca_rows(1000))
    found = []
    for processes in ("1", "2"):
        work = tmp_path / processes
        prepare_here(a_data_job(file, dataset={"validationFraction": 0.1, "packing": True}, resources={"cpu": processes}), work)
        found.append([path.read_bytes() for path in sorted((work / "out").rglob("*.arrow"))])
    assert found[0] == found[1]
    assert len(found[0]) == 2


class _Deadly:
    """An encoder that dies with its process, as the kernel has it when memory runs out."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (137,)


def test_a_process_that_is_killed_is_told_as_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 50)
    monkeypatch.setattr(encoding, "ALONE", 2)
    monkeypatch.setattr(encoding.Recipe, "__getnewargs__", lambda _: (_Deadly(),), raising=False)
    file = write_lines(tmp_path / "data.jsonl", alpaca_rows(1000))
    with pytest.raises(MemoryError, match="was killed"):
        prepare_here(a_data_job(file, resources={"cpu": "2"}), tmp_path)
