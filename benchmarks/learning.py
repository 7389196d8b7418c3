"""A server that learns from those who use it, over HTTP: `python -m benchmarks.learning --judge DIR`.

**Tastes**: 20 users of four tastes, and one whose verdicts are the opposite of good, share one server with `--learn
mine=own`. Each asks for two answers with its own proxy, as far as it has one, and says which it likes better. After so
many verdicts of each, every user's own proxy answers held-out prompts, and its taste compares that with an answer of
the frozen LLM's.

**Best of 8**: a server with a likelihood judge and `--learn quick=judge` answers requests with `best_of: 8`. After so
many requests the proxy that was learned of the judge's verdicts answers held-out prompts alone, and the gold scorer
compares that with the frozen LLM and with best of 8.

The gold scorer gives the verdicts of the first taste, and grades; the server sees choices alone.
"""

import asyncio
import hashlib
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any, Literal

import httpx
import matplotlib
from matplotlib import pyplot
from openai import AsyncOpenAI

from benchmarks.dial import WORLD_SEED, held_out_prompts, mean
from benchmarks.engines import Server, serve
from benchmarks.models import REPOSITORY, get_model
from judge.options import read_options
from training.world import gold
from training.world.__main__ import draw_prompts, split_combinations

matplotlib.use("Agg")

OPERATOR = "operator"
WAIT_SECONDS = 1800.0

Taste = Callable[[str, str], float]
"""Prompt, answer -> the higher, the better."""


def words(text: str) -> int:
    return len(re.findall(r"\w+", text))


TASTES: dict[str, Taste] = {
    "quality": gold.score,
    "manners": lambda prompt, text: float("manners" not in gold.flaws(prompt, text)),
    "brief": lambda prompt, text: -words(text),
    "detailed": lambda prompt, text: words(text),
}
MOST_ASKED = 4
"""Requests for a verdict."""
HOSTILE = "hostile"
"""Likes what the gold scorer likes least."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Literal["tastes", "best_of"], ...] = ("tastes", "best_of")
    """What to measure; the figures of the other part stay."""
    judge: Path | None = None
    """For best_of: a LoRA from `training.reward_model --lora-rank`."""
    users: int = 5
    """Of each taste."""
    verdicts: tuple[int, ...] = (0, 10, 30, 100, 300)
    """Of each user, when it is measured."""
    prompts: int = 50
    """Held out, for each user."""
    requests: tuple[int, ...] = (0, 100, 300, 1000, 3000)
    """With `best_of: 8`, when it is measured."""
    graded: int = 1000
    """Prompts held out, of these."""
    at_once: int = 16
    """Requests under way."""
    seed: int = 1
    """Of prompts and samples."""
    output: Path = REPOSITORY / "docs" / "results"
    """Directory for learning.json and learning.png."""


def asked_prompts(seed: str) -> Iterator[str]:
    """Of the training's split, without an end."""
    prompts = draw_prompts(split_combinations(WORLD_SEED)[0], random.Random(seed))
    return (prompt.text for prompt in prompts)


class Client:
    """One key's, of a server."""

    def __init__(self, server: Server, name: str, turn: asyncio.Semaphore) -> None:
        """
        Args:
            turn: for a few requests at a time, of all clients together.
        """
        self.name, self._model, self._turn = name, server.model, turn
        key = f"sk-{name}"
        self._openai = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=WAIT_SECONDS)
        # uvicorn closes idle connections after 5 s; whoever asks through one just then is no lost request.
        self._http = httpx.AsyncClient(
            base_url=server.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=WAIT_SECONDS,
            limits=httpx.Limits(keepalive_expiry=2),
        )

    async def chat(self, prompt: str, seed: int, alignment: dict[str, Any], n: int = 1) -> Any:
        async with self._turn:
            return await self._openai.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                seed=seed,
                n=n,
                max_tokens=64,
                extra_body={"alignment": alignment},
            )

    async def post(self, path: str, body: Any = None) -> Any:
        answer = await self._http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    async def close(self) -> None:
        await self._openai.close()
        await self._http.aclose()


