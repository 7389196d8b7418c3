"""Rows of any mix of proxies, each decided as if it were alone."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import proxy.engine.rows
import proxy.engine.scoring
from proxy.acceptance import Candidates, nucleus
from proxy.engine.assignment import Assignment
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.engine.rows import ProxiedRows
from proxy.engine.scoring import ProxyScorer
from proxy.network import ProxyConfig
from proxy.noise import noise_key, seeded_noise
from tests.proxy.proxies import H, Proxy, V, different_proxies
from training.policy import Decoding, Policy

CPU = torch.device("cpu")
K = 12


@pytest.fixture
def pool() -> ProxyPool:
    return ProxyPool()


@pytest.fixture
def proxies(pool: ProxyPool) -> dict[str, Proxy]:
    return {proxy.served.name: proxy for proxy in different_proxies(pool)}


def assign(proxies: dict[str, Proxy], name: str, **settings: Any) -> Assignment:
    seed = settings.pop("seed", None)
    if seed is not None:
        settings |= {"key": noise_key(seed), "is_seeded": True}
    return Assignment("r", proxies[name].served, **settings)


def proxied_rows_of(pool: ProxyPool, assignments: list[Assignment]) -> ProxiedRows:
    return ProxiedRows([*range(len(assignments))], assignments, pool, CPU, covers_batch=True)


def random_candidates(rows: int) -> Candidates:
    token_ids = torch.stack([torch.randperm(V)[:K] for _ in range(rows)])
    logprobs = torch.randn(rows, K).sort(descending=True).values.log_softmax(-1)
    return Candidates(token_ids, logprobs.masked_fill(torch.rand(rows, K) < 0.1, -torch.inf))


@pytest.mark.parametrize(
    "proxy_names",
    [
        "a",
        "bbbbb",
        "aaaaabcd",  # five rows of one and one of each of the others
        "dcba",  # every row its own
        "abcd" * 4,
        "abbbbbbbbbbbbbbbbbbbbbbb",
        "cacacaddc",
        *("".join(Random(n).choices("abcd", k=n)) for n in (3, 11, 64)),
    ],
)
def test_every_row_is_scored_by_its_own_proxy_at_once(pool, proxies, proxy_names, monkeypatch):
    """Compared with each row's own network. It takes one evaluation, of fewer than two places a row."""
    evaluations = []

    def count_calls(name: str) -> None:
        original = getattr(proxy.engine.scoring, name)

        def counted(weights: Any, first: torch.Tensor, *args: Any) -> torch.Tensor:
            evaluations.append(first[..., 0].numel())
            return original(weights, first, *args)

        monkeypatch.setattr(proxy.engine.scoring, name, counted)

    count_calls("accept_logits")
    count_calls("score_single")
    torch.manual_seed(0)
    scorer = ProxyScorer([proxies[name].served for name in proxy_names], pool, CPU)
    hidden, candidates = torch.randn(len(proxy_names), H), random_candidates(len(proxy_names))
    actual = scorer.accept_logits(hidden, candidates)
    features = scorer.project(hidden) / hidden.norm(dim=-1, keepdim=True)
    assert actual.shape == (len(proxy_names), K) and features.shape == (len(proxy_names), 32)
    for row, name in enumerate(proxy_names):
        row_slice = slice(row, row + 1)
        expected = proxies[name].score_single(
            hidden[row_slice], *(tensor[row_slice] for tensor in candidates)
        )
        torch.testing.assert_close(actual[row_slice], expected, rtol=1e-4, atol=1e-5)
        network = proxies[name].network
        rms = hidden[row].square().mean().sqrt()
        u = network.state_half.weight @ hidden[row] / rms
        torch.testing.assert_close(features[row, : len(u)], u, rtol=1e-4, atol=1e-5)
    assert len(evaluations) == 1
    assert evaluations[0] == len(proxy_names) or evaluations[0] < 2 * len(proxy_names)


def test_rows_outlive_a_change_of_the_pool(pool, proxies):
    """They keep the tensors that they were made with: a step may be under way."""
    scorer = ProxyScorer([proxies[name].served for name in "cab"], pool, CPU)
    hidden, candidates = torch.randn(3, H), random_candidates(3)
    expected = scorer.accept_logits(hidden, candidates)
    pool.retain([proxies["b"].served])
    assert torch.equal(scorer.accept_logits(hidden, candidates), expected)


def test_settings_of_each_row(pool, proxies):
    settings = proxied_rows_of(
        pool,
        [
            assign(proxies, "a", strength=2.0, max_rejections=7, temperature=0.5, top_k=3),
            assign(proxies, "b", temperature=0.0, seed=3),
            assign(proxies, "d", strength=0.25, max_rejections=1, temperature=0.25, top_p=0.8),
        ],
    ).settings
    assert settings.strength is not None and settings.temperature is not None
    assert settings.greedy is not None and settings.sizes is not None
    assert settings.strength.tolist() == [2.0, 1.0, 0.25]
    assert settings.max_rejections.tolist() == [7, 0, 1]
    assert settings.sharpness is not None
    assert settings.top_k is not None and settings.top_p is not None
    assert settings.temperature.tolist() == pytest.approx([1.0, 0.7, 1.0])  # of the training
    assert settings.sharpness.tolist() == pytest.approx([2.0, 1.0, 4.0])
    assert settings.top_k.tolist() == [3, V, V]
    assert settings.top_p.tolist() == pytest.approx([1.0, 0.9, 0.8])  # b's own: greedy has none
    assert settings.greedy.tolist() == [False, True, False]
    assert settings.sizes.tolist() == [5, 12, 40]  # as many as there are tokens, at most
    assert settings.is_seeded.tolist() == [False, True, False]


