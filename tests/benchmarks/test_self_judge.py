"""The judges' comparison: its parts on verdicts known beforehand, some of its jobs at the smallest size, its report."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison.jobs import Job, run_job, setting_of
from benchmarks.models import DEMO
from benchmarks.self_judge import report
from benchmarks.self_judge.judges import JUDGES, agreement, all_results, knock_out_round, play_known
from benchmarks.self_judge.methods import CEILING, SAMPLES, ceiling
from benchmarks.self_judge.plan import SAMPLING_MODELS, all_jobs
from judge.prompts import Question
from judge.tournament import replay
from judge.verdict import PairResult, Verdict
from training.toy_data.files import assistant, user


def longer_wins(questions: Sequence[Question]) -> list[PairResult]:
    """A judge that prefers the longer response, and of equally long ones the first."""
    lengths = [(len(question.first), len(question.second)) for question in questions]
    return [
        PairResult(
            {"length": Verdict((0.9, 0.9) if a > b else (0.1, 0.1) if a < b else (0.8, 0.2))}
        )
        for a, b in lengths
    ]


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": user(prompt), "chosen": assistant(chosen), "rejected": assistant(rejected)}


def test_agreement_by_hand() -> None:
    prompt = "Thank you for your help with my pony."
    good, rude, broken = (
        "It was nice to talk about your pony.",
        "Use your head. It was nice to talk about your pony.",  # manners, 1.5
        "Use your head. It was nice to talk about your pony. Another thing is that",  # ending, 1
    )
    rows = [
        pair(prompt, good, rude),  # the judge is wrong, on the labels too
        pair(prompt, broken, good),  # right by the label, which is wrong; they differ clearly
        pair(prompt, broken, rude),  # the same, but not clearly
        pair(prompt, good, good[:-4] + "dog."),  # equally long: a tie; relevance, 2
    ]
    rates = agreement(longer_wins, rows)
    assert rates["gold"][0] == 0.25  # in a tie the first advances
    assert rates["labels"][0] == 0.75
    assert rates["consistency"][0] == 0.75
    assert rates["clear"] == 2 and rates["gold_clear"][0] == 0.5
    assert rates["consistency_clear"] == (0.5, pytest.approx(0.125**0.5))
    assert agreement(longer_wins, rows[:1], "manners")["gold"][0] == 0
    assert agreement(longer_wins, rows[3:], "relevance")["gold"][0] == 1


def test_neighbours_meet_until_one_is_left() -> None:
    remaining = [["a", "bb", "ccc", "dd"], ["aaaa", "b", "cc", "d"]]
    remaining = knock_out_round(longer_wins, ["p", "q"], remaining)
    assert remaining == [["bb", "ccc"], ["aaaa", "cc"]]
    assert knock_out_round(longer_wins, ["p", "q"], remaining) == [["ccc"], ["aaaa"]]


@pytest.mark.parametrize(
    ("name", "num_comparisons"), [("knock-out", 5), ("final-four", 8), ("round-robin", 15)]
)
def test_a_tournament_of_known_rulings(name: str, num_comparisons: int) -> None:
    answers = ["a" * n for n in (3, 1, 4, 1, 5, 2)]
    tournament = play_known(name, 6, 7, all_results(longer_wins, "p", answers))
    assert tournament.winner == 4 and sum(map(len, tournament.rounds)) == num_comparisons
    assert replay(tournament.as_json()) == tournament.ranking


def test_the_ceiling_is_the_reference_scorers_own_choice() -> None:
    prompt = "Thank you for your help with my pony."
    good = "It was nice to talk about your pony."
    rude = f"Use your head. {good}"
    cut = f"{rude} Another thing is that"
    rates = ceiling([prompt] * 2, [[cut, rude], [rude, rude], [good, cut], [cut, good]], [rude] * 2)
    assert {size: rate for size, (rate, _) in rates.items()} == {1: 0.25, 2: 0.5, 4: 1.0}


def test_identical_answers_tie() -> None:
    (first, second) = all_results(longer_wins, "p", ["same", "same"]).values()
    assert first.winner == second.winner == "tie"


def test_the_plan_holds_what_its_jobs_need() -> None:
    jobs = all_jobs((0, 1))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for index, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:index]), job.name


@pytest.mark.slow  # every judge is trained and asked
def test_jobs_leave_what_the_report_reads(tmp_path: Path) -> None:
    """From the data to judges, the best of the frozen LLM's answers and strategies, at the smallest size."""
    setting = replace(setting_of(DEMO / "model", tmp_path, scale=0.005), num_pairs=16)
    jobs = {job.name: job for job in all_jobs((0,))}
    for name in (
        "world",
        "more",
        "frozen/0",
        *jobs["judged/0"].needs,
        "judged/0",
        "samples-frozen/0",
    ):
        run_job(setting, jobs[name])
    for name in ("best-of-frozen/0", "strategies/0", "self-training-more/0"):
        run_job(setting, jobs[name])
    judged = setting.result("judged/0")
    assert set(judged["judges"]) == {*JUDGES, "self-judge, LoRA, majority"}
    assert judged["judges"]["likelihood ratio, LoRA"]["consistency"][0] == 1
    best = setting.result("best-of-frozen/0")["rows"]
    assert set(best) == {*JUDGES, CEILING}
    assert {len({tuple(rows["1"]) for rows in best.values()})} == {1}  # the same first answers
    assert all(list(map(int, rows)) == [1, 2, 4, 8, SAMPLES] for rows in best.values())
    strategies = setting.result("strategies/0")["strategies"]
    assert strategies["knock-out"]["comparisons"] == SAMPLES - 1
    assert strategies["round-robin"]["agrees_with_round_robin"][0] == 1
    assert setting.result("self-training-more/0")["row"]["prompts"] == 8


