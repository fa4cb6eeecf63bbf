"""Rows of every format and file type: the exact text that the model sees, and the exact parts of it that are learned."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.models import tiny_model
from tests.support.preparing import Told, a_data_job, examples, prepare_here, rows, write_lines
from tunewright_trainer.prepare.template import load_tokenizer, render_prompt_ids


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


ASSISTANT = "<|im_start|>assistant\n"
END = "<|im_end|>"
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
CHAT_TOLD = Told(
    turn("system", "Be short.") + turn("user", "One?") + turn("assistant", "1") + turn("user", "Two?") + ASSISTANT + "2" + END,
    ("1" + END, "2" + END),
)
PLAIN_TOLD = Told(turn("user", "Add.\n\n1 2") + ASSISTANT + "3" + END, ("3" + END,))

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], Told]] = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, {}, PLAIN_TOLD),
    "alpaca without input": (
        {"instruction": "Hi.", "output": "Hello"},
        {},
        Told(turn("user", "Hi.") + ASSISTANT + "Hello" + END, ("Hello" + END,)),
    ),
    "alpaca whose input is null": (
        {"instruction": "Hi.", "input": None, "output": "Hello"},
        {},
        Told(turn("user", "Hi.") + ASSISTANT + "Hello" + END, ("Hello" + END,)),
    ),
    "alpaca with a system prompt and a history": (
        {"instruction": "Two?", "output": "2", "system": "Be short.", "history": [["One?", "1"]]},
        {},
        CHAT_TOLD,
    ),
    "chat in messages": ({"messages": CHAT}, {}, CHAT_TOLD),
    "chat in conversations, with from and value": (
        {
            "system": "Be short.",
            "conversations": [
                {"from": "human", "value": "One?"},
                {"from": "gpt", "value": "1"},
                {"from": "human", "value": "Two?"},
                {"from": "gpt", "value": "2"},
            ],
        },
        {},
        CHAT_TOLD,
    ),
    "prompt and completion": ({"prompt": "Add.\n\n1 2", "completion": "3"}, {}, PLAIN_TOLD),
    "keys of its own, by columns": (
        {"question": "Add.", "context": "1 2", "answer": "3"},
        {"columns": {"instruction": "question", "input": "context", "output": "answer"}},
        PLAIN_TOLD,
    ),
    "a format that is said where two would fit": (
        {"instruction": "no", "output": "no", "prompt": "Add.\n\n1 2", "completion": "3"},
        {"format": "prompt-completion"},
        PLAIN_TOLD,
    ),
    "characters of several bytes": (
        {"instruction": "Grüße", "output": "こんにちは 🎉"},
        {},
        Told(turn("user", "Grüße") + ASSISTANT + "こんにちは 🎉" + END, ("こんにちは 🎉" + END,)),
    ),
    "control characters and Windows line ends": (
        {"instruction": "a\r\nb\x00\x07", "output": "c\r\nd"},
        {},
        Told(turn("user", "a\nb") + ASSISTANT + "c\nd" + END, ("c\nd" + END,)),
    ),
}


@pytest.mark.parametrize(("row", "source", "told"), ROWS.values(), ids=ROWS)
def test_a_row_becomes_exactly_this(tmp_path: Path, row: dict[str, Any], source: dict[str, Any], told: Told) -> None:
    file = write_lines(tmp_path / "data.jsonl", [row])
    prepare_here(a_data_job({"uri": str(file), **source}), tmp_path)
    assert examples(tmp_path) == [told]


WHOLE = CHAT_TOLD.text + "\n"
LEARNED = {
    "response": CHAT_TOLD,
    "last-response": Told(CHAT_TOLD.text, CHAT_TOLD.learned[1:]),
    "all": Told(WHOLE, (WHOLE.removeprefix("<|im_start|>"),)),  # nothing comes before the first token, so nothing can predict it
}


@pytest.mark.parametrize(("train_on", "told"), LEARNED.items(), ids=LEARNED)
def test_what_is_learned_is_what_the_job_says(tmp_path: Path, train_on: str, told: Told) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"messages": CHAT}])
    prepare_here(a_data_job(file, dataset={"trainOn": train_on}), tmp_path)
    assert examples(tmp_path) == [told]


ALPACA = [{"instruction": f"Add {n}.", "input": 'a,\n"b"', "output": f"{n}"} for n in range(7)]
ALPACA_TOLD = [Told(turn("user", f'Add {n}.\n\na,\n"b"') + ASSISTANT + f"{n}" + END, (f"{n}" + END,)) for n in range(7)]


def as_csv() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ALPACA[0]))
    writer.writeheader()
    writer.writerows(ALPACA)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ALPACA), sink)
    return sink.getvalue()


PLAIN_FILES = {
    "data.json": json.dumps(ALPACA, indent=1).encode(),
    "lines.json": "\n".join(map(json.dumps, ALPACA)).encode(),
    "DATA.JSONL": ("\n\n".join(map(json.dumps, ALPACA)) + "\n").encode(),
    "data.csv": as_csv(),
    "data.parquet": as_parquet(),
    "with-a-byte-order-mark.jsonl": b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ALPACA)).encode(),
}


@pytest.mark.parametrize("name", PLAIN_FILES)
def test_every_file_type_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PLAIN_FILES[name])
    prepare_here(a_data_job(tmp_path / name), tmp_path)
    assert examples(tmp_path) == ALPACA_TOLD


def test_a_folder_of_files_is_read_in_order_and_others_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_lines(folder / "a.jsonl.gz", ALPACA[:2])
    write_lines(folder / "b" / "b.jsonl.zst", ALPACA[2:5])
    write_lines(folder / "c.jsonl", ALPACA[5:])
    (folder / "README.md").write_text("Not data.")
    prepare_here(a_data_job(folder), tmp_path)
    assert examples(tmp_path) == ALPACA_TOLD
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sources"][0]["skippedFiles"] == ["README.md"]


def test_the_template_of_the_job_wins_and_without_any_a_plain_one_serves(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"prompt": "Q", "completion": "A"}])
    bare = tiny_model("llama")
    prepare_here(a_data_job(file, base=bare), tmp_path / "bare")
    # The end of turn is no token of this model, so the end-of-text token follows for engines that stop at nothing else.
    assert examples(tmp_path / "bare", model=bare) == [
        Told("<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|><|im_end|>", ("A<|end|><|im_end|>",))
    ]
    own = (
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prepare_here(a_data_job(file, model={"chatTemplate": own}), tmp_path / "own")
    assert examples(tmp_path / "own") == [Told("[user]Q[assistant]A<|im_end|>", ("A<|im_end|>",))]


def test_the_prompt_of_training_is_that_of_serving_token_by_token(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"messages": CHAT}])
    config = a_data_job(file, dataset={"trainOn": "last-response"})
    prepare_here(config, tmp_path)
    tokenizer = load_tokenizer(Path(config.spec.model.uri))
    prompt = render_prompt_ids(tokenizer, CHAT[:-1], tokenizer.chat_template)
    assert examples(tmp_path)[0].learned == ("2" + END,)
    (row,) = rows(tmp_path)
    assert row["input_ids"][: len(prompt)] == prompt
    assert set(row["labels"][: len(prompt)]) == {-100}
    assert row["labels"][len(prompt)] != -100
