"""Judge-augmented supervised fine-tuning (JSFT, arXiv 2402.11253): one model learns to answer and to judge.

    python -m training.jsft --model DIR --sft sft.jsonl --preferences preferences.jsonl --output DIR

The data is the SFT data plus two judgments of every preference pair, one in each order. A judgment is a single token,
followed by the rationale if the pair has one. In the paper a verdict has the weight of any other token; here
`judge_weight` sets it, because one token in fifty trains a small model slowly.

With `--lora-rank` the weights stay unchanged: the judge is a LoRA on the model, the model answers as before, and
`--sft` is optional.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt

from judge.options import Positive
from judge.principles import FILE_NAME, principles_of, read_principles, write_principles
from proxy.checkpoint import identify, resolve_model_dir
from proxy.reward_file import RewardFile
from training import output, supervised
from training.checkpoints import WRITES
from training.console import TrainingError, main_guard, read_options
from training.conversations import Conversations
from training.judgments import judgment_examples, read_pairs
from training.models import context_of, load_tokenizer, read_config
from training.output import Run
from training.publish import publish
from training.run_card import write_card
from training.supervised import read_answers, train


@dataclass(frozen=True, kw_only=True)
class Options(supervised.Options):
    """Options of judge-augmented supervised fine-tuning."""

    sft: str | None = None
    """JSON lines or Parquet of `messages`, or a data set's name; the last assistant turn is learned."""
    preferences: tuple[str, ...]
    """Sources of pairs: JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name. A pair may
    have a `principle`, and a `rationale_chosen` with a `rationale_rejected`.
    """
    principles: Path | None = None
    """TOML, YAML or JSON file of the principles that pairs name; a pair without one uses the first. None = the model's
    own, else the built-in one.
    """
    judge_weight: Positive = 8.0
    """Loss weight of a verdict, in answer tokens."""
    lora_rank: NonNegativeInt = 0
    """Rank of a LoRA on all linear layers, trained instead of the weights; 0 = none."""


def main(options: Options) -> None:
    if options.sft is None and not options.lora_rank:
        raise TrainingError(
            "without --sft the model would forget how to answer: give it, or train a LoRA with --lora-rank"
        )
    reads = ("model", "sft", "preferences", "principles")
    with output.run(options, "training.jsft", reads=reads, writes=WRITES) as run:
        if not run.is_finished:
            _train(options, run)
            write_card(run, options)
    publish(run, options)


def _train(options: Options, run: Run) -> None:
    directory = resolve_model_dir(options.model)
    principles = (
        read_principles(options.principles) if options.principles else principles_of(directory)
    )
    tokenizer = load_tokenizer(str(directory))
    chats = Conversations(tokenizer)
    answers = read_answers(options.sft, chats, options) if options.sft else []
    pairs = [
        row for source in options.preferences for row in read_pairs(source, principles, options)
    ]
    judgments = list(
        judgment_examples(
            pairs,
            tokenizer,
            principles,
            label_weight=options.judge_weight,
            prompt_weight=options.prompt_weight,
            max_tokens=min(options.max_length, context_of(read_config(str(directory)))),
        )
    )
    print(f"{len(answers)} answers and {len(judgments)} judgments")

    def add(saved: Path) -> None:
        write_principles(saved / FILE_NAME, principles)
        if options.lora_rank:
            RewardFile(kind="judge", base=identify(options.model)).write(saved)

    train(tokenizer, answers + judgments, options, run, options.lora_rank, add)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
