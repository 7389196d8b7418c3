"""Scores of finished responses. What `--reward` may be:

- a directory from `training.reward_model`.
  Implicit (Rafailov et al., arXiv 2305.18290): r(x, y) = β · Σ_t log π_rm(y_t | x, y_<t) / π_ref(y_t | x, y_<t), where
  π_rm was trained on the pairs with the Bradley–Terry (DPO) loss from π_ref, the frozen LLM.
  Scalar: a linear head on the last token of prompt and response.
- a sequence-classification model with one label, a directory or a hub id: its score of the chat, by its own tokenizer.
- `self-judge`: the frozen LLM's own judgment (arXiv 2402.11253), log-odds that the response is better than an answer of
  the LLM alone, the mean over both orders; by the first of its principles, or as in `self-judge:manners`.
- a directory from `training.jsft --lora-rank`: the same, judged by the LLM with that LoRA.
- a proxy, of this very LLM: Σ_t log π(y_t) / p(y_t), of what it emits and of the frozen LLM (`training.proxy_dpo`).
- `module:function`, called with N prompts (lists of chat messages) and N completions (texts), returning N numbers.
"""

import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from judge.principles import principles_of
from judge.prompts import Question
from proxy.checkpoint import (
    WEIGHTS_FILE,
    BaseModelId,
    FingerprintMismatch,
    ProxyError,
    load,
    resolve_model_dir,
)
from proxy.network import ProxyNetwork
from training.console import TrainingError
from training.data import Message
from training.judging import ModelJudge
from training.memory import MOST_TOKENS
from training.models import (
    Adapted,
    CausalLM,
    Conversations,
    Other,
    Plain,
    attention_of,
    context_of,
    load_model,
    loading,
    refuse_unknown,
    response_logprobs,
)
from training.policy import Decoding, Policy
from training.positions import Response, read
from training.preference_losses import score
from training.rollout import generate, pad_responses

REWARD_FILE = "reward.json"
ADAPTER_FILE = "adapter_config.json"  # as peft names it
SELF_JUDGE = "self-judge"


class Sample(NamedTuple):
    """A prompt and a response to it."""

    messages: Sequence[Message]
    text: str
    prompt_ids: list[int]
    response_ids: list[int]  # with the end of the turn, where it was reached


class RewardConfig(BaseModel):
    """What `reward.json` beside a reward model's weights says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["implicit", "scalar", "judge"]
    beta: float = 0.0
    """Scale of the implicit reward; of no other."""
    base: BaseModelId
    """The model that it was trained from: π_ref of the implicit reward."""


class Reward(Protocol):
    """N samples -> [N] scores, higher is better."""

    def __call__(self, samples: Sequence[Sample]) -> Tensor: ...


@dataclass(frozen=True)
class Frozen:
    """The frozen LLM, as rewards may want it."""

    model: PreTrainedModel | PeftModel  # the latter where a LoRA learns on it
    tokenizer: Any
    base: BaseModelId
    decoding: Decoding
    end_ids: set[int]
    batch_size: int  # sequences at once in the device's memory

    @property
    def plain(self) -> CausalLM:
        """Without a LoRA that learns on it."""
        return Plain(self.model) if isinstance(self.model, PeftModel) else self.model


def load_reward(name: str, frozen: Frozen) -> Reward:
    """The reward that `name` stands for; see the module's docstring.

    Raises:
        TrainingError: there is no such reward, or it is damaged.
        FingerprintMismatch: an implicit reward, or a judge, that was trained from another LLM.
    """
    kind, _, principle = name.partition(":")
    if kind == SELF_JUDGE:
        directory = Path(frozen.model.name_or_path)
        (judge,) = model_judges(
            frozen.plain, frozen, directory, (principle,) if principle else ()
        ).values()
        return JudgeReward(judge, frozen)
    directory = Path(name)
    if (directory / REWARD_FILE).is_file():
        return _load_ours(directory, frozen)
    if (directory / WEIGHTS_FILE).is_file():
        return ProxyReward(load(directory, base=frozen.base).network, frozen)
    module, _, function = name.partition(":")
    if function and not directory.exists():
        return FunctionReward(name, _import(name, module, function))
    return _load_classifier(name, frozen)


def _load_ours(directory: Path, frozen: Frozen) -> Reward:
    try:
        config = RewardConfig.model_validate_json((directory / REWARD_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{directory / REWARD_FILE} is damaged: {error}") from None
    if config.kind == "scalar":
        return _load_classifier(str(directory), frozen)
    if config.base.fingerprint != frozen.base.fingerprint:
        raise FingerprintMismatch(
            f"the reward in {directory} was trained from {config.base.name!r} ({config.base.fingerprint}), "
            f"but the frozen LLM is {frozen.base.name!r} ({frozen.base.fingerprint}); train it again from this one"
        )
    tuned: CausalLM
    if (directory / ADAPTER_FILE).is_file():
        tuned = _add_lora(frozen.model, directory)
    else:
        whole = load_model(str(directory), dtype=frozen.model.dtype)[0]
        tuned = whole.eval().to(frozen.model.device)
    if config.kind == "judge":
        (judge,) = model_judges(tuned, frozen, directory).values()
        return JudgeReward(judge, frozen)
    return ImplicitReward(tuned, frozen.plain, config.beta, frozen.batch_size)


def reward_bytes(name: str, dtype: torch.dtype) -> float:
    """What the weights of the reward that `name` stands for take in memory, beside the frozen LLM's."""
    directory = Path(name)
    if not directory.is_dir():
        if ":" in name or name == SELF_JUDGE:
            return 0.0
        try:
            directory = resolve_model_dir(name)
        except ProxyError:  # `load_reward` says what is wrong
            return 0.0
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return stored * dtype.itemsize / 2  # most are stored in bfloat16


