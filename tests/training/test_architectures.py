"""The training path on small random models of many architectures, against plain transformers."""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM

from proxy.checkpoint import identify, load
from proxy.network import ProxyNetwork
from proxy.reward_file import RewardFile
from tests.training.models import (
    ANSWERS,
    ARCHITECTURES,
    PROMPTS,
    chat,
    data_rows,
    frozen_of,
    save_model,
)
from training import jsft, proxy_ppo, reward_model, sft
from training.conversations import Conversations
from training.metrics import read_metrics
from training.models import load_model
from training.policy import Decoding, Policy, default_config
from training.reward_loading import load_reward
from training.rewards import Frozen, Sample, sequence_logprobs
from training.rollout import Rollout, generate

TOP_K, TOP_P, MAX_REJECTIONS = 16, 0.95, 3
TOLERANCE = 1e-3  # float32 through other kernels; a neighbouring position is off by more than 1
DECODING = Decoding(top_k=TOP_K, top_p=TOP_P, max_new_tokens=20)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    save_model(request.param, directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for kind in ("sft", "preferences", "prompts"):
        text = "".join(json.dumps(row) + "\n" for row in data_rows(kind))
        (directory / f"{kind}.jsonl").write_text(text)
    return directory


def reference(model_dir: Path) -> Any:
    """The model as transformers' own plain attention computes it."""
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def random_proxy(model: Any) -> ProxyNetwork:
    torch.manual_seed(1)
    config = default_config(model, width=8, accept_bias=0.0, max_rejections=MAX_REJECTIONS)
    network = ProxyNetwork(config)
    torch.nn.init.normal_(network.score.weight)
    return network


def nucleus_logprobs(logits: Tensor) -> dict[int, float]:
    """log-probabilities of the candidates: top-k, then top-p, renormalised; [V] logits."""
    values, token_ids = logits.double().sort(descending=True)
    probabilities = values[:TOP_K].softmax(-1)
    size = int((probabilities.cumsum(-1) - probabilities < TOP_P).sum())
    logprobs = values[:size].log_softmax(-1)
    return dict(zip(token_ids[:size].tolist(), logprobs.tolist(), strict=True))


def test_what_a_padded_batch_records_is_what_each_prompt_gives_alone(model_dir: Path) -> None:
    model, tokenizer = load_model(str(model_dir))
    chats = Conversations(tokenizer)
    prompts = [chats.prompt_ids(chat(text)) for text in PROMPTS]
    assert len(set(map(len, prompts))) == 3
    policy = Policy(model.eval(), random_proxy(model))
    rollout = generate(policy, prompts, DECODING, end_ids=(), seeds=count(0))
    reference_model, num_decisions = reference(model_dir), 0
    for episode, prompt in enumerate(prompts):
        num_decisions += check_response(reference_model, prompt, rollout, episode)
    assert num_decisions == len(rollout.decisions.token_ids) > 60
    assert rollout.counts.rejected > 10


@torch.no_grad()
def check_response(model: Any, prompt: list[int], rollout: Rollout, episode: int) -> int:
    """Walk through a response, position by position, and return how many decisions it took."""
    response, decisions = rollout.responses[episode], rollout.decisions
    rows = torch.nonzero(decisions.episodes == episode).flatten().tolist()
    head_inputs: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: head_inputs.append(inputs[0][0])
    )
    logits = model(torch.tensor([prompt + response])).logits[0]
    handle.remove()
    num_decisions = 0
    for position, token_id in enumerate(response, start=len(prompt) - 1):
        candidates, proposed, accepted = nucleus_logprobs(logits[position]), [], []
        while num_decisions < len(rows) and torch.allclose(
            decisions.hidden[rows[num_decisions]], head_inputs[0][position], atol=TOLERANCE
        ):
            row = rows[num_decisions]
            candidate = int(decisions.token_ids[row])
            assert decisions.logprobs[row].item() == pytest.approx(
                candidates[candidate], abs=TOLERANCE
            )
            proposed.append(candidate)
            accepted += [candidate] if decisions.accepted[row] else []
            num_decisions += 1
        assert len(set(proposed)) == len(proposed) <= MAX_REJECTIONS
        if accepted:
            assert accepted == [token_id]
        else:
            limit = min(MAX_REJECTIONS, len(candidates)) if len(candidates) > 1 else 0
            assert len(proposed) == limit
            assert token_id == max(candidates, key=candidates.__getitem__)
    assert num_decisions == len(rows)
    return num_decisions


