"""The steps of evaluating, in order: draw the examples, have each model answer them, compare, judge, publish."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.evaluation import MAX_METRICS, EvaluationStatus, MetricName, missed, task_name
from tunewright_crds.method import Examples, Objective
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.storage import REPORT, REPORT_DATA, evaluation_key
from tunewright_crds.tuned_model import Kind
from tunewright_trainer.architecture import is_seq2seq
from tunewright_trainer.evaluate import examples as questions
from tunewright_trainer.evaluate.comparison import Judged, Task, compare, compare_put, measured, put_lines
from tunewright_trainer.evaluate.harness import Asking, Put, put
from tunewright_trainer.evaluate.judging import Away, Judge, Pair, api_key
from tunewright_trainer.evaluate.measuring import Found, Measuring, answerable
from tunewright_trainer.evaluate.models import BASE, TUNED, subjects
from tunewright_trainer.evaluate.report import page
from tunewright_trainer.evaluate.rules import Checks
from tunewright_trainer.evaluate.task_files import Config
from tunewright_trainer.evaluate.telling import Telling
from tunewright_trainer.process import telling
from tunewright_trainer.storage import Store, publish_folder, read_manifest
from tunewright_trainer.train.data import Rows
from tunewright_trainer.train.determinism import reproducible
from tunewright_trainer.train.model import Tuned

log = logging.getLogger(__name__)

ANSWERS: Final = "answers.jsonl"
JUDGED_AT_ONCE: Final = 32  # pairs, whose verdicts are then kept


@dataclass(frozen=True)
class Folders:
    """Where everything lies on this machine. ``work`` is for what is made on the way."""

    data: Path
    base: Path
    tuned: Path
    work: Path
    judge: Path | None = None
    """The job's reward model, if it learned from one."""


def evaluate(config: PodConfig, *, lineage: dict[str, Any], kind: str, folders: Folders, tasks: Sequence[Config], store: Store) -> Outcome:
    """See `tunewright_trainer.evaluate.run`."""
    wanted = config.spec.evaluation
    key = evaluation_key(config.job.namespace, config.job.uid)
    lineage = lineage | {"options": wanted.model_dump(mode="json", by_alias=True)}
    outcome = Outcome()
    with telling(outcome):
        manifest = read_manifest(store, key)
        if manifest is None or any(manifest.get(name) != value for name, value in lineage.items()):
            with reproducible(config.spec):
                evaluation = Evaluation(config, folders, tasks, Kind(kind), store, key, lineage)
                try:
                    manifest = {"evaluation": evaluation.run()}
                finally:
                    evaluation.telling.close()
        else:
            log.info("the model was measured before: %s", store.uri(key))
        outcome.evaluation = EvaluationStatus.model_validate(manifest["evaluation"] | {"reportUri": store.uri(f"{key}/{REPORT}")})
        if failed := missed(wanted.require, outcome.evaluation.metrics):
            raise Refusal(FailureCode.QUALITY_TOO_LOW, "; ".join(failed), param="spec.evaluation.require")
    return outcome


