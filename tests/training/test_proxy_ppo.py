"""Proxy training as it is run: killed and resumed, in two processes, with every kind of reward, and what stops it."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import done, done_by_two
from tests.warm import Command, run
from training.console import TrainingError
from training.metrics import CURVES_FILE, EVENTS_DIRECTORY, read_metrics
from training.policy import Decoding
from training.ppo_trainer import PATIENCE, refuse_constant_reward
from training.proxy_ppo import Options, main, refuse_idle_proxy
from training.run_marker import MARKER
from training.state import STATE_FILE


def arguments_of(work: Path, output: Path, *more: str | Path) -> list[str]:
    """Of a short run on the tiny base model."""
    common = (
        "--model", work / "base", "--reward", work / "reward-aligned", "--prompts", work / "world/prompts.jsonl",
        "--episodes", "8", "--decoding.max-new-tokens", "12", "--output", output, *more,
    )  # fmt: skip
    return ["training.proxy_ppo", *map(str, common)]


@pytest.fixture
def arguments(work: Path) -> Callable[..., list[str]]:
    return partial(arguments_of, work)


@pytest.fixture
def options(work: Path, tmp_path: Path) -> Callable[..., Options]:
    """The same run, in this process."""
    usual = {
        "model": str(work / "base"),
        "reward": str(work / "reward-aligned"),
        "prompts": str(work / "world/prompts.jsonl"),
        "output": tmp_path / "proxy",
        "episodes": 8,
        "decoding": Decoding(max_new_tokens=12),
    }
    return lambda **more: Options(**usual | more)


def test_a_run_killed_at_any_moment_ends_with_the_weights_of_an_unbroken_one(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    steps = ("--steps", "5", "--save-every", "2")
    unbroken = run(*arguments(tmp_path / "unbroken", *steps))
    assert unbroken.returncode == 0, unbroken.stderr
    broken = tmp_path / "broken"
    # Before the first state, and after it.
    for rows, sent, code in ((1, signal.SIGKILL, -9), (3, signal.SIGINT, 130)):
        process = Command(*arguments(broken, *steps, "--resume"))
        while len(read_metrics(broken)) < rows:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sent)
        _, errors = process.communicate()
        assert process.wait() == code, errors
        assert not (broken / "proxy.safetensors").exists()
    assert errors.endswith(
        f"interrupted: saved up to update 2 of 5 in {broken}; the same command continues with --resume\n"
    )
    assert "Traceback" not in errors
    assert (broken / STATE_FILE).exists()
    resumed = run(*arguments(broken, *steps, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after update 2" in resumed.stdout
    ours, theirs = (load_file(tmp_path / x / "proxy.safetensors") for x in ("broken", "unbroken"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [read_metrics(tmp_path / x) for x in ("broken", "unbroken")]
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in log] for log in logs]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 5
    assert (broken / CURVES_FILE).stat().st_size > 10_000
    assert list((broken / EVENTS_DIRECTORY).iterdir())
    changed = run(*arguments(broken, *steps, "--resume", "--learning-rate", "0.1"))
    assert changed.returncode == 2
    assert "other options (learning_rate)" in changed.stderr


def test_a_damaged_state_is_named(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    whole = run(*arguments(tmp_path, "--steps", "1"))
    assert whole.returncode == 0, whole.stderr
    marker = tmp_path / MARKER  # as if it had been killed before its end
    marker.write_text(marker.read_text().replace('"finished": true', '"finished": false'))
    (tmp_path / STATE_FILE).write_bytes(b"not safetensors")
    result = run(*arguments(tmp_path, "--steps", "1", "--resume"))
    assert result.returncode == 2
    assert f"{STATE_FILE} is damaged" in result.stderr


# In float32, where no decision hangs on the batch that a response was in. 7 responses cannot be halved.
ALIKE = ("--steps", "3", "--dtype", "float32", "--episodes", "7")


@pytest.fixture(scope="module")
def one(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of these options, with transformers."""
    output = tmp_path_factory.mktemp("one")
    done(*arguments_of(work, output, *ALIKE))
    return output


