"""What the routes work with: made once, handed to each by FastAPI's dependencies."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from tunewright_api.auth import Auth, Identity, bearer
from tunewright_api.cache import Cache
from tunewright_api.gateway import Gateway
from tunewright_api.metrics import Metrics
from tunewright_api.progress import Progress
from tunewright_api.sessions import Sessions
from tunewright_api.settings import Settings


@dataclass(frozen=True)
class Parts:
    """The parts of a running front end."""

    settings: Settings
    auth: Auth
    cache: Cache
    gateway: Gateway
    progress: Progress
    metrics: Metrics
    sessions: Sessions


def get_parts(request: Request) -> Parts:
    """The parts of the application that answers this request."""
    parts: Parts = request.app.state.parts
    return parts


async def get_caller(request: Request, parts: Annotated[Parts, Depends(get_parts)]) -> Identity:
    """Who calls, by the Authorization header alone: cookies are for pages only, so no other site can use them here."""
    return await parts.auth.identity(bearer(request.headers.get("authorization")))


PartsDep = Annotated[Parts, Depends(get_parts)]
Caller = Annotated[Identity, Depends(get_caller)]
