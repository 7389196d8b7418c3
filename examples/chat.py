"""Ask the frozen LLM, the same LLM with a proxy, and for the best of four answers.

make serve DEMO=toy
.venv/bin/python examples/chat.py "Can I open my kettle with a fork?"
"""

import os
import sys
from typing import Any

from openai import OpenAI

URL = os.environ.get("ASSENT_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("ASSENT_API_KEY", "none")


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "How do I look after my kettle?"
    with OpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
        frozen, *proxied = [model.id for model in client.models.list()]
        proxy = proxied[0].partition(":")[2]  # the model `<model>:<proxy>`
        print(f"{frozen}: {ask(client, frozen, prompt, {})}")
        for strength in (0.25, 1):
            alignment = {"proxy": proxy, "strength": strength}
            print(f"{proxy}, strength {strength}: {ask(client, frozen, prompt, alignment)}")
        alignment = {"proxy": proxy, "best_of": 4}
        print(f"{proxy}, best of 4: {ask(client, frozen, prompt, alignment)}")


def ask(client: OpenAI, model: str, prompt: str, alignment: dict[str, Any]) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=64,
        seed=1,
        extra_body={"alignment": alignment},
    )
    # The client keeps the field that OpenAI does not know.
    stats: dict[str, Any] = answer.alignment  # type: ignore[attr-defined]
    text = f"{answer.choices[0].message.content}\n    {stats['rejected']} candidates rejected"
    if "judge" in stats:
        comparisons = sum(map(len, stats["judge"]["rounds"]))
        text += f"; {comparisons} comparisons, ranking {stats['judge']['ranking']}"
    return text


if __name__ == "__main__":
    main()
