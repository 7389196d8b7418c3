"""Proxies straight from preferences, as the command is run."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proxy.checkpoint import identify, load
from tests.training.conftest import run_command, run_on_two_processes
from tests.training.models import frozen_of
from training.console import TrainingError
from training.metrics import read_metrics
from training.models import load_model
from training.on_policy import start
from training.policy import Decoding, Policy
from training.positions import Response
from training.preferences import Collection, split
from training.proxy_dpo import Options, ProxyDPOTrainer, main
from training.ranked_answers import all_pairs
from training.reward_loading import load_reward
from training.rewards import Sample
from training.rollout import generate
from training.rollout_transformers import TransformersBackend

REWARD = """
def with_the_most_e(prompts, completions):
    return [text.count("e") / max(1, len(text)) for text in completions]

def same(prompts, completions):
    return [1.0] * len(completions)

def broken(prompts, completions):
    return [float("nan")] * len(completions)
"""
E = "e_reward:with_the_most_e"


@pytest.fixture
def options(
    work_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Options]:
    """A short run, in this process."""
    (tmp_path / "e_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    defaults = {
        "model": str(work_dir / "base"),
        "output": tmp_path / "proxy",
        "dtype": "float32",
        "decoding": Decoding(max_new_tokens=12),
    }
    return lambda **settings: Options(**defaults | settings)


def pairs_of(work_dir: Path) -> dict[str, Any]:
    return {
        "preferences": str(work_dir / "world/preferences.jsonl"),
        "max_rows": 110,
        "max_skipped": 1,
    }


def test_from_pairs(
    work_dir: Path, options: Callable[..., Options], capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = str(work_dir / "world/preferences_validation.jsonl")
    main(run_options := options(**pairs_of(work_dir), held_out=held_out, loss="dpo"))
    rows = read_metrics(run_options.output)
    assert rows[-1]["loss"] < rows[0]["loss"]
    printed = capsys.readouterr().out
    assert "lie outside the LLM's nucleus" in printed
    assert "held-out preferences are ordered correctly" in printed
    checkpoint = load(run_options.output, base=identify(str(work_dir / "base")))
    lowest = min(row["held_out_scaled_loss"] for row in rows)
    assert checkpoint.training["last"]["held_out_scaled_loss"] == lowest
    assert all(row["held_out_scaled_loss"] <= row["held_out_loss"] for row in rows)
    assert checkpoint.config.max_rejections == checkpoint.config.max_candidates == 16


def test_a_reward_is_learned_from_prompts_and_a_second_round(
    work_dir: Path, options: Callable[..., Options]
) -> None:
    """Its answers have more of what the reward counts than the frozen LLM's."""
    run_options = options(
        prompts=str(work_dir / "world/prompts.jsonl"), reward=E, samples=4, rounds=2, max_rows=30
    )
    main(run_options)
    model, tokenizer = load_model(run_options.model)
    trainer = ProxyDPOTrainer(replace(run_options, output=run_options.output / "other"), start())
    prompts = [prompt.ids for prompt in trainer.prompts]

    def share_of_e(network: Any) -> torch.Tensor:
        policy = Policy(model.eval(), network)
        rollout = generate(
            policy, prompts, run_options.decoding, end_ids=trainer.end_ids, seeds=count(10**6)
        )
        texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        return torch.tensor([text.count("e") / max(1, len(text)) for text in texts])

    learned = load(run_options.output, base=None).network
    difference = share_of_e(learned) - share_of_e(None)
    assert difference.mean() > 0
    rounds = sorted((run_options.output / "samples").iterdir())
    assert [path.name for path in rounds] == ["00-00000.jsonl", "01-00000.jsonl"]


def test_verdicts_are_learned_with_kto(work_dir: Path, options: Callable[..., Options]) -> None:
    rows = []
    for line in (work_dir / "world/preferences.jsonl").read_text().splitlines()[:60]:
        row = json.loads(line)
        rows += [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
        ]
    file = options().output.parent / "verdicts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(run_options := options(preferences=str(file)))
    figures = read_metrics(run_options.output)
    assert figures[-1]["loss"] < figures[0]["loss"]
    with pytest.raises(TrainingError, match="needs pairs, and there are single verdicts: use kto"):
        main(replace(run_options, loss="ipo", overwrite=True))


def test_a_proxy_is_a_reward(work_dir: Path, options: Callable[..., Options]) -> None:
    """In most of the pairs that it learned from it prefers the chosen response."""
    run_options = options(**pairs_of(work_dir), held_out=str(work_dir / "world/preferences.jsonl"))
    main(run_options)
    frozen = frozen_of(work_dir / "base")
    trainer = ProxyDPOTrainer(replace(run_options, output=run_options.output / "other"), start())
    preferences = trainer._read(str(run_options.preferences))
    reward = load_reward(str(run_options.output), frozen)
    scores = reward([Sample([], "", *response) for response in preferences.responses])
    assert scores.shape == (len(preferences.responses),)
    better, worse = torch.tensor(preferences.pairs).T
    assert (scores[better] > scores[worse]).float().mean() > 0.6


