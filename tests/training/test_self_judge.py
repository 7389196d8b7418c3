"""On-policy self-training on a small random model: losses, weights that do not change, guards, and resumed runs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from judge.verdict import PairResult, Verdict
from proxy.checkpoint import identify
from tests.training.models import data_rows, save_model
from training import self_judge
from training.console import TrainingError
from training.metrics import read_metrics
from training.on_policy import start
from training.policy import Decoding
from training.preference_losses import preference_losses
from training.self_judge import Options, SelfJudgeTrainer

ROUNDING = {"rtol": 1e-5, "atol": 1e-4}  # of float32 logits of size 10, through other kernels


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("self_judge")
    save_model("llama", directory / "base")
    rows = "".join(json.dumps(row) + "\n" for row in data_rows("prompts"))
    (directory / "prompts.jsonl").write_text(rows)
    return directory


def options(work_dir: Path, output: Path, **settings: Any) -> Options:
    return Options(
        **{
            "model": str(work_dir / "base"),
            "prompts": str(work_dir / "prompts.jsonl"),
            "held_out": str(work_dir / "prompts.jsonl"),
            "output": output,
            "steps": 4,
            "pairs": 8,
            "minibatches": 2,
            "batch_size": 6,
            "check_every": 2,
            "learning_rate": 1e-2,
            "decoding": Decoding(top_k=0, top_p=0.9, max_new_tokens=12),
            "dtype": "float32",
            "max_flips": 1.0,  # a random judge sees nothing but the position
            "min_agreement": 0.0,
        }
        | settings
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # β 0.5, Δ = 2, -1, 4
        (
            "sigmoid",
            [math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.5)), math.log(1 + math.exp(-2))],
        ),
        ("hinge", [0.0, 1.5, 0.0]),
        ("ipo", [1.0, 4.0, 9.0]),
    ],
)
def test_losses(loss: str, expected: list[float]) -> None:
    losses = preference_losses(torch.tensor([2.0, -1.0, 4.0]), torch.ones(3), loss, 0.5)
    assert losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "best"),
    # P(better) 0.8: σ(β Δ) = 0.8; the smaller loss of the two bends; Δ = (2 · 0.8 − 1) / 2β
    [("sigmoid", math.log(4) / 0.5), ("hinge", 2.0), ("ipo", 0.6)],
)
def test_where_soft_labels_lead(loss: str, best: float) -> None:
    margins = torch.arange(-4, 4, 0.001)
    losses = preference_losses(margins, torch.full_like(margins, 0.8), loss, 0.5)
    assert margins[losses.argmin()].item() == pytest.approx(best, abs=0.002)


def test_soft_labels_teach_less_of_pairs_that_are_as_good_as_equal(
    work_dir: Path, tmp_path: Path
) -> None:
    """After the same updates on the same pairs, soft labels keep the margin smaller."""
    margins = []
    for soft in (False, True):
        trainer = SelfJudgeTrainer(options(work_dir, tmp_path, seed=1, soft_labels=soft), start())
        prompts, seeds, _ = trainer.draw_prompts(0, 8)
        pairs = trainer._answer(prompts, [next(seeds) for _ in prompts])
        doubtful = [PairResult({"p": Verdict((0.55, 0.55))}) for _ in pairs.pair_results]
        rows = [
            trainer._learn(pairs._replace(pair_results=doubtful), 0, index) for index in range(20)
        ]
        margins.append(rows[-1]["margin"])
    assert margins[1] < 0.5 * margins[0]


@pytest.mark.parametrize("rank", [4, 0])
def test_it_learns_what_its_initial_self_prefers(work_dir: Path, tmp_path: Path, rank: int) -> None:
    """With the same pairs in every update the margin grows, while judge and reference do not change."""
    trainer = SelfJudgeTrainer(
        options(work_dir, tmp_path, lora_rank=rank, steps=30, seed=1), start()
    )
    prompts, seeds, _ = trainer.draw_prompts(0, 8)
    pair_seeds = [next(seeds) for _ in prompts]
    pairs = trainer._answer(prompts, pair_seeds)
    assert any(a != b for a, b in zip(pairs.responses[:8], pairs.responses[8:], strict=True))
    rows = [trainer._learn(pairs, 0, index) for index in range(20)]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=0.2)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["margin"] > 2 and rows[-1]["accuracy"] > 0.9
    # The initial weights still are the judge and the reference.
    base_model = AutoModelForCausalLM.from_pretrained(work_dir / "base", dtype=torch.float32).eval()
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        expected, actual = base_model(ids).logits, trainer.initial(input_ids=ids).logits
        policy_logits = trainer.policy(ids).logits
    torch.testing.assert_close(actual, expected, **ROUNDING)
    assert (policy_logits - expected).abs().max() > 0.05


def test_a_saved_lora_samples_as_the_policy_does(work_dir: Path, tmp_path: Path) -> None:
    trainer = SelfJudgeTrainer(options(work_dir, tmp_path, lora_rank=4, seed=1), start())
    for index in range(4):
        trainer.step(index)
    trainer.save({})
    base_model = AutoModelForCausalLM.from_pretrained(work_dir / "base", dtype=torch.float32)
    lora_model = PeftModel.from_pretrained(base_model, tmp_path).eval()
    ids = torch.tensor([trainer.prompts[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(lora_model(ids).logits, trainer.policy(ids).logits, **ROUNDING)


def test_a_whole_model_is_saved(work_dir: Path, tmp_path: Path) -> None:
    self_judge.main(options(work_dir, tmp_path, lora_rank=0))
    assert identify(str(tmp_path)).fingerprint != identify(str(work_dir / "base")).fingerprint
    (first, *_, last) = read_metrics(tmp_path)
    assert first["step"] == 1 and last["step"] == 4
    assert "held_out_diversity" in last and "held_out_diversity" not in first


def test_a_run_that_was_killed_goes_on(
    work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = options(work_dir, tmp_path / "a", lora_rank=4, save_every=2, seed=3)
    self_judge.main(settings)

    class Killed(Exception):
        pass

    step = SelfJudgeTrainer.step

    def kill(trainer: SelfJudgeTrainer, index: int) -> dict[str, float]:
        if index == 3:
            raise Killed
        return step(trainer, index)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SelfJudgeTrainer, "step", kill)
        self_judge.main(replace(settings, output=tmp_path / "b"))
    self_judge.main(replace(settings, output=tmp_path / "b", resume=True))
    expected, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b")
    )
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert expected and any(
        value.abs().max() > 0 for key, value in expected.items() if "lora_B" in key
    )


def test_pairs_of_identical_answers_teach_nothing(work_dir: Path, tmp_path: Path) -> None:
    greedy = Decoding(temperature=0, max_new_tokens=6)
    trainer = SelfJudgeTrainer(options(work_dir, tmp_path, decoding=greedy), start())
    row = trainer.step(0)
    assert row["identical"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0


def test_it_stops_where_a_bound_is_left(work_dir: Path, tmp_path: Path) -> None:
    outside = {"outside": "tests.training.models:length", "min_agreement": 1.1}
    with pytest.raises(
        TrainingError,
        match=r"stopped after update 2: .*agrees with the outside reward in \d+%.*nothing was saved",
    ):
        self_judge.main(options(work_dir, tmp_path, lora_rank=4, **outside))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_response": 2.1}, "answers are 2.10 times as long as at the start"),
        ({"tokens_per_response": 0.45}, "answers are 0.45 times as long as at the start"),
        ({"diversity": 0.45}, "share of distinct word pairs is 0.45 of what it was at the start"),
        ({"flips": 1.1}, r"two orders disagree in \d+% of the pairs"),
    ],
)
def test_every_bound(
    work_dir: Path, tmp_path: Path, change: dict[str, float], message: str
) -> None:
    """Each figure is a multiple of its value at the start. Within the bounds the run goes on."""
    trainer = SelfJudgeTrainer(options(work_dir, tmp_path, max_flips=0.99), start())
    trainer.at_start["flips"] = 0.9
    good = {f"held_out_{name}": value for name, value in trainer.at_start.items()}
    trainer.check([{"step": 2} | good])
    factors = {name: change.get(name.removeprefix("held_out_"), 1.0) for name in good}
    bad = {name: value * factors[name] for name, value in good.items()}
    with pytest.raises(TrainingError, match=f"stopped after update 4: .*{message}"):
        trainer.check([{"step": 4} | bad])


def test_what_was_within_bounds_is_kept(work_dir: Path, tmp_path: Path) -> None:
    trainer = SelfJudgeTrainer(options(work_dir, tmp_path, lora_rank=4), start())
    at_start, good = (
        trainer.at_start,
        {f"held_out_{key}": value for key, value in trainer.at_start.items()},
    )
    trainer.check([{"step": 2} | good])
    assert (tmp_path / "adapter_model.safetensors").exists()
    bad = good | {"held_out_diversity": 0.1 * at_start["diversity"]}
    with pytest.raises(
        TrainingError, match="stopped after update 4.* what the last check before saved is kept"
    ):
        trainer.check([{"step": 4} | bad])


def test_the_outside_reward_is_asked_about_the_same_pairs(work_dir: Path, tmp_path: Path) -> None:
    trainer = SelfJudgeTrainer(
        options(work_dir, tmp_path, outside="tests.training.models:length"), start()
    )
    pairs = trainer._answer(trainer.held_out, [(1 << 38) + i for i in range(len(trainer.held_out))])
    texts = trainer.tokenizer.batch_decode(pairs.responses, skip_special_tokens=True)
    num_pairs = len(pairs.prompts)
    agreements = []
    for a, b, pair_result in zip(
        texts[:num_pairs], texts[num_pairs:], pairs.pair_results, strict=True
    ):
        agreements.append(
            0.5 if len(a) == len(b) else float((len(a) > len(b)) == pair_result.first_advances)
        )
    assert trainer.at_start["agreement"] == pytest.approx(sum(agreements) / num_pairs)


def test_unknown_principles(work_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="unknown principle 'loudness'; known are overall"):
        SelfJudgeTrainer(
            options(work_dir, tmp_path, principles=("loudness",)), Accelerator(cpu=True)
        )
