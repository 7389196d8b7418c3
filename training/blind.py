"""Answers without labels, for whoever wants to judge blind.

`answers.jsonl` has a line for each prompt: the prompt and all answers to it, with a number each. Prompts and answers
are in random order, and equal answers are shown once. `key.json` says whose answer a number is.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from judge.messages import Message
from training.run_marker import write_whole

ANSWERS_FILE, KEY_FILE = "answers.jsonl", "key.json"


def write(
    directory: Path, prompts: Sequence[list[Message]], answers: Mapping[str, Sequence[str]]
) -> None:
    """Write both files.

    Args:
        directory: where; it is made if need be.
        prompts: P of them.
        answers: the P answers of each method, by its name.
    """
    generator = random.Random(0)
    lines: list[dict[str, Any]] = []
    key: dict[str, list[str]] = {}
    for place in generator.sample(range(len(prompts)), len(prompts)):
        methods_of: dict[str, list[str]] = {}
        for method, texts in answers.items():
            methods_of.setdefault(texts[place], []).append(method)
        numbered = []
        for text, methods in generator.sample([*methods_of.items()], len(methods_of)):
            number = len(key) + 1
            key[str(number)] = methods
            numbered.append({"number": number, "text": text})
        lines.append({"prompt": prompts[place], "answers": numbered})
    directory.mkdir(parents=True, exist_ok=True)
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(directory / ANSWERS_FILE, written)
    write_whole(directory / KEY_FILE, json.dumps(key, indent=1) + "\n")
    print(f"{directory / ANSWERS_FILE}: {len(key)} answers to {len(lines)} prompts")