def model_judges(
    model: CausalLM, frozen: Frozen, directory: Path, principles: Sequence[str] = ()
) -> dict[str, ModelJudge]:
    """A judge for each of the principles named, which are those of the directory; none = the first there is.

    Raises TrainingError for an unknown principle.
    """
    known, context = principles_of(directory), context_of(frozen.model)
    for name in principles:
        if name not in known:
            raise TrainingError(f"unknown principle {name!r}; known are {', '.join(known)}")
    return {
        name: ModelJudge(model, frozen.tokenizer, known[name], context, frozen.batch_size)
        for name in principles or (next(iter(known)),)
    }


def _add_lora(model: PreTrainedModel | PeftModel, directory: Path) -> CausalLM:
    with loading(f"the LoRA in {directory}"):
        if isinstance(model, PeftModel):
            model.load_adapter(str(directory), "reward")
            return Other(model, "reward")
        return Adapted(PeftModel.from_pretrained(model, directory))


def _load_classifier(name: str, frozen: Frozen) -> Reward:
    like = frozen.model
    try:
        scorer = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=like.dtype, attn_implementation=attention_of(name)
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of safetensors, tokenizers, a config without a key...
        raise TrainingError(
            f"{name!r} is no reward: neither a directory with the {REWARD_FILE} that training.reward_model writes, "
            f"nor a sequence-classification model, nor module:function, nor {SELF_JUDGE} ({error})"
        ) from None
    if scorer.config.num_labels != 1:
        raise TrainingError(
            f"{name!r} has {scorer.config.num_labels} labels: a reward model has one, its score"
        )
    if not tokenizer.chat_template:
        raise TrainingError(f"the tokenizer of {name!r} has no chat template; give it one first")
    return ScalarReward(scorer.eval().to(like.device), tokenizer, frozen.batch_size)


def _import(name: str, module: str, function: str) -> Callable[..., Any]:
    with loading(f"the reward {name!r}"):
        found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TrainingError(f"the reward {name!r} is no function: {found!r}")
    return found


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
        if scorer.config.pad_token_id is None:  # it finds the last token by it
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
        for some in _batches(rows, self.batch_size):
            ids, mask = _pad_right(some, self.scorer.config.pad_token_id, device)
            scores.append(self.scorer(ids, attention_mask=mask).logits[:, 0])
        return torch.cat(scores).float()


class ProxyReward:
    """Σ_t log π(y_t) / p(y_t): how much likelier a response is with the proxy than without, within the nucleus."""

    def __init__(self, network: ProxyNetwork, frozen: Frozen) -> None:
        self.network = network.to(frozen.model.device)
        self.frozen = frozen

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        model = self.frozen.model
        responses = [Response(sample.prompt_ids, sample.response_ids) for sample in samples]
        most = MOST_TOKENS[model.device.type]
        with nullcontext() if isinstance(model, PreTrainedModel) else model.disable_adapter():
            plain = model if isinstance(model, PreTrainedModel) else model.get_base_model()
            positions = read(responses, self.network.config, model=plain, most=most)
            embeddings = plain.get_input_embeddings().weight
        owners = torch.arange(len(responses)).repeat_interleave(positions.counts)
        return score(self.network, embeddings, positions, owners).log_ratio.cpu()


class JudgeReward:
    """Log-odds that a judge finds a response better than an answer of the frozen LLM's own."""

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


class FunctionReward:
    """What a function of the user's returns."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        scores = self.function(
            prompts=[list(sample.messages) for sample in samples],
            completions=[sample.text for sample in samples],
        )
        try:
            found = torch.as_tensor(scores, dtype=torch.float32).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"the reward {self.name!r} returned no numbers: {error}") from None
        if len(found) != len(samples):
            raise TrainingError(
                f"the reward {self.name!r} returned {len(found)} scores for {len(samples)} completions"
            )
        return found


@torch.inference_mode()
def sequence_logprobs(
    model: CausalLM,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    batch_size: int,
) -> Tensor:
    """log π(response | prompt), summed over the response's tokens, of `batch_size` sequences at once: [N] nats."""
    sums = []
    for some in _batches(list(zip(prompts, responses, strict=True)), batch_size):
        some_prompts, some_responses = zip(*some, strict=True)
        ids, is_response = pad_responses(some_prompts, some_responses, model.device)
        sums.append(response_logprobs(model, ids, is_response[:, 1:]).sum(-1))
    return torch.cat(sums)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _pad_right(
    rows: Sequence[list[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, mask), each [N, T], 1 = is a token."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, device=device)
        mask[i, : len(row)] = 1
    return ids, mask


def _refuse_long(rows: Sequence[list[int]], model: PreTrainedModel) -> None:
    longest, most = max(map(len, rows)), context_of(model)
    if longest > most:
        raise TrainingError(
            f"the reward's model would have to read {longest} tokens and reads {most}: "
            "lower --max-prompt-tokens or --decoding.max-new-tokens"
        )


def write_reward_config(directory: Path, config: RewardConfig) -> None:
    text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
    (directory / REWARD_FILE).write_text(text, encoding="utf-8")
