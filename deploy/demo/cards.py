"""Writes the model cards of the demos' proxies: `python -m deploy.demo.cards`, after `make demo` and `benchmarks.demo`.

The checkpoints say how they were trained, `figures.json` what the toy demo's score; SmolLM2's scores are those of
`deploy/demo/README.md`.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from judge.sources import raw_rows
from proxy.checkpoint import load
from training import proxy_ppo
from training.model_card import Card, DataFile, Score
from training.policy import Decoding
from training.run_card import command_of, settings_that_differ

DEMO = Path(__file__).parent
TOY = DEMO / "proxies"
PLAIN = DEMO / "smollm2" / "proxies" / "plain"
ABOUT = {
    "aligned": "Trained on preferences for overall quality.",
    "polite": "Trained on pairs of answers that differ in manners alone.",
}
LIMITS = {
    "aligned": "14 % of its answers state the wrong fact or none, 7 % name the wrong object.",
    "polite": "It removes all rudeness (12 % to 0 %), and names the wrong object or none in 27 % of the answers (the "
    "frozen LLM: 13 %): its reward knows nothing but manners.",
}


def options_of(record: dict[str, Any], output: Path) -> proxy_ppo.Options:
    """The options that a checkpoint records."""
    known = {field.name for field in fields(proxy_ppo.Options)}
    given = {key: value for key, value in record.items() if key in known}
    return proxy_ppo.Options(
        **given | {"output": output, "decoding": Decoding(**record["decoding"])}
    )


def toy_card(name: str) -> Card:
    """The card of one of the toy demo's proxies."""
    checkpoint = load(TOY / name, base=None)
    record: dict[str, Any] = checkpoint.training["options"]
    options = options_of(record, Path(record["output"]))
    rows = json.loads((DEMO / "figures.json").read_bytes())["rows"]
    row = next(row for row in rows if row["name"] == f"proxy `{name}`")
    count, flaws = row["prompts"], row["flaw_rates"]["any"]
    of, last = "held-out test prompts, one training seed", checkpoint.training["last"]
    return Card(
        name=name,
        kind="proxy",
        base=checkpoint.base,
        license="apache-2.0",
        about=f"{ABOUT[name]} It is the toy demo of Assent: the LLM, in `deploy/demo/model`, speaks only of household "
        "things, and was taught bad habits on purpose. `deploy/demo/README.md` says how both were made.",
        parameters=checkpoint.network.num_parameters(),
        data=[DataFile("prompts", record["prompts"], 8000)],
        command=command_of("training.proxy_ppo", options),
        settings=settings_that_differ(options),
        metrics=last,
        scores=[
            Score("share of answers that win against the frozen LLM's, by the reference scorer, ties half",
                  row["win_rate"], row["win_rate_se"], count, of),
            Score("answers with a flaw", flaws, (flaws * (1 - flaws) / count) ** 0.5, count, of),
            Score("candidates accepted", row["acceptance_rate"], None, count, of),
            Score(f"reward (`{options.reward}`)", last["reward"], last["reward_se"], options.episodes,
                  "responses of the last update"),
        ],
        decoding=checkpoint.config,
        serve="make serve DEMO=toy",
        limits=[LIMITS[name]],
    )  # fmt: skip


def plain_card() -> Card:
    """The card of SmolLM2's proxy."""
    checkpoint = load(PLAIN, base=None)
    options = options_of(checkpoint.training["options"], Path("runs/plain"))
    last = checkpoint.training["last"]
    count = sum(1 for _ in raw_rows(str(DEMO / "smollm2" / "prompts" / "train.jsonl")))
    readers = "test prompts, by two blind readers in both orders"
    return Card(
        name="plain",
        kind="proxy",
        base=checkpoint.base,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        about="It prefers plain language: short sentences and common words. It is an experiment. The LLM is the 4-bit "
        "conversion of `deploy/demo/smollm2/convert.py`, whose fingerprint is not that of the original weights. PPO "
        "with a readability formula (`deploy/demo/smollm2/rewards.py`) and a probe of coherence as reward.",
        parameters=checkpoint.network.num_parameters(),
        data=[DataFile("prompts", options.prompts, count)],
        command=command_of("training.proxy_ppo", options),
        settings=settings_that_differ(options),
        metrics=last,
        scores=[
            Score("wins: which is plainer", 0.630, 0.043, 100, readers),
            Score("wins: which is better apart from that", 0.485, 0.047, 100, readers),
            Score("wins by Dale-Chall score, which no training saw", 0.556, 0.023, 150, "test prompts, three seeds"),
            Score("wins by the formula of the training", 0.702, 0.021, 150, "test prompts, three seeds"),
            Score("candidates accepted", last["acceptance_rate"], None, options.episodes,
                  "responses of the last update"),
        ],
        decoding=checkpoint.config,
        serve="make serve",
        limits=[
            "A system prompt that asks for plain language is as plain to blind readers, and better apart from that "
            "(the proxy's answers were chosen in 47.2 ± 4.7 % and 41.5 ± 4.7 % of 100 test prompts).",
            "The scores are of one training seed, 128 tokens, temperature 0.3.",
        ],
    )  # fmt: skip


def main() -> None:
    for name in ABOUT:
        toy_card(name).write(TOY / name)
    plain_card().write(PLAIN)


if __name__ == "__main__":
    main()
