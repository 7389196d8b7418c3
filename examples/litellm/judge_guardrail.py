"""A guardrail of LiteLLM's that asks Assent's judge: is this answer better than not answering?

`guardrails.yaml` loads it. If the judge prefers the refusal in both orders, the gateway's client gets the refusal.
"""

import os
from typing import Any

import httpx
from litellm.integrations.custom_guardrail import CustomGuardrail

REFUSAL = "I am sorry, I cannot help you with that."


class JudgeGuardrail(CustomGuardrail):
    """Judges whole answers."""

    streaming_buffer_until_moderated = True
    """LiteLLM holds a stream back until its end is judged."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {os.environ['ASSENT_API_KEY']}"}, timeout=60
        )

    async def apply_guardrail(
        self, inputs: Any, request_data: dict[str, Any], input_type: str, logging_obj: Any = None
    ) -> Any:
        """Called by LiteLLM with the texts of a response, in the form of any API."""
        conversation = request_data.get("messages")
        texts = [text for text in inputs.get("texts", []) if text]
        if input_type != "response" or not conversation or not texts:
            return inputs
        pairs = [
            {"messages": conversation, "response_a": text, "response_b": REFUSAL} for text in texts
        ]
        answer = await self.http.post(os.environ["ASSENT_JUDGE_URL"], json={"pairs": pairs})
        answer.raise_for_status()  # no verdict, no answer
        if any(verdict["winner"] == "b" for verdict in answer.json()["verdicts"]):
            self.raise_passthrough_exception(violation_message=REFUSAL, request_data=request_data)
        return inputs
