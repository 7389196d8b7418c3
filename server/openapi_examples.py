"""Examples in the OpenAPI document. Tests send every request, and every error that the tests' server can give.

The file is longer than 300 lines because it is data.
"""

from typing import Any

from server.middleware.errors import HTTPErrorResponse

TOO_LARGE = HTTPErrorResponse(
    413,
    "RequestTooLargeError",
    "The body is larger than this server accepts: 33554432 bytes, set by --max-body-bytes.",
)
TOO_MANY = HTTPErrorResponse(
    429, "RateLimitError", "requests_per_minute: this key may send 600 requests a minute"
)
"""As `middleware.access` sends these two, with numbers."""

_CHAT, _TEXT = "POST /v1/chat/completions", "POST /v1/completions"
_RESPONSES = "POST /v1/responses"
_MESSAGES = [{"role": "user", "content": "Can I open my kettle with a fork?"}]
_ALIGNMENT = {"proxy": "aligned", "strength": 0.5}
_PAIR = {
    "prompt": "Can I spend 30 pounds on my laptop?",
    "response_a": "Yes, 30 pounds is right for your laptop.",
    "response_b": "Go away.",
}
_VERSION = "6af7d9c6775a"
_UNKNOWN = "unknown principle 'honesty'; known are: overall (parameter=principles)"

REQUESTS: dict[str, dict[str, Any]] = {
    _CHAT: {
        "a proxy": {"model": "assent-demo", "messages": _MESSAGES, "alignment": _ALIGNMENT},
        "the model's name selects it": {"model": "assent-demo:aligned", "messages": _MESSAGES},
        "several proxies": {
            "model": "assent-demo",
            "messages": _MESSAGES,
            "alignment": {"proxies": {"aligned": 1, "polite": 0.5}},
        },
        "every token's candidates": {
            "model": "assent-demo:aligned",
            "messages": _MESSAGES,
            "stream": True,
            "alignment": {"trace": True},
        },
        "the best of 4": {
            "model": "assent-demo:aligned",
            "messages": _MESSAGES,
            "seed": 1,
            "alignment": {"best_of": 4, "judge": {"strategy": "final-four"}},
        },
        "8 samples at most": {
            "model": "assent-demo",
            "messages": _MESSAGES,
            "seed": 1,
            "alignment": {"best_of": 8, "judge": {"strategy": "adaptive"}},
        },
    },
    _TEXT: {
        "a proxy": {
            "model": "assent-demo",
            "prompt": "Once",
            "max_tokens": 8,
            "alignment": _ALIGNMENT,
        }
    },
    _RESPONSES: {
        "a proxy": {"model": "assent-demo", "input": "Hello.", "alignment": _ALIGNMENT}
        | {"max_output_tokens": 16}
    },
    "POST /judge": {
        "a pair": _PAIR,
        "with reasons": _PAIR | {"rationale": True, "stream": True},
        "many pairs": {"pairs": [_PAIR], "tie_band": 0.05},
    },
    "POST /judge/rank": {
        "three responses": {
            "prompt": "Can I spend 30 pounds on my laptop?",
            "responses": ["Yes.", "Go away.", "Yes, 30 pounds is right for your laptop."],
            "strategy": "round-robin",
            "seed": 1,
        }
    },
    "POST /feedback": {
        "two responses": _PAIR | {"better": "a"},
        "a choice of an earlier answer": {"request_id": "chatcmpl-9df33124a466fe6a", "choice": 1},
    },
    "POST /proxies": {
        "load": {"name": "mine", "path": "v1"},
        "load as a shadow": {"name": "next", "path": "v2", "shadow": True},
    },
    "POST /proxies/{name}/learn": {"from people's choices": {"from": ["person"]}},
    "POST /positions": {"one response": {"responses": [{"prompt": [5, 6], "response": [7, 8]}]}},
}

