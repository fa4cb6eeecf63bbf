"""The generated definitions: equal to what is committed, structural, described and bounded throughout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunewright_crds.definitions import definitions, to_yaml

CRDS = Path(__file__).parents[3] / "crds"
BOUNDS = {
    "string": {"maxLength", "enum", "format", "pattern"},
    "array": {"maxItems"},
    "integer": {"minimum"},
    "object": {"properties", "maxProperties"},
}


def fields(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field below ``node`` with its path."""
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from fields(child, f"{path}.{name}")
    if isinstance(node.get("items"), dict):
        yield from fields(node["items"], f"{path}[]")


def spec_of(definition: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


@pytest.mark.parametrize("name", definitions())
def test_what_is_committed_is_what_the_models_say(name: str) -> None:
    assert (CRDS / name).read_text(encoding="utf-8") == to_yaml(definitions()[name]), "run `make crds`"


@pytest.mark.parametrize("name", definitions())
def test_the_yaml_reads_back_as_what_was_written(name: str) -> None:
    assert yaml.safe_load(to_yaml(definitions()[name])) == definitions()[name]


@pytest.mark.parametrize("definition", definitions().values(), ids=definitions())
def test_every_field_of_the_spec_teaches_and_is_bounded(definition: dict[str, Any]) -> None:
    for path, field in fields(spec_of(definition)):
        assert field.get("description"), f"{path} has no description"
        kind = field.get("type")
        assert kind or field.get("x-kubernetes-int-or-string") or field.get("x-kubernetes-preserve-unknown-fields"), f"{path} has no type"
        if kind in BOUNDS:
            assert BOUNDS[kind] & set(field), f"{path} has no bound"


def test_objects_that_may_be_left_out_default_to_their_defaults() -> None:
    spec = spec_of(definitions()["instructiontuningjobs.yaml"])
    optional = [path for path, field in fields(spec) if field.get("type") == "object" and path not in (".model", ".dataset")]
    assert optional
    assert [path for path, field in fields(spec) if path in optional and field.get("default") != {}] == []
