"""The jobs of a world. Each job's result is kept; they run one after the other, because they are timed."""

import asyncio
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparison.jobs import Job
from benchmarks.demo import gather
from benchmarks.peers import timing
from benchmarks.peers.engine import Engine, sample_all
from benchmarks.peers.lab import (
    REWARD,
    SCALE,
    as_prompts,
    load_frozen,
    measure_scale,
    open_lab,
    scale_of,
    train_reward,
)
from benchmarks.peers.rows import decoding_rows, serving_rows
from benchmarks.peers.setting import AT_ONCE, N, Setting
from benchmarks.peers.trained_judge import JUDGE, train_judge
from benchmarks.peers.worlds import prompts_of, world_of
from training.rewards import sequence_logprobs

BASELINE = "baseline"
"""N plain answers to each prompt, which all rows are compared with."""
ORACLE = "oracle"
"""N other ones, of which the grader itself chooses."""
FLUENCY = "fluency"
GetEngine = Callable[[], Engine]
_BATCH = 16  # prompts at once in transformers


def answers_job(name: str) -> str:
    return f"answers/{name}"


def seed_of(name: str, index: int) -> int:
    """Of a row's answer to a prompt; N and more seeds after it are free."""
    return 1_000_000 * zlib.crc32(name.encode()) + 100 * index


def serving_jobs(setting: Setting, engine: GetEngine) -> list[Job]:
    """The jobs that need the engine."""
    rows = serving_rows(setting)
    jobs = [Job(JUDGE, train_judge)] if any(row.needs_judge for row in rows.values()) else []
    jobs += [_samples_job(name, engine) for name in (BASELINE, ORACLE)]
    jobs += [_answers_job(name, engine) for name in rows]
    return [*jobs, timing.serving_job(engine, rows)] if rows else jobs


def _samples_job(name: str, engine: GetEngine) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        prompts, seed = prompts_of(setting), partial(seed_of, name)
        return {"texts": asyncio.run(sample_all(engine(), name, prompts, N, seed))}

    return Job(answers_job(name), run)


def _answers_job(name: str, engine: GetEngine) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        return asyncio.run(_answer(engine(), name))

    return Job(answers_job(name), run)


async def _answer(engine: Engine, name: str) -> dict[str, Any]:
    """A row's answers, the engine's tokens by its counters, and the tokens that the answers report: each a request."""
    setting, row = engine.setting, serving_rows(engine.setting)[name]
    prompts = prompts_of(setting, setting.num_costly if row.is_costly else None)
    async with row.open(engine) as ask:
        before = engine.tokens()
        replies = await gather(
            name, len(prompts), AT_ONCE, lambda i: ask(prompts[i], seed_of(name, i))
        )
        after = engine.tokens()
    count = len(prompts)
    reported = {
        kind: sum(tokens) / count if None not in tokens else None
        for kind, tokens in (
            ("prompt", [reply.prompt_tokens for reply in replies]),
            ("completion", [reply.completion_tokens for reply in replies]),
        )
    }
    spent = [(b - a) / count for a, b in zip(before, after, strict=True)]
    return {
        "texts": [reply.text for reply in replies],
        "engine": dict(zip(("prompt", "completion"), spent, strict=True)),
        "reported": reported,
    }


def decoding_jobs(setting: Setting) -> list[Job]:
    """The jobs in transformers."""
    rows = decoding_rows(setting)
    jobs = []
    if rows:
        if world_of(setting).reward is None:
            jobs.append(Job(REWARD, train_reward))
        jobs += [Job(SCALE, measure_scale), *(_decoding_job(name) for name in rows)]
        jobs.append(timing.decoding_job(rows))
    names = [ORACLE, *serving_rows(setting), *rows]
    fluency = timing.JobOfRows(
        FLUENCY, lambda setting, directory: _fluency(setting, names), rows=tuple(names)
    )
    return [*jobs, fluency]


def _decoding_job(name: str) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        lab = open_lab(setting, scale_of(setting))
        decode = decoding_rows(setting)[name].make(lab, world_of(setting))
        prompts = as_prompts(lab.frozen, prompts_of(setting))
        parts = [
            decode(prompts[start : start + _BATCH], seed_of(name, start) % 2**31)
            for start in range(0, len(prompts), _BATCH)
        ]
        responses = [response for part in parts for response in part.responses]
        tokens = sum(map(len, responses))
        return {
            "texts": lab.frozen.tokenizer.batch_decode(responses, skip_special_tokens=True),
            "tokens": tokens / len(responses),
            "llm_passes": sum(part.llm_passes for part in parts) / tokens,
            "reward_passes": sum(part.reward_passes for part in parts) / tokens,
        }

    return Job(answers_job(name), run)


def _fluency(setting: Setting, names: Sequence[str]) -> dict[str, Any]:
    """Mean log-probability a token of each row's answers under the frozen LLM, at temperature 1."""
    world = world_of(setting)
    frozen = load_frozen(world)
    prompts = as_prompts(frozen, prompts_of(setting))
    rows = {}
    for name in names:
        texts = setting.result(answers_job(name))["texts"]
        if name == ORACLE:
            texts = [drawn[0] for drawn in texts]  # any of them: what is plain
        tokens = [frozen.tokenizer.encode(t, add_special_tokens=False) or [0] for t in texts]
        ids = [prompt.ids for prompt in prompts[: len(texts)]]
        sums = sequence_logprobs(frozen.model, ids, tokens, _BATCH)
        lengths = map(len, tokens)
        rows[name] = [total / n for total, n in zip(sums.tolist(), lengths, strict=True)]
    return {"rows": rows}


def is_finished(setting: Setting, job: Job) -> bool:
    """Whether its result is there, and has all rows that it is about."""
    if not (setting.directory(job.name) / "result.json").exists():
        return False
    return not isinstance(job, timing.JobOfRows) or {*setting.result(job.name)["rows"]} >= {
        *job.rows
    }
