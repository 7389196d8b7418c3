"""The command `assent`, as somebody types it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import assent as assent_package
from assent.__main__ import COMMANDS, PURPOSES, TRAIN_PACKAGES, training_commands

ROOT = Path(__file__).parents[1]


def assent(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "assent", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_all_commands(flag):
    result = assent(flag)
    assert result.returncode == 0
    assert all(f"assent {name}" in result.stdout for name in (*COMMANDS, "train"))


def test_without_a_command_the_help_is_shown_as_an_error():
    result = assent()
    assert result.returncode == 2 and "assent serve" in result.stdout


def test_the_version():
    assert assent("--version").stdout == "assent 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("server",), "assent: there is no command 'server': did you mean `assent serve`?"),
        (("xyz",), "assent: there is no command 'xyz': there are serve, doctor, judge, plan, train"),
        (("train", "proxy-pop"), "did you mean `assent train proxy-ppo`?"),
    ],
)  # fmt: skip
def test_a_mistyped_command_is_refused_in_one_line(arguments, hint):
    result = assent(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert hint in result.stderr and result.stderr.count("\n") == 1


def test_training_commands_are_listed_with_a_summary():
    result = assent("train", "--help")
    assert result.returncode == 0
    commands = training_commands()
    assert {"proxy-ppo", "proxy-dpo", "reward-model", "sft", "evaluate"} <= set(commands)
    assert not {"ppo", "models", "learner"} & set(commands)  # modules that are no commands
    for name, summary in commands.items():
        assert summary and f"{name} " in result.stdout and summary in result.stdout


def test_every_training_command_has_one_purpose():
    names = [name for group in PURPOSES.values() for name in group]
    assert sorted(names) == sorted(training_commands())


def complete(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(f"{word!r}" for word in ("assent", *words))
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _assent; echo ${{COMPREPLY[@]}}"
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.mark.slow  # it imports every command
def test_bash_completes_commands_and_options(tmp_path):
    result = assent("--print-completion", "bash")
    assert result.returncode == 0, result.stderr
    script = tmp_path / "completion.bash"
    script.write_text(result.stdout)
    assert complete(script, "") >= {*COMMANDS, "train"}
    assert complete(script, "train", "proxy") == {"proxy-dpo", "proxy-ppo"}
    assert complete(script, "train", "proxy-dpo", "--decoding.t") == {
        "--decoding.temperature", "--decoding.top-k", "--decoding.top-p",
    }  # fmt: skip
    assert complete(script, "train", "proxy-dpo", "--config", "x", "--push") == {"--push-to-hub"}
    assert {"--proxy", "--proxy-root", "--port"} <= complete(script, "serve", "--p")


def test_a_shell_without_completion_is_refused():
    result = assent("--print-completion", "fish")
    assert result.returncode == 2
    assert result.stderr == "assent --print-completion: name a shell: bash or zsh\n"


@pytest.mark.parametrize("name", ["export", "base_model"])  # either spelling
def test_a_command_gets_its_arguments(name):
    result = assent("train", name, "--no-such-option", "1")
    assert result.returncode == 2 and "no-such-option" in result.stdout + result.stderr


def test_a_directory_of_the_same_name_does_no_harm(tmp_path):
    """Where `assent` is installed, the current directory is not searched for its modules."""
    for name in ("server", "judge", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('somebody else')")
    code = (
        "import sys; sys.path.remove(''); sys.argv = ['assent', 'judge', '--help']\n"
        "from assent.__main__ import main; main()"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "How good is a judge?" in result.stdout


def test_the_packages_that_training_needs_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(TRAIN_PACKAGES) <= set(project["optional-dependencies"]["train"])
    assert not set(TRAIN_PACKAGES) & set(project["dependencies"])


def test_importing_the_client_imports_nothing_heavy():
    code = (
        "import sys; import assent; assert 'httpx' not in sys.modules\n"
        "from assent import Alignment, AssentError, AsyncClient, Client\n"
        "heavy = {'torch', 'vllm', 'transformers', 'pydantic', 'openai', 'numpy', 'server', 'training', 'proxy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == "[]\n"


def test_every_public_name_is_there():
    assert dir(assent_package) == sorted(assent_package.__all__)
    for name in assent_package.__all__:
        assert getattr(assent_package, name).__module__.startswith("assent.")
    with pytest.raises(AttributeError, match="no attribute 'Clientt'"):
        _ = assent_package.Clientt
