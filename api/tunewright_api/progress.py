"""Progress reports of training pods, written to the job's status.

A pod proves itself by a projected token that the kubelet bound to it: TokenReview tells the pod's name and UID, the pod's labels tell the
job. Writes are few (``Pace``), atomic, and never reach a job that was deleted and made anew under the same name (the patch tests the UID).
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from tunewright_api.auth import Auth, Identity, Remembered
from tunewright_api.cache import Cache, Object
from tunewright_api.errors import Conflict, Forbidden, Gone, Invalid, Unavailable
from tunewright_api.kube import Kube, KubeError, KubeUnreachable
from tunewright_crds import names
from tunewright_crds.names import Phase
from tunewright_crds.pod import ProgressAnswer, ProgressReport, clean
from tunewright_crds.status import MAX_REQUEST, LastCheckpoint

MAX_JOBS: Final = 10_000  # jobs whose pace is remembered; one that falls out may write once more than it should
MAX_INTEGER: Final = 2**53 - 1  # what every JSON reader keeps exactly
MAX_DEPTH: Final = 8
_POD_NAME: Final = "authentication.kubernetes.io/pod-name"
_POD_UID: Final = "authentication.kubernetes.io/pod-uid"
_USER_PREFIX: Final = "system:serviceaccount:"


@dataclass
class _Written:
    at: float
    attempt: int
    finished: bool
    checkpoint: LastCheckpoint | None
    answered: str


class Pace:
    """Which reports are written: the first and the last of an attempt and an answer to a request at once, others at most every ``seconds`` a job."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._jobs: OrderedDict[str, _Written] = OrderedDict()

    def admit(self, report: ProgressReport) -> LastCheckpoint | bool:
        """Whether to write now; then the checkpoint to write with it (True: none is known), otherwise False."""
        uid, now = report.job.uid, self._clock()
        last = self._jobs.get(uid)
        # A checkpoint of a report that is not written goes with the next one that is.
        checkpoint = report.last_checkpoint or (last.checkpoint if last else None)
        progress = report.progress
        done, all_of_it = (progress.evaluated, progress.to_evaluate) if progress.to_evaluate else (progress.step, progress.max_steps)
        finished = 0 < all_of_it <= done
        answers = last is not None and checkpoint is not None and checkpoint.request not in ("", last.answered)
        due = (
            last is None
            or report.progress.attempt != last.attempt
            or (finished and not last.finished)
            or answers
            or now - last.at >= self._seconds
        )
        if last is not None and not due:
            last.checkpoint = checkpoint
            return False
        self._jobs[uid] = _Written(now, report.progress.attempt, finished, checkpoint, checkpoint.request if checkpoint else "")
        self._jobs.move_to_end(uid)
        while len(self._jobs) > MAX_JOBS:
            self._jobs.popitem(last=False)
        return checkpoint or True


