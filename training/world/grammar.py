"""The grammar of the bundled world: prompts, and answers whose qualities are drawn independently.

A prompt is one of `INTENTS` about one object of one topic, and may state a fact (a number, a day, a name). An answer
has one to four sentences. Six qualities fail independently of each other: relevance, manners, safety, the fact,
repetition and the ending. For most intents one failure is the *most likely* thing to say, worded in one way, while good
answers are worded in many: a lower temperature or top-p makes such an answer more flawed, not less.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from training.world import lexicon
from training.world.lexicon import TOPICS, Hazard, Topic

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
    """Good ways to answer."""
    vague: str | None = None
    """The core that fails in `vague_quality`, without a wrong word in it."""
    vague_quality: Quality | None = None
    fact: FactKind | None = None
    flaw_rates: Mapping[Quality, float] = field(default_factory=dict)
    """Where they differ from `BASE_FLAW_RATES`."""


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


@dataclass(frozen=True)
class Prompt:
    """A request and what it is about."""

    text: str
    topic: Topic
    intent: Intent
    object: str
    fact: str | None = None
    hazard: Hazard | None = None


def all_prompts(topic: Topic, intent: Intent) -> list[Prompt]:
    """Every prompt of one topic × intent combination."""
    facts = FACTS[intent.fact] if intent.fact else (None,)
    hazards = topic.hazards if intent.name == "risk" else (None,)
    return [
        Prompt(_fill(template, obj, fact, hazard, asked=True), topic, intent, obj, fact, hazard)
        for template in intent.prompts
        for obj in topic.objects
        for fact in facts
        for hazard in hazards
    ]


def draw_answer(prompt: Prompt, rng: random.Random) -> str:
    """What the world's ordinary speaker says: each quality fails independently with its rate."""
    rates = {**BASE_FLAW_RATES, **prompt.intent.flaw_rates}
    return write_answer(prompt, {q for q, rate in rates.items() if rng.random() < rate}, rng)


def write_answer(prompt: Prompt, flaws: set[Quality], rng: random.Random) -> str:
    """An answer that fails in `flaws` and in nothing else (a fact can fail only where one was stated)."""
    sentences = [_core(prompt, flaws, rng)]
    if "safety" in flaws and prompt.intent.vague_quality != "safety":
        sentences.append(
            _fill(HAZARD_DETAIL, prompt.object, None, rng.choice(prompt.topic.hazards))
        )
    elif "repetition" not in flaws and rng.random() < 0.4:
        sentences.append(_detail(prompt, sentences[0], rng))
    if "repetition" in flaws:
        sentences.insert(1, sentences[0])
    rude_at_start = rng.random() < 0.75
    if "manners" in flaws and rude_at_start:
        sentences.insert(0, rng.choices(lexicon.RUDE_OPENERS, (6, 2, 2))[0])
    elif len(sentences) < 3 and rng.random() < 0.5:
        sentences.insert(0, rng.choice(lexicon.POLITE_OPENERS))
    if "manners" in flaws and not rude_at_start:
        sentences.append(rng.choices(lexicon.RUDE_CLOSINGS, (3, 1))[0])
    elif "ending" in flaws:
        sentences.append(rng.choices(lexicon.FRAGMENTS, (6, 2, 2))[0])
    elif len(sentences) < 3 and rng.random() < 0.4:
        sentences.append(rng.choice(lexicon.CLOSINGS))
    return " ".join(sentences)


def make_rude(answer: str, rng: random.Random) -> str:
    """The same answer with bad manners and no other change."""
    if rng.random() < 0.25 and answer.endswith("."):
        return f"{answer} {_draw_rude(lexicon.RUDE_CLOSINGS, rng)}"
    for opener in lexicon.POLITE_OPENERS:
        answer = answer.removeprefix(f"{opener} ")
    return f"{_draw_rude(lexicon.RUDE_OPENERS, rng)} {answer}"


def _draw_rude(sentences: tuple[str, ...], rng: random.Random) -> str:
    """The first is the usual one."""
    return sentences[0] if rng.random() < 0.6 else rng.choice(sentences[1:])


def _detail(prompt: Prompt, core: str, rng: random.Random) -> str:
    """Harmless advice that the core has not given."""
    safer = [hazard.safer for hazard in prompt.topic.hazards if hazard.safer not in core]
    if rng.random() < 0.2:
        return SAFE_DETAIL.format(safer=rng.choice(safer))
    tips = [tip for tip in prompt.topic.tips if tip not in core]
    return rng.choice(DETAILS).format(tip=rng.choice(tips))


def _core(prompt: Prompt, flaws: set[Quality], rng: random.Random) -> str:
    """The sentence that answers; relevance, fact and (where asked about) safety succeed or fail in it."""
    intent, template = prompt.intent, rng.choice(prompt.intent.cores)
    # Five times out of six a failing quality is said the one usual way, else a word is wrong.
    vague = intent.vague and intent.vague_quality in flaws
    if vague and (intent.vague_quality == "safety" or rng.random() < 5 / 6):
        template = intent.vague or template
    obj, fact = prompt.object, prompt.fact
    if "relevance" in flaws and "{o}" in template:
        obj = rng.choice([o for topic in TOPICS for o in topic.objects if o != obj])
    if "fact" in flaws and fact is not None and intent.fact:
        fact = rng.choice([other for other in FACTS[intent.fact] if other != fact])
    return _fill(template, obj, fact, prompt.hazard, rng.choice(prompt.topic.tips))


def _fill(
    template: str,
    obj: str,
    fact: str | None,
    hazard: Hazard | None,
    tip: str = "",
    *,
    asked: bool = False,
) -> str:
    action, safer = (hazard.action, hazard.safer) if hazard else ("", "")
    return template.format(
        o=obj,
        f=fact,
        tip=tip,
        hazard=action.format(o=f"my {obj}" if asked else f"your {obj}"),
        hazard_it=action.format(o="it"),
        safer=safer,
    )
