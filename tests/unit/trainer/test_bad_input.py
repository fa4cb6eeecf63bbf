"""What nobody can train with: one clear error each, that names what is to blame, with its exit code and termination message.

Each case is a whole `tunewright-trainer run`, in this process. More of them: preparing's in `prepare/test_preparing_mistakes.py`, options of tuners in
`train/test_training_tuners.py`.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.support.models import tiny_model
from tests.support.rows import alpaca_rows
from tests.support.training import a_job, documents, packed, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.errors import ADVICE, FailureCode, Refusal
from tunewright_crds.pod import Outcome
from tunewright_trainer import cli, process, train
from tunewright_trainer.storage import LocalStore, publish_folder
from tunewright_trainer.storage.folders import check_files
from tunewright_trainer.train import checkpoints

Harm = Callable[[Path], None]


def nothing(_: Path) -> None:
    """No harm."""


@dataclass(frozen=True)
class Bad:
    """A job with something wrong: parts of its spec, or harm to its model, to the prepared data, or to the trainer's scratch folder."""

    exit_code: int
    code: FailureCode
    param: str
    said: str
    spec: dict[str, Any] = field(default_factory=dict)
    model: Harm = nothing
    data: Harm = nothing
    scratch: Harm = nothing
    rows: tuple[dict[str, Any], ...] = tuple(alpaca_rows(12))


def weights(change: Callable[[bytes], bytes]) -> Harm:
    def harm(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return harm


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def another_reward_model(folder: Path) -> None:
    other = shutil.copytree(folder, folder.parent / "judge")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>"))


def pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def fewer_tokens(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))


def changed_rows(store: Path) -> None:
    (rows,) = store.glob("**/train/*.arrow")
    data = bytearray(rows.read_bytes())
    data[-100] ^= 1
    rows.write_bytes(data)


def no_space(scratch: Path) -> None:
    """The first checkpoint is written to a device that is always full."""
    folder = scratch / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / checkpoints.STATE).symlink_to("/dev/full")


CASES = {
    "an option that the tuner does not have": Bad(
        64,
        FailureCode.CONFIG_INVALID,
        "spec.method.options.rnak",
        "rnak is no option of tuner loha",
        {"method": {"tuner": "loha", "options": {"rnak": 8}}},
    ),
    "rank 0": Bad(64, FailureCode.CONFIG_INVALID, "spec.method.lora.rank", "greater than or equal to 1", {"method": {"lora": {"rank": 0}}}),
    "target modules that match nothing": Bad(
        64,
        FailureCode.CONFIG_INVALID,
        "spec.method.lora.targetModules",
        "no layer of the model is called query",
        {"method": {"lora": {"targetModules": "query"}}},
    ),
    "early stopping without a row to validate with": Bad(
        65,
        FailureCode.DATA_EMPTY,
        "spec.dataset.sources",
        "no example is left to validate with, which early stopping needs",
        {"hyperparameters": {"earlyStopping": {"enabled": True}}},
        rows=tuple(alpaca_rows(1)),
    ),
    "a tokenizer with more tokens than the model": Bad(
        64, FailureCode.MODEL_UNSUPPORTED, "spec.model.uri", "the model has only 50 token ids", model=fewer_tokens
    ),
    "a reward model of another tokenizer": Bad(
        64,
        FailureCode.CONFIG_INVALID,
        "spec.method.rewardModel",
        "a reward model of another tokenizer",
        {"method": {"objective": "grpo", "rewardModel": "judge"}, "evaluation": {"enabled": False}},
        model=another_reward_model,
    ),
    "nothing but pickles": Bad(66, FailureCode.MODEL_UNSAFE, "spec.model.uri", "pickled weights and no *.safetensors", model=pickles),
    "weights that are cut off": Bad(
        66, FailureCode.MODEL_NOT_FOUND, "spec.model.uri", "is corrupt: it holds", model=weights(lambda data: data[:-100])
    ),
    "weights with garbage for a header": Bad(
        66,
        FailureCode.MODEL_NOT_FOUND,
        "spec.model.uri",
        "model.safetensors",
        model=weights(lambda data: data[:8] + b"\xff" * 64 + data[72:]),
    ),
    "weights that are no numbers": Bad(
        66, FailureCode.MODEL_NOT_FOUND, "spec.model.uri", "model.layers.1.mlp.up_proj.weight holds NaN", model=not_a_number
    ),
    "NaN in a row": Bad(
        65,
        FailureCode.DATA_INVALID,
        "spec.dataset.sources[0].uri",
        "rows.jsonl:13",
        rows=(*alpaca_rows(12), {"instruction": "Add.", "input": "", "output": float("nan")}),
    ),
    "prepared data that was changed": Bad(
        69, FailureCode.STORAGE_DAMAGED, "/train/", "is damaged: its SHA-256 is not that of the manifest", data=changed_rows
    ),
    "a full disk": Bad(64, FailureCode.CONFIG_INVALID, "spec.resources.scratch", "the scratch volume is full", scratch=no_space),
}


