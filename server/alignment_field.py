"""`alignment` where it does not stand in the body: in a header, or under a name that is nearly its own.

Gateways drop fields that they do not know, and keep headers. vLLM ignores fields that it does not know, so a misspelt
one would be dropped without a word.
"""

import difflib
import json
from typing import Any

from proxy.request import EXTRA_ARGS_KEY
from server.body_shape import check_text
from server.engine import VLLMValidationError
from server.schemas.alignment import AlignmentOptions

ALIGNMENT_HEADER = "Assent-Alignment"
_OWN_FIELDS = frozenset(AlignmentOptions.model_fields)
_SIMILARITY = 0.87  # `alignement` and `aligment` have 0.95, `assignment` 0.84


def take_header(header: str, body: dict[str, Any]) -> None:
    """Put the header's alignment into the body.

    Args:
        header: the value of `Assent-Alignment`: the JSON text of an `alignment` object.

    Raises:
        VLLMValidationError: it is no JSON object, or the body has another one.
    """
    try:
        alignment = json.loads(header)
    except (ValueError, RecursionError) as error:
        reason = f"is not JSON ({error}): send the `{EXTRA_ARGS_KEY}` object"
        raise _refused(ALIGNMENT_HEADER, f"the header {reason}") from None
    if not isinstance(alignment, dict):
        raise _refused(ALIGNMENT_HEADER, f"the header is no JSON object, but {header[:80]}")
    check_text(header.encode("latin-1"), alignment)
    if body.get(EXTRA_ARGS_KEY) not in (None, alignment):
        message = f"the header differs from the body's `{EXTRA_ARGS_KEY}`: send one of them"
        raise _refused(ALIGNMENT_HEADER, message)
    body[EXTRA_ARGS_KEY] = alignment


def check_names(body: dict[str, Any], *, takes_best_of: bool) -> None:
    """Refuse what was meant for `alignment`. All other fields that nobody knows may pass.

    Args:
        takes_best_of: whether `best_of` is a field of vLLM's in this body.

    Raises:
        VLLMValidationError: a field of `alignment` stands beside it, or its name is misspelt.
    """
    for name, value in body.items():
        if name == EXTRA_ARGS_KEY or value is None:
            continue
        if name in _OWN_FIELDS and not (name == "best_of" and (takes_best_of or value == 1)):
            example = json.dumps({EXTRA_ARGS_KEY: {name: value}})
            where = f"is a field of `{EXTRA_ARGS_KEY}`"
            raise _refused(
                name, f"{where}: send {example if len(example) < 200 else 'it in there'}"
            )
        if difflib.get_close_matches(name.lower(), [EXTRA_ARGS_KEY], cutoff=_SIMILARITY):
            raise _refused(name, f"is no field: did you mean `{EXTRA_ARGS_KEY}`?")
    extra = body.get("extra_body")
    if isinstance(extra, dict) and EXTRA_ARGS_KEY in extra:
        reason = f"is an option of a client, not a field: send `{EXTRA_ARGS_KEY}` beside `model`"
        raise _refused("extra_body", reason)


def _refused(parameter: str, reason: str) -> VLLMValidationError:
    return VLLMValidationError(f"{parameter}: {reason}", parameter=parameter)
