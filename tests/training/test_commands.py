"""Every training command, run as a user runs it, at a tiny size; and its errors."""

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from proxy.checkpoint import identify, load
from tests.training.conftest import run


def test_the_whole_path_makes_what_the_server_loads(work: Path) -> None:
    demo = work / "demo"
    base = identify(str(demo / "model"))
    for name in ("aligned", "polite"):
        proxy = load(demo / "proxies" / name, base=base)
        assert proxy.training["options"]["seed"] == 0
        # under 1 % of what full RLHF trains: an actor and a critic of the LLM's size
        with safe_open(demo / "model" / "model.safetensors", "pt") as weights:
            llm = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
        assert proxy.network.num_parameters() < 0.01 * 2 * llm
    generation = json.loads((demo / "model" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["top_p"]) == (1.0, 16, 0.95)


def test_stages_that_are_done_are_skipped(work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "base").iterdir()}
    result = run("training.demo", "--work", work, "--output", work / "demo", "--scale", "0.005")
    assert result.returncode == 0, result.stderr
    assert "base: done already" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in (work / "base").iterdir()} == before


@pytest.mark.parametrize("stage", ["base", "reward-aligned", "proxy-aligned"])
def test_metrics_are_json_lines_of_finite_numbers(work: Path, stage: str) -> None:
    rows = [json.loads(line) for line in (work / stage / "metrics.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["step"] >= 0
        assert all(value == value for value in row.values())


def test_sft(work: Path, tmp_path: Path) -> None:
    result = run(
        "training.sft", "--model", work / "untrained", "--sft", work / "world/sft.jsonl",
        "--output", tmp_path, "--batch-size", "32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] > 0
    assert (tmp_path / "model.safetensors").exists()


def test_dpo(work: Path, tmp_path: Path) -> None:
    result = run(
        "training.dpo", "--model", work / "base", "--preferences", work / "world/preferences.jsonl",
        "--output", tmp_path, "--max-rows", "32", "--batch-size", "8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] > 0
    assert identify(str(tmp_path)).fingerprint != identify(str(work / "base")).fingerprint


def test_scalar_reward_trains_a_proxy_too(work: Path, tmp_path: Path) -> None:
    result = run(
        "training.reward_model", "--model", work / "base", "--kind", "scalar", "--output", tmp_path / "reward",
        "--preferences", work / "world/preferences.jsonl", "--max-rows", "32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    result = run(
        "training.proxy_ppo", "--model", work / "base", "--reward", tmp_path / "reward", "--steps", "1",
        "--prompts", work / "world/prompts.jsonl", "--output", tmp_path / "proxy", "--episodes", "8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (
        load(tmp_path / "proxy", base=identify(str(work / "base"))).training["options"]["steps"]
        == 1
    )


def test_evaluate(work: Path, tmp_path: Path) -> None:
    result = run(
        "training.evaluate", "--model", work / "base", "--proxy", work / "proxy-aligned",
        "--prompts", work / "world/prompts_validation.jsonl", "--num-prompts", "5",
        "--output", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["prompts"] == 5
    assert 0 <= figures["gold_win_rate"] <= 1
    assert figures["kl_nats_per_response"] > 0


def test_evaluate_at_strength_0_has_no_divergence(work: Path, tmp_path: Path) -> None:
    result = run(
        "training.evaluate", "--model", work / "base", "--proxy", work / "proxy-aligned", "--strength", "0",
        "--prompts", work / "world/prompts_validation.jsonl", "--num-prompts", "5",
        "--output", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["acceptance_rate"] == 1
    assert figures["kl_nats_per_response"] == pytest.approx(0, abs=1e-3)


BAD_LINES = {
    '{"prompt": [': "line 2: not JSON",
    "[1, 2]": "line 2: expected a JSON object, got list",
    '{"messages": []}': "line 2: the field 'prompt' is missing",
    '{"prompt": 5}': "line 2, field 'prompt': expected a list of chat messages",
    '{"prompt": [{"role": "user"}]}': "line 2, field 'prompt': a message is",
    '{"prompt": [{"role": "robot", "content": "x"}]}': "role 'robot' is not one of",
}


def test_bad_input_ends_in_one_line_and_exit_code_2(work: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    good = '{"prompt": [{"role": "user", "content": "hello"}]}'
    prompts.write_text(f"{good}\n{next(iter(BAD_LINES))}\n")
    common = ("--model", work / "base", "--output", tmp_path / "out")
    cases: dict[str, tuple[str | Path, ...]] = {
        "line 2: not JSON": ("--prompts", prompts, "--reward", work / "reward-aligned", *common),
        "no such file": (
            "--prompts",
            tmp_path / "none",
            "--reward",
            work / "reward-aligned",
            *common,
        ),
        "is no reward": ("--prompts", prompts, "--reward", tmp_path, *common),
        "neither a directory": (
            "--prompts",
            prompts,
            "--reward",
            tmp_path,
            "--model",
            tmp_path / "no",
            *common[2:],
        ),
    }
    os.environ["HF_HUB_OFFLINE"] = "1"
    for message, arguments in cases.items():
        result = run("training.proxy_ppo", *arguments)
        assert result.returncode == 2, (message, result.stderr)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
