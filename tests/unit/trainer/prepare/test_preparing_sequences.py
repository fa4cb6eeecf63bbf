"""What encoder-decoders learn from: sources and targets, out of the very rows that other models are given."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tests.support.models import CHAT_TEMPLATE, tiny_model
from tests.support.preparing import a_data_job, prepare_here, report, rows, write_lines
from tests.support.rows import alpaca_rows
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer.prepare.template import chat_template, load_tokenizer, render_prompt_ids

END, BEGIN = "<|im_end|>", "<|begin|>"
CHAT = {
    "messages": [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Uno"},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "Due"},
    ]
}
FIRST = (f"{BEGIN}Hi?{END}", f"Uno{END}")
SECOND = (f"{BEGIN}user: Hi?\n\nassistant: Uno\n\nuser: Again?{END}", f"Due{END}")


def job(work: Path, data: list[Any], *, base: Path | None = None, **parts: Any) -> PodConfig:
    return a_data_job(write_lines(work / "data.jsonl", data), base=base or tiny_model("t5"), **parts)


def told(work: Path, split: str = "train") -> list[tuple[str, str]]:
    """Each source with its target, as text."""
    tokenizer = load_tokenizer(tiny_model("t5"))
    return [(tokenizer.decode(row["input_ids"]), tokenizer.decode(row["labels"])) for row in rows(work, split)]


ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "an instruction": ({"instruction": "Say it.", "output": "It"}, [(f"{BEGIN}Say it.{END}", f"It{END}")]),
    "an instruction with its input": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [(f"{BEGIN}Add.\n\n1 2{END}", f"3{END}")],
    ),
    "a system message": (
        {"system": "Be kind.", "prompt": "Hi?", "completion": "Hello"},
        [(f"{BEGIN}Be kind.\n\nHi?{END}", f"Hello{END}")],
    ),
    "two turns, of which each answer is an example": (CHAT, [FIRST, SECOND]),
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS)
def test_an_answer_is_a_target_and_all_before_it_its_source(
    tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]], packing: bool
) -> None:
    prepare_here(job(tmp_path, [row], dataset={"packing": packing}), tmp_path)
    assert told(tmp_path) == expected
    facts = report(tmp_path)
    assert (facts["architecture"], facts["packedShare"]) == ("seq2seq", None)
    assert facts["dataset"]["trainableTokens"] == sum(len(row["labels"]) for row in rows(tmp_path))


def test_only_the_last_answer_where_the_job_says_so(tmp_path: Path) -> None:
    prepare_here(job(tmp_path, [CHAT], dataset={"trainOn": "last-response"}), tmp_path)
    assert told(tmp_path) == [SECOND]


def test_the_models_own_template_writes_the_source(tmp_path: Path) -> None:
    """And its prompt is that of serving; the target ends as the decoder ends, whatever ends a turn."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model("t5"), base)
    ends_otherwise = CHAT_TEMPLATE.replace(END, "<|im_start|>")
    (base / "chat_template.jinja").write_text(ends_otherwise)
    prepare_here(job(tmp_path, [CHAT], base=base), tmp_path)
    assert [target for _, target in told(tmp_path)] == [f"Uno{END}", f"Due{END}"]
    for kind, folder in (("own", base), ("plain", tiny_model("t5"))):
        prepare_here(job(tmp_path / kind, [CHAT], base=folder), tmp_path / kind)
        tokenizer, template = load_tokenizer(folder), chat_template(folder)
        prompts = [render_prompt_ids(tokenizer, CHAT["messages"][:end], template) for end in (1, 3)]
        assert [row["input_ids"] for row in rows(tmp_path / kind)] == prompts


