"""Which files an address means, and that what is read is what was listed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.preparing import a_data_job, write_lines
from tests.support.s3 import S3Server
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import JobIdentity, PodConfig, StorageSettings
from tunewright_trainer.prepare.sources import OpenSource, open_sources
from tunewright_trainer.storage import places

BUCKET = "data"
PLATFORM = "platform"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("sources")) as server:
        for bucket in (BUCKET, PLATFORM):
            server.client().create_bucket(Bucket=bucket)
        yield server


class Data:
    """A place for data: a folder, or a bucket with the keys of the platform."""

    def __init__(self, folder: Path, server: S3Server | None) -> None:
        self._folder = folder
        self._server = server
        self._writes = 0

    @property
    def root(self) -> str:
        return f"s3://{BUCKET}/{self._folder.name}" if self._server else str(self._folder)

    def put(self, name: str, text: str) -> None:
        """One file, written or written anew."""
        if self._server is None:
            path = write_lines(self._folder / name, [{"text": text}])
            self._writes += 1
            os.utime(path, (self._writes, self._writes))  # two writes within one tick of the file system's clock would look like one
        else:
            body = write_lines(self._folder / f"upload-{name.rpartition('/')[2]}", [{"text": text}]).read_bytes()
            self._server.client().put_object(Bucket=BUCKET, Key=f"{self._folder.name}/{name}", Body=body)

    def remove(self, name: str) -> None:
        if self._server is None:
            (self._folder / name).unlink()
        else:
            self._server.client().delete_object(Bucket=BUCKET, Key=f"{self._folder.name}/{name}")

    def job(self, address: str, **parts: Any) -> PodConfig:
        """A job over one address below the root."""
        return in_cluster(a_job(f"{self.root}/{address}" if address else self.root, **parts), self._server)


def a_job(address: str, **parts: Any) -> PodConfig:
    """A job over one address; its model is not looked at."""
    return a_data_job(address, base=Path("model"), **parts)


def in_cluster(config: PodConfig, server: S3Server | None, *, namespace: str = "team-a") -> PodConfig:
    """The config with the platform's storage at a server."""
    storage = StorageSettings(bucket=PLATFORM, prefix="p", endpoint=server.endpoint if server else "", region="us-east-1")
    return config.model_copy(update={"storage": storage, "job": JobIdentity(namespace=namespace, name="job", uid="u")})


