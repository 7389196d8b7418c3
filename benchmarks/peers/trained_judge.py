"""A judge of SmolLM2's world that has been trained: a probe that learns what the world's formula rewards."""

import asyncio
import json
from pathlib import Path
from typing import Any

from benchmarks.comparison.jobs import timed
from benchmarks.peers.engine import open_engine, sample_all
from benchmarks.peers.setting import N, Setting
from benchmarks.peers.worlds import FORMULA, training_prompts
from judge.functions import load_function
from training import reward_model

JUDGE = "judge"
_PROBE = "probe"
_PAIRS = "pairs.jsonl"


def train_judge(setting: Setting, directory: Path) -> dict[str, Any]:
    """A probe, from pairs of the frozen LLM's own answers: the best and the worst of N by the formula."""
    score, chats = load_function(FORMULA), training_prompts(setting.num_pairs)
    with open_engine(setting) as engine:
        texts = asyncio.run(sample_all(engine, JUDGE, chats, N, lambda i: 100 * i))
    with (directory / _PAIRS).open("w", encoding="utf-8") as file:
        for messages, answers in zip(chats, texts, strict=True):
            by_score = dict(zip(score([messages] * N, answers), answers, strict=True))
            chosen, rejected = by_score[max(by_score)], by_score[min(by_score)]
            if chosen != rejected:
                row = {"prompt": messages, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")
    options = reward_model.Options(
        model=str(setting.model),
        preferences=str(directory / _PAIRS),
        output=directory / _PROBE,
        overwrite=True,
        kind="probe",
    )
    result: dict[str, Any] = {}
    with timed(result):
        reward_model.main(options)
    return result


def judge_of(setting: Setting) -> Path | None:
    """The directory of the trained judge; None = no row has needed one."""
    probe = setting.directory(JUDGE) / _PROBE
    return probe if (setting.directory(JUDGE) / "result.json").exists() else None
