"""What a client is told when something is refused or fails: OpenAI's error shape, with a message that names the fix.

Every error leaves the server through here, so that none is a traceback and none has a shape of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from longspan.errors import (
    BusyError,
    Cancelled,
    ContextTooLongError,
    LongspanError,
    PoolExhaustedError,
    SaveError,
    SessionCorruptError,
    SessionMismatchError,
    SessionNotFoundError,
)

_MEMORY_RETRY = 5
"""Seconds after which pages that others hold may be free again."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_LONGEST = 1000
"""Characters of a message: what a client sent is quoted, but not at any length."""


class ApiError(Exception):
    """A request that is refused, or that failed: an HTTP status and OpenAI's `error` object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take the status, one line that names the fix, and the field that it is about."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body as OpenAI's API has it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = " ".join(str(self).split())
        if len(message) > _LONGEST:
            message = message[: _LONGEST - 1] + "…"
        # Half of a surrogate pair, quoted from a request, could not be written as UTF-8.
        message = message.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return it as a response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def refused(field: str, why: str) -> ApiError:
    """Return the refusal of a field that is known but not honoured."""
    return ApiError(400, f"'{field}' is not supported here: {why}", param=field, code="unsupported_parameter")


def api_error(error: BaseException) -> ApiError:
    """Return what a client is told of an error of the engine; of one that we did not expect, only that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return _later(str(error), "queue_full", error.retry_after)
    if isinstance(error, PoolExhaustedError):
        return _later(f"{error}: try again when others have finished", "kv_budget_exhausted", _MEMORY_RETRY)
    if isinstance(error, SessionNotFoundError):
        # The message of the store lists the server's own folder and every session: a client is told neither.
        return ApiError(404, "there is no such session: GET /v1/sessions lists them", code="session_not_found")
    if isinstance(error, SessionMismatchError):
        return ApiError(409, str(error), code="session_mismatch")
    if isinstance(error, ContextTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, SaveError):
        return ApiError(507, "the session can't be saved: the server's disk is full or not writable", code="not_saved")
    if isinstance(error, SessionCorruptError):
        return ApiError(
            500, "the session's files are damaged: ask the server's operator for `longspan session verify`",
            code="session_damaged",
        )  # fmt: skip
    if isinstance(error, Cancelled):
        return ApiError(499, "the request was cancelled", code="cancelled")
    if isinstance(error, LongspanError) and isinstance(error, ValueError):  # what a caller made
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, LongspanError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, f"internal error ({type(error).__name__}): the server's log says more", code="internal_error")


def of_validation(error: RequestValidationError) -> ApiError:
    """Return the refusal of a body or query that is not as the schema says, by its first fault."""
    # Of several forms that a field may have, the one that fits furthest is meant.
    errors = [(_place(each, error.body), each) for each in error.errors()]
    place, first = max(errors, key=lambda each: (not each[1]["type"].endswith(("_type", "_parsing")), len(each[0])))
    if first["type"] == "json_invalid":
        why = (first.get("ctx") or {}).get("error", "it can't be parsed")
        return ApiError(400, f"the body is no JSON: {why}", code="invalid_json")
    field = ".".join(place)[: _LONGEST // 10] or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"unknown field '{field}': it would be ignored, so it is refused; leave it out",
            param=field, code="unknown_parameter",
        )  # fmt: skip
    if first["type"] == "missing":
        where = f"'{field}' is missing" if field else "the body is missing, or its Content-Type is not application/json"
        return ApiError(400, where, param=field, code="missing_required_parameter")
    told = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"'{field}': {told}" if field else told, param=field, code="invalid_value")


def _place(fault: Mapping[str, Any], body: Any) -> list[str]:
    """Return where a fault is: what is told of it, without the names of forms that a field may have."""
    where, *parts = fault["loc"] or ("",)
    if where != "body" or not isinstance(body, dict | list):
        return [str(part) for part in parts]
    place: list[str] = []
    for part in parts:
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and part in range(len(body))
        if inside:
            body = body[part]
        elif not (fault["type"] == "missing" and part == parts[-1]):
            continue  # not in the body: the name of a form
        place.append(str(part))
    return place


def _later(message: str, code: str, seconds: float) -> ApiError:
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(seconds)))})
