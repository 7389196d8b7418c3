"""The closed form against the sequential loop's probabilities, computed by recursion over all its branches."""

from itertools import product

import torch

from proxy.acceptance import Candidates
from proxy.exact import EXACT, TRAINING, Grid, divergence, emission_probabilities, sharpened


def by_recursion(p: list[float], accept: list[float], max_rejections: int) -> list[float]:
    """Propose from the remaining candidates, renormalised; accept, or remove and go on: every branch, weighted."""
    result = [0.0] * len(p)

    def visit(remaining: frozenset[int], weight: float, rejections: int) -> None:
        if not remaining or rejections == max_rejections:
            result[0] += weight
            return
        mass = sum(p[i] for i in remaining)
        for i in remaining:
            proposed = weight * p[i] / mass
            result[i] += proposed * accept[i]
            visit(remaining - {i}, proposed * (1 - accept[i]), rejections + 1)

    if len(p) == 1:
        return [1.0]
    visit(frozenset(range(len(p))), 1.0, 0)
    return result


def test_matches_the_recursion_for_every_limit_and_strength() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 5):
        p = torch.rand(size, generator=generator).double().sort(descending=True).values
        p /= p.sum()
        logits = 2 * torch.randn(1, size + 1, generator=generator)
        # with one slot outside the nucleus
        candidates = Candidates(
            torch.arange(size + 1)[None], torch.cat([p.log(), p.new_tensor([-torch.inf])])[None]
        )
        for strength, sharpness in product((0.0, 0.5, 1.0, 3.0), (1.0, 0.4, 10.0)):
            accept = (torch.sigmoid(logits[0].double()) ** strength).tolist()
            for max_rejections in range(7):
                actual = emission_probabilities(
                    candidates,
                    logits,
                    strength=strength,
                    max_rejections=max_rejections,
                    sharpness=sharpness,
                )
                powers = (p**sharpness).tolist()
                expected = by_recursion(powers, accept[:size], max_rejections)
                torch.testing.assert_close(
                    actual[0], torch.tensor([*expected, 0.0]).double(), atol=1e-6, rtol=0
                )


def test_candidates_of_any_distance() -> None:
    """At temperature 0.01 the second is proposed after the first's rejection alone, however far apart they are."""
    logprobs = torch.tensor([[0.7, 0.2999, 1e-4]]).log()
    accept_logits = torch.tensor([[-2.0, 0.0, 1.0]])
    for sharpness in (100.0, 1e4):
        candidates = Candidates(torch.arange(3)[None], logprobs)
        actual = emission_probabilities(
            candidates, accept_logits, strength=1.0, max_rejections=8, sharpness=sharpness
        )
        first, second, third = accept_logits[0].double().sigmoid().tolist()
        later = (1 - first) * second, (1 - first) * (1 - second) * third
        expected = torch.tensor([[1 - sum(later), *later]]).double()
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_greedy_is_certain() -> None:
    candidates = Candidates(torch.arange(3)[None], torch.tensor([[0.6, 0.3, 0.1]]).log())
    accept_logits = torch.tensor([[-3.0, 0.0, 3.0]])  # p a: 0.028, 0.15, 0.095
    for max_rejections, expected in ((8, 1), (1, 0), (0, 0)):
        actual = emission_probabilities(
            candidates,
            accept_logits,
            strength=1.0,
            max_rejections=max_rejections,
            sharpness=torch.inf,
        )
        assert actual.tolist() == [[float(slot == expected) for slot in range(3)]]


def test_the_llm_alone_at_half_the_temperature() -> None:
    candidates = Candidates(torch.arange(3)[None], torch.tensor([[0.6, 0.3, 0.1]]).log())
    probabilities = sharpened(candidates, 2.0).logprobs.exp()  # 0.36, 0.09, 0.01 of 0.46
    torch.testing.assert_close(probabilities, torch.tensor([[0.36, 0.09, 0.01]]) / 0.46)


def test_two_candidates_by_hand() -> None:
    candidates = Candidates(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]).log())
    logits = torch.tensor([[0.0, 0.0]])  # a = 1/2 each
    # first .75·½ + after the second's rejection .25·½·½ + forced .25 of all; second .25·½ + .75·½·½
    actual = emission_probabilities(candidates, logits, strength=1.0, max_rejections=8)
    torch.testing.assert_close(actual, torch.tensor([[0.6875, 0.3125]]).double(), atol=2e-6, rtol=0)
    kl = 0.6875 * torch.tensor(0.6875 / 0.75).log() + 0.3125 * torch.tensor(0.3125 / 0.25).log()
    torch.testing.assert_close(divergence(actual, candidates).float(), kl[None], atol=1e-5, rtol=0)


def test_its_gradient_and_the_coarse_grid_of_training() -> None:
    """Gradients against finite differences, where the limit of rejections counts and where it does not."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(4, 5, generator=generator, dtype=torch.float64).sort(descending=True)[0]
    logprobs[0, 3:], logprobs[1, 1:] = -torch.inf, -torch.inf
    candidates = Candidates(torch.arange(5).expand(4, -1), logprobs.log_softmax(-1))
    accept_logits = (2 * torch.randn(4, 5, generator=generator)).double().requires_grad_()
    for max_rejections in (2, 5):

        def emitted(
            x: torch.Tensor, limit: int = max_rejections, grid: Grid = EXACT
        ) -> torch.Tensor:
            return emission_probabilities(
                candidates, x, strength=1.0, max_rejections=limit, grid=grid
            )

        def kl(x: torch.Tensor) -> torch.Tensor:
            return divergence(emitted(x), candidates)

        assert torch.autograd.gradcheck(emitted, accept_logits)
        assert torch.autograd.gradcheck(kl, accept_logits)
        torch.testing.assert_close(
            emitted(accept_logits, grid=TRAINING).double(),
            emitted(accept_logits),
            atol=5e-4,
            rtol=0,
        )
