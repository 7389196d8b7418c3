"""Tool calls without a flag: the parser of a chat template, and what a server does whose template knows no tools."""

import json
import os
from argparse import Namespace
from typing import Any

import openai
import pytest

from tests.server.conftest import DEMO

MESSAGES: Any = [{"role": "user", "content": "How do I look after my rose?"}]
SCHEMA = {
    "type": "object",
    "properties": {"object": {"enum": ["rose", "puzzle"]}},
    "required": ["object"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}]
BY_NAME = {"type": "function", "function": {"name": "note"}}


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("{% for tool in tools %}…<tool_call>{'name': …, 'arguments': …}</tool_call>", "hermes"),
        ("{{ tools }} <tool_call>\n<function=f>\n<parameter=x>", "qwen3_coder"),
        ("{{ tools }} <tool_call>f <arg_key>x</arg_key> arguments", "glm45"),
        ("{{ tools }} [TOOL_CALLS] arguments", "mistral"),
        ('{{ tools }} "parameters": dictionary of argument name and its value', "llama3_json"),
        ("{{ tools }} <|channel|>commentary to=f <|call|>", "openai"),
        ("{{ tools }} <|tool_call_start|>[f()]<|tool_call_end|>", "lfm2"),
        ("{{ tools }} <call>{}</call>", None),
        ("{{ messages }} <tool_call> arguments", "assent_forced"),
        (None, None),
    ],
)
def test_the_parser_of_a_template(template: str | None, parser: str | None) -> None:
    from server.tool_calls import read_template

    assert read_template(template).parser == parser


def test_every_parser_is_one_of_vllms() -> None:
    from vllm.tool_parsers import ToolParserManager

    from server.tool_calls import FORMATS

    for parser, _ in FORMATS:
        assert ToolParserManager.get_tool_parser(parser)


@pytest.mark.parametrize(
    ("flags", "enabled", "parser", "explanation"),
    [
        ([], True, "assent_forced", "only where a request forces one"),
        (["--tool-call-parser", "mistral"], True, "mistral", "read by mistral"),
        (["--no-enable-auto-tool-choice"], False, None, "off"),
        (["--chat-template", "{{ tools }} <call>"], False, None, "--tool-call-parser NAME"),
        (["--enable-auto-tool-choice", "--tool-call-parser", "hermes"], True, "hermes", "hermes"),
    ],
)
def test_the_users_flags_win(
    flags: list[str],
    enabled: bool,
    parser: str | None,
    explanation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    from server.arguments import parse
    from server.tool_calls import prefer_tool_calls

    args: Namespace = parse(["--model", str(DEMO / "model"), *flags])
    prefer_tool_calls(args)
    assert (args.enable_auto_tool_choice, args.tool_call_parser) == (enabled, parser)
    assert explanation in args.tool_calls


def ask(client: openai.OpenAI, *, alignment: dict[str, Any] | None = None, **options: Any) -> Any:
    return client.chat.completions.create(
        model="assent-demo:aligned",
        messages=MESSAGES,
        max_tokens=96,
        seed=1,
        extra_body={"alignment": alignment or {}},
        **options,
    )


@pytest.mark.parametrize("alignment", [{}, {"best_of": 2}])
@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
def test_tools_do_no_harm_to_a_model_that_does_not_know_them(client, choice, alignment):
    plain = ask(client, alignment=alignment)
    answer = ask(client, alignment=alignment, tools=TOOLS, **choice)
    assert answer.choices[0].message.content == plain.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


@pytest.mark.parametrize("alignment", [{}, {"best_of": 2}])
@pytest.mark.parametrize("choice", ["required", BY_NAME])
def test_a_forced_call_fits_its_schema(client, choice, alignment):
    options = {"tools": TOOLS, "tool_choice": choice}
    answer = ask(client, alignment=alignment, **options)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "note"
    assert json.loads(call.function.arguments)["object"] in ("rose", "puzzle")
    assert answer.alignment["proxy"] == "aligned"
    chunks = ask(client, alignment=alignment, stream=True, **options)
    calls = [call for c in chunks for choice in c.choices for call in choice.delta.tool_calls or ()]
    assert "".join(call.function.arguments or "" for call in calls) == call.function.arguments


def test_a_schema_that_is_none(client):
    tools = [{"type": "function", "function": {"name": "note", "parameters": {"type": "banana"}}}]
    with pytest.raises(openai.BadRequestError, match='Unsupported type "banana"'):
        ask(client, tools=tools, tool_choice="required")
