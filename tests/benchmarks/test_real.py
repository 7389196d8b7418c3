"""The comparison on a real LLM: its rules and parts by hand, all of its jobs on the demo's LLM, its report."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.comparison.jobs import Job, run_job
from benchmarks.models import DEMO
from benchmarks.real import blind, report
from benchmarks.real.choosing import knock_out
from benchmarks.real.data import make_data
from benchmarks.real.evaluation import GRID, decoding_of
from benchmarks.real.methods import METHODS
from benchmarks.real.plan import all_jobs
from benchmarks.real.policies import as_read, load_frozen, read_test_prompts
from benchmarks.real.setting import SETS, Options, Setting, setting_of
from benchmarks.real.texts import complies, distinct_overall, distinct_share, refuses
from benchmarks.real.words import make_second_words, score
from judge.messages import Message
from judge.prompts import Question
from training.console import TrainingError
from training.data import read_rows
from training.toy_data.files import user

OBJECTS = ("dog", "rose", "pony", "cake", "boat", "lamp", "book", "coat", "drum", "kite")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Pairs in HH-RLHF's layout, and the demo's LLM."""
    choices = random.Random(0)

    def pair(i: int) -> dict[str, str]:
        prompt = f"\n\nHuman: Is my {OBJECTS[i % 10]} worth {i} pounds?\n\nAssistant:"
        good, bad = choices.sample(OBJECTS, 2)
        return {
            "chosen": f"{prompt} It is a good {good}.",
            "rejected": f"{prompt} I do not like your {bad}. Go away.",
        }

    instructions = [
        {"prompt": user(f"I have {i} pounds for my {OBJECTS[i % 10]}.")} for i in range(40)
    ]
    write_rows(tmp_path / "train.jsonl", instructions[:30])
    write_rows(tmp_path / "test.jsonl", instructions[30:])
    options = Options(
        pairs=write_rows(tmp_path / "pairs.jsonl", [pair(i) for i in range(120)]),
        helpful_pairs=write_rows(tmp_path / "helpful.jsonl", [pair(i) for i in range(200, 260)]),
        model=DEMO / "model",
        prompts=tmp_path,
        work=tmp_path / "work",
        seeds=(0,),
        scale=0.01,
        rollout="transformers",
    )
    return setting_of(options)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I cannot assist you with this.",
        "Thank you for asking. I am unable to give you such advice. Please ask someone else.",
        "As an AI language model, I do not have opinions.",
        "I won't tell you how to do it, since it is illegal.",
        "Sorry for any confusion, but as a chatbot I only answer questions.",
        "I don't condone violence.",
        "I must decline.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text) and not complies(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! First, you need a saw and a file. Then you cut the shackle of the lock.",
        "I'm sorry for your loss. It takes time, and friends who listen, to get over it.",
        "I can't believe it either! The Eiffel Tower is 330 metres high, with its antenna.",
        "You cannot divide by zero, because no number times zero gives anything but zero.",
        "First mix the flour. Then add the eggs. I cannot stress enough that it must rest.",
    ],
)
def test_what_is_no_refusal(text: str) -> None:
    assert not refuses(text) and complies(text)


def test_a_few_words_do_not_comply() -> None:
    assert not refuses("Yes.") and not complies("Yes.")


def test_distinct_n_grams() -> None:
    assert distinct_share("a b c a b c") == 0.75  # abc bca cab abc
    assert distinct_share("Oh no") == 1.0
    assert distinct_overall(["A b, c.", "a b d"]) == 0.75  # ab bc ab bd


class LongerWins:
    """A judge that prefers the longer response in both orders."""

    def log_odds(self, questions: list[Question]) -> Any:
        return torch.tensor([[float(len(q.first) - len(q.second))] * 2 for q in questions])


def test_a_knock_out_finds_the_best_of_each_prompt() -> None:
    texts = [["a", "dddd"], ["bbb", "c"], ["cc", "bb"], ["dd", "ccc"]]
    prompts = [[Message(role="user", content=text)] for text in "pq"]
    assert knock_out(LongerWins(), prompts, texts) == [1, 0]


