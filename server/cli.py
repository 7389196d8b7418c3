"""The command line: vLLM's flags and our own, checked before the engine starts.

Whatever can be refused is refused here, in one line and with exit code 2, because a mistake that
shows only after the LLM has been loaded costs minutes.
"""

import argparse
import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop
import vllm.envs
from vllm.entrypoints.launchers.api_server.entry import run_server_worker
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import decorate_logs

from judge.feedback import SOURCES, Feedback, FeedbackError
from judge.principles import Principle, PrincipleError, principles_of, read_principles
from proxy.checkpoint import BaseModelId, ProxyError, identify, load
from server.access import Access, AccessError, read_access
from server.adapters import Adapter, AdapterError, JudgeKind, enable_adapters, read_adapters
from server.learned_proxy import Spec
from server.plugin import AssentPlugin, install
from server.proxies import LEARNED_NAME, PROXY_NAME, Checkpoint, Refusal, check_name
from server.request_log import write_to_stdout

DRAIN_SECONDS = 30.0
MAX_BODY_BYTES = 32 * 1024**2
SMALL_MODEL_BYTES = 256 * 1024**2
SMALL_MODEL_KV_CACHE_BYTES = 256 * 1024**2
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
PATHS = (
    *("model", "tokenizer", "chat_template", "download_dir"),
    *("proxy_root", "principles", "feedback", "access"),
)
"""Flags that may begin with `~`, which a shell leaves where it stands after `=`."""


class Refused(ValueError):
    """The command line asks for something that cannot be; the message is one line for a person."""


REFUSED = (
    *(Refused, Refusal, AccessError, AdapterError, FeedbackError),
    *(ProxyError, PrincipleError),
)


