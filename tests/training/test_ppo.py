"""PPO's pieces against numbers worked out by hand."""

import math

import torch

from training.ppo import action_entropy, action_logprobs, gae, policy_losses, whiten


def test_action_logprobs() -> None:
    logits = torch.tensor([0.0, math.log(3.0), math.log(3.0)])  # a = 1/2, 3/4, 3/4
    logprobs = action_logprobs(logits, torch.tensor([True, True, False]))
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.75, 0.25]))


def test_entropy_is_log_2_at_a_fair_coin_and_0_at_certainty() -> None:
    entropy = action_entropy(torch.tensor([0.0, 40.0, -40.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0, 0.0]))


def test_whiten() -> None:
    torch.testing.assert_close(whiten(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(whiten(torch.tensor([2.0, 2.0])), torch.zeros(2))


def test_policy_losses_clip_only_where_that_makes_it_more_pessimistic() -> None:
    old = torch.zeros(4)
    new = torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    # min(ρA, clip(ρ)A): min(2, 1.2), min(-2, -1.2), min(.5, .8), min(-.5, -.8), negated
    expected = torch.tensor([-1.2, 2.0, -0.5, 0.8])
    torch.testing.assert_close(policy_losses(new - old, advantages, 0.2), expected)


def test_gae_against_numbers_worked_out_by_hand() -> None:
    """λ = 1/2. The second row's run begins late and ends early; masked positions do not count."""
    rewards = torch.tensor([[1.0, 0.0, 2.0], [9.0, 3.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [9.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True], [False, True, False]])
    # δ = 1 + 1 − 0.5, 0 + 1.5 − 1, 2 − 1.5 = 1.5, 0.5, 0.5; A_3 = 0.5, A_2 = 0.75, A_1 = 1.875
    expected = torch.tensor([[1.875, 0.75, 0.5], [0.0, 2.0, 0.0]])
    torch.testing.assert_close(gae(rewards, values, mask, lam=0.5), expected)
