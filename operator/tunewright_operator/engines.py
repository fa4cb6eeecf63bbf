"""HTTP to serving pods: what they hold, and loading and unloading adapters. Every request is bounded in time and size."""

from types import TracebackType
from typing import Any, Final

import aiohttp
import orjson

from tunewright_crds import names
from tunewright_crds.pod import clean
from tunewright_operator.models import Holdings, Load

_ASK_SECONDS: Final = 5.0
_LOAD_SECONDS: Final = 120.0  # downloads an adapter and answers one request with it
_MAX_ANSWER_BYTES: Final = 1_000_000


class EngineError(Exception):
    """An engine did not do what it was asked to."""


class Engines:
    """A client of engine pods."""

    def __init__(self, *, port: int = names.ENGINE_PORT) -> None:
        self._port = port
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Engines":
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session:
            await self._session.close()

    async def holdings(self, ip: str) -> Holdings:
        """Ids and versions of the models that a pod holds; raises ``EngineError``."""
        answer = await self._request("GET", ip, "/v1/models", seconds=_ASK_SECONDS)
        entries = answer.get("data")
        if not isinstance(entries, list):
            raise EngineError("/v1/models did not answer with a list")
        return {str(entry["id"]): str(entry.get("version") or "") for entry in entries if isinstance(entry, dict) and "id" in entry}

    async def carry_out(self, load: Load) -> None:
        """Loads or unloads one adapter in one pod; raises ``EngineError``."""
        if load.uri:
            body = {"lora_name": load.model, "lora_path": load.uri, "version": load.version}
            await self._request("POST", load.pod.ip, "/v1/load_lora_adapter", body=body, seconds=_LOAD_SECONDS)
        else:
            await self._request("POST", load.pod.ip, "/v1/unload_lora_adapter", body={"lora_name": load.model}, seconds=_ASK_SECONDS)

    async def _request(self, method: str, ip: str, path: str, *, body: dict[str, str] | None = None, seconds: float) -> dict[str, Any]:
        if self._session is None:
            raise RuntimeError("use the engines within `async with`")
        host = f"[{ip}]" if ":" in ip else ip
        url = f"http://{host}:{self._port}{path}"
        timeout = aiohttp.ClientTimeout(total=seconds, connect=_ASK_SECONDS)
        try:
            async with self._session.request(method, url, json=body, timeout=timeout, allow_redirects=False) as answer:
                raw = await answer.content.read(_MAX_ANSWER_BYTES)
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineError(f"{path}: {type(error).__name__}") from error
        found = _object(raw)
        if status != 200:
            told = found.get("error")
            raise EngineError(clean(f"{path}: {status} {told.get('message', '') if isinstance(told, dict) else ''}", limit=512))
        return found


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
