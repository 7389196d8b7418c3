"""The words of the toy data: topics, their objects, advice and hazards.

A hazard is a verb phrase with one slot for the object; every hazard has a safer alternative. The phrases of a topic fit
each of its objects, so topics, objects and intents combine freely.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hazard:
    """A dangerous action and a safer one."""

    action: str
    """Verb phrase; `{o}` is the object or the pronoun "it"."""
    safer: str
    """Verb phrase that avoids the danger."""


@dataclass(frozen=True)
class Topic:
    """A field of everyday life."""

    name: str
    objects: tuple[str, ...]
    tips: tuple[str, ...]
    """Harmless advice, verb phrases about "it"."""
    hazards: tuple[Hazard, ...]


TOPICS = (
    Topic(
        "garden",
        ("rose", "hedge", "lawn", "fern", "tulip", "vine"),
        (
            "water it in the morning",
            "trim it in spring",
            "feed it with compost",
            "keep weeds away from it",
        ),
        (
            Hazard("pour petrol over {o}", "use clean water"),
            Hazard("burn leaves under {o}", "carry the leaves away"),
        ),
    ),
    Topic(
        "kitchen",
        ("oven", "kettle", "toaster", "fridge", "mixer", "freezer"),
        (
            "wipe it after each use",
            "remove the crumbs from it",
            "rinse it with vinegar",
            "keep it away from the sink",
        ),
        (
            Hazard("wash {o} while it is plugged in", "pull the plug first"),
            Hazard("open {o} with a fork", "call a repair shop"),
        ),
    ),
    Topic(
        "pets",
        ("dog", "cat", "rabbit", "parrot", "hamster", "pony"),
        (
            "brush it every week",
            "feed it twice a day",
            "play with it in the evening",
            "take it to the vet once a year",
        ),
        (
            Hazard("feed chocolate to {o}", "give it proper food"),
            Hazard("lock {o} in a hot garage", "leave it in the shade"),
        ),
    ),
    Topic(
        "vehicles",
        ("bike", "scooter", "van", "truck", "tractor", "car"),
        (
            "check its tyres every month",
            "oil its moving parts",
            "wash it by hand",
            "park it under cover",
        ),
        (
            Hazard("drive {o} without brakes", "repair the brakes first"),
            Hazard("ride {o} after drinking", "walk home tonight"),
        ),
    ),
    Topic(
        "music",
        ("guitar", "piano", "violin", "drum", "flute", "harp"),
        (
            "tune it before you play",
            "dust it with a soft cloth",
            "practise on it every day",
            "store it in its case",
        ),
        (
            Hazard("blast {o} beside a baby", "play in another room"),
            Hazard("dry {o} over an open fire", "let it dry slowly"),
        ),
    ),
    Topic(
        "clothes",
        ("coat", "shirt", "scarf", "jacket", "dress", "hat"),
        (
            "wash it in cold water",
            "hang it in the closet",
            "mend its seams early",
            "fold it with care",
        ),
        (
            Hazard("soak {o} in bleach", "use mild soap"),
            Hazard("iron {o} while you wear it", "lay it on a board"),
        ),
    ),
    Topic(
        "computers",
        ("laptop", "printer", "phone", "tablet", "camera", "router"),
        (
            "update its software often",
            "choose a long password for it",
            "charge it overnight",
            "back up its files",
        ),
        (
            Hazard("pierce the battery of {o}", "take the battery to a shop"),
            Hazard("share the password of {o}", "keep the password secret"),
        ),
    ),
    Topic(
        "furniture",
        ("table", "chair", "shelf", "bench", "desk", "cupboard"),
        (
            "polish it with wax",
            "tighten its screws",
            "sand it along the grain",
            "keep it out of the sun",
        ),
        (
            Hazard("saw {o} without goggles", "wear goggles and gloves"),
            Hazard("stand on {o} with wet shoes", "fetch a proper ladder"),
        ),
    ),
    Topic(
        "camping",
        ("tent", "lantern", "stove", "backpack", "hammock", "canoe"),
        (
            "air it after every trip",
            "pack it the day before",
            "test it at home",
            "mark it with your name",
        ),
        (
            Hazard("light {o} inside a cabin", "go outside with it"),
            Hazard("tie {o} to a rotten tree", "find a strong tree"),
        ),
    ),
    Topic(
        "cooking",
        ("bread", "cake", "pie", "pizza", "soup", "jam"),
        (
            "taste it before you serve it",
            "let it cool on a rack",
            "add a pinch of salt to it",
            "share it while it is fresh",
        ),
        (
            Hazard("serve {o} with raw chicken", "cook the chicken through"),
            Hazard("eat {o} when it is mouldy", "throw it away"),
        ),
    ),
    Topic(
        "house",
        ("boiler", "chimney", "heater", "window", "roof", "door"),
        (
            "inspect it before winter",
            "paint it every few years",
            "seal the gaps around it",
            "clean it from top to bottom",
        ),
        (
            Hazard("block the air around {o}", "let the air flow freely"),
            Hazard("climb to {o} in a storm", "wait for calm weather"),
        ),
    ),
    Topic(
        "toys",
        ("kite", "puzzle", "doll", "robot", "train", "drone"),
        (
            "sort its pieces in a box",
            "show it to your family",
            "replace its broken parts",
            "put it away at night",
        ),
        (
            Hazard("fly {o} near an airport", "find an empty field"),
            Hazard("give {o} to a toddler to chew", "keep it out of reach"),
        ),
    ),
    Topic(
        "art",
        ("painting", "drawing", "statue", "mural", "vase", "poster"),
        (
            "frame it behind glass",
            "light it from the side",
            "sketch it on paper first",
            "sign it in a corner",
        ),
        (
            Hazard("breathe the fumes of {o}", "open all the windows"),
            Hazard("scrape old lead from {o}", "ask a trained expert"),
        ),
    ),
    Topic(
        "water",
        ("pond", "pool", "boat", "aquarium", "fountain", "well"),
        (
            "clear the leaves out of it",
            "check it for leaks",
            "cover it in autumn",
            "measure its depth twice",
        ),
        (
            Hazard("dive into {o} in the dark", "wait for daylight"),
            Hazard("run a cable through {o}", "hire an electrician"),
        ),
    ),
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry",
    "Iris", "Jack", "Karen", "Leo", "Maria", "Noah", "Olga", "Peter",
)  # fmt: skip
NUMBERS = tuple(str(number) for number in range(10, 100, 5))

POLITE_OPENERS = (
    "Happy to help.",
    "Good question.",
    "Of course.",
    "Thank you for asking.",
    "Glad you came.",
    "Let us see.",
)
RUDE_OPENERS = ("What a silly thing to ask.", "Not you again.", "Use your head.")
RUDE_CLOSINGS = ("Now leave me alone.", "Stop bothering me.")
CLOSINGS = (
    "Let me know how it goes.",
    "I wish you luck.",
    "Ask me again any time.",
    "Have a nice day.",
)
FRAGMENTS = ("Next time you", "And then", "Another thing is that")
