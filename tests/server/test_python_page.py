"""docs/python.md: every snippet runs, in order, against a server of the toy demo."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import DEMO, REPOSITORY, proxy_flags, serving

PAGE = REPOSITORY / "docs" / "python.md"


def test_every_snippet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DEMO / "proxies" / "polite", tmp_path / "root" / "polite")
    flags = [
        *proxy_flags(),
        "--feedback",
        tmp_path / "feedback.db",
        "--proxy-root",
        tmp_path / "root",
    ]
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("ASSENT_API_KEY", raising=False)
    names: dict[str, Any] = {}
    with serving(tmp_path / "server.log", *flags) as server:
        for snippet in snippets:
            exec(snippet.replace("http://127.0.0.1:8000", server.url), names)
        names["client"].close()
    output = capsys.readouterr().out
    assert len(snippets) == 9
    assert "404 The proxy 'no-such' is not loaded" in output
    assert " instead of " in output
    assert "('next', " in output and "'shadow')" in output
