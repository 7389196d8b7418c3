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
    """A judge that prefers the longer response, and of like ones whichever is shown first."""
    sizes = [(len(each.first), len(each.second)) for each in questions]
    return [
        PairResult(
            {"length": Verdict((0.9, 0.9) if a > b else (0.1, 0.1) if a < b else (0.8, 0.2))}
        )
        for a, b in sizes
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
        pair(prompt, good, good[:-4] + "dog."),  # as long: no order is preferred; relevance, 2
    ]
    found = agreement(longer_wins, rows)
    assert found["gold"][0] == 0.25  # of a tie the first goes on
    assert found["labels"][0] == 0.75
    assert found["consistency"][0] == 0.75
    assert found["clear"] == 2 and found["gold_clear"][0] == 0.5
    assert found["consistency_clear"] == (0.5, pytest.approx(0.125**0.5))
    assert agreement(longer_wins, rows[:1], "manners")["gold"][0] == 0
    assert agreement(longer_wins, rows[3:], "relevance")["gold"][0] == 1


def test_neighbours_meet_until_one_is_left() -> None:
    standing = [["a", "bb", "ccc", "dd"], ["aaaa", "b", "cc", "d"]]
    standing = knock_out_round(longer_wins, ["p", "q"], standing)
    assert standing == [["bb", "ccc"], ["aaaa", "cc"]]
    assert knock_out_round(longer_wins, ["p", "q"], standing) == [["ccc"], ["aaaa"]]


@pytest.mark.parametrize(
    ("name", "asked"), [("knock-out", 5), ("final-four", 8), ("round-robin", 15)]
)
def test_a_tournament_of_known_rulings(name: str, asked: int) -> None:
    answers = ["a" * n for n in (3, 1, 4, 1, 5, 2)]
    receipt = play_known(name, 6, 7, all_results(longer_wins, "p", answers))
    assert receipt.winner == 4 and sum(map(len, receipt.rounds)) == asked
    assert replay(receipt.as_json()) == receipt.ranking


def test_the_ceiling_is_the_reference_scorers_own_choice() -> None:
    prompt = "Thank you for your help with my pony."
    good = "It was nice to talk about your pony."
    rude = f"Use your head. {good}"
    cut = f"{rude} Another thing is that"
    found = ceiling([prompt] * 2, [[cut, rude], [rude, rude], [good, cut], [cut, good]], [rude] * 2)
    assert {size: rate for size, (rate, _) in found.items()} == {1: 0.25, 2: 0.5, 4: 1.0}


def test_identical_answers_tie() -> None:
    (one, other) = all_results(longer_wins, "p", ["same", "same"]).values()
    assert one.winner == other.winner == "tie"


def test_the_plan_holds_what_its_jobs_need() -> None:
    jobs = all_jobs((0, 1))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for place, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:place]), job.name


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
        found = dict.fromkeys(measures, rate)
        strategy = {
            "gold": (-0.5, 0.04),
            "comparisons": 15.0,
            "finds_golds_best": rate,
            "agrees_with_round_robin": rate,
        }
        result: dict[str, Any] = {
            "judges": dict.fromkeys(JUDGES, found),
            "principles": {"manners": found},
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
    won = "65.0% ± 2.1%"
    assert f"| self-judge, LoRA | {' | '.join([won] * 5)} |" in text
    assert text.count(f"| self-judge, LoRA | {won} | {won} |\n") == len(SAMPLING_MODELS)
    assert f"| knock-out | 15.0 | {won} | {won} | -0.500 ± 0.028 |" in text
    assert f"| DPO, more data | {won} | 70.0% 60.0% | 100 | 2.00 |" in text
    assert re.search(r"\| DPO \| 72\.\d% .* \| 73\.2% 72\.0% \|", text)  # as published
    assert (output / "self_judge.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "self_judge.json").read_text())["0"]["strategies"]["prompts"] == 300
