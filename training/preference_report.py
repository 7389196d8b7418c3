"""What `training.proxy_dpo` prints about its data and about the proxy that it fitted."""

from proxy.positions import Positions
from training.console import TrainingError
from training.machine import say


def report_fit(row: dict[str, float], count: int) -> None:
    """Say how good a reward the proxy is."""
    share = row["held_out_accuracy"]
    error = (share * (1 - share) / count) ** 0.5
    say(
        f"after pass {row['step']:.0f}: {share:.1%} ± {error:.1%} of {count} held-out preferences are ordered rightly "
        f"by Σ log π/p, at {row['held_out_kl']:.2f} nats of KL a response"
    )


def report_positions(positions: Positions) -> None:
    """Say how much of the responses the LLM would have written itself.

    Raises:
        TrainingError: there is nothing to choose.
    """
    if not len(positions.slots):
        raise TrainingError(
            "every position has a single candidate, or a token outside the nucleus: raise --decoding.top-k or "
            "--decoding.top-p"
        )
    share, tokens = positions.share_outside, int(positions.tokens.sum())
    size = sum(tensor.nbytes for tensor in positions) / 1e6
    say(
        f"{len(positions.counts):,} responses of {tokens:,} tokens, {len(positions.slots):,} of which leave a choice "
        f"({size:.0f} MB); {share:.1%} lie outside the LLM's nucleus"
    )
    if share > MOST_OUTSIDE:
        say(
            "warning: these are not what this LLM would write, and a proxy learns little from them: have it answer "
            "itself, with --prompts and --reward, or widen the nucleus with --decoding.top-p and --max-candidates"
        )


MOST_OUTSIDE = 0.1
"""Of all tokens outside the nucleus: more of them teach a proxy little."""