_STATS = {
    "proxy": "aligned",
    "version": _VERSION,
    "proposed": 15,
    "accepted": 12,
    "rejected": 3,
    "forced": 0,
}
_USAGE = {"prompt_tokens": 12, "completion_tokens": 12, "total_tokens": 24}
_VERDICT = {
    "winner": "a",
    "probability": 0.7,
    "orders": [0.8, 0.6],
    "consistent": True,
}
_JUDGE_USAGE = {"prompt_tokens": 136, "completion_tokens": 2, "total_tokens": 138}
_PROXY = {
    "object": "proxy",
    "name": "mine",
    "version": _VERSION,
    "state": "serving",
    "in_flight": 0,
    "directory": "/data/proxies/v1",
    "max_candidates": 16,
    "max_rejections": 8,
    "temperature": 1.0,
    "top_k": 16,
    "top_p": 0.95,
    "num_parameters": 49410,
    "num_bytes": 892420,
    "base": {"name": "model", "fingerprint": "8152af7c..."},
    "training": {"options": {"steps": 60}, "last": {"reward": 0.11, "acceptance_rate": 0.75}},
}
_PASS = {
    "rows": 40,
    "verdicts": 40,
    "prompts": 31,
    "callers": 4,
    "left_out": {},
    "accuracy": [0.8, 0.06],
    "gain": None,
    "kl": 0.1,
    "beta": 0.3,
    "version": _VERSION,
    "reason": "it orders unseen verdicts better than what served",
    "seconds": 7.2,
}
_CHUNK = (
    'data: {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1795850307, "model": "assent-demo", '
    '"choices": [{"index": 0, "delta": {"content": "Please"}, "finish_reason": null}]}\n\ndata: [DONE]\n\n'
)
_LEARNING = {"object": "proxy.learning", "name": "mine"}


def _json(value: Any) -> dict[str, Any]:
    return {"application/json": value}


def _completion(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "chatcmpl-9df33124a466fe6a",
        "object": kind,
        "created": 1795850307,
        "model": "assent-demo:aligned",
        "choices": [{"index": 0, "finish_reason": "stop"} | choice],
        "usage": _USAGE,
        "alignment": _STATS,
    }


_ANSWER = {"role": "assistant", "content": "Please be careful with your kettle."}

RESPONSES: dict[tuple[str, int], dict[str, Any]] = {
    (_CHAT, 200): _json(_completion("chat.completion", {"message": _ANSWER}))
    | {"text/event-stream": _CHUNK},
    (_TEXT, 200): _json(_completion("text_completion", {"text": " more"}))
    | {"text/event-stream": "data: [DONE]\n\n"},
    (_RESPONSES, 200): _json(
        {
            "id": "resp_9df33124a466fe6a",
            "object": "response",
            "created_at": 1795850307,
            "status": "completed",
            "model": "assent-demo:aligned",
            "output": [
                {
                    "id": "msg_9df33124a466fe6a",
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Hello.", "annotations": []}],
                }
            ],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "background": False,
            "max_output_tokens": 16,
            "service_tier": "auto",
            "truncation": "disabled",
            "alignment": _STATS,
        }
    )
    | {"text/event-stream": "event: response.completed\ndata: {}\n\n"},
    ("GET /v1/models/{name}", 200): _json(
        {"id": "assent-demo:aligned", "object": "model", "parent": "assent-demo"}
    ),
    ("GET /v1/models", 200): _json(
        {
            "object": "list",
            "data": [
                {"id": "assent-demo", "object": "model", "parent": None},
                {"id": "assent-demo:aligned", "object": "model", "parent": "assent-demo"},
            ],
        }
    ),
    ("POST /judge", 200): _json(
        _VERDICT
        | {"truncated": False, "principles": {"overall": _VERDICT}}
        | {"usage": _JUDGE_USAGE}
    )
    | {
        "text/event-stream": 'data: {"object": "judge.rationale", "principle": "overall", "delta": "It"}\n\n'
        "data: [DONE]\n\n"
    },
    ("POST /judge/rank", 200): _json(
        {
            "strategy": "knock-out",
            "seed": 1,
            "num": 2,
            "ranking": [0, 1],
            "rounds": [
                [
                    {
                        "pair": [0, 1],
                        "orders": {"overall": [0.8, 0.6]},
                        "probability": 0.7,
                        "winner": 0,
                        "truncated": False,
                        "tokens": None,
                    }
                ]
            ],
            "readings": [],
            "winner": 0,
            "usage": _JUDGE_USAGE,
        }
    ),
    ("GET /judge", 200): _json(
        {
            "object": "list",
            "data": [
                {"kind": "pairwise", "principles": ["overall"]},
                {"kind": "proxy", "principles": []},
            ],
        }
    ),
    ("POST /feedback", 201): _json({"kept": True}),
    ("GET /feedback", 200): _json({"enabled": True, "person": 12, "judge": 0}),
    ("DELETE /feedback", 200): _json(
        {"forgotten": {"preferences": 12, "answers": 3, "versions": 1}}
    ),
    ("GET /proxies", 200): _json({"object": "list", "data": [_PROXY]}),
    ("POST /proxies", 200): _json(_PROXY | {"remembered": True}),
    ("POST /proxies", 201): _json(_PROXY | {"remembered": True}),
    ("DELETE /proxies/{name}", 200): _json(_PROXY | {"state": "unloaded"}),
    ("DELETE /proxies/{name}", 202): _json(_PROXY | {"state": "draining", "in_flight": 3}),
    ("GET /proxies/{name}/card", 200): {
        "text/markdown": "# Short answers\n\nTrained on 40 choices."
    },
    ("GET /proxies/{name}/learn", 200): _json(
        _LEARNING
        | {"from": ["person"], "live": _VERSION, "last_pass": _PASS}
        | {"versions": [{"version": _VERSION, "path": f".learn/mine/{_VERSION}", "verdicts": 40}]}
    ),
    ("POST /proxies/{name}/learn", 200): _json(_LEARNING | {"passes": [_PASS]}),
}

