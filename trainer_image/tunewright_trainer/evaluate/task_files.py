"""Tasks of lm_eval that a job brings along: a folder with a YAML file and the data beside it, and nothing in it that is run.

lm_eval takes code from a task's folder in several ways (`!function`, `include`, `custom_dataset`, metrics and data sets that are scripts). The pod
holds keys of the platform's storage, so a task is taken only if it is made of what is named here.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.evaluation import HARNESS_METRICS, EvaluationTask
from tunewright_crds.pod import PodConfig
from tunewright_trainer.storage import fetch_files, open_task

MAX_YAML_BYTES: Final = 2**20
FORMATS: Final = ("json", "csv", "parquet", "text")  # the builders of `datasets` that read files and run none
OUTPUT_TYPES: Final = ("generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling")
KEYS: Final = {
    "task",
    "task_alias",
    "tag",
    "dataset_path",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "fewshot_config",
    "output_type",
    "description",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "target_delimiter",
    "fewshot_delimiter",
    "gen_prefix",
    "generation_kwargs",
    "metric_list",
    "filter_list",
    "num_fewshot",
    "metadata",
}
_METRIC_KEYS: Final = {
    "metric",
    "aggregation",
    "higher_is_better",
    "ignore_case",
    "ignore_punctuation",
    "ignore_numbers",
    "regexes_to_ignore",
}
_GENERATION_KEYS: Final = {"until", "max_gen_toks", "do_sample", "temperature"}
_AGGREGATIONS: Final = {
    "mean",
    "nanmean",
    "median",
    "perplexity",
    "weighted_perplexity",
    "bits_per_byte",
    "f1",
    "matthews_corrcoef",
    "bleu",
    "chrf",
    "ter",
    "brier_score",
}
_FILTERS: Final = {"take_first", "regex", "regex_pos", "remove_whitespace", "multi_choice_regex", "lowercase", "uppercase", "map"}
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")  # no pattern, no address, no way up

Config = dict[str, Any]


def fetch_tasks(config: PodConfig, folder: Path) -> list[Config]:
    """The job's tasks as lm_eval is to be given them, their files below ``folder``. Raises `Refusal` that names the task."""
    found = []
    for number, wanted in enumerate(config.spec.evaluation.tasks):
        param = f"spec.evaluation.tasks[{number}]"
        found.append(read_task(wanted, _fetch(config, wanted, folder / str(number), f"{param}.uri"), param))
    return found


def _fetch(config: PodConfig, wanted: EvaluationTask, folder: Path, param: str) -> Path:
    place = open_task(config, wanted.uri, param=param)
    if place.local is not None:
        place.files()
        return place.local
    top = f"{place.key.rstrip('/')}/"
    for info in place.files():
        below = folder / info.key.removeprefix(top).rpartition("/")[0]
        below.mkdir(parents=True, exist_ok=True)
        fetch_files(place.store, [info.key], below)
    return folder


def read_task(wanted: EvaluationTask, folder: Path, param: str) -> Config:
    """The task of this name in a folder, with the addresses of its data on this machine."""
    config = _named(wanted.name, folder, f"{param}.uri")

    def refuse(what: str) -> Refusal:
        return Refusal(FailureCode.CONFIG_INVALID, f"task {wanted.name}: {what}", param=f"{param}.uri")

    for mistake in _mistakes(config):
        raise refuse(mistake)
    config["dataset_kwargs"] = {"data_files": _data_files(config.get("dataset_kwargs"), folder.resolve(), refuse)}
    return config


def _named(name: str, folder: Path, param: str) -> Config:
    """The YAML document that calls itself by this name."""
    names = []
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        document = _read(path, param)
        if document.get("task") == name:
            return document
        names.append(f"{document.get('task')} ({path.name})")
    what = f"it has {', '.join(names[:8])}" if names else "it has no YAML file"
    raise Refusal(FailureCode.CONFIG_INVALID, f"no file of the folder has `task: {name}`; {what}", param=param)


def _read(path: Path, param: str) -> Config:
    if path.stat().st_size > MAX_YAML_BYTES:
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path.name} is larger than {MAX_YAML_BYTES} bytes", param=param)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        tag = error.problem or "an unknown tag"
        what = (
            f"{path.name} holds code, or a tag that is unknown ({tag}): tasks are made of texts and templates only, `!function` is not run"
        )
        raise Refusal(FailureCode.CONFIG_INVALID, what, param=param) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path.name} is not YAML{where}", param=param) from error
    if not isinstance(document, dict):
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path.name} is no task of lm_eval: it holds no keys", param=param)
    return document


def _mistakes(config: Config) -> Iterator[str]:
    """What keeps a task from being run, in words."""
    if unknown := sorted(str(key) for key in config if key not in KEYS):
        yield f"{unknown[0]} is not taken here: what is taken is {', '.join(sorted(KEYS))}"
    if config.get("dataset_path") not in FORMATS:
        yield f"dataset_path is {' or '.join(FORMATS)}, for data that lies beside the task: nothing is fetched from the hub"
    if config.get("output_type", OUTPUT_TYPES[0]) not in OUTPUT_TYPES:
        yield f"output_type is one of {', '.join(OUTPUT_TYPES)}"
    if not (config.get("test_split") or config.get("validation_split")):
        yield "it names neither a test_split nor a validation_split"
    for key, names in (("generation_kwargs", _GENERATION_KEYS), ("fewshot_config", {"sampler", "split"})):
        if stray := _stray(config.get(key), names):
            yield f"{key}: {stray}"
    generation = config.get("generation_kwargs") or {}
    if isinstance(generation, dict) and (generation.get("do_sample") or generation.get("temperature")):
        yield "generation_kwargs: answers are greedy, leave do_sample and temperature out"
    for metric in _items(config.get("metric_list")):
        if stray := _stray(metric, _METRIC_KEYS):
            yield f"metric_list: {stray}"
        if metric.get("metric") not in HARNESS_METRICS:
            yield f"metric_list: a metric is one of {', '.join(HARNESS_METRICS)}"
        if metric.get("aggregation", "mean") not in _AGGREGATIONS:
            yield f"metric_list: an aggregation is one of {', '.join(sorted(_AGGREGATIONS))}"
    for pipeline in _items(config.get("filter_list")):
        for one in _items(pipeline.get("filter")):
            if one.get("function") not in _FILTERS:
                yield f"filter_list: a filter is one of {', '.join(sorted(_FILTERS))}"


def _stray(found: Any, names: set[str]) -> str:
    if found is None:
        return ""
    if not isinstance(found, dict):
        return "it holds no keys"
    return next((f"{key} is not taken here: what is taken is {', '.join(sorted(names))}" for key in found if key not in names), "")


def _items(found: Any) -> list[dict[str, Any]]:
    """A list of mappings; anything else in it is one without keys, which is told as such."""
    return [one if isinstance(one, dict) else {} for one in found] if isinstance(found, list) else [{}] if found else []


def _data_files(options: Any, folder: Path, refuse: Any) -> dict[str, list[str]]:
    files = options.get("data_files") if isinstance(options, Mapping) else None
    if not files or set(options) != {"data_files"}:
        raise refuse("dataset_kwargs holds data_files, and nothing else")
    by_split = files if isinstance(files, dict) else {"train": files}
    return {
        str(split): [_data_file(name, folder, refuse) for name in (names if isinstance(names, list) else [names])]
        for split, names in by_split.items()
    }


def _data_file(name: Any, folder: Path, refuse: Any) -> str:
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise refuse("data_files are names of files beside the task, such as test.jsonl")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise refuse(f"its data file {name} does not lie in the folder")
    return str(path)
