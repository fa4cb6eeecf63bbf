"""Addresses on mounted volumes: files, folders and patterns, and no link leads out of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, examples, prepare_here, write_lines
from tunewright_crds import names
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import StorageSettings
from tunewright_trainer.prepare.sources import open_sources
from tunewright_trainer.serve.server import open_base
from tunewright_trainer.storage import open_model


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The volume of the claim `data`."""
    monkeypatch.setattr(names, "VOLUMES", str(tmp_path / "volumes"))
    root = tmp_path / "volumes" / "data"
    for name in ("one.jsonl", "sets/a.jsonl", "sets/deep/b.jsonl"):
        write_lines(root / name, [{"prompt": name, "completion": "yes"}])
    return root


FILES = {
    "pvc://data/one.jsonl": ["one.jsonl"],
    "pvc://data/": ["one.jsonl", "sets/a.jsonl", "sets/deep/b.jsonl"],
    "pvc://data/sets": ["sets/a.jsonl", "sets/deep/b.jsonl"],
    "pvc://data/**/[ab].jsonl": ["sets/a.jsonl", "sets/deep/b.jsonl"],
    "pvc://data/current/a.jsonl": ["current/a.jsonl"],
    "pvc://data/linked.jsonl": ["linked.jsonl"],
}


@pytest.mark.parametrize(("address", "expected"), FILES.items())
def test_an_address_means_files_of_the_volume(volume: Path, address: str, expected: list[str]) -> None:
    if "current" in address or "linked" in address:  # links that stay on the volume
        (volume / "current").symlink_to("sets")
        (volume / "linked.jsonl").symlink_to("sets/a.jsonl")
    (source,) = open_sources(a_data_job(address, base=Path("model")))
    assert [info.key for info in source.files] == expected
    assert source.place.uri == address


def test_data_and_model_are_read_from_volumes(volume: Path, tmp_path: Path) -> None:
    (volume.parent / "models").mkdir()
    (volume.parent / "models" / "tiny").symlink_to(volume.parent / "models" / "v1")
    os.rename(_copy(tiny_model("llama", chat_template=True), tmp_path / "copy"), volume.parent / "models" / "v1")
    job = a_data_job("pvc://data/**/*.jsonl", model={"uri": "pvc://models/tiny/"})
    outcome = prepare_here(job, tmp_path / "first")
    assert len(examples(tmp_path / "first")) == 3
    assert open_model(job).local == open_base("pvc://models/tiny/", StorageSettings(bucket="b")).local == volume.parent / "models" / "v1"
    write_lines(volume / "one.jsonl", [{"prompt": "other", "completion": "yes"}])
    assert outcome.dataset != prepare_here(job, tmp_path / "second").dataset, "the address follows the content"


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _link_to_a_file(volume: Path, outside: Path) -> str:
    (volume / "evil.jsonl").symlink_to(outside / "secret.jsonl")
    return "pvc://data/evil.jsonl"


def _relative_link(volume: Path, outside: Path) -> str:
    (volume / "sets" / "evil.jsonl").symlink_to(f"../../../{outside.name}/secret.jsonl")
    return "pvc://data/sets/*.jsonl"


def _link_to_a_folder(volume: Path, outside: Path) -> str:
    (volume / "evil").symlink_to(outside)
    return "pvc://data/evil/"


def _link_among_others(volume: Path, outside: Path) -> str:
    (volume / "sets" / "evil.jsonl").symlink_to(outside / "secret.jsonl")
    return "pvc://data/"


@pytest.mark.parametrize("link", [_link_to_a_file, _relative_link, _link_to_a_folder, _link_among_others])
def test_no_link_leads_out_of_a_volume(volume: Path, tmp_path: Path, link: Callable[[Path, Path], str]) -> None:
    write_lines(tmp_path / "outside" / "secret.jsonl", [{"text": "secret"}])
    with pytest.raises(Refusal, match=r"pvc://data/.* is a link that leads out of the volume") as refusal:
        open_sources(a_data_job(link(volume, tmp_path / "outside"), base=Path("model")))
    assert (refusal.value.code, refusal.value.param) == (FailureCode.ACCESS_DENIED, "spec.dataset.sources[0].uri")


def test_a_link_to_a_folder_elsewhere_is_not_walked_into(volume: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "outside" / "secret.jsonl", [{"text": "secret"}])
    (volume / "evil").symlink_to(tmp_path / "outside")
    (source,) = open_sources(a_data_job("pvc://data/", base=Path("model")))
    assert len(source.files) == 3


MISTAKES = {
    "pvc://data/none.jsonl": (FailureCode.DATA_NOT_FOUND, "pvc://data/none.jsonl does not exist"),
    "pvc://other/": (FailureCode.DATA_NOT_FOUND, "pvc://other/ does not exist"),
    "pvc://data/../other/x.jsonl": (FailureCode.CONFIG_INVALID, "which is not followed"),
}


@pytest.mark.parametrize(("address", "expected"), MISTAKES.items())
def test_mistakes_are_told_by_the_address(volume: Path, address: str, expected: tuple[FailureCode, str]) -> None:
    with pytest.raises(Refusal, match=expected[1]) as refusal:
        open_sources(a_data_job(address, base=Path("model")))
    assert refusal.value.code == expected[0]
