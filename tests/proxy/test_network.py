"""The proxy network: its formula, its shapes and its gradients."""

import math

import pytest
import torch
from pydantic import ValidationError

from proxy.network import ProxyConfig, ProxyNetwork, Weights, accept_logits, state_features

H, V, R, K = 24, 50, 5, 8


@pytest.fixture
def network() -> ProxyNetwork:
    torch.manual_seed(0)
    network = ProxyNetwork(ProxyConfig(hidden_size=H, vocab_size=V, width=16))
    torch.nn.init.normal_(network.score.weight)  # as if trained
    torch.nn.init.normal_(network.value_score.weight)
    return network


def test_candidate_table_path_is_the_formula(network):
    """Against the formula in double precision, candidate by candidate, without a table."""
    hidden, embeddings = torch.randn(R, H) * 30, torch.randn(V, H) * 0.02
    token_ids, logprobs = torch.randint(V, (R, K)), -torch.rand(R, K) * 30
    logprobs[0, -1] = -math.inf
    table = network.candidate_table(embeddings)
    assert table.shape == (V, 32)
    actual = network(hidden, table[token_ids], logprobs)

    w = {name: p.detach().double() for name, p in network.named_parameters()}

    def rms(x):
        return x / ((x**2).mean() + 1e-6).sqrt()

    expected = torch.empty(R, K, dtype=torch.float64)
    for r in range(R):
        for k in range(K):
            u = w["state_half.weight"] @ rms(hidden[r].double())
            c = w["candidate_half.weight"] @ rms(embeddings[token_ids[r, k]].double())
            logp = max(float(logprobs[r, k]), -20.0) / 5
            x = torch.cat([u + c, u * c, torch.tensor([logp], dtype=torch.float64)])
            y = w["mix.weight"] @ x + w["mix.bias"]
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            expected[r, k] = (w["score.weight"] @ y + w["score.bias"]).item()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_table_in_chunks_is_the_table(network):
    embeddings = torch.randn(V, H)
    chunks = [network.candidate_table(chunk) for chunk in embeddings.split(7)]
    torch.testing.assert_close(torch.cat(chunks), network.candidate_table(embeddings))


def test_several_proxies_side_by_side_are_each_itself():
    torch.manual_seed(1)
    networks = [
        ProxyNetwork(ProxyConfig(hidden_size=H, vocab_size=V, width=8, use_logprob=i != 1))
        for i in range(3)
    ]
    for network in networks:
        torch.nn.init.normal_(network.score.weight)
    hidden, candidates = torch.randn(3, R, H), torch.randn(3, R, K, H)
    logprobs = -torch.rand(3, R, K) * 9
    stacked = Weights(
        *(torch.cat(parts) for parts in zip(*(n.weights() for n in networks), strict=True))
    )
    tables = torch.stack([n.candidate_table(x) for n, x in zip(networks, candidates, strict=True)])
    actual = accept_logits(stacked, state_features(stacked, hidden), tables, logprobs)
    assert actual.shape == (3, R, K)
    for i, network in enumerate(networks):
        torch.testing.assert_close(actual[i], network(hidden[i], tables[i], logprobs[i]))
        assert (actual[i] - actual[i - 1]).abs().max() > 0.1


def test_scale_of_the_llm_does_not_matter(network):
    hidden, embeddings, logprobs = torch.randn(R, H), torch.randn(R, K, H), torch.zeros(R, K)
    unscaled = network(hidden, network.candidate_table(embeddings), logprobs)
    scaled = network(hidden * 50, network.candidate_table(embeddings * 50), logprobs)
    torch.testing.assert_close(unscaled, scaled, rtol=1e-3, atol=1e-3)


def test_half_precision_inputs_are_computed_in_float32(network):
    hidden, embeddings = torch.randn(R, H).bfloat16(), torch.randn(R, K, H).bfloat16()
    logprobs = torch.zeros(R, K)
    actual = network(hidden, network.candidate_table(embeddings), logprobs)
    in_float32 = network(hidden.float(), network.candidate_table(embeddings.float()), logprobs)
    assert actual.dtype == network.value(hidden).dtype == torch.float32
    assert torch.equal(actual, in_float32)


def test_every_parameter_learns(network):
    embeddings = torch.randn(V, H)
    logits = network(
        torch.randn(R, H),
        network.candidate_table(embeddings)[torch.randint(V, (R, K))],
        torch.zeros(R, K),
    )
    value = network.value(torch.randn(R, H))
    assert logits.shape == (R, K)
    assert value.shape == (R,)
    (logits.sum() + value.sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_value_has_a_head_of_its_own(network):
    network.value(torch.randn(R, H)).sum().backward()
    touched = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert touched == {
        "value_hidden.weight",
        "value_hidden.bias",
        "value_score.weight",
        "value_score.bias",
    }


def test_starts_near_the_frozen_llm():
    torch.manual_seed(0)
    network = ProxyNetwork(ProxyConfig(hidden_size=H, vocab_size=V))
    accept = network(
        torch.randn(R, H), network.candidate_table(torch.randn(R, K, H)), torch.zeros(R, K)
    ).sigmoid()
    assert accept.mean().item() == pytest.approx(0.88, abs=0.01)
    assert torch.equal(network.value(torch.randn(R, H)), torch.zeros(R))


def test_without_the_logprob_feature():
    network = ProxyNetwork(ProxyConfig(hidden_size=H, vocab_size=V, use_logprob=False))
    hidden, candidates = torch.randn(R, H), network.candidate_table(torch.randn(R, K, H))
    first = network(hidden, candidates, torch.zeros(R, K))
    second = network(hidden, candidates, torch.full((R, K), -9.0))
    assert torch.equal(first, second)


def test_size_of_the_demo():
    """256 -> 64 twice, 129 -> 64 -> 1, and the value head: under 1 % of two 3.38 M models."""
    network = ProxyNetwork(ProxyConfig(hidden_size=256, vocab_size=1024))
    assert network.num_parameters() == 49_410


@pytest.mark.parametrize(
    "invalid", [{"width": 0}, {"max_candidates": 0}, {"accept_bias": math.nan}, {"widht": 64}]
)
def test_config_refuses_what_it_does_not_know(invalid):
    with pytest.raises(ValidationError):
        ProxyConfig(hidden_size=H, vocab_size=V, **invalid)
