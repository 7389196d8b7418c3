"""Runs in its_hub's environment: a chat a line on stdin, the best of N a line on stdout. `its_hub.py` starts it."""

import asyncio
import json
import sys
from typing import Any

import aiohttp
from its_hub import (  # type: ignore[import-not-found]
    BestOfN,
    LLMJudge,
    OpenAICompatibleLanguageModel,
)
from its_hub.api import (  # type: ignore[import-not-found]
    AbstractOutcomeRewardModel,
    ChatMessage,
)


class RankReward(AbstractOutcomeRewardModel):
    """Assent's `/judge/rank` as a reward model: the place in its ranking."""

    def __init__(self, url: str) -> None:
        self.url = url

    def score(self, messages: Any, **_: Any) -> Any:
        raise NotImplementedError("asynchronous only")

    async def ascore(self, messages: Any, orchestrator: Any = None, **_: Any) -> Any:
        chat = [{"role": turn.role, "content": turn.content} for turn in messages[0][:-1]]
        responses = [conversation[-1].content or "" for conversation in messages]
        body = {"messages": chat, "responses": responses, "seed": 0}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.url}/judge/rank", json=body) as response,
        ):
            response.raise_for_status()
            ranking = (await response.json())["ranking"]
        return [-float(ranking.index(i)) for i in range(len(responses))]


async def main(settings: dict[str, Any]) -> None:
    lm = OpenAICompatibleLanguageModel(
        endpoint=f"{settings['url']}/v1",
        api_key="none",
        model_name=settings["model"],
        max_completion_tokens=settings["max_tokens"],
    )
    prompt = LLMJudge.DEFAULT_JUDGE_PROMPT
    if settings["wish"]:
        prompt = f"The answer should: {settings['wish']}\n{prompt}"
    reward = RankReward(settings["url"]) if settings["judge"] == "rank" else LLMJudge(lm, prompt)
    best_of_n = BestOfN(reward)

    async def answer(request: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"number": request["number"]}
        try:
            result = await best_of_n.ainfer(
                lm, _chat(request["messages"]), settings["n"], return_response_only=False
            )
            reply["text"] = result.the_one.get("content") or ""
            usage = result.usage
            for name in ("prompt_tokens", "completion_tokens"):
                reply[name] = getattr(usage, name, None)
        except Exception as error:
            reply["error"] = repr(error)
        print(json.dumps(reply), flush=True)

    loop, tasks = asyncio.get_running_loop(), set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        tasks.add(asyncio.create_task(answer(json.loads(line))))
    await asyncio.gather(*tasks)


def _chat(messages: list[dict[str, str]]) -> Any:
    return [ChatMessage(**message) for message in messages]


asyncio.run(main(json.loads(sys.argv[1])))
