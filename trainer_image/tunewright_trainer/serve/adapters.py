"""Bringing adapters from storage to the engine."""

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.tuned_model import Kind
from tunewright_trainer.publish.files import TEMPLATE_FILE
from tunewright_trainer.serve.engine import Engine
from tunewright_trainer.serve.protocol import ApiError, LoadRequest
from tunewright_trainer.storage import Damaged, Store, fetch_folder


class Adapters:
    """Loads adapters from the folders of one namespace in ``store``, over the base at ``base_uri``. One load at a time."""

    def __init__(self, engine: Engine, store: Store, *, namespace: str, base_uri: str, work: Path) -> None:
        self._engine = engine
        self._store = store
        self._folder = f"{namespace}/models/"
        self._base_uri = base_uri
        self._work = work
        self._lock = threading.Lock()

    def load(self, wanted: LoadRequest) -> None:
        """Serve an adapter; at once where it is served already. Blocks while it downloads. Raises `ApiError`."""
        key = self._key(wanted.lora_path)
        with self._lock:
            served = self._engine.adapters.get(wanted.lora_name)
            if served is not None and (served.uri, served.version) == (wanted.lora_path, wanted.version):
                return
            self._work.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._work))
            try:
                self._check(self._fetch(key, folder))
                template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
                self._engine.load(wanted.lora_name, folder, version=wanted.version, uri=wanted.lora_path, template=template)
            except (OSError, ValueError, RuntimeError) as error:
                raise ApiError(400, f"the adapter cannot be loaded: {str(error).splitlines()[0][:300]}", param="lora_path") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def unload(self, name: str) -> None:
        """Serve an adapter no longer. Raises `ApiError`."""
        with self._lock:
            self._engine.unload(name)

    def _key(self, uri: str) -> str:
        """The store's key for an address, which must lie in this namespace's own folder."""
        root = self._store.uri(self._folder).rstrip("/") + "/"
        rest = uri.removeprefix(root).rstrip("/")
        if not uri.startswith(root) or not rest or any(part in ("", ".", "..") for part in rest.split("/")):
            raise ApiError(400, f"adapters are loaded from below {root} only", param="lora_path")
        return self._folder + rest

    def _fetch(self, key: str, folder: Path) -> dict[str, Any]:
        try:
            manifest = fetch_folder(self._store, key, folder)
        except Damaged as error:
            raise ApiError(400, error.message, param="lora_path") from error
        except Refusal as error:
            status = 503 if error.code in (FailureCode.STORAGE_UNAVAILABLE, FailureCode.STORAGE_DAMAGED) else 400
            raise ApiError(status, error.message, param="lora_path") from error
        if manifest is None:
            raise ApiError(404, f"there is no published model at {self._store.uri(key)}", param="lora_path", code="model_not_found")
        return manifest

    def _check(self, manifest: dict[str, Any]) -> None:
        if manifest.get("kind") != Kind.ADAPTER:
            raise ApiError(400, f"the model is of kind {manifest.get('kind')}, not an adapter", param="lora_path")
        if manifest.get("base", "").rstrip("/") != self._base_uri.rstrip("/"):
            raise ApiError(
                400, f"the adapter belongs over {manifest.get('base')}, and this engine serves {self._base_uri}", param="lora_path"
            )
