"""Puts a streamed answer together from its server-sent events."""

import json
from collections.abc import Iterator

from assent.results import Answer, AssentError, Json, Piece, read_answer, read_trace

_DATA = "data: "


class AnswerBuilder:
    """Reads the lines of a stream; knows the answer so far."""

    def __init__(self) -> None:
        self._id, self._model = "", ""
        self._usage: Json | None = None
        self._report: Json | None = None
        self._choices: dict[int, Json] = {}
        self._traces: dict[int, list[Json]] = {}

    def add(self, line: str) -> Iterator[Piece]:
        """The pieces of one line.

        Raises:
            AssentError: the server ended the stream with an error.
        """
        if not line.startswith(_DATA) or line == f"{_DATA}[DONE]":
            return
        chunk: Json = json.loads(line.removeprefix(_DATA))
        if "error" in chunk:
            error = chunk["error"]
            raise AssentError(error["message"], error.get("code"))
        self._id, self._model = chunk["id"], chunk["model"]
        self._usage = chunk.get("usage") or self._usage
        alignment: Json = chunk.get("alignment") or {}
        traces = {part["index"]: part["entries"] for part in alignment.pop("trace", ())}
        progress = alignment.pop("progress", None)
        if alignment:
            self._report = (self._report or {}) | alignment
        for choice in chunk["choices"]:
            yield self._piece(choice, traces.pop(choice["index"], []), progress)
            progress = None
        for index, entries in traces.items():
            self._traces.setdefault(index, []).extend(entries)
            yield Piece("", index, read_trace(entries))
        if progress is not None:
            yield Piece("", 0, progress=progress)

    def _piece(self, choice: Json, entries: list[Json], progress: Json | None) -> Piece:
        index, delta = choice["index"], choice["delta"]
        whole = self._choices.setdefault(
            index, {"index": index, "finish_reason": None, "message": {"role": "assistant"}}
        )
        text = delta.get("content") or ""
        message = whole["message"]
        message["content"] = message.get("content", "") + text
        if delta.get("tool_calls"):
            _merge_calls(message.setdefault("tool_calls", []), delta["tool_calls"])
        whole["finish_reason"] = choice.get("finish_reason") or whole["finish_reason"]
        self._traces.setdefault(index, []).extend(entries)
        return Piece(text, index, read_trace(entries), progress)

    def answer(self) -> Answer:
        """What has come so far.

        Raises:
            AssentError: nothing has.
        """
        if not self._choices:
            raise AssentError("the stream was not read: iterate over it first")
        choices = [self._choices[index] for index in sorted(self._choices)]
        raw: Json = {"id": self._id, "model": self._model, "choices": choices, "usage": self._usage}
        if self._report is not None:
            traces = [self._traces[choice["index"]] for choice in choices]
            raw["alignment"] = self._report | ({"trace": traces} if any(traces) else {})
        return read_answer(raw)


def _merge_calls(whole: list[Json], parts: list[Json]) -> None:
    """Append the parts of tool calls: the first one names the function, the others go on with its arguments."""
    for part in parts:
        index, function = part["index"], part.get("function") or {}
        if index >= len(whole):
            whole.append(
                {
                    "id": part.get("id"),
                    "type": "function",
                    "function": {"name": "", "arguments": ""},
                }
            )
        target = whole[index]["function"]
        target["name"] += function.get("name") or ""
        target["arguments"] += function.get("arguments") or ""
