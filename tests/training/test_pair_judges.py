"""Judges in this process: the LLM's own, LoRAs on it, and rewards; and that a LoRA that learns leaves them alone."""

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
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and judges of it: two LoRAs, and a likelihood ratio of whole weights."""
    directory = tmp_path_factory.mktemp("judges")
    save_model("llama", directory / "base")
    for name in ("preferences", "prompts"):
        rows = "".join(json.dumps(row) + "\n" for row in data_rows(name))
        (directory / f"{name}.jsonl").write_text(rows)
    model, pairs = str(directory / "base"), str(directory / "preferences.jsonl")
    tuned: dict[str, Any] = {"model": model, "learning_rate": 1e-2, "batch_size": 2, "epochs": 4}
    jsft.main(
        jsft.Options(**tuned, preferences=(pairs,), lora_rank=4, output=directory / "pairwise")
    )
    for name, rank in (("likelihood", 4), ("whole", 0)):
        reward_model.main(
            reward_model.Options(
                **tuned, preferences=pairs, lora_rank=rank, output=directory / name
            )
        )
    return directory


@pytest.fixture
def questions() -> list[Question]:
    return [Question(chat(text), *pair) for text in PROMPTS for pair in (ANSWERS[:2], ANSWERS[1:])]


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_lora_that_learns_does_not_touch_the_judge(
    work: Path, questions: list[Question], kind: str | None
) -> None:
    name = str(work / kind) if kind else None
    alone = frozen_of(work / "base")
    (expected,) = load_judges(name, alone).values()
    before = expected.log_odds(questions)
    learning = get_peft_model(frozen_of(work / "base").model, lora_config(4))
    for parameter in learning.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    ids = torch.tensor([[5, 6, 7]])
    policy = learning(ids).logits
    (judge,) = load_judges(name, replace(alone, model=learning)).values()
    found = judge.log_odds(questions)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-4)
    assert before.abs().max() > 0.01
    torch.testing.assert_close(learning(ids).logits, policy)
    plain = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).eval()
    assert (plain(ids).logits - policy).abs().max() > 0.05


def test_scores_know_no_order(work: Path, questions: list[Question]) -> None:
    frozen = frozen_of(work / "base")
    judges = load_judges(str(work / "likelihood"), frozen)
    turned = [Question(each.prompt, each.second, each.first) for each in questions]
    for pair_result, other in zip(
        judge_pairs(judges, questions), judge_pairs(judges, turned), strict=True
    ):
        first, second = pair_result.mean.orders
        assert first == second == pytest.approx(1 - other.probability)
        assert pair_result.mean.consistent and list(pair_result.by_principle) == ["score"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "unknown principle 'loudness'; known are overall"),
        ("pairwise", "unknown principle 'loudness'; known are overall"),
        ("likelihood", "judges by scores: it has no principles"),
    ],
)
def test_principles_that_are_not_there(work: Path, name: str | None, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load_judges(str(work / name) if name else None, frozen_of(work / "base"), ("loudness",))


def test_the_llm_itself_judges_where_no_judge_is_named(work: Path) -> None:
    """Said as a reward, its principle would be lost."""
    with pytest.raises(TrainingError, match="is the default judge: .* with --principles"):
        load_judges("self-judge:overall", frozen_of(work / "base"))


def test_a_reward_scores_each_response_once(work: Path, questions: list[Question]) -> None:
    frozen, asked = frozen_of(work / "base"), []

    def by_length(samples: Sequence[Sample]) -> Tensor:
        asked.append([sample.text for sample in samples])
        return torch.tensor([float(len(text)) for text in asked[-1]])

    judge = RewardJudge(by_length, frozen)
    for _ in range(2):
        expected = [[len(each.first) - len(each.second)] * 2 for each in questions]
        assert judge.log_odds(questions).tolist() == expected
    assert [len(texts) for texts in asked] == [3 * len(PROMPTS)]


@pytest.mark.parametrize("kind", ["pairwise", "likelihood"])
@pytest.mark.parametrize("rank", [4, 0])
def test_self_training_by_a_lora(work: Path, tmp_path: Path, rank: int, kind: str) -> None:
    """The judge is no part of what learns or of what is saved."""
    options = Options(
        model=str(work / "base"),
        judge=str(work / kind),
        prompts=str(work / "prompts.jsonl"),
        held_out=str(work / "prompts.jsonl"),
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
    asked = [
        Question([*prompt.messages], *both)
        for prompt, *both in zip(pairs.prompts, texts[:4], texts[4:], strict=True)
    ]
    expected = judge_pairs(load_judges(str(work / kind), frozen_of(work / "base")), asked)
    for pair_result, other in zip(pairs.pair_results, expected, strict=True):
        assert pair_result.probability == pytest.approx(other.probability, abs=1e-4)
    self_judge.main(options)
    if rank:
        assert not list(tmp_path.glob("*/adapter_model.safetensors"))
        plain = AutoModelForCausalLM.from_pretrained(work / "base")
        assert list(PeftModel.from_pretrained(plain, tmp_path).peft_config) == ["default"]
    else:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not any("lora" in name for name in saved.state_dict())
