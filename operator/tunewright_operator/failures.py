"""Why a pod ended: from what Kubernetes and the trainer say of it to one of the failure codes.

``RULES`` is read from the top; the first rule that knows an answer wins. Adding a rule is adding a function.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from tunewright_crds.errors import ExitCode, FailureClass, FailureCode, failure_class
from tunewright_crds.names import Reason
from tunewright_crds.pod import MAX_TERMINATION_BYTES, Outcome, clean
from tunewright_operator.observed import Pod

# Exit codes above 128 are 128 + signal; these two signals come from outside the program.
_SIGKILL, _SIGTERM = 137, 143
# Reasons of the condition DisruptionTarget that mean that the node is gone, not that the pod was asked to leave.
_NODE_GONE: Final = frozenset({"DeletionByTaintManager", "DeletionByPodGC"})
# The kubelet refused the pod before anything ran; another node, or the same one later, may take it.
_NOT_ADMITTED: Final = frozenset(
    {
        "UnexpectedAdmissionError",
        "OutOfcpu",
        "OutOfmemory",
        "OutOfpods",
        "NodeAffinity",
        "NodePorts",
        "NodeShutdown",
        "Terminated",
        "Shutdown",
    }
)
_IMAGE_TROUBLE: Final = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"})
_CONFIG_TROUBLE: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_GRAVITY: Final = (FailureClass.USER, FailureClass.OUT_OF_MEMORY, FailureClass.INFRASTRUCTURE, FailureClass.FREE)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a pod ended. ``reason`` is for people, ``cls`` says which retry budget it draws from; ``code`` is what the job fails with."""

    reason: str
    cls: FailureClass
    code: FailureCode | None = None
    message: str = ""
    param: str = ""

    @classmethod
    def failing(cls, code: FailureCode, message: str, param: str = "") -> "Ending":
        """An ending by a failure code, with that code's own class."""
        return cls(code.value, failure_class(code), code, clean(message), clean(param))

    @classmethod
    def free(cls, reason: str, message: str) -> "Ending":
        """An ending that costs nothing."""
        return cls(reason, FailureClass.FREE, None, clean(message))


def heard(pod: Pod | None) -> Outcome | None:
    """What the trainer said with its last words; None if it said nothing that we understand."""
    if pod is None or not pod.last_words or len(pod.last_words) > MAX_TERMINATION_BYTES:
        return None
    try:
        return Outcome.model_validate_json(pod.last_words)
    except ValidationError:
        return None


def ending(pod: Pod | None) -> Ending:
    """Why a pod ended that did not end well. None: nobody knows it any more."""
    if pod is None:
        return Ending.free(Reason.STOPPED, "the pod was deleted before it said how it ended")
    return next(found for rule in RULES if (found := rule(pod)))


def gravest(pods: Iterable[Pod]) -> Ending:
    """Why several pods ended that did not end well: what no retry would mend counts more than what may pass."""
    return min((ending(pod) for pod in pods), key=lambda found: _GRAVITY.index(found.cls), default=ending(None))


def cause(gang: Sequence[Pod], *, nodes: int = 1) -> tuple[Ending, Pod | None]:
    """Why an attempt of ``nodes`` pods ended that did not end well, and the pod that it began with; None for one that nobody knows any more.

    When one pod goes, its peers break for want of it: a pod that had to leave counts more than errors that may just as well come of that, and one
    that says that it lost a peer counts last.
    """
    broke: list[Pod | None] = [pod for pod in gang if pod.exit_code != 0] or [*gang]
    if len(gang) < nodes:
        broke.append(None)
    found = [(ending(pod), pod) for pod in broke]
    return min(found, key=lambda one: _gravity_in_a_gang(one[0]), default=(ending(None), None))


def _gravity_in_a_gang(found: Ending) -> float:
    if found.code is FailureCode.PEER_LOST:
        return len(_GRAVITY)
    forced = found.reason in (Reason.PREEMPTED, Reason.NODE_LOST)
    return _GRAVITY.index(FailureClass.INFRASTRUCTURE) - 0.5 if forced else _GRAVITY.index(found.cls)


def _out_of_memory(pod: Pod) -> Ending | None:
    if pod.ended_by != "OOMKilled":
        return None
    return Ending.failing(FailureCode.OUT_OF_MEMORY, "the container needed more memory than its limit", "spec.resources.memory")


