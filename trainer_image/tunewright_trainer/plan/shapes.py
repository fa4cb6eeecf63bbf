"""The shapes of a base model's weights, from the headers of its safetensors files: exact, and without downloading the weights.

A file begins with the length of its header (8 bytes, little endian), then the header: JSON with the name, type, shape and place of each tensor
(https://huggingface.co/docs/safetensors). Whoever reads it finds out, before a GPU is asked for, that a file is cut off or is none.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.storage import ObjectInfo, Place

PARAM: Final = "spec.model.uri"
MAX_HEADER: Final = 100_000_000  # the format's own bound
_LENGTH_BYTES: Final = 8
_FIRST_READ: Final = 2**18  # holds the header of nearly every file, so that one request is enough
_SUFFIX: Final = ".safetensors"
_SHARD: Final = re.compile(r"^model-\d+-of-\d+\.safetensors$")
# Bytes of an element; types of less than a byte are no part of what is trained.
ELEMENT_BYTES: Final = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Weight:
    """One tensor of a model's files."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_shapes(place: Place) -> tuple[Weight, ...]:
    """Every weight of the model in a folder. Raises `ModelNotFound` naming a file that is cut off, or is no safetensors file."""
    return tuple(weight for info in _files(place) for weight in _read(place, info))


def parse_config(data: bytes) -> dict[str, Any]:
    """config.json as an object. Raises `ModelUnsupported`."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(FailureCode.MODEL_UNSUPPORTED, "config.json is not JSON", param=PARAM) from error
    if not isinstance(config, dict):
        raise Refusal(FailureCode.MODEL_UNSUPPORTED, "config.json is no object", param=PARAM)
    return config


def _files(place: Place) -> Sequence[ObjectInfo]:
    """The files that transformers loads: `model.safetensors`, else its shards, else all. Some repositories hold the weights in another layout too."""
    top = place.key.rstrip("/")
    names = {info.key.removeprefix(f"{top}/" if top else ""): info for info in place.files()}
    found = {name: info for name, info in names.items() if "/" not in name and name.endswith(_SUFFIX)}
    if "model.safetensors" in found:
        return [found["model.safetensors"]]
    shards = [info for name, info in found.items() if _SHARD.match(name)]
    return shards or list(found.values())


def _read(place: Place, info: ObjectInfo) -> list[Weight]:
    uri = place.store.uri(info.key)
    start = place.store.read_start(info.key, min(info.size, _FIRST_READ))
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) < _LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER, info.size - _LENGTH_BYTES):
        raise _corrupt(uri, "its header is missing or cut off")
    if len(start) < _LENGTH_BYTES + length:
        start = place.store.read_start(info.key, _LENGTH_BYTES + length)
    try:
        header = orjson.loads(start[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except orjson.JSONDecodeError as error:
        raise _corrupt(uri, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _corrupt(uri, "its header is no object")
    header.pop("__metadata__", None)
    return _weights(uri, header, data_bytes=info.size - _LENGTH_BYTES - length)


def _weights(uri: str, header: dict[str, Any], *, data_bytes: int) -> list[Weight]:
    """The weights that a header names; together they must be as long as the file."""
    found, end = [], 0
    for name, told in header.items():
        try:
            weight = Weight(name, str(told["dtype"]), tuple(int(size) for size in told["shape"]))
            start, stop = (int(offset) for offset in told["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise _corrupt(uri, f"its header does not describe {name[:128]}") from error
        size = ELEMENT_BYTES.get(weight.dtype)
        if min(weight.shape, default=0) < 0 or start < 0 or stop < start or (size and stop - start != weight.elements * size):
            raise _corrupt(uri, f"its header gives {name[:128]} a place that does not fit its shape")
        found.append(weight)
        end = max(end, stop)
    if end != data_bytes:
        raise _corrupt(uri, f"it holds {data_bytes:,} bytes of weights, and its header names {end:,}")
    return found


def _corrupt(uri: str, what: str) -> Refusal:
    return Refusal(FailureCode.MODEL_NOT_FOUND, f"{uri} is corrupt: {what}; upload it again", param=PARAM)
