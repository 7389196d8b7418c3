"""The files of the toy data, and the draws that make them. `python -m training.world` writes them and lists them."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from judge.options import Seed
from judge.principles import FILE_NAME, write_principles
from training import output
from training.toy_data import principles, reference_scorer
from training.toy_data.grammar import Prompt, all_prompts, draw_answer, make_rude
from training.toy_data.intents import INTENTS, Intent
from training.toy_data.lexicon import TOPICS, Topic

Combination = tuple[Topic, Intent]
HELD_OUT = ("validation", "test")
FILES = (
    *("sft.jsonl", "preferences.jsonl", "preferences_manners.jsonl", "prompts.jsonl"),
    *("judgments.jsonl", FILE_NAME),
    *(
        f"{kind}_{name}.jsonl"
        for kind in ("prompts", "preferences", "judgments")
        for name in HELD_OUT
    ),
)
"""All files that are written."""


@dataclass(frozen=True)
class Options:
    """What to write."""

    output: Path
    """Output directory; created if necessary."""
    seed: Seed = 0
    """Seed of everything."""
    num_sft: PositiveInt = 24_000
    """Dialogues in `sft.jsonl`."""
    num_preferences: PositiveInt = 24_000
    """Pairs in `preferences.jsonl`; `judgments.jsonl` has half as many, `preferences_manners.jsonl` a fifth."""
    num_prompts: PositiveInt = 8_000
    """Prompts in `prompts.jsonl`."""
    num_held_out: PositiveInt = 1_000
    """Rows in each held-out file."""
    overwrite: bool = False
    """Replace the files of an earlier run of this command in the output directory; other files stay."""


def split_combinations(seed: int) -> tuple[list[Combination], list[Combination], list[Combination]]:
    """Topic × intent combinations for training, validation and test.

    Each topic gives one combination to validation and one to test, so every topic is known from other intents. Intents
    are distributed so that each is held out about equally often.
    """
    rng = random.Random(seed)
    topics = list(TOPICS)
    deck: list[Intent] = []
    while len(deck) < 2 * len(topics):
        deck += rng.sample(INTENTS, len(INTENTS))
    validation = list(zip(topics, deck[: len(topics)], strict=True))
    # The second half of the deck, without the intent that the topic gave to validation.
    rest, test = deck[len(topics) : 2 * len(topics)], []
    for topic, taken in validation:
        intent = next(i for i in (*rest, *INTENTS) if i is not taken)
        if intent in rest:
            rest.remove(intent)
        test.append((topic, intent))
    held_out = {(topic.name, intent.name) for topic, intent in validation + test}
    train = [(t, i) for t in topics for i in INTENTS if (t.name, i.name) not in held_out]
    return train, validation, test


def draw_prompts(combinations: list[Combination], rng: random.Random) -> Iterator[Prompt]:
    """An endless stream of prompts: every combination equally often, whatever its number of prompts."""
    prompts = [all_prompts(*combination) for combination in combinations]
    while True:
        yield rng.choice(rng.choice(prompts))


Pair = tuple[str, str]


def draw_pair(prompt: Prompt, rng: random.Random) -> Pair:
    """(chosen, rejected): two answers with different reference scores, and a noisy verdict on them."""
    while True:
        a, b = draw_answer(prompt, rng), draw_answer(prompt, rng)
        if reference_scorer.score(prompt.text, a) != reference_scorer.score(prompt.text, b):
            return label(prompt, a, b, rng)


def draw_manners_pair(prompt: Prompt, rng: random.Random) -> Pair:
    """(chosen, rejected): the same answer in a polite and a rude form, and a noisy verdict on them.

    With independent answers, everything that correlates with rudeness would be learned too.
    """
    while True:
        answer = draw_answer(prompt, rng)
        if "manners" not in reference_scorer.flaws(prompt.text, answer):
            return label(prompt, answer, make_rude(answer, rng), rng)


def label(prompt: Prompt, a: str, b: str, rng: random.Random) -> Pair:
    """(chosen, rejected) by a Bradley–Terry draw on the reference scores."""
    gold_a, gold_b = reference_scorer.score(prompt.text, a), reference_scorer.score(prompt.text, b)
    return (a, b) if reference_scorer.prefers_first(gold_a, gold_b, rng) else (b, a)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def sft_rows(prompts: Iterator[Prompt], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    for _, p in zip(range(count), prompts, strict=False):
        yield {"messages": user(p.text) + assistant(draw_answer(p, rng))}


def preference_rows(
    prompts: Iterator[Prompt],
    count: int,
    rng: random.Random,
    draw: Callable[[Prompt, random.Random], Pair] = draw_pair,
) -> Iterator[dict[str, Any]]:
    for _, p in zip(range(count), prompts, strict=False):
        chosen, rejected = draw(p, rng)
        yield {
            "prompt": user(p.text),
            "chosen": assistant(chosen),
            "rejected": assistant(rejected),
        }


def judgment_rows(
    prompts: Iterator[Prompt], count: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Pairs that differ by a principle, equally often by each."""
    names = list(principles.QUALITIES)
    while count:
        prompt, name = next(prompts), names[count % len(names)]
        if not principles.applies(name, prompt):
            continue
        a, b = draw_answer(prompt, rng), draw_answer(prompt, rng)
        is_a_better = principles.prefers_first(name, prompt, a, b, rng)
        if is_a_better is None:
            continue
        chosen, rejected = (a, b) if is_a_better else (b, a)
        yield {
            "prompt": user(prompt.text),
            "chosen": assistant(chosen),
            "rejected": assistant(rejected),
            "principle": name,
            "rationale_chosen": principles.rationale(name, prompt, chosen),
            "rationale_rejected": principles.rationale(name, prompt, rejected),
        }
        count -= 1


def prompt_rows(prompts: Iterator[Prompt], count: int) -> Iterator[dict[str, Any]]:
    for _, p in zip(range(count), prompts, strict=False):
        yield {"prompt": user(p.text)}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(path)


def main(options: Options) -> None:
    with output.run(options, "training.world", reads=(), writes=FILES) as run:
        run.start()
        _write_all(options)


def _write_all(options: Options) -> None:
    rng = random.Random(options.seed)
    train, validation, test = split_combinations(options.seed)
    prompts = draw_prompts(train, rng)
    n = options.num_preferences
    write(options.output / "sft.jsonl", sft_rows(prompts, options.num_sft, rng))
    write(options.output / "preferences.jsonl", preference_rows(prompts, n, rng))
    write(
        options.output / "preferences_manners.jsonl",
        preference_rows(prompts, max(1, n // 5), rng, draw_manners_pair),
    )
    write(options.output / "prompts.jsonl", prompt_rows(prompts, options.num_prompts))
    # A separate random stream, so that the files above stay what they were.
    drawn = random.Random(f"{options.seed} judgments")
    judgments = judgment_rows(draw_prompts(train, drawn), max(1, n // 2), drawn)
    write(options.output / "judgments.jsonl", judgments)
    write_principles(options.output / FILE_NAME, principles.PRINCIPLES)
    for name, combinations in zip(HELD_OUT, (validation, test), strict=True):
        held_out = draw_prompts(combinations, rng)
        count = options.num_held_out
        write(options.output / f"prompts_{name}.jsonl", prompt_rows(held_out, count))
        write(options.output / f"preferences_{name}.jsonl", preference_rows(held_out, count, rng))
        judgments = judgment_rows(draw_prompts(combinations, drawn), count, drawn)
        write(options.output / f"judgments_{name}.jsonl", judgments)
