"""The documentation: links lead somewhere, commands have the options they are shown with, no block is forgotten."""

import importlib
import re
import shlex
from importlib.util import find_spec

import pytest
import tyro

from benchmarks.comparison import jobs
from tests.pages import (
    BY_HAND,
    FOLLOWED,
    GENERATED,
    NOT_RUN,
    PAGES,
    REPOSITORY,
    SETTINGS,
    anchors,
    blocks,
    commands,
    links,
    name_of,
    program_blocks,
)


def pages():
    return pytest.mark.parametrize("page", PAGES, ids=name_of)


@pages()
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    site = REPOSITORY / "docs"
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if page.is_relative_to(site):
            assert file.is_relative_to(site), f"the docs site has no page {target}"
        if file == GENERATED:
            continue
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pages()
def test_paths_in_the_text_exist(page):
    """Files of the repository between backticks."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"`((?:docs|examples|deploy|tests|benchmarks)/[\w./-]+)`", text)
    missing = [path for path in found if not (REPOSITORY / path).exists()]
    assert missing == []


def options_of(module):
    """The dataclass of a command's options."""
    spec = find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    imported = importlib.import_module(f"{module}.__main__" if is_package else module)
    return getattr(imported, "Options", jobs.Options)  # the comparisons share theirs


ALL_COMMANDS = sorted(
    {command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))}
)
OWN_PARSERS = ("server", "tests.", "deploy.")
"""Modules whose options are not a dataclass `Options`."""


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_have_these_options(command, capsys):
    module, *arguments = shlex.split(command)[2:]
    if module == "training.NAME":
        return
    assert find_spec(module), f"there is no module {module}"
    arguments = [word for word in arguments if word not in ("...", "--help")]
    if module == "server":
        from server.arguments import parse

        if "--help=all" not in arguments:
            parse(arguments[1:] if arguments[:1] == ["doctor"] else arguments)
    elif not module.startswith(OWN_PARSERS) and arguments:
        try:
            tyro.cli(options_of(module), args=arguments)
        except SystemExit:
            # A sentence may show just the options that it is about.
            error = capsys.readouterr().err
            assert "Required options" in error and "Unrecognized" not in error, error


def test_there_are_commands():
    assert len(ALL_COMMANDS) > 40
    assert len({command.split()[2] for command in ALL_COMMANDS}) > 20


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    used = {
        target
        for page in PAGES
        for target in re.findall(
            r"(?:`|^)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert used <= targets and len(used) > 8


@pages()
def test_a_block_that_is_no_setting_is_run(page):
    """Under no other name of the language than the two that tests run."""
    languages = {language for language, _ in blocks(page.read_text(encoding="utf-8")) if language}
    assert languages <= {"bash", "python", *SETTINGS, *BY_HAND.get(name_of(page), ())}


def test_no_excuse_is_left_over():
    """Every excuse is that of a block, and names a test that is there."""
    begun = {(block.page, block.text) for block in program_blocks()}
    for page, start in NOT_RUN:
        assert any(page == name and text.startswith(start) for name, text in begun), start
    for reason in [*NOT_RUN.values(), *FOLLOWED.values()]:
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize(
    "page", ["    ```bash\n    ls\n    ```", "```bash\nls\n```\n~~~\n```", "```c++\nint\n```"]
)
def test_a_block_that_would_not_be_run_is_noticed(page):
    with pytest.raises(AssertionError, match="fence"):
        blocks(page)