def write_implicit_reward(model_dir: Path, reward: Path) -> None:
    """A reward directory whose model is the frozen LLM itself."""
    shutil.copytree(model_dir, reward)
    RewardFile(kind="implicit", beta=0.1, base=identify(str(model_dir))).write(reward)


def samples_of(frozen: Frozen) -> list[Sample]:
    chats = Conversations(frozen.tokenizer)
    samples = []
    for text, answer in zip(PROMPTS, ANSWERS, strict=True):
        prompt, response = chats.split_ids(chat(text), answer)
        samples.append(Sample(chat(text), answer, prompt, response))
    return samples


@torch.no_grad()
def test_sequence_logprobs_are_those_of_each_sequence_alone(model_dir: Path) -> None:
    reference_model, samples = reference(model_dir), samples_of(frozen_of(model_dir, DECODING))
    expected = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        logprobs = reference_model(ids).logits[0].double().log_softmax(-1)
        start = len(sample.prompt_ids)
        expected.append(
            sum(
                logprobs[position - 1, ids[0, position]].item()
                for position in range(start, ids.shape[1])
            )
        )
    model = load_model(str(model_dir))[0].eval()
    columns = [sample.prompt_ids for sample in samples], [sample.response_ids for sample in samples]
    for batch_size in (1, 2, 3):
        actual = sequence_logprobs(model, *columns, batch_size)
        assert actual.tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_an_untrained_reward_model_rewards_nothing(model_dir: Path, tmp_path: Path) -> None:
    write_implicit_reward(model_dir, tmp_path / "reward")
    frozen = frozen_of(model_dir, DECODING)
    assert load_reward(str(tmp_path / "reward"), frozen)(samples_of(frozen)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_trains_the_proxy_and_never_the_llm(
    model_dir: Path, data: Path, tmp_path: Path, dtype: Any
) -> None:
    options = proxy_ppo.Options(
        model=str(model_dir),
        reward="tests.training.models:length",
        prompts=str(data / "prompts.jsonl"),
        output=tmp_path,
        episodes=8,
        batch_size=3,
        decoding=DECODING,
        dtype=dtype,
        width=8,
    )
    trainer = proxy_ppo.ProxyPPOTrainer(options, Accelerator(cpu=True))
    states = [
        {key: value.clone() for key, value in module.state_dict().items()}
        for module in (trainer.model, trainer.network)
    ]
    assert {value.dtype for value in states[0].values()} == {getattr(torch, dtype)}
    row = trainer.step(0)
    llm, proxy = (module.state_dict() for module in (trainer.model, trainer.network))
    assert all(torch.equal(llm[key], value) for key, value in states[0].items())
    assert any(not torch.equal(proxy[key], value) for key, value in states[1].items())
    assert row["decisions"] > 50 and row["grad_norm"] > 0


REWARDS: dict[str, dict[str, Any]] = {
    "implicit": {},
    "lora": {"lora_rank": 2},
    "scalar": {"kind": "scalar"},
    "self-judge": {},
}


@pytest.mark.parametrize(
    "model_dir",
    [
        # The others differ from these in what the tests above look at.
        name if name in ("llama", "gpt2", "gemma2") else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
    indirect=True,
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft corrects it
def test_every_command(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """In bfloat16, from supervised fine-tuning to a proxy for each kind of reward."""
    tuned, base = tmp_path / "tuned", tmp_path / "base"
    sft_rows, pairs = str(data / "sft.jsonl"), str(data / "preferences.jsonl")
    sft.main(sft.Options(model=str(model_dir), sft=sft_rows, output=tuned, batch_size=4))
    jsft.main(
        jsft.Options(
            model=str(tuned), sft=sft_rows, preferences=(pairs,), output=base, batch_size=4
        )
    )
    for name, settings in REWARDS.items():
        reward, proxy = tmp_path / name, tmp_path / f"proxy-{name}"
        if name != "self-judge":
            reward_model.main(
                reward_model.Options(
                    model=str(base), preferences=pairs, output=reward, batch_size=3, **settings
                )
            )
        proxy_ppo.main(
            proxy_ppo.Options(
                model=str(base),
                reward=str(reward) if reward.exists() else name,
                prompts=str(data / "prompts.jsonl"),
                output=proxy,
                steps=1,
                episodes=8,
                batch_size=3,
                decoding=DECODING,
            )
        )
        (row,) = read_metrics(proxy)
        assert row["decisions"] > 50
        assert row["reward_std"] > 0
        assert load(proxy, base=identify(str(base))).version
