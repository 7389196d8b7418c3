"""Public layouts of preference data, by hand-made rows of the same shape."""

from typing import Any

import pytest

from judge.layouts import PAIR, conversational
from judge.messages import Unusable


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH_RLHF = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A pun?\nPlease.\n\nAssistant: Lettuce\n\nbegin.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A pun?\nPlease.\n\nAssistant: No.",
}
ULTRAFEEDBACK: dict[str, Any] = {
    "source": "evol_instruct",
    "instruction": "Name a colour.",
    "models": ["a", "b", "c"],
    "completions": [
        {
            "model": "a",
            "response": "Blue?",
            "overall_score": 6.5,
            "annotations": {"honesty": {"Rating": "4"}},
        },
        {
            "model": "b",
            "response": "Blue.",
            "overall_score": 9.0,
            "annotations": {"honesty": {"Rating": "4"}},
        },
        {
            "model": "c",
            "response": "Table.",
            "overall_score": 1.0,
            "annotations": {"honesty": {"Rating": "4"}},
        },
    ],
}
BINARIZED = {
    "prompt": "Name a colour.",
    "prompt_id": "f0",
    "chosen": [user("Name a colour."), assistant("Blue.")],
    "rejected": [user("Name a colour."), assistant("Table.")],
    "messages": [user("Name a colour."), assistant("Blue.")],
    "score_chosen": 9.0,
    "score_rejected": 1.0,
}
PLAIN = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Table."}
COLOUR = {
    "prompt": [user("Name a colour.")],
    "chosen": [assistant("Blue.")],
    "rejected": [assistant("Table.")],
}
PUN = {
    "prompt": [user("Hi"), assistant("Hello!"), user("A pun?\nPlease.")],
    "chosen": [assistant("Lettuce\n\nbegin.")],
    "rejected": [assistant("No.")],
}
PUN_TEXT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A pun?\nPlease.\n\nAssistant:"
PUN_ANSWERS = {"chosen": " Lettuce\n\nbegin.", "rejected": " No."}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hh-rlhf": (HH_RLHF, PUN),
    "full-hh-rlhf": ({"prompt": PUN_TEXT, **PUN_ANSWERS}, PUN),
    "full-hh-rlhf, stripped": ({"prompt": PUN_TEXT.strip(), **PUN_ANSWERS}, PUN),
    "full-hh-rlhf, whole dialogues": ({"prompt": PUN_TEXT, **HH_RLHF}, PUN),
    "a conversation and two texts": (
        {**PUN, "chosen": "Lettuce\n\nbegin.", "rejected": "No."},
        PUN,
    ),
    "a conversation and it again with each answer": (
        {side: (PUN["prompt"] if side != "prompt" else []) + PUN[side] for side in PAIR},
        PUN,
    ),
    "a text and messages": ({**COLOUR, "prompt": "Name a colour."}, COLOUR),
    "a list of one each": ({**PLAIN, "chosen": ["Blue."], "rejected": ["Table."]}, COLOUR),
    "UltraFeedback": (ULTRAFEEDBACK, COLOUR),
    "ultrafeedback_binarized": (BINARIZED, COLOUR),
    "plain": (PLAIN, COLOUR),
    "conversational": (COLOUR, COLOUR),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_known_by_its_fields(layout: str) -> None:
    row, expected = LAYOUTS[layout]
    (result,) = conversational(row, PAIR)
    assert {field: result[field] for field in PAIR} == expected
    (prompt,) = conversational(row, ("prompt",))
    assert prompt["prompt"] == expected["prompt"]


@pytest.mark.parametrize(
    "text", [PUN_TEXT, PUN_TEXT.strip(), PUN_TEXT.removesuffix("\n\nAssistant:")]
)
def test_a_prompt_alone_may_be_a_dialogue_as_text(text: str) -> None:
    assert next(conversational({"prompt": text}, ("prompt",)))["prompt"] == PUN["prompt"]


def test_a_text_that_only_speaks_of_humans_is_a_text() -> None:
    for text in ("Human: what is that?", "Who is it?\n\nHuman: me"):
        assert next(conversational({"prompt": text}, ("prompt",)))["prompt"] == [user(text)]
    (result,) = conversational({**PLAIN, "chosen": "Human: me"}, PAIR)
    assert result["chosen"] == [assistant("Human: me")]


def test_each_chosen_answer_is_better_than_each_rejected_one() -> None:
    """RewardBench 2: lists, one correct and three wrong, or several correct."""
    row = {
        "prompt": "2 + 2?",
        "chosen": ["4", "Four"],
        "rejected": ["3", "5", "6"],
        "subset": "Math",
    }
    pairs = list(conversational(row, PAIR))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ([assistant(better)], [assistant(worse)]) for better in ("4", "Four") for worse in "356"
    ]
    assert all(pair["prompt"] == [user("2 + 2?")] and pair["subset"] == "Math" for pair in pairs)


def test_dialogues_are_split_where_they_first_differ() -> None:
    start = [user("Hi"), assistant("Hello!"), user("And?")]
    first = [*start, assistant("A"), user("More"), assistant("B")]
    second = [*start, assistant("C")]
    (result,) = conversational({"chosen": first, "rejected": second}, PAIR)
    assert (result["prompt"], result["chosen"], result["rejected"]) == (
        start,
        first[3:],
        second[3:],
    )
    (result,) = conversational(
        {"prompt": start, "chosen": first[3:], "rejected": [*first[3:5], assistant("X")]}, PAIR
    )
    assert result["prompt"] == first[:5]  # what both answers begin with belongs to the prompt
    assert (result["chosen"], result["rejected"]) == ([assistant("B")], [assistant("X")])


def test_where_scores_prefer_none_both_answers_are_the_same() -> None:
    completions = [completion | {"overall_score": 5} for completion in ULTRAFEEDBACK["completions"]]
    for subset in (completions, completions[:1]):
        (result,) = conversational(ULTRAFEEDBACK | {"completions": subset}, PAIR)
        assert result["chosen"] == result["rejected"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            HH_RLHF | {"chosen": "Hello"},
            'chosen: a dialogue as text begins with "\\\\n\\\\nHuman: "',
        ),
        (BINARIZED | {"rejected": []}, "rejected: expected a list of chat messages"),
        (PLAIN | {"chosen": None}, r"the field 'chosen' is missing \(found prompt, rejected\)"),
        (ULTRAFEEDBACK | {"instruction": None}, "the field 'instruction' is missing"),
        (PLAIN | {"chosen": 5}, "chosen: expected a list of chat messages"),
        (PLAIN | {"prompt": {"text": "x"}}, "prompt: expected a list of chat messages"),
        (PLAIN | {"rejected": [user("a"), "b"]}, "rejected: a message is"),
        (
            ULTRAFEEDBACK | {"completions": [{"response": "x"}] * 2},
            "no response or no overall_score",
        ),
        (ULTRAFEEDBACK | {"completions": [{"response": None, "overall_score": 1}]}, "no response"),
        (
            ULTRAFEEDBACK | {"completions": [{"response": "x", "overall_score": "nan"}]},
            "no overall_s",
        ),
        (ULTRAFEEDBACK | {"completions": ["x"]}, "no response or no overall_score"),
        (ULTRAFEEDBACK | {"completions": None}, "completions is no list"),
        (ULTRAFEEDBACK | {"completions": []}, "completions is no list"),
    ],
)
def test_a_row_that_breaks_its_layout_says_how(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Unusable, match=message):
        list(conversational(row, PAIR))
