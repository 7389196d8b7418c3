"""Checks everything that a start needs, without a start, and says what to do about each problem:

    python -m server doctor --model runs/base --proxy mine=runs/proxy

takes all options of a start. No engine is started and no weights are loaded. Exit code 1: something
would keep the server from starting, or from doing what the options ask for.
"""

import asyncio
import os
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, Literal, NamedTuple

import psutil
import torch
import vllm
from jinja2 import TemplateError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer
from vllm.platforms import current_platform

from judge.messages import Message
from judge.principles import Principle
from judge.prompts import Question, label_ids
from proxy.checkpoint import BaseModelId, identify, load
from server import checks
from server.access import read_access
from server.arguments import parse
from server.engine import GracefulHTTPError
from server.kv_cache import GIB, plan_memory, weight_bytes
from server.remote_client import Meter, connect, remote_judge
from server.remote_judges import RemoteJudge, take_keys
from server.tool_calls import find_tool_calls

VLLM_VERSION = "0.32.0"

Level = Literal["ok", "warning", "error"]
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    subject: str
    text: str
    """What was found; for a warning or an error, also what to do."""


def main(argv: Sequence[str]) -> None:
    """Print all findings; exits with 1 where one is an error. Raises StartupError for a wrong command line."""
    findings = list(examine(parse(argv)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for level, subject, text in findings:
        table.add_row(f"[{_STYLES[level]}]{level}[/]", subject, text.replace("[", "\\["))
    Console().print(table)
    raise SystemExit(any(finding.level == "error" for finding in findings))


def examine(args: Namespace) -> Iterator[Finding]:
    """All findings, in the order of a start; without those that depend on something that is wrong."""
    yield from _software()
    yield from _settings(args)
    if not args.model:
        return
    findings, base = _model(args)
    yield from findings
    if base is None:
        return
    yield from _proxies(args, base)
    if args.learn:

        def check() -> None:
            checks.parse_learn(args, checks.parse_proxies(args.proxy, args.shadow))

        yield from _refused("learning", check, ", ".join(args.learn))
    yield from _judge(args, base)
    yield from _memory(args)
    yield from _access(args)


def _software() -> Iterator[Finding]:
    installed = vllm.__version__.partition("+")[0]
    if installed == VLLM_VERSION:
        yield Finding("ok", "vLLM", f"{vllm.__version__}, torch {torch.__version__}")
    else:
        yield Finding(
            "error",
            "vLLM",
            f"{vllm.__version__}, and Assent is built on the internals of {VLLM_VERSION}: run `make install`",
        )
    if current_platform.is_cuda():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "vLLM's choice of")
        yield Finding(
            "ok",
            "device",
            f"{torch.cuda.device_count()} × {', '.join(names)}; {runner} model runner",
        )
    elif current_platform.is_cpu():
        yield Finding("ok", "device", f"CPU, {psutil.cpu_count()} cores; model runner V1")


def _settings(args: Namespace) -> Iterator[Finding]:
    """What `check_server` refuses, and the port."""
    yield from _refused("flags", lambda: checks.check_server(args), "they go together")
    with socket.socket() as probe:
        try:
            probe.bind((args.host or "127.0.0.1", args.port))
        except OSError as error:
            yield Finding(
                "error",
                "port",
                f"{args.host}:{args.port}: {error.strerror}; take another with --port",
            )
        else:
            yield Finding("ok", "port", f"{args.host}:{args.port} is free")


def _model(args: Namespace) -> tuple[list[Finding], BaseModelId | None]:
    """The findings on the LLM, and its identity if nothing is wrong with it."""
    try:
        checks.check_model(args)
        base = identify(args.model, args.revision, cache_dir=args.download_dir)
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
        tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    except Exception as error:  # tokenizers and configs raise many kinds
        return [Finding("error", "model", _line(error))], None
    text = config.get_text_config()
    name = (config.architectures or ["an unnamed architecture"])[0]
    if name not in vllm.ModelRegistry.get_supported_archs():
        return [Finding("error", "model", f"vLLM {VLLM_VERSION} does not serve {name}")], None
    sizes = f"hidden size {text.hidden_size}, vocabulary {text.vocab_size}"
    about = Finding("ok", "model", f"{name}, {sizes}, fingerprint {base.fingerprint[:12]}")
    if args.chat_template or tokenizer.chat_template:
        tool_calls = Finding("ok", "tool calls", find_tool_calls(args).explanation)
        return [about, Finding("ok", "chat template", "there is one"), tool_calls], base
    nobody = "there is none, so chat requests fail: name a file with --chat-template"
    return [about, Finding("warning", "chat template", nobody)], base


def _proxies(args: Namespace, base: BaseModelId) -> Iterator[Finding]:
    try:
        proxies = checks.parse_proxies(args.proxy, args.shadow)
    except checks.STARTUP_ERRORS as error:
        yield Finding("error", "proxies", _line(error))
        return
    for proxy in proxies:
        try:
            checkpoint = load(proxy.directory, base=base)
        except checks.STARTUP_ERRORS as error:
            yield Finding("error", f"proxy {proxy.name}", _line(error))
            continue
        text = f"version {checkpoint.version}, {checkpoint.network.num_parameters():,} parameters"
        yield Finding("ok", f"proxy {proxy.name}", text + (", a shadow" * proxy.shadow))
    if args.proxy_root is not None:
        root = args.proxy_root
        if not root.is_dir():
            yield Finding("error", "proxy root", f"{root}: there is no such directory")
        elif not os.access(root, os.W_OK):
            text = (
                f"{root} cannot be written: proxies loaded over HTTP will be gone after a restart"
            )
            yield Finding("warning", "proxy root", text)
        else:
            yield Finding("ok", "proxy root", str(root))


def _judge(args: Namespace, base: BaseModelId) -> Iterator[Finding]:
    principles: dict[str, Principle] = {}

    def read() -> None:
        principles.update(checks.find_principles(args, checks.check_judges(args, base)))

    yield from _refused("judges", read, f"{len(args.judge)} beside the LLM itself")
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    yield from _remote_judges(args, tokenizer, principles)
    for name, principle in principles.items():
        try:
            labels = label_ids(tokenizer, principle)
        except (ValueError, TemplateError) as error:
            yield Finding("warning", f"principle {name}", f"{_line(error)}: /judge will not work")
        else:
            yield Finding("ok", f"principle {name}", f"labels are the tokens {labels}")


def _remote_judges(
    args: Namespace, tokenizer: Any, principles: Mapping[str, Principle]
) -> Iterator[Finding]:
    """A judgment by each judge on another server."""
    environment = dict(os.environ)  # take_keys removes the keys from it
    try:
        judges = checks.check_remote_judges(args)
        keys = take_keys(judges.values(), environment)
    except checks.STARTUP_ERRORS as error:
        yield Finding("error", "remote judges", _line(error))
        return
    for judge in judges.values():
        judging = _judge_once(judge, keys.get(judge.api_key_env or ""), tokenizer, principles)
        try:
            text = asyncio.run(judging)
        except (GracefulHTTPError, ValueError, TemplateError) as error:
            yield Finding("error", f"judge {judge.kind}", f"{judge.url} {_line(error)}")
        else:
            yield Finding("ok", f"judge {judge.kind}", text)


async def _judge_once(
    judge: RemoteJudge, key: str | None, tokenizer: Any, principles: Mapping[str, Principle]
) -> str:
    client = connect(judge, key, Meter(lambda _: None, lambda _: None))
    question = Question(
        [Message(role="user", content="What is 2 + 2?")], "4", "I will not tell you."
    )
    start = monotonic()
    (result,) = await remote_judge(client, tokenizer, principles, context=1024).compare([question])
    seconds = monotonic() - start
    return (
        f"{judge.url} prefers an answer to none with {result.probability:.0%}, in {seconds:.1f} s"
    )


def _memory(args: Namespace) -> Iterator[Finding]:
    """On CUDA vLLM's cache takes what the weights leave; on a CPU it has a size that we know."""
    if current_platform.is_cuda():
        yield from _device_memory(args)
        return
    try:
        memory = plan_memory(args)
    except checks.STARTUP_ERRORS as error:
        yield Finding("error", "memory", _line(error))
        return
    problem = memory.problem()
    text = f"{memory}: {problem}" if problem else str(memory)
    yield Finding("error" if problem else "ok", "memory", text)


def _device_memory(args: Namespace) -> Iterator[Finding]:
    weights = weight_bytes(args) / args.tensor_parallel_size
    free, total = torch.cuda.mem_get_info()
    free = min(free, int(total * args.gpu_memory_utilization))
    text = f"{weights / GIB:.1f} GiB of weights a device, {free / GIB:.1f} GiB free"
    if weights > 0.9 * free:
        text += ": the cache needs room too; use more devices (--tensor-parallel-size) or a smaller model"
    yield Finding("error" if weights > 0.9 * free else "ok", "memory", text)


def _access(args: Namespace) -> Iterator[Finding]:
    environment = dict(os.environ)  # read_access removes the keys from it
    keys = [key for key in (args.api_key or [environment.get("VLLM_API_KEY")]) if key]
    try:
        access = read_access(args.access, keys, environment)
    except checks.STARTUP_ERRORS as error:
        yield Finding("error", "keys", _line(error))
        return
    is_loopback = args.host in ("localhost", "127.0.0.1", "::1")
    if access.callers:
        admins = sum(caller.admin for caller in access.callers.values())
        yield Finding("ok", "keys", f"{len(access.callers)}, of which {admins} are administrators'")
        if args.proxy_root is not None and not admins:
            text = "no key is an administrator's, so nobody can load proxies: set ASSENT_ADMIN_KEYS"
            yield Finding("warning", "keys", text)
    elif is_loopback:
        yield Finding("ok", "keys", "none; only this machine can reach the server")
    else:
        text = f"anybody who reaches {args.host} may use the server: set ASSENT_API_KEYS"
        yield Finding("warning", "keys", text)


def _refused(subject: str, check: Callable[[], None], good: str) -> Iterator[Finding]:
    try:
        check()
    except checks.STARTUP_ERRORS as error:
        yield Finding("error", subject, _line(error))
    else:
        yield Finding("ok", subject, good)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
