"""The preparation of data, for a job or for an InstructionDataset."""

from typing import Any

from tunewright_crds.names import Reason
from tunewright_crds.pod import Outcome
from tunewright_operator import builders, errands
from tunewright_operator.errands import Errand
from tunewright_operator.failures import gravest
from tunewright_operator.plan import Pass


def hear_preparation(work: Pass[Any, Any]) -> bool:
    """Learns what became of the data's preparation; True where the pass ends with that."""
    if work.status.dataset:
        return False
    return _hear_shards(work) or errands.hear(work, _errand(work), work.seen.preparation, lambda outcome: _take(work, outcome))


def _errand(work: Pass[Any, Any]) -> Errand:
    return Errand("data preparation", work.data_condition, Reason.VALIDATING_DATA, "the data is being prepared")


def _hear_shards(work: Pass[Any, Any]) -> bool:
    batch = work.seen.shards
    if batch is None or batch.complete:
        return False
    if not batch.finished:
        return errands.watch(work, _errand(work), batch)
    if batch.gone or batch.id.deleting:
        return False
    broke = [pod for pod in work.seen.pods_of(batch) if pod.finished and pod.exit_code != 0]
    if not broke and not work.seen.confirmed:
        work.doubt()
        return True
    work.stop(batch)
    errands.try_again(work, _errand(work), gravest(broke))
    return work.failed


def _take(work: Pass[Any, Any], outcome: Outcome) -> bool:
    work.hear_of_memory(outcome)
    if outcome.dataset is None or outcome.error is not None:
        return False
    work.status.dataset = outcome.dataset
    told = f"{outcome.dataset.train_examples} examples to train on, {outcome.dataset.rejected} rejected"
    work.mark(work.data_condition, "True", Reason.DATA_PREPARED, told)
    work.tell(Reason.DATA_PREPARED, told, unique="prepared")
    return True


def prepare(work: Pass[Any, Any]) -> bool:
    """Has the data prepared, once: read in parts if that is wanted, then prepared. True while that is not done. No GPU is asked for before."""
    if work.status.dataset:
        return False
    work.begin()
    owner, config, shards = work.seen.owner.id, work.config, work.seen.shards
    reads = config.spec.dataset.shards > 1 and not (shards and shards.complete)
    batch, make = (shards, builders.shards_job) if reads else (work.seen.preparation, builders.prepare_job)
    manifest = errands.send(work, _errand(work), batch, lambda: make(config, owner, work.settings))
    if manifest:
        work.make_config()
        work.plan.create.append(manifest)
    return True
