"""The serving workers, extended to keep the proxy's inputs, for rollouts in the trainer's process.

A module of its own, because vLLM imports its workers by name.
"""

from typing import Any, NamedTuple

from torch import Tensor
from vllm.platforms import current_platform

from proxy.worker import ProxyGPUWorker


class Read(NamedTuple):
    """The R rows of one step."""

    req_ids: list[str]
    positions: Tensor  # [R] int, index of the sampled token
    hidden: Tensor  # [R, H] the lm_head's input


class RolloutGPUWorker(ProxyGPUWorker):
    """vLLM's CUDA worker with proxies, which keeps their inputs."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._reads: list[Read] = []

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.model_runner.execute_model_state is not None:
            req_ids = list(self._runner.request_ids())
            hidden, positions, _ = self._runner.sampling_inputs()
            self._reads.append(Read(req_ids, positions[: len(req_ids)].clone(), hidden.clone()))
        return super().sample_tokens(grammar_output)

    def take_reads(self) -> list[Read]:
        """The inputs of every step since the last call, including rows of unfinished prefills. Tensors stay on the
        device; the caller owns them.
        """
        reads, self._reads = self._reads, []
        return reads


if current_platform.is_cpu():
    from proxy.worker import ProxyCPUWorker

    class RolloutCPUWorker(RolloutGPUWorker, ProxyCPUWorker):
        """vLLM's CPU worker with proxies, which keeps their inputs."""
