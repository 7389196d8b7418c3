"""Compare a proxy with the frozen LLM on prompts that it was not trained on.

    python -m training.evaluate --model runs/base --proxy runs/proxy --prompts held_out.jsonl --reward runs/reward

Both answer every prompt, and each `--reward` scores both answers. Without `--reward` the prompts must be those of the
toy data, and its reference scorer decides which answer is better. `docs/metrics.md` defines the metrics.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from judge.options import Seed
from proxy.checkpoint import identify, load, resolve_model_dir
from proxy.hub import resolve_dir
from training import blind
from training.console import TrainingError, main_guard, read_options
from training.conversations import Conversations
from training.data import Message, Row, RowOptions, read_as
from training.memory import responses_at_once
from training.model_card import CARD_FILE, Score, add_scores
from training.models import end_ids, load_model, load_tokenizer, refuse_unknown
from training.output import check_file
from training.policy import Decoding, Policy
from training.reward_loading import load_reward, reward_bytes
from training.rewards import Frozen, Sample
from training.rollout import Rollout, generate
from training.run_marker import write_whole
from training.sizes import sizes_of

Answers = list[Sample]


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """What to compare, and how."""

    model: str
    """The frozen LLM: a directory or a hub id."""
    proxy: Path
    """A proxy checkpoint: a directory, or a repository of the Hub, `org/repo` or `org/repo@revision`."""
    prompts: str
    """JSON lines or Parquet of `prompt`, or a data set's name."""
    reward: tuple[str, ...] = ()
    """Rewards to compare by, as `training.proxy_ppo` takes them; none = the reference scorer of the toy data."""
    num_prompts: PositiveInt = 500
    """Use only the first prompts, up to this number."""
    strength: Annotated[float, Field(ge=0, le=16)] = 1.0
    """Strength of the proxy: 0 = the frozen LLM, above 1 = stricter than trained."""
    decoding: Decoding = field(default_factory=Decoding)
    """Decoding of both."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen LLM."""
    batch_size: PositiveInt = 256
    """Responses at once in the device's memory."""
    output: Path | None = None
    """A JSON file for the metrics."""
    blind: Path | None = None
    """Directory for the answers of both, unlabelled and in random order, to be read blind; `key.json` says whose they
    are.
    """
    overwrite: bool = False
    """Replace these files if they exist."""
    card: bool = False
    """Add the figures to the proxy's model card."""
    seed: Seed = 1
    """Seed of the proxied answers; that of the frozen LLM's answers is derived from it."""


def read_prompts(
    options: Options, chats: Conversations
) -> tuple[list[list[Message]], list[list[int]]]:
    """The prompts as messages and as token ids."""

    def convert(row: Row) -> tuple[list[Message], list[int]]:
        return row["prompt"], chats.prompt_ids(row["prompt"])

    rows = read_as(options.prompts, ("prompt",), options, convert, options.num_prompts)
    return [messages for messages, _ in rows], [ids for _, ids in rows]


