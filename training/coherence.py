"""A probe of coherence, which needs no labels.

The LLM answers a prompt. That answer is better than its answer to another prompt, and better than itself with a phrase
that repeats from some token on. A probe of such pairs knows what a reward about something else does not see and a
policy would give away for it: an answer's relation to its prompt, and loops. `--coherence-weight` adds it: in
`training.reward_model --kind probe` to the probe, in the trainers to any reward. `--kind coherence` is it alone.
"""

import random
from collections.abc import Collection, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from judge.prompts import up_to_end
from proxy.reward_file import ProbeInfo
from training.console import TrainingError
from training.machine import print_once
from training.mean_states import num_layers_of, read_means
from training.memory import MOST_TOKENS
from training.policy import Decoding, Policy
from training.positions import Response
from training.preferences import Collection as Answers
from training.preferences import Preferences
from training.probe_fit import (
    FOLDS,
    Share,
    cross_validate,
    differences_of,
    fit,
    prompts_of,
)
from training.prompts import Prompt, samples_of
from training.rewards import Frozen, ProbeReward, Reward
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
    """Two pairs of each answer: it is better than the answer to another prompt, and than itself in a loop.

    Raises:
        TrainingError: all answers are alike, and short.
    """
    rng, pairs = random.Random(seed), Answers()
    shuffled = rng.sample(answers, len(answers))
    for answer, other in zip(shuffled, [*shuffled[1:], *shuffled[:1]], strict=True):
        if answer.response != other.response:
            pairs.add_pair(answer, Response(answer.prompt, other.response))
        if len(answer.response) > _PHRASE[1]:
            pairs.add_pair(answer, Response(answer.prompt, _looped(answer.response, rng)))
    if not pairs.preferences.pairs:
        raise TrainingError("coherence: the LLM answers all prompts alike")
    return pairs.preferences


def own_answers_in(pairs: Preferences) -> list[int]:
    """Indices of the LLM's own answers among the responses of `coherence_pairs`."""
    return sorted({better for better, _ in pairs.pairs})


def fit_coherence(means: Tensor, pairs: Preferences, seed: int) -> tuple[Tensor, Share]:
    """The probe's weights [H] float64, and the share of held-out pairs that such a probe has right; prints it.

    Args:
        means: mean states of the responses, [N, H].
        pairs: from `coherence_pairs`.
        seed: of the folds.

    Raises:
        TrainingError: there are too few prompts.
    """
    differences, prompts = differences_of(means, pairs), prompts_of(pairs)
    if int(prompts.max()) + 1 < FOLDS:
        raise TrainingError(f"coherence: fewer than {FOLDS} prompts to answer")
    validated = cross_validate(differences, prompts, seed)
    print_once(
        f"coherence: {validated.accuracy} of {len(pairs)} pairs of the LLM's own answers right in "
        f"{FOLDS}-fold cross-validation by prompt (ridge {validated.ridge:g})"
    )
    return fit(differences, validated.ridge), validated.accuracy


def add_coherence(
    reward: Reward,
    weight: float,
    prompts: Sequence[Prompt],
    frozen: Frozen,
    accelerator: Accelerator,
    seed: int,
) -> Reward:
    """The reward, and a probe of coherence whose standard deviation over the LLM's own answers is `weight` times the
    reward's.

    Args:
        prompts: of the training. The LLM answers some of them.
        accelerator: of this run's processes.
        seed: of the answers and the pairs.

    Raises:
        TrainingError: there are too few prompts, or the LLM answers all alike.
    """
    with frozen.plain() as model:
        answers = own_answers(
            [prompt.ids for prompt in prompts], model, frozen.end_ids, accelerator, seed
        )
        pairs, last = coherence_pairs(answers, seed), num_layers_of(model)
        max_tokens = MOST_TOKENS[model.device.type]
        states = read_means(pairs.responses, (last,), model=model, max_tokens=max_tokens)
    means = states.means[:, 0]
    coherence, _ = fit_coherence(means, pairs, seed)
    own, prompt_of = own_answers_in(pairs), {tuple(prompt.ids): prompt for prompt in prompts}
    samples = samples_of(
        frozen.tokenizer,
        [prompt_of[tuple(pairs.responses[i].prompt)] for i in own],
        [pairs.responses[i].response for i in own],
    )
    scale = weight * reward(samples).std().item() / (means[own].double() @ coherence).std().item()
    info = ProbeInfo(layer=last, num_layers=last, end_ids=sorted(frozen.end_ids), training={})
    scaled = ProbeReward((scale * coherence).float(), info, frozen)
    return lambda samples: reward(samples).cpu() + scaled(samples).cpu()


def _looped(tokens: list[int], rng: random.Random) -> list[int]:
    """As many tokens, but from some token on those before it repeat."""
    phrase = rng.randint(*_PHRASE)
    end = rng.randint(phrase, max(phrase, 2 * len(tokens) // 3))
    looped = tokens[:end]
    while len(looped) < len(tokens):
        looped += tokens[end - phrase : end]
    return looped[: len(tokens)]
