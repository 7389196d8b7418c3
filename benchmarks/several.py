"""What several proxies do together, on the toy data: `python -m benchmarks.several`.

For each of three principles a proxy is trained on pairs that differ by it, as a noisy labeller sees them: 3,000 pairs,
by `training.proxy_dpo`. Then every set of these proxies, each at strength 1, answers the same held-out prompts in one
engine. The reference scorer grades: how often an answer scores higher than the frozen LLM's, and which flaws it has.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from benchmarks.engines import make_llm
from benchmarks.models import REPOSITORY, get_model
from benchmarks.toy_prompts import DATA_SEED, held_out_prompts
from judge.options import Seed, read_options
from proxy.checkpoint import CONFIG_FILE
from proxy.request import WorkerAlignment
from training import proxy_dpo
from training.conversations import Conversations
from training.models import load_tokenizer
from training.policy import Decoding
from training.toy_data.files import draw_prompts, judgment_rows, split_combinations
from training.toy_data.grading import flaw_rates, win_rate
from training.toy_data.principles import QUALITIES

PRINCIPLES = ("relevance", "safety", "faithfulness")
SEED_BLOCK = 1_000_000  # of a row's answers


@dataclass(frozen=True)
class Options:
    """What to measure."""

    num_pairs: PositiveInt = 3000
    """Pairs for each proxy."""
    num_prompts: PositiveInt = 1000
    """Prompts of held-out combinations of topic and intent."""
    seed: Seed = 1
    """Seed of prompts and answers."""
    work: Path = REPOSITORY / "runs" / "several"
    """Directory of the proxies, which are trained if they are not there, and of figures.json."""


def pairs_by_principle(count: int) -> dict[str, list[dict[str, Any]]]:
    """`count` pairs by each principle, the first of those that `training.world` writes."""
    combinations_to_train, _, _ = split_combinations(DATA_SEED)
    rng = random.Random(f"{DATA_SEED} judgments")
    rows = judgment_rows(draw_prompts(combinations_to_train, rng), count * len(QUALITIES), rng)
    by_principle: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        pair = {key: row[key] for key in ("prompt", "chosen", "rejected")}
        by_principle.setdefault(row["principle"], []).append(pair)
    return by_principle


def train(options: Options, model: Path) -> dict[str, Path]:
    """The proxies' directories, by principle."""
    options.work.mkdir(parents=True, exist_ok=True)
    pairs = pairs_by_principle(options.num_pairs)
    directories = {name: options.work / name for name in PRINCIPLES}
    for name, directory in directories.items():
        if not (directory / CONFIG_FILE).exists():
            file = options.work / f"{name}.jsonl"
            file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[name]))
            settings = proxy_dpo.Options(model=str(model), preferences=str(file), output=directory)
            proxy_dpo.main(settings)
    return directories


def subsets() -> Iterator[tuple[str, ...]]:
    """Every set of the principles; the empty one is the frozen LLM."""
    sizes = range(len(PRINCIPLES) + 1)
    return chain.from_iterable(combinations(PRINCIPLES, size) for size in sizes)


class Engine:
    """The frozen LLM with the proxies."""

    def __init__(self, options: Options) -> None:
        model, decoding = get_model("demo"), Decoding()
        proxies = train(options, model.directory)
        self.texts = held_out_prompts(options.num_prompts, options.seed)
        chats = Conversations(load_tokenizer(str(model.directory)))
        self._prompts = [chats.prompt_ids([{"role": "user", "content": t}]) for t in self.texts]
        self._decoding = decoding
        self._llm = make_llm(model)
        for name, directory in proxies.items():
            self._llm.collective_rpc("load_proxy", args=(name, str(directory)))

    def answer(self, names: Sequence[str], block: int) -> tuple[list[str], dict[str, int]]:
        """Answers under these proxies, and what was proposed and rejected."""
        from vllm import SamplingParams

        alignment = WorkerAlignment(proxies=dict.fromkeys(names, 1.0)) if names else None
        params = [
            SamplingParams(
                temperature=self._decoding.temperature,
                top_k=self._decoding.top_k,
                top_p=self._decoding.top_p,
                max_tokens=self._decoding.max_new_tokens,
                seed=SEED_BLOCK * block + index,
                extra_args=None if alignment is None else alignment.to_extra_args(),
            )
            for index in range(len(self._prompts))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in self._prompts]
        outputs = self._llm.generate(prompts, params)
        ids = [output.request_id for output in outputs]
        (counts,) = self._llm.collective_rpc("take_alignment_counts", args=(ids,))
        totals = {
            key: sum(entry[key] for entry in counts.values())
            for key in ("proposed", "rejected", "forced")
        }
        return [output.outputs[0].text for output in outputs], totals


def measure(options: Options) -> list[dict[str, Any]]:
    """A row for each set of proxies."""
    engine = Engine(options)
    frozen, _ = engine.answer((), options.seed)
    rows = []
    for number, names in enumerate(subsets(), start=1):
        texts, totals = engine.answer(names, options.seed + number)
        rate, error = win_rate(engine.texts, texts, frozen)
        rows.append(
            {"proxies": names, "prompts": len(texts), "win_rate": rate, "win_rate_se": error}
            | {"flaw_rates": flaw_rates(engine.texts, texts)}
            | totals
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = [
        f"| proxies | gold win rate | {' | '.join(QUALITIES.values())} | any flaw | rejected |"
    ]
    lines.append("|---" * (len(QUALITIES) + 4) + "|")
    for row in rows:
        rates = [row["flaw_rates"][quality] for quality in (*QUALITIES.values(), "any")]
        rejected = f"{row['rejected'] / row['proposed']:.0%}" if row["proposed"] else ""
        cells = [
            " + ".join(f"`{name}`" for name in row["proxies"]) or "none, other seeds",
            f"{row['win_rate']:.1%} ± {row['win_rate_se']:.1%}",
            *(f"{rate:.1%}" for rate in rates),
            rejected,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    rows = measure(options)
    (options.work / "figures.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main(read_options(Options, __doc__))
