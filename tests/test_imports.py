"""The import arrows of the design, and the modules that the packages' docstrings list, read from the sources.

`server` and `training` may import `proxy` and `judge`, and nothing points back or across. Only the
files named below import vllm. Imports inside functions and under `if TYPE_CHECKING` count as well.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package -> what it must not import: its siblings on the wrong end of an arrow, and heavy libraries
FORBIDDEN = {
    "proxy": {"judge", "server", "training"},
    "judge": {"proxy", "server", "training", "torch", "vllm"},
    "server": {"training"},
    "training": {"server"},
}

# The only files that may import vllm. Whoever upgrades vLLM reads these.
VLLM_FILES = {
    "proxy/engine/drafts_cpu.py",
    "proxy/engine/embeddings.py",
    "proxy/engine/lora_cpu.py",
    "proxy/engine/ranks.py",
    "proxy/engine/rejection_v1.py",
    "proxy/engine/rejection_v2.py",
    "proxy/engine/runner.py",
    "proxy/engine/sampler_v1.py",
    "proxy/engine/sampler_v2.py",
    "proxy/worker.py",
    "server/arguments.py",
    "server/cli.py",
    "server/doctor.py",
    "server/engine.py",
    "server/kv_cache.py",
    "server/plugin.py",
    "server/tool_calls.py",
    "server/vllm_patches.py",
    "training/rollout_vllm.py",
    "training/rollout_worker.py",
}


def imported_modules(source: str, file: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, absolute module name) for each import in the source of `file`.

    A relative import is resolved against the file's place; `import_module("literal")` counts too.
    """
    package = Path(file).parent.parts
    for node in ast.walk(ast.parse(source, filename=file)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=module, level=0):
                yield node.lineno, module or ""
            case ast.ImportFrom(module=module, level=level):
                base = package[: len(package) - level + 1]
                yield node.lineno, ".".join([*base, *([module] if module else [])])
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


def violations(source: str, file: str) -> list[str]:
    """List the imports of `file` (relative to the root, with slashes) that break the arrows."""
    errors = []
    package = Path(file).parts[0]
    for line, module in imported_modules(source, file):
        top = module.split(".")[0]
        if top in FORBIDDEN[package]:
            errors.append(f"{file}:{line}: {package}/ must not import {module}")
        elif top == "vllm" and file not in VLLM_FILES:
            errors.append(f"{file}:{line}: imports {module}, but is not one of VLLM_FILES")
    return errors


def source_files() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
    )


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_names_all_modules(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    listed = re.findall(r"^- `(\w+)` +- ", ast.get_docstring(tree) or "", re.MULTILINE)
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert sorted(listed) == sorted(modules)


def test_contributing_names_no_file_that_is_not_there() -> None:
    names = re.findall(r"`([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    paths = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py")}
    assert len(names) > 30
    for name in names:
        assert any(path == name or path.endswith(f"/{name}") for path in paths), name


@pytest.mark.parametrize("package", ["proxy/cpu", "proxy/engine"])
def test_a_part_of_a_package_names_all_modules(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    listed = re.findall(r"^- `(\w+)` +- ", ast.get_docstring(tree) or "", re.MULTILINE)
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert sorted(listed) == sorted(modules)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not inside functions either."""
    modules = {file.removesuffix(".py").replace("/", "."): file for file in source_files()}
    graph = {
        module: {
            name
            for _, name in imported_modules((ROOT / file).read_text(encoding="utf-8"), file)
            if name in modules
        }
        for module, file in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_package_is_read() -> None:
    assert {Path(file).parts[0] for file in source_files()} == set(FORBIDDEN)


def test_imports_follow_the_arrows() -> None:
    errors = [
        violation
        for file in source_files()
        for violation in violations((ROOT / file).read_text(encoding="utf-8"), file)
    ]
    assert not errors, "\n".join(errors)


def test_the_list_of_vllm_files_is_not_stale() -> None:
    for file in sorted(VLLM_FILES):
        modules = imported_modules((ROOT / file).read_text(encoding="utf-8"), file)
        packages = {module.split(".")[0] for _, module in modules}
        assert "vllm" in packages, f"{file} imports no vllm: take it off VLLM_FILES"


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("proxy/a.py", "import server.chat", "proxy/a.py:1: proxy/ must not import server.chat"),
        ("proxy/a.py", "from training import ppo", "proxy/a.py:1: proxy/ must not import training"),
        ("judge/a.py", "import torch.nn as nn", "judge/a.py:1: judge/ must not import torch.nn"),
        ("judge/a.py", "\nimport vllm", "judge/a.py:2: judge/ must not import vllm"),
        ("judge/a.py", "import proxy", "judge/a.py:1: judge/ must not import proxy"),
        ("server/a.py", "import json, training", "server/a.py:1: server/ must not import training"),
        (
            "training/toy_data/a.py",
            "def f():\n    from server import chat",
            "training/toy_data/a.py:2: training/ must not import server",
        ),
        (
            "training/a.py",
            "importlib.import_module('server.chat')",
            "training/a.py:1: training/ must not import server.chat",
        ),
        (
            "training/ppo.py",
            "def f():\n    import vllm",
            "training/ppo.py:2: imports vllm, but is not one of VLLM_FILES",
        ),
        (
            "proxy/network.py",
            "if TYPE_CHECKING:\n    from vllm import LLM",
            "proxy/network.py:2: imports vllm, but is not one of VLLM_FILES",
        ),
    ],
)
def test_a_bad_import_is_found(file: str, source: str, message: str) -> None:
    assert violations(source, file) == [message]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("proxy/engine/sampler_v1.py", "from vllm.v1.sample.sampler import Sampler"),
        ("proxy/a.py", "import torch\nfrom . import training"),
        ("judge/prompts/a.py", "from ..verdict import Verdict"),
        ("server/a.py", "import proxy.request\nfrom judge.judge import Judge"),
        ("training/a.py", "from proxy.network import ProxyNetwork  # not: import server"),
    ],
)
def test_a_good_import_is_let_through(file: str, source: str) -> None:
    assert violations(source, file) == []
