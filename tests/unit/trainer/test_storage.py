"""Storage, over a real S3 server and over a folder."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.s3 import S3Server
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import read_spec
from tunewright_crds.pod import JobIdentity, PodConfig, StorageSettings
from tunewright_trainer.storage import (
    Damaged,
    LocalStore,
    S3Store,
    Store,
    discard_folder,
    fetch_folder,
    open_source,
    publish_folder,
    read_manifest,
)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("storage")) as server:
        server.client().create_bucket(Bucket="bucket")
        yield server


@pytest.fixture(params=["s3", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return s3_store(request.getfixturevalue("s3"), prefix=f"prefix/{tmp_path.name}")


def s3_store(server: S3Server, *, bucket: str = "bucket", prefix: str = "", keys: dict[str, str] | None = None) -> S3Store:
    return S3Store(bucket, prefix, endpoint=server.endpoint, region="us-east-1", keys=keys or server.keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    (made / "train").mkdir(parents=True)
    (made / "config.json").write_bytes(b"{}")
    (made / "train" / "data-00000.arrow").write_bytes(b"x" * 100_000)
    return made


def test_objects_come_back_as_they_were_written(store: Store, tmp_path: Path) -> None:
    store.put_bytes("a/one", b"1")
    store.put_bytes("a/one", b"first")
    (tmp_path / "two").write_bytes(b"second")
    store.upload(tmp_path / "two", "a/b/two")
    store.put_bytes("ab", b"third")
    store.download("a/b/two", tmp_path / "deep" / "copy")
    assert (store.get_bytes("a/one"), (tmp_path / "deep" / "copy").read_bytes()) == (b"first", b"second")
    assert [(info.key, info.size) for info in store.list("a")] == [("a/b/two", 6), ("a/one", 5), ("ab", 5)]
    assert [info.key for info in store.list("a/")] == ["a/b/two", "a/one"]
    assert (store.exists("a/one"), store.exists("a/on"), store.exists("a")) == (True, False, False)
    store.delete(["a/one", "a/never"])
    assert [info.key for info in store.list("")] == ["a/b/two", "ab"]
    with pytest.raises(Refusal, match="a/one does not exist") as caught:
        store.get_bytes("a/one")
    assert caught.value.code is FailureCode.STORAGE_NOT_FOUND


def test_a_published_folder_is_fetched_whole_and_its_digest_is_its_manifests(store: Store, folder: Path, tmp_path: Path) -> None:
    digest = publish_folder(store, folder, "data/one", manifest={"digest": "d"})
    assert digest == hashlib.sha256(store.get_bytes("data/one/manifest.json")).hexdigest()
    manifest = fetch_folder(store, "data/one", tmp_path / "fetched")
    assert manifest == read_manifest(store, "data/one")
    assert manifest is not None
    assert manifest["digest"] == "d"
    assert [(entry["name"], entry["size"]) for entry in manifest["files"]] == [("config.json", 2), ("train/data-00000.arrow", 100_000)]
    assert (tmp_path / "fetched" / "train" / "data-00000.arrow").read_bytes() == b"x" * 100_000


def test_a_folder_without_manifest_is_absent(store: Store, folder: Path, tmp_path: Path) -> None:
    publish_folder(store, folder, "data/one", manifest={})
    store.delete(["data/one/manifest.json"])
    assert read_manifest(store, "data/one") is None
    assert fetch_folder(store, "data/one", tmp_path / "fetched") is None


DAMAGES: dict[str, Callable[[Store], None]] = {
    "another size": lambda store: store.put_bytes("one/config.json", b"{} "),
    "another content": lambda store: store.put_bytes("one/config.json", b"[]"),
    "a missing file": lambda store: store.delete(["one/config.json"]),
    "a manifest that is no JSON": lambda store: store.put_bytes("one/manifest.json", b"{"),
    "a manifest that names a file outside": lambda store: store.put_bytes(
        "one/manifest.json", b'{"files": [{"name": "../out", "size": 1, "sha256": ""}]}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed(damage: Callable[[Store], None], store: Store, folder: Path, tmp_path: Path) -> None:
    publish_folder(store, folder, "one", manifest={})
    damage(store)
    with pytest.raises(Damaged):
        fetch_folder(store, "one", tmp_path / "fetched")


def test_wrong_keys_are_denied_at_once(s3: S3Server, tmp_path: Path) -> None:
    s3_store(s3).put_bytes("object", b"1")
    unknown = {"AWS_ACCESS_KEY_ID": "NOBODY", "AWS_SECRET_ACCESS_KEY": "nothing"}
    wrong = s3.keys | {"AWS_SECRET_ACCESS_KEY": "nothing"}
    (tmp_path / "file").write_bytes(b"1")
    for keys in (unknown, wrong):
        store = s3_store(s3, keys=keys)
        calls: list[Callable[[], object]] = [
            lambda store=store: store.get_bytes("object"),  # type: ignore[misc]
            lambda store=store: store.download("object", tmp_path / "copy"),  # type: ignore[misc]
            lambda store=store: store.upload(tmp_path / "file", "object"),  # type: ignore[misc]
            lambda store=store: store.exists("object"),  # type: ignore[misc]
            lambda store=store: list(store.list("")),  # type: ignore[misc]
        ]
        for call in calls:
            with pytest.raises(Refusal) as caught:
                call()
            assert caught.value.code is FailureCode.ACCESS_DENIED, caught.value.message


def test_a_missing_bucket_and_a_missing_object_are_told_apart(s3: S3Server, tmp_path: Path) -> None:
    for bucket, said in (("no-such-bucket", "bucket no-such-bucket of"), ("bucket", "s3://bucket/none does not exist")):
        store = s3_store(s3, bucket=bucket)
        for call in (lambda: store.get_bytes("none"), lambda: store.download("none", tmp_path / "copy")):  # noqa: B023
            with pytest.raises(Refusal, match=said) as caught:
                call()
            assert caught.value.code is FailureCode.STORAGE_NOT_FOUND
    with pytest.raises(Refusal, match="no-such-bucket"):
        s3_store(s3, bucket="no-such-bucket").exists("none")


def test_a_discarded_folder_loses_its_manifest_first(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for digest in ("d1", "d10"):
        publish_folder(store, folder, f"ns/datasets/{digest}", manifest={})
    store.put_bytes("ns/datasets/d1/report.html", b"beside the manifest")
    removed: list[str] = []
    delete = store.delete

    def noting(keys: Iterable[str]) -> None:
        found = list(keys)
        removed.extend(found)
        delete(found)

    monkeypatch.setattr(store, "delete", noting)
    discard_folder(store, "ns/datasets/d1")
    assert removed[0] == "ns/datasets/d1/manifest.json"
    assert "ns/datasets/d1/report.html" in removed
    assert {info.key.split("/")[2] for info in store.list("ns/")} == {"d10"}
    discard_folder(store, "ns/datasets/d1")  # is done already


@pytest.mark.parametrize(("digest", "left", "code"), [("d1", {"d2"}, 0), ("", {"d1", "d2"}, 64), ("../datasets", {"d1", "d2"}, 64)])
def test_discard_removes_one_data_set_and_refuses_what_is_no_digest(
    s3: S3Server, folder: Path, tmp_path: Path, digest: str, left: set[str], code: int
) -> None:
    namespace = f"team-{tmp_path.name.strip('_')}"
    for name in ("d1", "d2"):
        publish_folder(s3_store(s3), folder, f"{namespace}/datasets/{name}", manifest={})
    told = PodConfig(
        job=JobIdentity(namespace=namespace, name="d", uid="u"),
        spec=read_spec({"model": {"uri": "s3://models/one"}, "dataset": {"ref": "d"}}),
        storage=StorageSettings(bucket="bucket", endpoint=s3.endpoint),
        version="1",
    )
    config = tmp_path / "job.json"
    config.write_text(told.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "tunewright_trainer", "discard", "--config", str(config), "--dataset", digest]
    done = subprocess.run(command, env=os.environ | s3.keys, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert {info.key.split("/")[2] for info in s3_store(s3).list(f"{namespace}/")} == left


def test_an_outage_is_waited_out(tmp_path: Path) -> None:
    with S3Server(tmp_path) as server:
        server.client().create_bucket(Bucket="bucket")
        store = s3_store(server)
        store.put_bytes("object", b"content")
        server.stop()
        back = threading.Timer(2, server.start)
        back.start()
        try:
            assert store.get_bytes("object") == b"content"
        finally:
            back.join()


def test_an_outage_that_does_not_end_is_told_once_patience_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_STORAGE_PATIENCE_SECONDS", "1")
    server = S3Server(tmp_path)  # never started
    with pytest.raises(Refusal, match="s3://bucket/object") as caught:
        s3_store(server).get_bytes("object")
    assert caught.value.code is FailureCode.STORAGE_UNAVAILABLE


def test_a_job_does_not_read_other_namespaces_with_the_platforms_keys() -> None:
    spec = {"model": {"uri": "s3://models/one"}, "dataset": {"sources": [{"uri": "s3://bucket/p/team-b/models/m/1/adapter/"}]}}
    config = PodConfig(
        job=JobIdentity(namespace="team-a", name="job", uid="u"),
        spec=read_spec(spec),
        storage=StorageSettings(bucket="bucket", prefix="p"),
        version="1",
    )
    with pytest.raises(Refusal, match="belongs to other namespaces") as caught:
        open_source(config, config.spec.dataset.sources[0].uri, param="spec.dataset.sources[0].uri")
    assert (caught.value.code, caught.value.param) == (FailureCode.ACCESS_DENIED, "spec.dataset.sources[0].uri")
    own = config.model_copy(update={"job": JobIdentity(namespace="team-b", name="job", uid="u")})
    assert open_source(own, own.spec.dataset.sources[0].uri, param="spec.dataset.sources[0].uri").key == "p/team-b/models/m/1/adapter/"
