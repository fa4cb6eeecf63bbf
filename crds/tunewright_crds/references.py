"""The tuned models that a spec names as ``model://<TunedModel>[@version]``: in which fields, of which kind, and how an address takes a name's place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tunewright_crds.fields import TUNED_MODEL, Part
from tunewright_crds.tuned_model import Kind

P = TypeVar("P", bound=Part)


@dataclass(frozen=True, slots=True)
class ModelField:
    """A field that may name a TunedModel. ``path``: in a manifest, below spec. ``kinds``: what it takes, the best first."""

    path: tuple[str, ...]
    kinds: tuple[Kind, ...]

    @property
    def name(self) -> str:
        """As people write it: ``spec.model.uri``."""
        return ".".join(("spec", *self.path))


MODEL_FIELDS: Final = (
    ModelField(("model", "uri"), (Kind.FULL, Kind.MERGED)),
    ModelField(("method", "rewardModel"), (Kind.REWARD,)),
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A TunedModel that a field names. Without a version (empty) it is whatever is there."""

    field: ModelField
    name: str
    version: str


def references(spec: Mapping[str, Any]) -> list[Reference]:
    """The TunedModels that a spec names. It is taken as it was applied, and may be anything."""
    found = []
    for field in MODEL_FIELDS:
        uri = _at(spec, field.path)
        if isinstance(uri, str) and uri.startswith(TUNED_MODEL):
            name, _, version = uri.removeprefix(TUNED_MODEL).partition("@")
            found.append(Reference(field, name, version))
    return found


def with_addresses(spec: P, addresses: Mapping[str, str]) -> P:
    """The spec with addresses of storage instead of names; ``addresses``: by the field's name (``spec.model.uri``)."""
    for field in MODEL_FIELDS:
        if field.name in addresses:
            spec = _with(spec, field.path, addresses[field.name])
    return spec


def _at(value: Any, path: Sequence[str]) -> Any:
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _with(part: P, path: Sequence[str], value: str) -> P:
    head, *rest = path
    attribute = next(name for name, field in type(part).model_fields.items() if head in (name, field.alias))
    return part.model_copy(update={attribute: _with(getattr(part, attribute), rest, value) if rest else value})
