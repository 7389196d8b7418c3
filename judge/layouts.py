"""Rows of public data in TRL's conversational formats: `messages`; `prompt`; `prompt`, `chosen` and `rejected`;
`prompt`, `completion` and `label`.

The fields tell the format, so no option names it. A preference pair may be laid out as

- TRL's: the prompt and both answers are lists of messages, or texts;
- whole dialogues, as messages (`HuggingFaceH4/ultrafeedback_binarized`, whose `prompt` repeats the first turn) or as
  text, "\\n\\nHuman: ...\\n\\nAssistant: ..." (`Anthropic/hh-rlhf`);
- such a text as the `prompt`, "\\n\\nHuman: ...\\n\\nAssistant:", with texts that go on (`Dahoas/full-hh-rlhf`);
- lists of texts, each chosen one better than each rejected one (`allenai/reward-bench-2`);
- `instruction` and `completions`, each with a `response` and an `overall_score` (`openbmb/UltraFeedback`); the best one
  is chosen, the worst rejected.

In every layout both dialogues are split where they first differ; the rest of each is its answer.
"""

import math
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from judge.messages import Message, Unusable, read_messages

Row = dict[str, Any]
PAIR = ("prompt", "chosen", "rejected")
"""Fields of a preference pair."""
VERDICT = ("prompt", "completion")
"""Fields of a single verdict, beside its label."""

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_BEGINS = re.compile(
    r"\n\nHuman:|Human:.*\n\nAssistant:", re.DOTALL
)  # some rows have lost the first line breaks
_AWAITS = re.compile(r"\n\nAssistant:\s*\Z")


def conversational(row: Row, fields: tuple[str, ...]) -> Iterator[Row]:
    """The row with `fields` in the conversational format; several rows where a field lists answers.

    Raises:
        Unusable: a field is missing, or the layout is unknown.
    """
    if "chosen" in fields:
        yield from (row | pair for pair in _pairs(row))
    elif fields == ("prompt",):
        yield row | _prompt(row)
    elif fields == VERDICT:
        readers = {"prompt": _messages_of_prompt, "completion": _messages_of_answer}
        yield row | {field: _field(row, field, readers[field]) for field in fields}
    else:
        yield row | {field: _field(row, field, read_messages) for field in fields}


def _prompt(row: Row) -> Row:
    """The prompt of a row; of a pair, the same as the pair's."""
    is_pair = row.get("chosen") is not None and row.get("rejected") is not None
    if is_pair or _is_scored(row):
        return next(_pairs(row))
    return {"prompt": _field(row, "prompt", _messages_of_prompt)}


def _pairs(row: Row) -> Iterator[Row]:
    if _is_scored(row):
        chosen, rejected = _by_score(row["completions"])
        prompt = _field(row, "instruction", lambda text: text)
    else:
        prompt = row.get("prompt")
        chosen, rejected = (_field(row, field, _answers) for field in PAIR[1:])
    for better, worse in product(chosen, rejected):
        yield split(_dialogue(prompt, better, "chosen"), _dialogue(prompt, worse, "rejected"))


def split(chosen: list[Message], rejected: list[Message]) -> Row:
    """Two dialogues as a pair: the prompt is their common beginning; the last turn always belongs to the answer."""
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _is_scored(row: Row) -> bool:
    return "completions" in row and "instruction" in row


def _messages_of_prompt(prompt: Any) -> list[Message]:
    if not isinstance(prompt, str):
        return read_messages(prompt)
    return _turns(_AWAITS.sub("", prompt)) if _is_dialogue(prompt) else _turn("user", prompt)


def _dialogue(prompt: Any, answer: Any, field: str) -> list[Message]:
    """The conversation that ends with the answer; `answer` may be the whole conversation."""
    if isinstance(answer, str) and not isinstance(prompt, list):
        if _is_dialogue(answer):
            return _turns(answer)
        if prompt is None:
            raise Unusable(f'{field}: a dialogue as text begins with "\\n\\nHuman: "')
        if isinstance(prompt, str) and _is_dialogue(prompt):
            return _turns(f"{_AWAITS.sub('', prompt)}\n\nAssistant: {answer}")
    messages = _field({field: answer}, field, _messages_of_answer)
    if isinstance(prompt, str) and messages[0]["role"] != "assistant":
        return messages  # the prompt repeats its first turn
    before = [] if prompt is None else _field({"prompt": prompt}, "prompt", _messages_of_prompt)
    is_whole = len(messages) > len(before) and messages[: len(before)] == before
    return messages if is_whole else before + messages


def _messages_of_answer(answer: Any) -> list[Message]:
    return _turn("assistant", answer) if isinstance(answer, str) else read_messages(answer)


def _is_dialogue(text: str) -> bool:
    return _BEGINS.match(text) is not None


def _turns(text: str) -> list[Message]:
    _, *turns = _TURN.split("\n\n" + text.lstrip("\n"))
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [message for who, text in pairs for message in _turn(_ROLES[who], text.strip())]


def _turn(role: str, text: str) -> list[Message]:
    return read_messages([{"role": role, "content": text}])


def _answers(answer: Any) -> list[Any]:
    """A list of answers, or the only one: a list of messages is one answer."""
    if isinstance(answer, list) and answer and not isinstance(answer[0], dict):
        return answer
    return [answer]


def _by_score(completions: Any) -> tuple[list[str], list[str]]:
    """The best response and the worst; the same one where the scores prefer none."""
    if not isinstance(completions, list) or not completions:
        raise Unusable("completions is no list of responses")
    scored = [_scored(completion) for completion in completions]
    best, worst = max(scored, key=lambda x: x[0]), min(scored, key=lambda x: x[0])
    return [best[1]], [(worst if worst[0] < best[0] else best)[1]]


def _scored(completion: Any) -> tuple[float, str]:
    try:
        score, response = float(completion["overall_score"]), completion["response"]
    except (KeyError, TypeError, ValueError):
        score, response = math.nan, None
    if not math.isfinite(score) or not isinstance(response, str):
        raise Unusable("a completion has no response or no overall_score")
    return score, response


def _field(row: Row, field: str, read: Any) -> Any:
    """The result of `read` on a field; an error names the field."""
    if row.get(field) is None:
        present = sorted(name for name, value in row.items() if value is not None)
        raise Unusable(f"the field {field!r} is missing", f"found {', '.join(present)}")
    try:
        return read(row[field])
    except Unusable as error:
        raise Unusable(f"{field}: {error.reason}", error.detail) from None
