"""Preference pairs as token ids, and as a model's inputs.

In Anthropic's HH-RLHF, three quarters of a pair's tokens are its prompt. Where the model allows it, the prompt is read
once for both answers: prompt, chosen and rejected answer form one sequence, in which the rejected answer does not
attend to the chosen one, and its positions continue from the prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.console import TrainingError
from training.conversations import Conversations
from training.data import PAIR, Row, RowOptions, read_as
from training.packing import ALIKE, ALIKE_ROUNDED, Group, needs_additive, pack, takes_packed


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of prompt and longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def load_pairs(
    source: str,
    chats: Conversations,
    max_tokens: int,
    options: RowOptions,
    max_rows: int | None = None,
) -> list[Pair]:
    """Pairs whose prompt and longer answer have at most `max_tokens` tokens; others are left out and counted.

    Raises:
        TrainingError: as `training.data.read_as`, or all pairs are longer.
    """

    def pair(row: Row) -> Pair:
        (prompt, chosen), (_, rejected) = (
            chats.split_turns(row["prompt"], row[answer]) for answer in ("chosen", "rejected")
        )
        return Pair(prompt, chosen, rejected)

    pairs = read_as(source, PAIR, options, pair, max_rows)
    kept = [pair for pair in pairs if pair.longest <= max_tokens]
    if len(kept) < len(pairs):
        left_out = len(pairs) - len(kept)
        print(f"{source}: left out {left_out} of {len(pairs)} pairs over {max_tokens} tokens")
    if not kept:
        raise TrainingError(
            f"{source}: no pair is within {max_tokens} tokens: --max-length, or the model's context"
        )
    return kept


class Scored(NamedTuple):
    """A model's inputs, and M tokens of 2 n answers in them whose log-probabilities are needed."""

    inputs: dict[str, Tensor]
    places: Tensor  # [M] positions before the tokens, in the flattened batch
    targets: Tensor  # [M]
    answers: Tensor  # [M] index of the answer: the n chosen ones first, then the rejected ones

    def logprobs(self, model: Any) -> Tensor:
        """[M] nats."""
        device = model.device
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return model(**inputs, places=self.places.to(device), targets=self.targets.to(device))

    def sums(self, model: Any, count: int) -> Tensor:
        """log π(answer | prompt) in nats: [2, n]."""
        logprobs = self.logprobs(model)
        sums = logprobs.new_zeros(2 * count)
        return sums.index_add(0, self.answers.to(logprobs.device), logprobs).view(2, count)


def separate(pairs: Sequence[Pair]) -> Scored:
    """One sequence for each answer, padded on the right: under a causal mask padding changes nothing."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(p.prompt, p.rejected) for p in pairs]
    ids = torch.zeros(len(rows), max(pair.longest for pair in pairs), dtype=torch.long)
    places: list[int] = []
    targets: list[int] = []
    answers: list[int] = []
    for i, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[i, :length] = torch.tensor(prompt + answer)
        places += range(i * ids.shape[1] + len(prompt) - 1, i * ids.shape[1] + length - 1)
        targets += answer
        answers += [i] * len(answer)
    return Scored({"input_ids": ids}, *map(torch.tensor, (places, targets, answers)))


def together(pairs: Sequence[Pair], *, additive: bool = False) -> Scored:
    """One sequence for each pair.

    Args:
        additive: use a mask that is added to the scores, as "eager" attention needs it.
    """
    groups = [Group(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    packed = pack(groups, additive=additive)
    length = packed.owners.shape[1]
    places: list[int] = []
    targets: list[int] = []
    answers: list[int] = []
    for i, pair in enumerate(pairs):
        start, second = len(pair.prompt), len(pair.prompt) + len(pair.chosen)
        first = i * length
        for answer, begin, whose in (
            (pair.chosen, start, i),
            (pair.rejected, second, i + len(pairs)),
        ):
            before = [
                start - 1,
                *range(begin, begin + len(answer) - 1),
            ]  # starts with the prompt's last token
            places += [first + place for place in before[: len(answer)]]
            targets += answer
            answers += [whose] * len(answer)
    return Scored(packed.inputs, *map(torch.tensor, (places, targets, answers)))


class Reader:
    """Makes a model's inputs from pairs. Reads each prompt once if that changes nothing but rounding."""

    def __init__(self, model: PreTrainedModel, pairs: Sequence[Pair]) -> None:
        """
        Args:
            model: without a LoRA, or with an untrained one.
            pairs: all that will be read; the longest is used for the test.
        """
        self._additive = needs_additive(model)
        longest = max(pairs, key=lambda pair: pair.longest)
        self.shares = takes_packed(model, longest.longest) and self._is_alike(model, longest)

    def __call__(self, pairs: Sequence[Pair]) -> Scored:
        return together(pairs, additive=self._additive) if self.shares else separate(pairs)

    def tokens(self, pair: Pair) -> int:
        """Tokens of a pair in a batch of its own."""
        return sum(map(len, pair)) if self.shares else 2 * pair.longest

    @torch.no_grad()
    def _is_alike(self, model: PreTrainedModel, pair: Pair) -> bool:
        shared, split = (
            scored.logprobs(model)
            for scored in (together([pair], additive=self._additive), separate([pair]))
        )
        nats = (shared - split).abs().mean()  # a token
        return bool(nats < ALIKE.get(model.dtype, ALIKE_ROUNDED))
