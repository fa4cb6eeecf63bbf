"""Tasks of lm_eval (EleutherAI's harness), run offline on a model that is in memory, with the metrics and standard errors that it computes."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.evaluation import HARNESS_METRICS
from tunewright_trainer.evaluate.answers import ordinary_attention
from tunewright_trainer.evaluate.task_files import Config
from tunewright_trainer.process import is_out_of_memory
from tunewright_trainer.serve.turns import End
from tunewright_trainer.train.data import permutation
from tunewright_trainer.train.model import Tuned

log = logging.getLogger(__name__)

BATCH: Final = 16  # requests at a time, halved where they need too much memory
RESAMPLES: Final = 1000  # for standard errors that have no formula; lm_eval takes at most 100 of slow metrics
_DOCUMENT: Final = (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError, SyntaxError, ZeroDivisionError)


@dataclass(frozen=True)
class Put:
    """What one model made of one task: by metric ``value``, ``stderr`` (None where lm_eval has none), and ``each``, its value for every document
    where the metric is their mean. ``lines`` has the prompt, the expected and the given answer of every document."""

    metrics: dict[str, dict[str, Any]]
    lines: list[dict[str, str]]


@dataclass(frozen=True)
class Asking:
    """How a task is put to a model. ``end``: what ends a turn, beside what the task says; ``most``: tokens of an answer, unless the task says."""

    param: str
    shots: int
    chat: bool
    examples: int
    seed: int
    end: End
    most: int


def put(tuned: Tuned, tokenizer: Any, config: Config, asking: Asking, *, cache: Path) -> Put:
    """Put a task to a model. Raises `Refusal` where the task cannot be run, in words that hold nothing of its data."""
    with _offline(), ordinary_attention(tuned.network), tuned.autocast():
        task = _task(config, asking, cache)
        drawn = sorted(permutation(len(task.eval_docs), seed=asking.seed, epoch=0)[: asking.examples].tolist())
        if not drawn:
            raise Refusal(FailureCode.DATA_EMPTY, f"task {config['task']} has no document to ask", param=asking.param)
        return _read(_evaluated(tuned, tokenizer, task, asking, drawn), config["task"])


def _task(config: Config, asking: Asking, cache: Path) -> Any:
    from lm_eval.api.task import ConfigurableTask

    room = {"max_gen_toks": asking.most} | (config.get("generation_kwargs") or {})
    until = room.get("until") or ["\n\n"]
    told = {**config, "dataset_kwargs": {**config["dataset_kwargs"], "cache_dir": str(cache)}, "num_fewshot": asking.shots}
    if config.get("output_type", "generate_until") == "generate_until":
        told["generation_kwargs"] = room | {
            "do_sample": False,
            "until": [*([until] if isinstance(until, str) else until), *asking.end.texts],
        }
        told["generation_kwargs"].pop("temperature", None)
    with _blamed_on(config["task"], asking.param):
        task = ConfigurableTask(config=told)
        task.set_fewshot_seed(seed=asking.seed)
    return task


def _evaluated(tuned: Tuned, tokenizer: Any, task: Any, asking: Asking, drawn: Sequence[int], batch: int = BATCH) -> Any:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    name = task.config.task
    # Of a batch, answers that have ended are filled up, which lm_eval leaves to the model: it drops markers before it looks for texts that end one.
    options = tuned.network.generation_config
    options.eos_token_id = sorted(asking.end.ids) or None
    options.decoder_start_token_id = getattr(tuned.network.config, "decoder_start_token_id", None)
    model = HFLM(
        pretrained=tuned.peft or tuned.network,
        tokenizer=tokenizer,
        backend="seq2seq" if tuned.network.config.is_encoder_decoder else "causal",
        batch_size=batch,
    )
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):  # bars of one's own are no lines of a log
        setattr(model, kind, partial(getattr(model, kind), disable_tqdm=True))
    try:
        with _blamed_on(name, asking.param):
            return evaluate(
                model,
                {"tasks": {name: task}},
                samples={name: list(drawn)},
                bootstrap_iters=RESAMPLES,
                apply_chat_template=asking.chat,
                fewshot_as_multiturn=asking.chat,
            )
    except Exception as error:
        if batch == 1 or not is_out_of_memory(error):
            raise
    log.info("%d requests at a time need too much memory; half as many are tried", batch)
    return _evaluated(tuned, tokenizer, task, asking, drawn, batch // 2)


@contextmanager
def _blamed_on(name: str, param: str) -> Iterator[None]:
    """What goes wrong with templates and documents is told without what stands in them."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise Refusal(FailureCode.CONFIG_INVALID, f"task {name}: a template fails: {error.message}", param=param) from error
    except (*_DOCUMENT, DatasetsError) as error:
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        place = f" in {where.tb_frame.f_code.co_name}" if where else ""
        what = f"task {name}: lm_eval cannot run it with its data: {type(error).__name__}{place}"
        raise Refusal(FailureCode.CONFIG_INVALID, what, param=param) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is asked of the hub, no row is quoted in the log, templates can reach no code (lm_eval renders them without a sandbox), and no
    processes are started."""
    import datasets
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = utils.regex_replace
    told = logging.getLogger("lm_eval")
    level = told.level
    told.setLevel(logging.CRITICAL)
    before = utils.env, datasets.config.HF_HUB_OFFLINE, os.environ.get("DISABLE_MULTIPROC")
    utils.env, datasets.config.HF_HUB_OFFLINE, os.environ["DISABLE_MULTIPROC"] = sandbox, True, "1"
    try:
        yield
    finally:
        told.setLevel(level)
        utils.env, datasets.config.HF_HUB_OFFLINE = before[:2]
        if before[2] is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before[2]


def _read(results: Any, name: str) -> Put:
    """What lm_eval found. A metric behind a filter is called `metric,filter`."""
    found, samples = results["results"][name], results["samples"][name]
    metrics = {}
    for key, value in found.items():
        metric, _, behind = key.partition(",")
        if metric not in HARNESS_METRICS or not isinstance(value, (int, float)):
            continue
        stderr = found.get(f"{metric}_stderr,{behind}")
        each = [sample[metric] for sample in samples if sample["filter"] == behind]
        is_mean = all(isinstance(one, (int, float)) for one in each) and math.isclose(float(np.mean(each)), value, abs_tol=1e-9)
        metrics[metric if behind == "none" else f"{metric},{behind}"] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            "each": [float(one) for one in each] if is_mean else [],
        }
    first = samples[0]["filter"] if samples else ""
    return Put(metrics, [_line(sample) for sample in samples if sample["filter"] == first])


def _line(sample: dict[str, Any]) -> dict[str, str]:
    asked, said = sample["arguments"], sample["filtered_resps"]
    if isinstance(said[0], (tuple, list)) and len(asked) > 1:  # of choices, the likeliest
        answer = asked[max(range(len(asked)), key=lambda at: said[at][0])][1]
        return {"prompt": str(asked[0][0]), "expected": _target(sample, asked), "answer": str(answer).strip()}
    return {"prompt": str(asked[0][0]), "expected": str(sample["target"]), "answer": str(said[0] if isinstance(said[0], str) else said)}


def _target(sample: dict[str, Any], asked: Sequence[Any]) -> str:
    target = sample["target"]
    return str(asked[target][1]).strip() if isinstance(target, int) and 0 <= target < len(asked) else str(target)
