"""Best of N: a judge's choice among samples, by the highest score or by a knock-out of pairs."""

from collections.abc import Callable, Sequence
from itertools import chain

from benchmarks.real.rewards import pair_judge, reward_path
from benchmarks.real.setting import Setting
from judge.messages import Message
from judge.prompts import Question
from training.pair_judges import PairJudge, judge_pairs
from training.prompts import Prompt, samples_of
from training.reward_loading import load_reward
from training.rewards import Frozen

PAIRWISE = ("self", "jsft")

Responses = list[list[int]]


Choose = Callable[[Sequence[Prompt], Sequence[Responses]], Responses]
"""Prompts [P] and responses [N][P] -> the best of each prompt."""


def load_choice(setting: Setting, judge: str, seed: int, frozen: Frozen) -> Choose:
    """How a judge chooses; a LoRA of the judge stays loaded on the frozen LLM."""
    if judge in PAIRWISE:
        by = pair_judge(setting, judge, seed, frozen)
    else:
        reward = load_reward(str(reward_path(setting, judge, seed)), frozen)

    def choose(prompts: Sequence[Prompt], drawn: Sequence[Responses]) -> Responses:
        if judge in PAIRWISE:
            texts = [frozen.tokenizer.batch_decode(row, skip_special_tokens=True) for row in drawn]
            best = knock_out(by, [prompt.messages for prompt in prompts], texts)
        else:
            # All at once: a probe then reads a prompt once for all of its responses.
            every = samples_of(frozen.tokenizer, [*prompts] * len(drawn), [*chain(*drawn)])
            best = reward(every).view(len(drawn), -1).argmax(0).tolist()
        return [drawn[number][place] for place, number in enumerate(best)]

    return choose


def knock_out(
    judge: PairJudge, prompts: Sequence[list[Message]], texts: Sequence[Sequence[str]]
) -> list[int]:
    """The winner among the answers `texts` [N][P] to each prompt, by index; N is a power of two."""
    standing = [list(range(len(texts))) for _ in prompts]
    while len(standing[0]) > 1:
        questions = [
            Question([*prompt], texts[a][place], texts[b][place])
            for place, (prompt, left) in enumerate(zip(prompts, standing, strict=True))
            for a, b in zip(left[::2], left[1::2], strict=True)
        ]
        results = iter(judge_pairs({"judge": judge}, questions))
        standing = [
            [
                a if next(results).first_advances else b
                for a, b in zip(left[::2], left[1::2], strict=True)
            ]
            for left in standing
        ]
    return [winner for (winner,) in standing]
