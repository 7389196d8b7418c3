"""The message of a request whose body or parameters do not fit: which field, and why, in one line.

vLLM's own handler writes out Python's representation of every error, the client's input included.
"""

from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from server.engine import VLLMValidationError, clean_loc_for_param, create_error_response

_MAX_ERRORS, _MAX_CHARACTERS = 3, 500


async def validation_error_handler(request: Request, error: Exception) -> Response:
    """400 in OpenAI's shape, for vLLM's routes and ours."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # A value that may have several types has an error for each; some say the same.
    named = [*dict.fromkeys(_name_and_reason(entry) for entry in errors[:_MAX_ERRORS])]
    message = "; ".join(f"{name}: {reason}" if name else reason for name, reason in named)
    if len(errors) > _MAX_ERRORS:
        message += f"; and {len(errors) - _MAX_ERRORS} more"
    status = HTTPStatus.BAD_REQUEST
    parameter = named[0][0] or None if named else None
    response = create_error_response(
        message or "the request is not valid", status.phrase, status, parameter
    )
    return JSONResponse(response.model_dump(), status)


def _name_and_reason(error: Any) -> tuple[str, str]:
    """The field, "" where it is the whole body, and what is wrong with it."""
    if not isinstance(error, dict):  # vLLM raises some with a text
        return "", str(error)[:_MAX_CHARACTERS]
    loc = tuple(error.get("loc", ()))
    if loc[:1] in (("body",), ("query",), ("path",)):
        loc = loc[1:]
    cause = error.get("ctx", {}).get("error")
    if error.get("type") == "json_invalid":
        return "", f"the body is not JSON: {cause} at character {loc[0]}"
    if isinstance(cause, VLLMValidationError):
        return cause.parameter or "", str(cause)[:_MAX_CHARACTERS]
    reason = str(error.get("msg", "")).removeprefix("Value error, ")
    return clean_loc_for_param(loc) if loc else "", reason[:_MAX_CHARACTERS]
