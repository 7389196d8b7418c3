"""Build a small untrained Llama with its tokenizer and chat template, for machines that cannot download a model.

    python -m training.base_model --corpus world/sft.jsonl world/preferences.jsonl --output runs/untrained

The tokenizer is a byte-level BPE. It is trained on the corpus as the model will read it: on chats and, where the corpus
has preference pairs, on judgments of them. Weights are random: train them with `training.jsft` or `training.sft`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from judge.messages import text_of
from judge.options import PositiveShare, Seed
from judge.principles import DEFAULT
from judge.prompts import LABELS, Question, judge_messages
from training import output
from training.console import TrainingError, main_guard, read_options
from training.data import Row, RowOptions, read_rows
from training.saving import MODEL_FILES, saving

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if not (continue_final_message and loop.last) %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """Options of the model. The defaults are the bundled demo's."""

    corpus: tuple[Path, ...]
    """JSON-lines files (`messages`, or `prompt` with `chosen` and `rejected`) to train the tokenizer on."""
    output: Path
    """Directory for the model."""
    vocab_size: Annotated[int, Field(ge=261)] = 1536
    """Entries of the tokenizer, at most."""
    hidden_size: PositiveInt = 256
    """Width of the hidden states, H."""
    num_layers: PositiveInt = 4
    """Transformer layers."""
    num_heads: PositiveInt = 4
    """Attention heads of each layer."""
    intermediate_size: PositiveInt = 688
    """Width of the feed-forward layers."""
    context: PositiveInt = 1024
    """Longest sequence, in tokens."""
    top_k: NonNegativeInt = 16
    """Default top-k, written to generation_config.json."""
    top_p: PositiveShare = 0.95
    """Default top-p."""
    max_corpus_rows: PositiveInt = 20_000
    """Rows of each corpus file that the tokenizer is trained on."""
    overwrite: bool = False
    """Replace the files of an earlier run of this command in the output directory; other files stay."""
    seed: Seed = 0
    """Seed of the random weights."""


def corpus_texts(rows: list[Row]) -> Iterator[str]:
    """The texts of chats as the model will read them, judgments included."""
    for row in rows:
        if "messages" in row:
            yield from map(text_of, row["messages"])
            continue
        question = Question(row["prompt"], text_of(row["chosen"][0]), text_of(row["rejected"][0]))
        *question_turns, prefix = judge_messages(question, DEFAULT["overall"])
        yield from (message["content"] for message in question_turns)
        yield from (prefix["content"] + label for label in LABELS)


def build_tokenizer(texts: Iterator[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(options: Options, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama with tied embeddings, sized for this tokenizer."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def main(options: Options) -> None:
    if options.hidden_size % (2 * options.num_heads):  # rotary embeddings rotate pairs
        raise TrainingError(
            f"--hidden-size {options.hidden_size} is not an even multiple of --num-heads {options.num_heads}"
        )
    with output.run(options, "training.base_model", reads=("corpus",), writes=MODEL_FILES) as run:
        limit = options.max_corpus_rows
        rows = [row for path in options.corpus for row in read_rows(path, options=options)[:limit]]
        tokenizer = build_tokenizer(corpus_texts(rows), options.vocab_size, options.context)
        model = build_model(options, tokenizer)
        run.start()
        with saving(options.output) as directory:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    print(f"{options.output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
