"""Reading by several pods comes to the very same data, whoever is killed on the way."""

import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.preparing import a_data_job, write_lines
from tests.support.rows import alpaca_rows
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer import cli, prepare
from tunewright_trainer.prepare import recipe, shards
from tunewright_trainer.prepare.sources import Piece, open_sources, shares
from tunewright_trainer.storage import LocalStore, read_manifest

SENTENCE = "the quick brown fox jumps over the lazy dog"
OPTIONS = {
    "validationFraction": 0.1,
    "testFraction": 0.1,
    "packing": True,
    "maxInvalidFraction": 0.1,
    "cleaning": {
        "nearDuplicates": {"enabled": True},
        "minOutputCharacters": 4,
        "decontaminate": {"enabled": True, "words": 6},
        "personalData": "mask",
    },
}


def a_job(folder: Path, count: int, rows: int = 40) -> PodConfig:
    """Twelve files of one source, one of which only some rows are taken, and a test set; with duplicates and mistakes across the files."""
    if not folder.exists():
        chance = random.Random(1)
        for number in range(12):
            data: list[Any] = chance.sample(alpaca_rows(8 * rows), rows)
            data += [{"instruction": f"Say the words of {number} in this order", "output": " ".join(f"word{word}" for word in range(60))}]
            data += [{"instruction": f"Who is number {number}, whom one writes to {number}@example.com?", "output": "nobody knows"}]
            data += [{"instruction": f"Go on, {number}", "output": f"And {number} said: {SENTENCE}, and so on"}]
            write_lines(folder / "many" / f"{number:02d}.jsonl", [*data, {"instruction": "no answer"}, "no object"])
        for number in range(3):
            write_lines(folder / "some" / f"{number}.jsonl", alpaca_rows(500)[100 * number + 300 :][:20])
        write_lines(folder / "test.jsonl", [*alpaca_rows(10), {"instruction": "What did the fox do?", "output": SENTENCE}])
    sources = [
        {"uri": str(folder / "many")},
        {"uri": str(folder / "some"), "maxExamples": 30, "weight": 2.5},
        {"uri": str(folder / "test.jsonl"), "split": "test"},
    ]
    return a_data_job(*sources, dataset=OPTIONS | {"shards": count})