def test_what_is_usual_takes_no_tensor(pool, proxies):
    settings = proxied_rows_of(pool, [assign(proxies, "a"), assign(proxies, "a")]).settings
    assert (settings.strength, settings.temperature, settings.sharpness) == (None, None, None)
    assert (settings.greedy, settings.sizes) == (None, None)
    assert (settings.top_k, settings.top_p) == (None, None)


@pytest.mark.parametrize(
    ("temperature", "is_greedy", "divisor"),
    [(0.0, True, 1.0), (9.9e-6, True, 1.0), (1e-5, False, 1e-5), (0.7, False, 0.7)],
)
def test_greedy_as_vllm_has_it(temperature, is_greedy, divisor):
    assignment = Assignment("r", temperature=temperature)
    assert (assignment.is_greedy, assignment.divisor) == (is_greedy, divisor)


@pytest.mark.parametrize(
    ("trained", "requested", "expected_limits"),
    [
        ((16, 0.9), (0, 1.0), (16, 0.9)),
        ((16, 0.9), (20, 0.95), (16, 0.9)),
        ((16, 0.9), (4, 0.5), (4, 0.5)),
        ((0, 1.0), (4, 0.5), (4, 0.5)),
        ((0, 1.0), (0, 1.0), (0, 1.0)),
    ],
)
def test_a_request_narrows_its_proxys_nucleus_and_never_widens_it(
    trained, requested, expected_limits
):
    config = ProxyConfig(hidden_size=H, vocab_size=V, top_k=trained[0], top_p=trained[1])
    served = ServedProxy("one", "0" * 12, config)
    for temperature, expected in ((0.5, expected_limits), (0.0, trained)):
        assignment = Assignment(
            "r", served, temperature=temperature, top_k=requested[0], top_p=requested[1]
        )
        assert assignment.truncation == expected
    assert Assignment("r", top_k=requested[0], top_p=requested[1]).truncation == requested
    policy = SimpleNamespace(network=object(), config=config)
    decoding = Decoding(temperature=0.5, top_k=requested[0], top_p=requested[1])
    logits = torch.randn(5, V)
    policy_nucleus = Policy.candidates(policy, logits, decoding)
    reference = nucleus(
        logits, 16, torch.full((5,), expected_limits[0] or V), torch.full((5,), expected_limits[1])
    )
    assert torch.equal(policy_nucleus.token_ids, reference.token_ids)
    assert torch.equal(policy_nucleus.logprobs, reference.logprobs)


def test_seeded_rows_draw_from_their_seeds_alone(pool, proxies):
    """Whatever the other rows are, and whatever the type of the positions; vLLM's is int32."""
    seeds = [11, 12, -(2**70), 11]
    positions = torch.tensor([40, 40, 3, 41], dtype=torch.int32)
    assignments = [
        assign(proxies, name, seed=seed) for name, seed in zip("abda", seeds, strict=True)
    ]
    token_ids = torch.randperm(V)[:40].expand(4, -1)
    noise = proxied_rows_of(pool, assignments).noise(positions, token_ids)
    assert noise.shape == (4, 2, 40) and noise.dtype == torch.float32
    assert len(noise.unique()) == noise.numel()
    for row, assignment in enumerate(assignments):
        row_slice = slice(row, row + 1)
        key = torch.tensor([noise_key(seeds[row])])
        assert torch.equal(
            noise[row_slice], seeded_noise(key, positions[row_slice].long(), token_ids[row_slice])
        )
        single = proxied_rows_of(pool, [assignment]).noise(
            positions[row_slice], token_ids[row_slice, :5]
        )
        assert torch.equal(noise[row_slice, :, :5], single)


def test_an_accelerator_draws_afresh_for_rows_without_a_seed(pool, proxies, monkeypatch):
    """On all devices but a CPU one kernel draws for all rows. Seeded rows keep their noise."""
    seeds = [11, None, 11]
    rows = proxied_rows_of(pool, [assign(proxies, "a", seed=seed) for seed in seeds])
    assert rows.settings.keys.device == CPU  # made before the device is replaced
    monkeypatch.setattr(rows, "_device", torch.device("meta"))
    positions = torch.tensor([40, 40, 41])
    monkeypatch.setattr(proxy.engine.rows, "draw_noise", lambda *_: torch.full((3, 2, 5), 0.5))
    token_ids = torch.arange(5).expand(3, -1)
    noise = rows.noise(positions, token_ids)
    seeded = seeded_noise(torch.tensor([noise_key(11)] * 2), positions[[0, 2]], token_ids[:2])
    assert torch.equal(noise[[0, 2]], seeded)
    assert (noise[1] == 0.5).all()


@pytest.mark.parametrize("traced", [False, True])
def test_neighbours_change_nothing(pool, proxies, traced):
    """K is that of the row's own proxy, also where top-p counts the mass of more than K tokens."""
    torch.manual_seed(0)
    assignments = [
        assign(
            proxies,
            name,
            seed=seed,
            max_rejections=8,
            traced=traced,
            top_k=(7, 7, 7, 0)[seed],
            top_p=(0.5, 0.7, 0.9, 0.8)[seed],
        )
        for seed, name in enumerate("abca")
    ]
    batch_rows = proxied_rows_of(pool, assignments)
    single_rows = [proxied_rows_of(pool, [assignment]) for assignment in assignments]
    for position in range(100):
        logits, hidden = torch.randn(4, V), torch.randn(4, H)
        positions = torch.full((4,), position, dtype=torch.int32)
        args = logits, hidden, positions
        decision, _ = batch_rows.decide(*args, temperature_applied=False)
        for row, rows in enumerate(single_rows):
            single, _ = rows.decide(
                *(tensor[row : row + 1] for tensor in args), temperature_applied=False
            )
            assert torch.equal(decision.columns[:, [row]], single.columns)
