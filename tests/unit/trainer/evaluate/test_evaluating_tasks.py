"""Tasks of lm_eval that a job brings along: what is taken, and that nothing in them is run as code."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import utils
from lm_eval.api.registry import is_higher_better

from tests.support.models import Layout, tiny_model
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.training import a_job
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.evaluation import HARNESS_METRICS, EvaluationTask
from tunewright_crds.pod import StorageSettings
from tunewright_trainer.evaluate.harness import Asking, Put, put
from tunewright_trainer.evaluate.task_files import fetch_tasks, read_task
from tunewright_trainer.prepare.template import load_tokenizer
from tunewright_trainer.serve.turns import End
from tunewright_trainer.train.model import load_untuned

PARAM = "spec.evaluation.tasks[0]"
SIGNS: dict[str, Any] = {
    "task": "signs",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/test.jsonl", "train": "data/train.jsonl"}},
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{number}} {{sign}}",
    "doc_to_choice": ["plus", "minus", "times"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1},
}
WORDS: dict[str, Any] = {
    **{key: SIGNS[key] for key in ("dataset_path", "dataset_kwargs", "test_split", "fewshot_split", "doc_to_text")},
    "task": "words",
    "output_type": "generate_until",
    "doc_to_target": "{{ ['plus', 'minus', 'times'][answer] }}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
    "filter_list": [{"name": "first", "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}]}],
}


def write_task(folder: Path, *tasks: dict[str, Any] | str) -> Path:
    """A folder of tasks about numbers and signs, with data."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, numbers in (("test", range(90, 120)), ("train", range(20))):
        rows = [{"number": number * 7 % 100, "sign": "+-*"[number % 3], "answer": number % 3} for number in numbers]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    for number, task in enumerate(tasks):
        text = task if isinstance(task, str) else yaml.safe_dump(task)
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
    return folder


def task(name: str = "signs") -> EvaluationTask:
    return EvaluationTask(name=name, uri="s3://bucket/task/")


REFUSED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "code by a tag": ("task: signs\nprocess_docs: !function utils.process\n", "`!function` is not run"),
    "a Python object": ("task: signs\nmetadata: !!python/object/apply:os.system [ls]\n", "holds code"),
    "no YAML": ("task: [signs", "is not YAML"),
    "a list": ("[1, 2]", "no task of lm_eval"),
    "another task": ({"task": "others"}, "no file of the folder has `task: signs`; it has others"),
    "a group": ("group: signs\ntask: [a, b]\n", "it has ['a', 'b']"),
    "an include": (SIGNS | {"include": "/etc/x.yaml"}, "include is not taken here"),
    "a data set of one's own": (SIGNS | {"custom_dataset": "utils.load"}, "custom_dataset is not taken here"),
    "a script": (SIGNS | {"dataset_path": "./loader.py"}, "dataset_path is json or csv"),
    "a data set of the hub": (SIGNS | {"dataset_path": "allenai/ai2_arc"}, "nothing is fetched from the hub"),
    "data elsewhere": (SIGNS | {"dataset_kwargs": {"data_files": {"test": "/var/run/secret.json"}}}, "names of files beside the task"),
    "data above": (SIGNS | {"dataset_kwargs": {"data_files": "../rows.jsonl"}}, "names of files beside the task"),
    "data of the web": (SIGNS | {"dataset_kwargs": {"data_files": "https://example.com/x.json"}}, "names of files beside the task"),
    "data by a pattern": (SIGNS | {"dataset_kwargs": {"data_files": "data/*.jsonl"}}, "names of files beside the task"),
    "data that is not there": (SIGNS | {"dataset_kwargs": {"data_files": "data/none.jsonl"}}, "data/none.jsonl does not lie in the folder"),
    "options of the loader": (SIGNS | {"dataset_kwargs": {"data_files": "data/test.jsonl", "storage_options": {}}}, "and nothing else"),
    "a metric that is a script": (SIGNS | {"metric_list": [{"metric": "./metric.py"}]}, "a metric is one of acc"),
    "a metric of the hub": (SIGNS | {"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate is not taken here"),
    "an unknown aggregation": (SIGNS | {"metric_list": [{"metric": "acc", "aggregation": "best"}]}, "an aggregation is one of"),
    "an unknown filter": (
        WORDS | {"task": "signs", "filter_list": [{"name": "x", "filter": [{"function": "custom"}]}]},
        "a filter is one of",
    ),
    "code that generates": (
        WORDS | {"task": "signs", "generation_kwargs": {"custom_generate": "a/b"}},
        "custom_generate is not taken here",
    ),
    "answers that are drawn": (WORDS | {"task": "signs", "generation_kwargs": {"do_sample": True}}, "answers are greedy"),
    "nothing to test with": ({key: value for key, value in SIGNS.items() if key != "test_split"}, "neither a test_split nor"),
    "another kind of output": (SIGNS | {"output_type": "chat"}, "output_type is one of"),
}