def serve(argv: Sequence[str]) -> None:
    """Every stage of a start."""
    cli_env_setup()
    args = parse(argv)
    try:
        check_server(args)
        proxies = parse_proxies(args.proxy, args.shadow)
        specs = parse_learn(args, proxies)
        base = check_checkpoints(args, proxies)
        adapters = check_judges(args, base)
        principles = find_principles(args, adapters)
        feedback = Feedback(args.feedback) if args.feedback else None
        access = take_access(args)
    except REFUSED as error:
        print(f"python -m server: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    prefer_settings(args)
    log_as_vllm()
    if args.request_log:
        write_to_stdout()
    plugin = AssentPlugin(
        proxies=proxies,
        access=access,
        max_body_bytes=args.max_body_bytes,
        log_texts=args.log_texts,
        drain_seconds=args.drain_seconds,
        base=base,
        proxy_root=args.proxy_root,
        principles=principles,
        adapters=adapters,
        feedback=feedback,
        learn=specs,
    )
    install(plugin)
    uvloop.run(run_server(args))
    if plugin.engine_died:  # vLLM ends as if all were well, and no supervisor would start it again
        raise SystemExit(1)


def log_as_vllm() -> None:
    """Have our messages where vLLM's go, and as detailed."""
    vllms = logging.getLogger("vllm")
    for name in ("server", "proxy"):
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate = vllms.handlers, False
        ours.setLevel(vllms.level)


async def run_server(args: Namespace) -> None:
    """vLLM's function of this name, without its handler of SIGTERM: `__main__` has a safer one."""
    decorate_logs("APIServer")
    address, sock = setup_server(args, reuse_port=False)  # takes the port before the engine starts
    await run_server_worker(address, sock, args)


def parse(argv: Sequence[str]) -> Namespace:
    parser = make_arg_parser(
        FlexibleArgumentParser(
            prog="python -m server",
            description="vLLM's OpenAI-compatible server, with proxies that align a frozen LLM.",
        )
    )
    parser.add_argument(
        "--proxy",
        action="append",
        metavar="NAME=DIR",
        help="Load the proxy checkpoint in DIR under NAME. May be repeated.",
    )
    parser.add_argument(
        "--shadow",
        action="append",
        metavar="NAME=DIR",
        help="Load the proxy checkpoint in DIR to score all that is said without acting: metrics "
        "say how often it would have decided otherwise. May be repeated.",
    )
    parser.add_argument(
        "--proxy-root",
        type=Path,
        metavar="DIR",
        help="Let POST /proxies load checkpoints below DIR while serving.",
    )
    parser.add_argument(
        "--judge",
        action="append",
        type=Path,
        metavar="DIR",
        help="Judge with the LoRA in DIR: one from training.jsft in the place of the LLM itself, one from "
        "training.reward_model beside it, as kind `likelihood`. May be repeated.",
    )
    parser.add_argument(
        "--principles",
        type=Path,
        metavar="FILE",
        help="TOML, YAML or JSON file of what the judge may judge by; its first is what it judges "
        "by unless asked. Default: principles.json in the judge's or the model's directory, else a built-in one.",
    )
    parser.add_argument(
        "--feedback",
        metavar="FILE|URL",
        help="Keep people's choices (POST /feedback) and the judge's verdicts, with the texts that they are about: a "
        "SQLite file, or any URL of SQLAlchemy's. `python -m training.export` makes training data of them.",
    )
    parser.add_argument(
        "--learn",
        action="append",
        metavar="NAME=FROM",
        help="Learn a proxy while serving, and serve it under NAME as soon as it is better. FROM is `person` (people's "
        "choices), `judge` (the judge's verdicts), both with a comma between, or `own`: one for each key, of its own "
        "choices. With `,shadow` it only scores. Needs --feedback and --proxy-root. May be repeated.",
    )
    parser.add_argument(
        "--access",
        type=Path,
        metavar="FILE",
        help="TOML file of API keys, who of them is an administrator, and limits: docs/operations.md.",
    )
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=MAX_BODY_BYTES,
        metavar="N",
        help="Refuse larger requests. Default: %(default)s.",
    )
    parser.add_argument(
        "--request-log",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Write a line of JSON on standard output for every request, in the place of uvicorn's access log.",
    )
    parser.add_argument(
        "--log-texts",
        action="store_true",
        help="Add what was asked and answered to these lines.",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=DRAIN_SECONDS,
        metavar="S",
        help="On SIGTERM, let what is under way go on so long; what is new gets 503. Default: %(default)g.",
    )
    parser.set_defaults(
        disable_uvicorn_access_log=True,
        proxy=[],
        shadow=[],
        judge=[],
        learn=[],
        model=None,
        host="127.0.0.1",
        worker_cls=_worker_class(),
        enforce_eager=current_platform.is_cpu(),  # compiling doubles the time to start
    )
    # vLLM's parser warns of every flag that is given twice, so it does not see these.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--proxy", action="append", default=[])
    own.add_argument("--shadow", action="append", default=[])
    own.add_argument("--judge", action="append", default=[], type=Path)
    own.add_argument("--learn", action="append", default=[])
    ours, theirs = own.parse_known_args(argv)
    args = parser.parse_args(theirs)
    args.proxy = [*args.proxy, *ours.proxy]  # those of a --config file first
    args.shadow = [*args.shadow, *ours.shadow]
    args.judge = [*args.judge, *ours.judge]
    args.learn = [*args.learn, *ours.learn]
    args.model = args.model or args.model_tag
    for name in PATHS:
        value = getattr(args, name)
        if isinstance(value, str | Path) and str(value).startswith("~"):
            setattr(args, name, type(value)(Path(value).expanduser()))
    args.judge = [path.expanduser() for path in args.judge]
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


