"""Which stored preferences a proxy learns from."""

from collections import Counter
from typing import Any

import pytest

from judge.feedback import Preference
from tests.training.models import save_model
from training.conversations import Conversations
from training.models import load_tokenizer
from training.verdicts import MOST_OF_A_CALLER, Verdict, folds, read_verdicts


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    directory = tmp_path_factory.mktemp("llama")
    save_model("llama", directory)
    return Conversations(load_tokenizer(str(directory)))


def make_preference(number: int, caller: str | None = "alice", **fields: Any) -> Preference:
    settings: dict[str, Any] = {"source": "person", "chosen": "Yes.", "rejected": "No."} | fields
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return Preference(prompt=prompt, caller=caller, **settings)


def read_rows(
    chats: Conversations, rows: list[Preference], longest: int = 1000
) -> tuple[list[Verdict], Counter[str]]:
    """Read rows in the order of their ids. Returns the verdicts, and counts of what was left out."""
    left_out_counts = Counter[str]()
    newest_first = [*enumerate(rows, start=1)][::-1]
    end = chats.tokenizer.eos_token_id
    return read_verdicts(newest_first, chats, {end}, longest, left_out_counts), +left_out_counts


def row_ids(result: tuple[list[Verdict], Counter[str]]) -> list[int]:
    return [verdict.row for verdict in result[0]]


def test_a_verdict_is_two_responses_in_tokens(chats: Conversations) -> None:
    ((verdict,), left_out_counts) = read_rows(chats, [make_preference(1)])
    assert not left_out_counts
    assert (verdict.row, verdict.caller) == (1, "alice")
    assert verdict.better.prompt == verdict.worse.prompt
    assert "Question 1?" in chats.tokenizer.decode(verdict.better.prompt)
    for response, text in ((verdict.better, "Yes."), (verdict.worse, "No.")):
        assert chats.tokenizer.decode(response.response, skip_special_tokens=True) == text
        assert response.response[-1] == chats.tokenizer.eos_token_id


def test_a_callers_last_word_holds(chats: Conversations) -> None:
    opposite = make_preference(1, chosen="No.", rejected="Yes.")
    result = read_rows(
        chats,
        [
            make_preference(1),
            opposite,
            make_preference(1, "bob"),
            make_preference(2),
            make_preference(2),
        ],
    )
    assert row_ids(result) == [5, 3, 2]
    assert result[1] == {"that a later one replaces": 2}


def test_people_overrule_the_judge(chats: Conversations) -> None:
    by_judge = make_preference(1, source="judge", chosen="No.", rejected="Yes.", confidence=0.9)
    result = read_rows(
        chats, [make_preference(1), by_judge, make_preference(2, source="judge", confidence=0.9)]
    )
    assert row_ids(result) == [3, 1]
    assert result[1] == {"of a judge whom people overrule": 1}


def test_a_flood_does_not_outvote_the_others(chats: Conversations) -> None:
    other_rows = [make_preference(i, caller) for caller in ("bob", "carol") for i in range(3)]
    flood = [make_preference(100 + i) for i in range(10 * MOST_OF_A_CALLER)]
    verdicts, left_out_counts = read_rows(chats, other_rows + flood)
    counts = Counter(verdict.caller for verdict in verdicts)
    assert counts == {"bob": 3, "carol": 3, "alice": MOST_OF_A_CALLER}
    assert left_out_counts == {
        "of callers who gave many more than the others": 9 * MOST_OF_A_CALLER
    }
    assert row_ids((verdicts, left_out_counts))[0] == len(other_rows + flood)  # the newest


def test_a_single_caller_floods_nobody(chats: Conversations) -> None:
    verdicts, left_out_counts = read_rows(
        chats, [make_preference(i) for i in range(3 * MOST_OF_A_CALLER)]
    )
    assert len(verdicts) == 3 * MOST_OF_A_CALLER and not left_out_counts


def test_what_cannot_be_learned_is_counted(chats: Conversations) -> None:
    rows = [
        make_preference(1, chosen="Yes.", rejected="Yes."),
        make_preference(2, chosen="password: hunter2hunter2"),
        make_preference(3, chosen="Yes. " * 200),
        make_preference(4),
    ]
    result = read_rows(chats, rows, longest=200)
    assert row_ids(result) == [4]
    assert result[1] == {
        "that cannot be read": 1,
        "with what looks like a secret": 1,
        "of over 200 tokens": 1,
    }


def test_folds_hold_out_every_example_once_and_split_no_prompt() -> None:
    prompts = [f"{i % 7:08x}" for i in range(40)]
    parts = folds(prompts, few=41)
    assert len(parts) == 4
    assert sorted(i for _, held_out in parts for i in held_out) == list(range(40))
    for train, held_out in parts:
        assert sorted(train + held_out) == list(range(40))
        assert not {prompts[i] for i in train} & {prompts[i] for i in held_out}


def test_of_many_the_same_tenth_is_set_aside_whatever_comes_later() -> None:
    prompts = [f"{i:08x}" for i in range(100)]
    ((train, held_out),) = folds(prompts, few=100)
    assert held_out == list(range(0, 100, 10)) and len(train) == 90
    ((_, later),) = folds([f"{i:08x}" for i in range(100, 150)] + prompts, few=100)
    assert {i - 50 for i in later if i >= 50} == {*held_out}
