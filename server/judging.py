"""POST /judge, and the judge as a client of the engine that answers.

A judgment is one token's log-probabilities, read from the frozen LLM: no proxy takes part.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from judge.judge import Judge
from judge.prompts import Message, judge_messages, judge_prompt_ids
from judge.verdict import Verdict, combine
from server import metrics
from server.engine import (
    ErrorResponse,
    VLLMValidationError,
    load_aware_call,
    read_labels,
    validate_json_request,
    with_cancellation,
)
from server.schemas import JudgeRequest
from server.state import Served, served

router = APIRouter()

ByPrinciple = dict[str, Verdict]


@router.post(
    "/judge",
    dependencies=[Depends(validate_json_request)],
    responses={400: {"model": ErrorResponse}, 500: {"model": ErrorResponse}},
)
@with_cancellation
@load_aware_call
async def judge_pair(request: JudgeRequest, raw_request: Request) -> Response:
    """Which response is better, in both orders, by each principle."""
    if request.messages is not None:
        prompt = conversation([message.model_dump() for message in request.messages])
    else:
        prompt = [{"role": "user", "content": request.prompt or ""}]
    judge = engine_judge(served(raw_request))
    pair = (request.response_a, request.response_b)
    [(verdict, by_principle)] = await compare(judge, prompt, [pair], request.principles)
    metrics.count_usage(judge.usage)
    return JSONResponse(
        _as_json(verdict)
        | {
            "principles": {name: _as_json(each) for name, each in by_principle.items()},
            "usage": judge.usage.as_json(),
        }
    )


async def compare(
    judge: Judge,
    prompt: Sequence[Message],
    pairs: Sequence[tuple[str, str]],
    principles: Sequence[str],
) -> list[tuple[Verdict, ByPrinciple]]:
    """For each pair the verdict over all principles, and the verdict by each."""
    columns = [await judge.compare(prompt, pairs, principle) for principle in principles]
    metrics.count_verdicts(verdict for column in columns for verdict in column)
    return [
        (combine(row), dict(zip(principles, row, strict=True)))
        for row in zip(*columns, strict=True)
    ]


def engine_judge(state: Served) -> Judge:
    """A judge for one request."""

    async def read(prompts: list[list[int]], labels: tuple[int, int]) -> list[tuple[float, float]]:
        _check_length(max(map(len, prompts)), state.engine.model_config.max_model_len)
        return await read_labels(state.engine, prompts, labels)

    return Judge(_Tokenizer(state), read)


def check_fits(
    state: Served, prompt: Sequence[Message], responses: tuple[str, str], principle: str
) -> None:
    """Raises VLLMValidationError (400) if the judge's prompt for a pair is too long to be read."""
    ids = judge_prompt_ids(_Tokenizer(state), judge_messages(prompt, *responses, principle))
    _check_length(len(ids), state.engine.model_config.max_model_len)


def conversation(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Chat messages in any of OpenAI's forms as plain text, for the judge to read.

    Raises VLLMValidationError (400) for content that is not text.
    """
    return [{"role": str(m["role"]), "content": _text(m.get("content"))} for m in messages]


def _text(content: Any) -> str:
    if content is None:  # an assistant's turn that only called tools
        return ""
    if isinstance(content, str):
        return content
    parts: list[Any] = [p.get("text") if isinstance(p, Mapping) else p for p in content]
    if not all(isinstance(part, str) for part in parts):
        raise VLLMValidationError(
            "only text can be judged, but a message has another kind of content",
            parameter="messages",
        )
    return "\n".join(parts)


def _check_length(longest: int, limit: int) -> None:
    if longest + 1 > limit:
        raise VLLMValidationError(
            f"The judge's prompt has {longest} tokens and needs one more for the verdict, but this "
            f"model's context holds {limit}. Shorten the conversation or the responses."
        )


class _Tokenizer:
    """The LLM's tokenizer with the chat template that the server was told to use."""

    def __init__(self, state: Served) -> None:
        self.tokenizer: Any = state.engine.renderer.get_tokenizer()
        self.chat_template = state.chat.chat_template if state.chat is not None else None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=self.chat_template, **options
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "winner": verdict.winner,
        "probability": verdict.probability,
        "orders": verdict.orders,
        "consistent": verdict.consistent,
    }