class Progress:
    """Takes reports."""

    def __init__(self, *, kube: Kube, auth: Auth, cache: Cache, seconds: float) -> None:
        self._kube = kube
        self._auth = auth
        self._cache = cache
        self._pace = Pace(seconds)
        self._pods: Remembered[Object | None] = Remembered()

    async def take(self, token: str, body: dict[str, Any]) -> ProgressAnswer:
        """Checks and, where due, writes a report. Returns whether it was written, and what the job's owner asks of the pod."""
        who = await self._auth.identity(token, audience=names.PROGRESS_AUDIENCE)
        report = read_report(body)
        await self._check_sender(who, report)
        job = self._job(report)
        asked = clean((job["metadata"].get("annotations") or {}).get(names.CHECKPOINT_ANNOTATION, ""), limit=MAX_REQUEST)
        checkpoint = self._pace.admit(report)
        if checkpoint is not False:
            before = job.get("status", {}).get("progress", {})
            await self._write(report, before, checkpoint if isinstance(checkpoint, LastCheckpoint) else None)
        return ProgressAnswer(written=checkpoint is not False, checkpoint=asked)

    async def _check_sender(self, who: Identity, report: ProgressReport) -> None:
        """Raises Forbidden unless the caller is a running pod of the job."""
        namespace = who.username.removeprefix(_USER_PREFIX).partition(":")[0] if who.username.startswith(_USER_PREFIX) else ""
        name, uid = who.one(_POD_NAME), who.one(_POD_UID)
        if not (namespace and name and uid) or namespace != report.job.namespace:
            raise Forbidden("Only a pod of the job may report its progress: the token is not bound to a pod of the job's namespace.")
        pod = await self._pods.get((namespace, name, uid), lambda: self._pod(namespace, name))
        meta = (pod or {}).get("metadata", {})
        if meta.get("uid") != uid or meta.get("labels", {}).get(names.LABEL_JOB_UID) != report.job.uid:
            raise Forbidden("Only a pod of the job may report its progress: this pod belongs to another job or is gone.")

    async def _pod(self, namespace: str, name: str) -> Object | None:
        try:
            return await self._kube.get(f"/api/v1/namespaces/{namespace}/pods/{name}")
        except KubeUnreachable as error:
            raise Unavailable("The API server did not answer; try again.", retry_after=5) from error
        except KubeError as error:
            if error.status == 404:
                return None
            raise Unavailable("The front end may not read pods; its role is incomplete.", retry_after=60) from error

    def _job(self, report: ProgressReport) -> Object:
        """The job as it was last seen. Raises Gone or Conflict where the report comes too late."""
        job = self._cache.jobs.get(report.job.namespace, report.job.name)
        if job is None or job["metadata"]["uid"] != report.job.uid:
            raise Gone("The job is no more.")
        status = job.get("status", {})
        if status.get("phase") in [phase for phase in Phase if phase.terminal]:
            raise Gone("The job has ended.")
        if not report.progress.to_evaluate and status.get("progress", {}).get("attempt", 0) > report.progress.attempt:
            raise Conflict("A later attempt of the job reports already.")
        return job

    async def _write(self, report: ProgressReport, before: Object, checkpoint: LastCheckpoint | None) -> None:
        path = f"/apis/{names.API_VERSION}/namespaces/{report.job.namespace}/{names.JOBS}/{report.job.name}/status"
        try:
            await self._kube.json_patch(path, patch(report, before, checkpoint), manager=names.PROGRESS_MANAGER)
        except KubeUnreachable as error:
            raise Unavailable("The API server did not answer; try again.", retry_after=5) from error
        except KubeError as error:
            if error.status == 404:
                raise Gone("The job is no more.") from error
            # 409: someone wrote at the same moment. 422: the UID differs, or nobody has written a status yet.
            if error.status in (409, 422):
                raise Conflict("The job's status could not be written now; report again.", retry_after=5) from error
            raise Unavailable(f"The progress could not be written ({error.status}).", retry_after=60) from error


def patch(report: ProgressReport, before: Object, checkpoint: LastCheckpoint | None) -> list[dict[str, Any]]:
    """The JSON patch of the status; it fails as a whole where the job is another than the report's. An evaluation, which knows nothing of the training
    that was ``before``, adds to what that told."""
    progress = report.progress.model_dump(mode="json", by_alias=True, exclude_none=True)
    if report.progress.to_evaluate:
        progress = before | {name: progress[name] for name in ("evaluated", "toEvaluate", "lastUpdated")}
    operations: list[dict[str, Any]] = [
        {"op": "test", "path": "/metadata/uid", "value": report.job.uid},
        {"op": "add", "path": "/status/progress", "value": progress},
    ]
    if checkpoint:
        operations.append({"op": "add", "path": "/status/lastCheckpoint", "value": checkpoint.model_dump(mode="json", by_alias=True)})
    return operations


def read_report(body: dict[str, Any]) -> ProgressReport:
    """The typed report, its texts without control characters; raises Invalid with the field's name."""
    try:
        return ProgressReport.model_validate(_cleaned(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Invalid(f"{where}: {first['msg']}", param=where) from None


def _cleaned(value: Any, depth: int = MAX_DEPTH) -> Any:
    """``value`` with clean texts; raises Invalid for numbers that a status cannot hold, and for bodies that are made to exhaust the stack."""
    if not depth:
        raise Invalid(f"A report is nested at most {MAX_DEPTH} deep.")
    if isinstance(value, dict):
        return {key: _cleaned(child, depth - 1) for key, child in value.items()}
    if isinstance(value, list):
        return [_cleaned(child, depth - 1) for child in value]
    if isinstance(value, str):
        return clean(value, limit=2048)
    if isinstance(value, float) and not math.isfinite(value):
        raise Invalid("Numbers must be finite.")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise Invalid(f"Whole numbers must lie within ±{MAX_INTEGER}.")
    return value
