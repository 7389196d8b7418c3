"""Bounds on the shape of a JSON body, checked before anything validates it.

Pydantic collects an error for every item of a list in every branch of a union: of a list of 2,000 empty objects as
`input` of `/v1/responses` 466,000 errors, which take 12 seconds and 2 GB. So lists are checked here, in time linear in
the body, and the items of unions one by one, up to the first that is wrong.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from server.engine import ResponsesRequest, VLLMValidationError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_DEPTH = 64
MAX_CONTAINERS = 16_384
"""Objects and lists in a body."""
MAX_ITEMS = 4096
"""Of a list, unless it is one of tokens or texts."""
LONG_LISTS = frozenset(
    {
        "allowed_token_ids",
        "data_1",
        "data_2",
        "documents",
        "input",
        "items",
        "prompt",
        "prompt_token_ids",
        "stop_token_ids",
        "token_ids",
        "tokens",
    }
)
"""Fields whose lists may be longer, if all their items are integers or all are strings."""


def check_text(content: bytes, body: Mapping[str, Any]) -> None:
    """
    Args:
        content: the JSON text of `body`.

    Raises:
        VLLMValidationError: a string holds half of a surrogate pair, which is no text: tokenizers, the log and the
            engine's messages cannot encode it.
    """
    if not _SURROGATE.search(content):
        return
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = ascii(error.object[error.start])
        raise _refused(
            f"The body holds half of a surrogate pair, {escape}, which is no text.", ""
        ) from None


def check_shape(body: Mapping[str, Any]) -> None:
    """
    Raises:
        VLLMValidationError: the body has too many lists and objects, or a list has too many items.
    """
    containers = 0
    level: list[tuple[str, Any]] = [("", body)]
    for _ in range(MAX_DEPTH):
        containers += len(level)
        if containers > MAX_CONTAINERS:
            raise _refused(
                f"The body has more than {MAX_CONTAINERS:,} objects and lists.", level[-1][0]
            )
        level = [inner for name, value in level for inner in _containers_in(name, value)]
        if not level:
            break
    else:
        raise _refused(f"The body is nested more than {MAX_DEPTH} levels deep.", level[0][0])


def check_responses_items(body: Mapping[str, Any]) -> None:
    """Validate the items of lists in a body of `/v1/responses`, up to the first that is wrong.

    Raises:
        VLLMValidationError: one is wrong.
    """
    for field, adapter in _responses_items().items():
        items = body.get(field)
        if not isinstance(items, list):
            continue
        for index, item in enumerate(items):
            try:
                adapter.validate_python(item)
            except ValidationError as error:
                problem = error.errors(include_url=False, include_input=False)[0]["msg"]
                message = f"`{field}`, item {index}, is none of the kinds of item accepted there: {problem}"
                raise _refused(message, field) from None


@cache
def _responses_items() -> dict[str, TypeAdapter[Any]]:
    """Validators for the items of `input` and `tools`, from vLLM's own annotations."""
    adapters = {}
    for field in ("input", "tools"):
        annotation = ResponsesRequest.model_fields[field].annotation
        kinds = (annotation, *get_args(annotation))
        (items,) = (get_args(kind)[0] for kind in kinds if get_origin(kind) is list)
        adapters[field] = TypeAdapter(items)
    return adapters


def _containers_in(name: str, value: Any) -> list[tuple[str, Any]]:
    """The lists and objects directly inside of one, with the name of the field that they are in."""
    if isinstance(value, dict):
        return [(key, inner) for key, inner in value.items() if isinstance(inner, dict | list)]
    if len(value) > MAX_ITEMS and not _is_long_list(name, value):
        raise _refused(f"`{name}` has {len(value):,} items; {MAX_ITEMS:,} are accepted.", name)
    return [(name, inner) for inner in value if isinstance(inner, dict | list)]


def _is_long_list(name: str, value: list[Any]) -> bool:
    return name in LONG_LISTS and {type(item) for item in value} in ({int}, {str})


def _refused(message: str, parameter: str) -> VLLMValidationError:
    return VLLMValidationError(message, parameter=parameter or None)
