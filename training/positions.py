"""What a proxy is trained on directly: the hidden state and the candidates of every position of given responses.

The LLM is frozen, so one pass over the responses is enough for any number of epochs, settings and losses. It is kept on
disk, in parts, below a name that is a hash of LLM, decoding and responses: a run that was killed goes on with the next
part, and another run with the same three reads nothing again.

Positions whose nucleus has a single candidate, and tokens outside of it, are not kept: the proxy has no say there. The
latter are counted, for responses that the LLM would not have written teach a proxy little.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from proxy.acceptance import Candidates
from proxy.checkpoint import BaseModelId
from proxy.network import ProxyConfig
from training.logprobs import CHUNK, logits_of
from training.micro_batches import split_by_tokens
from training.policy import nucleus_of
from training.rollout import HeadInput, pad_responses

_PART = 512  # responses in a file


class Response(NamedTuple):
    """Token ids."""

    prompt: list[int]
    response: list[int]  # with the end of the turn, where it was reached

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


class Positions(NamedTuple):
    """P positions of N responses at which the LLM's nucleus has several candidates, the response's token among them.

    They stand response by response.
    """

    hidden: Tensor  # [P, H] the lm_head's input, in the LLM's dtype
    token_ids: Tensor  # [P, K] int32, the candidates, the most probable first
    logprobs: Tensor  # [P, K] float32, renormalised over the nucleus; -inf = outside
    slots: Tensor  # [P] int64, which of them the response took
    counts: Tensor  # [N] int64, positions of each response
    tokens: Tensor  # [N] int64, all its tokens
    outside: Tensor  # [N] int64, tokens outside the nucleus

    @property
    def share_outside(self) -> float:
        """Of the tokens, how many lie outside the nucleus."""
        return self.outside.sum().item() / max(1, self.tokens.sum().item())

    def of(self, responses: Tensor) -> tuple["Positions", Tensor]:
        """The positions of some of the responses [n], and which of the n each belongs to: [P']."""
        counts = self.counts[responses]
        starts = (self.counts.cumsum(0) - self.counts)[responses]
        owners = torch.arange(len(responses)).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts)[owners]
        rows = starts[owners] + torch.arange(len(owners)) - first
        of_rows = (self.hidden[rows], self.token_ids[rows], self.logprobs[rows], self.slots[rows])
        return Positions(*of_rows, counts, self.tokens[responses], self.outside[responses]), owners


def joined(parts: Sequence[Positions]) -> Positions:
    """One after the other."""
    return Positions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.inference_mode()
def read(
    model: PreTrainedModel, responses: Sequence[Response], config: ProxyConfig, most: int
) -> Positions:
    """One pass of the frozen LLM.

    Args:
        model: the frozen LLM, from `training.models.load_model`.
        responses: N of them.
        config: the proxy's: temperature, top-k, top-p and the number of candidates.
        most: tokens at once, padding included; a longer response is read alone.
    """
    batches = split_by_tokens([each.length for each in responses], most)
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
    before = before + before // (ids.shape[1] - 1)  # the position before, in rows longer by one
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
    is_taken = (token_ids == targets[:, None]) & (logprobs > -torch.inf)
    is_inside = is_taken.any(-1)
    kept = is_inside & ((logprobs > -torch.inf).sum(-1) > 1)

    def counted(which: Tensor) -> Tensor:
        return torch.bincount(owners[which], minlength=len(ids)).cpu()

    return Positions(
        hidden[kept].cpu(),
        token_ids[kept].int().cpu(),
        logprobs[kept].cpu(),
        is_taken[kept].int().argmax(-1).cpu(),
        counted(kept),
        counted(torch.ones_like(kept)),
        counted(~is_inside),
    )


class Cache:
    """Positions on disk: `directory/<hash>/<part>.safetensors`, each whole or not there."""

    def __init__(self, directory: Path, base: BaseModelId, accelerator: Accelerator) -> None:
        self._directory, self._base, self._accelerator = directory, base, accelerator

    def read(
        self, model: PreTrainedModel, responses: Sequence[Response], config: ProxyConfig, most: int
    ) -> Positions:
        """As `read`, of what is not there yet; several processes share the work, and each returns all."""
        target = self._directory / self._key(model, responses, config)
        target.mkdir(parents=True, exist_ok=True)
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        starts = range(0, len(responses), _PART)
        paths = [target / f"{i:05}.safetensors" for i in range(len(starts))]
        missing = [i for i, path in enumerate(paths) if _load(path) is None]
        total = sum(len(responses[starts[i] : starts[i] + _PART]) for i in missing)
        self._accelerator.wait_for_everyone()  # all have seen the same
        with tqdm(total=total, unit="response", desc="hidden states", disable=index > 0) as bar:
            for number, i in enumerate(missing):
                some = responses[starts[i] : starts[i] + _PART]
                if number % processes == index:
                    _save(paths[i], read(model, some, config, most))
                bar.update(len(some))
        self._accelerator.wait_for_everyone()
        found = [_load(path) for path in paths]
        return joined([part for part in found if part is not None])

    def _key(
        self, model: PreTrainedModel, responses: Sequence[Response], config: ProxyConfig
    ) -> str:
        of_nucleus = (config.temperature, config.top_k, config.top_p, config.max_candidates)
        digest = hashlib.sha256()
        for part in (self._base.fingerprint, str(model.dtype), of_nucleus, *responses):
            digest.update(json.dumps(part).encode())
        return digest.hexdigest()[:16]


def _save(path: Path, positions: Positions) -> None:
    temporary = path.with_name(f".{path.name}")
    tensors = {name: tensor.contiguous() for name, tensor in positions._asdict().items()}
    safetensors.torch.save_file(tensors, temporary)
    temporary.replace(path)


def _load(path: Path) -> Positions | None:
    """None = not there, or damaged."""
    try:
        return Positions(**safetensors.torch.load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None


def candidates_of(positions: Positions) -> Candidates:
    """The candidates of each position."""
    return Candidates(positions.token_ids.long(), positions.logprobs)
