"""``/apis/v1``: jobs and models as Kubernetes holds them, read from the cache, for those who may read them."""

import base64
import binascii
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Annotated, Any, Final

import orjson
from fastapi import APIRouter, Query, Response

from tunewright_api.auth import Action
from tunewright_api.cache import Cache, Collection, Key, Object
from tunewright_api.deps import Caller, PartsDep
from tunewright_api.errors import Invalid, NotFound
from tunewright_crds import names

MAX_PAGE: Final = 500

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Objects a page.")]
Continue = Annotated[str, Query(alias="continue", max_length=1024, description="`metadata.continue` of the page before.")]


def _jobs(cache: Cache) -> Collection:
    return cache.jobs


def _models(cache: Cache) -> Collection:
    return cache.models


def page(things: Iterable[Object], limit: int) -> dict[str, Any]:
    """The first ``limit`` of the things as a list object; ``metadata.continue`` is there where more follow."""
    items = list(islice(things, limit + 1))
    more = len(items) > limit
    items = items[:limit]
    return {"metadata": {"continue": encode(_key(items[-1]))} if more else {}, "items": items}


def _json(body: Object) -> Response:
    """Straight to bytes: FastAPI would look at every field of 500 objects first, which takes longer than all the rest."""
    return Response(orjson.dumps(body), media_type="application/json")


def _key(thing: Object) -> Key:
    return thing["metadata"]["namespace"], thing["metadata"]["name"]


def encode(key: Key) -> str:
    """A position in a list, as text for a URL."""
    return base64.urlsafe_b64encode("/".join(key).encode()).decode()


def decode(text: str) -> Key:
    """The position of ``encode``; raises Invalid."""
    try:
        namespace, _, name = base64.b64decode(text, altchars=b"-_", validate=True).decode().partition("/")
    except (binascii.Error, UnicodeDecodeError):
        raise Invalid("`continue` must be metadata.continue of the page before.", param="continue") from None
    return namespace, name


def _collection_routes(router: APIRouter, segment: str, plural: str, collection: Callable[[Cache], Collection]) -> None:
    """Adds the three reads of one kind."""

    @router.get(f"/{segment}", summary=f"Every one of the {segment} that the caller may list", name=f"list_all_{segment}")
    async def list_all(parts: PartsDep, caller: Caller, limit: Limit = 100, after: Continue = "") -> Response:
        things = collection(parts.cache)
        shown = await parts.auth.namespaces(caller, "list", plural, things.namespaces())
        found = (thing for thing in things.after(decode(after)) if thing["metadata"]["namespace"] in shown)
        return _json(page(found, limit))

    @router.get(f"/namespaces/{{namespace}}/{segment}", summary=f"The {segment} of a namespace", name=f"list_{segment}")
    async def list_one(namespace: str, parts: PartsDep, caller: Caller, limit: Limit = 100, after: Continue = "") -> Response:
        await parts.auth.check(caller, Action("list", plural, namespace))
        return _json(page(collection(parts.cache).after(decode(after), namespace=namespace), limit))

    @router.get(f"/namespaces/{{namespace}}/{segment}/{{name}}", summary=f"One of the {segment}", name=f"get_{segment}")
    async def get_one(namespace: str, name: str, parts: PartsDep, caller: Caller) -> Response:
        await parts.auth.check(caller, Action("get", plural, namespace, name))
        thing = collection(parts.cache).get(namespace, name)
        if thing is None:
            raise NotFound(f"There is no {name} among the {segment} of namespace {namespace}.")
        return _json(thing)


router = APIRouter(prefix="/apis/v1", tags=["resources"])
_collection_routes(router, "jobs", names.JOBS, _jobs)
_collection_routes(router, "models", names.MODELS, _models)
