"""Which of vLLM's parsers reads the tool calls of a model: chosen by the model's chat template, unless the command line
names one.

vLLM refuses every request with `tools` unless it was started with a parser, and many clients send `tools` with each
request. A template that knows no tools gets a parser too, `ForcedCalls`: the model is not told of the tools, so it
answers in words, but a call that the request forces (`tool_choice` "required", or a function's name) is one by grammar.
"""

import json
import re
from argparse import Namespace
from typing import Any, NamedTuple

from vllm.entrypoints.generate.base.protocol import DeltaMessage, ExtractedToolCallInformation
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import load_chat_template
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import get_tokenizer
from vllm.tool_parsers import ToolParser, ToolParserManager
from vllm.tool_parsers.utils import get_json_schema_from_tools
from vllm.utils.mistral import is_mistral_tokenizer
from xgrammar import Grammar

FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mistral", ("[TOOL_CALLS]",)),
    ("llama3_json", ("dictionary of argument name and its value",)),
    ("openai", ("<|channel|>", "<|call|>")),
    ("gemma4", ("<|tool_call>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>", "arguments")),
)
"""vLLM's name of a parser, and texts that stand in the templates of its models. The first that fits is taken."""
FORCED_CALLS = "assent_forced"
"""The parser for templates without tools."""


class ForcedCalls(ToolParser):
    """Leaves every text as it is. The base class has vLLM constrain a call that the request forces to the tools'
    JSON schemas, and reads it.
    """

    def adjust_request(self, request: Any) -> Any:
        # One call: a model that does not know of the tools might go on with more to the end.
        schema = get_json_schema_from_tools(
            request.tool_choice, request.tools, parallel_tool_calls=False
        )
        if schema is None or not isinstance(request, ChatCompletionRequest):
            return super().adjust_request(request)
        # Without whitespace: a model that does not know what is asked of it might write blank lines to the end.
        try:
            grammar = Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
        except RuntimeError as error:
            reason = str(error).partition(": ")[2].strip()  # after the time and the place in C++
            message = f"tools: no grammar can be made of the schema: {reason}"
            raise VLLMValidationError(message, parameter="tools") from None
        request.structured_outputs = StructuredOutputsParams(grammar=str(grammar))
        request.response_format = None
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)

    def extract_tool_calls_streaming(
        self, previous_text: str, current_text: str, delta_text: str, *_: Any, **__: Any
    ) -> DeltaMessage:
        return DeltaMessage(content=delta_text)


class ToolCalls(NamedTuple):
    """What a server does with tools."""

    parser: str | None
    """vLLM's name of it; None = requests with tools are refused."""
    explanation: str
    """For the log."""


def find_tool_calls(args: Namespace) -> ToolCalls:
    """What the command line says, or what the chat template tells."""
    if args.enable_auto_tool_choice is False:
        return ToolCalls(None, "off (--no-enable-auto-tool-choice)")
    if args.tool_call_parser:
        return ToolCalls(args.tool_call_parser, f"read by {args.tool_call_parser}")
    return read_template(_find_template(args))


def read_template(template: str | None) -> ToolCalls:
    """
    Args:
        template: Jinja source; None = the model has none.
    """
    if template is None:
        return ToolCalls(None, "off: no chat template was found")
    if not re.search(r"\btools\b", template):
        explanation = "only where a request forces one: the chat template tells the model of none"
        return ToolCalls(FORCED_CALLS, explanation)
    for parser, texts in FORMATS:
        if all(text in template for text in texts):
            return ToolCalls(parser, f"read by {parser}, chosen by the chat template")
    explanation = (
        "off: the format of the chat template is not known; --tool-call-parser NAME reads them"
    )
    return ToolCalls(None, explanation)


def prefer_tool_calls(args: Namespace) -> None:
    """Set vLLM's options where the user has set nothing, and `args.tool_calls` for the log."""
    ToolParserManager.register_lazy_module(FORCED_CALLS, __name__, ForcedCalls.__name__)
    found = find_tool_calls(args)
    args.enable_auto_tool_choice, args.tool_call_parser = found.parser is not None, found.parser
    args.tool_calls = found.explanation


def _find_template(args: Namespace) -> str | None:
    """The template of a chat with tools, from the command line or from the model's files."""
    if args.skip_tokenizer_init:
        return None
    try:
        tokenizer: Any = get_tokenizer(
            args.tokenizer or args.model,
            tokenizer_mode=args.tokenizer_mode,
            revision=args.tokenizer_revision or args.revision,
            download_dir=args.download_dir,
        )
        if is_mistral_tokenizer(tokenizer):  # it has the format in its code
            return "tools [TOOL_CALLS]"
        template: str = tokenizer.get_chat_template(
            load_chat_template(args.chat_template), tools=[{}]
        )
        return template
    except Exception:
        # Of many kinds. vLLM reads the same files later, and reports what is wrong with them.
        return None