@pytest.fixture(params=["local", "s3"])
def data(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    if request.param == "local":
        return Data(tmp_path, None)
    server: S3Server = request.getfixturevalue("s3")
    monkeypatch.setattr(places, "read_keys", lambda folder: server.keys)
    return Data(tmp_path, server)


def read(source: OpenSource, scratch: Path) -> list[str]:
    """Texts of all rows; nothing may be left on this machine."""
    scratch.mkdir()
    found = [read.found.text for read in source.read(range(len(source.files)), scratch)]  # type: ignore[union-attr]
    assert list(scratch.iterdir()) == []
    return found


FILES = (
    "part-1.jsonl",
    "part-2.jsonl",
    "part-10.jsonl",
    "notes.txt",
    "x [1].jsonl",
    "x 1.jsonl",
    "deep/part-3.jsonl",
    "deep/er/part-4.jsonl.gz",
    "Über größe/日本 語.jsonl",
)
ADDRESSES: dict[str, list[str]] = {
    "part-*.jsonl": ["part-1.jsonl", "part-10.jsonl", "part-2.jsonl"],
    "part-?.jsonl": ["part-1.jsonl", "part-2.jsonl"],
    "part-[!1]*.jsonl": ["part-2.jsonl"],
    "**/part-*": ["deep/er/part-4.jsonl.gz", "deep/part-3.jsonl", "part-1.jsonl", "part-10.jsonl", "part-2.jsonl"],
    "*/part-*.jsonl": ["deep/part-3.jsonl"],
    "deep/**": ["er/part-4.jsonl.gz", "part-3.jsonl"],
    "de*/": ["deep/er/part-4.jsonl.gz", "deep/part-3.jsonl"],
    "x [1].jsonl": ["x [1].jsonl"],  # a file of exactly this name goes before a pattern
    "x*.jsonl": ["x 1.jsonl", "x [1].jsonl"],
    "x [[]1].jsonl": ["x [1].jsonl"],
    "Über größe/*.jsonl": ["日本 語.jsonl"],
    "deep/": ["er/part-4.jsonl.gz", "part-3.jsonl"],
}


def test_an_address_means_the_files_that_it_matches(data: Data, tmp_path: Path) -> None:
    for name in FILES:
        data.put(name, name)
    for number, (address, wanted) in enumerate(ADDRESSES.items()):
        (source,) = open_sources(data.job(address))
        assert [source.name(info) for info in source.files] == wanted, address
        found = read(source, tmp_path / f"scratch-{number}")
        assert [text.rpartition("/")[2] for text in found] == [name.rpartition("/")[2] for name in wanted], address


def test_messages_name_files_below_the_folder_before_the_first_wildcard(data: Data, tmp_path: Path) -> None:
    data.put("set/en/1.jsonl", "good")
    data.put("set/README.md", "a card")
    data.put("set/de/1.jsonl", "")
    (source,) = open_sources(data.job("set/*/1.jsonl"))
    assert read(source, tmp_path / "scratch") == ["good"]
    assert [error.partition(":")[0] for error in source.errors] == ["de/1.jsonl"]


NOTHING: dict[str, tuple[str, FailureCode, str]] = {
    "no file of this kind": ("none-*.jsonl", FailureCode.DATA_NOT_FOUND, "nothing matches .*/none-[*].jsonl"),
    "no folder": ("none/**/*.jsonl", FailureCode.DATA_NOT_FOUND, "nothing matches"),
    "no data file": ("note*", FailureCode.DATA_NOT_FOUND, "holds no .jsonl"),
    "two stars within a name": ("part**.jsonl", FailureCode.CONFIG_INVALID, "whole folders only"),
}


@pytest.mark.parametrize(("address", "code", "said"), NOTHING.values(), ids=NOTHING)
def test_a_pattern_that_means_nothing_is_told(data: Data, address: str, code: FailureCode, said: str) -> None:
    data.put("part-1.jsonl", "one")
    data.put("notes.txt", "one")
    with pytest.raises(Refusal, match=said) as caught:
        open_sources(data.job(address))
    assert (caught.value.code, caught.value.param) == (code, "spec.dataset.sources[0].uri")


def test_a_key_does_not_climb(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "read_keys", lambda folder: s3.keys)
    for address in ("s3://data/a/../b.jsonl", "s3://platform/p/team-a/../team-b/models/*", "s3://data/./*.jsonl"):
        with pytest.raises(Refusal, match="not followed") as caught:
            open_sources(in_cluster(a_job(address), s3))
        assert caught.value.code is FailureCode.CONFIG_INVALID


def test_neither_a_pattern_nor_a_folder_takes_in_what_belongs_to_another_namespace(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "read_keys", lambda folder: s3.keys)
    for key in ("p/team-a/models/m/rows.jsonl", "p/team-b/models/m/rows.jsonl"):
        s3.client().put_object(Bucket=PLATFORM, Key=key, Body=b'{"text": "x"}\n')
    for address in ("p/*/models/**", "p/*/*/*/rows.jsonl", "p/**/rows.jsonl", "p/team-[b]/**", "p/team-b", "p/", "**"):
        with pytest.raises(Refusal, match="belongs to other namespaces") as caught:
            open_sources(in_cluster(a_job(f"s3://{PLATFORM}/{address}"), s3))
        assert caught.value.code is FailureCode.ACCESS_DENIED, address
    (own,) = open_sources(in_cluster(a_job(f"s3://{PLATFORM}/p/team-a/**/*.jsonl"), s3))
    assert [own.name(info) for info in own.files] == ["models/m/rows.jsonl"]


def changed(source: OpenSource, scratch: Path) -> Refusal:
    with pytest.raises(Refusal, match="changed while it was read; apply the job again when it is whole") as caught:
        read(source, scratch)
    assert (caught.value.code, caught.value.param) == (FailureCode.DATA_INVALID, source.param)
    return caught.value


@pytest.mark.parametrize("after", ["other", "longer than before", ""], ids=["same size", "longer", "empty"])
def test_a_file_that_is_another_one_than_was_listed_is_refused(data: Data, tmp_path: Path, after: str) -> None:
    for number in (1, 2, 3):
        data.put(f"part-{number}.jsonl", "first")
    (source,) = open_sources(data.job("part-*.jsonl"))
    data.put("part-2.jsonl", after)
    assert "part-2.jsonl changed" in changed(source, tmp_path / "scratch").message


def test_a_file_that_is_gone_is_told(data: Data, tmp_path: Path) -> None:
    data.put("part-1.jsonl", "first")
    (source,) = open_sources(data.job("part-1.jsonl"))
    data.remove("part-1.jsonl")
    with pytest.raises(Refusal, match=r"part-1.jsonl does not exist") as caught:
        read(source, tmp_path / "scratch")
    assert caught.value.code is FailureCode.DATA_NOT_FOUND


@pytest.mark.parametrize("more", ['{"text": "three"}\n', '{"text": "thr'], ids=["a row", "half a row"])
def test_a_local_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, more: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    (source,) = open_sources(a_job(str(path)))
    rows = source.read([0], tmp_path)
    next(rows)
    with path.open("a") as file:
        file.write(more)
    with pytest.raises(Refusal, match=r"rows.jsonl changed while it was read"):
        list(rows)


def test_a_large_object_is_read_whole_or_refused(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "read_keys", lambda folder: s3.keys)
    large = b'{"text": "x"}\n' * 3_000_000  # more than one request
    s3.client().put_object(Bucket=BUCKET, Key="large.jsonl", Body=large)
    (source,) = open_sources(in_cluster(a_job(f"s3://{BUCKET}/large.jsonl"), s3))
    (info,) = source.files
    source.place.store.download(info.key, tmp_path / "copy", listed=info)
    assert (tmp_path / "copy").read_bytes() == large
    s3.client().put_object(Bucket=BUCKET, Key="large.jsonl", Body=large[::-1])
    with pytest.raises(Refusal, match=r"large.jsonl changed while it was read"):
        source.place.store.download(info.key, tmp_path / "copy", listed=info)
