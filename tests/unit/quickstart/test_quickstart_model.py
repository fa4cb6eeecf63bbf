"""The quick start's base model: small, safe to load, knows every word, and cannot yet answer a chat."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunewright_trainer.prepare.template import DEFAULT_CHAT_TEMPLATE, render_prompt_ids

LARGEST_FOLDER_BYTES = 8_000_000

Row = dict[str, str]


@pytest.fixture(scope="module")
def tokenizer(quickstart: Path) -> Any:
    return AutoTokenizer.from_pretrained(quickstart / "model")


@pytest.fixture(scope="module")
def rows(quickstart: Path) -> dict[str, list[Row]]:
    return {
        split: [json.loads(line) for line in (quickstart / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "test")
    }


def chat(row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))}]


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    return render_prompt_ids(tokenizer, chat(row), DEFAULT_CHAT_TEMPLATE)


def test_the_folder_is_small_and_holds_nothing_that_runs_code(quickstart: Path) -> None:
    files = {path.name: path.stat().st_size for path in (quickstart / "model").iterdir()}
    assert files.keys() == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) <= LARGEST_FOLDER_BYTES


def test_every_word_of_the_data_is_a_token_and_decodes_to_itself(tokenizer: Any, rows: dict[str, list[Row]]) -> None:
    for row in rows["train"] + rows["test"]:
        assert tokenizer.unk_token_id not in prompt_ids(tokenizer, row), row
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        assert len(answer) == len(row["output"].split())
        assert tokenizer.decode(answer) == row["output"]


def test_the_default_template_gives_role_tokens_and_no_newlines(tokenizer: Any) -> None:
    row = {"instruction": "Reverse the words.", "input": "cat dog cow"}
    tokens = tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, row))
    assert tokens == ["<|user|>", "Reverse", "the", "words", ".", "cat", "dog", "cow", "<|end|>", "<|assistant|>"]
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token == "<|end|>"


def test_the_tokenizer_survives_saving_and_loading(tokenizer: Any, rows: dict[str, list[Row]], tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert all(prompt_ids(again, row) == prompt_ids(tokenizer, row) for row in rows["test"])
    assert (again.pad_token, again.bos_token, again.eos_token, again.unk_token) == ("<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>")


def test_the_untuned_base_answers_none_of_ten_chats(tokenizer: Any, rows: dict[str, list[Row]], quickstart: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quickstart / "model", use_safetensors=True)
    for row in rows["test"][:10]:
        batch = tokenizer.pad({"input_ids": [prompt_ids(tokenizer, row)]}, return_tensors="pt")
        generated = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert tokenizer.decode(generated, skip_special_tokens=True).strip() != row["output"]


def test_pretraining_text_is_fixed_by_its_seed(make_model: ModuleType, make_data: ModuleType) -> None:
    splits = make_data.make_splits()

    def beginning(seed: int) -> list[list[tuple[str, str]]]:
        return list(itertools.islice(make_model.documents(seed, splits), 200))

    assert beginning(1) == beginning(1)
    assert beginning(1) != beginning(2)


def test_pretraining_text_holds_no_chat_marker_and_no_held_out_list(make_model: ModuleType, make_data: ModuleType) -> None:
    splits = make_data.make_splits()
    held_out = {words for family, words in splits.held_out_subjects if family in ("list", "larger")}
    for document in itertools.islice(make_model.documents(make_model.SEED, splits), 2000):
        assert document[-1][1].endswith("<|end|>")
        for given, rest in document:
            assert "<|" not in given + rest.removesuffix("<|end|>")
            words = frozenset(given.split()) & frozenset(make_data.NOUNS + make_data.NUMBERS)
            assert len(words) < 2 or words not in held_out
