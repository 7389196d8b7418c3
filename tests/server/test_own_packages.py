"""Another package called `proxy` on the path is named in one line, and nothing is imported from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.own_packages import PACKAGES, ROOT, intruders


def test_ours_are_ours() -> None:
    assert intruders() == []
    assert all((ROOT / name / "__init__.py").is_file() for name in PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_ours(name: str, tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    (message,) = intruders()
    assert f"{package / '__init__.py'} hides Assent's package {name!r}" in message


def test_a_start_beside_another_proxy(tmp_path: Path) -> None:
    """As a user meets it: a directory `proxy` where the server is started, and ours installed elsewhere."""
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); from server.__main__ import main; main()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == (
        f"python -m server: error: {tmp_path / 'proxy' / '__init__.py'} hides Assent's package 'proxy': rename it, or "
        "start from another directory\n"
    )
