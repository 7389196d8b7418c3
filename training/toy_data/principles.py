"""Principles that match the qualities of the reference scorer: pairs by one of them, and rationales that name the flaw.

Rationales are training data too, as a human labeller would write them.
"""

import random
import re

from judge.principles import DEFAULT, Principle
from training.toy_data import reference_scorer
from training.toy_data.grammar import Prompt
from training.toy_data.intents import FACTS, Quality

QUALITIES: dict[str, Quality] = {
    "relevance": "relevance",
    "manners": "manners",
    "safety": "safety",
    "faithfulness": "fact",
}
"""Each principle and its quality."""

PRINCIPLES: dict[str, Principle] = {
    **DEFAULT,
    "relevance": Principle(system="Choose the response that is about what was asked."),
    "manners": Principle(system="Choose the response that is more polite."),
    "safety": Principle(system="Choose the response that is safer to follow."),
    "faithfulness": Principle(system="Choose the response that keeps to what the user said."),
}


def applies(principle: str, prompt: Prompt) -> bool:
    """Whether an answer to the prompt can fail by the principle."""
    return principle != "faithfulness" or prompt.fact is not None


def prefers_first(
    principle: str, prompt: Prompt, a: str, b: str, rng: random.Random
) -> bool | None:
    """A labeller's noisy verdict by one principle; None = the answers are equal by it."""
    quality = QUALITIES[principle]
    fails_a, fails_b = (quality in reference_scorer.flaws(prompt.text, answer) for answer in (a, b))
    if fails_a == fails_b:
        return None
    weight = reference_scorer.WEIGHTS[quality]
    return reference_scorer.prefers_first(-weight * fails_a, -weight * fails_b, rng)


def rationale(principle: str, prompt: Prompt, answer: str) -> str:
    """A sentence about an answer by a principle."""
    fails = QUALITIES[principle] in reference_scorer.flaws(prompt.text, answer)
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", answer)]
    words = set(re.findall(r"[A-Za-z]+|\d+", answer))
    if principle == "manners":
        rude = [s for s in sentences if s in reference_scorer.RUDE]
        return f'it is rude: "{rude[0]}"' if fails else "it is polite."
    if principle == "safety":
        risky = [h for h in sorted(reference_scorer.HAZARDS, key=len, reverse=True) if h in answer]
        return f'it is dangerous to "{risky[0]}".' if fails else "it is safe."
    if principle == "faithfulness":
        stated = sorted(words & {value for values in FACTS.values() for value in values})
        if not fails:
            return f"it keeps to {prompt.fact}."
        if not stated:
            return f"it does not say {prompt.fact}."
        return f"it says {stated[0]}, not {prompt.fact}."
    if not fails:
        return f"it is about the {prompt.object}."
    others = sorted(words & reference_scorer.OBJECTS - {prompt.object})
    if others:
        return f"it is about the {others[0]}, not the {prompt.object}."
    if prompt.object not in words:
        return f"it does not name the {prompt.object}."
    return f"its advice is not for the {prompt.object}."
