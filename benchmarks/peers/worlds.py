"""The two worlds: an LLM, a proxy, prompts, what the answers should be like, and who grades them.

No method has trained on its world's grader, or chooses by it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import gold
from benchmarks.models import DEMO, Model
from benchmarks.peers.setting import Setting
from benchmarks.toy_prompts import DATA_SEED, held_out_prompts
from judge.messages import Message
from training.data import read_rows
from training.policy import Decoding
from training.toy_data.files import draw_prompts, split_combinations

SMOLLM2 = DEMO / "smollm2"
FORMULA = "deploy.demo.smollm2.rewards:plain"
"""The reward that SmolLM2's proxy was trained on."""
Grade = Callable[[Sequence[Any], Sequence[str]], list[float]]
"""Chats and answers -> scores, higher is better."""


@dataclass(frozen=True)
class World:
    """Where everything is compared."""

    title: str
    served_name: str
    model: Path
    proxy: Path
    decoding: Decoding
    """What the server does with a request that says nothing else."""
    grade: Grade
    wish: str | None = None
    """What answers should be like, in words: the system prompt, and what judges are told if they can be told. None =
    better.
    """
    reward: str | None = None
    """The reward of ARGS, CARDS and best of N in transformers. None = a LoRA that the benchmark trains."""

    @property
    def proxy_name(self) -> str:
        return self.proxy.name

    @property
    def served(self) -> Model:
        """As `benchmarks.engines` serves it."""
        return Model(self.served_name, self.model, self.model, self.proxy, 512 << 20)


def world_of(setting: Setting) -> World:
    if setting.world == "toy":
        return World(
            title="the toy data",
            served_name="assent-demo",
            model=setting.model,
            proxy=DEMO / "proxies" / "aligned",
            decoding=Decoding(),
            grade=gold.scores,
        )
    return World(
        title="SmolLM2-135M-Instruct",
        served_name="smollm2",
        model=setting.model,
        proxy=SMOLLM2 / "proxies" / "plain",
        decoding=Decoding(temperature=0.3, top_k=0, top_p=1.0, max_new_tokens=48),
        grade=_easy_words,
        wish="Use plain language: short sentences and common words.",
        reward=FORMULA,
    )


def _easy_words(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
    # Imported when it is used: the toy world needs no package for it.
    from deploy.demo.smollm2 import rewards

    return rewards.easy_words(prompts, answers)


def prompts_of(setting: Setting, count: int | None = None, *, skip: int = 0) -> list[list[Message]]:
    """Chats of one turn: the test prompts; or `count` others, behind `skip` of them, for timing."""
    wanted = count or setting.num_prompts
    if setting.world == "toy":
        texts = held_out_prompts(skip + wanted, seed=1)[skip:]
        return [[Message(role="user", content=text)] for text in texts]
    prompts = [row["prompt"] for row in read_rows(SMOLLM2 / "prompts" / "test.jsonl", ("prompt",))]
    return [prompts[(skip + i) % len(prompts)] for i in range(wanted)]


def training_prompts(count: int) -> list[list[Message]]:
    """Of SmolLM2's world."""
    rows = read_rows(SMOLLM2 / "prompts" / "train.jsonl", ("prompt",))
    return [row["prompt"] for row in rows][:count]


def validation_prompts(setting: Setting, count: int) -> list[list[Message]]:
    """For constants of methods."""
    if setting.world == "toy":
        _, validation, _ = split_combinations(DATA_SEED)
        drawn = islice(draw_prompts(validation, random.Random(1)), count)
        return [[Message(role="user", content=prompt.text)] for prompt in drawn]
    path = SMOLLM2 / "prompts" / "validation.jsonl"
    return [row["prompt"] for row in read_rows(path, ("prompt",))][:count]