def parse_proxies(named: Sequence[str], shadows: Sequence[str] = ()) -> list[Checkpoint]:
    """The NAME=DIR of --proxy and --shadow; directories become absolute."""
    proxies: dict[str, Checkpoint] = {}
    flags = [("--proxy", entry) for entry in named] + [("--shadow", entry) for entry in shadows]
    for flag, entry in flags:
        name, equals, directory = entry.partition("=")
        if not (equals and directory):
            raise Refused(f"{flag} {entry!r}: expected NAME=DIR")
        if not PROXY_NAME.fullmatch(name):
            raise Refused(
                f"{flag} {entry!r}: the name {name!r} may only have letters, digits and . _ -"
            )
        if name in proxies:
            raise Refused(f"{flag} {entry!r}: the name {name!r} is given twice")
        path = Path(directory).expanduser().absolute()
        proxies[name] = Checkpoint(name, path, shadow=flag == "--shadow")
    return list(proxies.values())


def parse_learn(args: Namespace, proxies: Sequence[Checkpoint]) -> list[Spec]:
    """The NAME=FROM of --learn, whose names may be those of proxies: what is learned takes their place."""
    specs: dict[str, Spec] = {}
    shadows = {proxy.name: proxy.shadow for proxy in proxies}
    for entry in args.learn:
        name, equals, sources = entry.partition("=")
        parts = sources.split(",")
        shadow = "shadow" in parts
        kinds = tuple(dict.fromkeys(part for part in parts if part != "shadow"))
        if not LEARNED_NAME.fullmatch(name) or name in specs:
            allowed = (
                "may only have letters, digits and . _ -, and begins with one of the first two"
            )
            reason = "is given twice" if name in specs else allowed
            raise Refused(f"--learn {entry!r}: the name {name!r} {reason}")
        if not equals or not kinds or not {*kinds} <= {*SOURCES, "own"}:
            raise Refused(
                f"--learn {entry!r}: expected NAME=FROM, with FROM of person, judge, person,judge or own"
            )
        own = "own" in kinds
        if own and (len(kinds) > 1 or shadow):
            raise Refused(f"--learn {entry!r}: own stands alone")
        if name in shadows and (own or shadow != shadows[name]):
            reason = "each key has its own" if own else "one of both is a shadow"
            raise Refused(
                f"--learn {entry!r}: {name!r} is a proxy that is loaded already: {reason}"
            )
        check_name(name, served_names(args))
        specs[name] = Spec(name, ("person",) if own else kinds, own=own, shadow=shadow)
    missing = [
        f"--{flag}"
        for flag in ("feedback", "proxy-root")
        if not getattr(args, flag.replace("-", "_"))
    ]
    if specs and missing:
        raise Refused(f"--learn needs {' and '.join(missing)}: where verdicts and proxies are kept")
    return list(specs.values())


def check_server(args: Namespace) -> None:
    if args.model_tag and args.model != args.model_tag:
        raise Refused(
            f"{args.model_tag!r} belongs to no flag: --proxy, --shadow, --judge and --learn take one value each, "
            "and may be given several times"
        )
    if not args.model:
        raise Refused("--model DIR is missing: a directory of Hugging Face files, or a hub id")
    if args.worker_cls is None:
        raise Refused(f"there is no worker for {current_platform.device_name!r}, only CPU and CUDA")
    if args.headless or args.grpc or (args.api_server_count or 1) != 1:
        raise Refused(
            "--headless, --grpc and --api-server-count: only one HTTP server is supported"
        )
    if args.speculative_config is not None:
        raise Refused("--speculative-config: proxies do not work with speculative decoding yet")
    if args.enable_batch_sharded_sampling:
        raise Refused("--enable-batch-sharded-sampling: proxies do not work with it yet")
    if args.pipeline_parallel_size > 1:
        raise Refused(
            "--pipeline-parallel-size: proxies do not work with it yet; use --tensor-parallel-size"
        )
    if args.prefill_context_parallel_size > 1:
        raise Refused("--prefill-context-parallel-size: proxies do not work with it yet")


