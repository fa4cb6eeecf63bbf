"""Evaluating a tuned model: better than its base on rows that it never saw, the same however often it is killed, and judged by what is required."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.judge import a_judge, by
from tests.support.models import END, tiny_model
from tests.support.training import NAMESPACE, UID, a_job
from tests.unit.trainer.evaluate.test_evaluating_tasks import SIGNS, write_task
from tests.unit.trainer.evaluate.test_evaluating_tasks import WORDS as WORDS_TASK
from tunewright_crds.errors import ExitCode, FailureCode, Refusal
from tunewright_crds.evaluation import EvaluationStatus
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_trainer import cli, evaluate, prepare, train
from tunewright_trainer.evaluate import judging, measuring, recipe
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import metrics

WORDS = {"+": "plus", "-": "minus", "*": "times"}
EVALUATION: dict[str, Any] = {"fewShot": [0, 2], "maxNewTokens": 10, "maxExamples": 24}
BRIER = [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}]
KEY = f"{NAMESPACE}/jobs/{UID}/evaluation"
Place = tuple[LocalStore, str, dict[str, str]]  # the store, the data's digest, addresses of models by kind


def write_rows(path: Path, numbers: range, *, pairs: bool = False) -> dict[str, Any]:
    """Instructions that end in a sign, whose name is the answer."""
    rows = []
    for number in numbers:
        sign = "+-*"[number % 3]
        answers = {"chosen": "yes", "rejected": "not"}
        prompt = f"{number * 7 % 100} {sign}"
        rows.append({"prompt": prompt, **answers} if pairs else {"instruction": prompt, "input": "", "output": WORDS[sign]})
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return {"uri": str(path)}


def a_tuning(work: Path, *, pairs: bool = False, **parts: Any) -> PodConfig:
    sources = [
        write_rows(work / "train.jsonl", range(90), pairs=pairs),
        write_rows(work / "test.jsonl", range(90, 120), pairs=pairs) | {"split": "test"},
    ]
    dataset = {"sources": sources, "validationFraction": 0.0, "maxLength": 96}
    settings = {"batchSize": 8, "learningRate": 0.01, "maxSteps": 90}
    return a_job(
        tiny_model("llama", chat_template=True), dataset=dataset, **{"hyperparameters": settings, "evaluation": EVALUATION} | parts
    )


def tuned(config: PodConfig, work: Path) -> Place:
    """Prepared and trained; also the addresses of what was published."""
    store = LocalStore(work / "store")
    dataset = prepare.run(config, work=work / "p", store=store).dataset
    assert dataset is not None
    outcome = train.run(config, attempt=1, dataset_digest=dataset.digest, work=work / "t", store=store)
    assert outcome.artifact is not None
    folder = outcome.artifact.uri.rpartition("/")[0]
    return store, dataset.digest, {kind: f"{folder}/{kind}" for kind in ("full", "adapter", "merged", "reward")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place]:
    work = tmp_path_factory.mktemp("evaluating")
    return work, tuned(a_tuning(work, method={"tuner": "full"}), work)


def job(work: Path, **evaluation: Any) -> PodConfig:
    return a_tuning(work, method={"tuner": "full"}, evaluation=EVALUATION | evaluation)


def measure(config: PodConfig, place: Place, scratch: Path, *, kind: str = "full") -> Outcome:
    store, digest, models = place
    return evaluate.run(config, dataset_digest=digest, model_uri=models[kind], work=scratch, store=store)


def told(outcome: Outcome) -> EvaluationStatus:
    assert outcome.evaluation is not None
    return outcome.evaluation


def numbers(status: EvaluationStatus, task: str = "test") -> dict[str, tuple[float | None, float]]:
    return {one.metric: (one.base, one.tuned) for one in status.metrics if one.task == task}


def test_the_tuned_model_beats_its_base_on_rows_that_it_never_saw(
    place: tuple[Path, Place], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    work, there = place
    outcome = measure(job(work), there, tmp_path)
    status = told(outcome)
    assert status.examples == 24
    for task in ("test", "test-2-shot"):
        found = numbers(status, task)
        for metric in ("exact_match", "f1", "rouge_l", "chrf", "token_accuracy", "accuracy", "macro_f1"):
            base, value = found[metric]
            assert base is not None
            assert value > base, (task, metric)
        assert found["loss"][1] < found["loss"][0] / 2  # type: ignore[operator]
    assert numbers(status)["exact_match"][1] >= 0.9

    store, *_ = there
    manifest = json.loads(store.get_bytes(f"{KEY}/manifest.json"))
    assert {file["name"] for file in manifest["files"]} == {"report.html", "report.json", "answers.jsonl"}
    answers = [json.loads(line) for line in store.get_bytes(f"{KEY}/answers.jsonl").decode().splitlines()]
    assert len(answers) == 48
    assert sum(line["tuned"] == line["expected"] for line in answers if line["task"] == "test") >= 0.9 * 24
    assert all(line["prompt"].count("assistant") == (3 if line["task"] == "test-2-shot" else 1) for line in answers)
    page = store.get_bytes(f"{KEY}/report.html").decode()
    assert "exact_match" in page
    assert "macro_f1" in page
    assert ">better<" in page
    row = next(row for row in json.loads(store.get_bytes(f"{KEY}/report.json"))["tasks"][0]["metrics"] if row["metric"] == "loss")
    assert row["tuned"]["interval"][0] <= row["tuned"]["value"] <= row["tuned"]["interval"][1] < row["base"]["interval"][0]
    assert "minus" not in caplog.text + outcome.bounded(), "rows are for the report only"


def test_answers_in_batches_are_what_the_published_model_says_by_itself(place: tuple[Path, Place], tmp_path: Path) -> None:
    work, there = place
    measure(job(work, maxExamples=6, fewShot=[0], compareWithBase=False), there, tmp_path)
    store, _, models = there
    model = AutoModelForCausalLM.from_pretrained(models["full"])
    tokenizer = AutoTokenizer.from_pretrained(models["full"])
    for line in map(json.loads, store.get_bytes(f"{KEY}/answers.jsonl").decode().splitlines()):
        assert "base" not in line
        ids = tokenizer(line["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        said = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=tokenizer.convert_tokens_to_ids(END))[0, ids.shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == line["tuned"]


def test_answers_are_held_against_rules(place: tuple[Path, Place], tmp_path: Path) -> None:
    work, there = place
    rules = [{"type": "exact-match"}, {"type": "regex", "pattern": "^[a-z]+$"}]
    required = {"metric": "prompt_level_strict_acc", "min": 0.8, "betterThanBase": True}
    config = job(work, maxExamples=12, fewShot=[0], rules=rules, require=[required])
    base, value = numbers(told(measure(config, there, tmp_path)))["prompt_level_strict_acc"]
    assert base is not None
    assert value > base
    report = json.loads(there[0].get_bytes(f"{KEY}/report.json"))
    assert [row["rule"] for row in report["tasks"][0]["rules"]] == ["exact-match", "regex"]
    assert report["tasks"][0]["rules"][0]["tuned"] >= 0.9
    assert "By rule" in there[0].get_bytes(f"{KEY}/report.html").decode()
    broken = job(work, rules=[*rules, {"type": "json-schema", "schema": '{"type": 3}'}])
    with pytest.raises(Refusal) as refusal:  # before anything is trained
        train.run(broken, attempt=1, dataset_digest=there[1], work=tmp_path / "t", store=there[0])
    assert refusal.value.param == "spec.evaluation.rules[2].schema"


def test_the_models_are_put_to_tasks_of_lm_eval_beside_the_test_rows(place: tuple[Path, Place], tmp_path: Path) -> None:
    work, there = place
    folder = str(write_task(tmp_path / "task", SIGNS, WORDS_TASK))
    tasks = [{"name": "signs", "uri": folder}, {"name": "words", "uri": folder}]
    required = [
        {"metric": "acc", "task": "signs", "min": 0.8},
        {"metric": "exact_match,first", "task": "words", "fewShot": 1, "betterThanBase": True},
    ]
    config = job(work, maxExamples=12, fewShot=[0, 1], tasks=tasks, require=required)
    status = told(measure(config, there, tmp_path / "e"))
    base, value = numbers(status, "signs")["acc"]
    assert base is not None
    assert value > max(base, 0.8)
    assert numbers(status, "words")["exact_match,first"][1] >= 0.9
    report = {part["task"]: part for part in json.loads(there[0].get_bytes(f"{KEY}/report.json"))["tasks"]}
    assert list(report) == ["test", "test-1-shot", "signs", "signs-1-shot", "words", "words-1-shot"]
    row = report["signs"]["metrics"][0]
    assert row["tuned"]["interval"][0] <= row["tuned"]["value"] <= row["tuned"]["interval"][1]
    assert row["difference"][0] <= row["tuned"]["value"] - row["base"]["value"] <= row["difference"][1]
    assert "words-1-shot" in there[0].get_bytes(f"{KEY}/report.html").decode()
    with pytest.raises(Refusal, match="signs is 1") as refusal:
        measure(job(work, maxExamples=12, tasks=tasks[:1], require=[{"metric": "acc", "task": "signs", "max": 0.1}]), there, tmp_path / "f")
    assert refusal.value.code is FailureCode.QUALITY_TOO_LOW


def test_a_judge_compares_the_answers_and_is_asked_about_none_twice(
    place: tuple[Path, Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, there = place
    monkeypatch.setattr(recipe, "JUDGED_AT_ONCE", 4)
    knows = by(lambda first, _: "A" if first in WORDS.values() else "B")
    with a_judge(lambda number, body: (401, {}, "") if number == 8 else knows(number, body)) as stand_in:
        required = [{"metric": "win_rate", "min": 0.8, "betterThanBase": True}]
        options = {"endpoint": stand_in.url, "model": "judge-1", "parallel": 1}
        config = job(work, maxExamples=8, fewShot=[0], judge=options, require=required)
        with pytest.raises(Refusal) as refusal:  # half of the verdicts are there
            measure(config, there, tmp_path / "denied")
        assert refusal.value.code is FailureCode.ACCESS_DENIED
        status = told(measure(config, there, tmp_path / "e"))
        assert numbers(status)["win_rate"] == (pytest.approx(0, abs=0.1), pytest.approx(1, abs=0.1))
        assert len(stand_in.bodies) == 2 * 8 + 1
    part = json.loads(there[0].get_bytes(f"{KEY}/report.json"))["tasks"][0]
    assert part["judge"] == {"wins": 8, "ties": 0, "losses": 0, "unjudged": 0, "why": ""}
    assert not list(there[0].list(f"{KEY}/parts/"))
    assert "The tuned model won 8" in there[0].get_bytes(f"{KEY}/report.html").decode()

    monkeypatch.setattr(judging, "PATIENCE_SECONDS", 0)  # the judge is gone now
    alone = told(measure(job(work, maxExamples=8, fewShot=[0], judge=options), there, tmp_path / "f"))
    assert "win_rate" not in numbers(alone)
    assert numbers(alone)["exact_match"][1] >= 0.8
    assert "No win rate: the judge at" in there[0].get_bytes(f"{KEY}/report.html").decode()


def test_it_tells_how_far_it_is(place: tuple[Path, Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, there = place
    told_so_far: list[tuple[int, int]] = []
    monkeypatch.setattr(metrics.Reporter, "report", lambda _, now, __: told_so_far.append((now.evaluated, now.to_evaluate)))
    monkeypatch.setattr("tunewright_trainer.evaluate.answers.BATCH_PROMPTS", 4)
    tasks = [{"name": "signs", "uri": str(write_task(tmp_path / "task", SIGNS))}]
    measure(job(work, maxExamples=40, fewShot=[0], tasks=tasks), there, tmp_path / "e")
    assert told_so_far[0] == (4, 2 * (30 + 40)), "30 rows there are; of the task nothing is known yet"
    assert told_so_far[-1] == (120, 120)
    assert [done for done, _ in told_so_far] == sorted(done for done, _ in told_so_far)


class Dies(Exception):
    pass


class Mortal(LocalStore):
    """Dies in the middle of a given write, counted from 1."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self._left = at

    def put_bytes(self, key: str, data: bytes) -> None:
        self._left -= 1
        if not self._left:
            raise Dies
        super().put_bytes(key, data)


