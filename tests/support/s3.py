"""A real S3 server for tests: versitygw over a folder, on a free port.

with S3Server(tmp_path) as s3:
    s3.client().create_bucket(Bucket="data")
    ...
    s3.stop(); s3.start()  # an outage: same port, same objects
"""

import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import boto3
from botocore.config import Config

from tests.cluster.build import program_path
from tests.cluster.network import free_port
from tests.cluster.storage import speaks_s3

ACCESS_KEY: Final = "tester"
SECRET_KEY: Final = "tester-secret"
REGION: Final = "us-east-1"
_START_SECONDS: Final = 60


class S3Server:
    """An S3 server with one account. Nothing is kept after the block but the objects' files under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "s3"
        self._folder.mkdir(parents=True)
        self._port = free_port(taken=set())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def keys(self) -> dict[str, str]:
        """What a credentials Secret holds."""
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

    def client(self) -> Any:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}),
        )

    def start(self) -> None:
        """Start the server; returns when it answers."""
        command = [str(program_path("versitygw")), "--port", f"127.0.0.1:{self._port}", "--region", REGION, "--quiet", "posix"]
        environment = {**os.environ, "ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
        self._process = subprocess.Popen(
            [*command, str(self._folder)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _START_SECONDS
        while not speaks_s3(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("versitygw does not start")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill the server, as an outage does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
