"""Pairs of a coherent and an incoherent answer, which need no labels.

The LLM answers a prompt. That answer is better than its answer to another prompt, and better than itself with a phrase
that repeats from some token on. A probe of such pairs (`training.reward_model --coherence-weight`) knows what a reward
about something else does not see and a policy would give away for it: an answer's relation to its prompt, and loops.
"""

import random
from collections.abc import Collection, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from judge.prompts import up_to_end
from training.policy import Decoding, Policy
from training.positions import Response
from training.preferences import Collection as Answers
from training.preferences import Preferences
from training.rollout import generate, longest_prompt

MOST_PROMPTS = 500
DECODING = Decoding(temperature=0.3, top_k=40, max_new_tokens=48)
"""Cool: the LLM's own answers have to make sense, so far as it can."""
_AT_ONCE = 32
_PHRASE = (3, 12)  # tokens that repeat


def own_answers(
    prompts: Sequence[list[int]],
    model: PreTrainedModel,
    end_ids: Collection[int],
    accelerator: Accelerator,
    seed: int,
) -> list[Response]:
    """The LLM's answers to at most `MOST_PROMPTS` of the shorter half of the prompts; each process samples its share.

    Args:
        prompts: token ids up to the start of the assistant's turn. Those that leave no room for an answer are left out.
    """
    limit = longest_prompt(model, DECODING)
    distinct = {tuple(prompt) for prompt in prompts if len(prompt) <= limit}
    by_length = sorted(distinct, key=lambda prompt: (len(prompt), prompt))
    short = by_length[: max(MOST_PROMPTS, len(by_length) // 2)]
    some = random.Random(seed).sample(range(len(short)), min(MOST_PROMPTS, len(short)))
    # In the order of their lengths, so that a batch has little padding.
    numbered = [(number, list(short[number])) for number in sorted(some)]
    answers: list[Response] = []
    with accelerator.split_between_processes(numbered) as mine:
        if mine:
            rollout = generate(
                Policy(model),
                [prompt for _, prompt in mine],
                DECODING,
                end_ids=end_ids,
                seeds=[(seed << 32) + number for number, _ in mine],
                batch_size=_AT_ONCE,
            )
            answers = [
                Response(prompt, up_to_end(response, end_ids))
                for (_, prompt), response in zip(mine, rollout.responses, strict=True)
            ]
    return gather_object(answers)


def coherence_pairs(answers: Sequence[Response], seed: int) -> Preferences:
    """Two pairs of each answer: it is better than the answer to another prompt, and than itself in a loop."""
    rng, pairs = random.Random(seed), Answers()
    shuffled = rng.sample(answers, len(answers))
    for answer, other in zip(shuffled, [*shuffled[1:], *shuffled[:1]], strict=True):
        if answer.response != other.response:
            pairs.add_pair(answer, Response(answer.prompt, other.response))
        if len(answer.response) > _PHRASE[1]:
            pairs.add_pair(answer, Response(answer.prompt, _looped(answer.response, rng)))
    return pairs.preferences


def _looped(tokens: list[int], rng: random.Random) -> list[int]:
    """As many tokens, but from some token on those before it repeat."""
    phrase = rng.randint(*_PHRASE)
    end = rng.randint(phrase, max(phrase, 2 * len(tokens) // 3))
    looped = tokens[:end]
    while len(looped) < len(tokens):
        looped += tokens[end - phrase : end]
    return looped[: len(tokens)]
