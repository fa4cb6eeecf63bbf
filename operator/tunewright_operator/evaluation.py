"""The evaluation of what a job has tuned: before the model is registered, and a condition of that where the job requires something."""

from typing import Final

from tunewright_crds.errors import FailureCode
from tunewright_crds.evaluation import left_out, without_test_rows
from tunewright_crds.names import Condition, Phase, Reason
from tunewright_crds.pod import Outcome
from tunewright_operator import builders, errands
from tunewright_operator.attempts import see_to_the_config
from tunewright_operator.errands import Errand
from tunewright_operator.work import Work

_ERRAND: Final = Errand("evaluation", Condition.EVALUATED, Reason.EVALUATING, "the model is being measured on the test rows")


def hear_evaluation(work: Work) -> bool:
    """Learns what became of the evaluation; True where the pass ends with that."""
    if work.status.model is None or work.evaluated:
        return False
    return errands.hear(work, _ERRAND, work.seen.evaluation, lambda outcome: _take(work, outcome))


def _take(work: Work, outcome: Outcome) -> bool:
    """What was measured is told even of a model that is not good enough."""
    if outcome.evaluation:
        work.status.evaluation = outcome.evaluation
    if outcome.evaluation is None or outcome.error is not None:
        return False
    told = f"measured on {outcome.evaluation.examples} examples" if outcome.evaluation.examples else "measured by evaluation.tasks"
    work.mark(Condition.EVALUATED, "True", Reason.EVALUATED, told)
    work.tell(Reason.EVALUATED, told, unique="evaluated")
    return True


def check_test_rows(work: Work) -> bool:
    """A job that requires something of its model needs rows to measure it on; without any it ends before it trains."""
    if work.status.dataset is None:
        return False
    why = without_test_rows(work.wanted.evaluation, test_examples=work.status.dataset.test_examples)
    if why:
        work.fail(FailureCode.CONFIG_INVALID, why, "spec.evaluation.require")
    return bool(why)


def evaluate(work: Work) -> bool:
    """Has the trained model measured, once. True as long as there is one that is not registered: there is nothing to train any more."""
    model, dataset = work.status.model, work.status.dataset
    if model is None or dataset is None:
        return False
    work.status.phase = Phase.EVALUATING
    config, job = work.config, work.seen.job.id
    manifest = errands.send(
        work,
        _ERRAND,
        work.seen.evaluation,
        lambda: builders.evaluating_job(config, job, work.settings, dataset=dataset.digest, model=model.uri),
    )
    if manifest:
        see_to_the_config(work, config)
        work.plan.create.append(manifest)
    return True


def leave_out(work: Work) -> bool:
    """Whether the model is registered without having been measured; the condition tells why."""
    examples = work.status.dataset.test_examples if work.status.dataset else 0
    why = left_out(work.wanted.evaluation, work.wanted.method.objective, test_examples=examples)
    if why:
        work.mark(Condition.EVALUATED, "False", Reason.NOT_WANTED, why)
    return bool(why)
