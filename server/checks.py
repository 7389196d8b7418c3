"""Everything that can be refused before the engine starts: a mistake that shows after the LLM was loaded costs minutes.
`cli` runs all checks at a start, `doctor` runs each by itself.
"""

import json
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from judge.feedback import SOURCES, FeedbackError
from judge.principles import Principle, PrincipleError, principles_of, read_principles
from proxy.checkpoint import WEIGHTS_FILE, BaseModelId, ProxyError, identify, load
from proxy.engine.unsupported import unsupported_in_arguments
from proxy.hub import resolve_dir
from server.access import AccessError
from server.arguments import StartupError, not_an_option
from server.judge_adapters import Adapter, AdapterError, JudgeKind, enable_adapters, read_adapters
from server.learned_proxy import Spec
from server.proxies import NAME_RULE, PROXY_NAME, Checkpoint, ProxyStateError, check_name
from server.remote_judges import (
    SUFFIX,
    RemoteJudge,
    RemoteJudgeError,
    RemoteKind,
    read_remote_judges,
)

MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
STARTUP_ERRORS = (
    *(StartupError, ProxyStateError, AccessError, AdapterError, FeedbackError),
    *(ProxyError, PrincipleError, RemoteJudgeError),
)


def check_server(args: Namespace) -> None:
    """Options that do not go together, or that proxies do not work with."""
    if args.model_tag and args.model != args.model_tag:
        raise StartupError(not_an_option(args.model_tag))
    if not args.model:
        raise StartupError("--model DIR is missing: a directory of Hugging Face files, or a hub id")
    if args.worker_cls is None:
        raise StartupError("this machine has no device that Assent supports: a CPU or CUDA")
    if args.headless or args.grpc or (args.api_server_count or 1) != 1:
        raise StartupError(
            "--headless, --grpc and --api-server-count: only one HTTP server is supported"
        )
    for feature in unsupported_in_arguments(args):
        raise StartupError(
            f"{feature.flag}: proxies do not work with {feature.name} yet; {feature.advice}"
        )


def check_model(args: Namespace) -> None:
    """Whether --model is a model with whole files; vLLM would report a wrong one late and at length."""
    path = Path(args.model)
    if not (args.model.startswith((".", "/", "~")) or path.exists()):
        return _check_hub_model(args)
    if not (path / "config.json").is_file():
        if path.suffix == ".gguf" and path.is_file():
            return
        raise StartupError(f"--model {args.model!r}: there is no such directory with a config.json")
    for file in map(path.joinpath, MODEL_FILES):
        if file.exists():
            _check_json(file)
    config: Any = json.loads((path / "config.json").read_bytes())
    if not isinstance(config, dict) or not {"model_type", "architectures"} & config.keys():
        hint = ""
        if (path / WEIGHTS_FILE).exists():
            hint = (
                "; it is a proxy: --proxy NAME=DIR loads it beside the LLM that it was trained for"
            )
        raise StartupError(
            f"--model {args.model!r}: its config.json is not a language model's{hint}"
        )


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"--model: {file} cannot be read: {error}") from None


def _check_hub_model(args: Namespace) -> None:
    if "://" in args.model:  # of a storage that vLLM reads itself
        return
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every retry
    try:
        cached_file(args.model, "config.json", revision=args.revision, cache_dir=args.download_dir)
    except (OSError, ValueError) as error:
        if "does not appear to have a file named" in str(error):  # vLLM reads other formats too
            return
        reason = str(error).strip().partition("\n")[0]
        raise StartupError(
            f"--model {args.model!r}: no such directory, and no such model on the hub ({reason})"
        ) from None
    finally:
        logger.setLevel(level)


def parse_proxies(named: Sequence[str], shadows: Sequence[str] = ()) -> list[Checkpoint]:
    """The NAME=DIR of --proxy and --shadow; directories become absolute, repositories of the Hub directories.

    Raises:
        StartupError: one is malformed, or a name is given twice.
        ProxyError: a repository cannot be had.
    """
    proxies: dict[str, Checkpoint] = {}
    flags = [("--proxy", entry) for entry in named] + [("--shadow", entry) for entry in shadows]
    for flag, entry in flags:
        name, equals, directory = entry.partition("=")
        if not (equals and directory):
            raise StartupError(f"{flag} {entry!r}: expected NAME=DIR")
        if not PROXY_NAME.fullmatch(name):
            raise StartupError(f"{flag} {entry!r}: the name {name!r} is not valid: {NAME_RULE}")
        if name in proxies:
            raise StartupError(f"{flag} {entry!r}: the name {name!r} is given twice")
        path = resolve_dir(directory).absolute()
        proxies[name] = Checkpoint(name, path, shadow=flag == "--shadow")
    return list(proxies.values())