@pytest.mark.parametrize("rollout", ["transformers", "vllm"])
def test_two_processes_give_the_result_of_one(
    arguments: Callable[..., list[str]], one: Path, tmp_path: Path, rollout: str
) -> None:
    command = arguments(tmp_path, *ALIKE, "--rollout", rollout)
    if rollout == "transformers":  # as a user starts them
        # On a CPU `accelerate launch` starts one process, whatever it is asked for.
        done("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *command)
    else:
        done_by_two(*command)
    assert_trained_alike(tmp_path, one)


def assert_trained_alike(one: Path, other: Path) -> None:
    """Up to rounding, which Adam may enlarge; a learning rate of 2e-3 moves a weight by much more."""
    ours, theirs = (load_file(directory / "proxy.safetensors") for directory in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)
    for mine, others in zip(read_metrics(one), read_metrics(other), strict=True):
        assert mine["decisions"] == others["decisions"] > 20
        assert mine["reward"] == pytest.approx(others["reward"], abs=1e-6)


def test_rollouts_in_vllm_train_alike_and_leave_nothing_behind(
    arguments: Callable[..., list[str]], one: Path, tmp_path: Path
) -> None:
    """The run is killed after its first update, and goes on."""
    output = tmp_path / "vllm"
    command = arguments(output, *ALIKE, "--save-every", "1", "--resume", "--rollout", "vllm")
    # It may be killed beside a temporary file.
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = Command(*command, environment=environment, new_session=True)
    while not (output / STATE_FILE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after update" in resumed.stdout
    assert_trained_alike(output, one)
    with pytest.raises(ProcessLookupError):  # its helpers are gone, too
        os.killpg(process.pid, 0)


REWARD = """
def short(prompts, completions):
    assert prompts[0][-1]["role"] == "user" and isinstance(completions[0], str)
    return [-len(text) for text in completions]

def broken(prompts, completions):
    return [float("nan")] * len(completions)

def few(prompts, completions):
    return [1.0]

def same(prompts, completions):
    return [3.0] * len(completions)
"""


@pytest.mark.parametrize("reward", ["my_reward:short", "self-judge"])
def test_rewards(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reward: str,
) -> None:
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # In bfloat16 an LLM that has learned so little may judge all answers alike.
    output = tmp_path / "proxy"
    done(*arguments(output, "--steps", "1", "--reward", reward, "--dtype", "float32"))
    (row,) = read_metrics(output)
    assert row["reward_std"] > 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("my_reward:broken", "8 of 8 responses is not a finite number"),
        ("my_reward:few", "returned 1 scores for 8 completions"),
        ("my_reward:same", "every response the same score"),
        ("my_reward:none", "cannot load the reward"),
        ("no_such_model", "is no reward"),
    ],
)
def test_rewards_that_cannot_be_learned_from(
    options: Callable[..., Options],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reward: str,
    message: str,
) -> None:
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match=message):
        main(options(steps=1, reward=reward))


def test_long_prompts_are_left_out_and_counted(
    options: Callable[..., Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ("is my dog worth keeping", "is my dog " * 200)
    rows = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in texts]
    prompts.write_text("\n".join(rows))
    left_out = options(steps=1, prompts=str(prompts), max_prompt_tokens=100)
    main(left_out)
    assert "left out 1 of 2 prompts of over 100 tokens" in capsys.readouterr().out
    prompts.write_text(rows[1])
    with pytest.raises(TrainingError, match="no prompt is within"):
        main(replace(left_out, overwrite=True))
    assert (left_out.output / "proxy.safetensors").exists()  # a mistake in the data costs nothing


def rows_with(**values: list[float]) -> list[dict[str, Any]]:
    usual = {"reward_std": 1.0, "decisions": 9, "acceptance_rate": 0.8}
    count = len(next(iter(values.values())))
    return [usual | {name: value[i] for name, value in values.items()} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_with(reward_std=[0.0]), "same score"),
        (rows_with(reward_std=[1.0, 0, 0, 0]), "same score"),
        (rows_with(decisions=[0, 0, 0]), "single candidate"),
        (rows_with(acceptance_rate=[0.5, 0, 0, 0]), "rejects everything"),
        (rows_with(acceptance_rate=[1, 1, 1]), "rejects nothing"),
        (rows_with(acceptance_rate=[1, 1]), None),
        (rows_with(acceptance_rate=[0, 0.1, 0, 0]), None),
        (rows_with(reward_std=[1.0, 0, 0]), None),
    ],
)
def test_a_run_with_nothing_left_to_learn_stops(
    rows: list[dict[str, Any]], message: str | None
) -> None:
    def check() -> None:
        refuse_constant_reward(rows)
        refuse_idle_proxy(rows[-PATIENCE:])

    if message is None:
        check()
    else:
        with pytest.raises(TrainingError, match=message):
            check()
