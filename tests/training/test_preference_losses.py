"""Losses on preferences against their formulas, position by position."""

import math

import pytest
import torch

from proxy.acceptance import Candidates
from proxy.exact import divergence, emission_probabilities
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions
from training.direct import balanced, scaled
from training.preference_losses import Scores, pair_losses, score, verdict_losses

COUNTS = (3, 0, 5)  # positions of three responses
K, VOCAB, HIDDEN = 12, 40, 8


@pytest.fixture
def positions() -> Positions:
    total = sum(COUNTS)
    logprobs = (2 * torch.randn(total, K)).sort(descending=True)[0]
    for row, size in enumerate((2, 3, 4, 5, 8, 9, 12, 12)):
        logprobs[row, size:] = -torch.inf
    return Positions(
        torch.randn(total, HIDDEN),
        torch.stack([torch.randperm(VOCAB)[:K] for _ in range(total)]).int(),
        logprobs.log_softmax(-1),
        torch.tensor([1, 0, 3, 4, 7, 8, 11, 0]),
        torch.tensor(COUNTS),
        torch.tensor([4, 1, 9]),
        torch.tensor([0, 0, 1]),
    )


@pytest.mark.parametrize("max_rejections", [3, K])
def test_scores_are_sums_over_the_emitted_distribution(
    positions: Positions, max_rejections: int
) -> None:
    network = ProxyNetwork(
        ProxyConfig(
            hidden_size=HIDDEN, vocab_size=VOCAB, width=8, max_rejections=max_rejections,
            max_candidates=K,
        )
    )  # fmt: skip
    torch.nn.init.normal_(network.score.weight)
    embeddings = torch.randn(VOCAB, HIDDEN)
    owners = torch.arange(3).repeat_interleave(positions.counts)
    actual = score(network, embeddings, positions, owners)
    table = network.candidate_table(embeddings)
    candidates = Candidates(positions.token_ids.long(), positions.logprobs)
    accept_logits = network(positions.hidden, table[candidates.token_ids], positions.logprobs)
    emitted = emission_probabilities(
        candidates, accept_logits, strength=1.0, max_rejections=max_rejections
    ).float()
    logprobs = emitted.gather(-1, positions.slots[:, None])[:, 0].log()
    ratios = logprobs - positions.logprobs.gather(-1, positions.slots[:, None])[:, 0]
    kl = divergence(emitted, candidates)
    for response, rows in enumerate(torch.arange(sum(COUNTS)).split(COUNTS)):
        # the coarser grid of training: 5e-4 of a probability, of tokens whose probability is 0.01 and more
        for name, column in (("log_ratio", ratios), ("logprob", logprobs), ("kl", kl)):
            torch.testing.assert_close(
                getattr(actual, name)[response], column[rows].sum(), rtol=0, atol=0.1
            )
    assert actual.log_ratio[1] == actual.kl[1] == actual.caution[1] == 0
    assert actual.tokens.tolist() == [4, 1, 9]
    actual.log_ratio.sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in network.mix.parameters()
    )


def scores(log_ratio: float, logprob: float = -3.0, tokens: int = 2, kl: float = 0.5) -> Scores:
    return Scores(*(torch.tensor([value]) for value in (log_ratio, logprob, kl, 0.0, tokens)))


def test_losses_by_hand() -> None:
    better, worse = scores(1.0, -4.0, 4), scores(-0.5, -3.0, 2)  # margin 1.5; a token -1, -1.5
    expected = {
        "dpo": math.log(1 + math.exp(-0.2 * 1.5)),
        "ipo": (1.5 - 1 / 0.4) ** 2,
        "simpo": math.log(1 + math.exp(-(0.2 * 0.5 - 0.5))),
    }
    for loss, value in expected.items():
        (actual,) = pair_losses(better, worse, loss=loss, beta=0.2).tolist()
        assert actual == pytest.approx(value, rel=1e-5)  # float32


def test_verdicts_by_hand_and_both_kinds_weigh_the_same() -> None:
    """One good response and three bad ones."""
    four_scores = Scores(*(torch.cat([column] * 4) for column in scores(2.0)))
    is_good = torch.tensor([True, False, False, False])
    losses = verdict_losses(four_scores, is_good, torch.tensor(0.5), beta=0.2)
    good, bad = 1 / (1 + math.exp(0.3)), 1 - 1 / (1 + math.exp(0.3))
    torch.testing.assert_close(losses, torch.tensor([good, bad, bad, bad]))
    assert balanced(is_good) == pytest.approx((2, 2 / 3))


def test_scaled_log_ratios_have_the_loss_of_another_beta() -> None:
    better, worse = (Scores(*torch.randn(5, 20)) for _ in range(2))
    of_scaled = pair_losses(scaled(better, 0.5), scaled(worse, 0.5), loss="dpo", beta=0.6)
    torch.testing.assert_close(of_scaled, pair_losses(better, worse, loss="dpo", beta=0.3))
    frozen = better.logprob - better.log_ratio
    torch.testing.assert_close(scaled(better, 2).logprob, frozen + 2 * better.log_ratio)
