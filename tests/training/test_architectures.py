"""The training path on small random models of many architectures, against transformers used plainly."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from proxy.network import ProxyNetwork
from tests.training.models import ARCHITECTURES, PROMPTS, chat, data_rows, save_model
from training.rollout import Decoding, Policy, Rollout, default_config, generate
from training.supervised import Conversations, load_model

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


def scrambled_proxy(model: Any) -> ProxyNetwork:
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
    policy = Policy(model.eval(), scrambled_proxy(model))
    rollout = generate(policy, prompts, DECODING, end_ids=(), seeds=count(0))
    plain, asked = reference(model_dir), 0
    for episode, prompt in enumerate(prompts):
        asked += follow(plain, prompt, rollout, episode)
    assert asked == len(rollout.decisions.token_ids) > 60
    assert rollout.counts.rejected > 10


@torch.no_grad()
def follow(model: Any, prompt: list[int], rollout: Rollout, episode: int) -> int:
    """Walk through a response, position by position, and return how many decisions it took."""
    response, columns = rollout.responses[episode], rollout.decisions
    mine = torch.nonzero(columns.episodes == episode).flatten().tolist()
    tapped: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: tapped.append(inputs[0][0])
    )
    logits = model(torch.tensor([prompt + response])).logits[0]
    handle.remove()
    asked = 0
    for position, token_id in enumerate(response, start=len(prompt) - 1):
        candidates, seen, accepted = nucleus_logprobs(logits[position]), [], []
        while asked < len(mine) and torch.allclose(
            columns.hidden[mine[asked]], tapped[0][position], atol=TOLERANCE
        ):
            row = mine[asked]
            candidate = int(columns.token_ids[row])
            assert columns.logprobs[row].item() == pytest.approx(
                candidates[candidate], abs=TOLERANCE
            )
            seen.append(candidate)
            accepted += [candidate] if columns.accepted[row] else []
            asked += 1
        assert len(set(seen)) == len(seen) <= MAX_REJECTIONS
        if accepted:
            assert accepted == [token_id]
        else:
            most = min(MAX_REJECTIONS, len(candidates)) if len(candidates) > 1 else 0
            assert len(seen) == most
            assert token_id == max(candidates, key=candidates.__getitem__)
    assert asked == len(mine)
    return asked
