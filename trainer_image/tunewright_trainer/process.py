"""How a verb of the trainer begins and ends: signals, exit codes, the termination message."""

import errno
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Final

from tunewright_crds import names
from tunewright_crds.errors import ADVICE, ExitCode, FailureCode, Refusal
from tunewright_crds.pod import Failed, Outcome, clean

log = logging.getLogger(__name__)

TERMINATION_MESSAGE_VARIABLE: Final = "TUNEWRIGHT_TERMINATION_MESSAGE"
"""Names the file of the termination message, where it is not the kubelet's."""

stop_requested: Final = threading.Event()
"""Set by SIGTERM. Long loops look at it and raise `Stopped`."""

work_under_way: Final = threading.Event()
"""Set by a verb that from now on has something to save or to clear away before it stops. Until then SIGTERM ends the process at once."""


class Stopped(Exception):
    """The process was asked to stop and has saved what it had to; ends with `ExitCode.STOPPED`."""

    def __init__(self, outcome: Outcome | None = None) -> None:
        super().__init__("stopped on request")
        self.outcome = outcome or Outcome()


@dataclass
class Ending:
    """What the verb reports; the verb sets `outcome` when it is done."""

    outcome: Outcome = field(default_factory=Outcome)


def watch_for_stop() -> None:
    """Obey SIGTERM from now on. To be called before heavy imports: the first process of a container never gets a signal that it has no
    handler for, so one that came earlier would be lost and the pod killed at the end of its grace."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    if work_under_way.is_set():
        stop_requested.set()
        return
    log.info("stopped on request, while starting")
    write_termination_message(Outcome())
    os._exit(int(ExitCode.STOPPED))  # an exception could be caught by whatever is being imported just now


def raise_if_stopped() -> None:
    """Raise `Stopped` once the process was asked to stop."""
    if stop_requested.is_set():
        raise Stopped


def thread_count(cpu: str) -> int:
    """Threads for a Kubernetes quantity of processors, rounded up: `1500m` gives 2."""
    count = Decimal(cpu[:-1]) / 1000 if cpu.endswith("m") else Decimal(cpu)
    return max(1, math.ceil(count))


def do_without(*libraries: str) -> None:
    """Keep others from loading libraries merely because they are installed. Python's own way: None in the table makes an import fail.

    Without torch, preparing starts in a quarter of the time and half of the memory.
    """
    for name in libraries:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextmanager
def ending(verb: str, *, quote_errors: bool = True) -> Iterator[Ending]:
    """Ends the process as the platform expects: a readable line or two in the log, the termination message, and `SystemExit` with the exit code.

    Inside, a verb sets `.outcome`, or raises: `Stopped`, `Refusal`, or anything else, which is a fault of ours. An `outcome` attribute that
    `telling` left on the error is reported with it. `quote_errors` false keeps the texts of unforeseen errors, which may quote data, out of log and message.
    """
    end = Ending()
    try:
        yield end
        code = ExitCode.DONE
    except Stopped as stop:
        end.outcome, code = stop.outcome, ExitCode.STOPPED
        log.info("%s stopped on request", verb)
    except Exception as error:
        refusal = as_refusal(verb, error, quote=quote_errors)
        told = getattr(error, "outcome", None)
        end.outcome = told if isinstance(told, Outcome) else end.outcome
        end.outcome.error = Failed(code=refusal.code, message=refusal.message, param=refusal.param)
        code = refusal.exit_code
        log.error("%s failed: %s%s", verb, clean(refusal.message), f" ({clean(refusal.param)})" if refusal.param else "")
        log.error("what to do: %s", ADVICE[refusal.code])
    write_termination_message(end.outcome)
    logging.shutdown()
    raise SystemExit(int(code))


@contextmanager
def telling(outcome: Outcome) -> Iterator[None]:
    """Whatever is raised inside carries `outcome` to `ending`, so that a failed attempt still tells how far it got."""
    try:
        yield
    except Exception as error:
        error.outcome = outcome  # type: ignore[attr-defined]
        raise


def as_refusal(verb: str, error: Exception, *, quote: bool = True) -> Refusal:
    """What an error means to the user. The traceback of an unforeseen one goes to the log."""
    if isinstance(error, Refusal):
        return error
    if is_out_of_memory(error):
        return Refusal(FailureCode.OUT_OF_MEMORY, f"{verb} ran out of memory: {_first_line(error) if quote else type(error).__name__}")
    if is_lost_peer(error):
        return Refusal(FailureCode.PEER_LOST, f"a process that trains together with this one went away: {_first_line(error)}")
    if is_disk_full(error):
        return Refusal(FailureCode.CONFIG_INVALID, "the scratch volume is full; ask for a larger one", param="spec.resources.scratch")
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("unforeseen %s in %s%s\n%s", type(error).__name__, verb, f": {error}" if quote else "", frames)
    text = f": {_first_line(error)}" if quote and str(error) else ""
    return Refusal(FailureCode.INTERNAL, f"unforeseen {type(error).__name__} in {verb}{text}")


def is_disk_full(error: BaseException) -> bool:
    """Whether no space was left on the disk. Libraries written in other languages, as safetensors, say so in words only."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or os.strerror(errno.ENOSPC) in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the processor or on a GPU. Asks by name, so that torch need not be loaded to know."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process went away, in the words of gloo, of NCCL and of torch's store. Asks by name, as above."""
    if any(kind.__name__ in ("DistNetworkError", "DistStoreError") for kind in type(error).__mro__):
        return "EADDRINUSE" not in str(error)
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo/transport/", "ncclRemoteError", "NCCL communicator was aborted")
    )


def write_termination_message(outcome: Outcome) -> None:
    """Write what the operator reads. Never fails: without a place to write to (on a laptop), there is nobody to read."""
    wanted = os.environ.get(TERMINATION_MESSAGE_VARIABLE)
    path = Path(wanted or names.TERMINATION_MESSAGE)
    if not wanted and not path.exists():
        return
    try:
        path.write_text(outcome.bounded(), encoding="utf-8")
    except OSError as error:
        log.warning("the termination message cannot be written to %s: %s", path, error.strerror)


def set_up_log() -> None:
    """One line an event on standard error, with the time in UTC."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("botocore", "boto3", "s3transfer", "urllib3", "httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Said by libraries to one another's authors.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