def prepared(config: PodConfig, work: Path, *, first: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and report of the data, read by its shards first or by one alone."""
    store = LocalStore(work / "store")
    for number in reversed(range(config.spec.dataset.shards)) if first else ():
        prepare.run_shard(config, number, work=work / f"shard-{number}", store=store)
    outcome = prepare.run(config, work=work / "work", store=store)
    assert outcome.dataset is not None
    (folder,) = (work / "store").glob("*/datasets/*")
    found = read_manifest(store, folder.relative_to(work / "store").as_posix())
    assert found is not None
    assert not list(folder.glob("shards/**/*.arrow")), "shards go once the data is written"
    return found, json.loads((folder / "report.json").read_text())


def test_the_data_does_not_depend_on_the_number_of_pods(tmp_path: Path) -> None:
    alone = prepared(a_job(tmp_path / "data", 1), tmp_path / "alone", first=False)
    manifest, facts = alone
    assert facts["dataset"]["trainExamples"] > 100
    assert facts["dropped"]["duplicate"] > 50
    assert facts["dropped"]["nearly the same as an earlier row"] >= 11
    assert facts["dropped"]["shares 6 words in a row with a held-out row"] >= 12
    assert facts["masked"] == {"e-mail address": 12}
    assert facts["invalid"] == 24
    assert facts["sources"][1]["rows"] == 30
    for count in (2, 5, 8, 31):
        assert prepared(a_job(tmp_path / "data", count), tmp_path / str(count)) == alone
    assert {"train/data-00000.arrow", "validation/data-00000.arrow", "test/data-00000.arrow"} <= {
        file["name"] for file in manifest["files"]
    }


def test_windows_of_packing_do_not_depend_on_the_number_of_pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright_trainer.prepare.spill.WINDOW_EXAMPLES", 37)
    monkeypatch.setattr("tunewright_trainer.prepare.spill.WINDOW_TOKENS", 3001)
    alone = prepared(a_job(tmp_path / "data", 1), tmp_path / "alone", first=False)
    assert prepared(a_job(tmp_path / "data", 3), tmp_path / "three") == alone


def _read_shard(config: PodConfig, number: int, work: Path) -> None:
    prepare.run_shard(config, number, work=work / f"shard-{number}", store=LocalStore(work / "store"))


def test_two_of_eight_killed_half_way_change_nothing(tmp_path: Path) -> None:
    config = a_job(tmp_path / "data", 8, rows=800)
    alone = prepared(config, tmp_path / "alone", first=False)
    work = tmp_path / "work"
    for number in range(8):
        if number not in (2, 5):
            _read_shard(config, number, work)
    for number in (2, 5):
        process = multiprocessing.get_context("spawn").Process(target=_read_shard, args=(config, number, work))
        process.start()
        examples = work / f"shard-{number}" / "shard" / "examples.arrow"
        deadline = time.monotonic() + 120
        while not (examples.exists() and examples.stat().st_size > 100_000):
            assert time.monotonic() < deadline
            assert process.is_alive(), "it was done before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.join()
        process.close()
    there = {path.parent.name for path in (work / "store").rglob("manifest.json")}
    assert there == {f"0{number}-of-08" for number in (0, 1, 3, 4, 6, 7)}, "nothing of a killed shard counts"
    assert prepared(config, work) == alone


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_job(tmp_path / "data", 3)
    store = LocalStore(tmp_path / "store")
    for number in range(3):
        prepare.run_shard(config, number, work=tmp_path / "work", store=store)
    monkeypatch.setattr(recipe, "Reader", None)
    monkeypatch.setattr(shards, "Reader", None)
    prepare.run_shard(config, 1, work=tmp_path / "work", store=store)
    assert prepare.run(config, work=tmp_path / "work", store=store).dataset
    prepare.run_shard(config, 1, work=tmp_path / "work", store=store)
    assert not list((tmp_path / "store").rglob("*-of-03/*"))


def test_a_shard_that_is_missing_is_read_by_the_pod_that_writes(tmp_path: Path) -> None:
    config = a_job(tmp_path / "data", 4)
    alone = prepared(config, tmp_path / "alone", first=False)
    prepare.run_shard(config, 2, work=tmp_path / "work", store=LocalStore(tmp_path / "some" / "store"))
    assert prepared(config, tmp_path / "some", first=False) == alone


def test_sources_that_changed_between_the_shards_are_read_anew(tmp_path: Path) -> None:
    config = a_job(tmp_path / "data", 2)
    store = LocalStore(tmp_path / "store")
    prepare.run_shard(config, 0, work=tmp_path / "work", store=store)
    write_lines(tmp_path / "data" / "many" / "00.jsonl", alpaca_rows(5))
    prepare.run_shard(config, 1, work=tmp_path / "work", store=store)
    outcome = prepare.run(config, work=tmp_path / "work", store=store)
    alone = prepare.run(a_job(tmp_path / "data", 1), work=tmp_path / "work", store=LocalStore(tmp_path / "alone"))
    assert outcome == alone.model_copy(update={"dataset": outcome.dataset})
    assert outcome.dataset
    assert alone.dataset
    assert outcome.dataset.digest == alone.dataset.digest


def test_bad_data_is_told_by_the_shard_that_finds_it(tmp_path: Path) -> None:
    config = a_job(tmp_path / "data", 3)
    (tmp_path / "data" / "many" / "11.jsonl").write_bytes(b"\x1f\x8b\x08 no gzip")
    store = LocalStore(tmp_path / "store")
    prepare.run_shard(config, 0, work=tmp_path / "work", store=store)
    with pytest.raises(Refusal, match=r"11\.jsonl: begins like gzip") as caught:
        prepare.run_shard(config, 2, work=tmp_path / "work", store=store)
    assert (caught.value.code, caught.value.param) == (FailureCode.DATA_INVALID, "spec.dataset.sources[0].uri")


SHARES: dict[str, tuple[dict[str, int], int, list[list[str]]]] = {
    "one reads all": ({"a": 5, "b": 5}, 1, [["a", "b"]]),
    "of the same size": ({"a": 9, "b": 9, "c": 9, "d": 9}, 2, [["a", "b"], ["c", "d"]]),
    "a large one": ({"a": 9, "b": 9, "c": 981, "d": 1}, 2, [["a", "b"], ["c", "d"]]),
    "more pods than files": ({"a": 9, "b": 9}, 4, [[], ["a"], [], ["b"]]),
    "empty files": ({"a": 0, "b": 0, "c": 0}, 3, [["a"], ["b"], ["c"]]),
}


@pytest.mark.parametrize(("sizes", "count", "wanted"), SHARES.values(), ids=SHARES)
def test_files_are_shared_by_their_bytes(tmp_path: Path, sizes: dict[str, int], count: int, wanted: list[list[str]]) -> None:
    for name, size in sizes.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    (source,) = open_sources(a_data_job(tmp_path))
    found = shares([source], count)
    assert [[source.name(source.files[file])[0] for piece in share for file in piece.files] for share in found] == wanted


def test_shares_follow_the_order_of_reading(tmp_path: Path) -> None:
    config = a_job(tmp_path / "data", 1)
    sources = open_sources(config)
    alone = shares(sources, 1)[0]
    assert alone == [Piece(2, (0,)), Piece(0, tuple(range(12))), Piece(1, (0, 1, 2))]
    for count in (2, 3, 7, 64):
        parts = [piece for share in shares(sources, count) for piece in share]
        assert [(piece.source, file) for piece in parts for file in piece.files] == [
            (piece.source, file) for piece in alone for file in piece.files
        ]
        assert Piece(1, (0, 1, 2)) in parts, "of which only some rows are taken"


def test_a_shard_outside_of_an_indexed_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    with pytest.raises(Refusal, match="Indexed Job"):
        cli.completion_index()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "7")
    assert cli.completion_index() == 7
