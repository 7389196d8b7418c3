"""The rewards that the demo's proxies are trained with, as functions that `--reward` takes.

    python -m training.proxy_ppo --reward deploy.demo.smollm2.rewards:plain --coherence-weight 0.6 ...

A formula checks the text, so that nobody has to label anything. It sees one aspect only, and would be raised at the
price of the rest: repeated words are punished, and `--coherence-weight` adds what an answer has to do with its prompt.
Each term is divided by its standard deviation among answers of SmolLM2 to the same prompt.

`easy_words` and `polarity` are for `training.evaluate`: no proxy is trained with them.
"""

import re
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any

import textstat
from textblob import TextBlob
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

Messages = Sequence[dict[str, Any]]
_WORD = re.compile(r"[A-Za-z']+")
_WORST_GRADE = 30.0  # of an answer without a full stop


def plain(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """Plain language: a low Flesch-Kincaid grade, that is, short sentences and words of few syllables."""
    return [-grade(answer) / 2.8 - 0.3 * repetition(answer) / 0.04 for answer in completions]


def upbeat(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """A positive tone: the mean VADER sentiment of the sentences."""
    return [sentiment(answer) / 0.25 - 0.3 * repetition(answer) / 0.04 for answer in completions]


def easy_words(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """Grades plain language by another formula than the one trained on: Dale-Chall's, of words that everybody knows."""
    return [
        -textstat.dale_chall_readability_score(finished(answer) or ".") for answer in completions
    ]


def polarity(prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
    """Grades tone by another lexicon than the one trained on: TextBlob's polarity."""
    return [TextBlob(answer).sentiment.polarity for answer in completions]


def grade(answer: str) -> float:
    """Years of school that the Flesch-Kincaid formula asks for."""
    text = finished(answer)
    return min(_WORST_GRADE, textstat.flesch_kincaid_grade(text)) if text else _WORST_GRADE


def sentiment(answer: str) -> float:
    """From -1 to 1."""
    scores = [_vader().polarity_scores(text)["compound"] for text in sentences(finished(answer))]
    return fmean(scores) if scores else 0.0


def repetition(answer: str) -> float:
    """The share of triples of words that occurred before."""
    words = _words(answer)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?])\s+|\n+", text.strip())
    return [part for part in parts if _WORD.search(part)]


def finished(answer: str) -> str:
    """Without a last sentence that the limit of tokens has cut off, where there is another."""
    *earlier, last = sentences(answer) or [""]
    is_cut = not re.search(r"[.!?]\W*$", last)
    return "\n".join(earlier if earlier and is_cut else [*earlier, last])


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()
