"""The parts of the pairs and of the prompts. No prompt is in two parts.

| file | what | from |
|---|---|---|
| `prompts_harmful` | test prompts; `pairs_test` has their pairs, which only measure rewards | the pairs |
| `prompts_validation` | decodings are searched on them | the pairs |
| `pairs_a`, `prompts_a` | train DPO and the rewards; their prompts train all methods | 3/5 of the rest |
| `pairs_b` | train second opinions | 2/5 of the rest |
| `helpful_b` | train a second opinion on help; a reward may be trained on the other half | `--helpful-pairs` |
| `prompts_both` | `prompts_a`, and as many general instructions | `--prompts` |
| `prompts_harmless` | general instructions to test with | `--prompts` |
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.real.setting import MAX_PROMPT_TOKENS, PRINCIPLES, Setting
from judge.messages import prompt_key
from judge.principles import FILE_NAME, write_principles
from training.console import TrainingError
from training.conversations import Conversations
from training.data import PAIR, Row, read_rows
from training.models import load_tokenizer

_SEED = 0  # the parts are the same for all seeds


def make_data(setting: Setting, directory: Path) -> dict[str, Any]:
    """Write all parts; returns their sizes."""
    chats = Conversations(load_tokenizer(str(setting.model)))
    groups = _by_prompt(read_rows(setting.pairs, PAIR))
    short = [
        key
        for key, rows in groups.items()
        if len(chats.prompt_ids(rows[0]["prompt"])) <= MAX_PROMPT_TOKENS
    ]
    num_test, num_validation = setting.num_test["harmful"], setting.num_validation
    if len(short) < 2 * (num_test + num_validation):
        raise TrainingError(
            f"{setting.pairs}: {len(short)} prompts of at most {MAX_PROMPT_TOKENS} tokens are too few for {num_test} "
            f"test prompts and {num_validation} validation prompts, with as many left to train on"
        )
    test, validation = short[:num_test], short[num_test : num_test + num_validation]
    aside = {*test, *validation}
    rest = [key for key in groups if key not in aside]
    rest = rest[: setting.scaled(len(rest), 40)]
    part_a = {*rest[: 3 * len(rest) // 5]}
    instructions = read_rows(setting.prompts / "train.jsonl", ("prompt",))
    harmless = read_rows(setting.prompts / "test.jsonl", ("prompt",))
    prompts_a = [key for key in short if key in part_a]
    both = [*_first(groups, prompts_a), *instructions[: len(prompts_a)]]
    random.Random(_SEED).shuffle(both)
    parts: dict[str, list[Row]] = {
        "prompts_harmful": _first(groups, test),
        "pairs_test": _pairs(groups, test),
        "prompts_validation": _first(groups, validation),
        "prompts_a": _first(groups, prompts_a),
        "pairs_a": _pairs(groups, [key for key in rest if key in part_a]),
        "pairs_b": _pairs(groups, [key for key in rest if key not in part_a]),
        "prompts_both": both,
        "prompts_harmless": harmless[: setting.num_test["harmless"]],
    }
    if setting.helpful_pairs is not None:
        helpful = _by_prompt(read_rows(setting.helpful_pairs, PAIR))
        keys = [*helpful][: setting.scaled(len(helpful), 40)]
        parts["helpful_b"] = _pairs(helpful, keys[1::2])
    for name, rows in parts.items():
        _write(directory / f"{name}.jsonl", rows)
    write_principles(directory / FILE_NAME, PRINCIPLES)
    return {name: len(rows) for name, rows in parts.items()}


def _by_prompt(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by prompt, in a random order of prompts."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[prompt_key(row["prompt"])].append(row)
    keys = sorted(groups)
    random.Random(_SEED).shuffle(keys)
    return {key: groups[key] for key in keys}


def _first(groups: dict[str, list[Row]], keys: Iterable[str]) -> list[Row]:
    return [{"prompt": groups[key][0]["prompt"]} for key in keys]


def _pairs(groups: dict[str, list[Row]], keys: Iterable[str]) -> list[Row]:
    return [{field: row[field] for field in PAIR} for key in keys for row in groups[key]]


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
