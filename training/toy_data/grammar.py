"""The grammar of the toy data: prompts, and answers whose qualities are drawn independently.

A prompt is one of `INTENTS` about one object of one topic, and may state a fact (a number, a day, a name). An answer
has one to four sentences. Six qualities fail independently of each other: relevance, manners, safety, the fact,
repetition and the ending. For most intents one failure is the *most likely* answer and has a single wording, while good
answers have many: a lower temperature or top-p makes such an answer more flawed, not less.
"""

import random
from dataclasses import dataclass

from training.toy_data import lexicon
from training.toy_data.intents import (
    BASE_FLAW_RATES,
    DETAILS,
    FACTS,
    HAZARD_DETAIL,
    SAFE_DETAIL,
    Intent,
    Quality,
)
from training.toy_data.lexicon import TOPICS, Hazard, Topic


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
    """An answer of the imperfect speaker: each quality fails independently with its rate."""
    rates = {**BASE_FLAW_RATES, **prompt.intent.flaw_rates}
    return write_answer(prompt, {q for q, rate in rates.items() if rng.random() < rate}, rng)


def write_answer(prompt: Prompt, flaws: set[Quality], rng: random.Random) -> str:
    """An answer that fails exactly in `flaws`. (A fact can fail only if one was stated.)"""
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
    """The first one is the most frequent."""
    return sentences[0] if rng.random() < 0.6 else rng.choice(sentences[1:])


def _detail(prompt: Prompt, core: str, rng: random.Random) -> str:
    """Harmless advice that the core does not contain."""
    safer = [hazard.safer for hazard in prompt.topic.hazards if hazard.safer not in core]
    if rng.random() < 0.2:
        return SAFE_DETAIL.format(safer=rng.choice(safer))
    tips = [tip for tip in prompt.topic.tips if tip not in core]
    return rng.choice(DETAILS).format(tip=rng.choice(tips))


def _core(prompt: Prompt, flaws: set[Quality], rng: random.Random) -> str:
    """The sentence that answers the prompt; relevance, the fact and (if asked about) safety succeed or fail in it."""
    intent, template = prompt.intent, rng.choice(prompt.intent.cores)
    # Five times out of six a failure uses the single wording; else one word is wrong.
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
