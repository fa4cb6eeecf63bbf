"""Prepared data is trained on by models that read it as it was prepared, and by no others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, out, prepare_here, write_lines
from tests.support.rows import alpaca_rows
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import Model
from tunewright_trainer.storage import read_manifest
from tunewright_trainer.train.fit import check_fit


def nothing(folder: Path) -> None:
    """Other weights, and a copy that somebody left there."""
    (folder / "model.safetensors").write_bytes(b"other weights")
    (folder / "tokenizer.json.orig").write_bytes(b"")


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))

    return change


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def written(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text("{}")

    return write


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "of the same family": (nothing, ""),
    "with more layers": (config(num_hidden_layers=9), ""),
    "with another tokenizer": (written("tokenizer.json"), r"^tokenizer\.json of .* is not that of"),
    "with a template of its own": (written("chat_template.json"), r"^chat_template\.json of "),
    "without settings of its tokenizer": (removed("tokenizer_config.json"), r"^tokenizer_config\.json of "),
    "that reads less": (config(max_position_embeddings=100), "up to 300 tokens, and .* reads only 100"),
}


@pytest.mark.parametrize(("change", "said"), MODELS.values(), ids=MODELS)
def test_a_model_that_reads_otherwise_is_refused(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    prepare_here(a_data_job(write_lines(tmp_path / "rows.jsonl", alpaca_rows(3)), dataset={"maxLength": 300}), tmp_path)
    manifest = read_manifest(out(tmp_path), "")
    assert manifest is not None
    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama", chat_template=True), other)
    change(other)
    model = Model.model_validate({"uri": "s3://models/other/"})
    if not said:
        check_fit(manifest, other, model)
        return
    with pytest.raises(Refusal, match=said) as caught:
        check_fit(manifest, other, model)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, "spec.model.uri")


def test_a_template_of_the_job_must_be_that_of_the_data(tmp_path: Path) -> None:
    base = tiny_model("llama", chat_template=True)
    prepare_here(a_data_job(write_lines(tmp_path / "rows.jsonl", alpaca_rows(3))), tmp_path)
    manifest = read_manifest(out(tmp_path), "")
    assert manifest is not None
    for template, fits in ((manifest["chatTemplate"], True), ("{{ messages[0]['content'] }}", False)):
        model = Model.model_validate({"uri": "s3://models/other/", "chatTemplate": template})
        if fits:
            check_fit(manifest, base, model)
            continue
        with pytest.raises(Refusal, match="another chat template") as caught:
            check_fit(manifest, base, model)
        assert caught.value.param == "spec.model.chatTemplate"
