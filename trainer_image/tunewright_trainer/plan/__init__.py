"""The memory plan: what training will take, told before a GPU is asked for.

    status = plan(config, read_shapes(place), model_config, manifest)
    refuse(status, config.spec)

Loads no torch, so that data preparation can say so.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.fields import amount
from tunewright_crds.job import JobSpec
from tunewright_crds.method import Objective, Tuner
from tunewright_crds.pod import PodConfig
from tunewright_crds.status import MemoryPart, MemoryStatus
from tunewright_trainer.plan.layouts import FAMILIES, Geometry, geometry
from tunewright_trainer.plan.memory import KNOWN_OBJECTIVES, KNOWN_TUNERS, DataFacts, Estimate, estimate, halvings_possible
from tunewright_trainer.plan.shapes import PARAM, Weight, parse_config, read_shapes
from tunewright_trainer.storage import ObjectMissing, open_model

__all__ = ["facts_of", "measured", "parse_config", "plan", "plan_for", "read_shapes", "refuse", "table"]

# Of the limit. Estimates err: a job is refused only where it is clearly too big, and warned of where it is near.
COMFORTABLE: Final = 0.85
HOPELESS: Final = 1.15
_MOST_ADVICE: Final = 4
_SHORTEST: Final = 128  # tokens; a shorter maxLength is no advice


def plan_for(config: PodConfig, manifest: Mapping[str, Any]) -> MemoryStatus:
    """`plan` for the job's base model where it lies. Raises `Refusal` where its files are missing or corrupt."""
    place = open_model(config)
    found = place.find("config.json")
    if found is None:
        raise ObjectMissing(FailureCode.MODEL_NOT_FOUND, f"{place.uri} holds no config.json", param=PARAM)
    return plan(config, read_shapes(place), parse_config(place.store.get_bytes(found.key)), manifest)


def plan(config: PodConfig, weights: Sequence[Weight], model: Mapping[str, Any], manifest: Mapping[str, Any]) -> MemoryStatus:
    """What the job will take. ``model`` is config.json of the base, ``manifest`` that of the prepared data.

    An automatic micro-batch is the largest that fits comfortably: 4,096 tokens or less by halves.
    """
    spec, shape, facts = config.spec, geometry(model), facts_of(manifest, config.spec)
    unknown = _unknown(spec, shape, facts, model)
    if unknown or shape is None or facts is None:
        return MemoryStatus(fits="unknown", advice=unknown)
    limit = config.gpu_memory if spec.resources.gpus_per_node else round(amount(spec.resources.memory))
    halvings, found = _choose(weights, shape, spec, facts, limit)
    status = MemoryStatus(
        fits=_verdict(found.total, limit),
        bytes=found.total,
        limit=limit,
        moment=found.moment,
        micro_batch_tokens=found.tokens,
        micro_batch_halvings=halvings,
        parts=[MemoryPart(name=name, bytes=size) for name, size in found.parts.items()],
    )
    if status.fits == "unknown":
        return status.model_copy(update={"advice": "the memory of the GPU is not known"})
    if status.fits in ("no", "tight"):
        changes = list(_changes(weights, shape, spec, facts, limit))[:_MOST_ADVICE]
        return status.model_copy(update={"advice": f"it would fit with {', or '.join([*changes, _more_memory(spec, found.total)])}"})
    return status


def refuse(status: MemoryStatus, spec: JobSpec) -> None:
    """Raise `MemoryTooSmall` where the job will not fit, unless its owner wants to try."""
    if status.fits == "no" and not spec.resources.ignore_memory_plan:
        param = "spec.resources.gpusPerNode" if spec.resources.gpus_per_node else "spec.resources.memory"
        what = "the GPU has" if spec.resources.gpus_per_node else "the pod has"
        parts = ", ".join(f"{part.name} {_size(part.bytes)}" for part in status.parts)
        message = f"{status.moment} takes about {_size(status.bytes)} ({parts}), and {what} {_size(status.limit)}; {status.advice}"
        raise Refusal(FailureCode.MEMORY_TOO_SMALL, message, param=param)


def table(status: MemoryStatus) -> str:
    """The plan for the log, a line for each part."""
    if not status.bytes:
        return f"memory plan: unknown: {status.advice}"
    limit = f" of {_size(status.limit)}" if status.limit else ""
    head = f"memory plan: {_size(status.bytes)}{limit} ({status.moment}, micro-batches of {status.micro_batch_tokens} tokens"
    head += f", halved {status.micro_batch_halvings} x to fit" if status.micro_batch_halvings else ""
    # What takes less than a MiB is not worth a line.
    lines = [
        f"{head}); fits: {status.fits}",
        *(f"  {part.name:<14} {_size(part.bytes):>10}" for part in status.parts if part.bytes >= 2**20),
    ]
    return "\n".join([*lines, f"  {status.advice}"] if status.advice else lines)


