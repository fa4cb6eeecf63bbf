"""What a conversation may hold besides questions and answers: tools, messages that are only read, plain text; and rows that other objectives want."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.dialogue import lines
from tests.support.preparing import a_data_job, examples, prepare_here, report, write_lines
from tunewright_crds.errors import Refusal
from tunewright_trainer.prepare.template import DEFAULT_CHAT_TEMPLATE

TOOL = {"name": "weather", "description": "Weather of a town.", "parameters": {"type": "object"}}
CALL = {"name": "weather", "arguments": {"town": "Rome"}}

WITH_TOOLS: dict[str, dict[str, Any]] = {
    "OpenAI's": {
        "tools": [{"type": "function", "function": TOOL}],
        "messages": [
            {"role": "user", "content": "Rome?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "sunny."}]},
        ],
    },
    "ShareGPT's": {
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Rome?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
    },
}


@pytest.mark.parametrize("row", WITH_TOOLS.values(), ids=WITH_TOOLS)
def test_calls_of_tools_are_learned_and_their_answers_read(tmp_path: Path, row: dict[str, Any]) -> None:
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", [row]), model={"chatTemplate": DEFAULT_CHAT_TEMPLATE}), tmp_path)
    (told,) = examples(tmp_path)
    assert told.text.startswith('<|tools|>\n{"type": "function", "function": {"name": "weather"')
    assert "<|tool|>\nsunny<|end|>" in told.text
    called, answered = told.learned
    assert json.loads(called.removeprefix("<|call|>").partition("<|end|>")[0]) == CALL
    assert answered.startswith("It is sunny.<|end|>")


def test_a_template_that_leaves_tools_out_drops_the_row_and_says_so(tmp_path: Path) -> None:
    silent = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [*WITH_TOOLS.values(), {"prompt": "a", "completion": "b"}]
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", rows), model={"chatTemplate": silent}), tmp_path)
    assert report(tmp_path)["dropped"] == {"the chat template leaves out the tools": 2}


def test_a_message_may_be_read_only(tmp_path: Path) -> None:
    talk = [
        {"from": "human", "value": "One?"},
        {"from": "gpt", "value": "Uno", "train": False},
        {"from": "human", "value": "One!"},
        {"from": "gpt", "value": "1"},
    ]
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", [{"system": "Be short.", "conversations": talk}])), tmp_path)
    assert [lines(told) for told in examples(tmp_path)] == [
        ["system: Be short.", "user: One?", "assistant: Uno", "user: One!", "assistant! 1"]
    ]


def test_plain_text_is_learned_whole_with_its_end(tmp_path: Path) -> None:
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", [{"text": "Once upon a time."}])), tmp_path)
    (told,) = examples(tmp_path)
    assert told.text.startswith("Once upon a time.")
    assert "".join(told.learned) == told.text[1:], "nothing comes before the first token, so nothing can predict it"
    assert told.text != "Once upon a time.", "the end of the text is learned too"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "holds preferences: set method.objective: dpo"),
    "preferences beside messages": ({"messages": [], "chosen": [], "rejected": []}, "holds preferences: set method.objective: dpo"),
    "comparisons": ({"user_input": "a", "completion_a": "b", "completion_b": "c"}, "holds preferences"),
    "good and bad answers": ({"prompt": "a", "completion": "b", "label": False}, "has a label that marks its answer as good or bad"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, {"role": "assistant", "content": "b"}]},
        "messages[0].content[0]: must be a part of type text",
    ),
    "a weight between": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
        "messages[1].weight: must be 0 or 1",
    ),
    "arguments that are no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather(Rome)"}]},
        "conversations[1].value: must be JSON",
    ),
    "a message whose parent is missing": (
        {"message_id": "a", "parent_id": "gone", "message_tree_id": "t", "role": "assistant", "text": "x"},
        "parent_id: is of no message in the rows around it; sort the file by message_tree_id",
    ),
    "a message that answers itself": (
        {"message_id": "a", "parent_id": "a", "message_tree_id": "t", "role": "assistant", "text": "x"},
        "parent_id: is set in every message of the tree, so that none is the first",
    ),
}


@pytest.mark.parametrize(("row", "said"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_cannot_be_learned_from_is_told_by_its_field(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal) as caught:
        prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", [row])), tmp_path)
    assert caught.value.message.startswith(f"data.jsonl:1: {said}"), caught.value.message


def test_the_chosen_answers_of_preferences_can_be_learned(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    prepare_here(a_data_job({"uri": str(file), "columns": {"completion": "chosen"}}), tmp_path)
    assert [lines(told) for told in examples(tmp_path)] == [["user: a", "assistant! b"]]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_lines(tmp_path / "chats.jsonl", [{"prompt": "a", "chosen": talk, "rejected": talk}])
    prepare_here(a_data_job({"uri": str(file), "columns": {"messages": "chosen"}}), tmp_path / "chats")
    assert [lines(told) for told in examples(tmp_path / "chats")] == [["user: a", "assistant! b"]]


def test_a_tree_that_nobody_answered_is_dropped_and_told(tmp_path: Path) -> None:
    trees = [{"message_tree_id": "t", "prompt": {"role": "prompter", "text": "Hi?", "replies": []}}, {"prompt": "a", "completion": "b"}]
    prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", trees)), tmp_path)
    assert report(tmp_path)["droppedAt"] == {"a tree without answers": ["data.jsonl:1"]}


def test_a_tokenizer_that_could_never_end_an_answer_is_refused(tmp_path: Path) -> None:
    endless = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    from tests.support.models import tiny_model

    base = tmp_path / "model"
    base.mkdir()
    for file in tiny_model("llama", chat_template=False).iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer_config.json":
            text = json.dumps({k: v for k, v in json.loads(text).items() if k != "eos_token"}).encode()
        (base / file.name).write_bytes(text)
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(Refusal, match="no end could be learned"):
        prepare_here(
            a_data_job(
                write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}]), base=base, model={"chatTemplate": endless}
            ),
            tmp_path,
        )


CARD = "---\nlicense: {}\ntags: [a]\n---\n# Data\n"


def a_set(work: Path, licence: str | None) -> Path:
    folder = work / "set"
    write_lines(folder / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    if licence:
        (folder / "README.md").write_text(CARD.format(licence))
    return folder


@pytest.mark.parametrize(
    ("card", "said", "expected"),
    [("cc-by-nc-4.0", "", ["cc-by-nc-4.0"]), (None, "", []), ("mit", "apache-2.0", ["apache-2.0"]), (None, "mit", ["mit"])],
)
def test_a_licence_is_that_of_the_job_else_of_the_data_card(tmp_path: Path, card: str | None, said: str, expected: list[str]) -> None:
    outcome = prepare_here(a_data_job({"uri": str(a_set(tmp_path, card)), "license": said}), tmp_path)
    assert outcome.dataset is not None
    assert outcome.dataset.licenses == expected
    assert report(tmp_path)["sources"][0]["license"] == "".join(expected)


@pytest.mark.parametrize(("card", "forbidden"), [("cc-by-nc-4.0", "CC-BY-NC-*"), (None, "unknown")])
def test_a_forbidden_licence_ends_the_job_before_anything_is_read(tmp_path: Path, card: str | None, forbidden: str) -> None:
    config = a_data_job(a_set(tmp_path, card), dataset={"forbiddenLicenses": ["gpl-*", forbidden]})
    with pytest.raises(Refusal, match="forbiddenLicenses rules out") as caught:
        prepare_here(config, tmp_path)
    assert (caught.value.code, caught.value.param) == ("LicenseForbidden", "spec.dataset.sources[0].license")
