"""Train a reward model on preference pairs.

    python -m training.reward_model --model runs/base --preferences preferences.jsonl --output runs/reward

`--kind implicit` (the default) trains a copy of the LLM, or a LoRA on it, with the Bradley–Terry (DPO) loss; its reward
is β·log(π_rm/π_ref). `--kind scalar` trains the LLM's body with one linear head, as in RLHF. In small models the
implicit reward detects relations (the wrong object, the wrong fact) that the scalar head does not.

`--kind probe` trains no weight of the LLM: the score is linear in its hidden states, averaged over the response
(`proxy.probe`). One pass over the pairs, then a fit of seconds, with ridge and layer chosen by cross-validation. As a
reward or as the server's judge it costs one pass of the frozen LLM, which is in memory anyway. Preferences about
one aspect, such as harm, say nothing about sense: `--coherence-weight` adds that (`training.coherence`).

`--kind coherence` is a probe that needs prompts only: it knows the LLM's own answers from its answers to other prompts
and from loops. As the judge of best of N it chooses the sample that is most to the point.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from judge.options import NonNegative
from proxy.checkpoint import identify, resolve_model_dir
from proxy.reward_file import RewardFile
from training import checkpoints, dpo, output, probe
from training.console import TrainingError, main_guard, read_options
from training.metrics import TrainerMetrics
from training.models import attention_of, load_tokenizer, loading, refuse_unknown
from training.output import Run
from training.pair_trainer import ScalarTrainer
from training.publish import publish
from training.run_card import write_card


@dataclass(frozen=True, kw_only=True)
class Options(dpo.Options):
    """Options of reward-model training."""

    kind: Literal["implicit", "scalar", "probe", "coherence"] = "implicit"
    """Which kind of reward; see above. `coherence` reads nothing but the prompts of `--preferences`."""
    layers: tuple[PositiveInt, ...] = ()
    """Of a probe: the LLM's layers to choose from. Empty = the last, which is the only one that a server can read."""
    coherence_weight: NonNegative = 0.0
    """Of a probe: weight of a second one, which is added and knows the LLM's own answers from its answers to other
    prompts and from loops. 1 = as much as the preferences; 0 = none.
    """


_PROBES = ("probe", "coherence")
_NOT_OF_A_PROBE = (
    *("beta", "epochs", "batch_size", "learning_rate", "lora_rank", "gradient_checkpointing"),
    "save_every",
)


def main(options: Options) -> None:
    _refuse_unused(options)
    writes = probe.WRITES if options.kind in _PROBES else checkpoints.WRITES
    with output.run(options, "training.reward_model", reads=dpo.READS, writes=writes) as run:
        if not run.is_finished:
            _train(options, run)
            write_card(run, options)
    publish(run, options)


def _train(options: Options, run: Run) -> None:
    if options.kind == "probe":
        probe.train(options, options.layers, options.coherence_weight, run)
        return
    if options.kind == "coherence":
        probe.train_coherence(options, run)
        return
    train = dpo.train if options.kind == "implicit" else _train_scalar
    trainer, tokenizer = train(options, run)
    reward = RewardFile(kind=options.kind, beta=options.beta, base=identify(options.model))
    dpo.save(options, trainer, tokenizer, reward.write)


def _refuse_unused(options: Options) -> None:
    """
    Raises:
        TrainingError: an option that the kind of reward does not have.
    """
    if options.lora_rank and options.kind == "scalar":
        raise TrainingError("--lora-rank is for the implicit reward: the scalar one has no LoRA")
    if options.layers and options.kind != "probe":
        raise TrainingError("--layers is for --kind probe: the other kinds have all layers")
    if options.coherence_weight and options.kind != "probe":
        raise TrainingError("--coherence-weight is for --kind probe: the other kinds have none")
    defaults = {field.name: field.default for field in fields(options)}
    given = [name for name in _NOT_OF_A_PROBE if getattr(options, name) != defaults[name]]
    if given and options.kind in _PROBES:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise TrainingError(
            f"--kind {options.kind} has no {flags}: it is fitted in one go; leave them out"
        )
    if options.held_out is not None and options.kind == "coherence":
        raise TrainingError("--held-out is for preferences: --kind coherence makes its own pairs")


def _train_scalar(options: dpo.Options, run: Run) -> tuple[Any, Any]:
    directory = str(resolve_model_dir(options.model))
    tokenizer = load_tokenizer(directory)
    pairs = dpo.read(options, tokenizer, directory)
    planned = dpo.plan_for(options, pairs, directory)
    torch.manual_seed(options.seed)  # for the new head
    scorer = _scorer(directory)
    refuse_unknown(
        scorer, tokenizer, (ids for split_pairs in pairs for pair in split_pairs for ids in pair)
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise TrainingError("the tokenizer has neither a padding nor an end-of-sequence token")
    # The model finds the last token by it.
    scorer.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    trainer = ScalarTrainer(
        scorer,
        dpo.arguments(options, planned),
        *pairs,
        max_tokens=planned.tokens,
        callbacks=[TrainerMetrics(options), planned.record(options.output)],
    )
    checkpoints.train(trainer, options, run)
    run.scores = dpo.pair_scores(trainer)
    return trainer, tokenizer


def _scorer(directory: str) -> PreTrainedModel:
    with loading("the model with a scalar reward's head, which not every kind can have"):
        return AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=1,
            dtype=torch.float32,
            attn_implementation=attention_of(directory),
        )


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