def manifest_of(bad: Bad, work: Path) -> Path:
    """The job's file, with its model and rows beside it."""
    model = shutil.copytree(tiny_model("llama", chat_template=True), work / "model")
    bad.model(model)
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad.rows))
    spec: dict[str, Any] = {
        "model": {"uri": str(model)},
        "dataset": {"sources": [{"uri": str(work / "rows.jsonl")}], "maxLength": 256},
        "hyperparameters": {"maxSteps": 3, "batchSize": 2},
        "checkpointing": {"everySteps": 1},
        "resources": {"cpu": "1"},
    }
    for name, part in bad.spec.items():
        spec[name] = {**spec.get(name, {}), **part}
    if "rewardModel" in spec.get("method", {}):
        spec["method"]["rewardModel"] = str(work / spec["method"]["rewardModel"])
    document = {"apiVersion": "tunewright.dev/v1alpha1", "kind": "InstructionTuningJob", "metadata": {"name": "bad"}, "spec": spec}
    (work / "job.yaml").write_text(yaml.safe_dump(document))
    return work / "job.yaml"


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
def test_it_ends_with_one_clear_error(bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    plain = train.run

    def harmed(*given: Any, work: Path, **more: Any) -> Outcome:
        bad.data(tmp_path / "out")
        bad.scratch(work)
        return plain(*given, work=work, **more)

    monkeypatch.setattr(train, "run", harmed)
    monkeypatch.setattr(cli, "work_under_way", threading.Event())
    monkeypatch.setattr(cli, "do_without", lambda *_: None)  # other tests of this process need what it keeps away
    monkeypatch.setenv(process.TERMINATION_MESSAGE_VARIABLE, str(tmp_path / "message"))
    with pytest.raises(SystemExit) as end:
        cli.run(manifest_of(bad, tmp_path), tmp_path / "out")
    told = Outcome.model_validate_json((tmp_path / "message").read_text())
    assert told.error is not None
    assert (end.value.code, told.error.code) == (bad.exit_code, bad.code), told.error.message
    assert bad.said in told.error.message
    assert bad.param in told.error.param
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"][1:] == [f"what to do: {ADVICE[bad.code]}"]


def test_a_full_disk_is_known_by_number_or_by_words() -> None:
    """safetensors has an error of its own for it (seen on a full tmpfs)."""
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    for error, code in (
        (OSError(errno.ENOSPC, "x"), FailureCode.CONFIG_INVALID),
        (RuntimeError(told), FailureCode.CONFIG_INVALID),
        (OSError(errno.EIO, "x"), FailureCode.INTERNAL),
    ):
        assert process.as_refusal("train", error).code is code


def test_a_tuned_model_that_is_not_what_was_published_is_refused(tmp_path: Path) -> None:
    """A job that begins with it reads it from storage, where its manifest has hashes. A model of somebody else's has no such manifest."""
    store, fetched = LocalStore(tmp_path / "store"), tmp_path / "fetched"
    digest = publish_folder(store, tiny_model(), "team-a/models/base", manifest={})
    assert digest
    shutil.copytree(tmp_path / "store" / "team-a/models/base", fetched)
    check_files(store, "team-a/models/base", fetched)
    weights(lambda data: data[:-1] + b"\x01")(fetched)
    with pytest.raises(Refusal, match=r"model\.safetensors is damaged: its SHA-256") as caught:
        check_files(store, "team-a/models/base", fetched)
    assert caught.value.code is FailureCode.STORAGE_DAMAGED
    (fetched / "manifest.json").write_text('{"name": "of another tool"}')
    check_files(store, "team-a/models/base", fetched)


@pytest.mark.parametrize("left", [True, False], ids=["the one before", "none"])
def test_of_truncated_checkpoints_the_one_before_is_taken_and_without_one_training_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: bool
) -> None:
    job = a_job(hyperparameters={"batchSize": 4, "maxSteps": 6}, checkpointing={"everySteps": 2})
    digests = []
    for harmed in (False, True):
        store = LocalStore(tmp_path / str(harmed))
        publish_data(store, tmp_path, train=packed(documents(24), 2))
        if harmed:
            with monkeypatch.context() as patch:
                stop_in_step(patch, 5)
                with pytest.raises(process.Stopped):
                    train_here(job, store, tmp_path)
            files = sorted((tmp_path / "True").glob("**/step-*/weights.safetensors"))
            assert [file.parent.name for file in files] == ["step-00000004", "step-00000005"]
            for file in files[left:]:
                os.truncate(file, 100)
        outcome = train_here(job, store, tmp_path, attempt=2)
        digests.append(weights_digest(outcome))
    assert outcome.resumed_from_step == (4 if left else 0)
    assert digests[0] == digests[1]
    assert ("no whole checkpoint is left: training begins anew" in caplog.text) is not left