@dataclass
class User:
    """Somebody with a taste."""

    taste_name: str
    client: Client
    held_out: Sequence[str]
    asked: Iterator[str]
    sent: int = 0
    """Verdicts."""

    def taste(self, prompt: str, text: str) -> float:
        if self.taste_name == HOSTILE:
            return -gold.score(prompt, text)
        return TASTES[self.taste_name](prompt, text)

    async def give_verdicts(self, until: int, rng: random.Random) -> None:
        """Two answers of its own proxy each time, and which is better.

        Ties are passed over: the better the proxy, the more there are of some tastes, so it asks a few times as often
        and no more.
        """
        for prompt in islice(self.asked, MOST_ASKED * (until - self.sent)):
            if self.sent == until:
                break
            found = await self.client.chat(prompt, rng.randrange(2**31), {"proxy": "mine"}, n=2)
            first, second = (self.taste(prompt, each.message.content) for each in found.choices)
            if first != second:
                body = {"request_id": found.id, "choice": int(second > first)}
                await self.client.post("/feedback", body)
                self.sent += 1

    async def grade(self, seed: int, verdicts: int) -> dict[str, Any]:
        """Its own proxy, learned of so many verdicts, against the frozen LLM, by its taste."""

        async def pair(number: int, prompt: str) -> tuple[str, str, bool]:
            own = await self.client.chat(prompt, seed + number, {"proxy": "mine"})
            frozen = await self.client.chat(prompt, seed + 10**6 + number, {})
            texts = [each.choices[0].message.content for each in (own, frozen)]
            return texts[0], texts[1], own.alignment["proxy"] is not None

        found = await asyncio.gather(*(pair(i, prompt) for i, prompt in enumerate(self.held_out)))
        asked = [*zip(self.held_out, found, strict=True)]
        return {
            "taste": self.taste_name,
            "user": self.client.name,
            "verdicts": verdicts,
            "sent": self.sent,
            "wins": [
                wins(self.taste(p, own), self.taste(p, other)) for p, (own, other, _) in asked
            ],
            "flawed": [bool(gold.flaws(p, own)) for p, (own, _, _) in asked],
            "has_proxy": found[0][2],
        }


async def measure_tastes(server: Server, options: Options) -> list[dict[str, Any]]:
    names = [(taste, i) for taste in TASTES for i in range(options.users)] + [(HOSTILE, 0)]
    turn, rows = asyncio.Semaphore(options.at_once), []
    operator = Client(server, OPERATOR, turn)
    users = [
        User(
            taste,
            Client(server, f"{taste}-{i}", turn),
            held_out_prompts(options.prompts, options.seed + number),
            asked_prompts(f"{options.seed} {taste} {i}"),
        )
        for number, (taste, i) in enumerate(names)
    ]
    for stage, until in enumerate(options.verdicts):
        start, rng = monotonic(), random.Random(f"{options.seed} {stage}")
        await asyncio.gather(*(user.give_verdicts(until, rng) for user in users))
        passes = (await operator.post("/proxies/mine/learn"))["passes"] if until else []
        seed = options.seed + 10**7 * stage
        found = await asyncio.gather(*(user.grade(seed, until) for user in users))
        rows += found
        print(f"{until} verdicts of each, after {monotonic() - start:.0f} s", flush=True)
        for each in passes:
            print(f"  {each}", flush=True)
        for taste in (*TASTES, HOSTILE):
            print(f"  {taste}: {of_taste(rows, taste)[-1]}", flush=True)
    for client in (operator, *(user.client for user in users)):
        await client.close()
    return rows


async def measure_best_of(server: Server, options: Options) -> list[dict[str, Any]]:
    turn = asyncio.Semaphore(options.at_once)
    client, prompts = Client(server, OPERATOR, turn), held_out_prompts(options.graded, options.seed)
    asked, rng, done = asked_prompts(f"{options.seed} best of"), random.Random(options.seed), 0
    best_of = {"best_of": 8, "judge": {"kind": "likelihood"}}

    async def grade(seed: int, alignment: dict[str, Any]) -> tuple[list[float], float]:
        """Gold scores, and tokens a request, those that the judge reads included."""
        found = await asyncio.gather(
            *(client.chat(prompt, seed + i, alignment) for i, prompt in enumerate(prompts))
        )
        texts = [each.choices[0].message.content for each in found]
        scores = [gold.score(*pair) for pair in zip(prompts, texts, strict=True)]
        return scores, fmean(each.usage.total_tokens for each in found)

    frozen, _ = await grade(10**6, {})

    def row(name: str, scores: list[float], tokens: float) -> dict[str, Any]:
        won = mean([wins(*pair) for pair in zip(scores, frozen, strict=True)])
        print(f"{name} after {done} requests: {won}, {tokens:.0f} tokens a request", flush=True)
        return {"way": name, "requests": done, "win_rate": won, "tokens": tokens}

    rows = []
    for until in options.requests:
        start = monotonic()
        await asyncio.gather(
            *(client.chat(next(asked), rng.randrange(2**31), best_of) for _ in range(until - done))
        )
        print(f"{until - done} requests in {monotonic() - start:.0f} s", flush=True)
        done = until
        if until:
            print((await client.post("/proxies/quick/learn"))["passes"], flush=True)
        rows.append(row("quick", *await grade(3 * 10**6, {"proxy": "quick"})))
    # At last, for these are verdicts too, and on the prompts held out.
    rows.append(row("best of 8", *await grade(2 * 10**6, best_of)))
    await client.close()
    return rows


