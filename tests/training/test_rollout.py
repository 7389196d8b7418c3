"""The rollout: its samples and its records."""

from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from proxy.network import ProxyNetwork
from training.console import TrainingError
from training.conversations import Conversations
from training.models import load_model
from training.policy import Decoding, Policy, default_config
from training.rollout import Rollout, generate

PROMPTS = ("Is my dog worth keeping?", "I have 30 pounds for my rose. Is that enough?", "Hi")


@pytest.fixture(scope="module")
def model(work_dir: Path) -> PreTrainedModel:
    return load_model(str(work_dir / "base"))[0].eval()


@pytest.fixture(scope="module")
def prompts(work_dir: Path) -> list[list[int]]:
    chats = Conversations(load_model(str(work_dir / "base"))[1])
    return [chats.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]


def random_proxy(model: PreTrainedModel, seed: int = 0) -> ProxyNetwork:
    torch.manual_seed(seed)
    network = ProxyNetwork(default_config(model, width=16, accept_bias=0.0))
    torch.nn.init.normal_(network.score.weight)
    return network


def test_padding_beside_longer_prompts_changes_nothing(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    greedy = Decoding(temperature=0, max_new_tokens=12)
    policy = Policy(model, random_proxy(model))
    batch_responses = generate(policy, prompts, greedy, end_ids=(), seeds=count(0)).responses
    single_responses = [
        generate(policy, [prompt], greedy, end_ids=(), seeds=count(0)).responses[0]
        for prompt in prompts
    ]
    assert batch_responses == single_responses


def test_greedy_without_a_proxy_is_the_models_own_greedy(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    actual = generate(
        Policy(model),
        prompts[:1],
        Decoding(temperature=0, max_new_tokens=10),
        end_ids=(),
        seeds=count(0),
    ).responses[0]
    expected = model.generate(
        torch.tensor(prompts[:1]), do_sample=False, max_new_tokens=10, min_new_tokens=10
    )
    assert actual == expected[0, len(prompts[0]) :].tolist()


def test_greedy_rows_have_no_top_k_and_no_top_p_as_in_vllm(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    policy = Policy(model, random_proxy(model), strength=8.0)  # rejects often
    narrow = Decoding(temperature=0, top_k=1, top_p=0.01, max_new_tokens=12)
    wide = Decoding(temperature=0, top_k=0, top_p=1.0, max_new_tokens=12)
    narrow_rollout, wide_rollout = (
        generate(policy, prompts, decoding, end_ids=(), seeds=count(0))
        for decoding in (narrow, wide)
    )
    assert narrow_rollout.responses == wide_rollout.responses
    assert narrow_rollout.counts.rejected > 0


def test_records_agree_with_counts_and_with_the_model(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    policy = Policy(model, random_proxy(model))
    rollout = generate(policy, prompts, Decoding(max_new_tokens=10), end_ids=(), seeds=count(3))
    counts, decisions = rollout.counts, rollout.decisions
    assert counts.tokens == sum(map(len, rollout.responses)) == 30
    assert counts.proposed - counts.rejected == counts.tokens - counts.forced
    assert int((~decisions.accepted).sum()) == counts.rejected > 0
    # The recorded hidden states are the lm_head's input of a forward over the finished text.
    token_ids = [*prompts[0], *rollout.responses[0]]
    hidden = model.base_model(torch.tensor([token_ids])).last_hidden_state[0]
    recorded = decisions.hidden[decisions.episodes == 0]
    distance = torch.cdist(recorded, hidden[len(prompts[0]) - 1 :]).min(-1).values
    assert distance.max() < 0.1  # cdist's own rounding is 0.02
    rolled = torch.cdist(recorded.roll(1, -1), hidden[len(prompts[0]) - 1 :]).min(-1).values
    assert rolled.min() > 5  # the control: other numbers are not this near
    # Accepted candidates of a response are among its tokens, in order.
    accepted = decisions.token_ids[decisions.accepted & (decisions.episodes == 0)].tolist()
    remaining = iter(rollout.responses[0])
    assert all(token in remaining for token in accepted)


def test_a_proxy_that_rejects_everything_leaves_the_most_probable_token(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    network = ProxyNetwork(default_config(model, accept_bias=-1e4))
    decoding = Decoding(max_new_tokens=8)
    rollout = generate(Policy(model, network), prompts, decoding, end_ids=(), seeds=count(0))
    greedy = generate(
        Policy(model),
        prompts,
        Decoding(temperature=0, max_new_tokens=8),
        end_ids=(),
        seeds=count(0),
    )
    assert rollout.responses == greedy.responses


def test_a_response_ends_with_its_end_token(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    decoding = Decoding(max_new_tokens=8)
    without_ends = generate(Policy(model), prompts, decoding, end_ids=(), seeds=count(5)).responses
    end = without_ends[0][3]
    with_ends = generate(Policy(model), prompts, decoding, end_ids={end}, seeds=count(5)).responses
    for before, after in zip(without_ends, with_ends, strict=True):
        expected = before[: before.index(end) + 1] if end in before else before
        assert after == expected


def test_the_batch_size_changes_nothing(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    policy, many_prompts = Policy(model, random_proxy(model)), prompts * 2

    def rollout(batch_size: int | None) -> Rollout:
        return generate(
            policy,
            many_prompts,
            Decoding(max_new_tokens=10),
            end_ids=(),
            seeds=count(3),
            measure_kl=True,
            batch_size=batch_size,
        )

    expected = rollout(None)
    for batch_size in (1, 4):
        actual = rollout(batch_size)
        assert actual.responses == expected.responses and actual.counts == expected.counts
        for actual_column, expected_column in zip(
            actual.decisions, expected.decisions, strict=True
        ):
            torch.testing.assert_close(actual_column, expected_column, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(actual.kl, expected.kl, rtol=1e-3, atol=1e-3)


def test_every_tensor_is_made_on_the_models_device(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    """A tensor made without a device is on "meta" here, and its use with other tensors is an error."""
    policy = Policy(model, random_proxy(model))
    arguments = (policy, prompts, Decoding(max_new_tokens=4))
    expected = generate(*arguments, end_ids={7}, seeds=count(0), measure_kl=True)
    with torch.device("meta"):
        actual = generate(*arguments, end_ids={7}, seeds=count(0), measure_kl=True)
    assert actual.responses == expected.responses
    assert all(map(torch.equal, actual.decisions, expected.decisions))


def test_a_prompt_and_its_response_are_within_the_context(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    policy, context = Policy(model), model.config.max_position_embeddings
    longest = max(map(len, prompts))
    with pytest.raises(TrainingError, match=f"a prompt of {longest} tokens and a response of"):
        too_long = Decoding(max_new_tokens=context - longest + 1)
        generate(policy, prompts, too_long, end_ids=(), seeds=count(0))
    with pytest.raises(TrainingError, match="leaves no room for a prompt"):
        generate(policy, prompts, Decoding(max_new_tokens=context), end_ids=(), seeds=count(0))