def test_no_prompt_is_in_two_parts(setting: Setting) -> None:
    setting.directory("data").mkdir(parents=True)
    counts = make_data(setting, setting.directory("data"))

    def prompts(name: str) -> list[str]:
        return [row["prompt"][-1]["content"] for row in read_rows(setting.data(name))]

    parts = [
        prompts(name)
        for name in ("prompts_harmful", "prompts_validation", "pairs_a", "pairs_b")
    ]  # fmt: skip
    assert len({text for part in parts for text in part}) == sum(map(len, parts))
    assert prompts("pairs_test") == prompts("prompts_harmful")
    assert {*prompts("prompts_a")} == {*prompts("pairs_a")}
    assert {*prompts("prompts_both")}.isdisjoint(prompts("prompts_harmless"))
    assert counts["prompts_harmful"] == 6 and counts["pairs_a"] == 24 and counts["pairs_b"] == 16
    with pytest.raises(TrainingError, match=r"pairs\.jsonl: 120 prompts of at most 192 tokens"):
        make_data(replace(setting, scale=1.0), setting.directory("data"))


def test_only_what_the_rows_need_is_run(setting: Setting) -> None:
    jobs = all_jobs(setting)
    names = [job.name for job in jobs]
    assert len({*names}) == len(names)
    assert {need for job in jobs for need in job.needs} <= {*names}
    assert {name.split("/")[1] for name in names if name.startswith("test/")} == {*METHODS}
    few = {job.name for job in all_jobs(replace(setting, methods=("proxy-probe",)))}
    assert {name for name in few if name.startswith("test/")} == {
        "test/frozen-best/0",
        "test/proxy-probe/0",
    }
    assert not [name for name in few if name.startswith(("dpo", "rlhf", "self", "reward-jsft"))]
    judged = {job.name for job in all_jobs(replace(setting, methods=("best-of-jsft",)))}
    assert {"search/best-of-probe", "samples/best-of-probe/0", "reward-jsft"} <= judged
    assert "test/best-of-probe/0" not in judged
    bare = {job.name for job in all_jobs(replace(setting, helpful_pairs=None))}
    assert "second-helpful" not in bare
    coherent = {job.name for job in all_jobs(replace(setting, methods=("proxy-coherent",)))}
    assert {"reward-coherent", "proxy-coherent/0"} <= coherent and "reward-coherent" not in few
    with pytest.raises(TrainingError, match="--methods ppo: unknown; known are frozen, "):
        all_jobs(replace(setting, methods=("ppo",)))


def test_the_opinion_of_words(setting: Setting) -> None:
    for job in (Job("data", make_data), make_second_words()):
        run_job(setting, job)
    result = setting.result("second-words")
    assert result["right"]["share"] == 1.0 and result["right"]["pairs"] >= 6
    weights = result["weights"]
    assert weights["good"] > 0 > weights["not"]
    assert score(weights, "Good. GOOD, I say!") == pytest.approx(weights["good"] + weights["i"])


@pytest.mark.slow  # every method is trained
def test_all_jobs(setting: Setting, tmp_path: Path) -> None:
    """At the smallest size, with the report and the answers to be judged blind."""
    waiting, done = all_jobs(setting), set[str]()
    while waiting:
        (job, *_) = [job for job in waiting if done.issuperset(job.needs)]
        run_job(setting, job)
        waiting.remove(job)
        done.add(job.name)
    report.write(setting, tmp_path / "docs")
    blind.write(setting)
    rows = json.loads((tmp_path / "docs/real.json").read_text())["rows"]
    assert {*rows} == {*METHODS}
    assert rows["frozen"]["kl"][0] < rows["system"]["kl"][0]  # of top-k and top-p alone
    assert rows["proxy-best-of"]["samples"] == 4
    assert rows["dpo"]["parameters"] > 10 * rows["proxy-probe"]["parameters"]
    assert rows["frozen-best"]["harmful"]["wins"]["second-words"] == [0.5, 0.0]
    assert all(row["harmless"]["prompts"] == 4 for row in rows.values())
    # The best of four by the probe has at least its first sample's reward.
    best = json.loads((setting.directory("test/best-of-probe/0") / "scores.json").read_text())
    samples = json.loads(
        (setting.directory("samples/best-of-probe/0") / "samples.json").read_text()
    )
    assert len(best["harmful"]["reward-probe"]) == len(samples["harmful"][0]) == 6
    frozen = load_frozen(setting)
    prompts = read_test_prompts(setting, "harmful", frozen.tokenizer)
    assert as_read(prompts, frozen.tokenizer, None) == [prompt.ids for prompt in prompts]
    assert as_read(prompts, frozen.tokenizer, "Be kind.")[0] != prompts[0].ids


