"""Completion of the command `assent` in bash and zsh: commands, training commands and their options.

    assent --print-completion bash >~/.local/share/bash-completion/completions/assent
    assent --print-completion zsh >>~/.zshrc

The script holds all words, so that completing starts no Python. Print it again after an update.
"""

from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from importlib import import_module

SHELLS = ("bash", "zsh")

_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
_SCRIPT = """\
_assent() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} key="${{COMP_WORDS[*]:1:COMP_CWORD-1}}" words=
    case "$key" in
{cases}
    esac
    if [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}}
complete -o default -F _assent assent
"""


def script(shell: str, commands: Sequence[str], training: Sequence[str]) -> str:
    """What the shell reads.

    Args:
        shell: one of SHELLS
        commands: of `assent`, without `train`
        training: of `assent train`
    """
    cases = {'""': [*commands, "train", "--help", "--version"], '"train"': training}
    for name in training:
        cases[f'"train {name}"|"train {name} "*'] = _training_options(name)
    cases |= {'"serve"*|"doctor"*': _server_options(), '"judge"*': _options("judge.evaluate")}
    cases['"plan"*'] = _options("judge.plan")
    lines = (f'        {pattern}) words="{" ".join(words)}" ;;' for pattern, words in cases.items())
    return (_ZSH if shell == "zsh" else "") + _SCRIPT.format(cases="\n".join(lines))


def _training_options(name: str) -> list[str]:
    return _options(f"training.{name.replace('-', '_')}")


def _options(module: str) -> list[str]:
    from judge.config_file import FLAG, flags_of

    found: Iterable[tuple[str, object]] = flags_of(import_module(module).Options)
    return [*(f"--{flag}" for flag, _ in found), FLAG, "--help"]


def _server_options() -> list[str]:
    from server.arguments import VLLM_OPTIONS, add_own_options

    parser = ArgumentParser(add_help=False)
    add_own_options(parser)
    own = [action.option_strings[0] for action in parser._actions]
    theirs = [word for line in VLLM_OPTIONS for word in line.replace(",", "").split()]
    return [*own, *(word for word in theirs if word.startswith("--")), "--help"]
