"""``/v1``: tuned models under OpenAI's routes, so that its clients work by changing ``base_url`` and ``api_key``."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tunewright_api import bodies, gateway
from tunewright_api.auth import Action
from tunewright_api.cache import Object
from tunewright_api.deps import Caller, Parts, PartsDep
from tunewright_api.errors import NotFound
from tunewright_crds import names

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models", summary="Models that answer, and that the caller may use")
async def list_models(parts: PartsDep, caller: Caller) -> dict[str, Any]:
    models = parts.cache.models
    usable = await parts.auth.namespaces(caller, "get", names.MODELS, models.namespaces())
    data = [entry for model in models.after() if model["metadata"]["namespace"] in usable for entry in gateway.describe(model)]
    return {"object": "list", "data": data}


@router.get("/models/{model:path}", summary="One model")
async def retrieve_model(model: str, parts: PartsDep, caller: Caller) -> dict[str, Any]:
    found, _ = await _usable(parts, caller, model)
    entry = next((entry for entry in gateway.describe(found) if entry["id"] == model), None)
    if entry is None:
        raise NotFound(f"Nothing answers as {model} now.", code="model_not_found", param="model")
    return entry


@router.post("/chat/completions", summary="An answer to a conversation")
async def chat_completions(request: Request, parts: PartsDep, caller: Caller) -> Response:
    return await _relay(request, parts, caller, "/v1/chat/completions")


@router.post("/completions", summary="A continuation of a text")
async def completions(request: Request, parts: PartsDep, caller: Caller) -> Response:
    return await _relay(request, parts, caller, "/v1/completions")


async def _relay(request: Request, parts: Parts, caller: Caller, path: str) -> Response:
    body = bodies.json_object(await bodies.read(request, limit=gateway.MAX_BODY))
    model, base = await _usable(parts, caller, body.get("model"))
    meta = model["metadata"]
    parts.metrics.model_requests.labels(meta["namespace"], meta["name"]).inc()
    request_id: str = request.state.request_id
    return await parts.gateway.relay(request, model=model, base=base, path=path, body=body, request_id=request_id)


async def _usable(parts: Parts, caller: Caller, model_id: Any) -> tuple[Object, bool]:
    """The TunedModel of an id, and whether its base is meant. The right is checked first: without it, nobody learns what exists."""
    namespace, name, base = gateway.parse_id(model_id)
    await parts.auth.check(caller, Action("get", names.MODELS, namespace, name))
    model = parts.cache.models.get(namespace, name)
    if model is None or (base and model["spec"]["kind"] != "adapter"):
        raise NotFound(f"There is no model {model_id}.", code="model_not_found", param="model")
    return model, base
