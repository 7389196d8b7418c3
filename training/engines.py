"""What samples responses for training: vLLM in this process, servers, or transformers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from pydantic import PositiveInt
from transformers import PreTrainedModel

from judge.options import PositiveShare
from proxy.checkpoint import BaseModelId, resolve_model_dir
from training.console import TrainingError
from training.machine import machine
from training.rollout_servers import Servers, name_of
from training.rollout_vllm import Engine, is_installed

MAX_REQUESTS = 256  # under way in vLLM at once


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of who samples."""

    rollout: Literal["auto", "vllm", "servers", "transformers"] = "auto"
    """What samples responses, and reads given ones; vllm is in this process. auto = vllm on CUDA where it is
    installed, else transformers, which starts faster."""
    rollout_memory: PositiveShare = 0.3
    """Share of the GPU's memory for vLLM: for a copy of the LLM and its KV cache; without a GPU, of the RAM."""
    servers: tuple[str, ...] = ()
    """For --rollout servers: where they are, `http://host:port` each. They run `python -m server --proxy-root` with the
    same LLM and dtype; an administrator's key, if they want one, is read from the variable ASSENT_API_KEY."""
    proxy_root: Path | None = None
    """For --rollout servers: the directory that is the --proxy-root of all of them, as it is called here."""
    server_requests: PositiveInt = 64
    """For --rollout servers: responses under way at once on each. More fill a large GPU; fewer leave more to be taken
    by the faster of unequal servers."""

    def engine_bytes(self) -> float:
        """What vLLM in this process takes."""
        return self.rollout_memory * machine().free if self.rollout == "vllm" else 0.0


def make_engine(
    options: Any,
    model: PreTrainedModel,
    base: BaseModelId,
    accelerator: Accelerator,
    *,
    longest: int,
    responses: int,
    batch_size: int,
) -> Engine | Servers | None:
    """What samples in the place of transformers; None = nothing does.

    Args:
        options: `EngineOptions` with `model`, `output` and `decoding`.
        model: the frozen LLM in transformers.
        base: its identity.
        accelerator: of this run's processes.
        longest: tokens of the longest prompt.
        responses: of a rollout, all processes together.
        batch_size: responses at once in this device's memory.
    """
    if options.rollout == "servers":
        assert options.proxy_root is not None, "refused at the start"
        return Servers(
            model,
            options.servers,
            options.proxy_root,
            base,
            name=name_of(options.output),
            max_requests=options.server_requests,
            batch_size=batch_size,
            accelerator=accelerator,
        )
    is_default = accelerator.device.type == "cuda" and is_installed()
    if not (options.rollout == "vllm" or (options.rollout == "auto" and is_default)):
        return None
    processes = accelerator.num_processes
    return Engine(
        model,
        resolve_model_dir(options.model),
        base,
        max_tokens=longest + options.decoding.max_new_tokens,
        max_requests=min(math.ceil(responses / processes), MAX_REQUESTS),
        memory=options.rollout_memory,
        processes=processes,
    )


def refuse_half_named_servers(options: EngineOptions) -> None:
    """
    Raises:
        TrainingError: `--rollout servers` without the servers or their directory, or one of these without it.
    """
    wanted = options.rollout == "servers"
    given = {"--servers": bool(options.servers), "--proxy-root": options.proxy_root is not None}
    for name, is_given in given.items():
        if is_given != wanted:
            does = "needs" if wanted else f"is {options.rollout} and has no use for"
            raise TrainingError(f"--rollout {'servers ' if wanted else ''}{does} {name}")
