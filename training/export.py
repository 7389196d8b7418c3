"""Write the feedback that a server kept as preference data for the training commands.

    python -m training.export --feedback feedback.db --output preferences.jsonl

The rows have TRL's conversational format. Each pair of responses becomes one row, however often it was judged: people's
verdicts override the judge's, and among equals the majority decides; ties are left out. Rows with a text that looks
like a secret (an API key, a token, a private key) are left out as well. Both are counted in the output. Nothing else of
a request is kept or written: neither keys nor ids.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from judge.feedback import SOURCES, Feedback, FeedbackError, Preference, Source, fingerprint
from judge.messages import Unusable, text_of
from judge.options import Share
from judge.rows import PrefersNothing
from training.console import TrainingError, main_guard, read_options
from training.data import Row
from training.output import check_file

_SECRETS = re.compile(
    r"""
    -----BEGIN\ [A-Z ]*PRIVATE\ KEY                        # PEM
    | \b(?:sk|pk|rk)[-_](?:[a-z]+[-_])*[A-Za-z0-9]{16,}    # OpenAI's, Stripe's and their like
    | \bhf_[A-Za-z0-9]{20,}                                # Hugging Face
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,}  # GitHub
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,}                     # Slack
    | \bAKIA[0-9A-Z]{16}\b                                 # AWS
    | \bAIza[0-9A-Za-z_-]{35}                              # Google
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}              # JSON web tokens
    | (?i:\bbearer\s+[\w.~+/-]{16,})
    | (?i:\b(?:password|passwd|secret|api[-_ ]?key|access[-_ ]?token)\s*[:=]\s*\S{6,})
    | ://[^\s/:@]+:[^\s/:@]+@                              # a password in a URL
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Options:
    """What to export."""

    feedback: str
    """The database: the server's `--feedback`."""
    output: Path
    """JSON lines of `prompt`, `chosen`, `rejected` and, for the judge's verdicts, `principle`."""
    source: Literal["all", "person", "judge"] = "all"
    """Whose preferences to export."""
    min_confidence: Share = 0.0
    """Only verdicts of the judge with at least this confidence, a probability."""
    overwrite: bool = False
    """Replace the output if it exists."""


def export(preferences: Iterable[Preference], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows to write; `counts` collects what was left out."""
    votes: dict[Any, Counter[tuple[str, Source]]] = {}
    firsts: dict[Any, Row] = {}
    for preference in preferences:
        counts["read"] += 1
        try:
            row = preference.as_row()
        except (Unusable, PrefersNothing):  # an earlier version kept other rows
            counts["that training cannot read"] += 1
            continue
        chosen, rejected = (text_of(row[side][0]) for side in ("chosen", "rejected"))
        key = fingerprint(row["prompt"], chosen, rejected), preference.principle
        firsts.setdefault(key, row)
        votes.setdefault(key, Counter())[chosen, preference.source] += 1
    for key, row in firsts.items():
        pair = [text_of(row[side][0]) for side in ("chosen", "rejected")]
        people, judge = ([votes[key][text, source] for text in pair] for source in SOURCES)
        votes_chosen, votes_rejected = people if any(people) else judge
        if votes_chosen == votes_rejected:
            counts["evenly split"] += 1
            continue
        if votes_chosen < votes_rejected:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
        if has_secret([*map(text_of, row["prompt"]), *pair]):
            counts["with what looks like a secret"] += 1
            continue
        counts["written"] += 1
        yield row


def has_secret(texts: Iterable[str]) -> bool:
    """Whether a text looks like it contains an API key, a token or a password."""
    return any(_SECRETS.search(text) for text in texts)


def main(options: Options) -> None:
    check_file(options.output, options, reads=("feedback",))
    counts: Counter[str] = Counter()
    try:
        _write(options, counts)
    except FeedbackError as error:
        raise TrainingError(str(error)) from None
    except OSError as error:
        raise TrainingError(f"{options.output} cannot be written: {error.strerror}") from None
    print(
        ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "nothing was kept yet"
    )


def _write(options: Options, counts: Counter[str]) -> None:
    """Write the file as a whole or not at all."""
    feedback = Feedback(options.feedback, create=False)
    wanted = (
        row
        for row in feedback.rows()
        if options.source in ("all", row.source)
        and (row.source == "person" or (row.confidence or 0) >= options.min_confidence)
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_name(f".{options.output.name}")
    with temporary.open("w", encoding="utf-8") as file:
        for row in export(wanted, counts):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    feedback.close()
    temporary.replace(options.output)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
