"""Preferences for training a proxy directly: responses, pairs of them, and single verdicts."""

import random
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from judge.prompts import up_to_end
from training.console import TrainingError
from training.conversations import Conversations
from training.data import Row, RowOptions, read_as
from training.positions import Response


@dataclass(frozen=True)
class Preferences:
    """N responses, with pairs and verdicts that refer to them by index."""

    responses: list[Response]
    pairs: list[tuple[int, int]]  # better, worse
    verdicts: list[tuple[int, bool]]  # True = good

    def __len__(self) -> int:
        return len(self.pairs) + len(self.verdicts)


class Collection:
    """Collects preferences; equal responses are stored once."""

    def __init__(self) -> None:
        self._indices: dict[Hashable, int] = {}
        self.preferences = Preferences([], [], [])

    def index(self, response: Response) -> int:
        key = (tuple(response.prompt), tuple(response.response))
        if key not in self._indices:
            self._indices[key] = len(self.preferences.responses)
            self.preferences.responses.append(response)
        return self._indices[key]

    def add_pair(self, better: Response, worse: Response) -> None:
        self.preferences.pairs.append((self.index(better), self.index(worse)))

    def add_verdict(self, response: Response, *, is_good: bool) -> None:
        self.preferences.verdicts.append((self.index(response), is_good))


def read_preferences(
    source: str,
    chats: Conversations,
    end_ids: set[int],
    longest: int,
    options: RowOptions,
    max_rows: int | None = None,
) -> Preferences:
    """Pairs and verdicts with at most `longest` tokens in prompt and response; others are left out and counted.

    Raises:
        TrainingError: as `training.data.read_as`, a row is neither pair nor verdict, or all are longer.
    """
    collection, left_out = Collection(), 0

    def convert(row: Row) -> dict[str, Response | bool]:
        fields = ("chosen", "rejected") if "chosen" in row else ("completion",)
        if not all(field in row for field in fields):
            raise ValueError("neither a pair of chosen and rejected nor a completion with a label")
        read: dict[str, Response | bool] = {
            field: response_of(row, field, chats, end_ids) for field in fields
        }
        return read | ({"label": row["label"]} if "label" in row else {})

    for row in read_as(source, (), options, convert, max_rows):
        responses = [response for response in row.values() if isinstance(response, Response)]
        if max(response.length for response in responses) > longest:
            left_out += 1
        elif len(responses) == 2:
            collection.add_pair(*responses)
        else:
            collection.add_verdict(*responses, is_good=bool(row["label"]))
    if left_out:
        print(f"{source}: left out {left_out} preferences over {longest} tokens")
    if not len(collection.preferences):
        raise TrainingError(
            f"{source}: no preference is within {longest} tokens: --max-length, or the model's context"
        )
    return collection.preferences


def response_of(row: Row, field: str, chats: Conversations, end_ids: set[int]) -> Response:
    """The response up to the end of the turn."""
    prompt, response = chats.split_turns(row["prompt"], row[field])
    return Response(prompt, up_to_end(response, end_ids))


def split(preferences: Preferences, held_out: int, seed: int) -> tuple[Preferences, Preferences]:
    """Split into a training part and a held-out part of at least `held_out` preferences, with no prompt in both."""
    of_prompt: dict[Hashable, list[int]] = {}
    statements = _all(preferences)
    for number, statement in enumerate(statements):
        prompt = tuple(preferences.responses[statement[0]].prompt)
        of_prompt.setdefault(prompt, []).append(number)
    groups = list(of_prompt.values())
    random.Random(seed).shuffle(groups)
    aside: set[int] = set()
    for group in groups[: max(0, len(groups) - 1)]:
        if len(aside) >= held_out:
            break
        aside.update(group)
    return (
        _part(preferences, (n for n in range(len(statements)) if n not in aside)),
        _part(preferences, sorted(aside)),
    )


def together(train: Preferences, held_out: Preferences) -> tuple[Preferences, Preferences]:
    """Merge the responses of two sets of preferences, so that both refer to the same list."""
    first = len(train.responses)
    responses = [*train.responses, *held_out.responses]
    pairs = [(better + first, worse + first) for better, worse in held_out.pairs]
    verdicts = [(index + first, good) for index, good in held_out.verdicts]
    return replace(train, responses=responses), Preferences(responses, pairs, verdicts)


def _all(preferences: Preferences) -> list[tuple[int, int] | tuple[int, bool]]:
    return [*preferences.pairs, *preferences.verdicts]


def _part(preferences: Preferences, numbers: Iterable[int]) -> Preferences:
    count, numbers = len(preferences.pairs), list(numbers)
    pairs = [preferences.pairs[n] for n in numbers if n < count]
    verdicts = [preferences.verdicts[n - count] for n in numbers if n >= count]
    return Preferences(preferences.responses, pairs, verdicts)


def as_verdicts(preferences: Preferences) -> Tensor:
    """All preferences as verdicts: [M, 2], index of the response and 1 = good. A pair becomes a good and a bad one."""
    rows = [row for better, worse in preferences.pairs for row in ((better, 1), (worse, 0))]
    rows += [(index, int(good)) for index, good in preferences.verdicts]
    return torch.tensor(rows, dtype=torch.long).view(-1, 2)
