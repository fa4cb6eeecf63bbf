"""Conditions of a status: one of each type, and a transition time that moves only when the status does."""

from datetime import datetime
from typing import Literal

from tunewright_crds.pod import clean
from tunewright_crds.status import ConditionStatus

Truth = Literal["True", "False", "Unknown"]


def condition(conditions: list[ConditionStatus], type_: str) -> ConditionStatus | None:
    """The condition of a type, if there is one."""
    return next((entry for entry in conditions if entry.type == type_), None)


def holds(conditions: list[ConditionStatus], type_: str) -> bool:
    """Whether the condition of a type is there and True."""
    found = condition(conditions, type_)
    return found is not None and found.status == "True"


def set_condition(
    conditions: list[ConditionStatus], type_: str, status: Truth, *, reason: str, message: str = "", generation: int, now: datetime
) -> None:
    """Writes one condition in place."""
    before = condition(conditions, type_)
    since = before.last_transition_time if before and before.status == status else now
    after = ConditionStatus(
        type=str(type_),
        status=status,
        reason=str(reason),
        message=clean(message),
        observed_generation=generation,
        last_transition_time=since,
    )
    if before is None:
        conditions.append(after)
    else:
        conditions[conditions.index(before)] = after
