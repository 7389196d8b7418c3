"""Trains a probe: one pass of the frozen LLM over the pairs, then a convex fit that takes seconds.

`training.reward_model --kind probe` is the command.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from proxy.checkpoint import identify, resolve_model_dir
from proxy.probe import PROBE_FILE, save_weight
from proxy.reward_file import REWARD_FILE, ProbeInfo, RewardFile
from training import dpo
from training.coherence import coherence_pairs, fit_coherence, own_answers, own_answers_in
from training.console import TrainingError
from training.conversations import Conversations
from training.mean_states import MeanStates, num_layers_of, read_means
from training.memory import MOST_TOKENS
from training.model_card import CARD_FILE, Score
from training.models import (
    context_of,
    end_ids,
    load_model,
    load_tokenizer,
    read_config,
    refuse_unknown,
)
from training.on_policy import start
from training.output import Run
from training.part_cache import PartCache
from training.preferences import Preferences, read_preferences, together
from training.probe_fit import (
    FOLDS,
    Share,
    Validated,
    cross_validate,
    differences_of,
    fit,
    prompts_of,
    share_right,
)
from training.saving import saving

STATES = "states"
WRITES = (PROBE_FILE, REWARD_FILE, CARD_FILE, f"{STATES}/*")


def train(options: dpo.Options, layers: Sequence[int], coherence_weight: float, run: Run) -> None:
    """Read the pairs, fit a probe for each layer, and save the best.

    Args:
        options: those of the pairs, of the output and of the seed.
        layers: to choose from; empty = the last.
        coherence_weight: of a probe of `training.coherence`'s pairs, which is added.
        run: the output directory.

    Raises:
        TrainingError: a layer that the LLM does not have, or preferences that cannot be cross-validated.
    """
    accelerator = start()
    base, directory = identify(options.model), str(resolve_model_dir(options.model))
    tokenizer, dtype = load_tokenizer(directory), "bfloat16" if options.bf16 else "float32"
    model = load_model(directory, dtype=getattr(torch, dtype))[0]
    model.to(accelerator.device).eval().requires_grad_(False)
    ends, last = end_ids(model, tokenizer), num_layers_of(model)
    layers = tuple(layers) or (last,)
    if max(layers) > last:
        raise TrainingError(f"--layers {max(layers)}: the LLM has {last} layers")
    longest = min(options.max_length, context_of(read_config(directory)))
    read = partial(_read_pairs, Conversations(tokenizer), ends, longest, options)
    pairs, held_out = read(options.preferences, options.max_rows), None
    if options.held_out is not None:
        pairs, held_out = together(pairs, read(options.held_out, None))
    _refuse_few_prompts(pairs, options.preferences)
    refuse_unknown(model, tokenizer, (r.prompt + r.response for r in pairs.responses))
    run.start()
    cache = PartCache(options.output / STATES, base, dtype, accelerator)
    # All layers' states are in memory at once where others than the last are read.
    tokens = MOST_TOKENS[accelerator.device.type] // (1 if layers == (last,) else 4)
    reader = partial(read_means, layers=layers, model=model, max_tokens=tokens)
    settings = ["mean states", *layers]

    def states_of(preferences: Preferences) -> MeanStates:
        parts = cache.parts(preferences.responses, settings, reader, MeanStates)
        return MeanStates(*map(torch.cat, zip(*parts, strict=True)))

    states, coherence = states_of(pairs), None
    if coherence_weight:
        prompts = [pairs.responses[better].prompt for better, _ in pairs.pairs]
        answers = own_answers(prompts, model, ends, accelerator, options.seed)
        own = coherence_pairs(answers, options.seed)
        coherence = own, states_of(own)
    if not accelerator.is_main_process:
        return
    layer, weight, training = _fit(layers, states, pairs, options.seed)
    index = layers.index(layer)
    if coherence is not None:
        own, own_states = coherence
        means = own_states.means[:, index]
        weight, figures = _add_coherence(weight, means, own, coherence_weight, options.seed)
        training |= figures
    if held_out is not None:
        margins = differences_of(states.means[:, index], held_out).double() @ weight
        right = share_right(margins, prompts_of(held_out))
        print(f"layer {layer}: {right} of {len(held_out)} held-out pairs right")
        training |= {"held_out_accuracy": right.value, "held_out_accuracy_se": right.error}
    run.scores = _scores(training, held_out)
    probe = ProbeInfo(layer=layer, num_layers=last, end_ids=sorted(ends), training=training)
    with saving(options.output) as saved:
        save_weight(saved, weight)
        RewardFile(kind="probe", base=base, probe=probe).write(saved)


def _fit(
    layers: Sequence[int],
    states: MeanStates,
    pairs: Preferences,
    seed: int,
) -> tuple[int, Tensor, dict[str, float]]:
    """The best layer, its weights and its figures; prints all figures."""
    differences, groups = differences_of(states.means, pairs), prompts_of(pairs)
    validated: dict[int, Validated] = {}
    for i, layer in enumerate(layers):
        validated[layer] = found = cross_validate(differences[:, i], groups, seed)
        print(
            f"layer {layer}: {found.accuracy} of {len(pairs)} pairs right in {FOLDS}-fold cross-validation "
            f"by prompt (loss {found.loss:.3f}, ridge {found.ridge:g})"
        )
    longer = share_right(differences_of(states.lengths, pairs), groups)
    which, length = ("longer", longer) if longer.value >= 0.5 else ("shorter", _opposite(longer))
    print(f"the {which} response alone: {length}")
    layer = min(validated, key=lambda layer: validated[layer].loss)
    best, index = validated[layer], list(layers).index(layer)
    weight = fit(differences[:, index], best.ridge)
    training = {
        "pairs": len(pairs),
        "ridge": best.ridge,
        "loss": best.loss,
        "accuracy": best.accuracy.value,
        "accuracy_se": best.accuracy.error,
        "length_accuracy": length.value,
        "length_accuracy_se": length.error,
    }
    return layer, weight, training


def _add_coherence(
    weight: Tensor, means: Tensor, pairs: Preferences, factor: float, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """The weights of r + factor · s · c, and figures of c.

    c is a probe of the coherence pairs, and s brings its standard deviation over the LLM's own answers to that of the
    preferences' probe r.
    """
    coherence, accuracy = fit_coherence(means, pairs, seed)
    own = means[own_answers_in(pairs)].double()
    scale = ((own @ weight).std() / (own @ coherence).std()).item()
    figures = {
        "coherence_weight": factor,
        "coherence_accuracy": accuracy.value,
        "coherence_accuracy_se": accuracy.error,
    }
    return weight + factor * scale * coherence, figures


def _scores(training: dict[str, float], held_out: Preferences | None) -> list[Score]:
    right, pairs = "chosen response scored higher", int(training["pairs"])
    accuracy, error = training["accuracy"], training["accuracy_se"]
    of = f"pairs, {FOLDS}-fold cross-validation by prompt"
    scores = [Score(right, accuracy, error, pairs, of)]
    if held_out is not None:
        accuracy, error = training["held_out_accuracy"], training["held_out_accuracy_se"]
        scores.append(Score(right, accuracy, error, len(held_out), "held-out pairs"))
    return scores


def _read_pairs(
    chats: Conversations,
    ends: set[int],
    longest: int,
    options: dpo.Options,
    source: str,
    limit: int | None,
) -> Preferences:
    preferences = read_preferences(source, chats, ends, longest, options, limit)
    if preferences.verdicts:
        raise TrainingError(f"{source}: a probe needs pairs, and there are single verdicts")
    return preferences


def _refuse_few_prompts(pairs: Preferences, source: str) -> None:
    num_prompts = int(prompts_of(pairs).max()) + 1
    if num_prompts < FOLDS:
        raise TrainingError(
            f"{source}: pairs of {num_prompts} prompts cannot be cross-validated: {FOLDS} prompts are needed, and some "
            "hundreds to learn anything"
        )


def _opposite(share: Share) -> Share:
    return Share(1 - share.value, share.error)
