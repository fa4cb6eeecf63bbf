"""What a caller is told when something does not work.

    ApiError
    ├── Unauthenticated   401  no token, or none that the API server knows
    ├── Forbidden         403  no right; also where the object does not exist, so that names do not leak
    ├── NotFound          404
    ├── Conflict          409  someone else was faster; try again
    ├── Gone              410  the object is no more; do not try again
    ├── TooLarge          413
    ├── Invalid           422  the message says which field
    ├── BadEngine         502  the serving pod failed
    └── Unavailable       503  not now; Retry-After tells when

Under ``/v1`` they are OpenAI's error object, elsewhere problem details (RFC 9457).
"""

from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """One answer that is no success. ``message`` is for people, ``code`` for programs, ``param`` names the field to blame."""

    status = 500
    code = "internal_error"
    openai_type = "server_error"

    def __init__(self, message: str, *, code: str = "", param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.param = param
        self.retry_after = retry_after


class Unauthenticated(ApiError):
    status = 401
    code = "invalid_api_key"
    openai_type = "authentication_error"


class Forbidden(ApiError):
    status = 403
    code = "forbidden"
    openai_type = "permission_error"


class NotFound(ApiError):
    status = 404
    code = "not_found"
    openai_type = "invalid_request_error"


class Conflict(ApiError):
    status = 409
    code = "conflict"
    openai_type = "invalid_request_error"


class Gone(ApiError):
    status = 410
    code = "gone"
    openai_type = "invalid_request_error"


class TooLarge(ApiError):
    status = 413
    code = "request_too_large"
    openai_type = "invalid_request_error"


class Invalid(ApiError):
    status = 422
    code = "invalid"
    openai_type = "invalid_request_error"


class BadEngine(ApiError):
    status = 502
    code = "engine_error"


class Unavailable(ApiError):
    status = 503
    code = "unavailable"


class _Plain(ApiError):
    """A status that the framework itself answers with (unknown route, wrong method)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message, code=HTTPStatus(status).phrase.lower().replace(" ", "_"))
        self.status = status
        self.openai_type = "invalid_request_error" if status < 500 else "server_error"


def from_status(status: int, message: str) -> ApiError:
    """An error for a status of the framework."""
    return _Plain(status, message)


def openai_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.openai_type, "param": error.param, "code": error.code}}


def problem_body(error: ApiError, *, request_id: str) -> dict[str, Any]:
    """Problem details (RFC 9457)."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "requestId": request_id,
    }
    return body | ({"param": error.param} if error.param else {})


def render(error: ApiError, *, path: str, request_id: str) -> JSONResponse:
    """The answer for an error, in the dialect of the path."""
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith("/v1/"):
        return JSONResponse(openai_body(error), error.status, headers)
    body = problem_body(error, request_id=request_id)
    return JSONResponse(body, error.status, headers, media_type="application/problem+json")