def evaluate(options: Options) -> dict[str, Any]:
    """The metrics of one comparison."""
    base = identify(options.model)
    directory, dtype = str(resolve_model_dir(options.model)), getattr(torch, options.dtype)
    tokenizer = load_tokenizer(directory)
    chosen, prompts = read_prompts(options, Conversations(tokenizer))
    batch_size = responses_at_once(
        sizes_of(directory),
        options.batch_size,
        max(map(len, prompts)),
        options.decoding.max_new_tokens,
        dtype.itemsize,
        sum(reward_bytes(name, dtype) for name in options.reward),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(directory, dtype=dtype)[0]
    model.to(device).eval()
    proxy = load(resolve_dir(options.proxy), base=base)
    proxy.network.to(device)
    ends = end_ids(model, tokenizer)
    frozen = Frozen(model, tokenizer, base, options.decoding, ends, batch_size)
    rewards = {name: load_reward(name, frozen) for name in options.reward}
    refuse_unknown(model, tokenizer, prompts)

    def answer(policy: Policy, seeds: Iterable[int], measure_kl: bool) -> tuple[Rollout, Answers]:
        rollout = generate(
            policy,
            prompts,
            options.decoding,
            end_ids=frozen.end_ids,
            seeds=seeds,
            measure_kl=measure_kl,
            batch_size=batch_size,
        )
        texts = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        return rollout, list(map(Sample, chosen, texts, prompts, rollout.responses))

    first = options.seed * 2**32
    _, frozen_answers = answer(Policy(model), count(first + 2**31), measure_kl=False)
    policy = Policy(model, proxy.network, options.strength)
    # The divergence of two greedy policies is either 0 or infinite.
    rollout, proxied = answer(policy, count(first), measure_kl=options.decoding.temperature > 0)
    if options.blind:
        texts = {
            name: [sample.text for sample in samples]
            for name, samples in {"frozen": frozen_answers, "proxied": proxied}.items()
        }
        blind.write(options.blind, chosen, texts)
    figures: dict[str, Any] = {
        "prompts": len(chosen),
        "seed": options.seed,
        "proxy_version": proxy.version,
        "strength": options.strength,
        **describe(rollout),
        "tokens_per_response_frozen": fmean(len(sample.response_ids) for sample in frozen_answers),
    }
    if rollout.kl is not None:
        figures["kl_nats_per_response"] = rollout.kl.mean().item()
        figures["kl_nats_per_response_se"] = standard_error(rollout.kl)
    if not rewards:
        return figures | _graded_by_reference_scorer(proxied, frozen_answers)
    by_reward = {
        name: compare(reward(proxied), reward(frozen_answers)) for name, reward in rewards.items()
    }
    return figures | {"rewards": by_reward}


def describe(rollout: Rollout) -> dict[str, float]:
    """Metrics of a proxy's rollout."""
    counts = rollout.counts
    return {
        "acceptance_rate": 1 - counts.rejected / counts.proposed,
        "rejections_per_token": counts.rejected / counts.tokens,
        "forced_rate": counts.forced / counts.tokens,
        "tokens_per_response": counts.tokens / len(rollout.responses),
    }


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean of [N] values; None for a single value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def compare(proxied: Tensor, frozen: Tensor) -> dict[str, float | None]:
    """Metrics from the scores [N] of two answers to each prompt."""
    gains = (proxied - frozen).double()
    wins = (gains.sign() + 1) / 2
    return {
        "win_rate": wins.mean().item(),
        "win_rate_se": standard_error(wins),
        "frozen": frozen.mean().item(),
        "proxied": proxied.mean().item(),
        "gain": gains.mean().item(),
        "gain_se": standard_error(gains),
    }


def _graded_by_reference_scorer(
    proxied_samples: Answers, frozen_samples: Answers
) -> dict[str, Any]:
    from training.toy_data.grading import flaw_rates, win_rate  # not loaded where rewards compare

    texts = [sample.messages[-1]["content"] for sample in proxied_samples]
    proxied, frozen = (
        [sample.text for sample in answers] for answers in (proxied_samples, frozen_samples)
    )
    try:
        rate, error = win_rate(texts, proxied, frozen)
    except KeyError as unknown:
        raise TrainingError(
            f"{unknown} is not a prompt of the toy data: name rewards to compare by with --reward"
        ) from None
    return {
        "gold_win_rate": rate,
        "gold_win_rate_se": error if len(proxied_samples) > 1 else None,
        "flaw_rates": {"frozen": flaw_rates(texts, frozen), "proxied": flaw_rates(texts, proxied)},
    }


def show(figures: dict[str, Any]) -> None:
    """Print the metrics."""
    table = Table("figure", "value", title=f"{figures['prompts']} prompts, seed {figures['seed']}")
    for name, value in figures.items():
        if isinstance(value, float) or value is None:
            table.add_row(name, _shown(value))
    console = Console()
    console.print(table)
    for reward, scores in figures.get("rewards", {}).items():
        score_table = Table("by the reward", reward)
        for name, value in scores.items():
            score_table.add_row(name, _shown(value))
        console.print(score_table)
    if "flaw_rates" in figures:
        flaws = Table("flaw", "frozen", "proxied")
        rates = figures["flaw_rates"]
        for quality, frozen in rates["frozen"].items():
            flaws.add_row(quality, f"{frozen:.1%}", f"{rates['proxied'][quality]:.1%}")
        console.print(flaws)


def card_scores(options: Options, figures: dict[str, Any]) -> list[Score]:
    """The figures in the form of a model card."""
    of = f"prompts of `{options.prompts}`, strength {options.strength:g}, seed {options.seed}"
    gold = {name: figures.get(f"gold_{name}") for name in ("win_rate", "win_rate_se")}
    by_reward = figures.get("rewards") or {"the reference scorer": gold}
    count = figures["prompts"]
    scores = [
        Score(f"share of answers that win against the frozen LLM's, by {name}",
              found["win_rate"], found["win_rate_se"], count, of)
        for name, found in by_reward.items()
    ]  # fmt: skip
    if "kl_nats_per_response" in figures:
        kl, error = figures["kl_nats_per_response"], figures["kl_nats_per_response_se"]
        scores.append(Score("KL(proxied ‖ frozen), nats a response", kl, error, count, of))
    scores.append(Score("candidates accepted", figures["acceptance_rate"], None, count, of))
    return scores


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def main(options: Options) -> None:
    card = options.proxy / CARD_FILE
    if options.card and not card.is_file():
        raise TrainingError(f"--card: there is no {card}: train the proxy, which writes it")
    written = [options.output] if options.output else []
    if options.blind:
        written += [options.blind / name for name in (blind.ANSWERS_FILE, blind.KEY_FILE)]
    for target in written:
        check_file(target, options, reads=("model", "proxy", "prompts", "reward"))
    figures = evaluate(options)
    show(figures)
    if options.output:
        write_whole(options.output, json.dumps(figures, indent=2, allow_nan=False) + "\n")
    if options.card:
        text = card.read_text(encoding="utf-8")
        write_whole(card, add_scores(text, card_scores(options, figures)))


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
