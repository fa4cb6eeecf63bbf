"""Data sets and jobs for tests of `prepare`, and what came of them as people read it."""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard

from tests.support.models import tiny_model
from tunewright_crds.job import read_spec
from tunewright_crds.pod import JobIdentity, Outcome, PodConfig, StorageSettings
from tunewright_trainer import prepare
from tunewright_trainer.prepare.encode import IGNORED
from tunewright_trainer.storage import LocalStore, Store

NAMESPACE = "team-a"


def a_data_job(*sources: Path | str | dict[str, Any], base: Path | None = None, **parts: Any) -> PodConfig:
    """A job over sources, each a path or a whole source. ``parts`` are parts of the spec, such as ``dataset={"packing": False}``.

    Nothing is split off, and the tokens are bytes and the markers of ChatML, unless ``parts`` and ``base`` say otherwise.
    """
    spec: dict[str, Any] = {
        "model": {"uri": str(base or tiny_model("llama", chat_template=True))},
        "dataset": {
            "sources": [source if isinstance(source, dict) else {"uri": str(source)} for source in sources],
            "maxLength": 512,
            "packing": False,
            "validationFraction": 0,
        },
    }
    for name, part in parts.items():
        spec[name] = {**spec.get(name, {}), **part}
    return PodConfig.model_construct(
        job=JobIdentity(namespace=NAMESPACE, name="tune", uid="0f0e0d0c-0000-0000-0000-000000000001"),
        spec=read_spec(spec, local=True),
        storage=StorageSettings(bucket="local"),
        version="1",
        progress_url="",
    )


def prepare_here(config: PodConfig, work: Path, *, store: Store | None = None) -> Outcome:
    """Prepare in this process, into the folder ``out`` of ``work`` unless a store is given."""
    return (
        prepare.run(config, work=work / "work", store=store) if store else prepare.run(config, work=work / "work", store=out(work), key="")
    )


def out(work: Path) -> LocalStore:
    """Where `prepare_here` writes to."""
    return LocalStore(work / "out")


def report(work: Path) -> dict[str, Any]:
    """The data report of `prepare_here`."""
    found: dict[str, Any] = json.loads(out(work).get_bytes("report.json"))
    return found


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON lines, compressed as the name says."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        data = zstandard.ZstdCompressor().compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@dataclass(frozen=True, order=True)
class Told:
    """An example as text, and the parts of it that are learned."""

    text: str
    learned: tuple[str, ...]


def examples(work: Path, split: str = "train", *, model: Path | None = None) -> list[Told]:
    """The prepared examples of a split, out of their packed rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model or tiny_model("llama", chat_template=True))
    found = []
    for row in rows(work, split):
        start = 0
        for length in row.get("lengths") or [len(row["input_ids"])]:
            ids, labels = row["input_ids"][start : start + length], row["labels"][start : start + length]
            found.append(Told(tokenizer.decode(ids), tuple(tokenizer.decode(part) for part in _learned(ids, labels))))
            start += length
    return found


def rows(work: Path, split: str = "train") -> list[dict[str, Any]]:
    """The prepared rows of a split."""
    files = sorted((work / "out" / split).glob("*.arrow"))
    return [row for file in files for row in pa.ipc.open_stream(file.read_bytes()).read_all().to_pylist()]


def _learned(ids: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    """Runs of tokens with labels; each label must be its own token."""
    parts: list[list[int]] = []
    before = IGNORED
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORED:
            assert label == token
            if before == IGNORED:
                parts.append([])
            parts[-1].append(token)
        before = label
    return parts
