"""The config of a verb: from the ConfigMap in a pod, from the user's own manifest on one machine."""

import hashlib
from pathlib import Path
from typing import Any, Final

import orjson
import pydantic
import yaml

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import InstructionTuningJob, JobSpec, read_spec
from tunewright_crds.names import API_VERSION
from tunewright_crds.pod import JobIdentity, PodConfig, StorageSettings
from tunewright_crds.references import references

MAX_MANIFEST_BYTES: Final = 2**20  # etcd keeps no more of one object
LOCAL: Final = "local"  # namespace and bucket of a run without a cluster
_TOLD_ERRORS: Final = 5


def load_pod_config(path: str | Path) -> PodConfig:
    """The config that the operator mounted; `ConfigInvalid` where it cannot be read."""
    data = _read(Path(path))
    try:
        return PodConfig.model_validate(orjson.loads(data))
    except orjson.JSONDecodeError as error:
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path} is not JSON: {error.msg} at line {error.lineno}", param=str(path)) from error
    except pydantic.ValidationError as error:
        raise config_refusal(error) from error


def load_manifest(path: str | Path) -> PodConfig:
    """The config of a run on this machine, from the manifest that a cluster would be given.

    The job's uid is a hash of its name and spec: the same manifest goes on from its checkpoints, a changed one begins anew.
    Raises `ConfigInvalid` that names the field.
    """
    document = _one_document(Path(path))
    _check_kind(document, str(path))
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path} has no metadata.name", param="metadata.name")
    unknown = sorted(set(document) - {"apiVersion", "kind", "metadata", "spec", "status"})
    if unknown:
        raise Refusal(FailureCode.CONFIG_INVALID, f"unknown field {unknown[0]}", param=str(unknown[0]))
    spec = _spec(document.get("spec"))
    if spec.dataset.ref:
        text = f"{spec.dataset.ref} is an InstructionDataset of a cluster; on this machine, name the sources themselves"
        raise Refusal(FailureCode.CONFIG_INVALID, text, param="spec.dataset.ref")
    for named in references(document["spec"]):
        text = f"{named.name} is a TunedModel of a cluster; on this machine, name the folder of the model, such as OUTPUT/{LOCAL}/models/{named.name}/<version>/merged"
        raise Refusal(FailureCode.CONFIG_INVALID, text, param=named.field.name)
    uid = hashlib.sha256(f"{name}\n{spec.model_dump_json(by_alias=True)}".encode()).hexdigest()[:32]
    # The addresses have been checked: paths of this machine are allowed here, and validating them again would refuse them.
    return PodConfig.model_construct(
        job=JobIdentity(namespace=LOCAL, name=name, uid=uid),
        spec=spec,
        storage=StorageSettings(bucket=LOCAL),
        version=f"{LOCAL}-{uid[:8]}",
        progress_url="",
    )


def is_local(config: PodConfig) -> bool:
    """Whether the run has no cluster: what the job asks for of memory then bounds nothing."""
    return config.job.namespace == LOCAL and config.storage.bucket == LOCAL


def config_refusal(error: pydantic.ValidationError, *, root: str = "") -> Refusal:
    """The refusal of a config with errors; the first one is the `param`, more of them are in the message."""
    told = [(_field(problem["loc"], root), _problem(problem)) for problem in error.errors(include_url=False)]
    message = "; ".join(f"{field}: {text}" for field, text in told[:_TOLD_ERRORS])
    more = len(told) - _TOLD_ERRORS
    return Refusal(FailureCode.CONFIG_INVALID, message + (f"; and {more} more" if more > 0 else ""), param=told[0][0])


def _spec(value: Any) -> JobSpec:
    try:
        return read_spec(value if value is not None else {}, local=True)
    except pydantic.ValidationError as error:
        raise config_refusal(error, root="spec") from error


def _field(location: tuple[int | str, ...], root: str) -> str:
    """`("dataset", "sources", 0, "uri")` as `spec.dataset.sources[0].uri`."""
    text = root
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _problem(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "unknown field"
    return str(problem["msg"]).removeprefix("Value error, ")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}", param=str(path)) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path} is larger than {MAX_MANIFEST_BYTES} bytes", param=str(path))
    return data


def _one_document(path: Path) -> dict[str, Any]:
    try:
        documents = [found for found in yaml.safe_load_all(_read(path)) if found is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it cannot be parsed"
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path} is not YAML: {what}{where}", param=str(path)) from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        found = f"{len(documents)} documents" if len(documents) != 1 else "no object"
        raise Refusal(FailureCode.CONFIG_INVALID, f"{path} must hold exactly one {_KIND}; it holds {found}", param=str(path))
    return documents[0]


_KIND: Final = InstructionTuningJob.__name__


def _check_kind(document: dict[str, Any], path: str) -> None:
    for field, wanted in (("apiVersion", API_VERSION), ("kind", _KIND)):
        if document.get(field) != wanted:
            raise Refusal(FailureCode.CONFIG_INVALID, f"{path} has {field} {document.get(field)!r}; it must be {wanted}", param=field)