def test_killed_anywhere_and_run_again_it_reports_the_same_and_measures_nothing_twice(
    place: tuple[Path, Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, there = place
    store, digest, models = there
    config = job(work, maxExamples=4, fewShot=[0, 1])
    calm = told(measure(config, there, tmp_path / "calm"))
    report = store.get_bytes(f"{KEY}/report.json")
    store.delete([f"{KEY}/manifest.json", f"{KEY}/report.json"])
    asked: list[str] = []
    plain = measuring.Measuring.of
    monkeypatch.setattr(
        measuring.Measuring,
        "of",
        lambda self, model, examples, name, **more: asked.append(name) or plain(self, model, examples, name, **more),
    )
    for write in (2, 3, 2):  # after one part, after two more, and in the manifest itself
        with pytest.raises(Dies):
            measure(config, (Mortal(work / "store", write), digest, models), tmp_path / f"dies-{len(asked)}")
    assert told(measure(config, there, tmp_path / "again")) == calm
    assert store.get_bytes(f"{KEY}/report.json") == report
    base, base_shown, tuned, tuned_shown = (f"{model} model, {task}" for model in ("base", "tuned") for task in ("test", "test-1-shot"))
    assert asked == [base, base_shown, base_shown, tuned, tuned_shown, tuned_shown], "only what died before it lay in storage is done again"
    assert not list(store.list(f"{KEY}/parts/"))
    asked.clear()
    measure(config, there, tmp_path / "once more")
    assert asked == []


REQUIRED = {
    "reached": ({"metric": "exact_match", "min": 0.9}, ""),
    "better than base": ({"metric": "perplexity", "betterThanBase": True}, ""),
    "too low": ({"metric": "chrf", "min": 100.5}, ", and at least 100.5 is required"),
    "too high": ({"metric": "loss", "max": 0.0}, "and at most 0 is required"),
    "with examples shown": ({"metric": "loss", "max": 0.0, "fewShot": 2}, "loss of test-2-shot is "),
    "not better": ({"metric": "token_accuracy", "betterThanBase": True, "min": 2}, "at least 2 is required"),
}


@pytest.mark.parametrize(("required", "said"), REQUIRED.values(), ids=REQUIRED)
def test_a_model_that_misses_what_is_required_is_refused(
    place: tuple[Path, Place], tmp_path: Path, required: dict[str, Any], said: str
) -> None:
    work, there = place
    config = job(work, maxExamples=3, fewShot=sorted({0, 2 if "fewShot" in required else 0}), require=[required])
    if not said:
        assert told(measure(config, there, tmp_path)).examples == 3
        return
    for _ in range(2):  # the second time from the report
        with pytest.raises(Refusal) as refusal:
            measure(config, there, tmp_path)
        assert refusal.value.code is FailureCode.QUALITY_TOO_LOW
        assert said in refusal.value.message
        assert numbers(told(refusal.value.outcome))["exact_match"][1] >= 0.9, "what was found is told all the same"  # type: ignore[attr-defined]
    assert "Not good enough." in there[0].get_bytes(f"{KEY}/report.html").decode()


def test_an_adapter_and_the_merged_model_measure_the_same(tmp_path: Path) -> None:
    config = a_tuning(
        tmp_path,
        hyperparameters={"batchSize": 8, "learningRate": 0.01, "maxSteps": 5},
        output={"formats": ["adapter", "merged"]},
        evaluation={
            "maxExamples": 5,
            "maxNewTokens": 4,
            "tasks": [{"name": "signs", "uri": str(write_task(tmp_path / "task", SIGNS | {"metric_list": BRIER}))}],
        },
    )
    there = tuned(config, tmp_path)
    both = [told(measure(config, there, tmp_path / kind, kind=kind)) for kind in ("adapter", "merged")]
    adapter, merged = (numbers(status) for status in both)
    of_task = [numbers(status, "signs")["brier_score"] for status in both]
    assert of_task[0] == pytest.approx(of_task[1], rel=1e-4)
    assert of_task[0][0] != of_task[0][1], "lm_eval asks the model with its adapter"
    assert adapter["loss"][0] == merged["loss"][0]
    assert adapter["loss"][1] == pytest.approx(merged["loss"][1], rel=1e-4)
    assert adapter["loss"][1] < adapter["loss"][0]  # type: ignore[operator]


def test_preferences_are_measured_by_how_often_the_chosen_answer_is_likelier(tmp_path: Path) -> None:
    settings = {"batchSize": 8, "learningRate": 0.01, "maxSteps": 20}
    config = a_tuning(tmp_path, pairs=True, method={"objective": "dpo"}, hyperparameters=settings, evaluation={"maxNewTokens": 4})
    found = numbers(told(measure(config, tuned(config, tmp_path), tmp_path / "e", kind="adapter")))
    base, value = found["preference_accuracy"]
    assert base is not None
    assert base < 0.5
    assert value > 0.9
    assert "exact_match" in found


def test_marked_answers_are_measured_by_how_often_the_good_ones_are_likelier(tmp_path: Path) -> None:
    settings = {"batchSize": 8, "learningRate": 0.01, "maxSteps": 30}
    config = a_tuning(tmp_path, pairs=True, method={"objective": "kto"}, hyperparameters=settings, evaluation={"maxNewTokens": 4})
    there = tuned(config, tmp_path)
    found = numbers(told(measure(config, there, tmp_path / "e", kind="adapter")))
    base, value = found["preference_accuracy"]
    assert base is not None
    assert base < 0.6
    assert value > 0.9
    assert found["loss"][1] < found["loss"][0]  # type: ignore[operator]
    answers = [json.loads(line) for line in there[0].get_bytes(f"{KEY}/answers.jsonl").decode().splitlines()]
    assert {line["expected"] for line in answers} == {"yes"}, "bad answers are no right ones"


def test_a_model_that_learned_from_rewards_is_measured_by_them(tmp_path: Path) -> None:
    rewards = [{"type": "regex", "pattern": "[aeiou]", "weight": 2}, {"type": "exact-match"}, {"type": "length", "max": 3, "weight": -1}]
    config = a_tuning(
        tmp_path,
        method={"objective": "grpo", "tuner": "full", "rewards": rewards, "grpo": {"maxNewTokens": 6, "generations": 2}},
        hyperparameters={"batchSize": 4, "learningRate": 0.01, "maxSteps": 2},
        evaluation={"maxNewTokens": 6, "maxExamples": 12, "require": [{"metric": "reward", "min": -1}]},
    )
    there = tuned(config, tmp_path)
    status = told(measure(config, there, tmp_path / "e"))
    answers = [json.loads(line) for line in there[0].get_bytes(f"{KEY}/answers.jsonl").decode().splitlines()]
    expected = [
        sum(2 * bool(re.search("[aeiou]", line[model])) + (line[model] == line["expected"]) - (len(line[model]) <= 3) for line in answers)
        / 12
        for model in ("base", "tuned")
    ]
    assert numbers(status)["reward"] == pytest.approx(expected, abs=1e-5)
    assert "exact_match" in numbers(status)
    report = json.loads(there[0].get_bytes(f"{KEY}/report.json"))["tasks"][0]
    assert [row["reward"] for row in report["rewards"]] == ["regex", "exact-match", "length"]
    row = next(row for row in report["metrics"] if row["metric"] == "reward")
    assert row["tuned"]["interval"][0] <= row["tuned"]["value"] <= row["tuned"]["interval"][1]


def test_a_reward_model_is_measured_by_how_often_it_judges_the_chosen_answer_better(tmp_path: Path) -> None:
    settings = {"batchSize": 8, "learningRate": 0.01, "maxSteps": 10}
    required = [{"metric": "preference_accuracy", "min": 0.9}]
    config = a_tuning(
        tmp_path, pairs=True, method={"objective": "reward", "tuner": "full"}, hyperparameters=settings, evaluation={"require": required}
    )
    status = told(measure(config, tuned(config, tmp_path), tmp_path / "e", kind="reward"))
    assert [(one.metric, one.base) for one in status.metrics] == [("preference_accuracy", None)]


def test_a_model_of_somebody_else_is_not_measured(place: tuple[Path, Place], tmp_path: Path) -> None:
    work, (store, digest, _) = place
    for uri in (store.uri("team-b/models/x/v/full"), store.uri(f"{NAMESPACE}/models/../../team-b"), "s3://other/x"):
        with pytest.raises(Refusal, match="measured from below"):
            evaluate.run(job(work), dataset_digest=digest, model_uri=uri, work=tmp_path, store=store)


def test_torch_is_as_it_was(place: tuple[Path, Place], tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    measure(job(place[0], maxExamples=1, fewShot=[0], compareWithBase=False), place[1], tmp_path)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_the_verb_ends_with_a_code_and_last_words_of_its_own(
    place: tuple[Path, Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, (store, digest, models) = place
    words = tmp_path / "last words"
    monkeypatch.setenv("TUNEWRIGHT_TERMINATION_MESSAGE", str(words))
    config = job(work, maxExamples=2, fewShot=[0], require=[{"metric": "loss", "max": 0.0}])
    monkeypatch.setattr("tunewright_trainer.config.load_pod_config", lambda path: config)
    monkeypatch.setattr("tunewright_trainer.storage.open_store", lambda settings: store)
    monkeypatch.setattr("tunewright_crds.names.SCRATCH", str(tmp_path))
    monkeypatch.setattr(cli, "load_no_more_than", lambda config: None)  # which would hold for the tests after this one, too
    with pytest.raises(SystemExit) as end:
        cli.evaluate(dataset=digest, model=models["full"], config=Path("job.json"))
    assert end.value.code == ExitCode.QUALITY
    outcome = Outcome.model_validate_json(words.read_text(encoding="utf-8"))
    assert outcome.error is not None
    assert (outcome.error.code, outcome.error.param) == (FailureCode.QUALITY_TOO_LOW, "spec.evaluation.require")
    assert told(outcome).examples == 2
