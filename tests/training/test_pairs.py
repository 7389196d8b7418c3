"""Preference pairs read with their prompt once, and gradient steps on a part of a batch at a time."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.training.models import ARCHITECTURES, save_model
from training import dpo
from training.memory import Plan
from training.micro_batches import split_by_tokens
from training.models import load_model
from training.pair_trainer import ImplicitTrainer, ScalarTrainer
from training.pairs import Pair, Reader, separate
from training.reward_model import _scorer

TOLERANCE = 1e-4  # relative: float32 sums of a few hundred terms in another order, and their small differences
BETA = 0.3
LENGTHS = [(9, 4, 6), (3, 5, 2), (12, 1, 3), (5, 7, 7), (8, 3, 2)]  # prompt, chosen, rejected


def make_pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    return [
        Pair(
            *(torch.randint(5, 270, (length,), generator=generator).tolist() for length in lengths)
        )
        for lengths in LENGTHS
    ]


def gradient(model: Any) -> Tensor:
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_read_once_for_both_answers(name: str, tmp_path: Path) -> None:
    """Against each answer's log-probability alone, by transformers' own logits."""
    save_model(name, tmp_path)
    model, pairs = load_model(str(tmp_path))[0].eval(), make_pairs()
    reference_model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = []
    for answer in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.tensor([pair.prompt + getattr(pair, answer)])
            logprobs = reference_model(ids).logits[0, :-1].double().log_softmax(-1)
            answer_logprobs = logprobs.gather(-1, ids[0, 1:, None])[len(pair.prompt) - 1 :]
            expected.append(answer_logprobs.sum().item())
    reader = Reader(model, pairs)
    assert reader.shares
    for scored in (reader(pairs), separate(pairs)):
        with torch.no_grad():
            sums = scored.sums(model, len(pairs))
        assert sums.flatten().tolist() == pytest.approx(expected, rel=TOLERANCE)


def test_a_window_that_is_narrower_than_a_pair_is_not_read_through(tmp_path: Path) -> None:
    save_model("gemma2", tmp_path)  # its window has 16 tokens
    model, (pair, *_) = load_model(str(tmp_path))[0].eval(), make_pairs()
    long_pair = Pair(pair.prompt * 2, pair.chosen, pair.rejected)
    reader = Reader(model, [pair, long_pair])
    assert not reader.shares
    assert reader.tokens(long_pair) == 2 * (18 + 6)


def test_a_model_that_heeds_no_mask_reads_answers_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path)
    model, pairs = load_model(str(tmp_path))[0].eval(), make_pairs()
    body, forward = model.model, model.model.forward

    def ignore_mask(attention_mask: Any = None, **inputs: Any) -> Any:
        return forward(**inputs)

    monkeypatch.setattr(body, "forward", ignore_mask)
    assert not Reader(model, pairs).shares


def trainer_of(kind: str, directory: Path, output: Path, max_tokens: int) -> Any:
    options = dpo.Options(model=str(directory), preferences="", output=output, bf16=False)
    arguments = dpo.arguments(options, Plan(max_tokens, False))
    pairs = make_pairs()
    if kind == "scalar":
        return ScalarTrainer(_scorer(str(directory)), arguments, pairs, [], max_tokens=max_tokens)
    model = load_model(str(directory))[0]
    return ImplicitTrainer(
        model, arguments, pairs, [], max_tokens=max_tokens, beta=BETA, resume=False
    )


@pytest.mark.parametrize("kind", ["implicit", "scalar"])
def test_a_batch_in_parts_is_the_batch(kind: str, tmp_path: Path) -> None:
    save_model("gpt2" if kind == "implicit" else "llama", tmp_path)
    batch, results = {"index": torch.arange(len(LENGTHS))}, []
    for max_tokens in (10_000, 40, 1):
        torch.manual_seed(0)  # of the scalar reward's head
        trainer = trainer_of(kind, tmp_path, tmp_path / "out", max_tokens)
        parts = len(trainer.parts(batch))
        assert parts == {10_000: 1, 1: len(LENGTHS)}.get(max_tokens, parts)
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, batch)
        results.append((loss.item(), gradient(trainer.model)))
    (loss, expected), *part_results = results
    for part_loss, part_gradient in part_results:
        assert part_loss == pytest.approx(loss, rel=TOLERANCE)
        assert (part_gradient - expected).norm() < TOLERANCE * expected.norm()


def test_the_first_steps_loss_and_gradient(tmp_path: Path) -> None:
    """At the start r = 0, so that the loss is log 2 and its gradient −β / 2 · ∇(log π(chosen) − log π(rejected))."""
    save_model("llama", tmp_path)
    reference_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    pairs, margin = make_pairs(), torch.zeros(())
    for pair in pairs:
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            ids = torch.tensor([pair.prompt + answer])
            logprobs = (
                reference_model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            )
            margin = margin + sign * logprobs[len(pair.prompt) - 1 :].sum()
    (-BETA / 2 * margin / len(pairs)).backward()
    trainer = trainer_of("implicit", tmp_path, tmp_path / "out", 30)
    loss = trainer.training_step(trainer.model, {"index": torch.arange(len(pairs))})
    assert loss.item() == pytest.approx(math.log(2), rel=TOLERANCE)
    actual, expected = gradient(trainer.model), gradient(reference_model)
    assert (actual - expected).norm() < TOLERANCE * expected.norm()


def test_parts_of_at_most_so_many_tokens() -> None:
    lengths = [3, 50, 10, 9, 2, 11, 30]
    parts = split_by_tokens(lengths, 33)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert parts == [[1], [6], [5, 2, 3], [0, 4]]
    assert split_by_tokens([], 33) == []
