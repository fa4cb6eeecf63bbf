"""A store in an S3 bucket."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore import exceptions as boto_errors
from botocore.config import Config
from s3transfer.exceptions import S3DownloadFailedError
from s3transfer.subscribers import BaseSubscriber

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.storage import uri as s3_uri
from tunewright_trainer.storage.patience import Unavailable, patiently
from tunewright_trainer.storage.store import Changed, ObjectInfo, ObjectMissing

CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 60
DELETE_BATCH: Final = 1000  # the most that S3 takes in one request

# botocore's ConnectionError is no HTTPClientError: both have to be named.
_NO_ANSWER: Final = (
    boto_errors.ConnectionError,
    boto_errors.HTTPClientError,
    boto_errors.IncompleteReadError,
    boto_errors.ResponseStreamingError,
    boto_errors.FlexibleChecksumError,
    boto3.exceptions.RetriesExceededError,
    ConnectionError,
    TimeoutError,
)
_NO_KEYS: Final = (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError, boto_errors.CredentialRetrievalError)
_BUSY: Final = {
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "OperationAborted",
}
_DENIED: Final = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "XAdminUserNotFound"}
_MISSING: Final = {"NoSuchBucket", "NoSuchKey", "NotFound", "404", "InvalidBucketName"}

T = TypeVar("T")


class S3Store:
    """Objects of `bucket` under `prefix`. `missing` and `param` are the code and the field that a missing object is reported with."""

    commit = ""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str = "",
        region: str = "",
        keys: dict[str, str] | None = None,
        missing: FailureCode = FailureCode.STORAGE_NOT_FOUND,
        param: str = "",
    ) -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.missing = missing
        self.param = param
        self._client = _client(endpoint=endpoint, region=region, keys=keys or {})

    def uri(self, key: str) -> str:
        return s3_uri(self.bucket, self.prefix, key)

    def get_bytes(self, key: str) -> bytes:
        return self._call(key, lambda: bytes(self._client.get_object(Bucket=self.bucket, Key=self._full(key))["Body"].read()))

    def read_start(self, key: str, length: int) -> bytes:
        part = f"bytes=0-{length - 1}"
        try:
            return self._call(
                key, lambda: bytes(self._client.get_object(Bucket=self.bucket, Key=self._full(key), Range=part)["Body"].read())
            )
        except boto_errors.ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InvalidRange":  # of an empty object
                return b""
            raise

    def put_bytes(self, key: str, data: bytes) -> None:
        self._call(key, lambda: self._client.put_object(Bucket=self.bucket, Key=self._full(key), Body=data))

    def upload(self, local_path: Path, key: str) -> None:
        def send() -> None:
            # Not upload_file: it turns every error into a text.
            with local_path.open("rb") as file:
                self._client.upload_fileobj(file, self.bucket, self._full(key), Config=_TRANSFER)

        self._call(key, send)

    def download(self, key: str, local_path: Path, *, listed: ObjectInfo | None = None) -> None:
        local_path.parent.mkdir(parents=True, exist_ok=True)

        def receive() -> None:
            # Not the client's download_fileobj, which is this without subscribers.
            small = listed is not None and listed.size < _TRANSFER.multipart_threshold
            with local_path.open("wb") as file, create_transfer_manager(self._client, _ALONE if small else _TRANSFER) as manager:
                try:
                    manager.download(self.bucket, self._full(key), file, subscribers=[_Listed(listed)] if listed else []).result()
                except S3DownloadFailedError as error:
                    if listed:
                        raise Changed(self.uri(key), param=self.param) from error
                    raise Unavailable("it changed while it was read") from error

        self._call(key, receive)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        start = self._full(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0
        token: dict[str, str] = {}
        while True:
            page = self._list_page(prefix, start, token)
            for found in page.get("Contents", []):
                yield ObjectInfo(key=found["Key"][cut:], size=found["Size"], etag=found["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _list_page(self, prefix: str, start: str, token: dict[str, str]) -> dict[str, Any]:
        return self._call(prefix, lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=start, **token))

    def delete(self, keys: Iterable[str]) -> None:
        for batch in _batches(keys):
            self._delete_batch(batch)

    def _delete_batch(self, batch: Sequence[str]) -> None:
        doomed = {"Objects": [{"Key": self._full(key)} for key in batch], "Quiet": True}
        answer = self._call(batch[0], lambda: self._client.delete_objects(Bucket=self.bucket, Delete=doomed))
        for failed in answer.get("Errors", []):
            raise Refusal(FailureCode.ACCESS_DENIED, f"{self.uri(failed['Key'])} cannot be deleted: {failed['Code']}", param=self.param)

    def exists(self, key: str) -> bool:
        full = self._full(key)
        page = self._call(key, lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=full, MaxKeys=1))
        return any(found["Key"] == full for found in page.get("Contents", []))

    def fingerprint(self, info: ObjectInfo) -> str:
        return info.etag

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _call(self, key: str, operation: Callable[[], T]) -> T:
        return patiently(operation, what=self.uri(key), translate=lambda error: self._translate(key, error))

    def _translate(self, key: str, error: Exception) -> NoReturn:
        """Raise what an error of the client means."""
        uri = self.uri(key)
        if isinstance(error, _NO_ANSWER):
            raise Unavailable(_brief(error)) from error
        if isinstance(error, _NO_KEYS):
            raise Refusal(FailureCode.ACCESS_DENIED, f"there are no keys to read {uri} with", param=self.param) from error
        if isinstance(error, boto_errors.ParamValidationError):
            raise ObjectMissing(self.missing, f"{uri} is no address of an S3 object", param=self.param) from error
        if not isinstance(error, boto_errors.ClientError):
            raise error
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "404" and error.operation_name == "HeadObject":
            # The answer to HEAD has no body and so no code: an unknown access key and a missing bucket look like a missing object.
            self._ask_why(key, error)
        if code in _BUSY or status >= 500 or status == 429:
            raise Unavailable(f"{code or status}") from error
        if code in _DENIED or status in (401, 403):
            raise Refusal(FailureCode.ACCESS_DENIED, f"access to {uri} was denied ({code})", param=self.param) from error
        if code in ("NoSuchBucket", "InvalidBucketName"):
            raise ObjectMissing(self.missing, f"bucket {self.bucket} of {uri} does not exist", param=self.param) from error
        if code in _MISSING or status == 404:
            raise ObjectMissing(self.missing, f"{uri} does not exist", param=self.param) from error
        if status in (301, 307, 400) and code in (
            "PermanentRedirect",
            "AuthorizationHeaderMalformed",
            "301",
            "IllegalLocationConstraintException",
        ):
            raise Refusal(
                FailureCode.CONFIG_INVALID, f"bucket {self.bucket} of {uri} lies in another region; name it by AWS_REGION", param=self.param
            ) from error
        raise error

    def _ask_why(self, key: str, error: Exception) -> None:
        try:
            self._client.get_object(Bucket=self.bucket, Key=self._full(key), Range="bytes=0-0")["Body"].close()
        except boto_errors.ClientError as why:
            if why.response.get("Error", {}).get("Code") == "404":
                raise ObjectMissing(self.missing, f"{self.uri(key)} does not exist", param=self.param) from error
            self._translate(key, why)


class _Listed(BaseSubscriber):
    """Makes every request of a download ask for the object that was listed (If-Match), whose size needs no request."""

    def __init__(self, listed: ObjectInfo) -> None:
        self._listed = listed

    def on_queued(self, future: Any, **more: Any) -> None:
        """Called before the first request."""
        future.meta.provide_object_etag(f'"{self._listed.etag}"')
        future.meta.provide_transfer_size(self._listed.size)


_TRANSFER: Final = TransferConfig(multipart_threshold=32 * 2**20, multipart_chunksize=16 * 2**20, max_concurrency=4)
_ALONE: Final = TransferConfig(use_threads=False)  # one request needs no threads of its own


def _client(*, endpoint: str, region: str, keys: dict[str, str]) -> Any:
    # A session of its own: boto3's default session is shared state that is not safe to set up from several threads.
    session = boto3.session.Session()
    return session.client(
        "s3",
        endpoint_url=keys.get("AWS_ENDPOINT_URL") or endpoint or None,
        region_name=keys.get("AWS_REGION") or region or None,
        aws_access_key_id=keys.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=keys.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=keys.get("AWS_SESSION_TOKEN"),
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "max_attempts": 3},
            max_pool_connections=32,
            # Bucket names in the host name need a wildcard DNS entry that in-cluster servers do not have.
            s3={"addressing_style": "path" if keys.get("AWS_ENDPOINT_URL") or endpoint else "auto"},
            # Servers other than AWS's do not all know the newer checksums; our manifests carry SHA-256 anyway.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _batches(keys: Iterable[str]) -> Iterator[Sequence[str]]:
    iterator = iter(keys)
    while batch := list(itertools.islice(iterator, DELETE_BATCH)):
        yield batch


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
