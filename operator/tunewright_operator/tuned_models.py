"""Tuned models that a job or an InstructionDataset names (``model://``): waited for, checked, and taken as they are at one moment, for good."""

from typing import Any

from pydantic import ValidationError

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.method import either
from tunewright_crds.names import Condition, Phase, Reason
from tunewright_crds.references import Reference, references
from tunewright_crds.status import TakenModel
from tunewright_crds.tuned_model import Kind, TunedModelSpec
from tunewright_operator.observed import Awaited, Job, Served, read_status
from tunewright_operator.plan import Pass


def take_the_models(work: Pass[Any, Any]) -> bool:
    """A resource that names tuned models takes them once all are there; True while it has to wait, or cannot use one."""
    before = {taken.field for taken in work.status.taken_models}
    named = [reference for reference in references(work.seen.owner.spec) if reference.field.name not in before]
    if not named:
        return False
    try:
        found = [_find(reference, work.seen.awaited.get(reference.name, Awaited())) for reference in named]
    except Refusal as refusal:
        work.fail(refusal.code, refusal.message, refusal.param)
        work.mark(Condition.MODEL_READY, "False", refusal.code, refusal.message)
        return True
    missing = [one for one in found if isinstance(one, str)]
    if missing:
        work.wait()
        work.mark(Condition.MODEL_READY, "False", Reason.WAITING_FOR_MODEL, "; ".join(missing))
        return True
    taken = [one for one in found if isinstance(one, TakenModel)]
    work.status.taken_models += taken
    told = "; ".join(f"{one.name} is version {one.version}, at {one.uri}" for one in taken)
    work.mark(Condition.MODEL_READY, "True", Reason.MODEL_TAKEN, told)
    work.tell(Reason.MODEL_TAKEN, told, unique="models")
    return False


def _find(reference: Reference, awaited: Awaited) -> TakenModel | str:
    """The model as it is now, or what is waited for. Raises `Refusal` for one that will never do."""
    name, model = reference.name, awaited.model
    if model is None:
        return _not_there(name, awaited.makers)
    if model.id.deleting:
        return f"TunedModel {name} is being deleted"
    spec = _spec_of(model, reference)
    if reference.version not in ("", spec.version):
        return f"TunedModel {name} has version {spec.version}, not {reference.version}{_what_comes_next(awaited.makers)}"
    for kind in reference.field.kinds:
        for form in spec.all_forms:
            if form.kind is kind:
                return TakenModel(field=reference.field.name, name=name, version=spec.version, uri=form.uri, digest=form.digest)
    raise Refusal(FailureCode.CONFIG_INVALID, _unfit(reference, spec), param=reference.field.name)


def _spec_of(model: Served, reference: Reference) -> TunedModelSpec:
    try:
        return TunedModelSpec.model_validate(model.spec)
    except ValidationError as invalid:
        problem = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        message = f"TunedModel {model.id.name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise Refusal(FailureCode.CONFIG_INVALID, message, param=reference.field.name) from invalid


def _unfit(reference: Reference, spec: TunedModelSpec) -> str:
    if spec.kind is Kind.ADAPTER and Kind.MERGED in reference.field.kinds:
        return (
            f"TunedModel {reference.name} is an adapter over {spec.base.uri}, and a whole model is needed: "
            "publish it with output.formats: [merged], or [adapter, merged]"
        )
    return f"TunedModel {reference.name} is of kind {spec.kind}; {reference.field.name} takes {either(reference.field.kinds)}"


def _not_there(name: str, makers: tuple[Job, ...]) -> str:
    if not makers:
        return f"there is no TunedModel {name} in this namespace, and no other job that makes it"
    job = max(makers, key=lambda job: (not read_status(job.raw_status).phase.terminal, job.id.created))
    status = read_status(job.raw_status)
    gone = f"TunedModel {name} is not there"
    if status.phase is Phase.FAILED and status.error:
        return f"{gone}: job {job.id.name} failed ({status.error.code}: {status.error.message}); mend it and apply it anew"
    if status.phase is Phase.SUCCEEDED:
        return f"{gone} any more: job {job.id.name} made it; apply that anew"
    if status.phase.terminal:
        return f"{gone}: job {job.id.name} was cancelled; apply it anew"
    return f"{gone} yet: job {job.id.name}, which makes it, is {status.phase.lower()}"


def _what_comes_next(makers: tuple[Job, ...]) -> str:
    """The job that will publish another version, if there is one."""
    coming = next((job.id.name for job in makers if not read_status(job.raw_status).phase.terminal), "")
    return f"; job {coming} is to publish another one" if coming else ""
