"""The 25 instruction data sets of the survey (Zhang et al. 2023, arXiv:2308.10792): a record of each one's true shape, and what the model sees of it.

Nothing but the record is given: `format: auto` recognises it. In the expected lines `assistant!` is learned and everything else is only read.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.dialogue import lines
from tests.support.preparing import a_data_job, examples, prepare_here


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# name of the set: (file, its content, the conversations that come of it)
SURVEY: dict[str, tuple[str, bytes, list[list[str]]]] = {
    "UnifiedQA": (
        "train.tsv",
        b"what is a cat? \\n (A) an animal (B) a plant \\n cats purr.\tan animal\n",
        [["user: what is a cat?\n(A) an animal (B) a plant\ncats purr.", "assistant! an animal"]],
    ),
    "OIG": (
        "unified_merged.jsonl",
        jsonl({"text": "<human>: Hi.\n<bot>: Hello.\n<human>: Two?\n<bot>: 2", "metadata": {"source": "unified"}}),
        [["user: Hi.", "assistant! Hello.", "user: Two?", "assistant! 2"]],
    ),
    "UnifiedSKG": (
        "spider.jsonl",
        jsonl({"text_in": "How many singers?", "struct_in": "| concert | singer : id, name", "seq_out": "select count(*) from singer"}),
        [["user: How many singers?\n\n| concert | singer : id, name", "assistant! select count(*) from singer"]],
    ),
    "Natural Instructions v1": (
        "subtask001_quoref_question_generation.json",
        json.dumps(
            {
                "Title": "Writing questions",
                "Prompt": "Write a question about the text.",
                "Definition": "Questions need two facts.",
                "Things to Avoid": "-",
                "Emphasis & Caution": "Be clear.",
                "Examples": {"Positive Examples": [{"input": "x", "output": "y", "reason": "z"}]},
                "Instances": [{"input": "Ann met Bob.", "output": ["Who met Bob?"]}, {"input": "It rains.", "output": ["What falls?"]}],
            },
            indent=4,
        ).encode(),
        [
            [
                "user: Questions need two facts.\n\nWrite a question about the text.\n\nEmphasis & Caution: Be clear.\n\nAnn met Bob.",
                "assistant! Who met Bob?",
            ],
            [
                "user: Questions need two facts.\n\nWrite a question about the text.\n\nEmphasis & Caution: Be clear.\n\nIt rains.",
                "assistant! What falls?",
            ],
        ],
    ),
    "Super-Natural Instructions": (
        "task1561_clickbait.json",
        json.dumps(
            {
                "Contributors": ["A"],
                "Categories": ["Summarization"],
                "Definition": ["Write a headline."],
                "Positive Examples": [{"input": "x", "output": "y", "explanation": "z"}],
                "Negative Examples": [],
                "Instances": [{"id": "task1561-1", "input": "A cat slept.", "output": ["Cat sleeps", "Sleeping cat"]}],
            },
            indent=4,
        ).encode(),
        [
            ["user: Write a headline.\n\nA cat slept.", "assistant! Cat sleeps"],
            ["user: Write a headline.\n\nA cat slept.", "assistant! Sleeping cat"],
        ],
    ),
    "P3": (
        "super_glue_rte.jsonl",
        jsonl(
            {
                "inputs": [3, 4],
                "inputs_pretokenized": "Does it rain?",
                "targets": [5, 1],
                "targets_pretokenized": "\nYes",
                "is_correct": True,
            },
            {
                "inputs": [3, 4],
                "inputs_pretokenized": "Does it rain?",
                "targets": [6, 1],
                "targets_pretokenized": "\nNo",
                "is_correct": False,
            },
        ),
        [["user: Does it rain?", "assistant! Yes"]],
    ),
    "xP3": ("xp3_de.jsonl", jsonl({"inputs": "Übersetze: cat", "targets": "Katze"}), [["user: Übersetze: cat", "assistant! Katze"]]),
    "Flan 2021": (
        "flan.jsonl",
        jsonl({"inputs": "Is 2 even?", "targets": "yes", "task": "bool_q", "template_type": "zs_noopt"}),
        [["user: Is 2 even?", "assistant! yes"]],
    ),
    "COIG": (
        "exam_instructions.jsonl",
        jsonl(
            {
                "textbox_q_instruction": "选择题",
                "textbox_q_context": "",
                "textbox_question": "1+1=? A.2 B.3",
                "textbox_answer": "A",
                "textbox_answer_analysis": "一加一等于二。",
                "subject": "数学",
            },
            {"instruction": "", "conversations": [{"question": "你好", "answer": "您好"}, {"question": "再见", "answer": "再见！"}]},
        ),
        [
            ["user: 选择题\n\n1+1=? A.2 B.3", "assistant! A\n\n一加一等于二。"],
            ["user: 你好", "assistant! 您好", "user: 再见", "assistant! 再见！"],
        ],
    ),
    "InstructGPT": (
        "demonstrations.jsonl",
        jsonl({"prompt": "Name a fruit.", "completion": "Apple"}),
        [["user: Name a fruit.", "assistant! Apple"]],
    ),
    "Unnatural Instructions": (
        "full_data.jsonl",
        jsonl(
            {
                "instruction": "Say the colour.",
                "instances": [
                    {
                        "instruction_with_input": "Say the colour.\nInput: snow",
                        "input": "snow",
                        "constraints": "One word.",
                        "output": "white",
                    }
                ],
                "reformulations": [
                    {"instruction": "Which colour?", "instruction_with_input": "Which colour? snow", "input": "snow", "output": "white"}
                ],
            }
        ),
        [
            ["user: Say the colour.\nInput: snow\n\nOne word.", "assistant! white"],
            ["user: Which colour? snow", "assistant! white"],
        ],
    ),
    "Self-Instruct": (
        "machine_generated.jsonl",
        jsonl(
            {
                "instruction": "Add.",
                "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}],
                "is_classification": False,
            }
        ),
        [["user: Add.\n\n1 2", "assistant! 3"], ["user: Add.", "assistant! 0"]],
    ),
    "InstructWild": (
        "instinwild_en.json",
        json.dumps([{"instruction": "Tell a joke.", "output": "No."}]).encode(),
        [["user: Tell a joke.", "assistant! No."]],
    ),
    "Evol-Instruct": (
        "evol.json",
        json.dumps(
            [
                {"instruction": "Count to 3.", "output": "1 2 3"},
                {"idx": "v2", "conversations": [{"from": "human", "value": "Count to 2."}, {"from": "gpt", "value": "1 2"}]},
            ]
        ).encode(),
        [["user: Count to 3.", "assistant! 1 2 3"], ["user: Count to 2.", "assistant! 1 2"]],
    ),
    "Alpaca": (
        "alpaca_data.json",
        json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}], indent=4).encode(),
        [["user: Add.\n\n1 2", "assistant! 3"]],
    ),
    "LogiCoT": (
        "general_inference.jsonl",
        jsonl({"instruction": "Infer.", "input": "All cats purr. Tom is a cat.", "output": "Tom purrs."}),
        [["user: Infer.\n\nAll cats purr. Tom is a cat.", "assistant! Tom purrs."]],
    ),
    "Dolly": (
        "databricks-dolly-15k.jsonl",
        jsonl({"instruction": "Who wrote it?", "context": "Ann wrote it.", "response": "Ann", "category": "closed_qa"}),
        [["user: Who wrote it?\n\nAnn wrote it.", "assistant! Ann"]],
    ),
    "GPT-4-LLM": (
        "alpaca_gpt4_data.json",
        json.dumps([{"instruction": "Spell cat.", "input": "", "output": "c-a-t"}]).encode(),
        [["user: Spell cat.", "assistant! c-a-t"]],
    ),
    "LIMA": (
        "train.jsonl",
        jsonl({"conversations": ["Why sleep?", "To rest."], "source": "stackexchange"}),
        [["user: Why sleep?", "assistant! To rest."]],
    ),
    "ChatGPT": (
        "chats.jsonl",
        jsonl(
            {
                "messages": [
                    {"role": "system", "content": "Be short."},
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "Uno", "weight": 0},
                    {"role": "user", "content": "One!"},
                    {"role": "assistant", "content": "1", "weight": 1},
                ]
            }
        ),
        [["system: Be short.", "user: One?", "assistant: Uno", "user: One!", "assistant! 1"]],
    ),
    "Vicuna": (
        "sharegpt.json",
        json.dumps(
            [
                {
                    "id": "a",
                    "conversations": [
                        {"from": "human", "value": "Hi."},
                        {"from": "gpt", "value": "Hello."},
                        {"from": "human", "value": "Bye."},
                        {"from": "gpt", "value": "Bye!"},
                    ],
                }
            ]
        ).encode(),
        [["user: Hi.", "assistant! Hello.", "user: Bye.", "assistant! Bye!"]],
    ),
    "Guanaco": (
        "guanaco_non_chat-utf8.json",
        json.dumps([{"instruction": "翻译", "input": "cat", "output": "猫"}]).encode(),
        [["user: 翻译\n\ncat", "assistant! 猫"]],
    ),
    "OpenAssistant": (
        "2023-04-12_oasst_ready.trees.jsonl",
        jsonl(
            {
                "message_tree_id": "t",
                "tree_state": "ready_for_export",
                "prompt": {
                    "message_id": "t",
                    "role": "prompter",
                    "text": "Hi?",
                    "replies": [
                        {"message_id": "b", "role": "assistant", "text": "Worse", "rank": 1, "replies": []},
                        {
                            "message_id": "a",
                            "role": "assistant",
                            "text": "Best",
                            "rank": 0,
                            "replies": [
                                {
                                    "role": "prompter",
                                    "text": "Why?",
                                    "replies": [
                                        {"role": "assistant", "text": "So", "rank": 0, "replies": []},
                                        {
                                            "role": "assistant",
                                            "text": "Well",
                                            "rank": 1,
                                            "replies": [{"role": "prompter", "text": "Hm", "replies": []}],
                                        },
                                    ],
                                }
                            ],
                        },
                    ],
                },
            }
        ),
        [
            ["user: Hi?", "assistant! Best", "user: Why?", "assistant! So"],
            ["user: Hi?", "assistant: Best", "user: Why?", "assistant! Well"],
            ["user: Hi?", "assistant! Worse"],
        ],
    ),
    "Baize": (
        "quora_chat_data.json",
        json.dumps([{"topic": "sleep", "input": "A conversation.\n[|Human|] Why sleep?\n[|AI|] To rest.\n[|Human|] "}]).encode(),
        [["system: A conversation.", "user: Why sleep?", "assistant! To rest."]],
    ),
    "UltraChat": (
        "train_0.jsonl",
        jsonl({"id": "0", "data": ["One?", "1", "Two?", "2"]}),
        [["user: One?", "assistant! 1", "user: Two?", "assistant! 2"]],
    ),
}


def test_it_is_the_whole_survey() -> None:
    assert len(SURVEY) == 25


@pytest.mark.parametrize(("name", "content", "expected"), SURVEY.values(), ids=SURVEY)
def test_each_set_loads_as_it_is_published(tmp_path: Path, name: str, content: bytes, expected: list[list[str]]) -> None:
    (tmp_path / name).write_bytes(content)
    outcome = prepare_here(a_data_job(tmp_path / name), tmp_path)
    assert [lines(told) for told in examples(tmp_path)] == expected
    assert outcome.dataset is not None
    assert outcome.dataset.train_examples == len(expected)


def test_flat_messages_of_a_tree_are_the_same_as_the_tree(tmp_path: Path) -> None:
    flat = [
        {"message_id": "t", "parent_id": None, "message_tree_id": "t", "role": "prompter", "text": "Hi?"},
        {"message_id": "c", "parent_id": "a", "message_tree_id": "t", "role": "prompter", "text": "Why?"},
        {"message_id": "a", "parent_id": "t", "message_tree_id": "t", "role": "assistant", "text": "Best", "rank": 0},
        {"message_id": "b", "parent_id": "t", "message_tree_id": "t", "role": "assistant", "text": "Worse", "rank": 1},
        {"message_id": "x", "parent_id": "t", "message_tree_id": "t", "role": "assistant", "text": "Gone", "rank": 2, "deleted": True},
        {"message_id": "d", "parent_id": "c", "message_tree_id": "t", "role": "assistant", "text": "So", "rank": 0},
        {"message_id": "u", "parent_id": None, "message_tree_id": "u", "role": "prompter", "text": "Ho?"},
        {"message_id": "v", "parent_id": "u", "message_tree_id": "u", "role": "assistant", "text": "Hey"},
    ]
    (tmp_path / "messages.jsonl").write_bytes(jsonl(*flat))
    prepare_here(a_data_job(tmp_path / "messages.jsonl"), tmp_path)
    assert [lines(told) for told in examples(tmp_path)] == [
        ["user: Hi?", "assistant! Best", "user: Why?", "assistant! So"],
        ["user: Hi?", "assistant! Worse"],
        ["user: Ho?", "assistant! Hey"],
    ]
    two = [flat[0], flat[2] | {"text": "Good"}, flat[3]]
    (tmp_path / "two.jsonl").write_bytes(jsonl(*two))
    prepare_here(a_data_job({"uri": str(tmp_path / "two.jsonl"), "targets": "first"}), tmp_path / "first")
    assert [lines(told) for told in examples(tmp_path / "first")] == [["user: Hi?", "assistant! Good"]]