def test_two_processes_give_the_result_of_one(work_dir: Path, tmp_path: Path) -> None:
    command = (
        "training.proxy_dpo", "--model", work_dir / "base", "--preferences", work_dir / "world/preferences.jsonl",
        "--max-rows", "40", "--dtype", "float32", "--epochs", "2", "--batch-size", "7",
    )  # fmt: skip
    run_command(*command, "--output", tmp_path / "one")
    run_on_two_processes(*command, "--output", tmp_path / "two")
    weights_of_one, weights_of_two = (
        load_file(tmp_path / name / "proxy.safetensors") for name in ("one", "two")
    )
    for name, value in weights_of_one.items():  # up to rounding, which Adam may enlarge
        torch.testing.assert_close(value, weights_of_two[name], rtol=1e-4, atol=1e-4)


def test_a_run_that_was_interrupted_goes_on_with_what_it_has(
    work_dir: Path,
    options: Callable[..., Options],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # several add in any order
    run_options = options(
        prompts=str(work_dir / "world/prompts.jsonl"), reward=E, samples=2, max_rows=6
    )
    main(unbroken := replace(run_options, output=run_options.output.parent / "unbroken"))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransformersBackend, "read", interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"round 1 of 1 .* continues with --resume"):
            main(run_options)
    monkeypatch.setattr(TransformersBackend, "responses", interrupt)  # not sampled again
    main(replace(run_options, resume=True))
    resumed_weights, expected_weights = (
        load_file(run.output / "proxy.safetensors") for run in (run_options, unbroken)
    )
    assert all(
        torch.equal(value, expected_weights[name]) for name, value in resumed_weights.items()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give --preferences, or --prompts and --reward"),
        ({"preferences": "x", "prompts": "y", "reward": E}, "one of the two"),
        ({"prompts": "x"}, "--prompts and --reward go together"),
        ({"preferences": "x", "reward": E}, "--prompts and --reward go together"),
        ({"preferences": "x", "fluency_weight": 1.0}, "--fluency-weight is for --prompts"),
        ({"prompts": "PROMPTS", "reward": "e_reward:same", "max_rows": 4}, "the same score"),
        ({"prompts": "PROMPTS", "reward": "e_reward:broken", "max_rows": 4}, "24 of 24 .* finite"),
        ({"preferences": "PROMPTS"}, "neither a pair .* nor a completion with a label"),
        ({"preferences": "PAIRS", "max_length": 5}, "no preference is within 5 tokens"),
        ({"preferences": "PAIRS", "decoding": Decoding(temperature=0)}, "0 is greedy"),
        ({"preferences": "PAIRS", "decoding": Decoding(top_k=1)}, "has a single candidate"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from(
    work_dir: Path, options: Callable[..., Options], settings: dict[str, Any], message: str
) -> None:
    files = {"PROMPTS": "world/prompts.jsonl", "PAIRS": "world/preferences.jsonl"}
    settings = {
        key: str(work_dir / files[value]) if str(value) in files else value
        for key, value in settings.items()
    }
    with pytest.raises(TrainingError, match=message):
        main(options(**settings))


def test_foreign_responses_are_warned_of(
    work_dir: Path, options: Callable[..., Options], capsys: pytest.CaptureFixture[str]
) -> None:
    main(options(**pairs_of(work_dir), decoding=Decoding(top_k=2)))
    printed = capsys.readouterr().out
    assert "a proxy learns little from them" in printed


def test_all_pairs_of_a_prompts_answers() -> None:
    responses = [Response([1], [i]) for i in (2, 3, 4, 5, 2)]
    pairs = all_pairs(responses, [0.5, 3.0, -1.0, 2.0, 0.1])
    best_first = [1, 3, 0, 4, 2]
    # The first and the last response are the same text.
    assert pairs == [pair for pair in combinations(best_first, 2) if {*pair} != {0, 4}]
    assert all_pairs(responses, [1.0] * 5) == []
    assert all_pairs([responses[0], responses[4]], [2.0, 1.0]) == []


def test_a_prompt_is_on_one_side_of_a_split() -> None:
    collection = Collection()
    for prompt in range(10):
        for _ in range(3):
            collection.add_pair(Response([prompt], [1]), Response([prompt], [2]))
        collection.add_verdict(Response([prompt], [1]), is_good=True)
    assert len(collection.preferences.responses) == 20
    train, held_out = split(collection.preferences, 7, seed=0)
    assert (len(train), len(held_out)) == (32, 8)

    def prompts(part: Any) -> set[int]:
        responses = [index for index, _ in (*part.pairs, *part.verdicts)]
        return {part.responses[index].prompt[0] for index in responses}

    assert not prompts(train) & prompts(held_out)
