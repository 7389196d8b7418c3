"""Hidden states and candidates at every position of given responses: the training data of `training.proxy_dpo`.

The LLM is frozen, so one pass over the responses serves any number of epochs, settings and losses. Results are kept on
disk in parts, in a directory named by a hash of LLM, decoding and responses: a resumed run continues with the next
part, and another run with the same three reads nothing again.

`proxy.positions` defines what is kept.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel

from proxy.acceptance import Candidates
from proxy.checkpoint import BaseModelId
from proxy.network import ProxyConfig
from proxy.positions import Positions, choices, joined, nucleus_of
from training.logprobs import CHUNK, logits_of
from training.micro_batches import split_by_tokens
from training.model_inputs import HeadInput, pad_responses

_PART = 512  # responses in a file


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


class Cache:
    """Positions on disk: `directory/<hash>/<part>.safetensors`, each part complete or missing."""

    def __init__(
        self, directory: Path, base: BaseModelId, dtype: str, accelerator: Accelerator
    ) -> None:
        """
        Args:
            directory: where they are kept.
            base: the LLM.
            dtype: data type of the LLM.
            accelerator: of this run's processes, which share the work; each receives all positions.
        """
        self._directory, self._accelerator = directory, accelerator
        self._llm = base.fingerprint, dtype

    def read(
        self,
        responses: Sequence[Response],
        config: ProxyConfig,
        reader: Reader,
    ) -> Positions:
        """The positions of N responses, from disk or from the reader."""
        target = self._directory / self._key(responses, config)
        target.mkdir(parents=True, exist_ok=True)
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        starts = range(0, len(responses), _PART)
        paths = [target / f"{i:05}.safetensors" for i in range(len(starts))]
        parts = [_load(path) for path in paths]
        missing = [i for i, part in enumerate(parts) if part is None]
        total = sum(len(responses[starts[i] : starts[i] + _PART]) for i in missing)
        self._accelerator.wait_for_everyone()  # all processes have found the same parts
        with tqdm(total=total, unit="response", desc="hidden states", disable=index > 0) as bar:
            for number, i in enumerate(missing):
                batch = responses[starts[i] : starts[i] + _PART]
                if number % processes == index:
                    _save(paths[i], reader(batch, config))
                bar.update(len(batch))
        self._accelerator.wait_for_everyone()
        for i in missing:
            parts[i] = _load(paths[i])
        return joined([part for part in parts if part is not None])

    def _key(self, responses: Sequence[Response], config: ProxyConfig) -> str:
        of_nucleus = (config.temperature, config.top_k, config.top_p, config.max_candidates)
        digest = hashlib.sha256()
        for part in (*self._llm, of_nucleus, *responses):
            digest.update(json.dumps(part).encode())
        return digest.hexdigest()[:16]


def _save(path: Path, positions: Positions) -> None:
    temporary = path.with_name(f".{path.name}")
    tensors = {name: tensor.contiguous() for name, tensor in positions._asdict().items()}
    safetensors.torch.save_file(tensors, temporary)
    temporary.replace(path)


def _load(path: Path) -> Positions | None:
    """None = missing or damaged."""
    try:
        return Positions(**safetensors.torch.load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None
