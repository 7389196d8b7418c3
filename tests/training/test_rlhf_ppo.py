"""Full RLHF, the baseline: it learns, stays near its reference if asked to, and can be resumed."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.models import DEMO
from tests.training.conftest import rlhf_arguments
from tests.warm import Command, run
from training import reward_model
from training.metrics import read_metrics
from training.models import load_model
from training.on_policy import start
from training.policy import Decoding
from training.rewards import Sample
from training.rlhf_ppo import Options, RLHFTrainer
from training.state import STATE_FILE


def brevity(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([-float(len(sample.response_ids)) for sample in samples])


def evenness(samples: Sequence[Sample]) -> Tensor:
    """The share of even token ids: about half of them where nothing was learned."""
    return torch.tensor([fmean(token % 2 == 0 for token in s.response_ids) for s in samples])


@pytest.fixture
def options(work_dir: Path, tmp_path: Path) -> Callable[..., Options]:
    defaults = {
        "model": str(work_dir / "base"),
        "reward": str(work_dir / "reward-aligned"),
        "episodes": 32,
        "decoding": Decoding(top_k=0, top_p=1.0, max_new_tokens=24),
        "dtype": "float32",
    }

    def make(**settings: Any) -> Options:
        return Options(
            prompts=str(work_dir / "world/prompts.jsonl"), output=tmp_path, **defaults | settings
        )

    return make


def test_it_learns_what_is_rewarded(options: Callable[..., Options]) -> None:
    trainer = RLHFTrainer(options(steps=8, learning_rate=1e-2, kl_weight=0.0), start())
    trainer.reward = evenness
    rows = [trainer.step(index) for index in range(8)]
    # The rollouts' standard errors are about 0.02.
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.15
    assert rows[-1]["kl"] > 1 > 1e-3 > abs(rows[0]["kl"])


def test_a_dear_divergence_keeps_the_actor_at_its_reference(
    options: Callable[..., Options],
) -> None:
    common = {
        "steps": 4,
        "episodes": 16,
        "decoding": Decoding(top_k=0, top_p=1.0, max_new_tokens=16),
    }
    unconstrained, constrained = (
        RLHFTrainer(options(**common, learning_rate=3e-3, kl_weight=weight), start())
        for weight in (0.0, 10.0)
    )
    kls = []
    for trainer in (unconstrained, constrained):
        trainer.reward = evenness
        kls.append([trainer.step(index)["kl"] for index in range(4)][-1])
    assert kls[1] < kls[0] / 2


def test_a_reward_s_lora_stays_out_of_the_actor(
    options: Callable[..., Options], work_dir: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "lora"
    reward_model.main(
        reward_model.Options(
            model=str(work_dir / "base"),
            preferences=str(work_dir / "world/preferences.jsonl"),
            output=lora,
            max_rows=8,
            batch_size=8,
            lora_rank=2,
        )
    )
    trainer = RLHFTrainer(options(steps=1, learning_rate=1e-3, reward=str(lora)), start())
    names = load_file(work_dir / "base/model.safetensors").keys()
    assert trainer.step(0)["reward_std"] > 0
    trainer.save({})
    assert load_file(tmp_path / "model.safetensors").keys() == names


def test_a_lora_learns_and_only_it_is_saved(
    options: Callable[..., Options], tmp_path: Path
) -> None:
    # The demo's own LLM: a LoRA does not move one that has learned nothing.
    trainer = RLHFTrainer(
        options(
            model=str(DEMO / "model"),
            reward="deploy.demo.smollm2.rewards:plain",
            steps=4,
            learning_rate=1e-2,
            kl_weight=0.0,
            lora_rank=4,
            dtype="bfloat16",
        ),
        start(),
    )
    trainer.reward = brevity
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    rows = [trainer.step(index) for index in range(4)]
    # The rollouts' standard errors are about 1 token.
    assert rows[-1]["tokens_per_response"] < rows[0]["tokens_per_response"] - 6
    assert all(p.dtype == torch.float32 for p in trainer.trained.parameters())
    assert all(torch.equal(before[name], p) for name, p in trainer.model.state_dict().items())
    trainer.save({})
    saved = load_file(tmp_path / "adapter_model.safetensors")
    critic = sum(p.numel() for p in trainer.critic.parameters() if p.requires_grad)
    trained = sum(p.numel() for p in trainer.trained.parameters())
    assert sum(p.numel() for p in saved.values()) == trained - critic
    assert critic > trainer.critic.head.weight.numel() + 1
    assert not (tmp_path / "model.safetensors").exists()


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    work_dir: Path, rlhf: Path, tmp_path: Path
) -> None:
    command = [*map(str, rlhf_arguments(work_dir)), "--output", str(tmp_path)]
    process = Command(*command)
    while not (tmp_path / STATE_FILE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model.safetensors").exists()
    resumed = run(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after update" in resumed.stdout
    resumed_weights, expected_weights = (
        load_file(directory / "model.safetensors") for directory in (tmp_path, rlhf)
    )
    assert all(
        torch.equal(resumed_weights[name], expected_weights[name]) for name in expected_weights
    )
    base_weights = load_model(str(work_dir / "base"), dtype=torch.bfloat16)[0].state_dict()
    assert not all(
        torch.equal(base_weights[name], expected_weights[name]) for name in expected_weights
    )
    assert len(read_metrics(tmp_path)) == 3
