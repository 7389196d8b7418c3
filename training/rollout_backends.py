"""What samples and reads responses for training, behind one protocol, and the options that choose it.

The three implementations return the same for the same seeds, up to the rounding of the LLM's arithmetic:
`TransformersBackend` and `VLLMBackend` run in the trainer's process, `ServersBackend` calls running servers.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import Accelerator
from pydantic import PositiveInt
from transformers import PreTrainedModel

from judge.options import PositiveShare
from proxy.checkpoint import BaseModelId, resolve_model_dir
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions
from training.console import TrainingError
from training.machine import machine
from training.policy import Decoding, Policy
from training.positions import Response
from training.rollout import Rollout
from training.rollout_servers import ServersBackend, name_of
from training.rollout_transformers import TransformersBackend
from training.rollout_vllm import VLLMBackend, is_installed

MAX_REQUESTS = 256  # in vLLM at the same time
_TINY = 50e6  # parameters


class RolloutBackend(Protocol):
    """Samples responses to prompts, and reads given responses, with the frozen LLM and perhaps a proxy."""

    def generate(
        self,
        network: ProxyNetwork,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> Rollout:
        """One response to each of N prompts (token ids) by the proxy, with its decisions and counts.

        Args:
            network: the proxy with its present weights.
            end_ids: tokens that end a response.
            seeds: one for each prompt; further ones are not read.

        Raises:
            TrainingError: the backend cannot do it; the message says how to go on.
        """
        ...

    def responses(
        self,
        network: ProxyNetwork | None,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> list[list[int]]:
        """The same without decisions and counts. network None = the frozen LLM alone."""
        ...

    def read(self, responses: Sequence[Response], config: ProxyConfig) -> Positions:
        """Hidden states and candidates at the positions of given responses, as `training.positions.read` returns them.

        Args:
            config: of the proxy: temperature, top-k, top-p and number of candidates.
        """
        ...

    def close(self) -> None:
        """Release what the backend holds outside this process."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Options that choose and configure the backend."""

    rollout: Literal["auto", "vllm", "servers", "transformers"] = "auto"
    """What samples and reads responses. vllm and transformers run in this process. auto = vllm if it is installed, but
    transformers for a tiny LLM on a CPU: it is done before vLLM has started."""
    rollout_memory: PositiveShare = 0.3
    """Share of the GPU's memory for vLLM: a copy of the LLM and its KV cache. Without a GPU: share of the RAM."""
    servers: tuple[str, ...] = ()
    """For --rollout servers: their addresses, `http://host:port` each. They run `python -m server --proxy-root` with
    the same LLM and dtype. If they require an API key, set an administrator's key in the variable ASSENT_API_KEY."""
    proxy_root: Path | None = None
    """For --rollout servers: the directory that all of them use as --proxy-root, under its path on this machine."""
    server_requests: PositiveInt = 64
    """For --rollout servers: concurrent requests on each. More fill a large GPU. Fewer leave more of the work to the
    faster of unequal servers."""

    def uses_vllm(self, num_parameters: int) -> bool:
        """Whether vLLM samples in this process, from an LLM of this size."""
        if self.rollout != "auto":
            return self.rollout == "vllm"
        is_tiny = machine().device == "cpu" and num_parameters < _TINY
        return is_installed() and not is_tiny

    def backend_bytes(self, num_parameters: int) -> float:
        """Memory that vLLM in this process takes."""
        return self.rollout_memory * machine().free if self.uses_vllm(num_parameters) else 0.0


def make_backend(
    options: Any,
    model: PreTrainedModel,
    base: BaseModelId,
    accelerator: Accelerator,
    *,
    longest: int,
    responses: int,
    batch_size: int,
    policy_class: type[Policy] = Policy,
) -> RolloutBackend:
    """The backend that the options choose.

    Args:
        options: `BackendOptions` with `model`, `output` and `decoding`.
        model: the frozen LLM in transformers.
        base: its identity.
        accelerator: of this run's processes.
        longest: tokens of the longest prompt.
        responses: in a rollout, all processes together.
        batch_size: responses at once in this device's memory.
        policy_class: combines LLM and proxy; for transformers only.
    """
    if options.rollout == "servers":
        assert options.proxy_root is not None, "refused at the start"
        return ServersBackend(
            model,
            options.servers,
            options.proxy_root,
            base,
            name=name_of(options.output),
            max_requests=options.server_requests,
            batch_size=batch_size,
            accelerator=accelerator,
        )
    if options.uses_vllm(model.num_parameters()):
        processes = accelerator.num_processes
        return VLLMBackend(
            model,
            resolve_model_dir(options.model),
            base,
            max_tokens=longest + options.decoding.max_new_tokens,
            max_requests=min(math.ceil(responses / processes), MAX_REQUESTS),
            memory=options.rollout_memory,
            processes=processes,
        )
    return TransformersBackend(model, batch_size=batch_size, policy_class=policy_class)


def refuse_incomplete_servers(options: BackendOptions) -> None:
    """
    Raises:
        TrainingError: `--rollout servers` lacks the servers or their directory, or one of these is given without it.
    """
    needs_servers = options.rollout == "servers"
    given = {"--servers": bool(options.servers), "--proxy-root": options.proxy_root is not None}
    for name, is_given in given.items():
        if is_given != needs_servers:
            problem = "needs" if needs_servers else f"is {options.rollout} and has no use for"
            raise TrainingError(f"--rollout {'servers ' if needs_servers else ''}{problem} {name}")
