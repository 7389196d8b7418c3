"""Answers without labels, for whoever wants to judge blind.

`blind/answers.jsonl` in the work directory has a line for each of some test prompts of both kinds: the prompt and all
methods' answers of the first seed, with a number each. Prompts and answers are in random order, and equal answers are
shown once. `blind/key.json` says whose answer a number is. The file holds offensive text.
"""

import json
import random
from typing import Any

from benchmarks.real.evaluation import test_job
from benchmarks.real.methods import chosen
from benchmarks.real.setting import SETS, Setting
from training.data import read_rows

NUM_PROMPTS = {"harmful": 100, "harmless": 50}


def write(setting: Setting) -> None:
    """Write both files."""
    generator, seed = random.Random(0), setting.seeds[0]
    lines: list[dict[str, Any]] = []
    for part in SETS:
        rows = read_rows(setting.data(f"prompts_{part}"), ("prompt",))
        texts = {
            name: json.loads(
                (setting.directory(test_job(name, seed)) / "answers.json").read_text()
            )[part]
            for name in chosen(setting)
        }
        for place, row in enumerate(rows[: NUM_PROMPTS[part]]):
            methods_of: dict[str, list[str]] = {}
            for name, answers in texts.items():
                methods_of.setdefault(answers[place], []).append(name)
            shuffled = generator.sample(list(methods_of.items()), len(methods_of))
            lines.append({"prompt": row["prompt"], "answers": shuffled})
    generator.shuffle(lines)
    key: dict[str, list[str]] = {}
    for line in lines:
        numbered = []
        for text, methods in line["answers"]:
            number = len(key) + 1
            key[str(number)] = methods
            numbered.append({"number": number, "text": text})
        line["answers"] = numbered
    directory = setting.directory("blind")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "answers.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    (directory / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    print(f"{directory / 'answers.jsonl'}: {len(key)} answers to {len(lines)} prompts")
