"""Request bodies, read with a limit."""

from typing import Any

import orjson
from fastapi import Request

from tunewright_api.errors import Invalid, TooLarge


async def read(request: Request, *, limit: int) -> bytes:
    """The body; raises TooLarge as soon as it is known to be longer than ``limit`` bytes, whatever Content-Length claims."""
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > limit:
        raise TooLarge(f"The body has {told} bytes; at most {limit} are taken.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"The body has more than {limit} bytes.")
    return bytes(body)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. NaN, infinities and numbers beyond a double's range are no JSON and refused."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Invalid("The body must be a JSON object.", code="invalid_json")
    return found
