"""The types of single fields that several resources share: addresses, names, quantities, and numbers that may be ``auto``."""

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema

MAX_URI: Final = 1024
MAX_MESSAGE: Final = 1024  # characters of a message in a status: `kubectl describe` stays readable, etcd small
S3: Final = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\x00-\x1f]*"
VOLUME: Final = r"pvc://[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/[^\x00-\x1f]*"
# A revision is a branch, a tag or a commit (`/` in it as %2F), or one of the hub's own references. Without one the pattern holds, for a rule tells more.
_REPO: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REVISION: Final = r"(@(refs/(convert|pr)/[A-Za-z0-9._-]+|[A-Za-z0-9][A-Za-z0-9._%-]*))?"
HUB_MODEL: Final = rf"hf://{_REPO}{_REVISION}(/[^\x00-\x1f]*)?"
HUB_DATA: Final = rf"hf://datasets/{_REPO}{_REVISION}(/[^\x00-\x1f]*)?"
MODEL_PINNED: Final = r"^hf://[^@/]+/[^@/]+@"
# A TunedModel of the same namespace; the pattern lets more pass, for a rule tells what is wrong.
TUNED_MODEL: Final = "model://"
TUNED_MODEL_NAMED: Final = r"^model://[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(@[A-Za-z0-9][A-Za-z0-9._-]{0,62})?$"
NAME_MODEL: Final = "a tuned model is model://<TunedModel> or model://<TunedModel>@<version>, by its name, of this namespace only"
DATA_PINNED: Final = r"^hf://datasets/[^@/]+/[^@/]+@"
PIN_MODEL: Final = "a model of the hub is hf://org/name@revision; pin a commit, so that the same job means the same model"
PIN_DATA: Final = "data of the hub is hf://datasets/org/name@revision/path; pin a commit, so that the same job means the same data"
QUANTITY_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
DNS_LABEL: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
DNS_NAME: Final = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"


class Part(BaseModel):
    """A closed object: a field that it does not name is refused by name."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, use_enum_values=False, validate_default=True)


class Rules(dict[str, Any]):
    """``json_schema_extra`` with CEL rules: pairs of (rule, message)."""

    def __init__(self, *rules: tuple[str, str]) -> None:
        super().__init__({"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]})


def cel_list(values: Iterable[str | bool]) -> str:
    """A list of texts in CEL."""
    return f"[{', '.join(repr(str(value)) for value in values)}]"


def untouched(model: type[BaseModel], *, but: str = "", only: str = "", at: str = "self") -> list[str]:
    """CEL terms that hold while every field but one, or only one, has its default."""
    terms = []
    for name, field in model.model_fields.items():
        if only not in ("", name):
            continue
        place, default = f"{at}.{field.alias or name}", field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            terms += untouched(type(default), at=place)
        elif default is None:
            terms.append(f"!has({place})")
        elif isinstance(default, (list, dict)):
            terms.append(f"{place}.size() == 0")
        elif name != but:
            terms.append(f"{place} == {json.dumps(default)}".replace('"', "'"))
    return terms


def _of_model(uri: str, info: ValidationInfo) -> str:
    if uri.startswith(TUNED_MODEL):
        if not re.fullmatch(TUNED_MODEL_NAMED, uri):
            raise ValueError(NAME_MODEL)
        return uri
    return _of_hub(uri, MODEL_PINNED, HUB_MODEL, PIN_MODEL) if uri.startswith("hf://") else _remote_unless_local(uri, info)


def _of_data(uri: str, info: ValidationInfo) -> str:
    return _of_hub(uri, DATA_PINNED, HUB_DATA, PIN_DATA) if uri.startswith("hf://") else _remote_unless_local(uri, info)


def _of_hub(uri: str, pinned: str, pattern: str, advice: str) -> str:
    if re.match(pinned, uri) and re.fullmatch(pattern, uri) and uri.startswith("hf://datasets/") == pinned.startswith("^hf://datasets/"):
        return uri
    raise ValueError(advice)


def _remote_unless_local(uri: str, info: ValidationInfo) -> str:
    """On a cluster an address is ``s3://``, ``hf://`` or ``pvc://``; ``tunewright-trainer run`` on one machine also takes paths."""
    if (info.context or {}).get("local") or re.fullmatch(f"{S3}|{VOLUME}", uri):
        return uri
    raise ValueError(
        "must be s3://bucket/key, hf://... or pvc://claim/path (a model also model://<TunedModel>); paths of this machine work with `tunewright-trainer run` only"
    )


def _address(hub: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_URI, "pattern": f"^({S3}|{VOLUME}|{hub})$"})


_MULTIPLES: Final = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number: ``500m`` is 0.5, ``2Gi`` is 2147483648."""
    digits = quantity.rstrip("mkMGTi")
    return float(digits) * _MULTIPLES[quantity[len(digits) :]]


def claim_of(uri: str) -> str:
    """The PersistentVolumeClaim that an address names; empty where it names none."""
    return uri.removeprefix("pvc://").partition("/")[0] if uri.startswith("pvc://") else ""


def _of_judge(uri: str, info: ValidationInfo) -> str:
    if uri.startswith("pvc://"):
        raise ValueError("a reward model is s3://bucket/path/, hf://org/name@revision or model://<TunedModel>")
    return _of_model(uri, info) if uri else uri


def _of_task(uri: str, info: ValidationInfo) -> str:
    if uri.startswith(("pvc://", "hf://")):
        raise ValueError("the folder of a task is s3://bucket/path/")
    return _remote_unless_local(uri, info)


TaskUri = Annotated[
    str,
    AfterValidator(_of_task),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_URI, "pattern": f"^{S3}$"}),
]
RewardModelUri = Annotated[
    str,
    AfterValidator(_of_judge),
    WithJsonSchema({"type": "string", "maxLength": MAX_URI, "pattern": f"^$|^({S3}|{HUB_MODEL})$|{TUNED_MODEL_NAMED}"}),
]
ModelUri = Annotated[str, AfterValidator(_of_model), _address(rf"{HUB_MODEL}|{TUNED_MODEL}[^\x00-\x1f]*")]
DataUri = Annotated[str, AfterValidator(_of_data), _address(HUB_DATA)]
Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN, max_length=32)]
SecretName = Annotated[str, Field(pattern=r"^$|" + DNS_NAME, max_length=253)]


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("must be `auto` or a whole number of at least 1")


def _auto_or_rate(value: Any) -> Any:
    if value == "auto" or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1):
        return value
    raise ValueError("must be `auto` or a number above 0 and at most 1")


# "auto" in words and a number otherwise. A structural schema has no such type: `int-or-string` is the nearest for whole numbers, and for others the
# type is left open while the bounds (which bind numbers only) and the pattern (which binds strings only) hold, as the API server enforces both.
AutoCount = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_count),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "minimum": 1, "maximum": 1_000_000, "pattern": "^auto$"}),
]
AutoRate = Annotated[
    float | Literal["auto"],
    BeforeValidator(_auto_or_rate),
    WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True, "x-untyped": True}),
]
