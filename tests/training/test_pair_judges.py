"""Judges in this process: the LLM's own, LoRAs on it, and rewards. A LoRA that learns does not change them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from judge.prompts import Question
from tests.training.models import ANSWERS, PROMPTS, chat, data_rows, frozen_of, save_model
from training import jsft, reward_model, self_judge
from training.adapters import lora_config
from training.console import TrainingError
from training.on_policy import start
from training.pair_judges import RewardJudge, judge_pairs, load_judges
from training.policy import Decoding
from training.rewards import Sample
from training.self_judge import Options, SelfJudgeTrainer

KINDS = ("pairwise", "likelihood", "whole")


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and judges of it: two LoRAs, and a likelihood ratio of whole weights."""
    directory = tmp_path_factory.mktemp("judges")
    save_model("llama", directory / "base")
    for name in ("preferences", "prompts"):
        rows = "".join(json.dumps(row) + "\n" for row in data_rows(name))
        (directory / f"{name}.jsonl").write_text(rows)
    model, pairs = str(directory / "base"), str(directory / "preferences.jsonl")
    settings: dict[str, Any] = {"model": model, "learning_rate": 1e-2, "batch_size": 2, "epochs": 4}
    jsft.main(
        jsft.Options(**settings, preferences=(pairs,), lora_rank=4, output=directory / "pairwise")
    )
    for name, rank in (("likelihood", 4), ("whole", 0)):
        reward_model.main(
            reward_model.Options(
                **settings, preferences=pairs, lora_rank=rank, output=directory / name
            )
        )
    return directory


@pytest.fixture
def questions() -> list[Question]:
    return [Question(chat(text), *pair) for text in PROMPTS for pair in (ANSWERS[:2], ANSWERS[1:])]


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_lora_that_learns_does_not_touch_the_judge(
    work_dir: Path, questions: list[Question], kind: str | None
) -> None:
    name = str(work_dir / kind) if kind else None
    frozen = frozen_of(work_dir / "base")
    (reference_judge,) = load_judges(name, frozen).values()
    expected = reference_judge.log_odds(questions)
    learning_model = get_peft_model(frozen_of(work_dir / "base").model, lora_config(4))
    for parameter in learning_model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    ids = torch.tensor([[5, 6, 7]])
    policy_logits = learning_model(ids).logits
    (judge,) = load_judges(name, replace(frozen, model=learning_model)).values()
    actual = judge.log_odds(questions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(learning_model(ids).logits, policy_logits)
    base_model = AutoModelForCausalLM.from_pretrained(work_dir / "base", dtype=torch.float32).eval()
    assert (base_model(ids).logits - policy_logits).abs().max() > 0.05


def test_scores_know_no_order(work_dir: Path, questions: list[Question]) -> None:
    frozen = frozen_of(work_dir / "base")
    judges = load_judges(str(work_dir / "likelihood"), frozen)
    swapped = [Question(question.prompt, question.second, question.first) for question in questions]
    for pair_result, swapped_result in zip(
        judge_pairs(judges, questions), judge_pairs(judges, swapped), strict=True
    ):
        first, second = pair_result.mean.orders
        assert first == second == pytest.approx(1 - swapped_result.probability)
        assert pair_result.mean.consistent and list(pair_result.by_principle) == ["score"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "unknown principle 'loudness'; known are overall"),
        ("pairwise", "unknown principle 'loudness'; known are overall"),
        ("likelihood", "judges by scores: it has no principles"),
    ],
)
def test_principles_that_are_not_there(work_dir: Path, name: str | None, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load_judges(
            str(work_dir / name) if name else None, frozen_of(work_dir / "base"), ("loudness",)
        )


def test_the_llm_itself_judges_where_no_judge_is_named(work_dir: Path) -> None:
    """If it were named as a reward, its principle would be lost."""
    with pytest.raises(TrainingError, match="is the default judge: .* with --principles"):
        load_judges("self-judge:overall", frozen_of(work_dir / "base"))


def test_a_reward_scores_each_response_once(work_dir: Path, questions: list[Question]) -> None:
    frozen, scored_texts = frozen_of(work_dir / "base"), []

    def by_length(samples: Sequence[Sample]) -> Tensor:
        scored_texts.append([sample.text for sample in samples])
        return torch.tensor([float(len(text)) for text in scored_texts[-1]])

    judge = RewardJudge(by_length, frozen)
    for _ in range(2):
        expected = [[len(question.first) - len(question.second)] * 2 for question in questions]
        assert judge.log_odds(questions).tolist() == expected
    assert [len(texts) for texts in scored_texts] == [3 * len(PROMPTS)]


@pytest.mark.parametrize("kind", ["pairwise", "likelihood"])
@pytest.mark.parametrize("rank", [4, 0])
def test_self_training_by_a_lora(work_dir: Path, tmp_path: Path, rank: int, kind: str) -> None:
    """The judge is neither trained nor saved."""
    options = Options(
        model=str(work_dir / "base"),
        judge=str(work_dir / kind),
        prompts=str(work_dir / "prompts.jsonl"),
        held_out=str(work_dir / "prompts.jsonl"),
        output=tmp_path,
        steps=2,
        pairs=4,
        minibatches=2,
        batch_size=6,
        learning_rate=1e-2,
        lora_rank=rank,
        decoding=Decoding(top_k=0, top_p=0.9, max_new_tokens=12),
        dtype="float32",
        max_flips=1.0,
        min_diversity=0.0,
    )
    trainer = SelfJudgeTrainer(options, start())
    prompts, seeds, _ = trainer.draw_prompts(0, 4)
    pairs = trainer._answer(prompts, [next(seeds) for _ in prompts])
    texts = trainer.tokenizer.batch_decode(pairs.responses, skip_special_tokens=True)
    questions = [
        Question([*prompt.messages], *responses)
        for prompt, *responses in zip(pairs.prompts, texts[:4], texts[4:], strict=True)
    ]
    expected = judge_pairs(
        load_judges(str(work_dir / kind), frozen_of(work_dir / "base")), questions
    )
    for pair_result, expected_result in zip(pairs.pair_results, expected, strict=True):
        assert pair_result.probability == pytest.approx(expected_result.probability, abs=1e-4)
    self_judge.main(options)
    if rank:
        assert not list(tmp_path.glob("*/adapter_model.safetensors"))
        base_model = AutoModelForCausalLM.from_pretrained(work_dir / "base")
        assert list(PeftModel.from_pretrained(base_model, tmp_path).peft_config) == ["default"]
    else:
        saved_model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not any("lora" in name for name in saved_model.state_dict())
