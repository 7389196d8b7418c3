"""Base class of the PPO trainers: rewards of a rollout, and an update."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from pydantic import Field, PositiveInt
from torch import Tensor

from judge.options import NonNegative, Positive
from training import on_policy
from training.console import TrainingError
from training.model_card import Score
from training.reward_loading import reward_bytes, reward_of
from training.rewards import Reward
from training.rollout import Rollout

PATIENCE = 3  # updates in a row
_SAME = 1e-8  # a smaller standard deviation counts as 0


@dataclass(frozen=True, kw_only=True)
class Options(on_policy.Options):
    """Options of all PPO trainers."""

    reward: str
    """A directory from `training.reward_model` or `training.jsft --lora-rank`, a proxy, a sequence-classification
    model, or one of these as a repository of the Hub (`org/repo` or `org/repo@revision`); `self-judge`, or
    `module:function`.
    """
    fluency_weight: NonNegative = 0.0
    """Adds to the reward this times the mean log-probability of a response's tokens under the frozen LLM, in nats."""
    coherence_weight: NonNegative = 0.0
    """Adds to the reward a probe that knows the LLM's own answers from its answers to other prompts and from loops.
    1 = as much as the reward; 0 = none. A probe costs no second pass if `training.reward_model` adds it.
    """
    episodes: Annotated[int, Field(ge=2)] = 256
    """Responses in a rollout. Fewer than about 200 learn much less."""
    epochs: PositiveInt = 4
    """Passes over a rollout."""
    clip: Positive = 0.2
    """PPO's ε."""
    value_weight: NonNegative = 0.5
    """Weight of the value loss."""


class Episodes(NamedTuple):
    """A rollout of this process, and the rewards of all processes."""

    prompts: list[list[int]]
    rollout: Rollout
    rewards: Tensor  # [N] of all processes, on the CPU
    first: int  # index of this process's first response among all


PPOOptionsT = TypeVar("PPOOptionsT", bound=Options)


class PPOTrainer(on_policy.OnPolicyTrainer[PPOOptionsT]):
    """PPO for any sampling policy."""

    progress_metric = "reward"

    def __init__(self, options: PPOOptionsT, accelerator: Accelerator) -> None:
        super().__init__(options, accelerator)
        self.reward: Reward = reward_of(options, self.prompts, self.frozen(), accelerator)

    def other_bytes(self) -> float:
        return reward_bytes(self.options.reward, getattr(torch, self.options.dtype))

    @abstractmethod
    def roll_out(self, prompts: Sequence[list[int]], seeds: Iterable[int]) -> Rollout:
        """One response to each prompt, by the trained policy."""

    @abstractmethod
    def learn(self, episodes: Episodes, index: int) -> dict[str, float]:
        """PPO's gradient steps of an update; returns their metrics."""

    @abstractmethod
    def describe(self, rollout: Rollout) -> dict[str, float]:
        """Metrics of the rollout over all processes, in addition to those of the rewards."""

    def check(self, rows: list[dict[str, Any]]) -> None:
        """Stop a run whose last updates had nothing to learn from."""
        refuse_constant_reward(rows)

    def scores(self, row: dict[str, Any]) -> list[Score]:
        of, count = (
            "responses of the last update, to prompts of the training",
            self.options.episodes,
        )
        scores = [
            Score(f"reward (`{self.options.reward}`)", row["reward"], row["reward_se"], count, of)
        ]
        if "acceptance_rate" in row:
            scores.append(Score("candidates accepted", row["acceptance_rate"], None, count, of))
        return scores

    def step(self, index: int) -> dict[str, float]:
        """Roll out, score, estimate advantages, take PPO's gradient steps."""
        started, options = time.monotonic(), self.options
        prompts, seeds, first = self.draw_prompts(index, options.episodes)
        rollout = self.roll_out([prompt.ids for prompt in prompts], seeds)
        rewards = self.gather(self.reward(self.samples(prompts, rollout.responses)))
        refuse_bad_rewards(rewards)
        left, spread = self.anneal(index), rewards.std().item()
        row = {
            "step": index + 1,
            "reward": rewards.mean().item(),
            "reward_std": spread,
            "reward_se": spread / len(rewards) ** 0.5,
            **self.describe(rollout),
        }
        if spread > _SAME:  # without a difference there is nothing to learn
            episodes = Episodes([prompt.ids for prompt in prompts], rollout, rewards, first)
            row |= self.learn(episodes, index)
        seconds = time.monotonic() - started
        return row | {"learning_rate": left * options.learning_rate, "seconds": seconds}


def refuse_bad_rewards(rewards: Tensor) -> None:
    """
    Raises:
        TrainingError: one is not a finite number.
    """
    bad = int((~rewards.isfinite()).sum())
    if bad:
        raise TrainingError(
            f"the reward of {bad} of {len(rewards)} responses is not a finite number"
        )


def refuse_constant_reward(rows: Sequence[dict[str, Any]]) -> None:
    """
    Raises:
        TrainingError: every response had the same reward in the first update, or in the last three.
    """
    same = [row["reward_std"] <= _SAME for row in rows]
    if same[0] or all(same[-PATIENCE:]):
        raise TrainingError(
            "the reward gives every response the same score: there is nothing to learn"
        )