def _outgrew_its_disk(pod: Pod) -> Ending | None:
    if pod.reason != "Evicted" or not any(word in pod.message for word in ("emptyDir", "ephemeral", "EmptyDir")) or pod.disruption:
        return None
    return Ending.failing(FailureCode.CONFIG_INVALID, f"the scratch volume is too small: {pod.message}", "spec.resources.scratch")


def _disrupted(pod: Pod) -> Ending | None:
    if pod.disruption in _NODE_GONE or pod.reason == "NodeLost":
        return Ending.free(Reason.NODE_LOST, pod.message or f"the node {pod.node} went away")
    if pod.disruption or pod.reason == "Evicted":
        return Ending.free(Reason.PREEMPTED, pod.message or f"the pod had to leave its node: {pod.disruption}")
    if pod.reason in _NOT_ADMITTED and pod.exit_code is None:
        return Ending.free(Reason.PREEMPTED, f"the node did not take the pod: {pod.message or pod.reason}")
    return None


def _told_by_the_trainer(pod: Pod) -> Ending | None:
    outcome = heard(pod)
    if outcome and outcome.error:
        return Ending.failing(outcome.error.code, outcome.error.message, outcome.error.param)
    return None


def _stopped(pod: Pod) -> Ending | None:
    if pod.exit_code != ExitCode.STOPPED:
        return None
    outcome = heard(pod)
    saved = outcome is not None and outcome.last_checkpoint is not None
    return Ending.free(Reason.STOPPED, "stopped with a checkpoint" if saved else "stopped before there was anything to save")


def _told_by_exit_code(pod: Pod) -> Ending | None:
    if pod.exit_code == ExitCode.OUT_OF_MEMORY:
        return Ending.failing(FailureCode.OUT_OF_MEMORY, "the trainer ran out of memory")
    if pod.exit_code == ExitCode.PEER_LOST:
        return Ending.failing(FailureCode.PEER_LOST, "a pod that trains together with this one went away")
    if pod.exit_code in (_SIGKILL, _SIGTERM):
        if pod.gone or pod.id.deleting:
            return Ending.free(Reason.STOPPED, "the pod was deleted")
        return Ending.failing(FailureCode.KILLED, f"the container was killed from outside (exit code {pod.exit_code})")
    return None


def _said_nothing(pod: Pod) -> Ending | None:
    if pod.exit_code is None:
        return None
    said = f": {pod.last_words}" if pod.last_words else ""
    return Ending.failing(FailureCode.INTERNAL, f"the container ended with exit code {pod.exit_code} and no outcome{said}")


def _deleted(pod: Pod) -> Ending | None:
    return Ending.free(Reason.STOPPED, pod.message or "the pod was deleted before it ended")


RULES: Final[tuple[Callable[[Pod], Ending | None], ...]] = (
    _out_of_memory,
    _outgrew_its_disk,
    _disrupted,
    _told_by_the_trainer,
    _stopped,
    _told_by_exit_code,
    _said_nothing,
    _deleted,
)


def stuck(pod: Pod, *, now: datetime, patience: float) -> Ending | None:
    """Why a pod that has not started never will; None while there is hope. ``patience``: seconds that an image may take."""
    if pod.finished or pod.id.deleting:
        return None
    if pod.waiting in _CONFIG_TROUBLE and pod.waiting != "RunContainerError":
        return Ending.failing(FailureCode.CONFIG_INVALID, f"the container cannot be made: {pod.waiting_message or pod.waiting}")
    if pod.waiting in _IMAGE_TROUBLE and (now - pod.id.created).total_seconds() >= patience:
        return Ending.failing(FailureCode.IMAGE_PULL_FAILED, pod.waiting_message or pod.waiting, "spec.resources.image")
    return None


def _with_claims(message: str, claims: Sequence[str]) -> str:
    """The scheduler tells of a claim that does not exist by name, and of one that is not bound only that there is one."""
    untold = [claim for claim in claims if f'"{claim}"' not in message]
    about = "persistentvolumeclaim" in message.lower() and len(untold) == len(claims)
    return f"{message} (its claims: {', '.join(untold)})" if about and untold else message


def hindrance(pod: Pod | None) -> tuple[str, str]:
    """(reason, message) of what a pod that does not run yet is waiting for."""
    if pod is None:
        return Reason.STARTING, "waiting for the pod"
    if pod.unschedulable and not pod.node:
        return Reason.UNSCHEDULABLE, clean(_with_claims(pod.unschedulable, pod.claims))
    if pod.waiting in _IMAGE_TROUBLE:
        return Reason.IMAGE_PULL, clean(pod.waiting_message or pod.waiting)
    return Reason.STARTING, "the pod is starting"
