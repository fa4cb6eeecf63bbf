"""The quick start's base model: small, safe to load, knows every word, and cannot yet answer a chat."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

LARGEST_FOLDER_BYTES = 8_000_000
# The platform's template for models that bring none.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

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
    text = tokenizer.apply_chat_template(chat(row), chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


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

    def first_thousand(seed: int) -> list[tuple[str, str]]:
        return list(itertools.islice(make_model.statements(seed, splits), 1000))

    assert first_thousand(1) == first_thousand(1)
    assert first_thousand(1) != first_thousand(2)


def test_pretraining_text_holds_no_chat_marker_and_no_held_out_list(make_model: ModuleType, make_data: ModuleType) -> None:
    splits = make_data.make_splits()
    held_out = {words for family, words in splits.held_out_subjects if family in ("list", "larger")}
    for given, rest in itertools.islice(make_model.statements(make_model.SEED, splits), 5000):
        assert "<|" not in given + rest
        words = frozenset(given.split()) & frozenset(make_data.NOUNS + make_data.NUMBERS)
        assert len(words) < 2 or words not in held_out
