"""vLLM's KV cache on a CPU where the user says nothing: its size, and that of its blocks.

By itself vLLM takes 92 % of the machine's memory, and does not start where that much is not free.
"""

import logging
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import psutil
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from vllm.config import CacheConfig, ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

from proxy.cpu import BLOCK_TOKENS
from server.arguments import StartupError, refused_by_vllm

GIB = 1024**3
MAX_NUM_SEQS = 128  # vLLM's own on a CPU
REQUEST_TOKENS = 512
PROCESS_BYTES = 3 * GIB // 4  # of a process of vLLM, without weights and cache
SHARE = 0.8  # of what weights and processes leave free


class Memory(NamedTuple):
    """Bytes that a server takes on a CPU, all of its processes together."""

    free: int  # what there is
    weights: int
    processes: int
    cache: int
    workers: int  # that share the cache
    token: int  # of the cache
    longest: int
    """Of the cache: a request of max_model_len. An upper bound where layers have a window."""

    def problem(self) -> str | None:
        """What would keep vLLM from starting, and what to do."""
        if self.weights + self.processes + self.cache > self.free:
            return (
                "that is more than is free; a smaller --max-model-len or a smaller model needs less"
            )
        if self.cache < self.longest:
            return (
                f"the longest request needs {self.longest / GIB:.1f} GiB of it: raise --kv-cache-memory-bytes, "
                "or lower --max-model-len"
            )
        return None

    def __str__(self) -> str:
        return (
            f"{self.weights / GIB:.1f} GiB of weights, {self.cache / GIB:.1f} GiB of KV cache "
            f"({self.cache // self.token:,} tokens), {self.processes / GIB:.1f} GiB of processes; "
            f"{self.free / GIB:.1f} GiB are free"
        )


def plan_memory(args: Namespace) -> Memory:
    """With the cache that the user wants. Otherwise it has room for one request of the maximum length and, where that
    much is free, for all that may run at once, of 512 tokens each.

    Raises:
        StartupError: vLLM cannot serve this model with these options.
    """
    config = _model_config(args)
    engines, shards = args.data_parallel_size, args.tensor_parallel_size
    workers = engines * shards
    heads = shards * math.ceil(config.get_total_num_kv_heads() / shards)
    numbers = 2 * config.get_total_num_hidden_layers() * heads * config.get_head_size()
    token = numbers * config.dtype.itemsize

    def cache_bytes(tokens: int) -> int:
        size = args.block_size or BLOCK_TOKENS
        return engines * token * size * (math.ceil(tokens / size) + 1)  # one block is vLLM's own

    free, total = free_and_total()
    weights, processes = engines * weight_bytes(args), (1 + workers) * PROCESS_BYTES
    length = config.max_model_len
    longest = cache_bytes(1 if args.max_model_len == -1 else length)  # -1: vLLM takes what fits
    given = _given_bytes(args, total)
    if given is None:
        requests = args.max_num_seqs or MAX_NUM_SEQS
        wanted = cache_bytes(max(length, requests * min(length, REQUEST_TOKENS)))
        cache = min(wanted, max(longest, int(SHARE * (free - weights - processes))))
    else:
        cache = given * workers
    return Memory(free, weights, processes, cache, workers, token, longest)


def prefer_cache(args: Namespace) -> None:
    """Set sizes of cache and blocks in the options, where the user has not."""
    args.block_size = args.block_size or BLOCK_TOKENS
    if _given_bytes(args, 0) is None:
        memory = plan_memory(args)
        args.kv_cache_memory_bytes = memory.cache // memory.workers


def _given_bytes(args: Namespace, total: int) -> int | None:
    """What a worker would take by the user's own choice. `total`: memory of the machine."""
    if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        if not space.isdecimal():
            raise StartupError(f"VLLM_CPU_KVCACHE_SPACE is {space!r}: it is a whole number of GiB")
        return int(space) * GIB
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes
    if (
        args.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
    ):  # despite its name, of a CPU's too
        return max(0, int(args.gpu_memory_utilization * total) - weight_bytes(args) - PROCESS_BYTES)
    return None


def free_and_total() -> tuple[int, int]:
    """Bytes of memory, as vLLM's worker reads them: of this process' NUMA node, within the container's limit."""
    node = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    return min(node.available_memory, psutil.virtual_memory().available), node.total_memory


def weight_bytes(args: Namespace) -> int:
    """Of the model's safetensors; 0 where they are not on this machine yet."""
    directory = Path(args.model)
    if not directory.is_dir():
        try:
            directory = Path(
                snapshot_download(
                    args.model,
                    revision=args.revision,
                    cache_dir=args.download_dir,
                    local_files_only=True,
                )
            )
        except (OSError, ValueError):  # ValueError: no hub id, but a file or an address
            return 0
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _model_config(args: Namespace) -> ModelConfig:
    logger = logging.getLogger("vllm.config")
    level = logger.level
    logger.setLevel(logging.WARNING)  # the start itself says it once more
    try:
        return AsyncEngineArgs.from_cli_args(args).create_model_config()
    except ValidationError as error:
        raise refused_by_vllm(args.model, error) from None
    finally:
        logger.setLevel(level)
