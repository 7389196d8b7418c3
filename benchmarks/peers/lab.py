"""A world in transformers: the frozen LLM, a reward, a guide, and the constants of the methods."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.jobs import timed
from benchmarks.peers.decoders import Guide, Lab, Scale
from benchmarks.peers.reference import sampled
from benchmarks.peers.setting import Setting, scaled
from benchmarks.peers.worlds import World, validation_prompts, world_of
from benchmarks.toy_prompts import DATA_SEED
from judge.messages import Message
from proxy.checkpoint import identify
from training import reward_model
from training.conversations import Conversations
from training.models import end_ids, load_model
from training.prompts import Prompt, samples_of
from training.reward_loading import load_reward
from training.rewards import Frozen, ImplicitReward
from training.toy_data import files as toy_files

REWARD = "reward"
SCALE = "scale"
LORA_RANK = 16
LEARNING_RATE = 1e-3
_BATCH = 64


def load_frozen(world: World) -> Frozen:
    model, tokenizer = load_model(str(world.model), dtype=torch.bfloat16)
    base = identify(str(world.model))
    ends = end_ids(model, tokenizer)
    return Frozen(model.eval(), tokenizer, base, world.decoding, ends, _BATCH)


def as_prompts(frozen: Frozen, chats: list[list[Message]]) -> list[Prompt]:
    """The chats as the LLM reads them."""
    conversations = Conversations(frozen.tokenizer)
    return [Prompt(messages, conversations.prompt_ids(messages)) for messages in chats]


def train_reward(setting: Setting, directory: Path) -> dict[str, Any]:
    """The implicit reward as a LoRA, from pairs that the toy data's noisy labels order."""
    data = directory / "world"
    toy_files.main(
        toy_files.Options(
            output=data,
            overwrite=True,
            seed=DATA_SEED,
            num_sft=1,
            num_preferences=setting.num_pairs,
            num_held_out=1,
        )
    )
    options = reward_model.Options(
        model=str(setting.model),
        preferences=str(data / "preferences.jsonl"),
        output=directory / "lora",
        overwrite=True,
        lora_rank=LORA_RANK,
        learning_rate=LEARNING_RATE,
    )
    result: dict[str, Any] = {"pairs": setting.num_pairs}
    with timed(result):
        reward_model.main(options)
    return result


def open_lab(setting: Setting, scale: Scale | None = None) -> Lab:
    """Everything that a method in transformers is given; without a scale for `measure_scale` alone."""
    world = world_of(setting)
    frozen = load_frozen(world)
    scale = scale or Scale(0.0, 1.0, 0.0, 0.0)
    if world.reward is not None:
        reward = load_reward(world.reward, frozen)
        return Lab(frozen, world.decoding, reward, 0, None, _instructed(world, frozen), scale)
    # On a copy of the LLM: where nothing is adapted no LoRA slows the LLM down.
    reward = load_reward(str(setting.directory(REWARD) / "lora"), load_frozen(world))
    assert isinstance(reward, ImplicitReward)
    guide = Guide(reward.tuned, lambda prompt: prompt.ids)
    return Lab(frozen, world.decoding, reward, 2, reward.beta, guide, scale)


def _instructed(world: World, frozen: Frozen) -> Guide:
    """The frozen LLM itself under a system prompt: a guide without any training."""
    assert world.wish is not None and not isinstance(frozen.model, str)
    chats = Conversations(frozen.tokenizer)
    first = Message(role="system", content=world.wish)
    return Guide(frozen.model, lambda prompt: chats.prompt_ids([first, *prompt.messages]))


@torch.inference_mode()
def measure_scale(setting: Setting, directory: Path) -> dict[str, Any]:
    """`Scale`, from the frozen LLM's answers to validation prompts."""
    lab = open_lab(setting)
    chats = validation_prompts(setting, scaled(100, setting.scale, 16))
    prompts = as_prompts(lab.frozen, chats)
    responses = sampled(lab)(prompts, 0).responses
    rewards = lab.reward(samples_of(lab.frozen.tokenizer, prompts, responses)).float().cpu()
    entropies = torch.cat(
        [
            _entropies(lab, prompt.ids, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    mean, std = rewards.mean().item(), rewards.std().item()
    return {
        "mean": mean,
        "std": std,
        "goal": (rewards.quantile(0.9).item() - mean) / std,
        "entropy": entropies.quantile(0.85).item(),
    }


def _entropies(lab: Lab, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Of the token at each position of the response, in nats."""
    logits = lab.frozen.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def scale_of(setting: Setting) -> Scale:
    found = setting.result(SCALE)
    return Scale(*(found[name] for name in ("mean", "std", "goal", "entropy")))
