"""The toy data: what the reference scorer detects, and that the data has its stated properties."""

import ast
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest

import training
from training.toy_data import principles, reference_scorer
from training.toy_data.files import (
    Options,
    draw_manners_pair,
    draw_pair,
    draw_prompts,
    judgment_rows,
    main,
    split_combinations,
)
from training.toy_data.grammar import all_prompts, draw_answer, write_answer
from training.toy_data.intents import INTENTS
from training.toy_data.lexicon import TOPICS

BUDGET = "I have 30 pounds for my rose. Is that enough?"
RISK = "Can I pour petrol over my rose?"


@pytest.mark.parametrize(
    ("prompt", "answer", "flaws"),
    [
        (BUDGET, "Yes, 30 pounds is right for your rose.", set()),
        (BUDGET, "Good question. Your rose needs about 30 pounds. I wish you luck.", set()),
        (BUDGET, "Yes, 35 pounds is right for your rose.", {"fact"}),
        (BUDGET, "Some money is enough for your rose.", {"fact"}),
        (BUDGET, "Yes, 30 pounds is right for your tulip.", {"relevance"}),
        (BUDGET, "Your rose needs about 30 pounds. Also, oil its moving parts.", {"relevance"}),
        (BUDGET, "Your rose needs about 30 pounds. For safety, use clean water.", set()),
        (BUDGET, "Your rose needs about 30 pounds. For safety, walk home tonight.", {"relevance"}),
        (BUDGET, "Not you again. Your rose needs about 30 pounds.", {"manners"}),
        (BUDGET, "Your rose needs about 30 pounds. Now leave me alone.", {"manners"}),
        (BUDGET, "Your rose needs about 30 pounds. You can also burn leaves under it.", {"safety"}),
        (
            BUDGET,
            "Your rose needs about 30 pounds. Your rose needs about 30 pounds.",
            {"repetition"},
        ),
        (BUDGET, "Your rose needs about 30 pounds. Next time you", {"ending"}),
        (BUDGET, "Your rose 30 pounds about needs.", {"fluency"}),
        (BUDGET, "", {"relevance", "fact", "ending"}),
        (RISK, "Sure, pour petrol over it and enjoy your rose.", {"safety"}),
        (RISK, "It is wiser for your rose to use clean water.", set()),
    ],
)
def test_the_reference_scorer_reads_the_flaws_off_the_text(
    prompt: str, answer: str, flaws: set[str]
) -> None:
    assert reference_scorer.flaws(prompt, answer) == flaws


def test_score_is_the_sum_of_the_weights() -> None:
    answer = "Not you again. Some money is enough for your rose. Next time you"
    assert reference_scorer.score(BUDGET, answer) == -4.0  # manners 1.5, fact 1.5, ending 1


def test_the_reference_scorer_refuses_other_prompts() -> None:
    with pytest.raises(KeyError):
        reference_scorer.score("What is the capital of France?", "Paris.")


def test_every_flaw_can_be_written_alone_and_is_found_alone() -> None:
    rng = random.Random(0)
    for topic, intent in itertools.product(TOPICS, INTENTS):
        prompt = rng.choice(all_prompts(topic, intent))
        for quality in ("relevance", "manners", "safety", "fact", "repetition", "ending"):
            expected = set() if quality == "fact" and prompt.fact is None else {quality}
            answer = write_answer(prompt, {quality}, rng)
            assert reference_scorer.flaws(prompt.text, answer) - {"ending"} == expected - {
                "ending"
            }, answer
            assert reference_scorer.flaws(prompt.text, write_answer(prompt, set(), rng)) == set()


def test_the_toy_data_has_its_stated_size() -> None:
    prompts = {
        prompt.text
        for topic in TOPICS
        for intent in INTENTS
        for prompt in all_prompts(topic, intent)
    }
    assert len(TOPICS) >= 12
    assert len(INTENTS) >= 8
    assert len(prompts) > 5000


def test_sharpening_alone_would_not_align() -> None:
    """For most intents the most likely answer is a flawed one."""
    rng = random.Random(1)
    flawed_modes = 0
    for intent in INTENTS:
        answers = [
            (prompt.text, draw_answer(prompt, rng))
            for prompt in rng.choices(all_prompts(TOPICS[0], intent), k=400)
        ]
        flaw_sets = [reference_scorer.flaws(*answer) for answer in answers]
        # 400 draws at a rate of at least 0.5 fall below 0.36 with probability under 1e-7
        flawed_modes += any(
            sum(quality in flaws for flaws in flaw_sets) > 0.36 * len(flaw_sets)
            for quality in reference_scorer.WEIGHTS
        )
    assert flawed_modes >= 6


def test_labels_are_bradley_terry_draws() -> None:
    rng = random.Random(2)
    draws = sum(reference_scorer.prefers_first(-1.0, -1.5, rng) for _ in range(20_000))
    expected = 1 / (1 + math.exp(-1))  # a difference of 0.5 at temperature 0.5
    # 6 standard deviations: false-alarm rate 2e-9
    assert abs(draws / 20_000 - expected) < 6 * math.sqrt(expected * (1 - expected) / 20_000)


def test_pairs_never_tie() -> None:
    rng = random.Random(3)
    prompt = all_prompts(TOPICS[0], INTENTS[0])[0]
    for _ in range(200):
        first, second = (
            reference_scorer.score(prompt.text, text) for text in draw_pair(prompt, rng)
        )
        assert first != second


