"""A server that learns from its users, over HTTP: `python -m benchmarks.learning --judge DIR`.

**Tastes**: 20 users with four tastes, and one whose verdicts are the opposite of good, share one server with `--learn
mine=own`. Each user requests two answers from its own proxy, if it has one yet, and says which it prefers. After
certain numbers of verdicts, every user's own proxy answers held-out prompts, and its taste compares these answers with
the frozen LLM's.

**Best of 8**: a server with a likelihood judge and `--learn quick=judge` answers requests with `best_of: 8`. After
certain numbers of requests, the proxy learned from the judge's verdicts answers held-out prompts alone, and the
reference scorer compares its answers with the frozen LLM's and with best of 8.

The reference scorer gives the verdicts of the first taste, and grades. The server sees choices only.
"""

import asyncio
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any, Literal

import matplotlib

from benchmarks.engines import Server, serve
from benchmarks.learning.report import markdown, of_taste, plot
from benchmarks.learning.users import HOSTILE, TASTES, Client, User, training_prompts_of, wins
from benchmarks.models import REPOSITORY, get_model
from benchmarks.toy_prompts import held_out_prompts, mean
from judge.options import read_options
from training.toy_data import reference_scorer

matplotlib.use("Agg")

OPERATOR = "operator"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Literal["tastes", "best_of"], ...] = ("tastes", "best_of")
    """What to measure; the metrics of the other part are kept."""
    judge: Path | None = None
    """For best_of: a LoRA from `training.reward_model --lora-rank`."""
    users: int = 5
    """Users of each taste."""
    verdicts: tuple[int, ...] = (0, 10, 30, 100, 300)
    """Numbers of verdicts of each user after which it is evaluated."""
    prompts: int = 50
    """Held-out prompts for each user."""
    requests: tuple[int, ...] = (0, 100, 300, 1000, 3000)
    """Numbers of requests with `best_of: 8` after which the proxy is evaluated."""
    graded: int = 1000
    """Held-out prompts for best of 8."""
    at_once: int = 16
    """Concurrent requests."""
    seed: int = 1
    """Seed of prompts and samples."""
    output: Path = REPOSITORY / "docs" / "results"
    """Directory for learning.json and learning.png."""


async def measure_tastes(server: Server, options: Options) -> list[dict[str, Any]]:
    names = [(taste, i) for taste in TASTES for i in range(options.users)] + [(HOSTILE, 0)]
    turn, rows = asyncio.Semaphore(options.at_once), []
    operator = Client(server, OPERATOR, turn)
    users = [
        User(
            taste,
            Client(server, f"{taste}-{i}", turn),
            held_out_prompts(options.prompts, options.seed + number),
            training_prompts_of(f"{options.seed} {taste} {i}"),
        )
        for number, (taste, i) in enumerate(names)
    ]
    for stage, until in enumerate(options.verdicts):
        start, rng = monotonic(), random.Random(f"{options.seed} {stage}")
        await asyncio.gather(*(user.give_verdicts(until, rng) for user in users))
        passes = (await operator.post("/proxies/mine/learn"))["passes"] if until else []
        seed = options.seed + 10**7 * stage
        grades = await asyncio.gather(*(user.grade(seed, until) for user in users))
        rows += grades
        print(f"{until} verdicts of each, after {monotonic() - start:.0f} s", flush=True)
        for learning_pass in passes:
            print(f"  {learning_pass}", flush=True)
        for taste in (*TASTES, HOSTILE):
            print(f"  {taste}: {of_taste(rows, taste)[-1]}", flush=True)
    for client in (operator, *(user.client for user in users)):
        await client.close()
    return rows


async def measure_best_of(server: Server, options: Options) -> list[dict[str, Any]]:
    turn = asyncio.Semaphore(options.at_once)
    client, prompts = Client(server, OPERATOR, turn), held_out_prompts(options.graded, options.seed)
    training_prompts, rng, num_requests = (
        training_prompts_of(f"{options.seed} best of"),
        random.Random(options.seed),
        0,
    )
    best_of = {"best_of": 8, "judge": {"kind": "likelihood"}}

    async def grade(seed: int, alignment: dict[str, Any]) -> tuple[list[float], float]:
        """Reference scores, and tokens a request, including those that the judge reads."""
        completions = await asyncio.gather(
            *(client.chat(prompt, seed + i, alignment) for i, prompt in enumerate(prompts))
        )
        texts = [completion.choices[0].message.content for completion in completions]
        scores = [reference_scorer.score(*pair) for pair in zip(prompts, texts, strict=True)]
        return scores, fmean(completion.usage.total_tokens for completion in completions)

    frozen, _ = await grade(10**6, {})

    def row(name: str, scores: list[float], tokens: float) -> dict[str, Any]:
        won = mean([wins(*pair) for pair in zip(scores, frozen, strict=True)])
        print(
            f"{name} after {num_requests} requests: {won}, {tokens:.0f} tokens a request",
            flush=True,
        )
        return {"way": name, "requests": num_requests, "win_rate": won, "tokens": tokens}

    rows = []
    for until in options.requests:
        start = monotonic()
        await asyncio.gather(
            *(
                client.chat(next(training_prompts), rng.randrange(2**31), best_of)
                for _ in range(until - num_requests)
            )
        )
        print(f"{until - num_requests} requests in {monotonic() - start:.0f} s", flush=True)
        num_requests = until
        if until:
            print((await client.post("/proxies/quick/learn"))["passes"], flush=True)
        rows.append(row("quick", *await grade(3 * 10**6, {"proxy": "quick"})))
    # Last, because these requests produce verdicts too, on the held-out prompts.
    rows.append(row("best of 8", *await grade(2 * 10**6, best_of)))
    await client.close()
    return rows


def main(options: Options) -> None:
    """Run the parts. Each is written when it is finished, together with the earlier metrics of the other one."""
    if "best_of" in options.parts and options.judge is None:
        raise SystemExit("error: best_of needs --judge")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "learning.json"
    figures: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    if "tastes" in options.parts:
        names = [f"{taste}-{i}" for taste in TASTES for i in range(options.users)]
        with serving([*names, f"{HOSTILE}-0"], "--learn", "mine=own") as server:
            figures["users"] = asyncio.run(measure_tastes(server, options))
        path.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    if options.judge is not None and "best_of" in options.parts:
        with serving([], "--learn", "quick=judge", "--judge", options.judge) as server:
            figures["best_of"] = asyncio.run(measure_best_of(server, options))
        path.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    if "users" in figures:
        plot(figures, options.output / "learning.png")
        print(markdown(figures))


@contextmanager
def serving(names: Sequence[str], *flags: str | Path) -> Iterator[Server]:
    """The demo's LLM with an API key for each name, and the operator's."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        keys = [f"[keys.{name}]\nsha256 = {digest(name)}" for name in names]
        keys.append(f"[keys.{OPERATOR}]\nsha256 = {digest(OPERATOR)}\nadmin = true")
        (root / "access.toml").write_text("\n".join(keys))
        places: list[str | Path] = [
            *("--access", root / "access.toml", "--feedback", root / "feedback.db"),
            *("--proxy-root", root / "proxies"),
        ]
        with serve(get_model("demo"), "assent", {}, [*places, *flags]) as server:
            yield server


def digest(name: str) -> str:
    return f'"{hashlib.sha256(f"sk-{name}".encode()).hexdigest()}"'


if __name__ == "__main__":
    main(read_options(Options, __doc__))
