"""Fits a proxy to a server's kept verdicts, and tests whether it is better than the version that serves now.

The loss is that of `training.proxy_dpo`. A version may serve if, on verdicts that it was not trained on,

- Σ log π/p orders more than half of them correctly, by 1.64 standard errors of a fair coin: one in twenty proxies that
  have learned nothing passes;
- it orders at least as many correctly as the live version does, on those that the live version was not trained on
  either;
- its KL to the frozen LLM is at most half a nat a token: β is doubled until it is.

The loss itself would be no such test: with few verdicts it measures how confident a proxy is more than whether it is
right.

Whatever the verdicts reward, the proxy chooses within the LLM's nucleus and stays this close to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from proxy.checkpoint import BaseModelId, load
from proxy.learned import MIN_VERDICTS, rows_of, save_version
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions
from training.direct import Fit, Settings, sized_for
from training.positions import Response
from training.preference_losses import Scores, score
from training.preferences import Collection, Preferences
from training.verdicts import Verdict, folds

MIN_PROMPTS = 5
"""Verdicts on fewer prompts are not enough to test anything."""
MANY = 500
"""From this number on verdicts are tested on a tenth that is set aside; fewer by cross-validation."""
SURE = 1.64
"""Standard errors: a one-sided test at 5 %."""
MOST_KL = 0.5
"""Limit of KL(proxied ‖ frozen), nats a token."""
BETA, HIGHEST_BETA = 0.3, 4.8
_AT_ONCE = 512  # verdicts scored at once


Mean = tuple[float, float]
"""A mean and its standard error."""


@dataclass
class Outcome:
    """The result of a pass over the verdicts. Means have their standard errors beside them."""

    rows: int = 0
    """Rows of the database that were read."""
    verdicts: int = 0
    """Verdicts that count."""
    prompts: int = 0
    callers: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Verdicts that were left out, by reason."""
    accuracy: Mean | None = None
    """Share of held-out verdicts that Σ log π/p orders correctly."""
    gain: Mean | None = None
    """Difference of that share to the live version's, on verdicts that neither was trained on."""
    kl: float | None = None
    """KL(proxied ‖ frozen) in nats a token."""
    beta: float | None = None
    version: str | None = None
    """The version to serve from now on; None = the present one stays."""
    reason: str = ""
    """The reason, in words."""


class Trial:
    """Fits proxies to some of the verdicts, and evaluates them on others."""

    def __init__(
        self,
        verdicts: Sequence[Verdict],
        config: ProxyConfig,
        embeddings: Tensor,
        read: Callable[[Sequence[Response]], Positions],
        accelerator: Accelerator,
    ) -> None:
        """
        Args:
            verdicts: all of them.
            config: of the proxy, without its width.
            embeddings: the LLM's input embeddings, [V, H].
            read: reads positions of responses.
            accelerator: of this process.
        """
        collection = Collection()
        for verdict in verdicts:
            collection.add_pair(verdict.better, verdict.worse)
        self.preferences = collection.preferences
        self.sized = sized_for(len(verdicts))
        self.config = config.model_copy(update={"width": self.sized.width})
        self.embeddings, self.accelerator = embeddings, accelerator
        self.positions = read(self.preferences.responses)

    def fit(self, numbers: Sequence[int], beta: float = BETA) -> ProxyNetwork:
        """A proxy fitted to these verdicts."""
        settings = Settings(
            loss="dpo",
            beta=beta,
            epochs=self.sized.epochs,
            batch_size=self.sized.batch_size,
            weight_decay=self.sized.weight_decay,
            seed=0,
        )
        fit = Fit(self.config, self.embeddings, self.positions, settings, self.accelerator)
        train, empty = (
            Preferences(
                self.preferences.responses, [self.preferences.pairs[i] for i in indices], []
            )
            for indices in (numbers, ())
        )
        for _ in fit.epochs(train, empty):
            pass
        return fit.network

    def is_right(self, network: ProxyNetwork, numbers: Sequence[int]) -> Tensor:
        """Whether Σ log π/p orders each of these verdicts correctly: [N], 1 or 0."""
        log_ratios = self._score(network, numbers).log_ratio
        return (log_ratios[0::2] > log_ratios[1::2]).double()

    def kl(self, network: ProxyNetwork, numbers: Sequence[int]) -> float:
        """KL(proxied ‖ frozen) in nats a token of these verdicts' responses."""
        scores = self._score(network, numbers)
        return (scores.kl.sum() / scores.tokens.sum()).item()

    @torch.no_grad()
    def _score(self, network: ProxyNetwork, numbers: Sequence[int]) -> Scores:
        responses = torch.tensor([self.preferences.pairs[i] for i in numbers]).flatten()
        parts = [
            score(network, self.embeddings, *self.positions.of(part))
            for part in responses.split(2 * _AT_ONCE)
        ]
        return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def too_few(verdicts: Sequence[Verdict]) -> str:
    """Why these verdicts are too few; empty if they are enough."""
    prompts = len({verdict.prompt for verdict in verdicts})
    if len(verdicts) >= MIN_VERDICTS and prompts >= MIN_PROMPTS:
        return ""
    return (
        f"{len(verdicts)} verdicts on {prompts} prompts: it takes {MIN_VERDICTS} on {MIN_PROMPTS}"
    )


