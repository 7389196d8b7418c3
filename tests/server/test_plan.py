"""The planner: its choice by hand, and a real run against the server."""

import json

import pytest

from judge import plan
from judge.measure import Measured, Strategy
from judge.plan import Options
from tests.server.conftest import API_KEY


def row(name, win_rate, seconds, tokens):
    proxy, _, num = name.partition(" ")
    strategy = Strategy(None if proxy == "plain" else proxy, int(num))
    return Measured(strategy, win_rate, 0.01, seconds, 2 * seconds, tokens)


ROWS = [
    row("plain 1", 0.5, 0.10, 60),
    row("plain 4", 0.70, 0.30, 500),
    row("aligned 1", 0.72, 0.11, 60),
    row("aligned 4", 0.75, 0.31, 500),
    row("aligned 8", 0.755, 0.60, 1000),
    row("plain 8", 0.73, 0.70, 1100),
]


@pytest.mark.parametrize(
    ("seconds", "tokens", "name"),
    [
        (None, None, "aligned, best of 4"),  # 8 wins no more than its error, at twice the cost
        (0.25, None, "aligned, best of 1"),
        (0.21, None, "plain, best of 1"),
        (None, 600, "aligned, best of 4"),
        (None, 100, "aligned, best of 1"),
        (1.3, 2000, "aligned, best of 4"),
        (0.1, None, None),
    ],
)
def test_the_fit_for_a_budget(seconds, tokens, name):
    fit = plan.choose(ROWS, seconds, tokens)
    assert (fit and fit.strategy.name) == name


def test_what_is_dominated():
    names = [measured.strategy.name for measured in ROWS if plan.is_dominated(measured, ROWS)]
    assert names == ["plain, best of 4", "plain, best of 8"]
    assert not plan.is_dominated(ROWS[0], [ROWS[0], ROWS[0]])


def test_a_run(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # of the table
    prompts = tmp_path / "prompts.jsonl"
    texts = ["How do I look after my freezer?", "Can I open my kettle with a fork?", "Hi."]
    lines = [json.dumps({"prompt": text}) for text in texts[:2]]
    lines.append(json.dumps({"prompt": [{"role": "user", "content": texts[2]}]}))
    prompts.write_text("\n".join(lines))
    options = Options(
        prompts=str(prompts),
        output=tmp_path,
        base_url=server.url,
        api_key=API_KEY,
        proxies=("aligned",),
        best_of=(1, 2),
        max_completion_tokens=8,
        concurrency=2,
    )
    plan.main(options)
    rows = {entry["way"]["proxy"]: [] for entry in json.loads((tmp_path / "plan.json").read_text())}
    for entry in json.loads((tmp_path / "plan.json").read_text()):
        rows[entry["way"]["proxy"]].append(entry)
    assert [entry["way"]["best_of"] for entry in rows[None]] == [1, 2]
    assert [entry["way"]["best_of"] for entry in rows["aligned"]] == [1, 2]
    assert rows[None][0]["win_rate"] == 0.5
    assert rows["aligned"][1]["tokens"] > 2 * rows["aligned"][0]["tokens"]
    assert all(0 < entry["seconds"] <= entry["seconds_95"] * 1.5 for entry in rows["aligned"])
    printed = capsys.readouterr().out
    assert "→" in printed and "aligned, best of 2" in printed
    plan.main(Options(measured=tmp_path / "plan.json", max_tokens=1))
    assert "Nothing is within the budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "line 1: the field 'prompt' is missing"), ("", "no rows"), ("x", "line 1: not JSON")],
)
def test_prompts_that_are_none(tmp_path, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        plan.main(Options(prompts=str(tmp_path / "prompts.jsonl"), output=tmp_path))


def test_a_grader_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="expected module:function"):
        plan.main(
            Options(
                prompts=str(tmp_path / "prompts.jsonl"), output=tmp_path, grader="nowhere:nothing"
            )
        )


def test_an_earlier_plan_is_not_replaced(tmp_path):
    for path in (tmp_path / "prompts.jsonl", tmp_path / "plan.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match="plan.json is there already: .* --overwrite"):
        plan.main(Options(prompts=str(tmp_path / "prompts.jsonl"), output=tmp_path))
    with pytest.raises(ValueError, match="plan.json is the input"):
        plan.main(Options(prompts=f"{tmp_path}/plan.json", output=tmp_path, overwrite=True))
    with pytest.raises(ValueError, match="the field 'prompt' is missing"):
        plan.main(Options(prompts=str(tmp_path / "prompts.jsonl"), output=tmp_path, overwrite=True))
    assert (tmp_path / "plan.json").read_text() == "{}"
