"""Jobs of the self-judge comparison. The reference scorer grades; no training sees it."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.comparison.answers import answer, by_policy
from benchmarks.comparison.evaluation import (
    DATA_SEED,
    DECODING,
    frozen_texts,
    noise,
    open_evaluation_set,
    tuned,
)
from benchmarks.comparison.jobs import Job, Setting, timed
from benchmarks.self_judge.judges import (
    JUDGES,
    MAJORITY,
    JudgeSource,
    agreement,
    all_results,
    knock_out_round,
    load_judge,
    play_known,
    preferred,
    rate,
)
from judge.principles import FILE_NAME
from judge.tournament import STRATEGIES
from proxy.checkpoint import identify, load
from training import jsft, reward_model, self_judge
from training.data import read_rows
from training.models import load_model
from training.policy import Policy
from training.toy_data import files as toy_files
from training.toy_data import principles, reference_scorer
from training.toy_data.grading import win_rate

SAMPLES = 16
CEILING = "gold itself"
MORE = "pairs.jsonl"


def judges_of(seed: int) -> set[str]:
    """The jobs that train a seed's judges."""
    return {f"{by.job}/{seed}" for by in JUDGES.values() if by.job}


def make_judge(seed: int, **settings: Any) -> Job:
    """The frozen LLM's judge as a LoRA, trained on general pairs and on pairs by principle."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = jsft.Options(
            model=str(setting.model),
            preferences=(setting.data("preferences"), setting.data("judgments")),
            principles=setting.work / "world" / FILE_NAME,
            output=directory,
            overwrite=True,
            seed=seed,
            **settings,
        )
        result: dict[str, Any] = dict(settings)
        with timed(result):
            jsft.main(options)
        return result

    return Job(f"reward-judge/{seed}", run, ("world",))


def make_more(setting: Setting, directory: Path) -> dict[str, Any]:
    """Twice as many pairs, of which the first half are the toy data's, and half as many judgments by principle, in one
    file.
    """
    options = toy_files.Options(
        output=directory,
        overwrite=True,
        seed=DATA_SEED,
        num_sft=1,
        num_preferences=2 * setting.num_pairs,
        num_held_out=1,
    )
    toy_files.main(options)
    rows = [(directory / f"{name}.jsonl").read_text() for name in ("preferences", "judgments")]
    (directory / MORE).write_text("".join(rows))
    return {"pairs": "".join(rows).count("\n")}


def make_likelihood(
    name: str, seed: int, preferences: str, needs: tuple[str, ...], **settings: Any
) -> Job:
    """The likelihood ratio as a LoRA, from the pairs in a file of the work directory."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = reward_model.Options(
            model=str(setting.model),
            preferences=str(setting.work / preferences),
            output=directory,
            overwrite=True,
            seed=seed,
            **settings,
        )
        result: dict[str, Any] = dict(settings)
        with timed(result):
            reward_model.main(options)
        return result

    return Job(name, run, needs)


def make_judged(seed: int) -> Job:
    """Every judge's results on the held-out pairs, and those of the LoRA for each principle."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        evaluation = open_evaluation_set(setting, "test")
        rows = read_rows(setting.data("preferences_test"))[: setting.num_test]
        by_principle = {}
        for principle, quality in principles.QUALITIES.items():
            judgments = read_rows(setting.data("judgments_test"))[: setting.num_test]
            of_it = [row for row in judgments if row["principle"] == principle]
            judge = load_judge(setting, evaluation, JudgeSource("reward-judge", (principle,)), seed)
            by_principle[principle] = agreement(judge, of_it, quality)
        return {
            "judges": {
                name: agreement(load_judge(setting, evaluation, by, seed), rows)
                for name, by in (JUDGES | {"self-judge, LoRA, majority": MAJORITY}).items()
            },
            "principles": by_principle,
            "noise_ceiling": fmean(preferred(row) > 0 for row in rows),
        }

    return Job(f"judged/{seed}", run, tuple(judges_of(seed)))


def make_samples(sampling_model: str, seed: int, size: int) -> Job:
    """`size` answers to each prompt by the frozen LLM, by a proxy or by a trained model."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        evaluation = open_evaluation_set(setting, "test")
        model, network = evaluation.model, None
        place = setting.directory(f"{sampling_model}/{seed}")
        if (place / "proxy.safetensors").exists():
            network = load(place, base=identify(str(setting.model))).network
        elif sampling_model != "frozen":
            model = load_model(str(place), dtype=torch.bfloat16)[0].eval()
        roll_out = by_policy(evaluation, Policy(model, network), DECODING)
        key = noise("best of" if sampling_model == "frozen" else "proxy best of", seed)
        drawn = [answer(evaluation, key + 10 * i, roll_out) for i in range(size)]
        (directory / "texts.json").write_text(json.dumps([sample.texts for sample in drawn]))
        return {"cpu_seconds": sum(sample.cpu_seconds for sample in drawn)}

    return Job(f"samples-{sampling_model}/{seed}", run, (f"{sampling_model}/{seed}",))


