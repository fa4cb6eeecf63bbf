"""Failure codes with advice, exit codes, and how one becomes the other.

A pod ends with an exit code (sysexits) and one JSON object as its termination message; the operator turns both into ``status.error``.
"""

from enum import IntEnum, StrEnum
from functools import partial
from typing import Any, Final


class ExitCode(IntEnum):
    """Exit codes of every ``tunewright-trainer`` verb (values from sysexits.h where it has one)."""

    DONE = 0
    CONFIG = 64
    DATA = 65
    MISSING = 66
    UNAVAILABLE = 69
    INTERNAL = 70
    STOPPED = 75  # with a complete checkpoint: preempted, suspended
    PEER_LOST = 76  # the cause lies with another pod or process of those that train together
    DENIED = 77
    OUT_OF_MEMORY = 78
    QUALITY = 79  # the model was tuned and measured, and is not as good as was required


class FailureClass(StrEnum):
    """Which retry budget an ended attempt draws from."""

    USER = "user"  # nothing will change by trying again
    INFRASTRUCTURE = "infrastructure"  # may pass: storage away, pod killed, internal error
    OUT_OF_MEMORY = "outOfMemory"  # tried again with a smaller micro-batch
    FREE = "free"  # preempted, drained, node lost, stopped on demand: costs nothing


class FailureCode(StrEnum):
    """``status.error.code``: what went wrong, for people and programs."""

    DATA_NOT_FOUND = "DataNotFound"
    DATA_INVALID = "DataInvalid"
    DATA_EMPTY = "DataEmpty"
    LICENSE_FORBIDDEN = "LicenseForbidden"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_UNSAFE = "ModelUnsafe"
    MODEL_UNSUPPORTED = "ModelUnsupported"
    ACCESS_DENIED = "AccessDenied"
    CONFIG_INVALID = "ConfigInvalid"
    OUT_OF_MEMORY = "OutOfMemory"
    MEMORY_TOO_SMALL = "MemoryTooSmall"
    LOSS_DIVERGED = "LossDiverged"
    QUALITY_TOO_LOW = "QualityTooLow"
    JUDGE_UNAVAILABLE = "JudgeUnavailable"
    STALLED = "Stalled"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    STORAGE_NOT_FOUND = "StorageNotFound"
    STORAGE_DAMAGED = "StorageDamaged"
    NODE_LOST = "NodeLost"
    PREEMPTED = "Preempted"
    KILLED = "Killed"
    PEER_LOST = "PeerLost"
    INTERNAL = "Internal"


ADVICE: Final[dict[FailureCode, str]] = {
    FailureCode.DATA_NOT_FOUND: "Check the address of the source (bucket and key, or repository and revision), and that its files are uploaded.",
    FailureCode.DATA_INVALID: "Mend the rows named in the message, name the right `format` or `columns`, or allow bad rows by `maxInvalidFraction`.",
    FailureCode.DATA_EMPTY: "Give a source with at least one usable row; the report counts what was dropped and why.",
    FailureCode.LICENSE_FORBIDDEN: "Leave the source out, or, if its licence is another one, name it in the source's `license`.",
    FailureCode.MODEL_NOT_FOUND: "Check spec.model.uri: the folder needs config.json, tokenizer files and *.safetensors.",
    FailureCode.MODEL_UNSAFE: "Convert the weights to safetensors; pickled weights can run code and are never loaded.",
    FailureCode.MODEL_UNSUPPORTED: "Use a causal language model, or a T5 or BART, whose architecture transformers knows without code of the model's own.",
    FailureCode.ACCESS_DENIED: "Check the keys in the credentials Secret and what they may read.",
    FailureCode.CONFIG_INVALID: "Correct the named field and apply the job again.",
    FailureCode.OUT_OF_MEMORY: "Ask for more memory, or lower dataset.maxLength, hyperparameters.microBatchSize or method.lora.rank; tuner qlora needs least.",
    FailureCode.MEMORY_TOO_SMALL: "Change one of what the message names, or set resources.ignoreMemoryPlan to try all the same; the prepared data is kept.",
    FailureCode.LOSS_DIVERGED: "Lower hyperparameters.learningRate, raise warmupRatio, or look at the data report for odd rows.",
    FailureCode.QUALITY_TOO_LOW: "Read the evaluation report (status.evaluation.reportUri); tune on more or better data, for longer, or require less. The artefact is kept.",
    FailureCode.JUDGE_UNAVAILABLE: "Check that evaluation.judge.endpoint answers, and that pods of the namespace may reach it; or require no win_rate. The artefact is kept.",
    FailureCode.STALLED: "Look at the pod's log; a step did not end in the time that steps of this job took before.",
    FailureCode.DEADLINE_EXCEEDED: "Raise spec.activeDeadlineSeconds or give the job more resources; checkpoints are kept.",
    FailureCode.IMAGE_PULL_FAILED: "Check the image's name and the namespace's pull secrets.",
    FailureCode.STORAGE_UNAVAILABLE: "Object storage did not answer; the job goes on from its last checkpoint when applied anew.",
    FailureCode.STORAGE_NOT_FOUND: "Create the platform's bucket, or correct storage.bucket in the chart's values.",
    FailureCode.STORAGE_DAMAGED: "Files in storage are not those that were written there. Remove the folder that the message names, and apply the job again, so that prepared data is made anew; a model must be published anew.",
    FailureCode.NODE_LOST: "The node went away; the job goes on elsewhere from its last checkpoint.",
    FailureCode.PREEMPTED: "The pod had to leave its node; the job goes on from its last checkpoint.",
    FailureCode.KILLED: "The container was killed from outside; the job goes on from its last checkpoint.",
    FailureCode.PEER_LOST: "A pod that trains together with this one went away, or the network between them did; all go on together from the last checkpoint.",
    FailureCode.INTERNAL: "This is a fault of Tunewright; please report it with the pod's log.",
}

