"""Fits a proxy to preferences: gradient steps on recorded positions. Needs no reward model, no rollouts and no LLM."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions
from training.console import TrainingError
from training.on_policy import gradient_step
from training.preference_losses import Loss, Scores, pair_losses, score, verdict_losses
from training.preferences import Preferences, as_verdicts

Row = dict[str, float]
_MEASURED = 512  # pairs at once
_SCALES = tuple(2 ** (step / 2) for step in range(-10, 5))  # of the log-ratios, from 1/32 to 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a fit."""

    loss: Loss
    beta: float
    kl_weight: float = 0.0
    caution_weight: float = 0.1
    learning_rate: float = 2e-3
    max_grad_norm: float = 1.0
    epochs: int
    batch_size: int
    weight_decay: float
    seed: int


class Sized(NamedTuple):
    """Settings for a number of preferences."""

    width: int
    epochs: int
    batch_size: int
    weight_decay: float


def sized_for(count: int) -> Sized:
    """Fewer preferences get a smaller network, more passes and stronger weight decay."""
    if count < 200:
        return Sized(16, 60 if count < 60 else 20, 16, 0.1)
    if count < 2000:
        return Sized(32, 12, 32, 0.1)
    return Sized(64, 6 if count < 6000 else 3, 64, 0.0)


def balanced(labels: Tensor) -> tuple[float, float]:
    """Weights of good (1) and bad (0) responses that give both the same total."""
    good, total = int(labels.sum()), len(labels)
    return total / 2 / max(1, good), total / 2 / max(1, total - good)


def scaled(scores: Scores, by: float) -> Scores:
    """With log-ratios times this factor."""
    log_ratio = by * scores.log_ratio
    return scores._replace(
        log_ratio=log_ratio, logprob=scores.logprob - scores.log_ratio + log_ratio
    )


class Fit:
    """Fits one proxy to given preferences; the result is the same in each of several processes."""

    def __init__(
        self,
        config: ProxyConfig,
        embeddings: Tensor,
        positions: Positions,
        settings: Settings,
        accelerator: Accelerator,
    ) -> None:
        """
        Args:
            config: of the proxy.
            embeddings: the LLM's input embeddings, [V, H].
            positions: of all responses that the preferences refer to.
            settings: of the fit.
            accelerator: of this run's processes; each takes its share of a batch.
        """
        torch.manual_seed(settings.seed)
        self.settings, self.accelerator = settings, accelerator
        self.embeddings, self.positions = embeddings, positions
        self.network = ProxyNetwork(config).to(embeddings.device)
        self._weights = 1.0, 1.0  # of good and bad responses
        self.best, self.best_row = copy.deepcopy(self.network), Row()
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )

    def epochs(self, train: Preferences, held_out: Preferences) -> Iterator[Row]:
        """Metrics of each pass. `best` is the network with the lowest scaled loss of held-out preferences, or the last
        one.

        Raises:
            TrainingError: the loss is not finite.
        """
        settings, lowest = self.settings, math.inf
        generator = torch.Generator().manual_seed(settings.seed)
        examples = self._examples(train)
        if settings.loss == "kto":
            self._weights = balanced(examples[:, 1])
        steps = settings.epochs * math.ceil(len(examples) / settings.batch_size)
        done = 0
        for epoch in range(settings.epochs):
            rows = []
            for batch in torch.randperm(len(examples), generator=generator).split(
                settings.batch_size
            ):
                for group in self.optimiser.param_groups:
                    group["lr"] = settings.learning_rate * (1 - done / steps)
                rows.append(self._step(examples[batch]))
                done += 1
            row = {"step": epoch + 1} | {
                name: fmean(metrics[name] for metrics in rows) for name in rows[0]
            }
            if len(held_out):
                row |= {f"held_out_{name}": x for name, x in self.measure(held_out).items()}
            loss = row.get("held_out_scaled_loss", -epoch)
            if not math.isfinite(row["loss"]):
                raise TrainingError("the loss is not finite: lower the learning rate")
            if loss < lowest:
                lowest, self.best_row = loss, row
                self.best.load_state_dict(self.network.state_dict())
            yield row

    @torch.no_grad()
    def measure(self, preferences: Preferences) -> Row:
        """Metrics of the current network: loss, scaled loss, KL in nats a response, and accuracy.

        The scaled loss is that of log-ratios times the factor at which it is lowest. A loss rises where a network
        becomes too sure of an order that still improves; strength is a dial, so the order counts and not the scale.
        Accuracy is the share of pairs that Σ log π/p orders correctly; with single verdicts, the share of all pairs of
        a good and a bad response.
        """
        examples = self._examples(preferences)
        parts = [self._score(part) for part in examples.split(_MEASURED)]
        scores = Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return {
            "loss": self._losses(scores, examples, scores.kl.mean()).mean().item(),
            "scaled_loss": min(
                self._losses(scaled(scores, by), examples, by * scores.kl.mean()).mean().item()
                for by in _SCALES
            ),
            "accuracy": self._ordered_rightly(scores.log_ratio.cpu(), examples),
            "kl": scores.kl.mean().item(),
        }

    def _ordered_rightly(self, log_ratios: Tensor, examples: Tensor) -> float:
        if self.settings.loss != "kto":
            return (log_ratios[0::2] > log_ratios[1::2]).float().mean().item()
        good, bad = (log_ratios[examples[:, 1] == label] for label in (1, 0))
        return (good[:, None] > bad).float().mean().item()

    def _examples(self, preferences: Preferences) -> Tensor:
        """[N, 2]: the two responses of a pair, or a response and its verdict."""
        if self.settings.loss == "kto":
            return as_verdicts(preferences)
        return torch.tensor(preferences.pairs, dtype=torch.long).view(-1, 2)

    def _score(self, examples: Tensor) -> Scores:
        """Scores of the examples' responses; the two of a pair are adjacent."""
        of_pairs = self.settings.loss != "kto"
        responses = examples.flatten() if of_pairs else examples[:, 0]
        return score(self.network, self.embeddings, *self.positions.of(responses))

    def _losses(self, scores: Scores, examples: Tensor, reference: Tensor) -> Tensor:
        settings = self.settings
        if settings.loss == "kto":
            is_good = examples[:, 1].bool().to(scores.kl.device)
            losses = verdict_losses(scores, is_good, reference, beta=settings.beta)
            return losses * torch.where(is_good, *self._weights)
        better, worse = (Scores(*(x[i::2] for x in scores)) for i in (0, 1))
        return pair_losses(better, worse, loss=settings.loss, beta=settings.beta)

    def _step(self, examples: Tensor) -> Row:
        """A gradient step on a batch, of which each process takes its share; returns its metrics."""
        settings, accelerator = self.settings, self.accelerator
        own = examples[accelerator.process_index :: accelerator.num_processes]
        share = len(own) / len(examples)
        scores = self._score(own) if len(own) else None
        nothing = torch.zeros((), device=self.embeddings.device)
        kl = accelerator.reduce(share * scores.kl.detach().mean() if scores else nothing, "sum")
        figures = torch.zeros(2, device=self.embeddings.device)
        if scores:
            loss, caution = self._losses(scores, own, kl).mean(), scores.caution.mean()
            price = settings.kl_weight * scores.kl.mean() + settings.caution_weight * caution
            (share * (loss + price)).backward()
            figures = share * torch.stack((loss, caution)).detach()
        loss, caution = accelerator.reduce(figures, "sum").tolist()
        norm = gradient_step(accelerator, self.optimiser, settings.max_grad_norm)
        return {"loss": loss, "kl": kl.item(), "caution": caution, "grad_norm": norm}