def test_the_report(tmp_path: Path) -> None:
    """From invented results, seed 1 ten points above seed 0."""
    setting = setting_of(DEMO / "model", tmp_path / "work", scale=1.0)
    for job in all_jobs((0, 1)):
        rate = (0.7 if job.name.endswith("/1") else 0.6, 0.03)
        measures = ("gold", "labels", "gold_clear", "consistency", "consistency_clear")
        rates = dict.fromkeys(measures, rate)
        strategy = {
            "gold": (-0.5, 0.04),
            "comparisons": 15.0,
            "finds_golds_best": rate,
            "agrees_with_round_robin": rate,
        }
        result: dict[str, Any] = {
            "judges": dict.fromkeys(JUDGES, rates),
            "principles": {"manners": rates},
            "noise_ceiling": 0.9,
            "rows": {name: {"1": rate, "2": rate} for name in JUDGES},
            "strategies": {"knock-out": strategy},
            "prompts": 300,
            "row": {"win_rate": rate[0], "win_rate_se": rate[1], "kl": 2.0},
            "train_cpu_seconds": 100.4,
        }
        run_job(setting, Job(job.name, lambda *_, result=result: result))
    output = tmp_path / "docs"
    report.write(setting, (1,), output)
    report.write(setting, (0,), output)  # on another day
    text = (output / "self_judge_table.md").read_text()
    # 0.03 / sqrt(2) = 0.021
    cell = "65.0% ± 2.1%"
    assert f"| self-judge, LoRA | {' | '.join([cell] * 5)} |" in text
    assert text.count(f"| self-judge, LoRA | {cell} | {cell} |\n") == len(SAMPLING_MODELS)
    assert f"| knock-out | 15.0 | {cell} | {cell} | -0.500 ± 0.028 |" in text
    assert f"| DPO, more data | {cell} | 70.0% 60.0% | 100 | 2.00 |" in text
    assert re.search(r"\| DPO \| 72\.\d% .* \| 73\.2% 72\.0% \|", text)  # as published
    assert (output / "self_judge.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "self_judge.json").read_text())["0"]["strategies"]["prompts"] == 300
