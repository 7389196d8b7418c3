"""Rollouts with transformers, in this process: the backend that needs neither vLLM nor servers."""

from collections.abc import Collection, Iterable, Sequence

from transformers import PreTrainedModel

from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions
from training.memory import MOST_TOKENS
from training.policy import Decoding, Policy
from training.positions import Response, read
from training.rollout import Rollout, generate


class TransformersBackend:
    """Samples and reads with the frozen LLM that the trainer has in memory."""

    def __init__(
        self, model: PreTrainedModel, *, batch_size: int, policy_class: type[Policy] = Policy
    ) -> None:
        """
        Args:
            model: the frozen LLM.
            batch_size: responses at once in the device's memory.
            policy_class: combines the LLM with a proxy.
        """
        self._model, self._batch_size, self._policy_class = model, batch_size, policy_class

    def generate(
        self,
        network: ProxyNetwork,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> Rollout:
        return self._generate(network, prompts, decoding, end_ids, seeds)

    def responses(
        self,
        network: ProxyNetwork | None,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> list[list[int]]:
        return self._generate(network, prompts, decoding, end_ids, seeds).responses

    def read(self, responses: Sequence[Response], config: ProxyConfig) -> Positions:
        max_tokens = MOST_TOKENS[self._model.device.type]
        return read(responses, config, model=self._model, max_tokens=max_tokens)

    def close(self) -> None:
        pass

    def _generate(
        self,
        network: ProxyNetwork | None,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> Rollout:
        return generate(
            self._policy_class(self._model, network),
            prompts,
            decoding,
            end_ids=end_ids,
            seeds=seeds,
            batch_size=self._batch_size,
        )
