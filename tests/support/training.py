"""Prepared data and jobs for tests of training: small, made by script, the same every time."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from tests.support.models import tiny_model
from tunewright_crds.job import read_spec
from tunewright_crds.pod import JobIdentity, Outcome, PodConfig, StorageSettings
from tunewright_crds.storage import dataset_key
from tunewright_trainer.storage import Store, publish_folder

if TYPE_CHECKING:
    import pytest

NAMESPACE: Final = "team-a"
UID: Final = "0f0e0d0c-0000-0000-0000-000000000001"
DIGEST: Final = "d" * 64
IGNORED: Final = -100

Document = tuple[list[int], list[int]]  # token ids, labels
Row = Sequence[Document]


def documents(count: int, *, seed: int = 0, longest: int = 40) -> list[Document]:
    """Random documents of byte tokens; the first half of each is prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(0, 200, size=int(rng.integers(8, longest))).tolist()
        half = len(ids) // 2
        made.append((ids, [IGNORED] * half + ids[half:]))
    return made


def packed(rows: Sequence[Document], each: int) -> list[Row]:
    """Documents in rows of ``each``."""
    return [rows[start : start + each] for start in range(0, len(rows), each)]


def pairs(count: int, *, seed: int = 0) -> list[Row]:
    """Random pairs of byte tokens: a prompt with a chosen answer, and the same prompt with a rejected one, as a row each. Chosen answers are of small
    tokens, rejected ones of large tokens, which is what there is to learn."""
    rng = np.random.default_rng(seed)
    made: list[Row] = []
    for _ in range(count):
        prompt = rng.integers(0, 200, size=int(rng.integers(4, 20))).tolist()
        answers = [rng.integers(low, low + 100, size=int(rng.integers(3, 12))).tolist() for low in (0, 100)]
        made.append([(prompt + answer, [IGNORED] * len(prompt) + answer) for answer in answers])
    return made


def marked(count: int, *, seed: int = 0) -> list[Row]:
    """The answers of `pairs`, a row each: of a pair of a good and a bad answer only one is there."""
    nothing: Document = ([], [])
    return [row for chosen, rejected in pairs(count, seed=seed) for row in ([chosen, nothing], [nothing, rejected])]


def write_rows(folder: Path, rows: Sequence[Row], *, instructions: Sequence[list[int]] = ()) -> None:
    """One Arrow file as `prepare` writes it; for a hypernetwork with the instruction of each row."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = pa.list_(pa.int32())
    table = pa.table(
        {
            "input_ids": pa.array([[token for ids, _ in row for token in ids] for row in rows], numbers),
            "labels": pa.array([[label for _, labels in row for label in labels] for row in rows], numbers),
            "lengths": pa.array([[len(ids) for ids, _ in row] for row in rows], numbers),
        }
    )
    if instructions:
        table = table.append_column("instruction", pa.array(instructions, numbers))
    with pa.OSFile(str(folder / "data-00000.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def publish_data(
    store: Store,
    work: Path,
    *,
    train: Sequence[Row],
    validation: Sequence[Row] = (),
    digest: str = DIGEST,
    instructions: tuple[Sequence[list[int]], Sequence[list[int]]] = ((), ()),
) -> None:
    """Put prepared data where `train` looks for it; ``instructions`` are those of the rows to train and to validate with."""
    folder = work / "prepared"
    shutil.rmtree(folder, ignore_errors=True)
    write_rows(folder / "train", train, instructions=instructions[0])
    if validation:
        write_rows(folder / "validation", validation, instructions=instructions[1])
    publish_folder(store, folder, dataset_key(NAMESPACE, digest), manifest={"licenses": ["cc0"]})
    shutil.rmtree(folder)


def a_job(model: Path | str | None = None, *, storage: StorageSettings | None = None, **parts: Any) -> PodConfig:
    """A job on one thread. ``parts`` are parts of the spec, such as ``hyperparameters={"batchSize": 2}``."""
    spec: dict[str, Any] = {
        "model": {"uri": str(model or tiny_model("llama"))},
        "dataset": {"sources": [{"uri": "/never/read"}]},
        "resources": {"cpu": "1"},
    }
    for name, part in parts.items():
        spec[name] = {**spec.get(name, {}), **part}
    return PodConfig.model_construct(
        job=JobIdentity(namespace=NAMESPACE, name="tune", uid=UID),
        spec=read_spec(spec, local=True),
        storage=storage or StorageSettings(bucket="local"),
        version="20260101-0f0e0d0c",
        progress_url="",
    )


def history(store: Store, attempt: int = 1) -> list[dict[str, Any]]:
    """The metrics of an attempt, line by line."""
    text = store.get_bytes(f"{NAMESPACE}/jobs/{UID}/metrics/train-{attempt}.jsonl").decode()
    return [json.loads(line) for line in text.splitlines()]


def weights_digest(outcome: Outcome) -> str:
    """Hash of the published weights."""
    assert outcome.artifact is not None
    (weights,) = Path(outcome.artifact.uri).glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def stop_in_step(patch: "pytest.MonkeyPatch", step: int) -> None:
    """Ask for a stop while ``step`` is computed, as SIGTERM does."""
    from tunewright_trainer import process
    from tunewright_trainer.train import recipe

    event = threading.Event()
    patch.setattr(process, "stop_requested", event)
    patch.setattr(recipe, "stop_requested", event)
    plain = recipe.Run.step

    def stopping(run: recipe.Run) -> None:
        if run.counters.step + 1 == step:
            event.set()
        plain(run)

    patch.setattr(recipe.Run, "step", stopping)


def poison(patch: Callable[[Any, str, Any], None], steps: Sequence[int]) -> None:
    """Have the loss and every gradient of these steps be no numbers."""
    from tunewright_trainer.train import recipe

    plain = recipe.Run._update

    class Poisoned:
        def __init__(self, loss: Any) -> None:
            self.size = loss.size
            self._loss = loss

        def backward(self, tuned: Any, batch: Any, *, share_of: Any) -> dict[str, float]:
            found = self._loss.backward(tuned, batch, share_of=share_of)
            for weight in tuned.trainable.values():
                if weight.grad is not None:
                    weight.grad *= float("nan")
            return {**found, "loss": float("nan")}

    def poisoned(run: recipe.Run, batch: Any, loss: Any) -> Any:
        return plain(run, batch, Poisoned(loss) if run.counters.step + 1 in steps else loss)

    patch(recipe.Run, "_update", poisoned)


def train_here(config: PodConfig, store: Store, work: Path, *, attempt: int = 1, halvings: int = 0) -> Outcome:
    """One attempt in this process, with an empty scratch folder as a new pod has it."""
    from tunewright_trainer import train

    scratch = work / f"scratch-{attempt}-{halvings}"
    shutil.rmtree(scratch, ignore_errors=True)
    return train.run(config, attempt=attempt, dataset_digest=DIGEST, halvings=halvings, work=scratch, store=store)
