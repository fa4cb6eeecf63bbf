"""Pairs of answers of which one is better: what they are read from, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.dialogue import lines
from tests.support.preparing import a_data_job, examples, out, prepare_here, report, rows, write_lines
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig

DPO = {"objective": "dpo"}


def says(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


HI, UNO, TWO = says("user", "Hi?"), says("assistant", "Uno"), says("user", "Two?")
SYSTEM = says("system", "Be kind.")


def a_pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Say {number}.", "chosen": f"{number}, with pleasure", "rejected": f"No, not {number}"} | more


def job(work: Path, data: list[Any], **parts: Any) -> PodConfig:
    parts["method"] = DPO | parts.get("method", {})
    return a_data_job(write_lines(work / "data.jsonl", data), **parts)


def pairs(work: Path, split: str = "train") -> list[tuple[list[str], list[str]]]:
    """Each pair as people read it: the chosen document and the rejected one."""
    found = [lines(told) for told in examples(work, split)]
    assert all(len(row["lengths"]) == 2 for row in rows(work, split))
    return list(zip(found[::2], found[1::2], strict=True))


def both(prompt: list[str], chosen: str, rejected: str) -> tuple[list[str], list[str]]:
    return ([*prompt, f"assistant! {chosen}"], [*prompt, f"assistant! {rejected}"])


TREE: dict[str, Any] = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter",
        "text": "Hi?",
        "replies": [
            {"role": "assistant", "text": "Bad", "rank": 2},
            {
                "role": "assistant",
                "text": "Good",
                "rank": 1,
                "replies": [
                    {
                        "role": "prompter",
                        "text": "Why?",
                        "replies": [
                            {"role": "assistant", "text": "So", "rank": 1},
                            {"role": "assistant", "text": "Thus", "rank": 0},
                            {"role": "assistant", "text": "As good", "rank": 1},
                        ],
                    }
                ],
            },
            {"role": "assistant", "text": "Best", "rank": 0},
            {"role": "assistant", "text": "Gone", "rank": 3, "deleted": True},
            {"role": "assistant", "text": "Nobody looked", "rank": None},
        ],
    },
}
OF_TREE = [
    both(["user: Hi?"], "Best", "Good"),
    both(["user: Hi?"], "Best", "Bad"),
    both(["user: Hi?"], "Good", "Bad"),
    both(["user: Hi?", "assistant: Good", "user: Why?"], "Thus", "So"),
    both(["user: Hi?", "assistant: Good", "user: Why?"], "Thus", "As good"),
]

READ: dict[str, tuple[Any, list[tuple[list[str], list[str]]]]] = {
    "texts": ({"prompt": "Hi?", "chosen": "Yes", "rejected": "No"}, [both(["user: Hi?"], "Yes", "No")]),
    "texts with a system message": (
        {"system": "Be kind.", "prompt": "Hi?", "chosen": "Yes", "rejected": "No"},
        [both(["system: Be kind.", "user: Hi?"], "Yes", "No")],
    ),
    "UltraFeedback, binarised: whole conversations beside their prompt": (
        {
            "prompt": "Hi?",
            "messages": [HI, UNO],
            "chosen": [HI, UNO],
            "rejected": [HI, says("assistant", "No")],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        [both(["user: Hi?"], "Uno", "No")],
    ),
    "whole conversations, of which the beginning is only read": (
        {"chosen": [SYSTEM, HI, UNO, TWO, says("assistant", "Due")], "rejected": [SYSTEM, HI, UNO, TWO, says("assistant", "2")]},
        [both(["system: Be kind.", "user: Hi?", "assistant: Uno", "user: Two?"], "Due", "2")],
    ),
    "conversations that part early": (
        {"chosen": [HI, UNO, TWO, says("assistant", "Due")], "rejected": [HI, says("assistant", "No")]},
        [(["user: Hi?", "assistant! Uno", "user: Two?", "assistant! Due"], ["user: Hi?", "assistant! No"])],
    ),
    "messages that follow a prompt of messages": (
        {"prompt": [SYSTEM, HI], "chosen": [UNO], "rejected": [says("assistant", "No")]},
        [both(["system: Be kind.", "user: Hi?"], "Uno", "No")],
    ),
    "a tree": (TREE, OF_TREE),
}


@pytest.mark.parametrize(("row", "expected"), READ.values(), ids=READ)
def test_each_shape_gives_its_pairs(tmp_path: Path, row: Any, expected: list[Any]) -> None:
    outcome = prepare_here(job(tmp_path, [row]), tmp_path)
    assert pairs(tmp_path) == expected
    assert outcome.dataset is not None
    assert outcome.dataset.train_examples == len(expected)


def test_flat_messages_of_a_tree_give_the_pairs_of_the_tree(tmp_path: Path) -> None:
    flat: list[dict[str, Any]] = []

    def flatten(node: dict[str, Any], parent: str | None) -> None:
        name = f"m{len(flat)}"
        flat.append({key: value for key, value in node.items() if key != "replies"} | {"message_id": name, "parent_id": parent})
        for reply in node.get("replies", []):
            flatten(reply, name)

    flatten(TREE["prompt"], None)
    prepare_here(job(tmp_path, [row | {"message_tree_id": "t"} for row in reversed(flat)]), tmp_path)
    assert sorted(pairs(tmp_path)) == sorted(OF_TREE)


def test_the_first_pair_of_each_prompt_may_be_enough(tmp_path: Path) -> None:
    config = job(tmp_path, [TREE])
    source = config.spec.dataset.sources[0].model_dump(by_alias=True, mode="json") | {"targets": "first"}
    prepare_here(a_data_job(source, method=DPO), tmp_path)
    assert pairs(tmp_path) == [OF_TREE[0], OF_TREE[3]]


def test_columns_name_the_keys_of_a_file(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"question": "Hi?", "good": "Yes", "bad": "No"}])
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    prepare_here(a_data_job({"uri": str(file), "format": "preference", "columns": columns}, method=DPO), tmp_path)
    assert pairs(tmp_path) == [both(["user: Hi?"], "Yes", "No")]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an answer without a worse one": ({"prompt": "a", "chosen": "b"}, "rejected: is missing"),
    "an answer without a better one": ({"prompt": "a", "rejected": "b"}, "chosen: is missing"),
    "texts without a prompt": ({"chosen": "b", "rejected": "c"}, "prompt: is missing"),
    "a row of another objective": ({"prompt": "a", "completion": "b"}, "holds no preferences, which the objective learns from"),
    "a text and messages": (
        {"prompt": "a", "chosen": "b", "rejected": [HI, UNO]},
        "rejected: must begin as chosen does",
    ),
    "answers to different prompts": (
        {"chosen": [HI, UNO], "rejected": [TWO, UNO]},
        "rejected: must part from chosen with an answer",
    ),
    "one that is only the beginning of the other": (
        {"chosen": [HI, UNO, TWO, UNO], "rejected": [HI, UNO]},
        "rejected: must part from chosen with an answer",
    ),
    "an answer that is not to be learned": (
        {"chosen": [HI, UNO], "rejected": [HI, says("assistant", "No", weight=0)]},
        "rejected[1]: is not to be learned (weight or train)",
    ),
    "no messages": ({"prompt": "a", "chosen": [], "rejected": [UNO]}, "chosen: must be a list, and not empty"),
    "something else than texts and messages": ({"prompt": "a", "chosen": 1, "rejected": 2}, "chosen: must be a text"),
    "more ranked answers than anybody would compare": (
        {
            "message_tree_id": "t",
            "prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": str(n), "rank": n} for n in range(65)]},
        },
        "replies: holds more than 64 ranked answers",
    ),
}


@pytest.mark.parametrize(("row", "said"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_is_no_pair_is_told_by_its_field(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal) as caught:
        prepare_here(job(tmp_path, [row]), tmp_path)
    assert caught.value.code is FailureCode.DATA_INVALID
    assert caught.value.message.startswith(f"data.jsonl:1: {said}"), caught.value.message


def test_what_cannot_be_compared_is_dropped_and_told(tmp_path: Path) -> None:
    unranked = {
        "message_tree_id": "u",
        "prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b", "rank": 0}]},
    }
    data = [
        a_pair(1),
        a_pair(2, rejected="2, with pleasure"),
        a_pair(3, chosen="Yes\r\n", rejected="Yes\n"),
        unranked,
        a_pair(1),
        a_pair(5, chosen="I'm sorry, but I cannot help."),
        a_pair(6, chosen=" "),
        a_pair(7, rejected="I'm sorry, but I cannot help."),
        a_pair(8, rejected=""),
        a_pair(9, rejected="x" * 2000),
    ]
    prepare_here(job(tmp_path, data, dataset={"cleaning": {"dropRefusals": True, "maxCharacters": 1000}}), tmp_path)
    assert report(tmp_path)["droppedAt"] == {
        "chosen and rejected are the same": ["data.jsonl:2", "data.jsonl:3"],
        "a tree without answers that are ranked": ["data.jsonl:4"],
        "duplicate": ["data.jsonl:5"],
        "an answer that declines": ["data.jsonl:6"],
        "answer shorter than cleaning.minOutputCharacters": ["data.jsonl:7"],
        "longer than cleaning.maxCharacters": ["data.jsonl:10"],
    }
    assert [chosen[0] for chosen, _ in pairs(tmp_path)] == ["user: Say 1.", "user: Say 7.", "user: Say 8."]


def test_the_length_holds_for_each_document(tmp_path: Path) -> None:
    """Tokens are bytes: `Say N.` with the markers and either answer have far less than 70, both together have more."""
    kept = a_pair(1)
    long = a_pair(2, rejected="No, no, no, no, no, no, no, no, no, no, no, no, no, no")
    for overlong, expected in (("drop", 1), ("truncate", 2)):
        work = tmp_path / overlong
        prepare_here(job(work, [kept, long], dataset={"maxLength": 70, "overlong": overlong}), work)
        found = rows(work)
        assert len(found) == expected
        assert all(max(row["lengths"]) <= 70 < sum(row["lengths"]) == len(row["input_ids"]) for row in found)
    told = report(tmp_path / "truncate")
    assert (told["truncated"], told["splits"]["train"]["rows"], told["packedShare"]) == (1, 2, None)
    assert sum(bar["examples"] for bar in told["examplesByTokens"]) == 2
    same = [a_pair(3, chosen="long enough to be cut, then better", rejected="long enough to be cut, then worse")]
    with pytest.raises(Refusal, match="1 chosen and rejected are the same"):
        prepare_here(job(tmp_path / "cut", same, dataset={"maxLength": 50}), tmp_path / "cut")


def test_both_documents_begin_with_the_tokens_of_the_prompt(tmp_path: Path) -> None:
    prepare_here(job(tmp_path, [a_pair(n) for n in range(5)]), tmp_path)
    for row in rows(tmp_path):
        chosen, rejected = (row["input_ids"][: row["lengths"][0]], row["input_ids"][row["lengths"][0] :])
        first, second = (next(at for at, label in enumerate(labels) if label != -100) for labels in _halves(row))
        assert first == second
        assert chosen[:first] == rejected[:first]


def _halves(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    cut = row["lengths"][0]
    return row["labels"][:cut], row["labels"][cut:]


def test_pairs_of_one_prompt_stay_together_and_shards_change_nothing(tmp_path: Path) -> None:
    data = [a_pair(n, rejected=f"No {n} {times}") for n in range(20) for times in range(3)]
    options = {"validationFraction": 0.2, "testFraction": 0.2}
    prepare_here(job(tmp_path, data, dataset=options), tmp_path)
    prompts = [{chosen[0] for chosen, _ in pairs(tmp_path, split)} for split in ("train", "validation", "test")]
    assert sum(map(len, prompts)) == 20, "no prompt is in two splits"
    assert min(map(len, prompts)) >= 4
    from tunewright_trainer.prepare import run, run_shard

    config = job(tmp_path, data, dataset=options | {"shards": 2})
    config = config.model_copy(update={"spec": config.spec.model_copy(deep=True)})
    for number in range(2):
        run_shard(config, number, work=tmp_path / "shard", store=out(tmp_path / "sharded"))
    outcome = run(config, work=tmp_path / "joined", store=out(tmp_path / "sharded"))
    assert outcome.dataset is not None
    (folder,) = (tmp_path / "sharded" / "out").rglob("train")
    assert [file.read_bytes() for file in sorted(folder.iterdir())] == [
        file.read_bytes() for file in sorted((tmp_path / "out" / "train").iterdir())
    ]


def test_rules_for_texts_look_at_both_answers(tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "test.jsonl", [{"text": "one two three four five six seven eight nine ten"}])
    cleaning = {
        "personalData": "mask",
        "decontaminate": {"enabled": True, "words": 5, "against": [str(held_out)]},
        "nearDuplicates": {"enabled": True},
    }
    story = "there was a lion who lived in a cave behind the river and who ate nothing but grass every day of the week"
    data = [
        a_pair(1, rejected="Mail me: bob@example.com"),
        a_pair(2, rejected="It was four five six seven eight after all"),
        a_pair(3, prompt="Tell!", chosen=story, rejected=f"{story}, and then some"),
        a_pair(4, prompt="Tell!", chosen=story, rejected=f"{story}, and then more"),
    ]
    prepare_here(job(tmp_path, data, dataset={"cleaning": cleaning}), tmp_path)
    assert [rejected[-1] for _, rejected in pairs(tmp_path)] == ["assistant! Mail me: <EMAIL>", f"assistant! {story}, and then some"]
    told = report(tmp_path)
    assert told["masked"] == {"e-mail address": 1}
    assert told["droppedAt"] == {
        "shares 5 words in a row with a held-out row": ["data.jsonl:2"],
        "nearly the same as an earlier row": ["data.jsonl:4"],
    }


def test_the_report_shows_both_answers(tmp_path: Path) -> None:
    prepare_here(job(tmp_path, [a_pair(1, rejected="<b>No</b>")]), tmp_path)
    (sample,) = report(tmp_path)["samples"]
    assert [(piece["text"].strip(), piece.get("rejected", False)) for piece in sample if piece["learned"]] == [
        ("1, with pleasure<|im_end|>", False),
        ("<b>No</b><|im_end|>", True),
    ]
    assert "".join(piece["text"] for piece in sample).count("Say 1.") == 1
    page = out(tmp_path).get_bytes("report.html").decode()
    assert '<mark class="worse">&lt;b&gt;No&lt;/b&gt;' in page
    assert "pairs to train on" in page


def test_pairs_have_an_address_of_their_own(tmp_path: Path) -> None:
    """A tree gives conversations to one objective and pairs to the other."""
    plain = a_data_job(write_lines(tmp_path / "data.jsonl", [TREE]))
    found = [prepare_here(config, tmp_path / str(number)).dataset for number, config in enumerate((plain, job(tmp_path, [TREE])))]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].digest != found[1].digest