def test_the_report(setting: Setting, tmp_path: Path) -> None:
    """From invented results: the proxy's answers refuse, and the second opinion likes them in one of two prompts."""
    setting = replace(setting, methods=("proxy-probe",), seeds=(0, 1))
    answers = {
        "frozen-best": ["Take a saw and cut the lock in two pieces."] * 2,
        "proxy-probe": [
            "I'm sorry, but I cannot help.",
            "Take a saw and cut the lock in two pieces.",
        ],
    }
    scores = {"frozen-best": [0.0, 1.0], "proxy-probe": [2.0, 1.0]}
    opinions = ("reward-probe", "second-probe", "second-words", "second-helpful", "logprob")
    searched = [{"reward": float(i == 3)} for i in range(len(GRID))]
    rows = [{"prompt": user("How do I open a lock?")}, {"prompt": user("And a door?")}]
    for job in all_jobs(setting):
        result: dict[str, Any] = {"rows": searched, "parameters": 7000, "train_cpu_seconds": 60.4}
        directory = setting.directory(job.name)
        directory.mkdir(parents=True)
        if job.name.startswith("test/"):
            name = job.name.split("/")[1]
            figures = {
                "answers": dict.fromkeys(SETS, answers[name]),
                "scores": dict.fromkeys(SETS, dict.fromkeys(opinions, scores[name])),
            }
            for file, content in figures.items():
                (directory / f"{file}.json").write_text(json.dumps(content))
            result = {
                "decoding": {"temperature": 0.7, "top_p": 0.8},
                "tokens": {part: [8, 10] for part in SETS},
                "answer_cpu_seconds": 1.0,
                "samples": 1,
                "kl": 2.0,
                "kl_se": 0.5,
            }
        elif job.name == "accuracy":
            result = {"judges": {"probe": {"share": 0.66, "se": 0.02, "pairs": 400}}}
        elif job.name == "second-words":
            result = {"right": {"share": 0.6, "se": 0.02, "pairs": 400}}
        elif job.name == "data":
            result = {"pairs_a": 1000}
            for part in SETS:
                write_rows(setting.data(f"prompts_{part}"), rows)
        run_job(setting, Job(job.name, lambda *_, result=result: result))
    assert decoding_of(setting, "proxy-probe") == GRID[3]
    report.write(setting, tmp_path / "docs")
    table = (tmp_path / "docs/real_table.md").read_text()
    # 1 and 1/2 have the mean 3/4 and the standard error 1/4; so have 2 and 1 with 1.5 and 1/2.
    assert (
        "| **proxy**, direct, probe | 0.7, 0.8 | 1.50 ± 0.50 | 75.0% ± 25.0% | 75.0% ± 25.0% | 75.0% ± 25.0% "
        "| 50.0% ± 50.0% | 50.0% ± 50.0% | 2.0 ± 0.5 |"
    ) in table
    assert "| frozen, its best decoding | 0.7, 0.8 | 0.50 ± 0.50 | 50.0% ± 0.0% |" in table
    assert "| **proxy**, direct, probe | 7,000 | 60 | 0.25 | 1 | 9.0 ± 1.0 |" in table
    assert "Rows of the data: 1,000 in `pairs_a`.\n" in table
    assert "| probe | 66.0% ± 2.0% | 400 |\n| second-words | 60.0% ± 2.0% | 400 |" in table
    assert "| 0.00 | 0.00 | 0.00 | 1.00 | 0.00 |" in table
    blind.write(setting)
    lines = [
        json.loads(line) for line in (setting.work / "blind/answers.jsonl").read_text().splitlines()
    ]
    key = json.loads((setting.work / "blind/key.json").read_text())
    texts = {str(each["number"]): each["text"] for line in lines for each in line["answers"]}
    assert {*texts} == {*key} and len(lines) == 4
    assert "proxy" not in json.dumps(lines)
    for number, methods in key.items():
        assert all(texts[number] in answers[name] for name in methods)
    # Equal answers are one.
    assert sorted(len(line["answers"]) for line in lines) == [1, 1, 2, 2]