def test_a_target_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("bart"), base)
    tokenizer = load_tokenizer(base)
    specials = [(text, tokenizer.convert_tokens_to_ids(text)) for text in (BEGIN, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=specials)
    tokenizer.save_pretrained(base)
    prepare_here(job(tmp_path, [CHAT], base=base), tmp_path)
    assert told(tmp_path) == [(source, BEGIN + target) for source, target in (FIRST, SECOND)]


LONG = {"instruction": "x" * 100, "output": "y" * 100}


@pytest.mark.parametrize(
    ("longest", "kept", "dropped"),
    [
        pytest.param({"maxLength": 102}, 1, {}, id="both fit, each by itself"),
        pytest.param({"maxLength": 101, "overlong": "drop"}, 0, {"longer than maxLength": 1}, id="a source that does not"),
        pytest.param({"maxLength": 60}, 1, {}, id="cut"),
    ],
)
def test_a_longest_length_for_source_and_target(tmp_path: Path, longest: dict[str, Any], kept: int, dropped: dict[str, int]) -> None:
    short = {"instruction": "x", "output": "y"}
    prepare_here(job(tmp_path, [LONG, short], dataset=longest), tmp_path)
    found = rows(tmp_path)
    assert len(found) == kept + 1
    assert report(tmp_path)["dropped"] == dropped
    if kept:
        limit = longest["maxLength"]
        assert (len(found[0]["input_ids"]), len(found[0]["labels"])) == (min(102, limit), min(101, limit))
        assert report(tmp_path)["truncated"] == (limit < 102)


def test_relative_positions_set_no_bound_and_learned_ones_do(tmp_path: Path) -> None:
    for layout, bound in (("t5", 1000), ("bart", 512)):
        row = {"instruction": "x" * 2000, "output": "y"}
        prepare_here(job(tmp_path / layout, [row], base=tiny_model(layout), dataset={"maxLength": 1000}), tmp_path / layout)  # type: ignore[arg-type]
        assert len(rows(tmp_path / layout)[0]["input_ids"]) == bound


def test_a_text_without_a_prompt_is_left_out_and_told(tmp_path: Path) -> None:
    only_said = {"messages": [{"role": "assistant", "content": "I speak first."}]}
    prepare_here(job(tmp_path, [{"text": "Once upon a time"}, {"instruction": "Say it.", "output": "It"}]), tmp_path)
    assert len(rows(tmp_path)) == 1
    assert report(tmp_path)["dropped"] == {"a text without a prompt, which an encoder-decoder cannot learn": 1}
    with pytest.raises(Refusal) as caught:
        prepare_here(job(tmp_path / "b", [only_said]), tmp_path / "b")
    assert caught.value.code in (FailureCode.DATA_EMPTY, FailureCode.DATA_INVALID)


def test_exchanges_of_one_conversation_are_no_near_duplicates_of_each_other(tmp_path: Path) -> None:
    """But those of the same conversation, told again with a word changed, are."""
    question = "Please tell me in a few plain words what the weather will be like in the mountains over the coming weekend"
    said = [question, "Sunny with a light breeze from the west and hardly a cloud in the sky until Sunday evening", "Thanks", "Gladly"]
    again = [question, said[1], "Thanks", "Welcome"]
    chats = [
        {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]} for texts in (said, again)
    ]
    near = {"cleaning": {"nearDuplicates": {"enabled": True, "threshold": 0.6}}}
    prepare_here(job(tmp_path, chats, dataset=near), tmp_path)
    assert [target for _, target in told(tmp_path)] == [f"{said[1]}{END}", f"Gladly{END}"]


def test_the_data_of_another_kind_of_model_has_another_address(tmp_path: Path) -> None:
    data = alpaca_rows(8)
    prepare_here(job(tmp_path, data), tmp_path)
    other = tmp_path / "causal"
    shutil.copytree(tiny_model("t5"), other)
    config = json.loads((other / "config.json").read_text()) | {"is_encoder_decoder": False, "model_type": "llama", "architectures": []}
    (other / "config.json").write_text(json.dumps(config))
    found = prepare_here(job(tmp_path / "b", data, base=other), tmp_path / "b").dataset
    assert found is not None
    assert found.digest != report(tmp_path)["dataset"]["digest"]


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "causal is stated": (
        "t5",
        {"model": {"architecture": "causal"}},
        "spec.model.architecture",
        "config.json says that the model is seq2seq",
    ),
    "seq2seq is stated": ("llama", {"model": {"architecture": "seq2seq"}}, "spec.model.architecture", "says that the model is causal"),
    "prompts to be learned": ("t5", {"dataset": {"trainOn": "all"}}, "spec.dataset.trainOn", "learns answers only"),
    "preferences": ("bart", {"method": {"objective": "dpo"}}, "spec.method.objective", "objective sft only"),
}


@pytest.mark.parametrize(("layout", "parts", "param", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, layout: Any, parts: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        prepare_here(job(tmp_path, alpaca_rows(2), base=tiny_model(layout), **parts), tmp_path)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, param)


@pytest.mark.parametrize(
    "changes", [{"model_type": "whisper"}, {"architectures": ["T5EncoderModel"]}], ids=["one of speech", "an encoder alone"]
)
def test_other_encoder_decoders_are_unsupported(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("t5"), base)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
    with pytest.raises(Refusal) as caught:
        prepare_here(job(tmp_path, alpaca_rows(2), base=base), tmp_path)
    assert caught.value.code is FailureCode.MODEL_UNSUPPORTED