@pytest.mark.parametrize(("config", "said"), REFUSED.values(), ids=REFUSED)
def test_what_could_run_code_or_read_elsewhere_is_refused_by_name(tmp_path: Path, config: dict[str, Any] | str, said: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read_task(task(), write_task(tmp_path, config), PARAM)
    assert (refusal.value.code, refusal.value.param) == (FailureCode.CONFIG_INVALID, f"{PARAM}.uri")
    assert said in refusal.value.message


def test_a_data_file_that_links_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task", SIGNS)
    (tmp_path / "secret.jsonl").write_text("{}", encoding="utf-8")
    (folder / "data" / "test.jsonl").unlink()
    (folder / "data" / "test.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(Refusal, match="does not lie in the folder"):
        read_task(task(), folder, PARAM)


def test_a_folder_in_s3_comes_with_its_data_and_none_of_another_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    folder = write_task(tmp_path / "task", SIGNS)
    with S3Server(tmp_path) as s3:
        s3.client().create_bucket(Bucket="platform")
        for path in filter(Path.is_file, folder.rglob("*")):
            s3.client().upload_file(str(path), "platform", f"tasks/signs/{path.relative_to(folder)}")
        storage = StorageSettings(bucket="platform", endpoint=s3.endpoint)

        def fetched(uri: str, to: str) -> list[dict[str, Any]]:
            return fetch_tasks(a_job(storage=storage, evaluation={"tasks": [{"name": "signs", "uri": uri}]}), tmp_path / to)

        (config,) = fetched("s3://platform/tasks/signs/", "a")
        (data,) = config["dataset_kwargs"]["data_files"]["test"]
        assert Path(data).read_bytes() == (folder / "data" / "test.jsonl").read_bytes()
        assert Path(data).is_relative_to(tmp_path / "a")
        for uri, code in (
            ("s3://platform/team-b/datasets/d/", FailureCode.ACCESS_DENIED),
            ("s3://platform/none/", FailureCode.DATA_NOT_FOUND),
        ):
            with pytest.raises(Refusal) as refusal:
                fetched(uri, "b")
            assert (refusal.value.code, refusal.value.param) == (code, f"{PARAM}.uri")


def test_the_table_of_metrics_is_lm_evals() -> None:
    assert {name: is_higher_better(name) for name in HARNESS_METRICS} == HARNESS_METRICS


def asked(folder: Path, name: str, layout: Layout = "llama", **more: Any) -> Put:
    """A task put to a model that is not tuned."""
    model = tiny_model(layout, chat_template=layout == "llama")
    config = read_task(task(name), folder, PARAM)
    asking = Asking(**{"param": PARAM, "shots": 0, "chat": True, "examples": 8, "seed": 3, "end": End(frozenset(), ()), "most": 4, **more})
    return put(load_untuned(model, a_job(model).spec), load_tokenizer(model), config, asking, cache=folder / "cache")


def test_documents_are_drawn_by_the_seed_and_asked_in_turns_or_as_bare_text(tmp_path: Path) -> None:
    folder = write_task(tmp_path, SIGNS, WORDS)
    environment = utils.env
    turns, bare = asked(folder, "signs", shots=2), asked(folder, "signs", chat=False)
    assert utils.env is environment
    assert turns.lines[0]["prompt"].count("<|im_start|>assistant") == 3
    assert bare.lines[0]["prompt"] in {f"{number * 7 % 100} {'+-*'[number % 3]}" for number in range(90, 120)}
    assert [line["expected"] for line in turns.lines] == [line["expected"] for line in bare.lines]
    assert [line["prompt"] for line in bare.lines] != [line["prompt"] for line in asked(folder, "signs", chat=False, seed=4).lines]
    acc = bare.metrics["acc"]
    assert acc["value"] == sum(line["answer"] == line["expected"] for line in bare.lines) / 8 == sum(acc["each"]) / 8
    share = acc["value"]
    assert acc["stderr"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    assert set(asked(folder, "words").metrics) == {"exact_match,first"}


def test_an_encoder_decoder_is_put_to_tasks_too(tmp_path: Path) -> None:
    folder = write_task(tmp_path, SIGNS, WORDS)
    for name, metric in (("signs", "acc"), ("words", "exact_match,first")):
        assert 0 <= asked(folder, name, "t5", chat=False, examples=3).metrics[metric]["value"] <= 1


SANDBOXED = {
    "a template that reaches for code": ({"doc_to_text": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}, "a template fails"),
    "a template of a column that is not there": ({"doc_to_text": "{{ nothing }}"}, "'nothing' is undefined"),
    "choices that are none": ({"doc_to_choice": "{{ number }}"}, "cannot run it with its data: TypeError"),
}


@pytest.mark.parametrize(("changed", "said"), SANDBOXED.values(), ids=SANDBOXED)
def test_a_task_that_fails_is_refused_without_what_stands_in_its_data(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal) as refusal:
        asked(write_task(tmp_path, SIGNS | changed), "signs")
    assert (refusal.value.code, refusal.value.param) == (FailureCode.CONFIG_INVALID, PARAM)
    assert said in refusal.value.message


def test_what_lm_eval_says_of_rows_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = asked(write_task(tmp_path, SIGNS | {"doc_to_target": "{{ 'none of the choices' }}"}), "signs")
    assert found.metrics["acc"]["value"] == 0
    assert "sign" not in caplog.text
