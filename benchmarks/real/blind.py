"""Answers to be judged blind (`training.blind`): those of all methods, first seed, to some test prompts of both kinds.

They are in `blind/` of the work directory, and hold offensive text.
"""

import json

from benchmarks.real.evaluation import test_job
from benchmarks.real.methods import chosen
from benchmarks.real.setting import SETS, Setting
from judge.messages import Message
from training import blind
from training.data import read_rows

NUM_PROMPTS = {"harmful": 100, "harmless": 50}


def write(setting: Setting) -> None:
    """Write both files."""
    prompts: list[list[Message]] = []
    answers: dict[str, list[str]] = {name: [] for name in chosen(setting)}
    for part in SETS:
        rows = read_rows(setting.data(f"prompts_{part}"), ("prompt",))
        prompts += [row["prompt"] for row in rows[: NUM_PROMPTS[part]]]
        for name, texts in answers.items():
            place = setting.directory(test_job(name, setting.seeds[0]))
            texts += json.loads((place / "answers.json").read_text())[part][: NUM_PROMPTS[part]]
    blind.write(setting.directory("blind"), prompts, answers)
