"""CustomResourceDefinitions from the typed models: ``python -m tunewright_crds.definitions FOLDER`` writes the YAML.

Kubernetes wants a *structural* schema: no references, one type a field, ``nullable`` instead of unions with null.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import WithDefaultSchema

from tunewright_crds import names
from tunewright_crds.instruction_dataset import InstructionDataset
from tunewright_crds.job import InstructionTuningJob
from tunewright_crds.tuned_model import TunedModel

_DROPPED = {
    "title",
    "additionalProperties",
    "$defs",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "const",
    "anyOf",
    "allOf",
    "$ref",
    "x-untyped",
    "propertyNames",
}
_LINE_BREAK = re.compile(r"(?<!\n)\n(?!\n)")  # within a paragraph; whoever shows the text wraps it anew
_RATE_BOUNDS = {"minimum": 0, "exclusiveMinimum": True, "maximum": 1, "pattern": "^auto$"}


class _WithFactories(GenerateJsonSchema):
    """Also tells defaults that a factory makes: an object that may be left out defaults to ``{}``, which lets the server fill in its fields."""

    def get_default_value(self, schema: WithDefaultSchema) -> Any:
        factory: Any = schema.get("default_factory")
        if factory is None:
            return super().get_default_value(schema)
        value = factory()
        return {} if isinstance(value, BaseModel) else value


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """The structural schema of a resource. The status gets no defaults: what nobody wrote there is not known."""
    plain = model.model_json_schema(by_alias=True, schema_generator=_WithFactories)
    whole = _structural(plain, plain.get("$defs", {}))
    whole["properties"]["status"] = _without_defaults(whole["properties"]["status"])
    return whole


def _without_defaults(node: dict[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in node.items() if key not in ("default", "nullable")}
    if "properties" in out:
        out["properties"] = {name: _without_defaults(child) for name, child in out["properties"].items()}
    if "items" in out:
        out["items"] = _without_defaults(out["items"])
    return out


def _structural(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    node = _resolved(node, defs)
    out = {key: value for key, value in node.items() if key not in _DROPPED}
    if "description" in out:
        out["description"] = _LINE_BREAK.sub(" ", out["description"])
    if "const" in node:
        out |= {"type": "string", "enum": [node["const"]]}
    for bound, name in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in node:
            out |= {name: node[bound], bound: True}
    if node.get("x-untyped"):
        out |= _RATE_BOUNDS
    if "properties" in node:
        out["properties"] = {name: _structural(child, defs) for name, child in node["properties"].items()}
    if "items" in node:
        out["items"] = _structural(node["items"], defs)
    values = node.get("additionalProperties")
    if isinstance(values, dict):
        out["additionalProperties"] = _structural(values, defs)
        out.pop("properties", None)
    if node.get("format") == "date-time":
        out = {"type": "string", "format": "date-time"} | {k: v for k, v in out.items() if k in ("description", "nullable")}
    if out.get("default", ...) is None:
        del out["default"]
    if out.get("default") not in (None, "", [], {}) and "description" in out:
        # `kubectl explain` shows no defaults of its own accord.
        out["description"] = f"{out['description']} Default: {json.dumps(out['default']).strip(chr(34))}."
    return out


def _resolved(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """The node with its reference followed and its union with null taken apart; what stands beside a reference wins."""
    if "$ref" in node:
        target = _resolved(defs[node["$ref"].rsplit("/", 1)[-1]], defs)
        return target | {key: value for key, value in node.items() if key != "$ref"}
    choices = node.get("anyOf", [])
    real = [choice for choice in choices if choice.get("type") != "null"]
    if len(real) == 1 and len(choices) == 2:
        return _resolved(real[0], defs) | {key: value for key, value in node.items() if key != "anyOf"} | {"nullable": True}
    return node


def _column(name: str, path: str, *, kind: str = "string", wide: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path} | ({"priority": 1} if wide else {})


def _definition(model: type[BaseModel], *, plural: str, singular: str, short: list[str], columns: list[dict[str, Any]]) -> dict[str, Any]:
    body = schema(model)
    body["properties"] = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}} | body["properties"]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "plural": plural,
                "singular": singular,
                "kind": model.__name__,
                "listKind": f"{model.__name__}List",
                "shortNames": short,
                "categories": ["tunewright"],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": body},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                }
            ],
        },
    }


def definitions() -> dict[str, dict[str, Any]]:
    """Every CustomResourceDefinition by the name of its file."""
    job = _definition(
        InstructionTuningJob,
        plural=names.JOBS,
        singular="instructiontuningjob",
        short=["itj", "tuningjob"],
        columns=[
            _column("Phase", ".status.phase"),
            _column("Step", ".status.progress.step", kind="integer"),
            _column("Of", ".status.progress.maxSteps", kind="integer"),
            _column("Loss", ".status.progress.loss"),
            _column("ETA", ".status.progress.remaining"),
            _column("Model", ".status.model.name"),
            _column("Age", ".metadata.creationTimestamp", kind="date"),
            _column("Tokens/s", ".status.progress.tokensPerSecond", kind="number", wide=True),
            _column("Attempt", ".status.attempts[-1:].number", kind="integer", wide=True),
            _column("Error", ".status.error.code", wide=True),
            _column("Report", ".status.dataset.reportUri", wide=True),
        ],
    )
    model = _definition(
        TunedModel,
        plural=names.MODELS,
        singular="tunedmodel",
        short=["tm"],
        columns=[
            _column("Kind", ".spec.kind"),
            _column("Version", ".spec.version"),
            _column("Ready", '.status.conditions[?(@.type=="Ready")].status'),
            _column("Job", ".spec.source.job"),
            _column("Age", ".metadata.creationTimestamp", kind="date"),
            _column("Artifact", ".spec.artifact.uri", wide=True),
        ],
    )
    dataset = _definition(
        InstructionDataset,
        plural=names.DATASETS,
        singular="instructiondataset",
        short=["ids"],
        columns=[
            _column("Phase", ".status.phase"),
            _column("Train", ".status.dataset.trainExamples", kind="integer"),
            _column("Tokens", ".status.dataset.tokens", kind="integer"),
            _column("Rejected", ".status.dataset.rejected", kind="integer"),
            _column("Users", ".status.users", kind="integer"),
            _column("Age", ".metadata.creationTimestamp", kind="date"),
            _column("Error", ".status.error.code", wide=True),
            _column("Digest", ".status.dataset.digest", wide=True),
            _column("Report", ".status.dataset.reportUri", wide=True),
        ],
    )
    return {f"{names.JOBS}.yaml": job, f"{names.DATASETS}.yaml": dataset, f"{names.MODELS}.yaml": model}


def to_yaml(definition: dict[str, Any]) -> str:
    """YAML in its JSON subset's block style, without a YAML library: the contract depends on pydantic alone."""
    return "# Generated from crds/tunewright_crds by `make crds`; do not edit.\n" + "\n".join(_lines(definition, 0)) + "\n"


def _lines(value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(value, dict) and value:
        out = []
        for key, child in value.items():
            name = key if key.replace("-", "").isalnum() else json.dumps(key)
            if isinstance(child, (dict, list)) and child:
                out += [f"{pad}{name}:", *_lines(child, depth + 1)]
            else:
                out.append(f"{pad}{name}: {json.dumps(child, ensure_ascii=False)}")
        return out
    out = []
    for child in value:
        inner = (
            _lines(child, depth + 1) if isinstance(child, (dict, list)) and child else [f"{pad}  {json.dumps(child, ensure_ascii=False)}"]
        )
        out += [f"{pad}- {inner[0].lstrip()}", *inner[1:]]
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    for name, definition in definitions().items():
        (folder / name).write_text(to_yaml(definition), encoding="utf-8")


if __name__ == "__main__":
    main()
