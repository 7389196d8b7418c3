"""A probe on small random models: the states that it reads, the command's files, and the reward loaded from them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

from proxy.checkpoint import CheckpointError, FingerprintMismatch
from proxy.probe import PROBE_FILE, load_weight
from proxy.reward_file import RewardFile
from tests.training.models import ANSWERS, PROMPTS, chat, frozen_of, save_model
from training import mean_states, part_cache, probe, reward_model
from training.adapters import lora_config
from training.coherence import coherence_pairs, own_answers, own_answers_in
from training.console import TrainingError
from training.conversations import Conversations
from training.mean_states import MeanStates, read_means
from training.positions import Response
from training.prompts import Prompt, samples_of
from training.reward_loading import load_reward, reward_of
from training.rewards import Frozen, Sample


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def frozen_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Frozen:
    directory = tmp_path_factory.mktemp("model")
    save_model(request.param, directory)
    return frozen_of(directory)


def responses_of(frozen: Frozen) -> list[Response]:
    chats = Conversations(frozen.tokenizer)
    return [
        Response(*chats.split_ids(chat(prompt), answer)) for prompt in PROMPTS for answer in ANSWERS
    ]


@torch.inference_mode()
def test_states_are_averaged_after_each_token_of_the_response(frozen_model: Frozen) -> None:
    responses = [*responses_of(frozen_model), Response([5, 6], [])]
    result = read_means(responses, (1, 2), model=frozen_model.model, max_tokens=64)
    assert result.lengths.tolist() == [len(response) for _, response in responses]
    for (prompt, response), mean in zip(responses[:-1], result.means, strict=False):
        ids = torch.tensor([prompt + response])
        states = frozen_model.model(ids, output_hidden_states=True).hidden_states
        last = frozen_model.model.base_model(ids).last_hidden_state
        expected = [layer_states[0, len(prompt) :].mean(0) for layer_states in (states[1], last)]
        torch.testing.assert_close(mean, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert not result.means[-1].any()


def test_a_prompt_is_read_once(frozen_model: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    responses, sizes = responses_of(frozen_model), []
    # A short one: it reads each response alone.
    has_window = frozen_model.model.config.model_type == "gemma2"

    def record(module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())

    handle = frozen_model.model.register_forward_pre_hook(record, with_kwargs=True)
    together = read_means(responses, (1, 2), model=frozen_model.model, max_tokens=10_000)
    read_together, sizes[:] = sum(sizes), []
    monkeypatch.setattr(mean_states, "takes_packed", lambda model, longest: False)
    alone = read_means(responses, (1, 2), model=frozen_model.model, max_tokens=10_000)
    handle.remove()
    assert (read_together < sum(sizes)) != has_window
    torch.testing.assert_close(together.means, alone.means, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and pairs of 48 prompts in which the polite answer is better."""
    directory = tmp_path_factory.mktemp("probe")
    save_model("qwen2", directory / "base")
    with (directory / "pairs.jsonl").open("w") as file:
        for i in range(48):
            row = {
                "prompt": chat(f"{PROMPTS[i % 3]} {i}"),
                "chosen": [{"role": "assistant", "content": f"{ANSWERS[0]} {i % 7}"}],
                "rejected": [{"role": "assistant", "content": f"{ANSWERS[1]} {i % 5}"}],
            }
            file.write(json.dumps(row) + "\n")
    return directory


def options_of(work_dir: Path, output: Path, **settings: Any) -> reward_model.Options:
    common = {"model": str(work_dir / "base"), "preferences": str(work_dir / "pairs.jsonl")}
    return reward_model.Options(
        **common | {"kind": "probe", "bf16": False, "output": output} | settings
    )


@pytest.fixture(scope="module")
def probe_dir(work_dir: Path) -> Path:
    reward_model.main(
        options_of(work_dir, work_dir / "probe", held_out=str(work_dir / "pairs.jsonl"))
    )
    return work_dir / "probe"


@pytest.fixture
def frozen(work_dir: Path) -> Frozen:
    return frozen_of(work_dir / "base")


@pytest.fixture
def samples(frozen: Frozen) -> list[Sample]:
    chats = Conversations(frozen.tokenizer)
    return [
        Sample(chat(text), answer, *chats.split_ids(chat(text), answer))
        for text in PROMPTS
        for answer in ANSWERS
    ]


def test_what_the_command_writes(probe_dir: Path, frozen: Frozen) -> None:
    config = RewardFile.read(probe_dir)
    assert (config.kind, config.base) == ("probe", frozen.base)
    info = config.probe
    assert info is not None
    assert (info.layer, info.num_layers, info.end_ids) == (2, 2, sorted(frozen.end_ids))
    assert info.training["pairs"] == 48
    # Two texts are enough to tell them apart.
    assert info.training["accuracy"] == info.training["held_out_accuracy"] == 1
    assert load_weight(probe_dir).shape == (32,)


