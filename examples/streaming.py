"""Watch a proxy at work: rejected candidates before the token that replaced them, and the progress of best of N.

make serve DEMO=toy
.venv/bin/python examples/streaming.py "Can I open my kettle with a fork?"
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
        model = client.models.list().data[1].id  # `<model>:<proxy>`
        print("With its trace:", end=" ", flush=True)
        show(client, model, prompt, {"trace": True})
        print("The best of 4:", end=" ", flush=True)
        show(client, model, prompt, {"best_of": 4})


def show(client: OpenAI, model: str, prompt: str, alignment: dict[str, Any]) -> None:
    """Print what a stream says, as it comes."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=64,
        seed=1,
        stream=True,
        extra_body={"alignment": alignment},
    )
    for chunk in stream:
        news: dict[str, Any] = getattr(chunk, "alignment", None) or {}
        if (progress := news.get("progress")) is not None:
            print(f"[{progress['stage']} {progress['done']}]", end=" ", flush=True)
        for choice in news.get("trace", ()):
            for entry in choice["entries"]:
                rejected = "".join(f"({candidate['token']})" for candidate in entry["rejected"])
                print(rejected + entry["token"], end="", flush=True)
        if "trace" not in alignment and chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if "proposed" in news:  # the last chunk
            print(f"\n    {news['proposed']} proposed, {news['rejected']} rejected")


if __name__ == "__main__":
    main()
