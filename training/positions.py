"""Hidden states and candidates at every position of given responses: the training data of `training.proxy_dpo`.

The LLM is frozen, so one pass over the responses serves any number of epochs, settings and losses. Results are kept on
disk (`training.part_cache`), by LLM, decoding and responses.

`proxy.positions` defines what is kept.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from proxy.acceptance import Candidates
from proxy.network import ProxyConfig
from proxy.positions import Positions, choices, joined, nucleus_of
from training.logprobs import CHUNK, logits_of
from training.micro_batches import split_by_tokens
from training.model_inputs import HeadInput, pad_responses
from training.part_cache import PartCache


class Response(NamedTuple):
    """Token ids."""

    prompt: list[int]
    response: list[int]  # includes the end of the turn, if it was reached

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


Reader = Callable[[Sequence[Response], ProxyConfig], Positions]
"""Reads given responses with the frozen LLM, within the nucleus of a proxy with this configuration."""


@torch.inference_mode()
def read(
    responses: Sequence[Response], config: ProxyConfig, *, model: PreTrainedModel, max_tokens: int
) -> Positions:
    """One pass of the frozen LLM over N responses.

    Args:
        responses: N of them.
        config: the proxy's: temperature, top-k, top-p and number of candidates.
        model: the frozen LLM, from `training.models.load_model`.
        max_tokens: in one batch, padding included; a longer response is read alone.
    """
    batches = split_by_tokens([response.length for response in responses], max_tokens)
    parts = [_read_batch(model, [responses[i] for i in batch], config) for batch in batches]
    order = torch.tensor([i for batch in batches for i in batch])
    return joined(parts).of(order.argsort())[0]


def _read_batch(
    model: PreTrainedModel, responses: Sequence[Response], config: ProxyConfig
) -> Positions:
    device = model.device
    prompts, texts = ([*column] for column in zip(*responses, strict=True))
    ids, is_response = pad_responses(prompts, texts, device)
    before = is_response[:, 1:].flatten().nonzero().squeeze(-1)
    before = before + before // (
        ids.shape[1] - 1
    )  # the position before each token, in rows with one more column
    targets = ids[is_response]
    owners = torch.arange(len(ids), device=device)[:, None].expand_as(ids)[is_response]
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    size = max(1, CHUNK // model.config.get_text_config().vocab_size)
    parts = []
    with HeadInput(model) as head:
        for rows in before.split(size):
            logits = logits_of(model, states[rows])
            candidates = nucleus_of(logits, config)
            parts.append((head.states.flatten(0, 1).clone(), *candidates))
    hidden, token_ids, logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
    return choices(hidden, Candidates(token_ids, logprobs), targets, owners, len(ids))


class Cache(PartCache):
    """Positions on disk."""

    def read(
        self,
        responses: Sequence[Response],
        config: ProxyConfig,
        reader: Reader,
    ) -> Positions:
        """The positions of N responses, from disk or from the reader."""
        of_nucleus = (config.temperature, config.top_k, config.top_p, config.max_candidates)

        def read_part(part: Sequence[Response]) -> Positions:
            return reader(part, config)

        return joined(self.parts(responses, of_nucleus, read_part, Positions))