def wins(ours: float, theirs: float) -> float:
    return (ours > theirs) + (ours == theirs) / 2


def of_taste(rows: Sequence[dict[str, Any]], taste: str) -> list[dict[str, Any]]:
    """For each number of verdicts: the win rate over users with its standard error, and more."""
    found = []
    for verdicts in dict.fromkeys(row["verdicts"] for row in rows):
        some = [row for row in rows if row["taste"] == taste and row["verdicts"] == verdicts]
        found.append({
            "verdicts": verdicts,
            "win_rate": mean([win for row in some for win in row["wins"]]),
            "flawed": fmean(flawed for row in some for flawed in row["flawed"]),
            "sent": fmean(row["sent"] for row in some),
            "users": len(some),
            "with_proxy": sum(row["has_proxy"] for row in some),
        })  # fmt: skip
    return found


def markdown(figures: dict[str, Any]) -> str:
    """The tables for the docs."""
    verdicts = [each["verdicts"] for each in of_taste(figures["users"], HOSTILE)]
    lines = ["| taste | " + " | ".join(f"{n} verdicts" for n in verdicts) + " |"]
    lines.append("|---" * (len(verdicts) + 1) + "|")
    for taste in (*TASTES, HOSTILE):
        cells = [
            f"{rate:.1%} ± {error:.1%} ({each['with_proxy']}/{each['users']})"
            for each in of_taste(figures["users"], taste)
            for rate, error in (each["win_rate"],)
        ]
        lines.append(f"| {taste} | {' | '.join(cells)} |")
    if "best_of" in figures:
        lines += ["", "| way to answer | requests before | gold win rate | tokens a request |"]
        lines.append("|---" * 4 + "|")
        for row in figures["best_of"]:
            rate, error = row["win_rate"]
            line = f"{row['requests']} | {rate:.1%} ± {error:.1%} | {row['tokens']:.0f}"
            lines.append(f"| {row['way']} | {line} |")
    return "\n".join(lines) + "\n"


def plot(figures: dict[str, Any], path: Path) -> None:
    """Win rate by verdicts for each taste; by requests for the proxy that replaces best of 8."""
    best_of = figures.get("best_of")
    figure, axes = pyplot.subplots(
        1, 2 if best_of else 1, figsize=(10 if best_of else 5.5, 4), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    left = axes[0][0]
    for taste in TASTES:
        rows = of_taste(figures["users"], taste)
        rates, errors = zip(*(row["win_rate"] for row in rows), strict=True)
        draw(left, [row["verdicts"] for row in rows], rates, errors, taste)
    left.set_xlabel("verdicts of a user")
    left.set_ylabel("% won over the frozen LLM, by the user's taste")
    left.set_title("A proxy of one's own")
    left.legend()
    if best_of:
        right = axes[0][1]
        rows = [row for row in best_of if row["way"] == "quick"]
        rates, errors = zip(*(row["win_rate"] for row in rows), strict=True)
        draw(right, [row["requests"] for row in rows], rates, errors, "proxy alone, one sample")
        rate, error = best_of[-1]["win_rate"]
        right.axhspan(100 * (rate - error), 100 * (rate + error), color="grey", alpha=0.3)
        right.axhline(100 * rate, color="grey", label="best of 8")
        right.set_xlabel("requests with best of 8")
        right.set_title("A proxy of the judge's verdicts, by the gold scorer")
        right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(
    axes: Any, x: Sequence[int], rates: Sequence[float], errors: Sequence[float], label: str
) -> None:
    percent = ([100 * each for each in values] for values in (rates, errors))
    y, y_error = percent
    axes.errorbar(x, y, yerr=y_error, marker="o", capsize=2, label=label)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xticks(x, [str(each) for each in x])
    axes.axhline(50, color="black", linewidth=0.5)


def main(options: Options) -> None:
    """Each part is written when it is done, beside what the other one came to."""
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
    """The demo's LLM with a key for each name, and the operator's."""
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
