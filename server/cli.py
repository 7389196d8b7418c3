"""The start of the server. A mistake in the command line is refused with one line and exit code 2 (`checks`)."""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

import uvloop
import vllm.envs
from pydantic import ValidationError
from vllm.entrypoints.launchers.api_server.entry import run_server_worker
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.platforms import current_platform
from vllm.utils.system_utils import decorate_logs

from judge.feedback import Feedback
from server.access import Access, read_access
from server.arguments import PROG, StartupError, parse, refused_by_vllm
from server.checks import (
    STARTUP_ERRORS,
    check_checkpoints,
    check_judges,
    check_remote_judges,
    check_server,
    find_principles,
    parse_learn,
    parse_proxies,
)
from server.ending import GRACEFUL_SECONDS
from server.http_protocol import bound_connections
from server.kv_cache import prefer_cache, weight_bytes
from server.middleware.request_log import write_to_stdout
from server.plugin import AssentPlugin
from server.remote_judges import take_keys
from server.tool_calls import prefer_tool_calls
from server.vllm_patches import ignore_port_owner, install_plugin

SMALL_MODEL_BYTES = 512 * 1024**2


def serve(argv: Sequence[str]) -> None:
    """Every stage of a start."""
    cli_env_setup()
    try:
        args = parse(argv)
        plugin = make_plugin(args)
        prefer_settings(args)
        log_as_vllm()
        if args.request_log:
            write_to_stdout()
        install_plugin(plugin)
        ignore_port_owner()
        bound_connections()
        uvloop.run(run_server(args))
    except STARTUP_ERRORS as error:
        refuse(error)
    if plugin.engine_died:  # vLLM exits with 0 then, and a supervisor would not restart it
        raise SystemExit(1)


def refuse(error: Exception) -> None:
    """End with one line on stderr."""
    print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from None


def make_plugin(args: Namespace) -> AssentPlugin:
    """Check everything that the options name. Raises one of STARTUP_ERRORS."""
    check_server(args)
    proxies = parse_proxies(args.proxy, args.shadow)
    specs = parse_learn(args, proxies)
    base = check_checkpoints(args, proxies)
    adapters = check_judges(args, base)
    remote_judges = check_remote_judges(args)
    return AssentPlugin(
        proxies=proxies,
        base=base,
        proxy_root=args.proxy_root,
        principles=find_principles(args, adapters),
        adapters=adapters,
        remote_judges=remote_judges,
        judge_keys=take_keys(remote_judges.values(), os.environ),
        feedback=Feedback(args.feedback) if args.feedback else None,
        learn=specs,
        access=take_access(args),
        max_body_bytes=args.max_body_bytes,
        log_texts=args.log_texts,
        tracing=args.otlp_traces_endpoint is not None,
        drain_seconds=args.drain_seconds,
    )


def log_as_vllm() -> None:
    """Send our messages where vLLM's go, at the same level."""
    vllm_logger = logging.getLogger("vllm")
    for name in ("server", "proxy"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = vllm_logger.handlers, False
        logger.setLevel(vllm_logger.level)


async def run_server(args: Namespace) -> None:
    """vLLM's function of this name, without its handler of SIGTERM: `__main__` has a safer one.

    Raises:
        StartupError: the port is taken, or vLLM refuses the options for this model.
    """
    decorate_logs("APIServer")
    try:
        address, sock = setup_server(
            args, reuse_port=False
        )  # takes the port before the engine starts
    except OSError as error:
        where = args.uds or f"{args.host}:{args.port}"
        raise StartupError(
            f"cannot listen on {where}: {error.strerror or error}; choose another --port"
        ) from None
    try:
        await run_server_worker(address, sock, args, timeout_graceful_shutdown=GRACEFUL_SECONDS)
    except ValidationError as error:
        raise refused_by_vllm(args.model, error) from None


def prefer_settings(args: Namespace) -> None:
    """Set what Assent serves best with, where the user has set nothing.

    A step of a small model is too short to be shared among threads or processes; with more than one
    OpenMP thread its throughput collapses at random. A large model needs vLLM's own settings.
    """
    prefer_tool_calls(args)
    if current_platform.is_cuda():
        return
    prefer_cache(args)
    if args.enforce_eager:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else the first logprobs compile: 3 s
    if not 0 < weight_bytes(args) <= SMALL_MODEL_BYTES:
        return
    if args.data_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def take_access(args: Namespace) -> Access:
    """All keys. Those of --api-key and VLLM_API_KEY are taken away from vLLM, whose check covers fewer paths."""
    keys = [key for key in (args.api_key or [vllm.envs.VLLM_API_KEY]) if key]
    args.api_key = None
    os.environ.pop("VLLM_API_KEY", None)
    return read_access(args.access, keys, os.environ)