class Evaluation:
    """One evaluation."""

    def __init__(
        self, config: PodConfig, folders: Folders, tasks: Sequence[Config], kind: Kind, store: Store, key: str, lineage: dict[str, Any]
    ) -> None:
        self.config, self.spec, self.wanted = config, config.spec, config.spec.evaluation
        self.folders = folders
        self.kind = kind
        self.judges = self.spec.method.objective is Objective.REWARD
        self.store, self.key, self.lineage = store, key, lineage
        self.checks = Checks(self.wanted.rules)
        self.measuring = Measuring(self.spec, folders.base, folders.judge)
        self.tasks = self._rounds(is_seq2seq(folders.base))
        self.puts = {
            task_name(config["task"], shots): (config, self._asking(number, shots))
            for number, config in enumerate(tasks)
            for shots in self.wanted.few_shot
        }
        sizes = {(name, task): len(self.tasks.get(task, range(self.wanted.max_examples))) for name, task in self._places()}
        judged = {("judge", task): len(answerable(asked)) for task, asked in self.tasks.items() if self.wanted.judge.endpoint}
        self.telling = Telling(config, sizes | judged)

    def _rounds(self, seq2seq: bool) -> dict[str, list[questions.Example]]:
        """The test rows as they are asked in each round; none where there are no rows, and nothing that needs some."""
        learned, seed = self.spec.method.examples, self.spec.hyperparameters.seed
        rows = Rows(self.folders.data / "test", seq2seq=seq2seq)
        plain = questions.chosen_examples(rows, learned=learned, most=self.wanted.max_examples, seed=seed)
        if not plain and (self.wanted.needs_rows or not self.wanted.tasks):
            raise Refusal(
                FailureCode.DATA_EMPTY, "no row is left to test with; the data report says what was dropped", param="spec.dataset"
            )
        train = Rows(self.folders.data / "train", seq2seq=seq2seq)
        shown = questions.shots(train, max(self.wanted.few_shot), pairs=learned is Examples.PREFERENCES, seed=seed)
        return {name: self._task(plain, shown[:count]) for name, count in self.wanted.rounds.items()} if plain else {}

    def _asking(self, number: int, shots: int) -> Asking:
        return Asking(
            param=f"spec.evaluation.tasks[{number}]",
            shots=shots,
            chat=self.wanted.tasks[number].chat,
            examples=self.wanted.max_examples,
            seed=self.spec.hyperparameters.seed,
            end=self.measuring.end,
            most=min(self.wanted.max_new_tokens, self.measuring.context // 2),
        )

    def _task(self, plain: list[questions.Example], shown: Sequence[Any]) -> list[questions.Example]:
        room = self.measuring.context - self.wanted.max_new_tokens
        return [questions.shown_before(shown, one, beginning=self.measuring.tokenizer.bos_token_id, room=room) for one in plain]

    def run(self) -> dict[str, Any]:
        """Measure, and publish the report; returns the status, without the report's address."""
        found = self._measure_all()
        tasks = [
            Task(
                name=name,
                expected=[self.measuring.expected(one) for one in asked],
                prompts=[self.measuring.prompt(one) for one in asked],
                found={subject: asdict(found[subject, name]) for subject in self._names},
            )
            for name, of_task in self.tasks.items()
            for asked in [[] if self.judges else answerable(of_task)]
        ]
        tasks = [replace(task, judged=self._judged(task)) for task in tasks]
        compared = [compare(task, self.wanted.classification, self.checks, seed=self.spec.hyperparameters.seed) for task in tasks]
        put_to = {name: {subject: found[subject, name] for subject in self._names} for name in self.puts}
        compared += [compare_put(name, of) for name, of in put_to.items()]
        required = {(one.place, one.metric) for one in self.wanted.require}
        metrics = sorted(measured(compared), key=lambda one: (one.task, one.metric) not in required)[:MAX_METRICS]
        status = EvaluationStatus(metrics=metrics, examples=len(next(iter(self.tasks.values()), []))).model_dump(mode="json", by_alias=True)
        lines = [line for task in tasks for line in task.lines()] + [line for name, of in put_to.items() for line in put_lines(name, of)]
        self._publish(lines, compared, status)
        log.info("measured %s: %s", self.store.uri(self.key), _line(metrics))
        return status

    def _judged(self, task: Task) -> Judged | None:
        """What the judge says of the answers. Raises `Refusal` where it says nothing and that is required; verdicts that are there are kept."""
        wanted = self.wanted.judge
        if not wanted.endpoint or not task.prompts:
            return None
        pairs = [Pair(*three) for three in zip(task.prompts, task.found[BASE]["answers"], task.found[TUNED]["answers"], strict=True)]
        key = self._part("judge", task.name)
        wins: list[float | None] = list(self._earlier_wins(key))
        try:
            with Judge(wanted, key=api_key()) as judge:
                for start in range(len(wins), len(pairs), JUDGED_AT_ONCE):
                    wins += judge.wins(pairs[start : start + JUDGED_AT_ONCE])
                    self.store.put_bytes(key, orjson.dumps({"lineage": self.lineage, "wins": wins}))
                    self.telling.at(("judge", task.name), len(wins))
                    log.info("%s: judged %d of %d pairs", task.name, len(wins), len(pairs))
        except Away as away:
            if any(one.metric == MetricName.WIN_RATE and one.place == task.name for one in self.wanted.require):
                raise away.refusal from away
            log.warning("%s; win_rate is not measured", away)
            return Judged(wins, str(away))
        judged = Judged(wins)
        return judged if judged.enough else replace(judged, why=f"of {len(wins)} pairs only {len(judged.known)} got a verdict")

    def _earlier_wins(self, key: str) -> list[float | None]:
        part = orjson.loads(self.store.get_bytes(key)) if self.store.exists(key) else {}
        return part["wins"] if part.get("lineage") == self.lineage else []

    @property
    def _names(self) -> list[str]:
        return ([BASE] if self._compares else []) + [TUNED]

    @property
    def _compares(self) -> bool:
        """The base of a reward model has no head to judge with, so that there is nothing to compare with."""
        return self.wanted.compare_with_base and not self.judges

    def _measure_all(self) -> dict[tuple[str, str], Any]:
        """What each model makes of each task; what an earlier run has measured is taken from storage."""
        found = {place: part for place in self._places() if (part := self._earlier(*place))}
        for place, part in found.items():
            self.telling.finished(place, _size(part))
        if len(found) == len(self._places()):
            return found
        folders = self.folders
        for name, model in subjects(self.spec, self.kind, base=folders.base, tuned=folders.tuned, with_base=self._compares):
            for task in self._tasks:
                if (name, task) not in found:
                    found[name, task] = part = self._made_of(name, model, task)
                    self.telling.finished((name, task), _size(part))
                    self.store.put_bytes(self._part(name, task), orjson.dumps({"lineage": self.lineage, "found": asdict(part)}))
        return found

    def _made_of(self, name: str, model: Tuned, task: str) -> Found | Put:
        """What a model makes of one task."""
        if task in self.tasks:
            return self.measuring.of(model, self.tasks[task], f"{name} model, {task}", tell=partial(self.telling.at, (name, task)))
        log.info("%s model: put to the task %s", name, task)
        config, asking = self.puts[task]
        return put(model, self.measuring.tokenizer, config, asking, cache=self.folders.work / "datasets")

    def _places(self) -> list[tuple[str, str]]:
        return [(name, task) for name in self._names for task in self._tasks]

    @property
    def _tasks(self) -> list[str]:
        return [*self.tasks, *self.puts]

    def _part(self, name: str, task: str) -> str:
        return f"{self.key}/parts/{name}-{task}.json"

    def _earlier(self, name: str, task: str) -> Found | Put | None:
        key = self._part(name, task)
        if not self.store.exists(key):
            return None
        part = orjson.loads(self.store.get_bytes(key))
        if part["lineage"] != self.lineage:
            return None
        return Found(**part["found"]) if task in self.tasks else Put(**part["found"])

    def _publish(self, lines: list[dict[str, Any]], compared: list[dict[str, Any]], status: dict[str, Any]) -> None:
        failed = missed(self.wanted.require, EvaluationStatus.model_validate(status).metrics)
        facts = {
            "job": {"namespace": self.config.job.namespace, "name": self.config.job.name},
            "model": self.lineage["model"],
            "base": self.spec.model.uri,
            "examples": status["examples"],
            "required": [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in self.wanted.require],
            "missed": failed,
            "tasks": compared,
        }
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            (folder / REPORT_DATA).write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2))
            (folder / REPORT).write_bytes(page(facts))
            (folder / ANSWERS).write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
            publish_folder(self.store, folder, self.key, manifest=self.lineage | {"evaluation": status})
        judged = [("judge", task) for task in self.tasks] if self.wanted.judge.endpoint else []
        self.store.delete([self._part(*place) for place in [*self._places(), *judged]])


def _size(part: Found | Put) -> int:
    """Prompts that a model was asked."""
    return len(part.lines) if isinstance(part, Put) else max(len(part.answers), len(part.preferred))


def _line(metrics: Sequence[Any]) -> str:
    """The first metrics, for the log."""
    told = (f"{one.metric} {one.tuned:.4g}" + (f" (base {one.base:.4g})" if one.base is not None else "") for one in metrics[:8])
    return ", ".join(told)
