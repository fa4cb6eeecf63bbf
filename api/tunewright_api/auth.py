"""Who calls, and what they may do: TokenReview, then SubjectAccessReview, by the API server alone.

Answers are kept for ``KEEP_SECONDS``, in bounded memory, and asked for once however many requests wait for them. Tokens are kept as
hashes. If the API server cannot be asked, nobody gets in (503). No header of a proxy is believed.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from tunewright_api.errors import Forbidden, Unauthenticated, Unavailable
from tunewright_api.kube import Kube, KubeError
from tunewright_crds import names

KEEP_SECONDS: Final = 10  # a revoked token or right works at most this much longer
MAX_KEPT: Final = 4096
MAX_TOKEN: Final = 16_384
MAX_PARALLEL_REVIEWS: Final = 16
_TOKEN_REVIEWS: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
_ACCESS_REVIEWS: Final = "/apis/authorization.k8s.io/v1/subjectaccessreviews"

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """An authenticated caller, as TokenReview tells."""

    username: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def one(self, key: str) -> str:
        """The first value of an extra, or ``""``."""
        return next((values[0] for name, values in self.extra if name == key and values), "")


@dataclass(frozen=True)
class Action:
    """Something that a caller wants to do: on a resource of ours, or (``path``) outside of any resource."""

    verb: str
    resource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    def attributes(self) -> dict[str, Any]:
        """The part of a SubjectAccessReview that tells it. No namespace means all of them."""
        if self.path:
            return {"nonResourceAttributes": {"verb": self.verb, "path": self.path}}
        wanted = {"group": names.GROUP, "version": names.VERSION, "resource": self.resource, "verb": self.verb}
        return {"resourceAttributes": wanted | {k: v for k, v in (("namespace", self.namespace), ("name", self.name)) if v}}


class Remembered(Generic[T]):
    """Answers kept for a while: at most ``size`` of them, each asked for once at a time. Failures are not kept."""

    def __init__(self, *, seconds: float = KEEP_SECONDS, size: int = MAX_KEPT, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._size = size
        self._clock = clock
        self._kept: OrderedDict[object, tuple[float, T]] = OrderedDict()
        self._asked: dict[object, asyncio.Task[T]] = {}

    async def get(self, key: object, ask: Callable[[], Awaitable[T]]) -> T:
        """The kept answer, or what ``ask`` says. Time counts from before asking: an answer is never older than ``seconds``."""
        kept = self._kept.get(key)
        if kept and self._clock() < kept[0]:
            return kept[1]
        task = self._asked.get(key)
        if task is None:
            task = asyncio.ensure_future(self._fill(key, ask))
            self._asked[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        # shield: a caller that hangs up must not take the answer from the others who wait for it.
        return await asyncio.shield(task)

    async def _fill(self, key: object, ask: Callable[[], Awaitable[T]]) -> T:
        until = self._clock() + self._seconds
        answer = await ask()
        self._kept[key] = (until, answer)
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return answer

    def _forget(self, key: object, task: asyncio.Task[T]) -> None:
        del self._asked[key]
        if not task.cancelled():
            task.exception()  # seen: also when everybody who waited has hung up


class Auth:
    """Answers who a token is, and whether someone may do something."""

    def __init__(self, kube: Kube, *, audience: str = "") -> None:
        self._kube = kube
        self._audience = audience
        self._identities: Remembered[Identity | None] = Remembered()
        self._rights: Remembered[bool] = Remembered()
        self._slots = asyncio.Semaphore(MAX_PARALLEL_REVIEWS)

    async def identity(self, token: str, *, audience: str | None = None) -> Identity:
        """Who holds the token; raises Unauthenticated, or Unavailable where the API server cannot say."""
        wanted = self._audience if audience is None else audience
        if not token or len(token) > MAX_TOKEN:
            raise Unauthenticated("Send `Authorization: Bearer <token>`; `kubectl create token <serviceaccount>` makes one.")
        key = (wanted, hashlib.sha256(token.encode()).digest())
        found = await self._identities.get(key, lambda: self._review_token(token, wanted))
        if found is None:
            raise Unauthenticated("The API server does not know this token: it is expired, revoked, or made for another audience.")
        return found

    async def allowed(self, who: Identity, action: Action) -> bool:
        """Whether the caller has the right."""
        return await self._rights.get((who, action), lambda: self._review_access(who, action))

    async def check(self, who: Identity, action: Action) -> None:
        """Raises Forbidden where the caller lacks the right, without telling whether the object exists."""
        if not await self.allowed(who, action):
            where = f" in namespace {action.namespace}" if action.namespace else ""
            raise Forbidden(f"{who.username} may not {action.verb} {action.resource or action.path}{where}. An administrator can grant it.")

    async def namespaces(self, who: Identity, verb: str, resource: str, candidates: list[str]) -> frozenset[str]:
        """Those of the candidates in which the caller has the right."""
        if await self.allowed(who, Action(verb, resource)):
            return frozenset(candidates)
        answers = await asyncio.gather(*(self.allowed(who, Action(verb, resource, namespace)) for namespace in candidates))
        return frozenset(namespace for namespace, yes in zip(candidates, answers, strict=True) if yes)

    async def _review_token(self, token: str, audience: str) -> Identity | None:
        spec: dict[str, Any] = {"token": token} | ({"audiences": [audience]} if audience else {})
        status = await self._review(_TOKEN_REVIEWS, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec})
        if not status.get("authenticated") or (audience and audience not in status.get("audiences", [])):
            return None
        user = status["user"]
        extra = tuple(sorted((key, tuple(values)) for key, values in user.get("extra", {}).items()))
        return Identity(user["username"], user.get("uid", ""), tuple(user.get("groups", [])), extra)

    async def _review_access(self, who: Identity, action: Action) -> bool:
        spec = {
            "user": who.username,
            "uid": who.uid,
            "groups": list(who.groups),
            "extra": {key: list(values) for key, values in who.extra},
        } | action.attributes()
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        status = await self._review(_ACCESS_REVIEWS, body)
        return bool(status.get("allowed")) and not status.get("denied")

    async def _review(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._slots:
                answer = await self._kube.create(path, body)
        except KubeError as error:
            raise Unavailable("The API server cannot be asked who you are; try again.", code="auth_unavailable", retry_after=5) from error
        status: dict[str, Any] = answer.get("status", {})
        return status


def bearer(header: str | None) -> str:
    """The token of an Authorization header, or ``""``."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
