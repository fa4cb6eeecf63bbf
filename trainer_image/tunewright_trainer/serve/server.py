"""Starting and stopping the engine."""

import logging
import math
import os
from pathlib import Path
from types import FrameType
from typing import Final

import torch
import uvicorn

from tunewright_crds import names
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import StorageSettings
from tunewright_trainer.architecture import auto_model
from tunewright_trainer.prepare.template import chat_template, load_tokenizer
from tunewright_trainer.serve.adapters import Adapters
from tunewright_trainer.serve.app import Draining, make_app
from tunewright_trainer.serve.engine import Engine, Served
from tunewright_trainer.storage import Place, Store, open_hub, open_store, open_volume
from tunewright_trainer.storage.places import read_keys
from tunewright_trainer.train.base import fetch_model

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 512
KEEP_ALIVE_SECONDS: Final = 75  # longer than what proxies use, so that these close first


def serve(*, base: str, namespace: str, storage: StorageSettings, work: Path, model_id: str, port: int, threads: int | None) -> None:
    """See `tunewright_trainer.serve.run`."""
    if threads or os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(threads or math.ceil(float(os.environ["OMP_NUM_THREADS"])))
    store = open_store(storage)
    folder = fetch_model(open_base(base, storage), work / "model")
    engine = load_engine(folder, model_id=model_id, uri=base)
    adapters = Adapters(engine, store, namespace=namespace, base_uri=base, work=work / "adapters")
    listen(engine, adapters, port=port)


def open_base(uri: str, storage: StorageSettings) -> Place:
    """The folder of the base model, opened with the model's own keys where such are mounted, else with the platform's."""
    if uri.startswith("hf://"):
        return open_hub(uri, read_keys(names.MODEL_CREDENTIALS), missing=FailureCode.MODEL_NOT_FOUND, param=uri)
    if uri.startswith("pvc://"):
        return open_volume(uri, missing=FailureCode.MODEL_NOT_FOUND, param=uri)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    own = Path(names.MODEL_CREDENTIALS)
    settings = storage.model_copy(update={"bucket": bucket, "prefix": ""})
    store: Store = open_store(settings, own if own.is_dir() else names.STORAGE_CREDENTIALS)
    return Place(store, key)


def load_engine(folder: Path, *, model_id: str = names.ENGINE_BASE_ID, uri: str = "") -> Engine:
    """The engine over the model of a local folder; on the GPU if there is one."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    try:
        network = auto_model(folder).from_pretrained(
            folder,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED, f"the model cannot be loaded: {str(error).splitlines()[0][:300]}", param=uri
        ) from error
    served = Served(id=model_id, template=chat_template(folder), uri=uri)
    return Engine(network.to("cuda" if on_gpu else "cpu"), load_tokenizer(folder), served)


def listen(engine: Engine, adapters: Adapters, *, port: int) -> None:
    """Answer requests until SIGTERM; those in flight then are finished, new ones get 503."""
    draining = Draining()
    config = uvicorn.Config(
        make_app(engine, adapters, draining),
        host="0.0.0.0",  # noqa: S104 - a pod is reached by its address; a NetworkPolicy says by whom
        port=port,
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    log.info("serving on port %d", port)
    _Server(config, engine, draining).run()
    engine.close()


class _Server(uvicorn.Server):
    """uvicorn closes its port at once on SIGTERM, and a client gets a refused connection; here it gets 503 until the last answer is out."""

    def __init__(self, config: uvicorn.Config, engine: Engine, draining: Draining) -> None:
        super().__init__(config)
        self._engine = engine
        self._draining = draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        self._draining.begun = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        if self._draining.begun and not self._engine.open_requests:
            return True
        return await super().on_tick(counter)
