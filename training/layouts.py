"""Rows of public preference data as TRL's conversational format: `{"prompt", "chosen", "rejected"}`, lists of messages.

Known by their fields, so no option names them:

- `Anthropic/hh-rlhf`: `chosen` and `rejected` are whole dialogues as text, "\\n\\nHuman: ...\\n\\nAssistant: ...".
- `openbmb/UltraFeedback`: `instruction` and `completions`, each with a `response` and an `overall_score`; the best one
  is chosen, the worst rejected. Where all scores are equal the row says nothing.
- `HuggingFaceH4/ultrafeedback_binarized`: `chosen` and `rejected` are whole dialogues as messages, `prompt` a string.
- TRL's plain format: strings.
"""

import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def conversational(row: Row) -> Row | None:
    """The same row in TRL's conversational format; None = it prefers nothing.

    Rows that are in the format already, and rows of no known layout, come back as they are.

    Raises:
        ValueError: a known layout, but not kept to.
    """
    if "completions" in row and "instruction" in row:
        return _from_scores(row)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(row.get("prompt"), str):
            return row | _pair(_said("user", row["prompt"]), chosen, rejected)
        return row | _split(_dialogue(chosen), _dialogue(rejected))
    both = isinstance(chosen, list) and isinstance(rejected, list)
    if both and not isinstance(row.get("prompt"), list):
        return row | _split(chosen, rejected)
    if isinstance(row.get("prompt"), str):
        return row | {"prompt": _said("user", row["prompt"])}
    return row


def _said(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]


def _pair(prompt: list[Message], chosen: str, rejected: str) -> Row:
    return {
        "prompt": prompt,
        "chosen": _said("assistant", chosen),
        "rejected": _said("assistant", rejected),
    }


def _split(chosen: Any, rejected: Any) -> Row:
    """Two dialogues that differ in their last turn."""
    if not (isinstance(rejected, list) and len(chosen) > 1 and len(rejected) > 1):
        raise ValueError("chosen and rejected must both be dialogues of at least two turns")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _dialogue(text: str) -> list[Message]:
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        raise ValueError('a dialogue as text begins with "\\n\\nHuman: "')
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in pairs]


def _from_scores(row: Row) -> Row | None:
    completions: Sequence[Row] = row["completions"]
    scored = [(_score(completion), completion["response"]) for completion in completions]
    if len(scored) < 2:
        return None
    best, worst = max(scored, key=lambda x: x[0]), min(scored, key=lambda x: x[0])
    if best[0] == worst[0]:
        return None
    return _pair(_said("user", row["instruction"]), best[1], worst[1])


def _score(completion: Row) -> float:
    try:
        return float(completion["overall_score"])
    except (KeyError, TypeError, ValueError):
        raise ValueError("a completion has no overall_score") from None
