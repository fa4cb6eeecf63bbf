"""What tests use of the cluster: bring one up, and talk to it by kubectl."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .places import CHECKOUT
from .record import Facts, facts

WAIT_SECONDS = 180.0  # a pod starts in two; a loaded machine gets much more


def running(name: str = "test", *, control_plane_only: bool = False, controllers: bool = False) -> Facts:
    """The facts of a cluster that works; brought up by a program of its own, so that no test owns the cluster's processes."""
    wanted = [*(["--control-plane-only"] if control_plane_only else []), *(["--controllers"] if controllers else [])]
    command("up", "--name", name, *wanted)
    return facts(name)


def with_images(name: str = "test", *images: str) -> Facts:
    """The facts of a cluster that has the images (`operator`, `api`, `trainer`, `dev`), built if they are new."""
    command("images", "--name", name, *(word for image in images for word in ("--only", image)))
    return facts(name)


def command(*words: str) -> str:
    """Run a command of `tests.cluster` and return what it printed; it fails the test with its output."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster", *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, f"tests.cluster {' '.join(words)} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Kubectl:
    """kubectl as the administrator, in one namespace."""

    kubeconfig: Path
    namespace: str

    def __call__(self, *words: str, given: str | None = None) -> str:
        program = CHECKOUT / ".tunewright" / "bin" / "kubectl"
        done = subprocess.run(
            [str(program), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *words],
            input=given,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"kubectl {' '.join(words)} failed:\n{done.stdout}{done.stderr}"
        return done.stdout

    def create(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Create the resource and return it as the server answered."""
        answer: dict[str, Any] = json.loads(self("create", "-f", "-", "-o", "json", given=json.dumps(resource)))
        return answer

    def get(self, kind: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("get", kind, name, "-o", "json"))
        return found

    def wait(self, kind: str, name: str, until: Callable[[dict[str, Any]], bool], *, seconds: float = WAIT_SECONDS) -> dict[str, Any]:
        """Wait until the resource is as `until` says, and return it."""
        deadline = time.monotonic() + seconds
        while not until(found := self.get(kind, name)):
            assert time.monotonic() < deadline, (
                f"{kind} {name} is not as awaited after {seconds:.0f} s:\n{json.dumps(found.get('status'), indent=1)}"
            )
            time.sleep(0.2)
        return found
