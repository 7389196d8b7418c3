"""The one-pass proxy without one of its parts: no random acceptance, and repeated proposals."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.answers import answer, by_policy
from benchmarks.comparison.evaluation import DECODING, graded, noise, open_evaluation_set
from benchmarks.comparison.jobs import Job, Setting
from proxy.acceptance import Candidates, Decision
from proxy.checkpoint import identify, load
from training import proxy_ppo
from training.policy import Decoding, DrawNoise, Policy, Proposals


class ThresholdPolicy(Policy):
    """Accepts if a ≥ 1/2, instead of with probability a."""

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        certain = torch.finfo(torch.float32).max
        return torch.where(super().accept_logits(hidden, candidates) >= 0, certain, -certain)


class RepeatingPolicy(Policy):
    """SKAM without its second part: a rejected candidate may be proposed again."""

    def decide(
        self, candidates: Candidates, accept_logits: Tensor, draw: DrawNoise, decoding: Decoding
    ) -> tuple[Decision, Proposals]:
        assert decoding.temperature == self.config.temperature
        probabilities, limit = candidates.logprobs.exp(), self.config.max_rejections
        # The noise of the proposal race, which is not used here otherwise, seeds all further draws.
        noise = draw(candidates.token_ids)
        generator = torch.Generator().manual_seed(int(noise[:, 0, 0].view(torch.int32).sum()))
        slots = probabilities.multinomial(limit, replacement=True, generator=generator)  # [R, M]
        acceptance_noise = torch.rand(slots.shape, generator=generator)
        one = (probabilities > 0).sum(-1, keepdim=True) == 1
        accepted = (acceptance_noise < accept_logits.gather(-1, slots).sigmoid()) | one
        forced = ~accepted.any(-1)
        first = accepted.int().argmax(-1)
        chosen = slots.gather(-1, first[:, None])[:, 0].masked_fill(forced, 0)
        num_proposed = torch.where(forced, limit, first + 1)
        tokens = candidates.token_ids.gather(-1, chosen[:, None])[:, 0]
        decision = Decision(torch.stack((chosen, tokens, num_proposed, forced.long())))
        rows, turns = torch.nonzero(torch.arange(limit) < num_proposed[:, None], as_tuple=True)
        return decision, Proposals(rows, slots[rows, turns], accepted[rows, turns])

    def emission(self, candidates: Candidates, accept_logits: Tensor, decoding: Decoding) -> Tensor:
        """P(a slot is emitted): p a (1 − r^M) / (1 − r), plus r^M for the most probable; r = 1 − Σ p a."""
        taken = candidates.logprobs.double().exp() * accept_logits.double().sigmoid()
        rejected = 1 - taken.sum(-1, keepdim=True)
        never = rejected**self.config.max_rejections
        probabilities = taken * (1 - never) / (1 - rejected).clamp(min=1e-12)
        probabilities[:, :1] += never
        one = (candidates.logprobs > -torch.inf).sum(-1, keepdim=True) == 1
        first = torch.arange(probabilities.shape[-1]) == 0
        return torch.where(one, first.double(), probabilities)


class RepeatingTrainer(proxy_ppo.ProxyPPOTrainer):
    """Trains a proxy with repeated proposals."""

    policy_class = RepeatingPolicy


def make_threshold(seed: int) -> Job:
    """The one-pass proxy, accepting if a ≥ 1/2."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        evaluation = open_evaluation_set(setting, "test")
        network = load(
            setting.directory(f"proxy-implicit/{seed}"), base=identify(str(setting.model))
        ).network
        policy = ThresholdPolicy(evaluation.model, network)
        answers = answer(
            evaluation, noise("threshold", seed), by_policy(evaluation, policy, DECODING)
        )
        return {"row": graded(setting, evaluation, answers, seed, policy)}

    return Job(f"threshold/{seed}", run, (f"proxy-implicit/{seed}",))
