"""The command line of the server: our options, and all of vLLM's.

`--help` shows ours and the few of vLLM's that a start needs; `--help=all` shows all. A line that cannot be parsed is
refused with one line that names the nearest option or command.
"""

import argparse
import difflib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

PROG = "python -m server"
DRAIN_SECONDS = 30.0
MAX_BODY_BYTES = 32 * 1024**2
PATHS = (
    *("model", "tokenizer", "chat_template", "download_dir"),
    *("proxy_root", "principles", "feedback", "access"),
)
"""Options that may begin with `~`, which a shell does not expand after `=`."""
REPEATED = ("proxy", "shadow", "judge", "learn")
"""Options that may be given several times."""
VLLM_OPTIONS = {
    "--model DIR": "Directory of Hugging Face files, or a hub id: the frozen LLM. Needed.",
    "--served-model-name NAME [NAME ...]": "What requests call it. Default: the value of --model.",
    "--host HOST, --port PORT": "Where to listen. Default: 127.0.0.1, 8000.",
    "--api-key KEY [KEY ...]": "Keys that requests must send; or the variable ASSENT_API_KEYS.",
    "--max-model-len N": "Tokens of a prompt with its response. Default: the model's own limit.",
    "--tensor-parallel-size N": "Number of GPUs that share the model. Default: 1.",
    "--tool-call-parser NAME": "Of the model's tool calls. Default: by its chat template.",
    "--no-enable-auto-tool-choice": "Refuse requests with tools, as vLLM does by default.",
    "--config FILE": "YAML file of options, ours among them.",
}
"""Shown by --help beside our own."""


class StartupError(ValueError):
    """The command line asks for something that cannot be; the message is one line."""


def refused_by_vllm(model: str, error: ValidationError) -> StartupError:
    """Of vLLM's configuration, before an engine starts."""
    message = error.errors(include_url=False, include_context=False)[0]["msg"]
    return StartupError(f"vLLM cannot serve {model!r}: {message}")


def parse(argv: Sequence[str]) -> Namespace:
    """The options; --help prints and exits.

    Raises:
        StartupError: the line cannot be parsed.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text())
        raise SystemExit(0)
    _check_command(argv)
    # vLLM's parser warns of every option that is given twice, so it does not see these.
    repeated = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in REPEATED:
        repeated.add_argument(f"--{name}", action="append", default=[])
    given, rest = repeated.parse_known_args(argv)
    try:
        args = _make_parser().parse_args(rest)
        for name in REPEATED:  # those of a --config file first
            setattr(args, name, [*getattr(args, name), *getattr(given, name)])
        args.judge = [Path(path).expanduser() for path in args.judge]
        args.model = args.model or args.model_tag
        args.enable_offline_docs &= not args.disable_fastapi_docs
        _expand_home(args)
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
    except (ValueError, TypeError, OSError) as error:
        raise StartupError(str(error)) from None
    return args


def help_text() -> str:
    """What --help prints."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} --model DIR [options]\n       {PROG} doctor --model DIR [options]",
        description="vLLM's OpenAI-compatible server, with proxies that align a frozen LLM and a judge.\n"
        "`doctor` checks the same options without a start.",
        epilog="All of vLLM's options work too: --help=all lists them, --help=WORD searches for one.",
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_own_options(parser)
    lines = [f"{usage:38} {text}" for usage, text in VLLM_OPTIONS.items()]
    parser.add_argument_group("model and address (vLLM's options)", "\n".join(lines))
    return parser.format_help()


def add_own_options(parser: argparse.ArgumentParser) -> None:
    """Our options, in groups."""
    proxies = parser.add_argument_group("proxies")
    proxies.add_argument(
        "--proxy",
        action="append",
        metavar="NAME=DIR",
        help="Load the proxy checkpoint in DIR under NAME. DIR is a directory, or a repository of the Hub: ORG/REPO or "
        "ORG/REPO@REVISION. May be repeated.",
    )
    proxies.add_argument(
        "--shadow",
        action="append",
        metavar="NAME=DIR",
        help="Load the proxy checkpoint in DIR to score all tokens without acting: metrics "
        "report how often it would have decided otherwise. May be repeated.",
    )
    proxies.add_argument(
        "--proxy-root",
        type=Path,
        metavar="DIR",
        help="Let POST /proxies load checkpoints below DIR while serving.",
    )
    judging = parser.add_argument_group("judge")
    judging.add_argument(
        "--judge",
        action="append",
        metavar="DIR|FILE",
        help="Judge with the LoRA or probe in DIR, a directory or a repository of the Hub: a LoRA from training.jsft "
        "replaces the LLM itself as the judge, one from training.reward_model is added as kind `likelihood`, and a "
        "probe as kind `probe`. FILE.toml names a judge on another server: a reward model (kind `reward`) or an "
        "OpenAI-compatible LLM (kind `endpoint`). May be repeated.",
    )
    judging.add_argument(
        "--principles",
        type=Path,
        metavar="FILE",
        help="TOML, YAML or JSON file of principles to judge by; the first is the default. "
        "Default: principles.json in the judge's or the model's directory, else a built-in one.",
    )
    _add_feedback_options(parser)
    _add_operation_options(parser)


