"""The reward that `--reward` names; `training.rewards` lists what it may be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from judge.functions import load_function
from judge.principles import principles_of
from proxy.checkpoint import (
    WEIGHTS_FILE,
    FingerprintMismatch,
    ProxyError,
    load,
    resolve_model_dir,
)
from proxy.hub import resolve_dir
from proxy.probe import load_weight
from proxy.reward_file import REWARD_FILE, RewardFile
from training.adapters import CausalLM, SwitchedAdapter, WithAdapter
from training.coherence import add_coherence
from training.console import TrainingError
from training.model_judge import ModelJudge
from training.models import attention_of, context_of, load_model, loading
from training.prompts import Prompt
from training.rewards import (
    SELF_JUDGE,
    FluentReward,
    Frozen,
    FunctionReward,
    ImplicitReward,
    JudgeReward,
    ProbeReward,
    ProxyReward,
    Reward,
    ScalarReward,
)

ADAPTER_FILE = "adapter_config.json"  # peft's name


def reward_of(
    options: Any, prompts: Sequence[Prompt], frozen: Frozen, accelerator: Accelerator
) -> Reward:
    """What a run learns from: the reward that `--reward` names, with fluency and coherence.

    Args:
        options: `reward`, `fluency_weight`, `coherence_weight` and `seed`.
        prompts: of the training.
        frozen: the LLM that is aligned.
        accelerator: of this run's processes.

    Raises:
        TrainingError, FingerprintMismatch: as `load_reward` and `add_coherence`.
    """
    reward = load_reward(options.reward, frozen)
    if options.fluency_weight:
        reward = FluentReward(reward, frozen, options.fluency_weight)
    if options.coherence_weight:
        weight, seed = options.coherence_weight, options.seed
        reward = add_coherence(reward, weight, prompts, frozen, accelerator, seed)
    return reward


def load_reward(name: str, frozen: Frozen) -> Reward:
    """The reward with this name; `training.rewards` lists what it may be.

    Args:
        name: what `--reward` says.
        frozen: the LLM that is aligned.

    Raises:
        TrainingError: there is no such reward, or it is damaged.
        FingerprintMismatch: an implicit reward, a probe or a judge that was trained from another LLM.
    """
    kind, _, principle = name.partition(":")
    if kind == SELF_JUDGE:
        directory = Path(frozen.model.name_or_path)
        (judge,) = model_judges(
            frozen.without_adapter, frozen, directory, (principle,) if principle else ()
        ).values()
        return JudgeReward(judge, frozen)
    directory = resolve_dir(name)
    if (directory / REWARD_FILE).is_file():
        return _load_trained(directory, frozen)
    if (directory / WEIGHTS_FILE).is_file():
        return ProxyReward(load(directory, base=frozen.base).network, frozen)
    if name.partition(":")[2] and not directory.exists():
        with loading(f"the reward {name!r}"):
            return FunctionReward(name, load_function(name))
    return _load_classifier(str(directory), frozen)


def _load_trained(directory: Path, frozen: Frozen) -> Reward:
    try:
        config = RewardFile.read(directory)
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{directory / REWARD_FILE} is damaged: {error}") from None
    if config.kind == "scalar":
        return _load_classifier(str(directory), frozen)
    if config.base.fingerprint != frozen.base.fingerprint:
        raise FingerprintMismatch(
            f"the reward in {directory} was trained from {config.base.name!r} ({config.base.fingerprint}), "
            f"but the frozen LLM is {frozen.base.name!r} ({frozen.base.fingerprint}); train it again from this one"
        )
    if config.probe is not None:
        return ProbeReward(load_weight(directory), config.probe, frozen)
    tuned: CausalLM
    if (directory / ADAPTER_FILE).is_file():
        tuned = _add_lora(frozen.model, directory)
    else:
        trained = load_model(str(directory), dtype=frozen.model.dtype)[0]
        tuned = trained.eval().to(frozen.model.device)
    if config.kind == "judge":
        (judge,) = model_judges(tuned, frozen, directory).values()
        return JudgeReward(judge, frozen)
    return ImplicitReward(tuned, frozen.without_adapter, config.beta, frozen.batch_size)


def reward_bytes(name: str, dtype: torch.dtype) -> float:
    """Memory of the reward's weights, in addition to the frozen LLM's."""
    if ":" in name or name == SELF_JUDGE:
        return 0.0
    directory = Path(name)
    if not directory.is_dir():
        try:
            directory = resolve_model_dir(str(resolve_dir(name)))
        except ProxyError:  # `load_reward` reports the error
            return 0.0
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return stored * dtype.itemsize / 2  # most are stored in bfloat16


def model_judges(
    model: CausalLM, frozen: Frozen, directory: Path, principles: Sequence[str] = ()
) -> dict[str, ModelJudge]:
    """A judge for each of the named principles, which are those of the directory; empty = its first one.

    Raises:
        TrainingError: a principle is unknown.
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
            return SwitchedAdapter(model, "reward")
        return WithAdapter(PeftModel.from_pretrained(model, directory))


def _load_classifier(name: str, frozen: Frozen) -> Reward:
    like = frozen.model
    try:
        scorer = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=like.dtype, attn_implementation=attention_of(name)
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # from safetensors, tokenizers, a config with a missing key...
        raise TrainingError(
            f"{name!r} is no reward: neither a directory with the {REWARD_FILE} that training.reward_model writes, "
            f"nor a sequence-classification model, nor module:function, nor {SELF_JUDGE} ({error})"
        ) from None
    if scorer.config.num_labels != 1:
        raise TrainingError(
            f"{name!r} has {scorer.config.num_labels} labels: a reward model has one, its score"
        )
    if not tokenizer.chat_template:
        raise TrainingError(f"the tokenizer of {name!r} has no chat template; add one first")
    return ScalarReward(scorer.eval().to(like.device), tokenizer, frozen.batch_size)
