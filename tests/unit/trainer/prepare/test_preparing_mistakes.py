"""Mistakes in data, model and manifest: each is told once, by its code, its place and what is wrong; never by the content of a row."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, examples, out, prepare_here, report, write_lines
from tests.support.rows import alpaca_rows
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_trainer.config import load_manifest

SOURCE = "spec.dataset.sources[0].uri"


def refused(config: PodConfig, work: Path) -> Refusal:
    with pytest.raises(Refusal) as caught:
        prepare_here(config, work)
    return caught.value


SECRET = "my-private-text"
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "an answer that is missing": ({"instruction": SECRET}, "output: is missing"),
    "an answer that is null": ({"instruction": SECRET, "output": None}, "output: is missing"),
    "an answer that is a number": ({"instruction": SECRET, "output": 3}, "output: must be a text"),
    "an empty instruction": ({"instruction": "", "output": SECRET}, "instruction: is empty"),
    "keys of no format": ({"story": SECRET}, "has none of the keys that tell its format"),
    "a list": ([SECRET], "is no JSON object"),
    "messages that are no list": ({"messages": SECRET}, "messages: must be a list, and not empty"),
    "a message without content": ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
    "a role that nobody knows": (
        {"messages": [{"role": "user", "content": "a"}, {"role": SECRET, "content": "b"}]},
        "messages[1].role: must be system, user, assistant or tool",
    ),
    "no answer": ({"messages": [{"role": "user", "content": SECRET}]}, "holds no assistant message"),
    "an answer first": ({"messages": [{"role": "assistant", "content": SECRET}]}, "begins with an answer"),
    "a history of no pairs": ({"instruction": "a", "output": "b", "history": [[SECRET]]}, "history[0]: must be [question, answer]"),
    "half a character": ({"instruction": SECRET, "output": "\ud800"}, "is not JSON"),
}


@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_by_file_line_and_field(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any] | list[str], said: str
) -> None:
    data: list[Any] = alpaca_rows(9)
    data.insert(5, row)
    refusal = refused(a_data_job(write_lines(tmp_path / "data.jsonl", data)), tmp_path)
    assert (refusal.code, refusal.param) == (FailureCode.DATA_INVALID, SOURCE)
    assert refusal.message.startswith(f"data.jsonl:6: {said}"), refusal.message
    assert SECRET not in refusal.message + caplog.text
    told = report(tmp_path)
    assert (told["invalid"], len(told["errors"])) == (1, 1)
    assert not out(tmp_path).exists("manifest.json")


def test_a_bad_row_among_many_is_told_by_its_line(tmp_path: Path) -> None:
    data: list[Any] = alpaca_rows(1300)
    data.insert(1233, {"instruction": "no output"})
    refusal = refused(a_data_job(write_lines(tmp_path / "data.jsonl", data)), tmp_path)
    assert refusal.message.startswith("data.jsonl:1234: output: is missing; 1 of 1301 rows cannot be used"), refusal.message


def test_a_line_that_is_no_json_is_told_by_line_and_column(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in alpaca_rows(2000)]
    lines[1499] = '{"instruction": "a", "output" "b"}'
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    refusal = refused(a_data_job(tmp_path / "data.jsonl"), tmp_path)
    assert refusal.message.startswith("data.jsonl:1500: is not JSON"), refusal.message
    assert "(column 31)" in refusal.message


def test_keys_are_named_as_the_file_has_them(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"question": "a"}])
    refusal = refused(a_data_job({"uri": str(file), "columns": {"instruction": "question", "output": "answer"}}), tmp_path)
    assert refusal.message.startswith("data.jsonl:1: answer: is missing")


def test_some_bad_rows_may_be_allowed_and_are_still_told(tmp_path: Path) -> None:
    data = [row if n % 5 else {"instruction": "no output"} for n, row in enumerate(alpaca_rows(1000))]
    config = a_data_job(write_lines(tmp_path / "data.jsonl", data), dataset={"maxInvalidFraction": 0.2})
    outcome = prepare_here(config, tmp_path)
    assert outcome.dataset is not None
    assert (outcome.dataset.train_examples, outcome.dataset.rejected) == (800, 200)
    told = report(tmp_path)
    assert (told["invalid"], len(told["errors"])) == (200, 100)
    assert told["errors"][:2] == ["data.jsonl:1: output: is missing", "data.jsonl:6: output: is missing"]
    assert len(examples(tmp_path)) == 800
    with pytest.raises(Refusal):
        prepare_here(a_data_job(tmp_path / "data.jsonl", dataset={"maxInvalidFraction": 0.19}), tmp_path)


def test_what_was_found_until_then_is_in_the_outcome_of_a_failure(tmp_path: Path) -> None:
    data = [*alpaca_rows(10), {"instruction": "no output"}]
    refusal = refused(a_data_job(write_lines(tmp_path / "data.jsonl", data)), tmp_path)
    outcome = refusal.outcome  # type: ignore[attr-defined]
    assert isinstance(outcome, Outcome)
    assert outcome.dataset is not None
    assert outcome.dataset.rejected == 1
    assert Path(outcome.dataset.report_uri).is_file()


DATA: dict[str, tuple[Callable[[Path], Path], FailureCode, str]] = {
    "a file that is not there": (lambda work: work / "none.jsonl", FailureCode.DATA_NOT_FOUND, "none.jsonl does not exist"),
    "a folder without data": (
        lambda work: write_lines(work / "folder" / "data.txt", []).parent,
        FailureCode.DATA_NOT_FOUND,
        "holds no .jsonl, .json, .csv, .tsv or .parquet",
    ),
    "an empty file": (lambda work: write_lines(work / "data.jsonl", []), FailureCode.DATA_EMPTY, "holds no rows"),
    "rows of which none is left": (
        lambda work: write_lines(work / "data.jsonl", [{"prompt": "a", "completion": ""}]),
        FailureCode.DATA_EMPTY,
        "no example is left to train on (1 answer shorter than cleaning.minOutputCharacters)",
    ),
}


@pytest.mark.parametrize(("make", "code", "said"), DATA.values(), ids=DATA)
def test_data_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path], code: FailureCode, said: str) -> None:
    refusal = refused(a_data_job(make(tmp_path)), tmp_path)
    assert (refusal.code, said in refusal.message) == (code, True), refusal.message
    assert refusal.param.startswith("spec.dataset.sources")


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


MODELS: dict[str, tuple[Callable[[Path], None], FailureCode, str]] = {
    "a folder that is not there": (shutil.rmtree, FailureCode.MODEL_NOT_FOUND, "does not exist"),
    "pickled weights and no others": (only_pickles, FailureCode.MODEL_UNSAFE, "holds pickled weights and no *.safetensors"),
    "no weights": (without("model.safetensors"), FailureCode.MODEL_NOT_FOUND, "holds no *.safetensors"),
    "no config": (without("config.json"), FailureCode.MODEL_NOT_FOUND, "holds no config.json"),
    "no tokenizer": (without("tokenizer.json"), FailureCode.MODEL_NOT_FOUND, "holds no tokenizer"),
    "a config that is no JSON": (written("config.json", "{"), FailureCode.MODEL_UNSUPPORTED, "config.json is not JSON"),
    "an encoder": (
        settings(model_type="bert", architectures=["BertForMaskedLM"]),
        FailureCode.MODEL_UNSUPPORTED,
        "the weights are those of BertForMaskedLM, no causal language model",
    ),
    "an encoder with a decoder": (settings(model_type="t5"), FailureCode.MODEL_UNSUPPORTED, "model_type 't5' is no causal language model"),
    "code of the model's own": (settings(model_type="mine"), FailureCode.MODEL_UNSUPPORTED, "without the model's own code"),
    "a tokenizer of another model": (settings(vocab_size=50), FailureCode.MODEL_UNSUPPORTED, "the model has only 50 token ids"),
    "a tokenizer that is damaged": (written("tokenizer.json", "{}"), FailureCode.MODEL_UNSUPPORTED, "the tokenizer cannot be loaded"),
}


@pytest.mark.parametrize(("harm", "code", "said"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_used(tmp_path: Path, harm: Callable[[Path], None], code: FailureCode, said: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", chat_template=True), model)
    harm(model)
    refusal = refused(a_data_job(write_lines(tmp_path / "data.jsonl", alpaca_rows(3)), base=model), tmp_path)
    assert (refusal.code, refusal.param) == (code, "spec.model.uri")
    assert said in refusal.message, refusal.message


TEMPLATES = {
    "one that writes the last message otherwise": (
        "{% for m in messages %}{{ m['role'] if loop.last else 'before' }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "writes a conversation's beginning differently once more messages follow",
    ),
    "one that is no template": ("{% for m in messages %}", "cannot render a question and its answer"),
    "one that reaches for what it may not": ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__ }}", "cannot render"),
}


@pytest.mark.parametrize(("template", "said"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_cannot_be_used(tmp_path: Path, template: str, said: str) -> None:
    turns = [{"role": role, "content": f"{n}"} for n, role in enumerate(["user", "assistant"] * 2)]
    file = write_lines(tmp_path / "data.jsonl", [{"messages": turns}])
    refusal = refused(a_data_job(file, model={"chatTemplate": template}), tmp_path)
    assert (refusal.code, refusal.param) == (FailureCode.CONFIG_INVALID, "spec.model.chatTemplate")
    assert said in refusal.message, refusal.message


def test_rows_that_the_template_refuses_are_counted(tmp_path: Path) -> None:
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    data = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b", "system": "c"}]
    outcome = prepare_here(a_data_job(write_lines(tmp_path / "data.jsonl", data), model={"chatTemplate": strict}), tmp_path)
    assert report(tmp_path)["dropped"] == {"refused by the chat template": 1}
    assert outcome.dataset is not None
    assert outcome.dataset.train_examples == 1


def test_an_example_that_is_too_long_may_be_made_a_failure(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [*alpaca_rows(2), {"prompt": "a", "completion": "b" * 600}])
    refusal = refused(a_data_job(file, dataset={"overlong": "fail"}), tmp_path)
    assert (refusal.code, refusal.param) == (FailureCode.DATA_INVALID, "spec.dataset.maxLength")
    assert refusal.message == "data.jsonl:3: is longer than the 512 tokens allowed"


GOOD = """
apiVersion: tunewright.dev/v1alpha1
kind: InstructionTuningJob
metadata: {name: tune}
spec:
  model: {uri: /models/one}
  dataset:
    sources: [{uri: /data/rows.jsonl}]
