"""Agents that send tools: pydantic-ai, instructor and the Agents SDK.

    pip install 'pydantic-ai-slim[openai]' instructor openai-agents
    python examples/integrations/tools.py http://127.0.0.1:8000/v1 assent-demo aligned

A client that is not installed is left out.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

PROMPT = "How do I look after my rose?"


class Note(BaseModel):
    """What the prompt is about."""

    object: Literal["rose", "puzzle"]


def with_pydantic_ai(base_url: str, model: str, alignment: dict[str, Any]) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=base_url, api_key="none")
    agent = Agent(
        OpenAIChatModel(model, provider=provider),
        output_type=Note,
        model_settings={"extra_body": {"alignment": alignment}, "max_tokens": 200},
    )
    return agent.run_sync(PROMPT).output


def with_instructor(base_url: str, model: str, alignment: dict[str, Any]) -> Any:
    import instructor
    from openai import OpenAI

    client = instructor.from_openai(OpenAI(base_url=base_url, api_key="none"))
    note, completion = client.chat.completions.create_with_completion(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        response_model=Note,
        max_tokens=200,
        extra_body={"alignment": alignment},
    )
    return note, completion.alignment


def with_agents_sdk(base_url: str, model: str, alignment: dict[str, Any]) -> Any:
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool
    from openai import AsyncOpenAI

    @function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return "sunny"

    client = AsyncOpenAI(base_url=base_url, api_key="none")
    agent = Agent(
        "gardener",
        model=OpenAIChatCompletionsModel(model, client),
        model_settings=ModelSettings(extra_body={"alignment": alignment}, max_tokens=200),
        tools=[weather],
    )
    return Runner.run_sync(agent, PROMPT).final_output


def main() -> None:
    base_url, model, proxy = sys.argv[1:]
    clients: list[Callable[..., Any]] = [with_pydantic_ai, with_instructor, with_agents_sdk]
    for ask in clients:
        try:
            print(ask.__name__, ask(base_url, model, {"proxy": proxy}))
        except ModuleNotFoundError as error:
            print(ask.__name__, f"left out: {error}")


if __name__ == "__main__":
    main()