def learn(
    verdicts: Sequence[Verdict],
    trial: Trial,
    live: Path | None,
    base: BaseModelId,
    target: Path,
    about: dict[str, Any],
) -> Outcome:
    """Fit, test and, if the proxy passes, save it in a directory with the version's name below `target`.

    Args:
        verdicts: that count, and are not `too_few`.
        trial: of these verdicts.
        live: the checkpoint that serves now; None = the frozen LLM.
        base: the LLM.
        about: what the checkpoint records about its origin.
    """
    prompts, callers = zip(*((verdict.prompt, verdict.caller) for verdict in verdicts), strict=True)
    outcome = Outcome(verdicts=len(verdicts), prompts=len({*prompts}), callers=len({*callers}))
    seen = rows_of(live) if live is not None else {}
    if all(verdict.row in seen for verdict in verdicts):
        outcome.reason = "no verdict is new to the live version"
        return outcome
    if not len(trial.positions.slots):
        outcome.reason = "the LLM leaves a proxy nothing to choose in these responses"
        return outcome
    parts = [part for part in folds(prompts, few=MANY) if all(part)]
    right = torch.zeros(len(verdicts), dtype=torch.float64)
    for train, held_out in parts:
        network = trial.fit(train)
        right[held_out] = trial.is_right(network, held_out)
    tested = [i for _, held_out in parts for i in held_out]
    unseen = [i for i in tested if verdicts[i].row not in seen]
    if reason := _failed_test(outcome, trial, right, tested, unseen, live, base):
        outcome.reason = reason
        return outcome
    is_whole = len(parts) > 1
    learned_from = list(range(len(verdicts))) if is_whole else parts[0][0]
    beta, network = BETA, trial.fit(learned_from) if is_whole else network
    while (kl := trial.kl(network, learned_from)) > MOST_KL and beta < HIGHEST_BETA:
        beta *= 2
        network = trial.fit(learned_from, beta)
    outcome.kl, outcome.beta = kl, beta
    if kl > MOST_KL:
        outcome.reason = f"it moves {kl:.2f} nats a token away from the LLM; {MOST_KL} are allowed"
        return outcome
    about = about | {
        "verdicts": len(learned_from),
        "prompts": outcome.prompts,
        "callers": outcome.callers,
        "accuracy": outcome.accuracy,
        "kl_a_token": kl,
        "beta": beta,
    }
    rows = {verdicts[i].row: verdicts[i].caller for i in learned_from}
    outcome.version = save_version(target, network, rows, base=base, training=about)
    outcome.reason = "it orders unseen verdicts better than what served"
    return outcome


def _failed_test(
    outcome: Outcome,
    trial: Trial,
    right: Tensor,
    tested: Sequence[int],
    unseen: Sequence[int],
    live: Path | None,
    base: BaseModelId,
) -> str:
    """Why the new version may not serve; empty = it may. Accuracy and gain are noted in the outcome.

    Args:
        right: whether each verdict is ordered correctly: [N], 1 or 0.
        tested: indices of the held-out verdicts.
        unseen: those of them that the live version was not trained on.
        live: the live version; None = the frozen LLM.
        base: the LLM.
    """
    if not tested:
        return "no verdict could be set aside to test on"
    outcome.accuracy = _mean(right[tested])
    if outcome.accuracy[0] - 0.5 <= SURE * 0.5 / math.sqrt(len(tested)):
        return "it does not order unseen verdicts significantly better than chance"
    if live is None:
        return ""
    if not unseen:
        return "none of the new verdicts was set aside to test on"
    outcome.gain = _mean(right[unseen] - trial.is_right(load(live, base=base).network, unseen))
    return (
        "the live version orders more of the unseen verdicts correctly"
        if outcome.gain[0] < 0
        else ""
    )


def _mean(values: Tensor) -> Mean:
    return values.mean().item(), values.std(correction=0).item() / math.sqrt(len(values))