"""
MANIFESTS: dict[str, tuple[str, str, str]] = {
    "no YAML": ("a: [", "", "is not YAML"),
    "two documents": (f"{GOOD}---{GOOD}", "", "it holds 2 documents"),
    "a list": ("[]", "", "it holds no object"),
    "another kind": (GOOD.replace("InstructionTuningJob", "Job"), "kind", "it must be InstructionTuningJob"),
    "another version": (GOOD.replace("v1alpha1", "v9"), "apiVersion", "it must be tunewright.dev/v1alpha1"),
    "no name": (GOOD.replace("{name: tune}", "{}"), "metadata.name", "has no metadata.name"),
    "no spec": (GOOD[: GOOD.index("spec:")], "spec.model", "Field required"),
    "an unknown field": (GOOD + "  method: {lora: {rnk: 8}}\n", "spec.method.lora.rnk", "unknown field"),
    "a learning rate above 1": (GOOD + "  hyperparameters: {learningRate: 5}\n", "spec.hyperparameters.learningRate", "at most 1"),
    "no source": (GOOD.replace("[{uri: /data/rows.jsonl}]", "[]"), "spec.dataset.sources", "give at least one of sources, or ref"),
    "a TunedModel": (GOOD.replace("uri: /models/one", "uri: model://helper"), "spec.model.uri", "name the folder of the model"),
    "an InstructionDataset": (GOOD.replace("sources: [{uri: /data/rows.jsonl}]", "ref: support-v1"), "spec.dataset.ref", "of a cluster"),
    "a source without address": (GOOD.replace("{uri: /data/rows.jsonl}", "{}"), "spec.dataset.sources[0].uri", "Field required"),
    "a micro-batch that does not divide": (
        GOOD + "  hyperparameters: {batchSize: 8, microBatchSize: 3}\n",
        "spec.hyperparameters",
        "microBatchSize 3 does not divide batchSize 8",
    ),
}


@pytest.mark.parametrize(("text", "param", "said"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_with_a_mistake(tmp_path: Path, text: str, param: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(Refusal) as caught:
        load_manifest(path)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, param or str(path))
    assert said in caught.value.message, caught.value.message


def test_a_manifest_that_is_changed_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    found = []
    for text in (GOOD, f"# a comment\n{GOOD}", GOOD + "  hyperparameters: {epochs: 2}\n"):
        path.write_text(text)
        found.append(load_manifest(path).job.uid)
    assert found[0] == found[1] != found[2]