def measured(status: MemoryStatus, peak: int) -> str:
    """The peak that there was, in bytes, beside what was planned. torch tells that of a GPU without libraries and the holes of its cache."""
    tensors = sum(part.bytes for part in status.parts if part.name not in ("libraries", "allocator"))
    planned = f"; planned {_size(status.bytes)}, of which tensors {_size(tensors)}" if status.bytes else ""
    return f"peak memory {_size(peak)}{planned}"


def facts_of(manifest: Mapping[str, Any], spec: JobSpec) -> DataFacts | None:
    """What the manifest of prepared data says of its rows; None where it says nothing. Releases before told less: then rows may be `maxLength` long."""
    train = manifest.get("splits", {}).get("train")
    if not train or not train.get("tokens"):
        return None
    longest = train.get("longest_row") or spec.dataset.max_length
    learned = max(train["trainable_tokens"] / train["tokens"], train.get("most_learned", 0) / longest)
    return DataFacts(longest=longest, learned=min(1.0, learned))


def _unknown(spec: JobSpec, shape: Geometry | None, facts: DataFacts | None, model: Mapping[str, Any]) -> str:
    """Why there is no plan; empty where there is one."""
    if shape is None:
        return f"there is no memory plan for model_type {str(model.get('model_type'))[:64]}; there is for {', '.join(FAMILIES)}"
    if spec.method.objective not in KNOWN_OBJECTIVES:
        return f"there is no memory plan for objective {spec.method.objective}"
    if spec.method.tuner not in KNOWN_TUNERS:
        return f"there is no memory plan for tuner {spec.method.tuner}"
    if spec.resources.processes > 1 and spec.shards_model:
        return "there is no memory plan for weights that are spread over several processes"
    return "" if facts else "the prepared data does not say how long its rows are"


def _verdict(total: int, limit: int) -> str:
    if not limit:
        return "unknown"
    return "no" if total > HOPELESS * limit else "tight" if total > COMFORTABLE * limit else "yes"


def _choose(weights: Sequence[Weight], shape: Geometry, spec: JobSpec, facts: DataFacts, limit: int) -> tuple[int, Estimate]:
    """How often the micro-batch is halved, and what it takes then."""
    halvings, found = 0, estimate(weights, shape, spec, facts)
    if spec.hyperparameters.micro_batch_size != "auto" or not limit:
        return halvings, found
    for halvings in halvings_possible(spec, facts):
        found = estimate(weights, shape, spec, facts, halvings=halvings)
        if found.total <= COMFORTABLE * limit:
            break
    return halvings, found


def _changes(weights: Sequence[Weight], shape: Geometry, spec: JobSpec, facts: DataFacts, limit: int) -> Iterator[str]:
    """Single changes with which the job would fit, what costs least first."""

    def fits(changed: JobSpec, rows: DataFacts = facts) -> bool:
        return _choose(weights, shape, changed, rows, limit)[1].total <= COMFORTABLE * limit

    numbers, method = spec.hyperparameters, spec.method
    if isinstance(numbers.micro_batch_size, int):
        for size in (size for size in range(numbers.micro_batch_size - 1, 0, -1) if numbers.batch_size % size == 0):
            if fits(_with(spec, "hyperparameters", micro_batch_size=size)):
                yield f"hyperparameters.microBatchSize: {size}"
                break
    if not numbers.gradient_checkpointing and fits(_with(spec, "hyperparameters", gradient_checkpointing=True)):
        yield "hyperparameters.gradientCheckpointing: true"
    for tuner in _smaller_tuners(spec):
        if fits(_with(spec, "method", tuner=tuner)):
            yield f"method.tuner: {tuner}"
    if "merged" in spec.output.formats and method.tuner is not Tuner.FULL and fits(_with(spec, "output", formats=spec.output.formats[:1])):
        yield "output.formats: [adapter]"
    length = facts.longest // 2
    while length >= _SHORTEST:
        shorter = DataFacts(longest=length, learned=facts.learned)
        if fits(spec, shorter):
            yield f"dataset.maxLength: {length}"
            break
        length //= 2


def _smaller_tuners(spec: JobSpec) -> Iterator[Tuner]:
    if spec.method.tuner is Tuner.FULL:
        yield Tuner.LORA
    if spec.method.tuner in (Tuner.FULL, Tuner.LORA) and spec.method.objective is not Objective.REWARD:
        yield Tuner.QLORA


def _with(spec: JobSpec, part: str, **fields: Any) -> JobSpec:
    return spec.model_copy(update={part: getattr(spec, part).model_copy(update=fields)})


def _more_memory(spec: JobSpec, total: int) -> str:
    needed = -(-round(total / COMFORTABLE) // 2**30)
    return f"a GPU of {needed} GiB" if spec.resources.gpus_per_node else f"resources.memory: {needed}Gi"


def _size(count: int) -> str:
    """``12.3 GiB``, ``340 MiB``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
