"""Training attempts as processes of their own, that tests may kill.

    with Nursery() as nursery:
        attempts = Attempts(nursery, tmp_path)
        code = attempts.run(config, attempt=1, digest=digest, kill_at_write=3)

Importing torch takes seconds, so one nursery process does it once and forks for each attempt; the fork has computed nothing yet, so it is as a new
process would be. Started as ``python -m tests.support.trainer_runs``, it reads one JSON command a line.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.support.training import poison
from tunewright_crds.pod import Outcome, PodConfig

LIMIT_SECONDS: Final = 120.0
PAUSED: Final = "paused"
MESSAGE: Final = "termination-message"
_ROOT: Final = Path(__file__).parents[2]


class Nursery:
    """The process that attempts are forked from; at the end of the block it is gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.trainer_runs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])},
            cwd=_ROOT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def tell(self, command: dict[str, Any]) -> None:
        """Begin an attempt."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> int:
        """How the attempt ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery of training processes died"
        return int(line)


class Attempts:
    """Runs attempts one after another, each with a scratch folder of its own; the store is the folder ``store`` of ``work``, or S3."""

    def __init__(self, nursery: Nursery, work: Path) -> None:
        self.work = work
        self.message = work / MESSAGE
        self._nursery = nursery

    def start(self, config: PodConfig, *, attempt: int, digest: str, **harm: Any) -> None:
        """Begin an attempt. ``harm``: ``processes=N`` that train together; ``environment={...}``; ``kill_at_write=N``; ``poisoned=[N, ...]``, steps whose loss is no number; ``terminate_at_step=N``, of several processes the last; ``pause_at_step=N``, until `go_on`; ``s3`` true takes the config's
        storage, with the keys in the folder ``keys``."""
        self.message.unlink(missing_ok=True)
        plain = config.model_dump(mode="json", by_alias=True)
        self._nursery.tell({"config": plain, "attempt": attempt, "digest": digest, "work": str(self.work), **harm})

    @property
    def paused(self) -> bool:
        """Whether the attempt has come to the step to pause at."""
        return (self.work / PAUSED).exists()

    def go_on(self) -> None:
        """Let a paused attempt go on."""
        (self.work / PAUSED).unlink()

    def wait(self) -> int:
        """The exit code of the attempt that was begun; minus the signal that killed it."""
        return self._nursery.answer()

    def run(self, config: PodConfig, *, attempt: int, digest: str, **harm: Any) -> int:
        """One attempt to its end."""
        self.start(config, attempt=attempt, digest=digest, **harm)
        return self.wait()

    def outcome(self) -> Outcome:
        """What the last attempt reported."""
        return Outcome.model_validate_json(self.message.read_text(encoding="utf-8"))


def _nursery() -> None:
    import peft  # noqa: F401
    import transformers.generation
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tunewright_trainer.train.recipe  # noqa: F401

    for line in sys.stdin:
        command = json.loads(line)
        size = command.get("processes", 1)
        world = {"WORLD_SIZE": size, **_rendezvous()} if size > 1 else {}
        children = [_forked(command, rank, world) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(codes[0], flush=True)


def _rendezvous() -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1]}


def _forked(command: dict[str, Any], rank: int, world: dict[str, Any]) -> int:
    """The process that does the attempt, or one of several that do it together."""
    child = os.fork()
    if not child:
        try:
            os.environ |= {name: str(value) for name, value in world.items()}
            if world:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _attempt(command)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)  # the attempt itself ends the process; this is for mistakes of this file
    return child


def _attempt(command: dict[str, Any]) -> None:
    """What `tunewright-trainer train` does, with the harm that the test asked for."""
    from tunewright_trainer import process, train
    from tunewright_trainer.storage import LocalStore, open_store

    work = Path(command["work"])
    message = MESSAGE + os.environ.get("RANK", "").replace("0", "")
    os.environ |= {"TUNEWRIGHT_TERMINATION_MESSAGE": str(work / message), **command.get("environment", {})}
    process.watch_for_stop()
    process.set_up_log()
    config = _config(command["config"])
    store = (
        open_store(config.storage, work / "keys")
        if command.get("s3")
        else _deadly(LocalStore)(work / "store", command.get("kill_at_write"))
    )
    if "terminate_at_step" in command and int(os.environ.get("RANK", "0")) == command.get("processes", 1) - 1:
        _before_step(command["terminate_at_step"], _terminate)
    if "poisoned" in command:
        poison(setattr, command["poisoned"])
    if "pause_at_step" in command:
        _before_step(command["pause_at_step"], lambda: _pause(work / PAUSED))
    try:
        with process.ending("train") as end:
            end.outcome = train.run(
                config,
                attempt=command["attempt"],
                dataset_digest=command["digest"],
                work=work / f"scratch-{command['attempt']}",
                store=store,
            )
    except SystemExit as stop:
        os._exit(int(stop.code or 0))


def _config(plain: dict[str, Any]) -> PodConfig:
    from tunewright_crds.job import read_spec
    from tunewright_crds.pod import JobIdentity, StorageSettings

    return PodConfig.model_construct(
        job=JobIdentity(**plain["job"]),
        spec=read_spec(plain["spec"], local=True),
        storage=StorageSettings(**plain["storage"]),
        version=plain["version"],
        progress_url=plain["progress_url"],
    )


def _deadly(kind: Any) -> Any:
    """A local store that kills its process in the middle of a given write, counted from 1."""

    class DeadlyStore(kind):  # type: ignore[misc]
        def __init__(self, root: Path, kill_at: int | None) -> None:
            super().__init__(root)
            self._kill_at = kill_at
            self._writes = 0

        def _write(self, key: str, fill: Any) -> None:
            self._writes += 1
            if self._writes == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            super()._write(key, fill)

    return DeadlyStore


def _before_step(step: int, harm: Callable[[], None]) -> None:
    """Do harm when ``step`` begins to be computed."""
    from tunewright_trainer.train import recipe

    plain = recipe.Run.step

    def harmed(run: recipe.Run) -> None:
        if run.counters.step + 1 == step:
            harm()
        plain(run)

    recipe.Run.step = harmed  # type: ignore[method-assign, assignment]


def _terminate() -> None:
    """SIGTERM, twice as an impatient kubelet might."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def _pause(mark: Path) -> None:
    mark.touch()
    while mark.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    _nursery()
