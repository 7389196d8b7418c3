"""Rollouts in vLLM with the serving worker: the same accept/reject sampling and, for the same seeds, the same noise as
`generate`.

The engine runs in this process: a call replaces its proxy between two rollouts, traces and hidden states are returned
directly, and nothing outlives the training.
"""

import importlib.util
import math
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from proxy.checkpoint import BaseModelId, save
from proxy.cpu import BLOCK_TOKENS
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions
from proxy.positions import joined as joined_positions
from proxy.request import (
    READ_SAMPLING_PARAMS,
    TRACED_REQUESTS,
    ReadRequest,
    WorkerAlignment,
    caller_id,
)
from training.console import TrainingError
from training.policy import Decoding, accepting_network
from training.positions import Response
from training.rollout import Counts, Rollout, joined
from training.sizes import cache_bytes, sizes_of
from training.traces import decisions, refuse_untraceable, sampling

if TYPE_CHECKING:
    from training.rollout_worker import Read

NAME = "learner"  # of the proxy in the engine

Place = tuple[str, int]  # the engine's request id, and the index of a token in the request


def is_installed() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


class VLLMBackend:
    """vLLM with the frozen LLM and one proxy, whose weights each rollout replaces.

    A rollout keeps the hidden state of every token on the device, in addition to vLLM's share of the memory.
    """

    def __init__(
        self,
        frozen: PreTrainedModel,
        directory: Path,
        base: BaseModelId,
        *,
        max_tokens: int,
        max_requests: int,
        memory: float,
        processes: int = 1,
    ) -> None:
        """
        Args:
            frozen: the LLM in transformers; vLLM uses its device and data type.
            directory: its files.
            base: its identity.
            max_tokens: of a prompt and its response together.
            max_requests: concurrent requests.
            memory: share of the GPU's memory for weights and KV cache; on a CPU, share of the RAM for the KV cache.
            processes: of `accelerate launch`; each has its own engine.

        Raises:
            TrainingError: vLLM is not installed, or does not start with these settings.
        """
        if not is_installed():
            raise TrainingError(
                "--rollout vllm: vLLM is not installed; --rollout transformers needs none"
            )
        self._frozen, self._base = frozen, base
        self._version: str | None = None
        settings: dict[str, Any] = {
            "model": str(directory),
            "dtype": str(frozen.dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "max_model_len": max_tokens,
            "max_num_seqs": max_requests,
            "gpu_memory_utilization": memory,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if processes > 1:  # vLLM joins accelerate's process group
            settings["distributed_executor_backend"] = "external_launcher"
        if frozen.device.type == "cpu":
            # Compiling takes longer than it saves here, and by default vLLM would fill all of its RAM share with zeros.
            available = int(memory * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
            # With less than enough for all requests, some wait.
            blocks = 1 + max_requests * math.ceil(max_tokens / BLOCK_TOKENS)
            sizes, item_size = sizes_of(str(directory)), frozen.dtype.itemsize
            needed = cache_bytes(sizes, blocks, BLOCK_TOKENS, item_size)
            settings |= {
                "enforce_eager": True,
                "block_size": BLOCK_TOKENS,
                "kv_cache_memory_bytes": min(available, needed),
            }
        try:
            self._llm = _start(settings)
        except ValueError as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise TrainingError(
                f"--rollout vllm: vLLM does not start with these settings: {reason} --rollout transformers needs none."
            ) from error

    def generate(
        self,
        network: ProxyNetwork,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> Rollout:
        """As `training.rollout.generate`, up to rounding.

        Raises:
            TrainingError: responses may be longer than traces.
        """
        refuse_untraceable(decoding, "vllm")
        self._publish(network)
        # A filled cache changes how prompts are batched, and with it their rounding. Updates must not differ in that.
        self._llm.reset_prefix_cache()
        params = [self._params(decoding, end_ids, seed) for seed in islice(seeds, len(prompts))]
        return joined(
            [
                self._run(prompts[i : i + TRACED_REQUESTS], params[i : i + TRACED_REQUESTS])
                for i in range(0, len(prompts), TRACED_REQUESTS)
            ]
        )

    def responses(
        self,
        network: ProxyNetwork | None,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> list[list[int]]:
        """The responses only, without decisions; network None = by the frozen LLM."""
        if network is None:
            # On a CPU it is several times as fast as vLLM's own sampler, which sorts the vocabulary.
            network = accepting_network(self._frozen, decoding)
        if network is not None:
            self._publish(network)
        self._llm.reset_prefix_cache()
        params = [
            self._params(decoding, end_ids, seed, proxied=network is not None, trace=False)
            for seed in islice(seeds, len(prompts))
        ]
        responses = []
        for i in range(0, len(prompts), TRACED_REQUESTS):
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts[i : i + TRACED_REQUESTS]]
            outputs = self._llm.generate(inputs, params[i : i + TRACED_REQUESTS], use_tqdm=False)
            responses += [list(output.outputs[0].token_ids) for output in outputs]
            self._call("take_reads")  # which would fill the memory
        return responses

    def read(self, responses: Sequence[Response], config: ProxyConfig) -> Positions:
        """As `training.positions.read`, up to rounding. A prompt is read once for several responses."""
        self._llm.reset_prefix_cache()
        cacheable = only_prompts_shared(
            responses, self._llm.llm_engine.vllm_config.cache_config.block_size
        )
        parts = []
        for i in range(0, len(responses), TRACED_REQUESTS):
            batch = responses[i : i + TRACED_REQUESTS]
            inputs = [
                {"prompt_token_ids": response.prompt + response.response} for response in batch
            ]
            params = [
                _reading(len(response.prompt), config, uses_cache=uses_cache)
                for response, uses_cache in zip(batch, cacheable[i:], strict=False)
            ]
            outputs = self._llm.generate(inputs, params, use_tqdm=False)
            self._call("take_reads")  # which would fill the memory
            ids = [output.request_id for output in outputs]
            encoded = self._call("take_positions", ids)
            parts += [
                Positions(**safetensors.torch.load(encoded[request_id])) for request_id in ids
            ]
        return joined_positions(parts)

    def close(self) -> None:
        """Nothing is left: the engine ends with this process."""

    def _publish(self, network: ProxyNetwork) -> None:
        """Replace the proxy's weights; the memory of the old ones is free after the next step."""
        if self._version is not None:
            self._call("unload_proxy", NAME, self._version)
        with tempfile.TemporaryDirectory(prefix="assent-") as directory:
            self._version = save(directory, network, base=self._base, training={})
            self._call("load_proxy", NAME, directory)

    def _params(
        self,
        decoding: Decoding,
        end_ids: Collection[int],
        seed: int,
        *,
        proxied: bool = True,
        trace: bool = True,
    ) -> Any:
        from vllm import SamplingParams

        alignment = WorkerAlignment(
            proxy=NAME if proxied else None,
            version=self._version if proxied else None,
            trace=trace,
        )
        return SamplingParams(
            **sampling(decoding, end_ids, seed),
            detokenize=False,
            extra_args=alignment.to_extra_args(),
        )

    def _run(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> Rollout:
        """Responses to at most as many prompts as traces are kept for."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, list(params), use_tqdm=False)
        ids = [output.request_id for output in outputs]
        traces = self._call("take_traces", ids)
        counts = self._call("take_alignment_counts", ids).values()
        reads = self._call("take_reads")
        by_caller_id = {caller_id(req_id): req_id for req_id in traces}
        req_ids = [by_caller_id[request_id] for request_id in ids]
        responses = [list(output.outputs[0].token_ids) for output in outputs]
        in_order = [traces[req_id] for req_id in req_ids]
        assert [[entry["token_id"] for entry in trace] for trace in in_order] == responses

        def hidden_at(episodes: Sequence[int], indices: Sequence[int]) -> Tensor:
            places = [
                (req_ids[episode], len(prompts[episode]) + index)
                for episode, index in zip(episodes, indices, strict=True)
            ]
            return _hidden_at(reads, places)

        recorded = decisions(in_order, hidden_at, self._frozen.device)
        totals = (
            sum(entry[name] for entry in counts) for name in ("proposed", "rejected", "forced")
        )
        return Rollout(responses, recorded, Counts(sum(map(len, responses)), *totals), None)

    def _call(self, method: str, *args: Any) -> Any:
        (answer,) = self._llm.collective_rpc(method, args=args)
        return answer


def only_prompts_shared(responses: Sequence[Response], block: int) -> list[bool]:
    """Whether the cache can hold nothing of a response but its prompt, after these have been read.

    Cached tokens have no hidden states, and those from the prompt's last token on are wanted. These are cached if
    another sequence begins with the same tokens up to the end of that token's block.

    Args:
        responses: all that are read.
        block: tokens of a block of the KV cache.
    """
    whole = [response.prompt + response.response for response in responses]
    begun = Counter(tuple(ids[:end]) for ids in whole for end in range(block, len(ids) + 1, block))
    ends = [block * math.ceil(len(response.prompt) / block) for response in responses]
    return [begun[tuple(ids[:end])] <= 1 for ids, end in zip(whole, ends, strict=True)]


def _reading(start: int, config: ProxyConfig, *, uses_cache: bool) -> Any:
    """Sampling parameters of a request that reads a response and generates nothing."""
    from vllm import SamplingParams

    read = ReadRequest(
        start=start,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_candidates=config.max_candidates,
    )
    alignment = WorkerAlignment(read=read, shadow=False)
    settings = READ_SAMPLING_PARAMS | {"skip_reading_prefix_cache": not uses_cache}
    return SamplingParams(**settings, extra_args=alignment.to_extra_args())


def _start(settings: dict[str, Any]) -> Any:
    """`vllm.LLM` in this process, with its side effects on the process reverted where possible."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    from vllm.platforms import current_platform

    worker = "RolloutCPUWorker" if current_platform.is_cpu() else "RolloutGPUWorker"
    set_num_threads = torch.set_num_threads
    try:
        return LLM(worker_cls=f"training.rollout_worker.{worker}", **settings)
    finally:
        torch.set_num_threads = set_num_threads  # the CPU worker disables it


def _hidden_at(reads: "Sequence[Read]", places: Sequence[Place]) -> Tensor:
    """The hidden states [D, H] at these places."""
    rows = {
        place: row
        for row, place in enumerate(
            (req_id, position)
            for read in reads
            for req_id, position in zip(read.req_ids, read.positions.tolist(), strict=True)
        )
    }
    hidden = torch.cat([read.hidden for read in reads])
    index = torch.tensor([rows[place] for place in places], dtype=torch.long, device=hidden.device)
    return hidden[index]