def _add_feedback_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("feedback and learning")
    group.add_argument(
        "--feedback",
        metavar="FILE|URL",
        help="Keep people's choices (POST /feedback) and the judge's verdicts, with their texts, in a "
        "SQLite file or any database of SQLAlchemy's. `python -m training.export` makes training data of them.",
    )
    group.add_argument(
        "--learn",
        action="append",
        metavar="NAME=FROM",
        help="Learn a proxy while serving, and serve it under NAME as soon as it is better. FROM is `person` (people's "
        "choices), `judge` (the judge's verdicts), both with a comma between, or `own`: one proxy for each key, of its "
        "own choices. With `,shadow` it only scores. Needs --feedback and --proxy-root. May be repeated.",
    )


def _add_operation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access and operation")
    group.add_argument(
        "--access",
        type=Path,
        metavar="FILE",
        help="TOML file of API keys, administrators and limits: docs/operations.md.",
    )
    group.add_argument(
        "--max-body-bytes",
        type=int,
        default=MAX_BODY_BYTES,
        metavar="N",
        help=f"Refuse larger requests. Default: {MAX_BODY_BYTES}.",
    )
    group.add_argument(
        "--request-log",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Write a line of JSON on standard output for every request, in the place of uvicorn's access log. "
        "Default: on.",
    )
    group.add_argument(
        "--log-texts",
        action="store_true",
        help="Add the texts of requests and responses to these lines.",
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=DRAIN_SECONDS,
        metavar="S",
        help="On SIGTERM, finish the requests under way within this time; new ones get 503. "
        f"Default: {DRAIN_SECONDS:g}.",
    )


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with an error of one line."""

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if message.startswith("unrecognized arguments: --"):
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)
            message += f"; did you mean {near[0]}?" if near else f"; see {PROG} --help"
        elif message.startswith("unrecognized arguments: "):
            message = not_an_option(flag)
        raise StartupError(message)


def not_an_option(value: str) -> str:
    """The error of a value that follows no option."""
    if (hint := _command_hint(value)) is not None:
        return hint
    flags = ", ".join(f"--{name}" for name in REPEATED)
    return f"{value!r} belongs to no option: {flags} take one value each, and may be given several times"


def _make_parser() -> FlexibleArgumentParser:
    parser: FlexibleArgumentParser = make_arg_parser(
        _Parser(prog=PROG, description="All options: ours, and vLLM's.")
    )
    add_own_options(parser)
    parser.set_defaults(
        disable_uvicorn_access_log=True,
        enable_offline_docs=True,  # /docs with the files in vLLM's package
        **{name: [] for name in REPEATED},
        model=None,
        host="127.0.0.1",
        worker_cls=_worker_class(),
        enforce_eager=current_platform.is_cpu(),  # compilation doubles the time of a start
        enable_auto_tool_choice=None,  # by the chat template: `tool_calls`
    )
    return parser


def _check_command(argv: Sequence[str]) -> None:
    """Refuse a first argument that is meant to be a subcommand. A model may stand there too."""
    if argv and not Path(argv[0]).exists() and (hint := _command_hint(argv[0])) is not None:
        raise StartupError(hint)


def _command_hint(value: str) -> str | None:
    if value.startswith("-") or "/" in value:
        return None
    near = difflib.get_close_matches(value.lower(), ["doctor", "serve", "server"], n=1, cutoff=0.7)
    if not near:
        return None
    if near == ["doctor"]:
        return f"there is no command {value!r}: did you mean `{PROG} doctor`?"
    return f"there is no command {value!r}: did you mean `{PROG} --model DIR`? It serves without a command"


def _expand_home(args: Namespace) -> None:
    for name in PATHS:
        value: Any = getattr(args, name)
        if isinstance(value, str | Path) and str(value).startswith("~"):
            setattr(args, name, type(value)(Path(value).expanduser()))


def _worker_class() -> str | None:
    if current_platform.is_cpu():
        return "proxy.worker.ProxyCPUWorker"
    return "proxy.worker.ProxyGPUWorker" if current_platform.is_cuda() else None
