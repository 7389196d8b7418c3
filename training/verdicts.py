"""Selects the kept verdicts that a proxy learns from: no caller dominates, and later verdicts replace earlier ones."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import Any, NamedTuple

from judge.feedback import Preference, fingerprint
from judge.messages import Unusable, text_of
from judge.rows import PrefersNothing
from training.console import TrainingError
from training.conversations import Conversations
from training.export import has_secret
from training.positions import Response
from training.preferences import response_of

MOST_OF_A_CALLER = 30
"""Verdicts that count for each caller in any case, however few the others gave."""


class Verdict(NamedTuple):
    """A verdict that one response is better than another."""

    row: int  # its id in the database
    caller: str | None
    better: Response
    worse: Response

    @property
    def prompt(self) -> str:
        """A hash of the prompt."""
        return hashlib.sha256(str(self.better.prompt).encode()).hexdigest()


def read_verdicts(
    rows: Iterable[tuple[int, Preference]],
    chats: Conversations,
    end_ids: set[int],
    longest: int,
    left_out: Counter[str],
) -> list[Verdict]:
    """The verdicts that count, the newest first.

    - For the same two responses, a caller's last verdict counts, and a judge's only if no person has given one.
    - For one caller, at most twice as many count as for the median caller, or 30, the newest ones: a caller who floods
      the server with verdicts does not outvote the others.

    Args:
        rows: ids and preferences, the newest first.
        longest: maximum number of tokens of prompt and response.
        left_out: counts the verdicts that were left out, by reason.
    """
    judged: set[Any] = set()
    by_people: set[str] = set()
    of_people: list[Verdict] = []
    of_judges: list[tuple[str, Verdict]] = []
    for number, preference in rows:
        try:
            row = preference.as_row()
        except (Unusable, PrefersNothing):
            left_out["that cannot be read"] += 1
            continue
        texts = [text_of(row[side][0]) for side in ("chosen", "rejected")]
        pair = fingerprint(row["prompt"], *texts)
        if (preference.caller, preference.source, pair) in judged:
            left_out["that a later one replaces"] += 1
            continue
        judged.add((preference.caller, preference.source, pair))
        if has_secret([*map(text_of, row["prompt"]), *texts]):
            left_out["with what looks like a secret"] += 1
            continue
        try:
            better, worse = (
                response_of(row, side, chats, end_ids) for side in ("chosen", "rejected")
            )
        except TrainingError:
            left_out["that the chat template refuses"] += 1
            continue
        if max(better.length, worse.length) > longest:
            left_out[f"of over {longest} tokens"] += 1
            continue
        verdict = Verdict(number, preference.caller, better, worse)
        if preference.source == "judge":
            of_judges.append((pair, verdict))
        else:
            by_people.add(pair)
            of_people.append(verdict)
    standing = [verdict for pair, verdict in of_judges if pair not in by_people]
    left_out["of a judge whom people overrule"] += len(of_judges) - len(standing)
    return _without_floods(sorted([*of_people, *standing], reverse=True), left_out)


def _without_floods(verdicts: Sequence[Verdict], left_out: Counter[str]) -> list[Verdict]:
    counts = Counter(verdict.caller for verdict in verdicts)
    limit = max(MOST_OF_A_CALLER, 2 * median_low(counts.values())) if counts else 0
    kept, taken = [], Counter[str | None]()
    for verdict in verdicts:
        taken[verdict.caller] += 1
        if taken[verdict.caller] <= limit:
            kept.append(verdict)
    left_out["of callers who gave many more than the others"] += len(verdicts) - len(kept)
    return kept


def folds(prompts: Sequence[str], *, few: int, count: int = 4) -> list[tuple[list[int], list[int]]]:
    """Training and test indices of each fold; no prompt is on both sides.

    Fewer than `few` examples are tested by cross-validation in `count` folds. Of more, a tenth is set aside by the hash
    of the prompt: the same for every version, so no version was trained on it.

    Args:
        prompts: hash of each example's prompt.
    """
    if len(prompts) >= few:
        aside = [int(prompt[:8], 16) % 10 == 0 for prompt in prompts]
        numbers = [i for i, held in enumerate(aside) if held]
        return [([i for i, held in enumerate(aside) if not held], numbers)]
    fold_of = {prompt: i % count for i, prompt in enumerate(sorted(set(prompts)))}
    parts = []
    for fold in range(count):
        held_out = [i for i, prompt in enumerate(prompts) if fold_of[prompt] == fold]
        train = [i for i, prompt in enumerate(prompts) if fold_of[prompt] != fold]
        parts.append((train, held_out))
    return parts
