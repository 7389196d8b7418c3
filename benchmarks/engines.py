"""The engines that are measured, with the same settings: Assent's server, vLLM's own server, and the engine in process.

with serve(get_model("demo"), "assent", {"aligned": directory}) as server:
    httpx.get(server.url + "/health")
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from benchmarks.models import REPOSITORY, Model

ServerKind = Literal["assent", "stock"]

MODULES: dict[ServerKind, str] = {
    "assent": "server",
    "stock": "vllm.entrypoints.launchers.api_server.entry",  # vLLM's own server
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with small steps a second process costs more than it gains
    "OMP_NUM_THREADS": "1",  # with more threads than free cores throughput collapses
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
SETTINGS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
    "enable_prefix_caching": False,  # else the second of two runs would reuse the first one's prompts
    "dtype": "bfloat16",
}
START_SECONDS = 600
STOP_SECONDS = 20
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    """The model name in requests."""
    seconds_to_start: float
    """Seconds from the process's start to the first 200 of /health."""
    pid: int


@contextmanager
def serve(
    model: Model, kind: ServerKind, proxies: Mapping[str, Path], flags: Sequence[str | Path] = ()
) -> Iterator[Server]:
    """A server in its own session on a free loopback port; all of its processes end with the block.

    Args:
        model: to be served.
        kind: Assent's or vLLM's own server.
        proxies: to be loaded, by name.
        flags: further flags.

    Raises:
        RuntimeError: it did not start; the message ends with the last lines of the log.
    """
    port = free_port()
    command = [sys.executable, "-m", MODULES[kind], "--model", str(model.directory)]
    command += ["--tokenizer", str(model.tokenizer)]
    command += ["--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-cache-memory-bytes", str(model.kv_cache_bytes)]
    for key, value in SETTINGS.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    for name, directory in proxies.items():
        command += ["--proxy", f"{name}={directory}"]
    command += map(str, flags)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not is_healthy(url):
                if process.poll() is not None or time.perf_counter() - start > START_SECONDS:
                    log.seek(0)
                    tail = log.read().decode(errors="replace").splitlines()[-30:]
                    raise RuntimeError("\n".join([f"{kind} server did not start:", *tail]))
                time.sleep(POLL_SECONDS)
            yield Server(url, model.name, time.perf_counter() - start, process.pid)
        finally:
            stop(process)


def make_llm(
    model: Model, *, worker: str | None = "proxy.worker.ProxyCPUWorker", **settings: Any
) -> Any:
    """`vllm.LLM` in this process, with the servers' settings and these; worker None = vLLM's own.

    Call it before anything else imports vllm: some variables are read at import time.
    """
    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(1)
    from vllm import LLM

    return LLM(
        model=str(model.directory),
        tokenizer=str(model.tokenizer),
        kv_cache_memory_bytes=model.kv_cache_bytes,
        disable_log_stats=True,
        **({"worker_cls": worker} if worker else {}),
        **SETTINGS | settings,
    )


def is_healthy(url: str) -> bool:
    """Whether a server answers at this address, with 200 to `/health`."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its session, and all that it started."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # no process is left, as expected
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
