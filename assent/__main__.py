"""The command `assent`. Each subcommand is a module that `python -m` runs too:

    assent serve       python -m server             serve a frozen LLM with proxies and a judge
    assent doctor      python -m server doctor      check a configuration without starting it
    assent judge       python -m judge.evaluate     measure a judge on preference pairs
    assent plan        python -m judge.plan         choose between proxy and best of N
    assent train NAME  python -m training.NAME      training commands; `assent train` lists them

    assent --version
    assent --print-completion bash|zsh              for the shell: `assent.completion` says where to put it

The module runs in this process's place, with the same arguments. The current directory is not searched for it: a
directory `server` or `training` of your own does no harm.
"""

import ast
import difflib
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "serve": ["server"],
    "doctor": ["server", "doctor"],
    "judge": ["judge.evaluate"],
    "plan": ["judge.plan"],
}
TRAIN = "train"
COMPLETION = "--print-completion"
PURPOSES = {
    "Data": ("prepare", "export"),
    "A proxy": ("proxy-dpo", "proxy-ppo", "evaluate", "estimate"),
    "A reward or a judge": ("reward-model", "jsft"),
    "The LLM's own weights, for comparison": ("dpo", "rlhf-ppo", "self-judge", "sft"),
    "From nothing": ("demo", "base-model"),
}
"""Of the training commands, in the order of a project."""
TRAIN_PACKAGES = ("accelerate", "datasets", "matplotlib", "peft", "pyarrow")
HELP = ("-h", "--help")


def main() -> NoReturn:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        print(__doc__)
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name == "--version":
        print(f"assent {version('assent')}")
        sys.exit()
    if name == COMPLETION:
        print_completion(rest)
    if name == TRAIN:
        train(rest)
    if name not in COMMANDS:
        refuse("assent", name, [*COMMANDS, TRAIN])
    if name == "judge":
        need_train_extra("assent judge")
    run(*COMMANDS[name], *rest)


def train(arguments: list[str]) -> NoReturn:
    """Run a training command, or list all of them."""
    commands = training_commands()
    if not arguments or arguments[0] in HELP:
        print("assent train NAME [options]; --help after a name lists its options\n")
        width = max(map(len, commands))
        for purpose, names in PURPOSES.items():
            print(f"{purpose}:")
            for name in names:
                print(f"    {name:{width}}  {commands[name]}")
            print()
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    command = name.replace("_", "-")
    if command not in commands:
        refuse("assent train", name, list(commands))
    need_train_extra("assent train")
    run(f"training.{command.replace('-', '_')}", *rest)


def print_completion(arguments: list[str]) -> NoReturn:
    """Print the script that completes this command in a shell."""
    from assent.completion import SHELLS, script

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        _end(f"assent {COMPLETION}: name a shell: {' or '.join(SHELLS)}")
    need_train_extra(f"assent {COMPLETION}")
    print(script(arguments[0], [*COMMANDS], [*training_commands()]), end="")
    sys.exit()


def training_commands() -> dict[str, str]:
    """Name and first sentence of each module of `training` that is a command, which is one with a class `Options`.

    The sources are read and not imported: imports take seconds.
    """
    spec = find_spec("training")
    assert spec is not None and spec.origin is not None  # it is installed with this file
    commands = {}
    for path in sorted(Path(spec.origin).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        if {"Options", "main"} <= names:
            summary = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
            commands[path.stem.replace("_", "-")] = summary.split(": `")[0].rstrip(".:")
    return commands


def refuse(command: str, name: str, names: list[str]) -> NoReturn:
    """End with exit code 2 and a line that names the nearest command."""
    near = difflib.get_close_matches(name.replace("_", "-"), names, n=1, cutoff=0.5)
    hint = f"did you mean `{command} {near[0]}`?" if near else f"there are {', '.join(names)}"
    _end(f"{command}: there is no command {name!r}: {hint}")


def need_train_extra(command: str) -> None:
    """End with exit code 2 where the packages of the extra `train` are missing."""
    missing = [name for name in TRAIN_PACKAGES if find_spec(name) is None]
    if missing:
        _end(f"{command} needs {', '.join(missing)}: install assent with the extra `train`")


def _end(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def run(module: str, *arguments: str) -> NoReturn:
    """Replace this process by `python -m module`; signals and the exit code are then the module's own."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


if __name__ == "__main__":
    main()