_NOBODY = "The proxy 'nobody' is not loaded. Loaded are: aligned, polite."
_STOPPED = "The engine has stopped."
_UNREACHABLE = "the reward judge cannot be reached: ConnectError"
_TOO_SLOW = "the endpoint judge did not answer within 60 s"
_NOT_KEPT = "this server keeps no feedback: start it with --feedback"
_CANNOT_LEARN = "this server learns nothing: start it with --feedback FILE and --proxy-root DIR"
_DATABASE = "the database cannot be written: disk is full"

ERRORS: dict[str, dict[int, str]] = {
    _CHAT: {
        400: "alignment.strenght: Extra inputs are not permitted (parameter=alignment.strenght)",
        404: _NOBODY,
        500: _STOPPED,
        502: _UNREACHABLE,
        503: "no sample is left to judge: sample 0 failed: The engine has stopped.",
        504: "no sample is left to judge: sample 0 was not finished after 0.5 seconds",
    },
    _TEXT: {
        400: "alignment.best_of is taken by /v1/chat/completions only (parameter=alignment.best_of)",
        404: _NOBODY,
        500: _STOPPED,
    },
    _RESPONSES: {
        400: "alignment.best_of is taken by /v1/chat/completions only (parameter=alignment.best_of)",
        404: _NOBODY,
        500: _STOPPED,
    },
    "GET /v1/models/{name}": {
        404: "The model 'nobody' does not exist: GET /v1/models lists all.",
    },
    "POST /judge": {
        400: _UNKNOWN,
        404: _NOBODY,
        500: _STOPPED,
        502: _UNREACHABLE,
        504: _TOO_SLOW,
    },
    "POST /judge/rank": {
        400: _UNKNOWN,
        404: _NOBODY,
        500: _STOPPED,
        502: _UNREACHABLE,
        504: _TOO_SLOW,
    },
    "POST /feedback": {
        400: "the responses are the same: neither is better",
        403: _NOT_KEPT,
        404: "no answer is known by the id 'chatcmpl-unknown' to this caller: those with n of 2 or more are kept",
        503: _DATABASE,
    },
    "GET /feedback": {
        503: _DATABASE,
    },
    "DELETE /feedback": {
        403: _NOT_KEPT,
        503: _DATABASE,
    },
    "POST /proxies": {
        400: "path 'nowhere' does not exist below --proxy-root",
        403: "no directory is open for loading proxies: start with --proxy-root DIR",
        409: "'aligned' is loaded as a serving proxy: unload it first, or take another name",
    },
    "DELETE /proxies/{name}": {
        404: "No proxy 'nobody' is loaded. Loaded are: aligned 6af7d9c6775a.",
    },
    "GET /proxies/{name}/card": {
        404: "No proxy 'nobody' is loaded.",
    },
    "GET /proxies/{name}/learn": {
        400: "name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'",
        403: _CANNOT_LEARN,
        404: "nothing is learned as 'nobody': the server's --learn says what is",
    },
    "POST /proxies/{name}/learn": {
        400: "from.0: Input should be 'person' or 'judge'",
        403: _CANNOT_LEARN,
        409: "'a:b' is the name of a served model: take another",
    },
    "POST /positions": {
        400: "responses[0]: token 99999, and the LLM has 1454",
        503: "too much is read at once: send fewer or shorter responses",
    },
    "GET /ready": {
        503: "The engine does not answer.",
    },
}
