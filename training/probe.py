"""Trains a probe: one pass of the frozen LLM over the pairs, then a convex fit that takes seconds.

`training.reward_model` is the command, with `--kind probe` for pairs and `--kind coherence` for prompts.
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
from training.data import read_as
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


class _Reader:
    """The frozen LLM. Its mean states of responses are kept in the output directory."""

    def __init__(self, options: dpo.Options) -> None:
        self.options, self.accelerator = options, start()
        self.base, directory = identify(options.model), str(resolve_model_dir(options.model))
        self.tokenizer = load_tokenizer(directory)
        dtype = "bfloat16" if options.bf16 else "float32"
        self.model = load_model(directory, dtype=getattr(torch, dtype))[0]
        self.model.to(self.accelerator.device).eval().requires_grad_(False)
        self.ends, self.last = end_ids(self.model, self.tokenizer), num_layers_of(self.model)
        self.longest = min(options.max_length, context_of(read_config(directory)))
        self.cache = PartCache(options.output / STATES, self.base, dtype, self.accelerator)

    def own_answers(self, prompts: Sequence[list[int]]) -> Preferences:
        """Pairs of the LLM's own answers (`training.coherence`)."""
        seed = self.options.seed
        return coherence_pairs(
            own_answers(prompts, self.model, self.ends, self.accelerator, seed), seed
        )

    def states_of(self, preferences: Preferences, layers: tuple[int, ...]) -> MeanStates:
        # All layers' states are in memory at once where others than the last are read.
        tokens = MOST_TOKENS[self.accelerator.device.type] // (1 if layers == (self.last,) else 4)
        read = partial(read_means, layers=layers, model=self.model, max_tokens=tokens)
        parts = self.cache.parts(preferences.responses, ["mean states", *layers], read, MeanStates)
        return MeanStates(*map(torch.cat, zip(*parts, strict=True)))

    def save(self, layer: int, weight: Tensor, training: dict[str, float]) -> None:
        probe = ProbeInfo(
            layer=layer, num_layers=self.last, end_ids=sorted(self.ends), training=training
        )
        with saving(self.options.output) as saved:
            save_weight(saved, weight)
            RewardFile(kind="probe", base=self.base, probe=probe).write(saved)


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
    llm = _Reader(options)
    layers = tuple(layers) or (llm.last,)
    if max(layers) > llm.last:
        raise TrainingError(f"--layers {max(layers)}: the LLM has {llm.last} layers")
    read = partial(_read_pairs, Conversations(llm.tokenizer), llm.ends, llm.longest, options)
    pairs, held_out = read(options.preferences, options.max_rows), None
    if options.held_out is not None:
        pairs, held_out = together(pairs, read(options.held_out, None))
    _refuse_few_prompts(int(prompts_of(pairs).max()) + 1, options.preferences)
    refuse_unknown(llm.model, llm.tokenizer, (r.prompt + r.response for r in pairs.responses))
    run.start()
    states, coherence = llm.states_of(pairs, layers), None
    if coherence_weight:
        own = llm.own_answers([pairs.responses[better].prompt for better, _ in pairs.pairs])
        coherence = own, llm.states_of(own, layers)
    if not llm.accelerator.is_main_process:
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
    llm.save(layer, weight, training)


def train_coherence(options: dpo.Options, run: Run) -> None:
    """Have the LLM answer the prompts, and fit a probe to the pairs of `training.coherence` alone.

    Args:
        options: `preferences` names the prompts; the output and the seed.
        run: the output directory.

    Raises:
        TrainingError: there are too few prompts, or the LLM answers all alike.
    """
    llm = _Reader(options)
    chats = Conversations(llm.tokenizer)
    prompts = read_as(
        options.preferences,
        ("prompt",),
        options,
        lambda row: chats.prompt_ids(row["prompt"]),
        options.max_rows,
    )
    prompts = [ids for ids in prompts if len(ids) <= llm.longest]
    _refuse_few_prompts(len(prompts), options.preferences)
    refuse_unknown(llm.model, llm.tokenizer, prompts)
    run.start()
    own = llm.own_answers(prompts)
    states = llm.states_of(own, (llm.last,))
    if not llm.accelerator.is_main_process:
        return
    weight, right = fit_coherence(states.means[:, 0], own, options.seed)
    of = f"pairs of its own answers, {FOLDS}-fold cross-validation by prompt"
    better = "own answer scored higher than one to another prompt or a loop"
    run.scores = [Score(better, right.value, right.error, len(own), of)]
    figures = {"coherence_accuracy": right.value, "coherence_accuracy_se": right.error}
    llm.save(llm.last, weight, figures | {"pairs": len(own)})


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


def _refuse_few_prompts(num_prompts: int, source: str) -> None:
    if num_prompts < FOLDS:
        raise TrainingError(
            f"{source}: {num_prompts} prompts within --max-length cannot be cross-validated: {FOLDS} are needed, and "
            "some hundreds to learn anything"
        )


def _opposite(share: Share) -> Share:
    return Share(1 - share.value, share.error)
