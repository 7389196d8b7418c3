"""A LangChain chain through a proxy. `pip install langchain-openai` first.

make serve DEMO=toy
python examples/langchain_chat.py
"""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL = os.environ.get("ASSENT_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("ASSENT_API_KEY", "none")
MODEL = os.environ.get("ASSENT_MODEL", "assent-demo")


def main() -> None:
    prompt = ChatPromptTemplate.from_messages([("user", "How do I look after my {thing}?")])
    for alignment in ({}, {"proxy": "aligned"}):
        model = ChatOpenAI(
            model=MODEL,
            base_url=f"{URL}/v1",
            api_key=KEY,
            seed=1,
            max_completion_tokens=64,
            extra_body={"alignment": alignment},
            include_response_headers=True,
        )
        answer = (prompt | model).invoke({"thing": "kettle"})
        # LangChain drops `alignment` from the body; the header names the version.
        proxy = answer.response_metadata["headers"].get("assent-proxy", "no proxy")
        print(f"{proxy}: {answer.content}")


if __name__ == "__main__":
    main()
