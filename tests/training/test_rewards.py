"""Rewards on a small random model: the LoRA against its merged model, and what no model can read."""

import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForCausalLM

from proxy.checkpoint import FingerprintMismatch, identify
from proxy.network import ProxyNetwork
from tests.training.models import ANSWERS, PROMPTS, chat, data_rows, frozen_of, save_model
from training import reward_model
from training.console import TrainingError
from training.conversations import Conversations
from training.models import load_model
from training.policy import Decoding, Policy, default_config
from training.reward_loading import load_reward, reward_of
from training.rewards import Frozen, Sample
from training.rollout import generate


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and trained from it a scalar reward and a LoRA, with a large learning rate."""
    directory = tmp_path_factory.mktemp("rewards")
    save_model("qwen2", directory / "base")
    rows = "".join(json.dumps(row) + "\n" for row in data_rows("preferences"))
    (directory / "preferences.jsonl").write_text(rows)
    common = {
        "model": str(directory / "base"),
        "preferences": str(directory / "preferences.jsonl"),
    }
    reward_model.main(
        reward_model.Options(**common, output=directory / "scalar", kind="scalar", batch_size=2)
    )
    reward_model.main(
        reward_model.Options(
            **common,
            output=directory / "lora",
            lora_rank=4,
            learning_rate=1e-2,
            batch_size=4,
            gradient_checkpointing=True,
            epochs=4,
        )
    )
    return directory


@pytest.fixture
def frozen(work_dir: Path) -> Frozen:
    return frozen_of(work_dir / "base")


@pytest.fixture
def samples(frozen: Frozen) -> list[Sample]:
    chats = Conversations(frozen.tokenizer)
    return [
        Sample(chat(text), answer, *chats.split_ids(chat(text), answer))
        for text in PROMPTS
        for answer in ANSWERS
    ]


@torch.no_grad()
def test_a_lora_rewards_as_the_merged_model_beside_the_frozen_one(
    work_dir: Path, frozen: Frozen, samples: list[Sample]
) -> None:
    reference_model = AutoModelForCausalLM.from_pretrained(
        work_dir / "base", dtype=torch.float32
    ).eval()
    base_model = AutoModelForCausalLM.from_pretrained(work_dir / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base_model, work_dir / "lora").merge_and_unload().eval()
    expected = []
    for sample in samples:
        ids, start = torch.tensor([sample.prompt_ids + sample.response_ids]), len(sample.prompt_ids)
        merged_logprobs, reference_logprobs = (
            model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            for model in (merged, reference_model)
        )
        ratios = (merged_logprobs - reference_logprobs).gather(-1, ids[0, start:].unsqueeze(-1))
        expected.append(0.1 * ratios.sum().item())
    actual = load_reward(str(work_dir / "lora"), frozen)(samples)
    assert actual.tolist() == pytest.approx(expected, abs=1e-4)
    assert actual.std() > 0.05  # it was trained: 0 before
    preferred = actual.view(3, 3).diagonal()
    assert preferred.mean() > actual.mean()


@torch.no_grad()
def test_fluency_is_the_mean_log_probability_under_the_frozen_llm(
    frozen: Frozen, samples: list[Sample]
) -> None:
    expected = []
    for sample in samples:
        ids, start = torch.tensor([sample.prompt_ids + sample.response_ids]), len(sample.prompt_ids)
        logprobs = frozen.model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        mean = logprobs.gather(-1, ids[0, start:].unsqueeze(-1)).mean().item()
        expected.append(len(sample.text) + 3 * mean)
    options = SimpleNamespace(reward=f"{__name__}:lengths", fluency_weight=3, coherence_weight=0)
    reward = reward_of(options, [], frozen, Accelerator(cpu=True))
    assert reward(samples).tolist() == pytest.approx(expected, abs=1e-4)


def lengths(prompts: list[Any], completions: list[str]) -> list[int]:
    return [len(completion) for completion in completions]


def test_a_lora_acts_in_the_reward_alone(
    work_dir: Path, frozen: Frozen, samples: list[Sample]
) -> None:
    prompts = [sample.prompt_ids for sample in samples[:2]]

    def decisions() -> torch.Tensor:
        proxied = Policy(frozen.model, network)
        rollout = generate(proxied, prompts, Decoding(max_new_tokens=8), end_ids=(), seeds=count(0))
        return rollout.decisions.hidden

    network = ProxyNetwork(default_config(frozen.model, width=4))
    expected = decisions()
    assert len(expected) >= 16
    reward = load_reward(str(work_dir / "lora"), frozen)
    assert torch.equal(decisions(), expected)
    reward(samples)
    assert torch.equal(decisions(), expected)
    assert not any(parameter.requires_grad for parameter in frozen.model.lm_head.parameters())


@pytest.mark.parametrize("name", ["lora", "self-judge"])
def test_a_batch_size_changes_nothing(
    work_dir: Path, frozen: Frozen, samples: list[Sample], name: str
) -> None:
    name = str(work_dir / name) if name == "lora" else name
    small_batches = load_reward(name, frozen)(samples)
    model = load_model(str(work_dir / "base"))[0].eval()  # a model takes one LoRA
    one_batch = load_reward(name, replace(frozen, model=model, batch_size=9))(samples)
    torch.testing.assert_close(small_batches, one_batch, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "scalar", "self-judge"])
def test_every_tensor_is_made_on_the_models_device(
    work_dir: Path, frozen: Frozen, samples: list[Sample], name: str
) -> None:
    """A tensor made without a device is on "meta" here, and its use with other tensors is an error."""
    reward = load_reward(name if name == "self-judge" else str(work_dir / name), frozen)
    expected = reward(samples)
    with torch.device("meta"):
        assert torch.equal(reward(samples), expected)


def test_a_damaged_lora(work_dir: Path, frozen: Frozen, tmp_path: Path) -> None:
    shutil.copytree(work_dir / "lora", tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(TrainingError, match="cannot load the LoRA in"):
        load_reward(str(tmp_path), frozen)


def test_a_lora_of_another_llm(work_dir: Path, frozen: Frozen, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    other_frozen = replace(frozen, base=identify(str(tmp_path)))
    with pytest.raises(FingerprintMismatch, match="was trained from 'base'"):
        load_reward(str(work_dir / "lora"), other_frozen)


def test_a_scalar_reward_has_no_lora(work_dir: Path, tmp_path: Path) -> None:
    options = reward_model.Options(
        model=str(work_dir / "base"),
        preferences=str(work_dir / "preferences.jsonl"),
        output=tmp_path,
        kind="scalar",
        lora_rank=4,
    )
    with pytest.raises(TrainingError, match="for the implicit reward"):
        reward_model.main(options)
