"""The Python snippets of docs/integrations.md, run as they stand against the tests' server."""

import re

import pytest

from tests.server.conftest import API_KEY, REPOSITORY

PAGE = (REPOSITORY / "docs" / "integrations.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["openai", "anthropic"])
def test_a_snippet(server, snippet, capsys):
    code = snippet.replace("http://127.0.0.1:8000", server.url).replace('"none"', f'"{API_KEY}"')
    exec(compile(code, "docs/integrations.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == snippet.count("print(")
    assert "'proxy': 'aligned', 'version': '" in printed[0] and "'rejected': " in printed[0]
