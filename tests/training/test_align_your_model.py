"""docs/align-your-model.md, followed to the letter: every block on it is run, in order, with the real server.

Only the size differs: a tiny model and a small preference file in the place of the page's, and the options in `TINY`.
The shell reads every block; where it calls `python -m`, the command starts from `tests.warm`.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from tests.pages import blocks
from tests.server.conftest import Server, _stop, _wait_until_healthy, free_port
from tests.warm import Command

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "align-your-model.md"
TINY = {
    "training.prepare": "--held-out 20",
    "training.reward_model": "--max-rows 32",
    "training.proxy_dpo": "--epochs 1 --max-rows 12 --decoding.max-new-tokens 16",
    "training.proxy_ppo": "--steps 1 --episodes 16 --decoding.max-new-tokens 16",
    "training.evaluate": "--num-prompts 5",
}
# Prints the arguments of each call: how many, and which.
PRINT_CALLS = """python() { printf '%s\\0' "$#" "$@"; }\n"""


class PageRunner:
    """Runs the page in its own directory."""

    def __init__(self, directory: Path, stack: ExitStack, variables: dict[str, str | Path]) -> None:
        self.directory, self.stack, self.variables = directory, stack, variables
        self.port = free_port()
        # Other tests set vLLM's variables for engines in this process; the server finds its own.
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith("VLLM_")
        }
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment["PYTHONPATH"] = str(REPOSITORY)

    def run_block(self, language: str, text: str) -> str:
        """Run a block and return its output."""
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if language == "json":
            return self.write_preferences(text)
        if language == "python":
            return self.run([sys.executable, "-c", text])
        assert language == "bash", f"a block of {language or 'no language'} cannot be run"
        if text.startswith("export"):
            return self.export(text)
        if text.startswith("python -m server"):
            return self.serve(text)
        if text.startswith("python -m"):
            return "".join(map(self.train, self.calls(text)))
        return self.run(["bash", "-euo", "pipefail", "-c", text])

    def run(self, command: list[str]) -> str:
        result = subprocess.run(
            command, cwd=self.directory, env=self.environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def calls(self, text: str) -> list[list[str]]:
        """The module and the arguments of each `python -m` in a block, as the shell hands them over."""
        words = self.run(["bash", "-euo", "pipefail", "-c", PRINT_CALLS + text]).split("\0")[:-1]
        calls = []
        while words:
            end = 1 + int(words[0])
            assert words[1] == "-m"
            calls.append(words[2:end])
            words = words[end:]
        return calls

    def train(self, call: list[str]) -> str:
        module, *arguments = call
        command = Command(
            *(module, *arguments, *TINY[module].split()),
            environment=self.environment,
            directory=self.directory,
        )
        out, err = command.communicate()
        assert command.wait() == 0, f"{call}\n{out}\n{err}"
        return out

    def export(self, text: str) -> str:
        names = re.findall(r"^export (\w+)=\S+$", text, re.MULTILINE)
        assert set(names) == set(self.variables) and len(names) == len(text.splitlines())
        self.environment |= {name: str(self.variables[name]) for name in names}
        return ""

    def write_preferences(self, example: str) -> str:
        """The page's own example, and pairs of the toy data."""
        row = json.loads(example)
        assert example.count("\n") == 1, "JSON lines: an object is one line"
        with Path(self.variables["PREFERENCES"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return ""

    def serve(self, text: str) -> str:
        (call,) = self.calls(text)
        log = self.directory / "server.log"
        process = Command(
            *(*call, "--port", str(self.port)),
            environment=self.environment,
            directory=self.directory,
            new_session=True,
            log=log,
        )
        self.stack.callback(_stop, process)
        _wait_until_healthy(process, Server(f"http://127.0.0.1:{self.port}", log, process))
        return ""


def test_a_person_who_follows_the_page_has_a_served_proxy(work_dir: Path, tmp_path: Path) -> None:
    preferences = tmp_path / "my_preferences.jsonl"
    with (work_dir / "world/preferences.jsonl").open(encoding="utf-8") as file:
        preferences.write_text("".join(islice(file, 120)), encoding="utf-8")
    printed = []
    with ExitStack() as stack:
        variables = {
            "MODEL": work_dir / "base",
            "PREFERENCES": preferences,
            "INSTRUCTIONS": work_dir / "world/prompts.jsonl",
        }
        runner = PageRunner(tmp_path, stack, variables)
        for language, text in blocks(PAGE.read_text(encoding="utf-8")):
            if language != "yaml":  # an example of --config
                printed.append(runner.run_block(language, text))
    (
        _, _, prepare_output, probe_output, _, _, _, _, dial_output, chat_output, proxies_output, _,
        accuracies, direct_output, ranked_output,
    ) = printed  # fmt: skip
    assert "121 pairs\n" in prepare_output and "skipped" not in prepare_output
    assert "round 1: mean reward" in ranked_output
    assert "outside the LLM's nucleus" in ranked_output and "outside" in direct_output
    assert accuracies.count("eval_rewards/accuracies") == 2
    assert (
        "pairs right in 5-fold cross-validation" in probe_output
        and "coherence: " in probe_output
        and "held-out pairs right" in probe_output
    )
    figures = json.loads((tmp_path / "runs/mine/figures.json").read_text())
    assert set(figures["rewards"]) == {"runs/mine/probe"}
    blind = (tmp_path / "runs/mine/blind/answers.jsonl").read_text(encoding="utf-8")
    assert len(blind.splitlines()) == figures["prompts"] == 5
    answers = re.findall(r'"proxy":"mine"', dial_output.replace(" ", ""))
    assert len(answers) == 3
    assert chat_output.strip()
    names = {proxy["name"] for proxy in json.loads(proxies_output.splitlines()[-1])["data"]}
    assert names == {"mine", "mine-too"}