@torch.inference_mode()
def test_the_reward_is_the_heads_mean(
    probe_dir: Path, frozen: Frozen, samples: list[Sample]
) -> None:
    weight = load_weight(probe_dir)
    expected = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        states = frozen.model.base_model(ids).last_hidden_state[0, len(sample.prompt_ids) :]
        expected.append((states @ weight).mean().item())
    reward = load_reward(str(probe_dir), frozen)
    assert reward(samples).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    # What a chat template adds after the end of the turn is not read.
    longer_samples = [sample._replace(response_ids=[*sample.response_ids, 7]) for sample in samples]
    torch.testing.assert_close(reward(longer_samples), reward(samples))
    scores = reward(samples).view(3, 3)
    assert (scores[:, 0] > scores[:, 1]).all()


def test_a_lora_that_is_trained_does_not_change_it(
    probe_dir: Path, frozen: Frozen, samples: list[Sample]
) -> None:
    expected = load_reward(str(probe_dir), frozen)(samples)
    model = get_peft_model(frozen.model, lora_config(4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    actual = load_reward(str(probe_dir), replace(frozen, model=model))(samples)
    torch.testing.assert_close(actual, expected)


def test_layers_are_chosen_by_cross_validation(
    work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], frozen: Frozen,
    samples: list[Sample],
) -> None:  # fmt: skip
    reward_model.main(options_of(work_dir, tmp_path / "probe", layers=(1, 2)))
    lines = [line for line in capsys.readouterr().out.splitlines() if "layer" in line]
    losses = [float(line.partition("loss ")[2].partition(",")[0]) for line in lines[:2]]
    info = RewardFile.read(tmp_path / "probe").probe
    assert info is not None and info.layer == 1 + losses.index(min(losses))
    assert load_reward(str(tmp_path / "probe"), frozen)(samples).isfinite().all()


def test_coherence_is_added_on_the_same_scale(
    work_dir: Path, probe_dir: Path, tmp_path: Path, frozen: Frozen
) -> None:
    held_out = tmp_path / "held_out.jsonl"  # other prompts, which give no own answers
    held_out.write_text(
        (work_dir / "pairs.jsonl").read_text().replace('"content": "', '"content": "Or: ')
    )
    reward_model.main(
        options_of(work_dir, tmp_path / "probe", held_out=str(held_out), coherence_weight=0.5)
    )
    info = RewardFile.read(tmp_path / "probe").probe
    assert info is not None and info.training["coherence_weight"] == 0.5
    assert 0 < info.training["coherence_accuracy"] < 1
    chats, accelerator = Conversations(frozen.tokenizer), Accelerator(cpu=True)
    prompts = [chats.prompt_ids(chat(f"{PROMPTS[i % 3]} {i}")) for i in range(48)]
    answers = own_answers(prompts, frozen.model, frozen.end_ids, accelerator, seed=0)
    preferences, both = (
        load_reward(str(directory), frozen)([Sample([], "", *answer) for answer in answers])
        for directory in (probe_dir, tmp_path / "probe")
    )
    torch.testing.assert_close(
        (both - preferences).std(), 0.5 * preferences.std(), rtol=0.01, atol=0
    )


def lengths(prompts: list[Any], completions: list[str]) -> list[int]:
    return [len(completion) for completion in completions]


def test_coherence_is_added_to_any_reward(frozen: Frozen) -> None:
    chats, accelerator = Conversations(frozen.tokenizer), Accelerator(cpu=True)
    messages = [chat(f"{PROMPTS[i % 3]} {i}") for i in range(24)]
    prompts = [Prompt(turns, chats.prompt_ids(turns)) for turns in messages]
    options = SimpleNamespace(
        reward=f"{__name__}:lengths", fluency_weight=0, coherence_weight=2, seed=0
    )
    length = load_reward(options.reward, frozen)
    both = reward_of(options, prompts, frozen, accelerator)
    answers = own_answers([p.ids for p in prompts], frozen.model, frozen.end_ids, accelerator, 0)
    pairs = coherence_pairs(answers, 0)
    samples = samples_of(
        frozen.tokenizer,
        [Prompt([], response.prompt) for response in pairs.responses],
        [response.response for response in pairs.responses],
    )
    rewards, added = length(samples), both(samples) - length(samples)
    own = own_answers_in(pairs)
    torch.testing.assert_close(added[own].std(), 2 * rewards[own].std(), rtol=0.01, atol=0)
    better, worse = (added[list(indices)].mean() for indices in zip(*pairs.pairs, strict=True))
    assert better > worse
    with pytest.raises(TrainingError, match="coherence: fewer than 5 prompts"):
        reward_of(options, prompts[:3], frozen, accelerator)


def test_coherence_alone_needs_prompts_only(
    work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], frozen: Frozen
) -> None:
    prompts = [chat(f"{PROMPTS[i % 3]} {i}") for i in range(24)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": turns}) + "\n" for turns in prompts))
    options = options_of(work_dir, tmp_path / "probe", preferences=str(file), kind="coherence")
    reward_model.main(options)
    assert "coherence: " in capsys.readouterr().out
    info = RewardFile.read(tmp_path / "probe").probe
    assert info is not None and {*info.training} == {
        "pairs", "coherence_accuracy", "coherence_accuracy_se"
    }  # fmt: skip
    chats, accelerator = Conversations(frozen.tokenizer), Accelerator(cpu=True)
    ids = [chats.prompt_ids(turns) for turns in prompts]
    pairs = coherence_pairs(
        own_answers(ids, frozen.model, frozen.end_ids, accelerator, options.seed), options.seed
    )
    assert info.training["pairs"] == len(pairs)
    samples = [Sample([], "", *response) for response in pairs.responses]
    scores = load_reward(str(tmp_path / "probe"), frozen)(samples)
    better, worse = (scores[list(indices)] for indices in zip(*pairs.pairs, strict=True))
    assert (better - worse).mean() > 0  # as of any fit that is better than none: its loss is convex


def test_coherence_pairs() -> None:
    answers = [Response([7, i], [*range(20 * i, 20 * i + 16)]) for i in range(1, 4)]
    pairs = coherence_pairs([*answers, Response([7, 9], [5])], seed=0)
    of_prompt: dict[int, list[list[int]]] = {}
    for better, worse in pairs.pairs:
        assert pairs.responses[better].prompt == pairs.responses[worse].prompt
        own = [*answers, Response([7, 9], [5])][pairs.responses[better].prompt[1] % 5 - 1]
        assert pairs.responses[better].response == own.response
        of_prompt.setdefault(own.prompt[1], []).append(pairs.responses[worse].response)
    # A short answer has no loop.
    assert {prompt: len(worse) for prompt, worse in of_prompt.items()} == {1: 2, 2: 2, 3: 2, 9: 1}
    for i in (1, 2, 3):
        other, looped = of_prompt[i]
        assert not {*other} & {*answers[i - 1].response}
        assert len(looped) == 16 and {*looped} < {*answers[i - 1].response}
        period = 1 + next(n for n in range(15) if looped[n + 1] <= looped[n])
        assert looped[:period] == answers[i - 1].response[:period]


def test_a_killed_run_reads_on(
    work_dir: Path, probe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read: list[int] = []

    def until_killed(responses: Sequence[Response], *args: Any, **kwargs: Any) -> MeanStates:
        if len(num_read) == 1:
            num_read.append(0)
            raise KeyboardInterrupt
        num_read.append(len(responses))
        return read_means(responses, *args, **kwargs)

    monkeypatch.setattr(part_cache, "_PART", 40)
    monkeypatch.setattr(probe, "read_means", until_killed)
    with pytest.raises(KeyboardInterrupt, match="the same command continues with --resume"):
        reward_model.main(options_of(work_dir, tmp_path / "probe"))
    reward_model.main(options_of(work_dir, tmp_path / "probe", resume=True))
    assert num_read == [40, 0, 40, 16]
    # Parts of other sizes round differently.
    torch.testing.assert_close(
        load_weight(tmp_path / "probe"), load_weight(probe_dir), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 4, "epochs": 2.0}, "--kind probe has no --epochs, --lora-rank: "),
        ({"kind": "scalar", "layers": (1,)}, "--layers is for --kind probe"),
        ({"kind": "scalar", "coherence_weight": 1.0}, "--coherence-weight is for --kind probe"),
        ({"kind": "coherence", "epochs": 2.0}, "--kind coherence has no --epochs: "),
        ({"kind": "coherence", "layers": (1,)}, "--layers is for --kind probe"),
        ({"kind": "coherence", "max_rows": 4}, "4 prompts within --max-length cannot be cross-"),
        ({"kind": "coherence", "held_out": "x.jsonl"}, "--held-out is for preferences"),
        ({"layers": (1, 3)}, "--layers 3: the LLM has 2 layers"),
        ({"max_rows": 4}, "4 prompts within --max-length cannot be cross-validated: 5 are needed"),
    ],
)
def test_what_cannot_be(
    work_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        reward_model.main(options_of(work_dir, tmp_path / "probe", **change))
    assert not (tmp_path / "probe").exists()


def test_single_verdicts_are_no_pairs(work_dir: Path, tmp_path: Path) -> None:
    row = {"prompt": "Hi", "completion": "Hello", "label": True}
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(row))
    options = options_of(work_dir, tmp_path / "probe", preferences=str(tmp_path / "verdicts.jsonl"))
    with pytest.raises(TrainingError, match="a probe needs pairs, and there are single verdicts"):
        reward_model.main(options)


def test_a_probe_of_another_llm(probe_dir: Path, frozen: Frozen) -> None:
    other_frozen = replace(frozen, base=frozen.base.model_copy(update={"fingerprint": "0" * 64}))
    with pytest.raises(FingerprintMismatch, match="was trained from 'base'"):
        load_reward(str(probe_dir), other_frozen)


def test_damaged_weights(probe_dir: Path, frozen: Frozen, tmp_path: Path) -> None:
    for name in (PROBE_FILE, "reward.json"):
        (tmp_path / name).write_bytes((probe_dir / name).read_bytes())
    (tmp_path / PROBE_FILE).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="is not the weights of a probe"):
        load_reward(str(tmp_path), frozen)
