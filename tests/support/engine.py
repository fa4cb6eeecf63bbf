"""The built-in engine as a process of its own, as a pod runs it.

    with EngineProcess(base="s3://platform/base/", namespace="team-a", server=s3, bucket="platform", work=tmp_path) as engine:
        client = engine.client()

Started as ``python -m tests.support.engine``, it serves with a scratch folder other than the pod's.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import openai

from tests.cluster.network import free_port
from tests.support.s3 import REGION, S3Server

START_SECONDS: Final = 180
STOP_SECONDS: Final = 120
_ROOT: Final = Path(__file__).parents[2]


class EngineProcess:
    """Ready when the block begins, gone when it ends."""

    def __init__(self, *, base: str, namespace: str, server: S3Server, bucket: str, work: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port(taken=set())}"
        self._options = {"base": base, "namespace": namespace, "bucket": bucket, "endpoint": server.endpoint, "work": str(work)}
        self._options["port"] = self.url.rpartition(":")[2]
        self._environment = os.environ | server.keys | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        self._log = work / "engine.log"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.engine", json.dumps(self._options)],
                env=self._environment,
                cwd=_ROOT,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while self.health() != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._end()
                raise RuntimeError(f"the engine does not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        """Wait for the end."""
        return self.process.wait(STOP_SECONDS)

    def health(self) -> int:
        """Status of GET /health; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def client(self) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return int(answer.status), json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def metrics(self) -> str:
        """Prometheus's text."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            return str(answer.read().decode())


def _serve(options: dict[str, str]) -> None:
    from tunewright_crds.pod import StorageSettings
    from tunewright_trainer import process, serve

    process.watch_for_stop()
    process.set_up_log()
    storage = StorageSettings(bucket=options["bucket"], endpoint=options["endpoint"], region=REGION)
    with process.ending("serve"):
        serve.run(
            base=options["base"],
            namespace=options["namespace"],
            storage=storage,
            port=int(options["port"]),
            work=Path(options["work"]) / "scratch",
        )


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
