"""Checking preference pairs and setting some aside."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from judge.messages import prompt_key
from tests.warm import run
from training import prepare
from training.console import TrainingError
from training.prepare import Pair, describe, split

DEMO = Path(__file__).parents[2] / "deploy/demo/model"


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    row = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return Pair(row, prompt, len(prompt), len(chosen), len(rejected))


def test_no_prompt_is_on_both_sides() -> None:
    pairs = [pair(str(i // 3), f"good {i}", "bad") for i in range(60)]  # 20 prompts of 3 pairs
    train, held_out = split(pairs, 10, seed=0)
    assert len(held_out) == 12  # 4 prompts: 3 of them have 9 pairs
    assert len(train) == 48 and all(p in pairs for p in train + held_out)
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert split(pairs, 10, seed=0) == (train, held_out)
    assert split(pairs, 10, seed=1) != (train, held_out)
    assert split(pairs, 0, seed=0) == (pairs, [])


def test_more_than_half_is_too_much_to_set_aside() -> None:
    pairs = [pair(str(i), "good", "bad") for i in range(8)]
    assert len(split(pairs, 4, seed=0)[1]) == 4
    with pytest.raises(TrainingError, match="5 of 8 pairs would be held out"):
        split(pairs, 5, seed=0)
    with pytest.raises(TrainingError, match="2 of 2 pairs"):
        split([pair("same", x, "bad") for x in "ab"], 1, seed=0)


def test_what_is_said_about_pairs() -> None:
    pairs = [
        pair("ab", "long", "no"),
        pair("ab", "long", "no"),
        pair("ab", "no", "long"),
        pair("abcd", "no", "also"),
    ]
    assert describe(pairs) == [
        "2 different prompts",
        "1 pairs repeat another, 1 are contradicted by another",
        "prompts: 2 tokens in the median, 4 at most",
        "answers: 3 tokens in the median, 4 at most",
        "the chosen answer is the longer one in 50% of the pairs",
    ]


def test_the_command_names_what_is_wrong(work_dir: Path, tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "yes"}]
    turns = [*answer, {"role": "user", "content": "why"}, *answer]
    prompt = [{"role": "user", "content": "is my dog worth keeping"}]
    same_pair = {"prompt": prompt, "chosen": answer, "rejected": answer}
    cases: dict[str, list[dict[str, Any]]] = {
        "the same in every pair": [same_pair],
        "an answer of several turns": [{**same_pair, "chosen": turns}],
        "line 2: the field 'chosen' is missing": [same_pair, {"prompt": prompt}],
    }
    path = tmp_path / "preferences.jsonl"
    for message, rows in cases.items():
        path.write_text("\n".join(map(json.dumps, rows)))
        result = run(
            "training.prepare", "--model", work_dir / "base", "--preferences", path, "--output", tmp_path / "data"
        )  # fmt: skip
        assert result.returncode == 2, result.stderr
        assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()


def test_the_command_on_real_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows in all their forms: the usable ones are split by prompt, and pairs keep all their fields."""
    rows: list[dict[str, Any]] = [
        {
            "chosen": f"\n\nHuman: what  is {i}\n\nAssistant: good",
            "rejected": f"\n\nHuman: what  is {i}\n\nAssistant: bad",
        }
        for i in range(10)
    ]
    for i in range(10):  # the same prompts: other white space and order of keys, null fields, parts
        message = {
            "content": [{"type": "text", "text": f"what is\n{i}"}],
            "name": None,
            "role": "user",
        }
        rows.append(
            {"rejected": "none", "chosen": f"{i}", "prompt": [message], "principle": "manners"}
        )
    reasons: dict[str, Any] = {
        "rationale_chosen": "it is kind.",
        "rationale_rejected": "it is rude.",
        "principle": None,
    }
    call: dict[str, Any] = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "now", "arguments": "{}"}],
    }
    turns = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "when"}, call]
    turns.append({"role": "tool", "content": "at noon"})
    rows += [{"prompt": turns, "chosen": "noon", "rejected": [call], **reasons}, {"prompt": "cut"}]
    text = "".join(json.dumps(row) + "\r\n" for row in rows)
    path = tmp_path / "preferences.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode("utf-8-sig")))
    options = prepare.Options(
        model=str(DEMO), preferences=str(path), output=tmp_path / "data", held_out=6
    )
    prepare.main(options)
    printed = capsys.readouterr().out
    assert "skipped 1 of 22 rows" in printed and "line 22: the field 'chosen'" in printed
    parts = [
        [json.loads(line) for line in (tmp_path / f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    ]
    prompts = [{prompt_key(row["prompt"]) for row in part} for part in parts]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 11
    assert sorted(map(len, parts)) == [6, 15] or sorted(map(len, parts)) == [7, 14]
    all_rows = [*parts[0], *parts[1]]
    assert sum(row.get("principle") == "manners" for row in all_rows) == 10
    (with_reasons,) = (row for row in all_rows if "rationale_chosen" in row)
    assert with_reasons.keys() == {
        "prompt",
        "chosen",
        "rejected",
        "rationale_chosen",
        "rationale_rejected",
    }
    assert with_reasons["prompt"][2]["tool_calls"][0]["function"] == {
        "name": "now",
        "arguments": {},
    }
