"""Scores of finished responses. `--reward` may be:

- a directory from `training.reward_model`. Implicit (Rafailov et al., arXiv 2305.18290): r(x, y) = β · Σ_t log π_rm(y_t
  | x, y_<t) / π_ref(y_t | x, y_<t), where π_rm was trained on the pairs with the Bradley–Terry (DPO) loss from π_ref,
  the frozen LLM. Scalar: a linear head on the last token of prompt and response. Probe: a linear head on the frozen
  LLM's own hidden states, averaged over the response.
- a sequence-classification model with one label, a directory or a hub id: its score of the chat, with its own
  tokenizer.
- `self-judge`: the frozen LLM's own judgment (arXiv 2402.11253): log-odds that the response is better than an answer of
  the LLM alone, averaged over both orders, by the first of its principles, or by the one in `self-judge:manners`.
- a directory from `training.jsft --lora-rank`: the same, judged by the LLM with that LoRA.
- a proxy for this LLM: Σ_t log π(y_t) / p(y_t), of its distribution and the frozen LLM's (`training.proxy_dpo`).
- `module:function`, called with N prompts (lists of chat messages) and N completions (texts), returns N numbers.

`--fluency-weight` and `--coherence-weight` (`training.coherence`) add to any of them.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from judge.prompts import Question, up_to_end
from proxy.checkpoint import (
    BaseModelId,
)
from proxy.network import ProxyNetwork
from proxy.reward_file import ProbeInfo
from training.adapters import CausalLM, WithoutAdapter
from training.console import TrainingError
from training.conversations import Conversations
from training.data import Message
from training.logprobs import response_logprobs
from training.mean_states import read_means
from training.memory import MOST_TOKENS
from training.model_inputs import pad_responses
from training.model_judge import ModelJudge
from training.models import context_of, refuse_unknown
from training.policy import Decoding, Policy
from training.positions import Response, read
from training.preference_losses import score
from training.rollout import generate

SELF_JUDGE = "self-judge"


class Sample(NamedTuple):
    """A prompt and a response to it."""

    messages: Sequence[Message]
    text: str
    prompt_ids: list[int]
    response_ids: list[int]  # includes the end of the turn, if it was reached


class Reward(Protocol):
    """N samples -> [N] scores; higher is better."""

    def __call__(self, samples: Sequence[Sample]) -> Tensor: ...


@dataclass(frozen=True)
class Frozen:
    """The frozen LLM, in the form that rewards take."""

    model: PreTrainedModel | PeftModel  # PeftModel if a LoRA on it is trained
    tokenizer: Any
    base: BaseModelId
    decoding: Decoding
    end_ids: set[int]
    batch_size: int  # sequences at once in the device's memory

    @property
    def without_adapter(self) -> CausalLM:
        """The LLM without the LoRA that is trained on it."""
        return WithoutAdapter(self.model) if isinstance(self.model, PeftModel) else self.model

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The LLM as transformers' class, without the LoRA while the block lasts."""
        if isinstance(self.model, PreTrainedModel):
            yield self.model
        else:
            with self.model.disable_adapter():
                yield self.model.get_base_model()


class ImplicitReward:
    """β · log(π_rm / π_ref) of a response."""

    def __init__(self, tuned: CausalLM, reference: CausalLM, beta: float, batch_size: int) -> None:
        self.tuned, self.reference, self.beta = tuned, reference, beta
        self.batch_size = batch_size

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        ids = [s.prompt_ids for s in samples], [s.response_ids for s in samples]
        tuned, reference = (
            sequence_logprobs(model, *ids, self.batch_size)
            for model in (self.tuned, self.reference)
        )
        return self.beta * (tuned - reference)


class ScalarReward:
    """The score of a sequence-classification model with one label."""

    def __init__(self, scorer: PreTrainedModel, tokenizer: Any, batch_size: int) -> None:
        self.scorer, self.chats, self.batch_size = scorer, Conversations(tokenizer), batch_size
        if scorer.config.pad_token_id is None:  # the model finds the last token by it
            scorer.config.pad_token_id = tokenizer.eos_token_id

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        answers = [Message(role="assistant", content=s.text) for s in samples]
        rows = [self.chats.ids([*s.messages, a]) for s, a in zip(samples, answers, strict=True)]
        _refuse_long(rows, self.scorer)
        refuse_unknown(
            self.scorer, self.chats.tokenizer, [*rows, [self.scorer.config.pad_token_id]]
        )
        device, scores = self.scorer.device, []
        for batch in _batches(rows, self.batch_size):
            ids, mask = _pad_right(batch, self.scorer.config.pad_token_id, device)
            scores.append(self.scorer(ids, attention_mask=mask).logits[:, 0])
        return torch.cat(scores).float()


