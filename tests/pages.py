"""The pages of the documentation: their blocks, links and commands."""

import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
GENERATED = REPOSITORY / "docs/reference/http.md"
PAGES = sorted(
    {
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/**/*.md"),
        *REPOSITORY.glob("deploy/**/*.md"),
        *REPOSITORY.glob("examples/*.md"),
    }
    - {GENERATED, REPOSITORY / "CHANGELOG.md"}
    - {*REPOSITORY.glob("deploy/demo/**/proxies/*/README.md")}  # model cards, which training writes
)

FOLLOWED = {
    "docs/align-your-model.md": "tests/training/test_align_your_model.py",
    "docs/python.md": "tests/server/test_python_page.py",
}
"""Pages whose blocks another test runs, all of them in order."""

NOT_RUN = {
    ("README.md", "make serve   # installs"): "the commands of CI",
    ("README.md", "make serve DEMO=toy ARGS="): "takes minutes; tests/server/test_learning.py",
    ("README.md", "python -m training.proxy_dpo"): "needs an LLM; tests/training/test_proxy_dpo.py",
    ("docs/hook.md", "make serve ARGS="): "another server; tests/proxy/test_drafts.py",
    ("docs/index.md", "make serve   # installs"): "a command of CI",
    ("examples/README.md", "make serve DEMO=toy"): "starts what the tests have",
    ("docs/integrations.md", "lm_eval"): "needs lm-eval; tests/server/test_examples.py",
    ("docs/integrations.md", "python -m server"): "needs a collector; tests/server/test_tracing.py",
    ("docs/judge.md", "python -m benchmarks.peers"): "minutes; tests/benchmarks/test_peers.py",
    ("docs/judge.md", "python -m training.jsft"): "tests/training/test_supervised.py",
    ("docs/judge.md", "python -m training.reward_model"): "tests/training/test_probe.py",
    ("docs/operations.md", "docker build"): "needs Docker; tests/deploy",
    ("docs/quality-cost.md", "make serve DEMO=toy"): "takes minutes; tests/server/test_plan.py",
    ("docs/results/peers.md", "python -m benchmarks.peers"): (
        "minutes, and packages from PyPI; tests/benchmarks/test_peers.py"
    ),
    ("docs/results/real.md", "python -m benchmarks.real"): "hours; tests/benchmarks/test_real.py",
    (
        "docs/training.md",
        "source .venv/bin/activate",
    ): "takes half an hour; tests/training runs each command",
    ("docs/training.md", "python -m training.proxy_dpo"): "tests/training/test_proxy_dpo.py",
    ("docs/seven-b.md", "model=Qwen/Qwen2.5-7B-Instruct"): "needs a GPU and a 7B model",
}
"""(page, how the block begins) -> why `test_snippets` does not run it, or what does. Its commands are parsed."""


BY_HAND = {"docs/integrations.md": ("py", "js")}
"""Languages of blocks that were run by hand with clients that `make install` does not install; the page dates them."""
SETTINGS = ("json", "toml", "yaml")


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str

    @property
    def reason_not_to_run(self) -> str | None:
        if self.page in FOLLOWED:
            return FOLLOWED[self.page]
        for (page, start), reason in NOT_RUN.items():
            if self.page == page and self.text.startswith(start):
                return reason
        return None


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    matches = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert text.count("```") == 2 * len(matches), "a fence that no block begins or ends with"
    return matches


def program_blocks() -> list[Block]:
    """All blocks of `bash` and `python`."""
    return [
        Block(name_of(page), language, text)
        for page in PAGES
        for language, text in blocks(page.read_text(encoding="utf-8"))
        if language in ("bash", "python")
    ]


def commands(text: str) -> list[str]:
    """Every `python -m ...` of a page, in blocks, indented, or between backticks; without comments and pipes."""
    joined = re.sub(r"\\\n\s*", " ", text)
    inline = re.findall(r"`(python -m [^`]+)`", joined)
    lines = re.findall(r"^(?: {4})?(python -m .*)$", joined, re.MULTILINE)
    return [re.split(r"\s+[#|;]", line)[0] for line in [*inline, *lines]]


def links(text: str) -> list[str]:
    """Targets of all links and images that are not addresses."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(<?([^)\s>]+)>?\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Of all headings, as GitHub and the docs site make them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
