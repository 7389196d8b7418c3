"""Training examples of judgments, against the judge's prompts; and judges that are LoRAs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from judge.principles import DEFAULT, Principle, principles_of
from judge.prompts import Question, judge_prompt_ids
from tests.training.models import ANSWERS, PROMPTS, chat, data_rows, frozen_of, save_model
from training import jsft
from training.console import TrainingError
from training.conversations import Conversations
from training.data import RowOptions
from training.judgments import judgment_examples, read_pairs
from training.metrics import read_metrics
from training.model_judge import ModelJudge
from training.models import load_model
from training.reward_loading import load_reward
from training.rewards import Frozen, JudgeReward, Sample

PRINCIPLES = {**DEFAULT, "manners": Principle(system="Choose the more polite.")}
REASONS = {"rationale_chosen": "it is kind.", "rationale_rejected": "it is rude."}
PAIR = {**data_rows("preferences")[0], "principle": "manners"}


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("judgments")
    save_model("qwen2", directory / "base")
    rows = [*data_rows("preferences"), PAIR | REASONS]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "principles.yaml").write_text(
        "overall: {system: Choose the better.}\nmanners: {system: Choose the more polite.}\n"
    )
    jsft.main(
        jsft.Options(
            model=str(directory / "base"),
            preferences=(str(directory / "pairs.jsonl"),),
            principles=directory / "principles.yaml",
            output=directory / "judge",
            lora_rank=4,
            learning_rate=1e-2,
            epochs=6,
            batch_size=7,
        )
    )
    return directory


@pytest.fixture
def tokenizer(work_dir: Path):
    return load_model(str(work_dir / "base"))[1]


@pytest.fixture
def frozen(work_dir: Path) -> Frozen:
    return frozen_of(work_dir / "base", batch_size=4)


def examples(tokenizer, row, max_tokens=1024):
    return list(
        judgment_examples(
            [row], tokenizer, PRINCIPLES, label_weight=8.0, prompt_weight=0.1, max_tokens=max_tokens
        )
    )


def test_a_judgment_in_both_orders(tokenizer) -> None:
    question = Question(
        PAIR["prompt"], PAIR["chosen"][0]["content"], PAIR["rejected"][0]["content"]
    )
    first, second = examples(tokenizer, PAIR)
    for example, ordered_question, label in (
        (first, question, " A"),
        (second, question.swapped, " B"),
    ):
        context = judge_prompt_ids(tokenizer, ordered_question, PRINCIPLES["manners"])
        assert example.token_ids[:-1] == context
        assert tokenizer.decode(example.token_ids[-1:]) == label
        assert example.weights == [0.1] * len(context) + [8.0]


def test_the_rationale_follows_the_label_and_ends_the_turn(tokenizer) -> None:
    short_examples, full_examples = examples(tokenizer, PAIR), examples(tokenizer, PAIR | REASONS)
    texts = []
    for short_example, example in zip(short_examples, full_examples, strict=True):
        num_tokens = len(short_example.token_ids)
        assert example.token_ids[:num_tokens] == short_example.token_ids
        assert example.weights[:num_tokens] == short_example.weights
        assert set(example.weights[num_tokens:]) == {1.0}
        texts.append(tokenizer.decode(example.token_ids[num_tokens:]))
    assert texts == [
        ".\nA: it is kind.\nB: it is rude.<|end|>",
        ".\nA: it is rude.\nB: it is kind.<|end|>",
    ]


def test_a_pair_without_a_principle_is_by_the_first(tokenizer) -> None:
    (first, _) = examples(tokenizer, {**PAIR, "principle": None})
    assert DEFAULT["overall"].system in tokenizer.decode(first.token_ids)


def test_what_is_too_long_is_cut_and_what_leaves_no_room_refused(tokenizer) -> None:
    long_pair = PAIR | {"prompt": chat("Is my dog " * 999)} | REASONS
    for example in examples(tokenizer, long_pair, max_tokens=400):
        assert 390 < len(example.token_ids) <= 400
        assert example.token_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(TrainingError, match="no room for its question in 50 tokens"):
        examples(tokenizer, long_pair, max_tokens=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"principle": "loudness"}, "line 1: unknown principle 'loudness'; known are overall, m"),
        ({"rationale_chosen": "it is kind."}, "line 1: a rationale is two texts"),
        (REASONS | {"rationale_rejected": 5}, "line 1: .*rationale_.* must be texts"),
    ],
)
def test_bad_pairs_are_named(tmp_path, change, message) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR | change))
    with pytest.raises(TrainingError, match=message):
        read_pairs(str(tmp_path / "pairs.jsonl"), PRINCIPLES, RowOptions())


def test_a_model_trained_without_answers_needs_a_lora(work_dir: Path, tmp_path: Path) -> None:
    options = jsft.Options(
        model=str(work_dir / "base"), preferences=(str(work_dir / "pairs.jsonl"),), output=tmp_path
    )
    with pytest.raises(TrainingError, match="would forget how to answer"):
        jsft.main(options)


def questions():
    return [
        Question(chat(text), first, second)
        for text in PROMPTS
        for first in ANSWERS
        for second in ANSWERS
        if first != second
    ]


@torch.no_grad()
def test_log_odds_against_plain_logits(frozen: Frozen) -> None:
    principle = PRINCIPLES["manners"]
    judge = ModelJudge(frozen.model, frozen.tokenizer, principle, context=1024, batch_size=5)
    a, b = (frozen.tokenizer.encode(label, add_special_tokens=False)[0] for label in (" A", " B"))
    expected = []
    for question in questions():
        odds = []
        for ordered_question in (question, question.swapped):
            ids = judge_prompt_ids(frozen.tokenizer, ordered_question, principle)
            logits = frozen.model(torch.tensor([ids])).logits[0, -1].double()
            odds.append((logits[a] - logits[b]).item())
        expected.append([odds[0], -odds[1]])
    actual = judge.log_odds(questions())
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-4)
    assert actual.std() > 0.01


@torch.no_grad()
def test_a_judge_that_is_a_lora(work_dir: Path, frozen: Frozen) -> None:
    """It judges by the principles it was trained with, as the merged model does, and was trained."""
    principles = principles_of(work_dir / "judge")
    assert principles["overall"].system == "Choose the better."
    base_model = AutoModelForCausalLM.from_pretrained(work_dir / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base_model, work_dir / "judge").merge_and_unload().eval()
    reward = load_reward(str(work_dir / "judge"), frozen)
    assert isinstance(reward, JudgeReward)
    merged_judge = ModelJudge(
        merged, frozen.tokenizer, principles["overall"], context=1024, batch_size=4
    )
    actual = reward.judge.log_odds(questions())
    torch.testing.assert_close(actual, merged_judge.log_odds(questions()), rtol=0, atol=1e-3)
    untrained = ModelJudge(
        frozen.model, frozen.tokenizer, principles["overall"], context=1024, batch_size=4
    )
    assert not torch.allclose(actual, untrained.log_odds(questions()), atol=0.02)
    losses = [row["loss"] for row in read_metrics(work_dir / "judge") if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_the_frozen_llm_judges_by_a_principle_of_its_own(work_dir: Path, frozen: Frozen) -> None:
    (work_dir / "base" / "principles.json").write_text(
        (work_dir / "judge" / "principles.json").read_text()
    )
    chats = Conversations(frozen.tokenizer)
    samples = [
        Sample(chat(PROMPTS[0]), answer, *chats.split_ids(chat(PROMPTS[0]), answer))
        for answer in ANSWERS
    ]
    overall, manners = (
        load_reward(name, frozen)(samples) for name in ("self-judge", "self-judge:manners")
    )
    assert not torch.allclose(overall, manners, atol=1e-3)
    with pytest.raises(
        TrainingError, match="unknown principle 'loudness'; known are overall, manners"
    ):
        load_reward("self-judge:loudness", frozen)


def test_a_question_beyond_the_context_is_cut(frozen: Frozen) -> None:
    reward = load_reward("self-judge", replace(frozen))
    assert isinstance(reward, JudgeReward)
    long_question = Question(chat("Is my dog " * 999), *ANSWERS[:2])
    assert reward.judge.log_odds([long_question]).isfinite().all()