def make_best_of(sampling_model: str, seed: int, judges: tuple[str, ...]) -> Job:
    """The best of N of a sampling model's answers, by the knock-out of every judge.

    Answers are compared in the order in which they were sampled, so the brackets of smaller N are part of the largest
    one.
    """
    samples = f"samples-{sampling_model}/{seed}"

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        evaluation = open_evaluation_set(setting, "test")
        texts = json.loads((setting.directory(samples) / "texts.json").read_text())
        reference = frozen_texts(setting, "test", seed)
        rows: dict[str, dict[int, Any]] = {}
        for name in judges:
            judge = load_judge(setting, evaluation, JUDGES[name], seed)
            standing = [list(row) for row in zip(*texts, strict=True)]  # by prompt
            rows[name] = {}
            while True:
                first = [row[0] for row in standing]
                rows[name][len(texts) // len(standing[0])] = win_rate(
                    evaluation.texts, first, reference
                )
                if len(standing[0]) == 1:
                    break
                standing = knock_out_round(judge, evaluation.texts, standing)
        rows[CEILING] = ceiling(evaluation.texts, texts, reference)
        return {"rows": rows}

    return Job(
        f"best-of-{sampling_model}/{seed}", run, (f"frozen/{seed}", samples, *judges_of(seed))
    )


def ceiling(
    prompts: Sequence[str], texts: Sequence[Sequence[str]], reference: Sequence[str]
) -> dict[int, Any]:
    """The best of N by the reference scorer, an upper bound for every judge, for the N of a knock-out's brackets."""
    sizes = [2**i for i in range(len(texts).bit_length())]
    chosen = {
        size: [
            max(row, key=lambda text: reference_scorer.score(prompt, text))
            for prompt, row in zip(prompts, zip(*texts[:size], strict=True), strict=True)
        ]
        for size in sizes
    }
    return {size: win_rate(prompts, best, reference) for size, best in chosen.items()}


def make_strategies(seed: int, num_prompts: int) -> Job:
    """Every strategy's choice among sixteen answers, from the judge's verdicts on all pairs of them."""
    samples = f"samples-frozen/{seed}"

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        evaluation = open_evaluation_set(setting, "test")
        texts = json.loads((setting.directory(samples) / "texts.json").read_text())
        judge = load_judge(setting, evaluation, JudgeSource("reward-judge"), seed)
        count = max(2, int(num_prompts * setting.scale))
        chosen: dict[str, list[tuple[float, int, bool, bool]]] = {name: [] for name in STRATEGIES}
        for place, prompt in enumerate(evaluation.texts[:count]):
            answers = [sample[place] for sample in texts]
            golds = [reference_scorer.score(prompt, text) for text in answers]
            pair_results = all_results(judge, prompt, answers)
            round_robin_winner = play_known("round-robin", SAMPLES, place, pair_results).winner
            for name in STRATEGIES:
                record = play_known(name, SAMPLES, place, pair_results)
                best, num_comparisons = golds[record.winner], sum(map(len, record.rounds))
                same = answers[record.winner] == answers[round_robin_winner]
                chosen[name].append((best, num_comparisons, best == max(golds), same))
        strategies = {}
        for name, choices in chosen.items():
            columns = zip(*choices, strict=True)
            scores, comparisons, hits, sames = (
                torch.tensor(column, dtype=torch.float) for column in columns
            )
            strategies[name] = {
                "gold": (scores.mean().item(), (scores.std() / count**0.5).item()),
                "comparisons": comparisons.mean().item(),
                "finds_golds_best": rate(hits),
                "agrees_with_round_robin": rate(sames),
            }
        return {"strategies": strategies, "prompts": count}

    return Job(f"strategies/{seed}", run, (f"reward-judge/{seed}", samples))


def make_self_training(judge: str, seed: int, **settings: Any) -> Job:
    """On-policy self-training of all weights, by a judge that is a LoRA on the initial model."""
    by = f"reward-{judge}/{seed}"

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = self_judge.Options(
            model=str(setting.model),
            judge=str(setting.directory(by)),
            prompts=setting.data("prompts"),
            held_out=setting.data("prompts_validation"),
            output=directory,
            overwrite=True,
            lora_rank=0,
            decoding=DECODING,
            max_flips=1.0,  # a run that stops early would stop the comparison
            seed=seed,
            **settings | {"steps": setting.updates(settings["steps"])},
        )
        result: dict[str, Any] = dict(settings)
        with timed(result):
            self_judge.main(options)
        return result | {"row": tuned(setting, directory, seed, "test")}

    return Job(f"self-training-{judge}/{seed}", run, (f"frozen/{seed}", by))