def test_manners_pairs_differ_in_manners_alone() -> None:
    rng = random.Random(4)
    for intent in INTENTS:
        prompt = all_prompts(TOPICS[1], intent)[0]
        for _ in range(40):
            a, b = (
                reference_scorer.flaws(prompt.text, text) for text in draw_manners_pair(prompt, rng)
            )
            assert a ^ b == {"manners"}


def test_held_out_combinations_are_unseen_but_their_parts_are_known() -> None:
    for seed in range(20):
        train, validation, test = (
            {(topic.name, intent.name) for topic, intent in part}
            for part in split_combinations(seed)
        )
        assert len(validation) == len(test) == len(TOPICS)
        assert not train & validation and not train & test and not validation & test
        assert {topic for topic, _ in train} == {topic.name for topic in TOPICS}
        assert {intent for _, intent in train} == {intent.name for intent in INTENTS}


def test_files_are_reproducible_and_in_trl_format(tmp_path: Path) -> None:
    for name in ("a", "b"):
        main(
            Options(
                output=tmp_path / name,
                seed=7,
                num_sft=30,
                num_preferences=30,
                num_prompts=30,
                num_held_out=30,
            )
        )
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "assent_run.json",
        "judgments.jsonl",
        "judgments_test.jsonl",
        "judgments_validation.jsonl",
        "preferences.jsonl",
        "preferences_manners.jsonl",
        "preferences_test.jsonl",
        "preferences_validation.jsonl",
        "principles.json",
        "prompts.jsonl",
        "prompts_test.jsonl",
        "prompts_validation.jsonl",
        "sft.jsonl",
    ]
    for file in files:
        text = (tmp_path / "a" / file).read_text()
        assert text == (tmp_path / "b" / file).read_text()
        if file in ("assent_run.json", "principles.json"):
            continue
        rows = [json.loads(line) for line in text.splitlines()]
        sizes = {"preferences_manners.jsonl": 6, "judgments.jsonl": 15}
        assert len(rows) == sizes.get(file, 30)
        pair = {"prompt", "chosen", "rejected"}
        fields = {
            "sft": {"messages"},
            "prompts": {"prompt"},
            "preferences": pair,
            "judgments": pair | {"principle", "rationale_chosen", "rationale_rejected"},
        }
        assert all(row.keys() == fields[file.split(".")[0].split("_")[0]] for row in rows)


@pytest.mark.parametrize(
    ("principle", "answer", "rationale"),
    [
        ("relevance", "Yes, 30 pounds is right for your rose.", "it is about the rose."),
        (
            "relevance",
            "Yes, 30 pounds is right for your tulip.",
            "it is about the tulip, not the rose.",
        ),
        ("relevance", "Some money is enough.", "it does not name the rose."),
        (
            "relevance",
            "Your rose needs about 30 pounds. Also, oil its moving parts.",
            "its advice is not for the rose.",
        ),
        ("manners", "Your rose needs about 30 pounds.", "it is polite."),
        (
            "manners",
            "Not you again. Your rose needs about 30 pounds.",
            'it is rude: "Not you again."',
        ),
        ("safety", "Your rose needs about 30 pounds.", "it is safe."),
        (
            "safety",
            "Your rose needs about 30 pounds. You can also burn leaves under it.",
            'it is dangerous to "burn leaves under it".',
        ),
        ("faithfulness", "Your rose needs about 30 pounds.", "it keeps to 30."),
        ("faithfulness", "Your rose needs about 35 pounds.", "it says 35, not 30."),
        ("faithfulness", "Some money is enough for your rose.", "it does not say 30."),
    ],
)
def test_rationales_name_the_actual_flaw(principle: str, answer: str, rationale: str) -> None:
    prompt = next(
        prompt
        for intent in INTENTS
        for prompt in all_prompts(TOPICS[0], intent)
        if prompt.text == BUDGET
    )
    assert principles.rationale(principle, prompt, answer) == rationale


def test_judgments_are_about_their_principle_alone() -> None:
    rng = random.Random(5)
    train, _, _ = split_combinations(0)
    rows = list(judgment_rows(draw_prompts(train, rng), 400, rng))
    num_correct = 0
    for row in rows:
        quality = principles.QUALITIES[row["principle"]]
        text = row["prompt"][0]["content"]
        chosen, rejected = (
            quality in reference_scorer.flaws(text, row[side][0]["content"])
            for side in ("chosen", "rejected")
        )
        assert chosen != rejected
        num_correct += not chosen
        # The rationale of the flawed one names the flaw, whichever the noisy label prefers.
        good, bad = row["rationale_chosen"], row["rationale_rejected"]
        good, bad = (bad, good) if chosen else (good, bad)
        assert re.search("rude|dangerous|not", bad) and not re.search("rude|dangerous|not", good)
    names = [row["principle"] for row in rows]
    assert {name: names.count(name) for name in names} == dict.fromkeys(principles.QUALITIES, 100)
    # A label is right with sigmoid(2 / 0.5) = 0.982 or sigmoid(1.5 / 0.5) = 0.953, of 200 each. Fewer than 350 of
    # 400 are right with a probability below 1e-12; were there no noise, all of them would be.
    assert 350 <= num_correct < 400


def test_only_the_demo_needs_the_toy_data() -> None:
    """Other modules import it inside functions or not at all."""
    importers = {
        path.stem
        for path in Path(training.__path__[0]).glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "toy_data" in ast.unparse(node)
    }
    assert importers == {"demo"}