EXIT_CODES: Final[dict[FailureCode, ExitCode]] = {
    FailureCode.DATA_NOT_FOUND: ExitCode.MISSING,
    FailureCode.DATA_INVALID: ExitCode.DATA,
    FailureCode.DATA_EMPTY: ExitCode.DATA,
    FailureCode.LICENSE_FORBIDDEN: ExitCode.CONFIG,
    FailureCode.MODEL_NOT_FOUND: ExitCode.MISSING,
    FailureCode.MODEL_UNSAFE: ExitCode.MISSING,
    FailureCode.MODEL_UNSUPPORTED: ExitCode.CONFIG,
    FailureCode.ACCESS_DENIED: ExitCode.DENIED,
    FailureCode.CONFIG_INVALID: ExitCode.CONFIG,
    FailureCode.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    FailureCode.MEMORY_TOO_SMALL: ExitCode.CONFIG,
    FailureCode.LOSS_DIVERGED: ExitCode.DATA,
    FailureCode.QUALITY_TOO_LOW: ExitCode.QUALITY,
    FailureCode.JUDGE_UNAVAILABLE: ExitCode.UNAVAILABLE,
    FailureCode.STORAGE_UNAVAILABLE: ExitCode.UNAVAILABLE,
    FailureCode.STORAGE_NOT_FOUND: ExitCode.MISSING,
    FailureCode.STORAGE_DAMAGED: ExitCode.UNAVAILABLE,
    FailureCode.PEER_LOST: ExitCode.PEER_LOST,
    FailureCode.INTERNAL: ExitCode.INTERNAL,
}

FAILURE_CLASSES: Final[dict[FailureCode, FailureClass]] = {
    FailureCode.OUT_OF_MEMORY: FailureClass.OUT_OF_MEMORY,
    FailureCode.JUDGE_UNAVAILABLE: FailureClass.INFRASTRUCTURE,
    FailureCode.STALLED: FailureClass.INFRASTRUCTURE,
    FailureCode.IMAGE_PULL_FAILED: FailureClass.INFRASTRUCTURE,
    FailureCode.STORAGE_UNAVAILABLE: FailureClass.INFRASTRUCTURE,
    FailureCode.STORAGE_DAMAGED: FailureClass.INFRASTRUCTURE,  # it may have been on the way
    FailureCode.KILLED: FailureClass.INFRASTRUCTURE,
    FailureCode.PEER_LOST: FailureClass.INFRASTRUCTURE,
    FailureCode.INTERNAL: FailureClass.INFRASTRUCTURE,
    FailureCode.NODE_LOST: FailureClass.FREE,
    FailureCode.PREEMPTED: FailureClass.FREE,
}


def user_exit_codes() -> list[int]:
    """Exit codes that no retry would mend."""
    return sorted({int(EXIT_CODES[code]) for code in EXIT_CODES if failure_class(code) is FailureClass.USER})


def failure_class(code: FailureCode) -> FailureClass:
    """The budget that a failure draws from; whatever is not listed is the user's to mend."""
    return FAILURE_CLASSES.get(code, FailureClass.USER)


class Refusal(Exception):
    """Something that ends a verb with one clear message.

    ``param`` names the field, file or object that is to blame, as the user wrote it (``spec.dataset.sources[0].uri``).
    ``message`` says what is wrong there. Neither ever holds the content of a data row.
    """

    def __init__(self, code: FailureCode, message: str, *, param: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets it come back from another process."""
        return partial(type(self), self.code, self.message, param=self.param), ()

    @property
    def exit_code(self) -> ExitCode:
        """What the process ends with."""
        return EXIT_CODES[self.code]
