"""The platform as its users have it: a cluster, the chart installed with helm, kubectl, and the front end behind a port-forward."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.config
import httpx

from tests.cluster import Facts, facts
from tests.cluster.places import BIN

ROOT = Path(__file__).parents[2]
RELEASE = "tunewright"
SYSTEM_NAMESPACE = "tunewright-system"
BUCKET = "tunewright"
UP_SECONDS = 3000  # with every program built from source
INSTALL_SECONDS = 240

# Tests should not wait as long as people's jobs may: the same settings, smaller.
IMPATIENT = {
    "operator.settings.backoffBaseSeconds": "1",
    "operator.settings.backoffCapSeconds": "2",
    "operator.settings.graceSeconds": "60",
    "api.progressSeconds": "1",
}

T = TypeVar("T")


class CommandFailed(AssertionError):
    """A program ended with an error; the text holds what it said."""


def run(*command: str, stdin: str | None = None, env: dict[str, str] | None = None, timeout: float = 60) -> str:
    """What a program prints; raises ``CommandFailed`` with its error output."""
    done = subprocess.run(command, input=stdin, env=env, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)
    if done.returncode:
        raise CommandFailed(f"{' '.join(command[:8])} …: exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def wait_for(what: str, look: Callable[[], T], *, seconds: float, every: float = 0.5, context: Callable[[], str] = lambda: "") -> T:
    """The first truthy value of ``look``; raises ``AssertionError`` with ``context()`` when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:.0f} s; last seen: {seen!r}\n{context()}")
        time.sleep(every)


@dataclass(frozen=True)
class Kubectl:
    """kubectl on one cluster, as one person."""

    kubeconfig: Path
    arguments: tuple[str, ...] = ()

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"KUBECONFIG": str(self.kubeconfig)}

    def __call__(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        return run(str(BIN / "kubectl"), *self.arguments, *arguments, stdin=stdin, env=self.env, timeout=timeout)

    def apply(self, *objects: dict[str, Any]) -> str:
        """``kubectl apply`` of objects."""
        return self("apply", "-f", "-", stdin="\n---\n".join(json.dumps(thing) for thing in objects))

    def get(self, *arguments: str) -> Any:
        """What ``kubectl get -o json`` answers."""
        return json.loads(self("get", *arguments, "-o", "json"))

    def find(self, *arguments: str) -> Any | None:
        """Like ``get``; nothing where there is nothing."""
        said = self("get", *arguments, "-o", "json", "--ignore-not-found")
        return json.loads(said) if said.strip() else None

    def token(self, account: str, namespace: str) -> str:
        """A token of a ServiceAccount, as ``kubectl create token`` gives it."""
        return self("create", "token", account, "-n", namespace, "--duration=1h").strip()


@dataclass(frozen=True)
class Stack:
    """A cluster with the platform on it."""

    facts: Facts

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(self.facts.kubeconfig)

    def s3(self) -> Any:
        """A client of the cluster's object storage."""
        return boto3.client(
            "s3",
            endpoint_url=self.facts.s3.endpoint,
            aws_access_key_id=self.facts.s3.access_key,
            aws_secret_access_key=self.facts.s3.secret_key,
            region_name=self.facts.s3.region,
            config=botocore.config.Config(connect_timeout=5, read_timeout=30, retries={"max_attempts": 3}),
        )

    def make_bucket(self, name: str) -> None:
        """Makes a bucket, or finds it made."""
        client = self.s3()
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=name)

    def make_namespace(self, name: str, *, account: str, role: str) -> None:
        """A namespace whose pods must be ``restricted``, with its storage Secret, and a ServiceAccount with a built-in role in it."""
        self.kubectl.apply(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
            },
            self.storage_secret(name),
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": name}},
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": {"name": account, "namespace": name},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": name}],
            },
        )

    def storage_secret(self, namespace: str, name: str = "tunewright-storage") -> dict[str, Any]:
        """The Secret with which a namespace's pods reach storage."""
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "stringData": {"AWS_ACCESS_KEY_ID": self.facts.s3.access_key, "AWS_SECRET_ACCESS_KEY": self.facts.s3.secret_key},
        }

    def install(self, settings: dict[str, str] | None = None) -> None:
        """``helm upgrade --install`` with the images and the storage of this cluster; waits until everything is ready."""
        values = {
            "image.registry": "",
            "operator.image": self.facts.images["operator"],
            "api.image": self.facts.images["api"],
            "trainer.image": self.facts.images["trainer" if self.facts.external else "dev"],
            "trainer.runtimeClassName": self.facts.runtime_class or "",
            "storage.bucket": BUCKET,
            "storage.endpoint": self.facts.s3.endpoint_in_cluster,
            "storage.region": self.facts.s3.region,
        } | (settings or {})
        chosen = [argument for key, value in values.items() for argument in ("--set", f"{key}={value}")]
        self.make_bucket(BUCKET)
        command = ("upgrade", "--install", RELEASE, "charts/tunewright", "--namespace", SYSTEM_NAMESPACE, "--create-namespace", "--wait")
        try:
            self.helm(*command, f"--timeout={INSTALL_SECONDS}s", *chosen)
        except CommandFailed as failed:
            raise CommandFailed(f"{failed}\n{self.system_pods()}") from None

    def system_pods(self) -> str:
        """State and last words of the platform's own pods, for a message of what went wrong."""
        where = ("-n", SYSTEM_NAMESPACE)
        logs = [
            f"--- {name}\n{self.kubectl('logs', name, *where, '--tail=20', '--ignore-errors')}"
            for name in self.kubectl("get", "pods", *where, "-o", "name").split()
        ]
        return "\n".join([self.kubectl("get", "pods", *where), *logs])

    def helm(self, *arguments: str) -> str:
        """helm on this cluster."""
        return run(str(BIN / "helm"), *arguments, env=self.kubectl.env, timeout=INSTALL_SECONDS + 30)

    @contextlib.contextmanager
    def front_end(self) -> Iterator[str]:
        """The address of the front end while a ``kubectl port-forward`` to its Service runs."""
        command = (str(BIN / "kubectl"), "port-forward", "-n", SYSTEM_NAMESPACE, f"service/{RELEASE}-api", ":80")
        with subprocess.Popen(command, env=self.kubectl.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as forward:
            try:
                assert forward.stdout
                said = forward.stdout.readline()  # Forwarding from 127.0.0.1:40123 -> 8000
                assert "127.0.0.1:" in said, said + (forward.stdout.read() if forward.poll() is not None else "")
                address = f"http://127.0.0.1:{said.split('127.0.0.1:')[1].split()[0]}"
                wait_for("the front end answers", lambda: answers(f"{address}/readyz"), seconds=60)
                yield address
            finally:
                forward.terminate()
                forward.wait(10)


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def cluster(*arguments: str, timeout: float = UP_SECONDS) -> None:
    """``python3 -m tests.cluster``; what it prints goes through."""
    subprocess.run([sys.executable, "-m", "tests.cluster", *arguments], check=True, timeout=timeout, cwd=ROOT)


def installed_stack(name: str, settings: dict[str, str] | None = None) -> Stack:
    """The platform on the cluster ``name``: started, its images built and imported, the chart installed; what is done already is not done again."""
    cluster("up", "--name", name)
    if not facts(name).external:
        cluster("images", "--name", name)
    stack = Stack(facts(name))
    stack.install(settings)
    return stack