def parse_learn(args: Namespace, proxies: Sequence[Checkpoint]) -> list[Spec]:
    """The NAME=FROM of --learn. A name may be that of a loaded proxy, which a learned version replaces."""
    specs: dict[str, Spec] = {}
    shadows = {proxy.name: proxy.shadow for proxy in proxies}
    for entry in args.learn:
        spec = _parse_spec(entry)
        if spec.name in specs:
            raise StartupError(f"--learn {entry!r}: the name {spec.name!r} is given twice")
        if spec.name in shadows and (spec.own or spec.shadow != shadows[spec.name]):
            reason = "each key has its own" if spec.own else "one of both is a shadow"
            raise StartupError(
                f"--learn {entry!r}: {spec.name!r} is a proxy that is loaded already: {reason}"
            )
        check_name(spec.name, served_names(args))
        specs[spec.name] = spec
    missing = [
        f"--{flag}"
        for flag in ("feedback", "proxy-root")
        if not getattr(args, flag.replace("-", "_"))
    ]
    if specs and missing:
        raise StartupError(
            f"--learn needs {' and '.join(missing)}: where verdicts and proxies are kept"
        )
    return list(specs.values())


def _parse_spec(entry: str) -> Spec:
    name, equals, sources = entry.partition("=")
    parts = sources.split(",")
    shadow = "shadow" in parts
    kinds: Any = tuple(dict.fromkeys(part for part in parts if part != "shadow"))
    if not PROXY_NAME.fullmatch(name):
        raise StartupError(f"--learn {entry!r}: the name {name!r} is not valid: {NAME_RULE}")
    if not equals or not kinds or not {*kinds} <= {*SOURCES, "own"}:
        raise StartupError(
            f"--learn {entry!r}: expected NAME=FROM, with FROM of person, judge, person,judge or own"
        )
    own = "own" in kinds
    if own and (len(kinds) > 1 or shadow):
        raise StartupError(f"--learn {entry!r}: own stands alone")
    return Spec(name, ("person",) if own else kinds, own=own, shadow=shadow)


def check_checkpoints(args: Namespace, proxies: Sequence[Checkpoint]) -> BaseModelId | None:
    """Read every proxy and compare it with the LLM, so that the engine cannot fail on one.

    Returns the LLM's identity, for which its weights must be whole; None = not needed, and the weights are not here.
    """
    check_model(args)
    if args.proxy_root is not None:
        args.proxy_root = args.proxy_root.absolute()
        if args.learn:  # learned versions are written below it
            args.proxy_root.mkdir(parents=True, exist_ok=True)
        if not args.proxy_root.is_dir():
            raise StartupError(f"--proxy-root {args.proxy_root}: there is no such directory")
    is_needed = bool(proxies or _judge_paths(args, remote=False) or args.proxy_root is not None)
    if not is_needed and not any(Path(args.model).glob("*.safetensors")):
        return None
    base = identify(args.model, args.revision, cache_dir=args.download_dir)
    for proxy in proxies:
        flag = "--shadow" if proxy.shadow else "--proxy"
        if not proxy.directory.is_dir():
            raise StartupError(f"{flag} {proxy.name}={proxy.directory}: there is no such directory")
        check_name(proxy.name, served_names(args))
        load(proxy.directory, base=base)
    return base


def served_names(args: Namespace) -> set[str]:
    """Names of the LLM and its adapters."""
    adapters = {adapter.name for adapter in args.lora_modules or ()}
    return {*(args.served_model_name or [args.model])} | adapters


def check_judges(args: Namespace, base: BaseModelId | None) -> dict[JudgeKind, Adapter]:
    """Read every judge that is added to the LLM, and have vLLM make room for them."""
    directories = [resolve_dir(path).absolute() for path in _judge_paths(args, remote=False)]
    if not directories:
        return {}
    assert base is not None, "the LLM is identified where there is a judge"
    adapters = read_adapters(directories, base)
    enable_adapters(args, adapters)
    return adapters


def check_remote_judges(args: Namespace) -> dict[RemoteKind, RemoteJudge]:
    """Read the files of judges on other servers."""
    return read_remote_judges(_judge_paths(args, remote=True))


def _judge_paths(args: Namespace, *, remote: bool) -> list[Path]:
    return [path for path in args.judge if (path.suffix == SUFFIX) == remote]


def find_principles(
    args: Namespace, adapters: Mapping[JudgeKind, Adapter]
) -> Mapping[str, Principle]:
    """The principles to judge by: a file's, or those that the judge was trained with."""
    if args.principles is not None:
        return read_principles(args.principles)
    if "pairwise" in adapters:
        return adapters["pairwise"].principles
    return principles_of(Path(args.model))
