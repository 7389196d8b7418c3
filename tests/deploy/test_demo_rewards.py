"""The rewards of the real demo's proxies."""

import pytest

from deploy.demo.smollm2 import rewards

PROMPTS = [[{"role": "user", "content": "Why is the sky blue?"}]] * 2
SIMPLE = "The sky is blue. Air bends the light."
HARD = (
    "Atmospheric molecules preferentially scatter electromagnetic radiation of shorter wavelengths."
)
GLAD = "What a lovely question! The sky is a great, happy blue."
SAD = "The sky is awful. I hate this sad question."


@pytest.mark.parametrize(
    ("reward", "better", "worse"),
    [
        (rewards.plain, SIMPLE, HARD),
        (rewards.plain, SIMPLE, "The sky is blue. The sky is blue. The sky is blue."),
        (rewards.plain, SIMPLE, ""),
        (rewards.upbeat, GLAD, SAD),
        (rewards.upbeat, GLAD, ""),
        (rewards.easy_words, SIMPLE, HARD),
        (rewards.polarity, GLAD, SAD),
    ],
)
def test_the_better_answer_gets_more(reward, better, worse):
    scores = reward(PROMPTS, [better, worse])
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("One. Two is cut", "One."),
        ("One is cut", "One is cut"),  # there is no other
        ("One.\nTwo!", "One.\nTwo!"),
        ('He said "two."', 'He said "two."'),
        ("", ""),
    ],
)
def test_a_last_sentence_that_was_cut_off_does_not_count(answer, expected):
    assert rewards.finished(answer) == expected


def test_repetition_is_the_share_of_triples_that_came_before():
    assert rewards.repetition("a b c d") == 0
    assert rewards.repetition("a b c a b c a b c") == pytest.approx(4 / 7)
    assert rewards.repetition("a b") == 0
