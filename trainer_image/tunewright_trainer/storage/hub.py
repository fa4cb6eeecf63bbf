"""Models and data sets of the Hugging Face hub, at one commit. Only ever read from."""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeVar

import httpx2
from huggingface_hub import HfApi, RepoFile, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from huggingface_hub.utils.tqdm import disable_progress_bars

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.storage.patience import Unavailable, patiently
from tunewright_trainer.storage.store import Changed, ObjectInfo, ObjectMissing

# HfHubHTTPError is asked for before: it is an HTTPError too.
_NO_ANSWER: Final = (httpx2.HTTPError, XetDownloadError, ConnectionError, TimeoutError)
_SHA256_DIGITS: Final = 64

RepoType = Literal["model", "dataset"]
T = TypeVar("T")
log = logging.getLogger(__name__)


class HubStore:
    """Files of `repo` (`org/name`) at the commit that `revision` is now; a branch that moves on later changes nothing.

    `token` and `endpoint` are the library's own (HF_TOKEN, HF_ENDPOINT, a login) where empty. `missing` and `param` are the code and the field that
    a missing file is reported with. Raises `Refusal` where the commit cannot be found out.
    """

    def __init__(
        self,
        repo: str,
        revision: str,
        *,
        repo_type: RepoType,
        token: str = "",
        endpoint: str = "",
        missing: FailureCode = FailureCode.STORAGE_NOT_FOUND,
        param: str = "",
    ) -> None:
        self.repo = repo
        self.repo_type = repo_type
        self.missing = missing
        self.param = param
        self._revision = revision
        self._api = HfApi(endpoint=endpoint or None, token=token or None, library_name="tunewright")
        self._listed: dict[str, Sequence[ObjectInfo]] = {}
        disable_progress_bars()
        self.commit = self._call("", lambda: str(self._api.repo_info(repo, revision=revision, repo_type=repo_type).sha))
        log.info("%s is commit %s", self.uri(""), self.commit)

    def uri(self, key: str) -> str:
        kind = "datasets/" if self.repo_type == "dataset" else ""
        return f"hf://{kind}{self.repo}@{self._revision}" + (f"/{key}" if key else "")

    def get_bytes(self, key: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="hub-") as folder:
            return self._fetch(key, Path(folder)).read_bytes()

    def read_start(self, key: str, length: int) -> bytes:
        return self._call(key, lambda: self._read_start(key, length))

    def _read_start(self, key: str, length: int) -> bytes:
        url = hf_hub_url(self.repo, key, repo_type=self.repo_type, revision=self.commit, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._api.token, library_name="tunewright") | {"Range": f"bytes=0-{length - 1}"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            found = bytearray()
            for piece in answer.iter_bytes():  # a server that knows no ranges sends all: no more is taken than was asked for
                found += piece
                if len(found) >= length:
                    break
        return bytes(found[:length])

    def download(self, key: str, local_path: Path, *, listed: ObjectInfo | None = None) -> None:
        local_path.parent.mkdir(parents=True, exist_ok=True)
        # The library writes below a folder under the file's name in the repository, and its own notes beside it.
        with tempfile.TemporaryDirectory(prefix=".hub-", dir=local_path.parent) as folder:
            path = self._fetch(key, Path(folder))
            if listed and _etag_of(path, listed.etag) != listed.etag:
                raise Changed(self.uri(key), param=self.param)
            path.replace(local_path)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if folder not in self._listed:
            self._listed[folder] = sorted(self._call(folder, lambda: self._list_folder(folder)), key=lambda info: info.key)
        yield from (info for info in self._listed[folder] if info.key.startswith(prefix))

    def _list_folder(self, folder: str) -> Sequence[ObjectInfo]:
        try:
            tree = self._api.list_repo_tree(self.repo, folder or None, recursive=True, revision=self.commit, repo_type=self.repo_type)
            return [_info(found) for found in tree if isinstance(found, RepoFile)]
        except EntryNotFoundError:
            return []

    def exists(self, key: str) -> bool:
        return any(info.key == key for info in self.list(key))

    def fingerprint(self, info: ObjectInfo) -> str:
        return info.etag

    def put_bytes(self, key: str, data: bytes) -> None:
        self._refuse_writing(key)

    def upload(self, local_path: Path, key: str) -> None:
        self._refuse_writing(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._refuse_writing(key)

    def _refuse_writing(self, key: str) -> NoReturn:
        raise Refusal(FailureCode.ACCESS_DENIED, f"{self.uri(key)} cannot be written: the hub is only read from", param=self.param)

    def _fetch(self, key: str, folder: Path) -> Path:
        return Path(
            self._call(
                key,
                lambda: str(self._api.hf_hub_download(self.repo, key, repo_type=self.repo_type, revision=self.commit, local_dir=folder)),
            )
        )

    def _call(self, key: str, operation: Callable[[], T]) -> T:
        return patiently(operation, what=self.uri(key), translate=lambda error: self._translate(key, error))

    def _translate(self, key: str, error: Exception) -> NoReturn:
        """Raise what an error of the library means."""
        uri = self.uri(key)
        if isinstance(error, EntryNotFoundError) and not isinstance(error, HfHubHTTPError) and isinstance(error.__cause__, Exception):
            self._translate(key, error.__cause__)  # "not in the cache either" says nothing about why
        if isinstance(error, OfflineModeIsEnabled):
            raise Refusal(FailureCode.CONFIG_INVALID, f"{uri} cannot be read while HF_HUB_OFFLINE is set", param=self.param) from error
        if isinstance(error, GatedRepoError):
            what = "is gated: accept its conditions on the hub, and give your HF_TOKEN in a credentialsSecret"
            raise Refusal(FailureCode.ACCESS_DENIED, f"{uri} {what}", param=self.param) from error
        if isinstance(error, HfHubHTTPError):
            self._translate_status(uri, error)
        if isinstance(error, _NO_ANSWER):
            raise Unavailable(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
        raise error

    def _translate_status(self, uri: str, error: HfHubHTTPError) -> None:
        status = error.response.status_code
        if status in (401, 403):
            what = f"access to {uri} was denied ({status}): it is private or does not exist; give an HF_TOKEN that may read it in a credentialsSecret"
            raise Refusal(FailureCode.ACCESS_DENIED, what, param=self.param) from error
        if isinstance(error, RevisionNotFoundError):
            raise ObjectMissing(self.missing, f"{self.repo} has no revision {self._revision} ({uri})", param=self.param) from error
        if isinstance(error, RemoteEntryNotFoundError):
            raise ObjectMissing(self.missing, f"{uri} does not exist", param=self.param) from error
        if status == 404:
            raise ObjectMissing(self.missing, f"{self.repo_type} {self.repo} of {uri} does not exist", param=self.param) from error
        if status in (408, 429) or status >= 500:
            raise Unavailable(f"the hub answered {status}") from error


def _info(file: RepoFile) -> ObjectInfo:
    return ObjectInfo(key=file.path, size=file.size, etag=file.lfs.sha256 if file.lfs else file.blob_id)


def _etag_of(path: Path, etag: str) -> str:
    """The hash of a local file, of the kind that `etag` is: a large file's SHA-256, or that of git."""
    if len(etag) == _SHA256_DIGITS:
        with path.open("rb") as file:
            return sha_fileobj(file).hex()
    return git_hash(path.read_bytes())