class ProxyReward:
    """Σ_t log π(y_t) / p(y_t), within the nucleus: how much likelier the proxy makes a response."""

    def __init__(self, network: ProxyNetwork, frozen: Frozen) -> None:
        self.network = network.to(frozen.model.device)
        self.frozen = frozen

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        responses = [Response(sample.prompt_ids, sample.response_ids) for sample in samples]
        with self.frozen.plain() as model:
            max_tokens = MOST_TOKENS[model.device.type]
            positions = read(responses, self.network.config, model=model, max_tokens=max_tokens)
            embeddings = model.get_input_embeddings().weight
        owners = torch.arange(len(responses)).repeat_interleave(positions.counts)
        return score(self.network, embeddings, positions, owners).log_ratio.cpu()


class ProbeReward:
    """A linear head on the frozen LLM's hidden states, averaged over a response (`proxy.probe`)."""

    def __init__(self, weight: Tensor, info: ProbeInfo, frozen: Frozen) -> None:
        """
        Args:
            weight: [H].
        """
        self.weight, self.info, self.frozen = weight, info, frozen

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        responses = [
            Response(sample.prompt_ids, up_to_end(sample.response_ids, self.info.end_ids))
            for sample in samples
        ]
        with self.frozen.plain() as model:
            _refuse_long([prompt + response for prompt, response in responses], model)
            max_tokens = MOST_TOKENS[model.device.type]
            states = read_means(responses, (self.info.layer,), model=model, max_tokens=max_tokens)
        return states.means[:, 0] @ self.weight


class JudgeReward:
    """Log-odds that a judge prefers a response to an answer of the frozen LLM."""

    def __init__(self, judge: ModelJudge, frozen: Frozen) -> None:
        self.judge, self.frozen = judge, frozen

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        frozen = self.frozen
        own = generate(
            Policy(frozen.model),
            [sample.prompt_ids for sample in samples],
            frozen.decoding,
            end_ids=frozen.end_ids,
            seeds=[zlib.crc32(str(sample.prompt_ids).encode()) for sample in samples],
            batch_size=frozen.batch_size,
        )
        answers = frozen.tokenizer.batch_decode(own.responses, skip_special_tokens=True)
        questions = [
            Question([*sample.messages], sample.text, answer)
            for sample, answer in zip(samples, answers, strict=True)
        ]
        return self.judge.log_odds(questions).mean(-1)


class FluentReward:
    """A reward plus `weight` times the mean log-probability of a response's tokens under the frozen LLM.

    A reward that sees one aspect only, such as a readability formula, is otherwise raised at the price of sense.
    """

    def __init__(self, reward: Reward, frozen: Frozen, weight: float) -> None:
        self.reward, self.frozen, self.weight = reward, frozen, weight

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        responses = [sample.response_ids for sample in samples]
        prompts = [sample.prompt_ids for sample in samples]
        model, batch_size = self.frozen.without_adapter, self.frozen.batch_size
        logprobs = sequence_logprobs(model, prompts, responses, batch_size).cpu()
        lengths = torch.tensor([max(1, len(response)) for response in responses])
        return self.reward(samples).cpu() + self.weight * logprobs / lengths


class FunctionReward:
    """The scores that a user's function returns."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        scores = self.function(
            prompts=[list(sample.messages) for sample in samples],
            completions=[sample.text for sample in samples],
        )
        try:
            values = torch.as_tensor(scores, dtype=torch.float32).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"the reward {self.name!r} returned no numbers: {error}") from None
        if len(values) != len(samples):
            raise TrainingError(
                f"the reward {self.name!r} returned {len(values)} scores for {len(samples)} completions"
            )
        return values


@torch.inference_mode()
def sequence_logprobs(
    model: CausalLM,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    batch_size: int,
) -> Tensor:
    """log π(response | prompt), summed over tokens: [N] nats. Computes `batch_size` sequences at once."""
    sums = []
    for batch in _batches(list(zip(prompts, responses, strict=True)), batch_size):
        batch_prompts, batch_responses = zip(*batch, strict=True)
        ids, is_response = pad_responses(batch_prompts, batch_responses, model.device)
        sums.append(response_logprobs(model, ids, is_response[:, 1:]).sum(-1))
    return torch.cat(sums)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _pad_right(
    rows: Sequence[list[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, mask), each [N, T], 1 = token."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, device=device)
        mask[i, : len(row)] = 1
    return ids, mask


def _refuse_long(rows: Sequence[list[int]], model: PreTrainedModel) -> None:
    longest, limit = max(map(len, rows)), context_of(model)
    if longest > limit:
        raise TrainingError(
            f"the reward's model would have to read {longest} tokens and reads {limit}: "
            "lower --max-prompt-tokens or --decoding.max-new-tokens"
        )
