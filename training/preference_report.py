"""What `training.proxy_dpo` prints about its data and about the proxy that it fitted."""

from proxy.positions import Positions
from training.console import TrainingError
from training.machine import print_once
from training.model_card import Score

MOST_OUTSIDE = 0.1
"""Share of tokens outside the nucleus above which a proxy learns little."""


def report_fit(row: dict[str, float], count: int) -> None:
    """Print the held-out accuracy and KL of the proxy."""
    accuracy, kl = fit_scores(row, count)
    print_once(
        f"after pass {row['step']:.0f}: {accuracy.value:.1%} ± {accuracy.error:.1%} of {count} held-out preferences "
        f"are ordered correctly by Σ log π/p, at {kl.value:.2f} nats of KL a response"
    )


def fit_scores(row: dict[str, float], count: int) -> tuple[Score, Score]:
    """The held-out accuracy and KL of the proxy, from the kept pass's metrics and the number of preferences."""
    share, of = row["held_out_accuracy"], "held-out preferences, by which the pass was chosen"
    error = (share * (1 - share) / count) ** 0.5
    return (
        Score("preferences ordered correctly by Σ log π/p", share, error, count, of),
        Score("KL(proxied ‖ frozen), nats a response", row["held_out_kl"], None, count, of),
    )


def report_positions(positions: Positions) -> None:
    """Print how many tokens leave a choice, and how many lie outside the LLM's nucleus.

    Raises:
        TrainingError: no position leaves a choice.
    """
    if not len(positions.slots):
        raise TrainingError(
            "every position has a single candidate, or a token outside the nucleus: raise --decoding.top-k or "
            "--decoding.top-p"
        )
    share, tokens = positions.share_outside, int(positions.tokens.sum())
    size = sum(tensor.nbytes for tensor in positions) / 1e6
    print_once(
        f"{len(positions.counts):,} responses of {tokens:,} tokens, {len(positions.slots):,} of which leave a choice "
        f"({size:.0f} MB); {share:.1%} lie outside the LLM's nucleus"
    )
    if share > MOST_OUTSIDE:
        print_once(
            "warning: this LLM would not generate these responses, and a proxy learns little from them: let it answer "
            "itself, with --prompts and --reward, or widen the nucleus with --decoding.top-p and --max-candidates"
        )
