"""Which answers and verdicts are recorded, without a server."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from judge.feedback import Feedback
from judge.messages import Message
from judge.prompts import Question
from judge.verdict import PairResult, Verdict
from server.feedback_writer import FeedbackWriter, record_stream

PROMPT = [Message(role="user", content="What is 2 + 2?")]


def choice(index: int, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason}


def call_delta(index: int, **function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": function}]}


def record_events(*events: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """The ids in a client's stream, and the messages that are recorded of it."""
    recorded: list[Any] = []

    async def chunks() -> AsyncGenerator[str, None]:
        for choices in events:
            yield f"data: {json.dumps({'id': 'theirs', 'choices': choices})}\n\n"
        yield "data: [DONE]\n\n"

    async def collect() -> list[str]:
        return [chunk async for chunk in record_stream(chunks(), "ours", recorded.append)]

    *lines, last_line = asyncio.run(collect())
    assert last_line == "data: [DONE]\n\n"
    return [json.loads(line.removeprefix("data: "))["id"] for line in lines], recorded


def test_choices_of_a_stream_are_put_together_again() -> None:
    ids, (messages,) = record_events(
        [choice(1, content="Fi"), choice(0, role="assistant", content="")],
        [choice(0, **call_delta(0, name="add")), choice(1, content="ve.")],
        [
            choice(0, **call_delta(0, arguments='{"to": [2,')),
            choice(2, **call_delta(0, name="add")),
        ],
        [choice(0, **call_delta(0, arguments=" 2]}")), choice(1, "stop")],
        [choice(0, "tool_calls"), choice(2, "length", **call_delta(0, arguments='{"to": '))],
        [],
    )
    assert ids == ["ours"] * 6
    call = {"name": "add", "arguments": '{"to": [2, 2]}'}
    assert messages == [
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        {"role": "assistant", "content": "Five.", "tool_calls": []},
        # A call that was cut short is a text.
        {"role": "assistant", "content": json.dumps({"name": "add", "arguments": '{"to": '})},
    ]


def test_a_stream_that_broke_off_is_not_remembered() -> None:
    assert record_events([choice(0, content="Four.")], [choice(1, "stop")]) == (["ours"] * 2, [])
    assert record_events([]) == (["ours"], [])


def test_verdicts_from_which_nothing_can_be_learned_are_not_kept(tmp_path: Path) -> None:
    feedback = Feedback(str(tmp_path / "feedback.db"))
    feedback_writer = FeedbackWriter(feedback)
    ended_prompt = [*PROMPT, Message(role="assistant", content="Well,")]
    questions = [
        Question(PROMPT, "", "Four."),
        Question(PROMPT, "Four.", ""),
        Question(PROMPT, "\ud83d", "Four."),
        Question(ended_prompt, "Four.", "Five."),
        Question(PROMPT, "Four.", "Five."),
    ]
    pair_result = PairResult({"overall": Verdict((0.9, 0.9))})
    feedback_writer.record_verdicts(questions, [pair_result] * 5, None, "alice")
    feedback_writer.thread.shutdown(wait=True)
    assert [(row.chosen, row.rejected) for row in feedback.rows()] == [
        ("Four.", ""),
        ("Four.", "Five."),
    ]
