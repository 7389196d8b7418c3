"""The intents of the toy data: prompts, templates of answers, and the rate of each flaw."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from training.toy_data import lexicon

Quality = Literal["relevance", "manners", "safety", "fact", "repetition", "ending"]
FactKind = Literal["number", "day", "name"]

FACTS: Mapping[FactKind, tuple[str, ...]] = {
    "number": lexicon.NUMBERS,
    "day": lexicon.DAYS,
    "name": lexicon.NAMES,
}

BASE_FLAW_RATES: Mapping[Quality, float] = {
    "relevance": 0.08,
    "manners": 0.10,
    "safety": 0.08,
    "fact": 0.08,
    "repetition": 0.08,
    "ending": 0.08,
}


@dataclass(frozen=True)
class Intent:
    """One kind of request. Slots: {o} object, {f} fact, {tip} advice, {hazard} and {safer} of a hazard."""

    name: str
    prompts: tuple[str, ...]
    cores: tuple[str, ...]
    """Templates of good answers."""
    vague: str | None = None
    """The template that fails in `vague_quality` without a wrong word."""
    vague_quality: Quality | None = None
    fact: FactKind | None = None
    flaw_rates: Mapping[Quality, float] = field(default_factory=dict)
    """Rates that differ from `BASE_FLAW_RATES`."""


INTENTS = (
    Intent(
        "care",
        (
            "How do I look after my {o}?",
            "What is the best way to care for my {o}?",
            "Tell me how to keep my {o} in good shape.",
        ),
        (
            "To look after your {o}, {tip}.",
            "Your {o} will be fine if you {tip}.",
            "Good care for your {o} is simple: {tip}.",
            "Be kind to your {o} and {tip}.",
        ),
        vague="With such things, {tip}.",
        vague_quality="relevance",
        flaw_rates={"relevance": 0.58},
    ),
    Intent(
        "repair",
        (
            "I have trouble with my {o}. What should I do?",
            "Something is wrong with my {o}. Can you help?",
            "My {o} is not what it was. Any advice?",
        ),
        (
            "Check your {o} first, then {tip}.",
            "Most trouble with your {o} ends if you {tip}.",
            "Give your {o} some rest, and {tip}.",
            "Do not worry about your {o}, but {tip}.",
        ),
        flaw_rates={"manners": 0.5},
    ),
    Intent(
        "budget",
        (
            "I have {f} pounds for my {o}. Is that enough?",
            "Can I spend {f} pounds on my {o}?",
            "My {o} may cost me {f} pounds. Is that too much?",
        ),
        (
            "For {f} pounds, your {o} will get good care.",
            "Yes, {f} pounds is right for your {o}.",
            "Your {o} needs about {f} pounds.",
            "Spend the {f} pounds on your {o} slowly.",
        ),
        vague="Some money is enough for your {o}.",
        vague_quality="fact",
        fact="number",
        flaw_rates={"fact": 0.6},
    ),
    Intent(
        "minutes",
        (
            "I have {f} minutes for my {o}. What can I do?",
            "What can I do with my {o} in {f} minutes?",
            "Are {f} minutes enough for my {o}?",
        ),
        (
            "In {f} minutes, you can look over your {o}.",
            "Use the {f} minutes to check your {o}.",
            "Your {o} needs only {f} minutes.",
            "Take {f} minutes and be gentle with your {o}.",
        ),
        fact="number",
    ),
    Intent(
        "schedule",
        (
            "I am free on {f} to deal with my {o}. Does that work?",
            "Is {f} a good day for my {o}?",
            "Can my {o} wait until {f}?",
        ),
        (
            "On {f}, begin with your {o}.",
            "Yes, {f} is a good day for your {o}.",
            "Plan your {o} for {f}.",
            "Your {o} can wait until {f}.",
        ),
        vague="Any day is fine for your {o}.",
        vague_quality="fact",
        fact="day",
        flaw_rates={"fact": 0.58},
    ),
    Intent(
        "gift",
        (
            "I want to give my {o} to {f}. What should I say?",
            "How do I tell {f} about my {o}?",
            "What do I write to {f} about my {o}?",
        ),
        (
            "Tell {f} that your {o} is a gift.",
            "Give your {o} to {f} with a smile.",
            "Say that {f} will enjoy your {o}.",
            "Write to {f} about your {o} tonight.",
        ),
        fact="name",
        flaw_rates={"ending": 0.5},
    ),
    Intent(
        "risk",
        (
            "Can I {hazard}?",
            "I am going to {hazard}. Is that fine?",
            "Would it help to {hazard}?",
        ),
        (
            "No, that could end badly for your {o}, so {safer}.",
            "Please be careful with your {o} and {safer}.",
            "It is wiser for your {o} to {safer}.",
            "That is dangerous, so think of your {o} and {safer}.",
        ),
        vague="Sure, {hazard_it} and enjoy your {o}.",
        vague_quality="safety",
        flaw_rates={"safety": 0.62},
    ),
    Intent(
        "complaint",
        (
            "Your advice about my {o} was useless.",
            "My {o} is worse than before, and I am angry.",
            "You told me nonsense about my {o}.",
        ),
        (
            "I am sorry about your {o}.",
            "We can save your {o} if you {tip}.",
            "My mistake, so treat your {o} gently.",
            "For your {o}, try again and {tip}.",
        ),
        flaw_rates={"manners": 0.62},
    ),
    Intent(
        "worth",
        (
            "Is my {o} worth keeping?",
            "Why should I care about my {o}?",
            "Should I keep my {o} or sell it?",
        ),
        (
            "Your {o} can bring joy for years.",
            "Keep your {o} if you like it.",
            "Many people would love your {o}.",
            "In my view, your {o} is worth the effort.",
        ),
        flaw_rates={"repetition": 0.58},
    ),
    Intent(
        "thanks",
        (
            "Thank you for your help with my {o}.",
            "My {o} is much better now.",
            "You were right about my {o}.",
        ),
        (
            "You are welcome, and enjoy your {o}.",
            "I am glad about your {o}.",
            "It was nice to talk about your {o}.",
            "Take good care of your {o}.",
        ),
        flaw_rates={"ending": 0.55},
    ),
)

DETAILS = ("Also, {tip}.", "Then {tip}.", "If you can, {tip}.", "Most of all, {tip}.")
SAFE_DETAIL = "For safety, {safer}."
HAZARD_DETAIL = "You can also {hazard_it}."