def check_checkpoints(args: Namespace, proxies: Sequence[Checkpoint]) -> BaseModelId | None:
    """Read every proxy and compare it with the LLM, so that the engine cannot fail on one.

    Returns the LLM's identity, for which its weights must be whole; None = nobody needs it, and none can be taken.
    """
    looks_like_path = args.model.startswith((".", "/", "~")) or Path(args.model).exists()
    if looks_like_path and not (Path(args.model) / "config.json").is_file():
        raise Refused(f"--model {args.model!r}: there is no such directory with a config.json")
    if looks_like_path:
        check_model_files(Path(args.model))
    if args.proxy_root is not None:
        args.proxy_root = args.proxy_root.absolute()
        if args.learn:  # what is to be written there needs a place
            args.proxy_root.mkdir(parents=True, exist_ok=True)
        if not args.proxy_root.is_dir():
            raise Refused(f"--proxy-root {args.proxy_root}: there is no such directory")
    is_needed = bool(proxies or args.judge or args.proxy_root is not None)
    if not is_needed and not any(Path(args.model).glob("*.safetensors")):
        return None
    base = identify(args.model, args.revision, cache_dir=args.download_dir)
    for proxy in proxies:
        flag = "--shadow" if proxy.shadow else "--proxy"
        if not proxy.directory.is_dir():
            raise Refused(f"{flag} {proxy.name}={proxy.directory}: there is no such directory")
        check_name(proxy.name, served_names(args))
        load(proxy.directory, base=base)
    return base


def served_names(args: Namespace) -> set[str]:
    """Of the LLM and its adapters."""
    adapters = {adapter.name for adapter in args.lora_modules or ()}
    return {*(args.served_model_name or [args.model])} | adapters


def check_model_files(directory: Path) -> None:
    """Whether the files beside a model's weights are whole, which vLLM would find out late and at length."""
    for path in map(directory.joinpath, MODEL_FILES):
        if not path.exists():
            continue
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise Refused(f"--model: {path} cannot be read: {error}") from None


def check_judges(args: Namespace, base: BaseModelId | None) -> dict[JudgeKind, Adapter]:
    """Read every judge, and have vLLM make room for them."""
    if not args.judge:
        return {}
    assert base is not None, "taken where there is a judge"
    directories = [path.absolute() for path in args.judge]
    adapters = read_adapters(directories, base)
    enable_adapters(args, adapters)
    return adapters


def find_principles(
    args: Namespace, adapters: Mapping[JudgeKind, Adapter]
) -> Mapping[str, Principle]:
    """What the judge may judge by: what it was trained by, unless a file is named."""
    if args.principles is not None:
        return read_principles(args.principles)
    if "pairwise" in adapters:
        return adapters["pairwise"].principles
    return principles_of(Path(args.model))


def prefer_settings(args: Namespace) -> None:
    """What Assent serves best with, wherever the user has not said otherwise.

    A small model's step is too short to be shared among threads or processes; with more than one
    OpenMP thread its throughput collapses at random. A large one needs vLLM's own settings.
    """
    if current_platform.is_cuda():
        return
    if args.enforce_eager:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else the first logprobs compile: 3 s
    weights = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
    if not 0 < weights <= SMALL_MODEL_BYTES:
        return
    if args.data_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        args.kv_cache_memory_bytes = SMALL_MODEL_KV_CACHE_BYTES


def take_access(args: Namespace) -> Access:
    """All keys, those of --api-key and VLLM_API_KEY taken away from vLLM: our guard covers more."""
    keys = [key for key in (args.api_key or [vllm.envs.VLLM_API_KEY]) if key]
    args.api_key = None
    os.environ.pop("VLLM_API_KEY", None)
    return read_access(args.access, keys, os.environ)


def _worker_class() -> str | None:
    if current_platform.is_cpu():
        return "proxy.worker.ProxyCPUWorker"
    return "proxy.worker.ProxyGPUWorker" if current_platform.is_cuda() else None
