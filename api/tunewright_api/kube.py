"""A thin client of the Kubernetes API server: JSON in, JSON out, every call with a time-out.

KubeError            the server said no; ``status`` is its HTTP status
└── KubeUnreachable  it did not answer at all (status 0)
"""

import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import orjson

from tunewright_api.settings import Settings

TIMEOUT: Final = httpx.Timeout(10, connect=5)
# Beyond the server's own end of a watch: if it stays silent longer than that, the connection is dead.
WATCH_SLACK_SECONDS: Final = 15
# The kubelet rotates tokens at four fifths of their life; reading the file once a minute is early enough.
TOKEN_READ_SECONDS: Final = 60
# One object is at most 1.5 MiB in etcd; JSON on the wire may be a few times that.
MAX_LINE_BYTES: Final = 16 * 2**20
MAX_MESSAGE: Final = 500


class KubeError(Exception):
    """The API server refused a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class KubeUnreachable(KubeError):
    """The API server did not answer, or failed with a 5xx or 429: worth another try."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(status, message)


class RotatingToken(httpx.Auth):
    """The bearer token of a file that is replaced now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = ""
        self._read_at = float("-inf")

    def auth_flow(self, request: httpx.Request) -> Any:
        if time.monotonic() - self._read_at > TOKEN_READ_SECONDS:
            self._token = self._path.read_text(encoding="utf-8").strip()
            self._read_at = time.monotonic()
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


class Kube:
    """The API server. ``close`` when done."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @classmethod
    def connect(cls, settings: Settings) -> "Kube":
        """A client as the settings tell; no call is made yet."""
        verify = ssl.create_default_context(cafile=str(settings.kube_ca_file)) if settings.kube_url.startswith("https:") else False
        # trust_env=False: a proxy of the environment is for the world outside, never for the API server.
        return cls(
            httpx.AsyncClient(
                base_url=settings.kube_url, auth=RotatingToken(settings.kube_token_file), verify=verify, timeout=TIMEOUT, trust_env=False
            )
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str, **query: str | int) -> dict[str, Any]:
        """One object or list."""
        return await self._call("GET", path, params=query)

    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The object as the server made it."""
        return await self._call("POST", path, content=orjson.dumps(body), headers={"Content-Type": "application/json"})

    async def json_patch(self, path: str, operations: list[dict[str, Any]], *, manager: str) -> dict[str, Any]:
        """Applies a JSON patch (RFC 6902) as the field manager ``manager``."""
        headers = {"Content-Type": "application/json-patch+json"}
        return await self._call("PATCH", path, content=orjson.dumps(operations), headers=headers, params={"fieldManager": manager})

    async def watch(self, path: str, *, version: str, seconds: int) -> AsyncIterator[dict[str, Any]]:
        """Events since ``version``, until the server ends the watch after ``seconds``. Raises KubeError (410: list again)."""
        query: dict[str, str | int] = {"watch": 1, "allowWatchBookmarks": "true", "resourceVersion": version, "timeoutSeconds": seconds}
        timeout = httpx.Timeout(10, connect=5, read=seconds + WATCH_SLACK_SECONDS)
        try:
            async with self._client.stream("GET", path, params=query, timeout=timeout) as answer:
                if answer.status_code != 200:
                    raise _error(answer.status_code, await answer.aread())
                async for line in _lines(answer):
                    event: dict[str, Any] = orjson.loads(line)
                    if event["type"] == "ERROR":
                        raise KubeError(event["object"].get("code", 500), event["object"].get("message", ""))
                    yield event
        except (httpx.HTTPError, orjson.JSONDecodeError, OSError) as error:
            raise KubeUnreachable(f"the watch of {path} broke: {error!r}") from error

    async def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer = await self._client.request(method, path, **arguments)
            if answer.status_code >= 300:
                raise _error(answer.status_code, answer.content)
            found: dict[str, Any] = orjson.loads(answer.content)
        except (httpx.HTTPError, orjson.JSONDecodeError, OSError) as error:
            raise KubeUnreachable(f"{method} {path}: {error!r}") from error
        return found


def _error(status: int, body: bytes) -> KubeError:
    try:
        message = str(orjson.loads(body)["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = body.decode(errors="replace")
    message = message[:MAX_MESSAGE]
    return KubeUnreachable(message, status) if status >= 500 or status == 429 else KubeError(status, message)


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Lines split at ``\\n`` only: ``aiter_lines`` also splits at U+0085 and U+2028, which may stand inside a JSON text."""
    rest = b""
    async for chunk in answer.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line
        if len(rest) > MAX_LINE_BYTES:
            raise KubeUnreachable("a watch event is larger than any object can be")
